"""What the displays share: where they draw, their looks, and the scores that several draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from itertools import cycle
from numbers import Real
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..model_selection.steps import last_step
from ..notices import quoted
from ..validation import Number, valid_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "COLOURS",
    "MARKERS",
    "STYLES",
    "Display",
    "Look",
    "ScoresDisplay",
    "as_png",
    "looks",
    "markers_at",
    "new_axes",
    "panels",
    "plain",
    "scorer_of",
    "scores_of",
    "sets_by_name",
    "several_axes",
    "valid_axes",
    "wrapped",
]

# Okabe & Ito's palette for colour-blind readers, without its yellow, which is too pale for a line.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# In grey, styles and markers remain. With seven markers, 42 sets pass before a pair recurs.
STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL_WIDTH = 24  # characters
PNG_DPI = 200


class Look(NamedTuple):
    """How a line is drawn, in matplotlib's terms."""

    colour: str
    style: Any
    marker: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of matplotlib's ``plot`` for a line with hollow markers."""
        return {
            "color": self.colour,
            "linestyle": self.style,
            "marker": self.marker,
            "markerfacecolor": "white",
            "markersize": 4,
        }


def looks() -> Iterator[Look]:
    """Looks of lines, without end; the first six differ in colour, style and marker."""
    return map(Look, cycle(COLOURS), cycle(STYLES), cycle(MARKERS))


def markers_at(i: int) -> tuple[float, float]:
    """Where the i-th curve has markers, as ``markevery=``: rarely where other curves have them."""
    return 0.03 + 0.02 * (i % len(COLOURS)), 0.14


def new_axes(n_panels: int = 1, *, size: tuple[float, float] | None = None) -> NDArray[Any]:
    """Axes of a new figure, from top to bottom, over a common axis.

    `size` is that of the figure in inches; None takes matplotlib's, higher for several axes.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: run `pip install 'skood[plot]'`."
        ) from error
    width, height = plt.rcParams["figure.figsize"]
    if n_panels > 1:
        height *= (1 + n_panels) / 3
    _, axes = plt.subplots(
        n_panels,
        sharex=True,
        squeeze=False,
        layout="constrained",
        figsize=(width, height) if size is None else size,
    )
    return axes[:, 0]


def wrapped(name: Any, n_lines: int) -> str:
    """A name as a label of at most so many short lines, cut if it is longer."""
    return plain(fill(str(name), LABEL_WIDTH, max_lines=n_lines, placeholder="..."))


def plain(text: Any) -> str:
    """A text that matplotlib shows as it is: no formula, and no label that a legend leaves out."""
    shown = str(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def sets_by_name(sets: Any, name: str) -> dict[str, Any]:
    """Out-of-distribution (OOD) sets by name; a single set is named "OOD".

    A ValueError refuses an empty dict, which the user calls `name`.
    """
    if not isinstance(sets, Mapping):
        return {"OOD": sets}
    if not sets:
        raise ValueError(f"{name} is an empty dict; expected at least one set of OOD rows.")
    return dict(sets)


def scorer_of(estimator: Any) -> Callable[[Any], NDArray[Any]]:
    """What scores rows: a method of a fitted detector, or of what is built around one."""
    if not hasattr(estimator, "score_samples"):
        raise TypeError(
            f"estimator={quoted(estimator)} has no score_samples; expected a fitted detector such "
            "as SparseEnergyOODDetector, or a pipeline that ends in one. If you have scores, draw "
            "them with from_predictions."
        )
    score: Callable[[Any], NDArray[Any]] = estimator.score_samples
    return score


def scores_of(
    estimator: Any, X_id: Any, X_ood: Any
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Scores of ID rows and of each OOD set by a fitted detector, or what is built around one."""
    score, sets = scorer_of(estimator), sets_by_name(X_ood, "X_ood")
    return score(X_id), {name: score(rows) for name, rows in sets.items()}


