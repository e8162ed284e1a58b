"""Heat tables of methods by sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..metrics import METRICS
from ..notices import quoted
from ..validation import valid_array, valid_scores
from .shared import Display, scores_of, sets_by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DetectionTableDisplay"]

METRICS_BY_NAME = {metric.name_at(0.95): metric for metric in METRICS}

CELL_HEIGHT = 0.32  # inches
CHARACTER_WIDTH = 0.085
BRIGHT = np.linspace(0.45, 1, 256)
"""Part of the viridis map on which black numbers are readable: a contrast of 4.5 (WCAG 2.2)."""


class DetectionTableDisplay(Display):
    """Heat table of methods (rows) by out-of-distribution sets and their mean (columns).

    Make it with `from_estimator` or `from_predictions`, or from values that you have. Each value is
    printed in its cell, the best of each column in bold. The lighter a cell, the better.

    Parameters
    ----------
    values : array-like of shape (n_methods, n_columns)
        Values to print, such as percent; finite.
    methods : sequence of str of length n_methods
        Names of the rows.
    columns : sequence of str of length n_columns
        Names of the columns, such as the sets and "mean".
    spread : array-like of shape (n_methods, n_columns), default=None
        Standard deviations, or another spread, to print after "±". None prints none.
    lower_is_better : bool, default=False
        Whether the smallest value of a column is the best.
    label : str, default=None
        What the values are, such as "FPR95, %". None says only whether lower or higher is better.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError
        If values are not real numbers.
    ValueError
        If values are empty, not 2-D, masked, NaN or infinite, if a spread is negative or of another
        shape, or if there is not one name for each row and column, all distinct.

    Notes
    -----
    If other values are printed like the best one, they are in bold, too. The colours are the bright
    half of the viridis map, which look evenly apart [1]_, to most colour-blind readers as well, and
    on which black numbers can be read.

    References
    ----------
    .. [1] van der Walt & Smith, "A better default colormap for matplotlib", SciPy 2015.

    Examples
    --------
    >>> from skood.plotting import DetectionTableDisplay
    >>> display = DetectionTableDisplay(
    ...     [[43.6, 50.2], [21.2, 28.8]],
    ...     methods=["untouched", "sparse"],
    ...     columns=["svhn", "mean"],
    ...     spread=[[0.3, 0.2], [0.4, 0.1]],
    ...     lower_is_better=True,
    ...     label="FPR95, %",
    ... ).plot()
    >>> [text.get_text() for text in display.ax_.texts]
    ['43.6 ± 0.3', '50.2 ± 0.2', '21.2 ± 0.4', '28.8 ± 0.1']
    """

    def __init__(
        self,
        values: ArrayLike,
        *,
        methods: Sequence[str],
        columns: Sequence[str],
        spread: ArrayLike | None = None,
        lower_is_better: bool = False,
        label: str | None = None,
    ) -> None:
        validate_parameter_constraints(
            {"lower_is_better": ["boolean"], "label": [str, None]},
            {"lower_is_better": lower_is_better, "label": label},
            caller_name=type(self).__name__,
        )
        self.values = _table(values, "values")
        self.methods = _valid_names(methods, "methods", self.values.shape[0])
        self.columns = _valid_names(columns, "columns", self.values.shape[1])
        self.spread = None if spread is None else _valid_spread(spread, self.values.shape)
        self.lower_is_better = lower_is_better
        self.label = label

    @classmethod
    def from_estimator(
        cls,
        estimators: Mapping[str, Any] | Iterable[tuple[str, Any]],
        X_id: Any,
        X_ood: Any,
        *,
        metric: str = "fpr95",
        ax: Axes | None = None,
    ) -> Self:
        """Score rows with fitted detectors, and draw.

        Parameters
        ----------
        estimators : dict of str to estimator, or sequence of (str, estimator)
            Fitted detectors with ``score_samples``, or pipelines or searches around them.
        X_id : array-like of shape (n_id, ...)
            ID rows that the detectors were not trained on.
        X_ood : dict of str to array-like, or array-like of shape (n_ood, ...)
            OOD rows of several sets by name, or of one.
        metric : str, default="fpr95"
            What to compute from the scores, with ID as the positive class: a column of
            `skood.metrics.detection_report`, such as "auroc".
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        DetectionTableDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If an estimator has no ``score_samples``.
        ValueError
            If there is no estimator or no set, a name comes twice, scores cannot be used, or
            `metric` is unknown.
        """
        _metric(metric)
        pairs = _pairs(estimators)
        _valid_names([name for name, _ in pairs], "estimators", len(pairs))
        scores = {name: scores_of(estimator, X_id, X_ood) for name, estimator in pairs}
        return cls.from_predictions(
            {name: score_id for name, (score_id, _) in scores.items()},
            {name: score_ood for name, (_, score_ood) in scores.items()},
            metric=metric,
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        score_id: Mapping[str, ArrayLike],
        score_ood: Mapping[str, Mapping[str, ArrayLike] | ArrayLike],
        *,
        metric: str = "fpr95",
        ax: Axes | None = None,
    ) -> Self:
        """Draw a metric of scores, in percent, and its mean over the sets.

        Parameters
        ----------
        score_id : dict of str to array-like of shape (n_id,)
            Scores of ID rows by method, higher is more in-distribution.
        score_ood : dict of str to dict of str to array-like of shape (n_ood,)
            Scores of OOD rows by method and set; the sets are the same for each method.
        metric : str, default="fpr95"
            What to compute from the scores, with ID as the positive class: a column of
            `skood.metrics.detection_report`, such as "auroc".
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        DetectionTableDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If scores are not real numbers, or not named by method.
        ValueError
            If there are no scores, if they are not 1-D, masked or NaN, if methods or sets differ,
            if a set is named "mean", or if `metric` is unknown.
        """
        computed = _metric(metric)
        sets = _sets_by_method(score_id, score_ood)
        values = []
        for method, of_id in score_id.items():
            valid_id = valid_scores(of_id, f"score_id[{method!r}]")
            row = [
                computed.function(
                    valid_id, valid_scores(scores, f"score_ood[{method!r}][{name!r}]")
                )
                for name, scores in sets[method].items()
            ]
            values.append([*row, np.mean(row)])
        display = cls(
            100 * np.array(values),
            methods=list(score_id),
            columns=[*next(iter(sets.values())), "mean"],
            lower_is_better=computed.is_error,
            label=f"{computed.title}, %",
        )
        return display.plot(ax)

    def _draw(self, ax: Axes) -> None:
        cells = self._cells()
        ax.pcolormesh(self.values, cmap=self._colours(), edgecolors="white", linewidth=1)
        best = self._best()
        for i, j in np.ndindex(self.values.shape):
            ax.text(
                j + 0.5,
                i + 0.5,
                cells[i][j],
                color="black",
                fontweight="bold" if best[i, j] else "normal",
                fontsize="small",
                horizontalalignment="center",
                verticalalignment="center",
            )
        n_methods, n_columns = self.values.shape
        ax.set_yticks(np.arange(n_methods) + 0.5, self.methods)
        ax.set_xticks(np.arange(n_columns) + 0.5, self.columns, rotation=30, ha="left")
        ax.xaxis.set_ticks_position("top")
        ax.tick_params(length=0)
        ax.invert_yaxis()
        ax.spines[:].set_visible(False)
        direction = f"{'lower' if self.lower_is_better else 'higher'} is better, best in bold"
        ax.set_xlabel(direction if self.label is None else f"{self.label} ({direction})")

    def _colours(self) -> Any:
        import matplotlib as mpl
        from matplotlib.colors import ListedColormap

        colours = ListedColormap(mpl.colormaps["viridis"](BRIGHT))
        return colours.reversed() if self.lower_is_better else colours

    def _cells(self) -> list[list[str]]:
        if self.spread is None:
            return [[_shown(value) for value in row] for row in self.values]
        return [
            [f"{_shown(value)} ± {_shown(spread)}" for value, spread in zip(*rows, strict=True)]
            for rows in zip(self.values, self.spread, strict=True)
        ]

    def _best(self) -> NDArray[np.bool_]:
        """Which cells are printed like the best value of their column."""
        best = (np.min if self.lower_is_better else np.max)(self.values, axis=0)
        return np.vectorize(_shown)(self.values) == np.vectorize(_shown)(best)

    def _size(self) -> tuple[float, float]:
        """Size of a figure in which the texts fit, in inches."""
        widest = max(len(cell) for row in self._cells() for cell in row)
        names = max(map(len, self.methods)), max(map(len, self.columns))
        n_methods, n_columns = self.values.shape
        return (
            CHARACTER_WIDTH * (names[0] + names[1] + n_columns * (widest + 2)),
            CELL_HEIGHT * (n_methods + 2) + CHARACTER_WIDTH * names[1] / 2,
        )


def _shown(value: float) -> str:
    return f"{value:.1f}"


def _sets_by_method(score_id: Any, score_ood: Any) -> dict[str, dict[str, Any]]:
    """OOD scores by method and set; the sets of all methods are in one order."""
    for name, scores in (("score_id", score_id), ("score_ood", score_ood)):
        if not isinstance(scores, Mapping):
            raise TypeError(
                f"{name} is a {type(scores).__name__}; expected a dict from the names of methods "
                "to scores."
            )
    if not score_id or set(score_id) != set(score_ood):
        raise ValueError(
            f"score_id has the methods {quoted(list(score_id))}, score_ood "
            f"{quoted(list(score_ood))}; expected the same, at least one."
        )
    sets = {
        method: sets_by_name(score_ood[method], f"score_ood[{method!r}]") for method in score_id
    }
    first, *others = sets
    for method in others:
        if set(sets[method]) != set(sets[first]):
            raise ValueError(
                f"score_ood[{method!r}] has the sets {quoted(list(sets[method]))}, "
                f"score_ood[{first!r}] {quoted(list(sets[first]))}; expected the same sets for "
                "each method."
            )
    return {method: {name: sets[method][name] for name in sets[first]} for method in sets}


def _metric(name: str) -> Any:
    """The metric of a name; an error says which there are, and the name here of one elsewhere."""
    validate_parameter_constraints({"metric": [str]}, {"metric": name}, caller_name="from_*")
    if name not in METRICS_BY_NAME:
        here = [known for known, metric in METRICS_BY_NAME.items() if metric.is_named(name)]
        hint = f" It is named {here[0]!r} here." if here else ""
        raise ValueError(
            f"The 'metric' parameter must be one of {list(METRICS_BY_NAME)}. Got "
            f"{quoted(name)} instead.{hint}"
        )
    return METRICS_BY_NAME[name]


def _is_iterable(names: object) -> bool:
    # Arrays and tensors of no dimension have the method, and fail.
    return isinstance(names, Iterable) and getattr(names, "ndim", 1) > 0


def _pairs(estimators: Any) -> list[tuple[str, Any]]:
    """Names and estimators; a TypeError says if these are no pairs."""
    named = estimators.items() if isinstance(estimators, Mapping) else estimators
    pairs: list[Any] = list(named) if _is_iterable(named) else [named]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"estimators is a {type(estimators).__name__} without names; expected a dict from "
            "names to estimators."
        )
    return pairs


def _table(values: ArrayLike, name: str) -> NDArray[np.float64]:
    return valid_array(values, name, ("n_methods", "n_columns")).astype(np.float64)


def _valid_spread(spread: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    table = _table(spread, "spread")
    if table.shape != shape:
        raise ValueError(f"spread has shape {table.shape}; expected that of values, {shape}.")
    if (table < 0).any():
        raise ValueError(f"spread has a value of {table.min():g}; expected at least 0.")
    return table


def _valid_names(names: Iterable[str], name: str, expected: int) -> list[str]:
    if isinstance(names, str) or not _is_iterable(names):
        raise TypeError(f"{name} is a {type(names).__name__}; expected a list of names.")
    listed = [str(each) for each in names]
    if len(listed) != expected or len(set(listed)) < len(listed) or not listed:
        raise ValueError(
            f"{name} names {quoted(listed)}; expected {expected or 'some'} names, none of them "
            "twice."
        )
    return listed
