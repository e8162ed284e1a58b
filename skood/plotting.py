"""Pictures of a detector, in the manner of scikit-learn's displays; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.pipeline import Pipeline

from .metrics import _valid_scores, _valid_sets
from .scores import Energy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ScoreDistributionDisplay"]

BINS = 40

# Okabe & Ito's palette, which colour-blind readers tell apart; its yellow is too pale for a line.
OOD_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# In grey, styles and markers remain. Seven markers, so that 42 sets pass before a pair recurs.
OOD_STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
OOD_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class ScoreDistributionDisplay:
    """Distributions of the scores of in-distribution and out-of-distribution rows.

    Make it with `from_estimator` or `from_predictions`. The in-distribution (ID) scores are a
    filled area, those of each out-of-distribution (OOD) set a line, the threshold a vertical line;
    the legend gives the share of each set that the threshold keeps.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, finite, higher is more in-distribution.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of one OOD set, or of several by name.
    threshold : float, default=None
        Rows with a score of at least this are kept. None draws no threshold.
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
    TypeError
        If scores are not real numbers, or `threshold` is not a number.
    ValueError
        If scores are empty, not 1-D, masked, NaN or infinite, or `threshold` is not finite.

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
        sets = score_ood if isinstance(score_ood, Mapping) else {"OOD": score_ood}
        self.score_id = _finite(_valid_scores(score_id, "score_id"), "score_id")
        self.score_ood = {
            name: _finite(scores, f"score_ood[{name!r}]")
            for name, scores in _valid_sets(sets).items()
        }
        self.threshold = _valid_threshold(threshold)
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
            Fitted, with ``score_samples``: a detector, or a pipeline or a search around one. The
            threshold is its ``offset_``, where it has one.
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
        if not hasattr(estimator, "score_samples"):
            raise TypeError(
                f"estimator={estimator!r} has no score_samples; expected a fitted detector such "
                "as SparseEnergyOODDetector, or a pipeline that ends in one. Draw scores that "
                "you have with from_predictions."
            )
        if isinstance(X_ood, Mapping) and not X_ood:
            raise ValueError("X_ood is an empty dict; expected at least one set of OOD rows.")
        score = estimator.score_samples
        detector = _unwrapped(estimator)
        return cls.from_predictions(
            score(X_id),
            {name: score(rows) for name, rows in X_ood.items()}
            if isinstance(X_ood, Mapping)
            else score(X_ood),
            threshold=getattr(detector, "offset_", None),
            score_name=_score_name(detector),
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
            Rows with a score of at least this are kept. None draws no threshold.
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
        TypeError
            If scores are not real numbers, or `threshold` is not a number.
        ValueError
            If scores are empty, not 1-D, masked, NaN or infinite, or `threshold` is not finite.
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
        ax = _new_axes() if ax is None else ax
        ax.stairs(
            np.histogram(self.score_id, edges, density=True)[0],
            edges,
            fill=True,
            facecolor="0.85",
            edgecolor="black",
            linewidth=1,
            label=self._label("ID", self.score_id),
        )
        looks = zip(cycle(OOD_COLOURS), cycle(OOD_STYLES), cycle(OOD_MARKERS), strict=False)
        for name, scores in self.score_ood.items():
            colour, style, marker = next(looks)
            ax.plot(
                *_polygon(scores, edges),
                color=colour,
                linestyle=style,
                marker=marker,
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
    """Densities at the centres of the bins, from the empty one before the first to that after."""
    density = np.pad(np.histogram(scores, edges, density=True)[0], 1)
    width = edges[1] - edges[0]
    centres = edges[0] + width * (np.arange(len(density)) - 0.5)
    occupied = np.flatnonzero(density)
    drawn = slice(occupied[0] - 1, occupied[-1] + 2)
    return centres[drawn], density[drawn]


def _new_axes() -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: run `pip install 'skood[plot]'`."
        ) from error
    return plt.subplots(layout="constrained")[1]


def _unwrapped(estimator: Any) -> Any:
    """The estimator that scores: last of a pipeline, best of a search."""
    if isinstance(estimator, Pipeline):
        return _unwrapped(estimator[-1])
    best = getattr(estimator, "best_estimator_", None)
    return estimator if best is None else _unwrapped(best)


def _score_name(detector: Any) -> str:
    score = getattr(detector, "score_function", None)
    if score == "energy" or isinstance(score, Energy):
        return "negative energy"
    return f"score ({score})" if isinstance(score, str) else "score"


def _finite(scores: NDArray[Any], name: str) -> NDArray[np.float64]:
    n_infinite = np.count_nonzero(np.isinf(scores))
    if n_infinite:
        raise ValueError(
            f"{name} has {n_infinite} infinite values in {scores.size} scores; expected finite "
            "ones, as a histogram has no bin for the others. Drop or clip them."
        )
    return scores.astype(np.float64)


def _valid_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold={threshold!r}; expected a number on the scale of the scores.")
    if not np.isfinite(float(threshold)):
        raise ValueError(f"threshold={threshold!r}; expected a finite number, or None for none.")
    return float(threshold)
