"""Distributions of scores, with the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..scores import Energy
from .shared import COLOURS, ScoresDisplay, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ScoreDistributionDisplay"]

BINS = 40
OF_ID = {"facecolor": "0.85", "edgecolor": "0.55", "linewidth": 0.8}
OF_SET = {"facecolor": (COLOURS[0], 0.35), "edgecolor": COLOURS[0], "linewidth": 1.2}
PANEL_HEIGHT = 0.6  # inches
AREA_HEIGHT = 0.85  # of a panel's


class ScoreDistributionDisplay(ScoresDisplay):
    """Distributions of the scores of in-distribution and out-of-distribution rows.

    Make it with `from_estimator` or `from_predictions`. The in-distribution (ID) scores are a grey
    area at the top. Below it, each out-of-distribution (OOD) set has a panel of its own, against
    the same grey area. A vertical line is the threshold. Beside each panel stands the share of its
    rows that the threshold keeps.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, finite, higher is more in-distribution.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of one OOD set, or of several by name.
    threshold : float, default=None
        Rows with at least this score are kept. None draws no threshold.
    score_name : str, default="score"
        Label of the axis of scores.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked, NaN or infinite, or `threshold` is
        not a finite number.

    Notes
    -----
    All histograms have the same bins. Each is scaled to its own highest bin, so that a narrow one
    does not flatten the others.

    References
    ----------
    Okabe & Ito, "Color universal design: how to make figures and presentations that are friendly to
    colorblind people", 2008 (colours).

    Examples
    --------
    >>> import numpy as np
    >>> from skood.plotting import ScoreDistributionDisplay
    >>> rng = np.random.RandomState(0)
    >>> display = ScoreDistributionDisplay.from_predictions(
    ...     rng.normal(5, 1, size=500), {"far": rng.normal(0, 1, size=300)}, threshold=3
    ... )
    >>> [label.get_text().splitlines() for label in display.ax_.get_yticklabels()]
    [['ID', '97.4 % kept'], ['far', '0.0 % kept']]
    """

    def __init__(
        self,
        *,
        score_id: ArrayLike,
        score_ood: ArrayLike | Mapping[str, ArrayLike],
        threshold: float | None = None,
        score_name: str = "score",
    ) -> None:
        super().__init__(score_id=score_id, score_ood=score_ood, threshold=threshold)
        validate_parameter_constraints(
            {"score_name": [str]}, {"score_name": score_name}, caller_name=type(self).__name__
        )
        self.score_name = score_name

    def _draw(self, ax: Axes) -> None:
        sets = list(self.score_ood.values())
        edges = np.histogram_bin_edges(np.concatenate([self.score_id, *sets]), BINS)
        for row, scores in enumerate([None, *sets]):
            _draw_area(ax, -row, self.score_id, edges, OF_ID)
            if scores is not None:
                _draw_area(ax, -row, scores, edges, OF_SET)
        named = [("ID", self.score_id), *self.score_ood.items()]
        labels = [self._label(name, scores) for name, scores in named]
        ax.set_yticks(0.4 - np.arange(len(labels)), labels, fontsize="small")
        ax.tick_params(axis="y", length=0)
        ax.spines[["left", "right", "top"]].set_visible(False)
        ax.set(xlabel=self.score_name, ylim=(-len(sets), 1 if self.threshold is None else 1.35))
        if self.threshold is not None:
            self._mark_threshold(ax, self.threshold)

    def _mark_threshold(self, ax: Axes, threshold: float) -> None:
        ax.axvline(threshold, color="black", linewidth=1.5)
        is_left = threshold < np.mean(ax.get_xlim())
        ax.annotate(
            f"threshold {threshold:.4g}",
            (threshold, 1.05),
            xytext=(4 if is_left else -4, 0),
            textcoords="offset points",
            ha="left" if is_left else "right",
            fontsize="small",
        )

    def _size(self) -> tuple[float, float]:
        return 6.4, max(3.0, 1.0 + PANEL_HEIGHT * (1 + len(self.score_ood)))

    @classmethod
    def _options(cls, detector: Any) -> dict[str, Any]:
        score = getattr(detector, "score_function", None)
        if score == "energy" or isinstance(score, Energy):
            return {"score_name": "negative energy"}
        return {"score_name": f"score ({score})" if isinstance(score, str) else "score"}

    def _label(self, name: Any, scores: NDArray[np.float64]) -> str:
        lines = [wrapped(name, 2)]
        if self.threshold is not None:
            lines.append(f"{100 * np.mean(scores >= self.threshold):.1f} % kept")
        return "\n".join(lines)


def _draw_area(
    ax: Axes,
    bottom: float,
    scores: NDArray[np.float64],
    edges: NDArray[np.float64],
    options: dict[str, Any],
) -> None:
    """A histogram on a base line of its own, as high as any other."""
    counts = np.histogram(scores, edges)[0]
    heights = bottom + AREA_HEIGHT * counts / counts.max()
    ax.stairs(heights, edges, baseline=bottom, fill=True, **options)
