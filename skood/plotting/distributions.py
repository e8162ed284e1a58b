"""Distributions of scores, with the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..model_selection.steps import last_step
from ..scores import Energy
from .shared import looks, new_axes, scores_of, scores_to_draw, threshold_to_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ScoreDistributionDisplay"]

BINS = 40


class ScoreDistributionDisplay:
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
        self.score_id, self.score_ood = scores_to_draw(score_id, score_ood)
        self.threshold = threshold_to_draw(threshold, "ScoreDistributionDisplay")
        self.score_name = score_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X_id: Any,
        X_ood: Any,
        *,
        ax: Axes | None = None,
    ) -> Self:
        """Score rows with a fitted detector, and draw.

        Parameters
        ----------
        estimator : estimator
            A fitted detector with ``score_samples``, or a pipeline or a search around one. The
            threshold is its ``offset_``, if it has one.
        X_id : array-like of shape (n_id, ...)
            ID rows that the detector was not trained on.
        X_ood : array-like of shape (n_ood, ...), or dict of str to array-like
            OOD rows of one set, or of several by name.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ScoreDistributionDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` has no ``score_samples``.
        ValueError
            If `X_ood` is an empty dict, or the scores cannot be drawn.
        ImportError
            If matplotlib is not installed.
        """
        score_id, score_ood, threshold = scores_of(estimator, X_id, X_ood)
        return cls.from_predictions(
            score_id,
            score_ood,
            threshold=threshold,
            score_name=_score_name(last_step(estimator)),
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        score_id: ArrayLike,
        score_ood: ArrayLike | Mapping[str, ArrayLike],
        *,
        threshold: float | None = None,
        score_name: str = "score",
        ax: Axes | None = None,
    ) -> Self:
        """Draw scores.

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
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ScoreDistributionDisplay
            The display, drawn.

        Raises
        ------
        TypeError, ValueError
            If scores are not real numbers, empty, not 1-D, masked, NaN or infinite, or `threshold`
            is not a finite number.
        ImportError
            If matplotlib is not installed.
        """
        display = cls(
            score_id=score_id, score_ood=score_ood, threshold=threshold, score_name=score_name
        )
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the distributions as densities over common bins.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ScoreDistributionDisplay
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        everything = np.concatenate([self.score_id, *self.score_ood.values()])
        edges = np.histogram_bin_edges(everything, BINS)
        ax = new_axes()[0] if ax is None else ax
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
                color=look.colour,
                linestyle=look.style,
                marker=look.marker,
                markerfacecolor="white",
                markersize=4,
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
        self.ax_: Axes = ax
        self.figure_: Figure | SubFigure = ax.figure
        return self

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


def _score_name(detector: Any) -> str:
    score = getattr(detector, "score_function", None)
    if score == "energy" or isinstance(score, Energy):
        return "negative energy"
    return f"score ({score})" if isinstance(score, str) else "score"