def valid_axes(ax: Any) -> Any:
    """Axes of matplotlib; a TypeError says what else was got."""
    if not hasattr(ax, "plot") or not hasattr(ax, "figure"):
        raise TypeError(
            f"ax is a {type(ax).__name__}; expected axes of matplotlib, as plt.subplots gives them."
        )
    return ax


def several_axes(ax: Any) -> NDArray[Any]:
    """Axes of matplotlib in one dimension; a TypeError says what else was got."""
    try:
        axes = np.asarray(ax, dtype=object).ravel()
    except Exception:  # a tensor on no device
        axes = np.array([None])
    if not all(hasattr(each, "figure") for each in axes):
        valid_axes(ax)
    return axes


def panels(ax: Any, n_panels: int, what: str) -> NDArray[Any]:
    """Axes given, or those of a new figure; a ValueError says how many `what` needs."""
    axes = new_axes(n_panels) if ax is None else several_axes(ax)
    if len(axes) != n_panels:
        raise ValueError(f"ax holds {len(axes)} axes; expected {n_panels}, {what}.")
    return axes


class Display:
    """A picture on one axes, by the method ``_draw``."""

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        Self
            The display itself.
        """
        ax = new_axes(size=self._size())[0] if ax is None else valid_axes(ax)
        self._draw(ax)
        self.ax_: Axes = ax
        self.figure_: Figure | SubFigure = ax.figure
        return self

    def _draw(self, ax: Axes) -> None:
        raise NotImplementedError

    def _size(self) -> tuple[float, float] | None:
        """Size of a new figure in inches; None is matplotlib's."""
        return None


def as_png(display: Display) -> bytes:
    """A display as a sharp picture, drawn on a figure that no window shows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=display._size(), layout="constrained")
    display.plot(figure.subplots())
    file = BytesIO()
    figure.savefig(file, format="png", dpi=PNG_DPI)
    return file.getvalue()


class ScoresDisplay(Display):
    """A picture of scores and a threshold.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, finite, higher is more in-distribution.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of one OOD set, or of several by name.
    threshold : float, default=None
        Rows with at least this score are kept. None draws no threshold.
    """

    def __init__(
        self,
        *,
        score_id: ArrayLike,
        score_ood: ArrayLike | Mapping[str, ArrayLike],
        threshold: float | None = None,
    ) -> None:
        validate_parameter_constraints(
            {"threshold": [Number(Real, None, None, closed="neither"), None]},
            {"threshold": threshold},
            caller_name=type(self).__name__,
        )
        self.threshold = None if threshold is None else float(threshold)
        sets = sets_by_name(score_ood, "score_ood")
        self.score_id = valid_scores(score_id, "score_id", finite=True).astype(np.float64)
        self.score_ood = {
            name: valid_scores(scores, f"score_ood[{name!r}]", finite=True).astype(np.float64)
            for name, scores in sets.items()
        }

    @classmethod
    def from_estimator(
        cls, estimator: Any, X_id: Any, X_ood: Any, *, ax: Axes | None = None
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
        Self
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` has no ``score_samples``.
        ValueError
            If `X_ood` is an empty dict, or the scores cannot be drawn.
        """
        score_id, score_ood = scores_of(estimator, X_id, X_ood)
        detector = last_step(estimator)
        threshold, options = getattr(detector, "offset_", None), cls._options(detector)
        return cls.from_predictions(score_id, score_ood, threshold=threshold, ax=ax, **options)

    @classmethod
    def from_predictions(
        cls,
        score_id: ArrayLike,
        score_ood: ArrayLike | Mapping[str, ArrayLike],
        *,
        threshold: float | None = None,
        ax: Axes | None = None,
        **options: Any,
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
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.
        **options : object
            Other parameters of the display, if it has any.

        Returns
        -------
        Self
            The display, drawn.
        """
        return cls(score_id=score_id, score_ood=score_ood, threshold=threshold, **options).plot(ax)

    @classmethod
    def _options(cls, detector: Any) -> dict[str, Any]:
        """Further parameters of the display of a detector."""
        return {}
