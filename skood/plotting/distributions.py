"""Distributions of scores, with the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..scores import Energy
from .shared import ScoresDisplay, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ScoreDistributionDisplay"]

BINS = 40


class ScoreDistributionDisplay(ScoresDisplay):
    """Distributions of the scores of in-distribution and out-of-distribution rows.

    Make it with `from_estimator` or `from_predictions`. The in-distribution (ID) scores are a
    filled area, those of each out-of-distribution (OOD) set a line, and the threshold is a vertical
    line. The legend gives the share of each set that the threshold keeps.

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
    >>> [text.get_text() for text in display.ax_.get_legend().get_texts()]
    ['ID: 97.4 % kept', 'far: 0.0 % kept', 'threshold 3']
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
        everything = np.concatenate([self.score_id, *self.score_ood.values()])
        edges = np.histogram_bin_edges(everything, BINS)
        ax.stairs(
            np.histogram(self.score_id, edges, density=True)[0],
            edges,
            fill=True,
            facecolor="0.85",
            edgecolor="black",
            linewidth=1,
            label=self._label("ID", self.score_id),
        )
        for look, (name, scores) in zip(looks(), self.score_ood.items(), strict=False):
            ax.plot(
                *_polygon(scores, edges),
                **look.options,
                label=self._label(name, scores),
            )
        if self.threshold is not None:
            ax.axvline(
                self.threshold,
                color="black",
                linewidth=2,
                label=f"threshold {self.threshold:.4g}",
            )
        ax.set(xlabel=self.score_name, ylabel="density")
        ax.set_ylim(bottom=0)
        ax.legend(handlelength=3.5)

    @classmethod
    def _options(cls, detector: Any) -> dict[str, Any]:
        score = getattr(detector, "score_function", None)
        if score == "energy" or isinstance(score, Energy):
            return {"score_name": "negative energy"}
        return {"score_name": f"score ({score})" if isinstance(score, str) else "score"}

    def _label(self, name: str, scores: NDArray[np.float64]) -> str:
        if self.threshold is None:
            return name
        return f"{name}: {100 * np.mean(scores >= self.threshold):.1f} % kept"


def _polygon(
    scores: NDArray[np.float64], edges: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Densities at the centres of the bins, with one empty bin on either side."""
    density = np.pad(np.histogram(scores, edges, density=True)[0], 1)
    width = edges[1] - edges[0]
    centres = edges[0] + width * (np.arange(len(density)) - 0.5)
    occupied = np.flatnonzero(density)
    drawn = slice(occupied[0] - 1, occupied[-1] + 2)
    return centres[drawn], density[drawn]
