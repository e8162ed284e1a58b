"""What a search over the sparsity weight found, or the path of a detector that chose it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.utils._param_validation import validate_parameter_constraints

from ..accuracy import accurate_enough
from ..metrics import METRICS
from ..model_selection.guard import TOLERANCE, AccuracyGuard
from ..notices import quoted
from ..validation import Number, check_results
from .shared import COLOURS, MARKERS, looks, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["SelectionDisplay"]

WEIGHT = "sparsity_weight"
FPR95, ACCURACY_CHANGE, MEAN_L1 = "neg_fpr_at_tpr", "accuracy_change", "mean_l1"
VALID_WEIGHT = Number(Real, 0, None, closed="left")
AXIS_LABELS = {metric.name_in_searches: metric.title for metric in METRICS} | {
    ACCURACY_CHANGE: "accuracy change",
    MEAN_L1: "mean L1 of features",
}
UNSET = "unset"
TICKS_APART = 0.13
"""Width of the label of a tick, as a share of the axis of weights."""


class SelectionDisplay:
    """What a search over the sparsity weight found, and what it chose.

    Make it with `from_estimator` or `from_cv_results`. Panels over a common axis of weights show
    what the search has computed: the detection scores, the change of the accuracy on
    in-distribution (ID) rows and the mean L1 norm of their features. Points are means over the
    folds, bars are standard deviations. For a detector with ``sparsity_weight="auto"`` they are
    means and standard deviations over the kinds of outliers, and a dashed line is the network
    before fine-tuning.

    Parameters
    ----------
    cv_results : dict
        The ``cv_results_`` of a search over ``sparsity_weight``, alone or of a step of a pipeline.
    metric : str, default=None
        Score that decided. It is drawn together with "neg_fpr_at_tpr", if that was computed. None
        draws "neg_fpr_at_tpr" alone, or else the first detection score.
    tolerance : float, default=None
        Accuracy that may be lost, as in `AccuracyGuard`. The panel is grey up to this loss.
        Candidates beyond it have white markers. With None, no candidate is
        excluded.
    chosen : int, default=None
        Index of the candidate that was chosen; a line and a ring mark it.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes
        One for each panel, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If `cv_results` lacks the weights or a score, if a weight is not a number of at least 0, or
        if another argument is of the wrong type or out of range.

    Notes
    -----
    Errors, such as "neg_fpr_at_tpr", are drawn without the minus: less is better. The axis of
    weights is linear from 0 to the smallest weight above it, and logarithmic from there.

    If other parameters vary, too, each combination of them is a line. If there are too many to tell
    apart, as in a random search, all are points of one kind. In a halving search, the resource is
    one of these parameters.

    References
    ----------
    Okabe & Ito, "Color universal design: how to make figures and presentations that are friendly to
    colorblind people", 2008 (colours).

    Examples
    --------
    >>> from skood.plotting import SelectionDisplay
    >>> cv_results = {
    ...     "params": [{"sparsity_weight": weight} for weight in (0.0, 0.02, 0.2)],
    ...     "mean_test_neg_fpr_at_tpr": [-0.5, -0.4, -0.2],
    ...     "std_test_neg_fpr_at_tpr": [0.05, 0.04, 0.06],
    ...     "mean_test_accuracy_change": [0.0, -0.005, -0.08],
    ...     "std_test_accuracy_change": [0.002, 0.003, 0.01],
    ... }
    >>> display = SelectionDisplay.from_cv_results(cv_results, tolerance=0.01, chosen=1)
    >>> [ax.get_ylabel() for ax in display.axes_]
    ['FPR95', 'accuracy change']
    """

    def __init__(
        self,
        *,
        cv_results: Mapping[str, Any],
        metric: str | None = None,
        tolerance: float | None = None,
        chosen: int | None = None,
    ) -> None:
        validate_parameter_constraints(
            {
                "metric": [str, None],
                "tolerance": [*TOLERANCE, None],
                "chosen": [Number(Integral, 0, None, closed="left"), None],
            },
            {"metric": metric, "tolerance": tolerance, "chosen": chosen},
            caller_name="SelectionDisplay",
        )
        check_results(cv_results)
        params = list(cv_results["params"]) if "params" in cv_results else []
        name = _weight_name(params)
        self.weights = _valid_weights(params, name)
        self.scores = {
            panel: _mean_and_std(cv_results, panel) for panel in _panels(cv_results, metric)
        }
        self.lines = _lines(cv_results, name, self.weights)
        self.tolerance = tolerance
        self.accurate = np.ones(len(params), dtype=bool)
        if tolerance is not None:
            change, _ = _mean_and_std(cv_results, ACCURACY_CHANGE)
            self.accurate = accurate_enough(change, tolerance)
        if chosen is not None and chosen >= len(params):
            raise ValueError(
                f"chosen={chosen}; expected the index of one of {len(params)} candidates, from 0."
            )
        self.chosen = chosen
        self.worse = np.zeros(len(params), dtype=bool)
        self.untouched: dict[str, float] = {}

    @classmethod
    def from_estimator(cls, search: Any, *, ax: Sequence[Axes] | None = None) -> Self:
        """Draw a fitted search, or a detector that chose its weight.

        Parameters
        ----------
        search : estimator
            Fitted `GridSearchCV`, `RandomizedSearchCV`, halving search or another with
            ``cv_results_``. Its ``refit`` says which score decided; if that is an `AccuracyGuard`,
            it says which accuracy may be lost, too. Or a `SparseEnergyOODDetector` that was fitted
            with ``sparsity_weight="auto"``; of the scores, only the chosen one is drawn. Or a
            pipeline that ends in one of these, or a `RejectingClassifier` around one.
        ax : array-like of matplotlib.axes.Axes, default=None
            Axes to draw on, one for each panel; None makes a figure.

        Returns
        -------
        SelectionDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `search` is neither a search nor a detector.
        NotFittedError
            If it is not fitted.
        ValueError
            If it did not search over ``sparsity_weight``, or lacks a score.
        """
        if isinstance(search, Pipeline):
            return cls.from_estimator(search[-1], ax=ax)
        if hasattr(search, "detector_"):
            return cls.from_estimator(search.detector_, ax=ax)
        if hasattr(search, "path_"):
            return cls._from_path(search).plot(ax)
        if not hasattr(search, "cv_results_"):
            if hasattr(search, "refit"):
                raise NotFittedError(
                    f"This {type(search).__name__} is not fitted, so there is nothing to draw. "
                    "Call fit first."
                )
            raise TypeError(
                f"search={quoted(search)} has no cv_results_; expected a fitted search such as "
                'GridSearchCV, or a fitted detector with sparsity_weight="auto". If you have '
                "results, draw them with from_cv_results."
            )
        results, metric = _named_results(search)
        return cls.from_cv_results(
            results,
            metric=metric,
            tolerance=search.refit.tolerance if isinstance(search.refit, AccuracyGuard) else None,
            chosen=getattr(search, "best_index_", None),
            ax=ax,
        )

    @classmethod
    def _from_path(cls, detector: Any) -> Self:
        chosen = next((record for record in detector.path_ if record["chosen"]), None)
        same = [r for r in detector.path_ if r["score_function"] == (chosen or r)["score_function"]]
        rungs = [record for record in same if record["sparsity_weight"] is not None]
        before = next((record for record in same if record["sparsity_weight"] is None), None)
        if before is None or not rungs:
            raise ValueError(
                f"This {type(detector).__name__} has tried no path of weights, as sparsity_weight="
                f"{detector.sparsity_weight!r} and max_epochs={detector.max_epochs!r}. Fit it with "
                'sparsity_weight="auto" and epochs; or draw a search.'
            )
        display = cls(
            cv_results={
                "params": [{WEIGHT: record[WEIGHT]} for record in rungs],
                **{
                    f"{statistic}_test_{name}": [value[i] for value in map(of_record, rungs)]
                    for name, of_record in PANELS_OF_A_PATH.items()
                    for i, statistic in enumerate(("mean", "std"))
                },
            },
            metric="auroc",
            tolerance=AccuracyGuard().tolerance,
            chosen=rungs.index(chosen) if chosen in rungs else None,
        )
        # A path that was saved by an earlier version does not say.
        display.worse = np.array([bool(record.get("worse")) for record in rungs])
        display.untouched = {name: of(before)[0] for name, of in PANELS_OF_A_PATH.items()}
        return display

    @classmethod
    def from_cv_results(
        cls,
        cv_results: Mapping[str, Any],
        *,
        metric: str | None = None,
        tolerance: float | None = None,
        chosen: int | None = None,
        ax: Sequence[Axes] | None = None,
    ) -> Self:
        """Draw the results of a search.

        Parameters
        ----------
        cv_results : dict
            The ``cv_results_`` of a search over ``sparsity_weight``, alone or of a step of a
            pipeline.
        metric : str, default=None
            Score that decided. It is drawn together with "neg_fpr_at_tpr", if that was computed.
            None draws "neg_fpr_at_tpr" alone, or else the first detection score.
        tolerance : float, default=None
            Accuracy that may be lost, as in `AccuracyGuard`. The panel is grey up to this loss.
            Candidates beyond it have white markers. With None, no candidate is
            excluded.
        chosen : int, default=None
            Index of the candidate that was chosen; a line and a ring mark it.
        ax : array-like of matplotlib.axes.Axes, default=None
            Axes to draw on, one for each panel; None makes a figure.

        Returns
        -------
        SelectionDisplay
            The display, drawn.
        """
        display = cls(cv_results=cv_results, metric=metric, tolerance=tolerance, chosen=chosen)
        return display.plot(ax)

    def plot(self, ax: Sequence[Axes] | None = None) -> Self:
        """Draw the panels.

        Parameters
        ----------
        ax : array-like of matplotlib.axes.Axes, default=None
            Axes to draw on, one for each panel; None makes a figure.

        Returns
        -------
        SelectionDisplay
            The display itself.

        Raises
        ------
        ValueError
            If there is not one axes for each panel.
        """
        axes = panels(ax, len(self.scores), f"one for each of {quoted(list(self.scores))}")
        for panel, (metric, (mean, std)) in zip(axes, self.scores.items(), strict=True):
            self._draw_candidates(panel, -mean if metric.startswith("neg_") else mean, std)
            if metric in self.untouched:
                label = "untouched" if self.chosen is not None else "chosen: untouched"
                value = self.untouched[metric]
                panel.axhline(value, color="black", linestyle="--", linewidth=1, label=label)
            if metric == ACCURACY_CHANGE and self.tolerance is not None:
                _shade_from(panel, -self.tolerance)
            panel.set_ylabel(_axis_label(metric))
            self._scale_weights(panel)
        axes[-1].set_xlabel(WEIGHT)
        if axes[0].get_legend_handles_labels()[1]:
            # Above the panel, which is not high enough to hold it.
            axes[0].legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=2,
                fontsize="small",
                handlelength=3,
                columnspacing=1,
            )
        self.axes_: NDArray[Any] = axes
        self.figure_: Figure | SubFigure = axes[0].figure
        return self

    def _excluded(self) -> list[tuple[str, NDArray[np.bool_], str]]:
        """Fillings of markers, which candidates are excluded, and why."""
        return [
            ("white", ~self.accurate, f"accuracy lost > {self.tolerance or 0:g}"),
            ("lightgrey", self.worse & self.accurate, "a kind detected worse"),
        ]

    def _draw_candidates(
        self, ax: Axes, mean: NDArray[np.float64], std: NDArray[np.float64]
    ) -> None:
        for look, (label, candidates, joined) in zip(looks(), self.lines, strict=False):
            points = self.weights[candidates], mean[candidates]
            ax.errorbar(*points, std[candidates], fmt="none", ecolor=look.colour, capsize=3)
            ax.plot(
                *points,
                color=look.colour,
                linestyle=look.style if joined else "none",
                marker=look.marker,
                label=label,
            )
            for filling, is_excluded, _ in self._excluded():
                excluded = candidates[is_excluded[candidates]]
                ax.plot(
                    self.weights[excluded],
                    mean[excluded],
                    color=look.colour,
                    linestyle="none",
                    marker=look.marker,
                    markerfacecolor=filling,
                )
        for filling, is_excluded, reason in self._excluded():
            if is_excluded.any():
                ax.plot(
                    [],
                    color="black",
                    linestyle="none",
                    marker=MARKERS[0],
                    markerfacecolor=filling,
                    label=reason,
                )
        if self.chosen is not None:
            weight = self.weights[self.chosen]
            (line,) = (line for line in self.lines if self.chosen in line.candidates)
            ax.axvline(weight, color="black", linewidth=1, zorder=1)
            ax.plot(
                weight,
                mean[self.chosen],
                color="black",
                linestyle="none",
                marker="o",
                markersize=13,
                markerfacecolor="none",
                label=f"chosen: {weight:.4g}" + (f", {line.label}" if line.label else ""),
            )

    def _scale_weights(self, ax: Axes) -> None:
        """Show both 0 and orders of magnitude, with ticks at weights that were tried."""
        smallest = min(self.weights[self.weights > 0], default=1.0)
        ax.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        tried = np.unique(self.weights)
        places = ax.xaxis.get_transform().transform(tried)
        apart = TICKS_APART * (places[-1] - places[0])
        ticks = [0]
        for i, place in enumerate(places):
            if place - places[ticks[-1]] > apart:
                ticks.append(i)
        ax.set_xticks(tried[ticks], [f"{weight:.3g}" for weight in tried[ticks]])
        ax.set_xticks([], minor=True)


def _detection_of(record: Mapping[str, Any]) -> tuple[float, float]:
    by_kind = [value for name, value in record.items() if name.startswith("auroc_")]
    return record["auroc"], float(np.std(by_kind))


PANELS_OF_A_PATH: dict[str, Callable[[Mapping[str, Any]], tuple[float, float]]] = {
    "auroc": _detection_of,
    ACCURACY_CHANGE: lambda record: (record["accuracy_after"] - record["accuracy_before"], 0.0),
    MEAN_L1: lambda record: (record["mean_l1"], 0.0),
}
"""Mean and standard deviation of what a path has found at a rung, by the name of the panel."""


def _named_results(search: Any) -> tuple[dict[str, Any], str | None]:
    """Results of a search, in which each score has its name, and the score that decided."""
    results, refit, scoring = search.cv_results_, search.refit, search.scoring
    if isinstance(refit, AccuracyGuard):
        return results, refit.metric
    if "mean_test_score" not in results:
        return results, refit if isinstance(refit, str) else None
    name = getattr(scoring, "metric", scoring)
    name = name if isinstance(name, str) else "score"
    named = {
        f"{column.removesuffix('score')}{name}"
        if column.endswith("_test_score")
        else column: values
        for column, values in results.items()
    }
    return named, name


def _panels(cv_results: Mapping[str, Any], metric: str | None) -> list[str]:
    """Scores to draw, from top to bottom."""
    found = _score_names(cv_results)
    detection = [name for name in found if name not in (ACCURACY_CHANGE, MEAN_L1)]
    if metric is None and FPR95 not in detection:
        metric = next(iter(detection), None)
    order = dict.fromkeys([FPR95, metric, ACCURACY_CHANGE, MEAN_L1])
    panels = [name for name in order if name is not None and name in [*found, metric]]
    if not panels:
        raise ValueError(
            "cv_results has no column mean_test_<score>; expected the cv_results_ of a fitted "
            "search."
        )
    return panels


def _score_names(cv_results: Mapping[str, Any]) -> list[str]:
    return [
        column.removeprefix("mean_test_")
        for column in cv_results
        if column.startswith("mean_test_")
    ]


def _mean_and_std(
    cv_results: Mapping[str, Any], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    columns = [f"{statistic}_test_{metric}" for statistic in ("mean", "std")]
    if not all(column in cv_results for column in columns):
        raise ValueError(
            f"cv_results lacks {' or '.join(columns)}; it has the scores "
            f"{quoted(_score_names(cv_results))}. Name {metric!r} among the metrics of the "
            "search's scoring, as in make_ood_scorer(['neg_fpr_at_tpr', 'accuracy_change', "
            "'mean_l1'])."
        )
    mean, std = (np.asarray(cv_results[column], dtype=np.float64) for column in columns)
    if np.isnan(mean).all():
        raise ValueError(
            f"All {len(mean)} candidates have NaN as {metric}, because fitting or scoring failed. "
            "error_score='raise' stops the search at the first failure and shows it."
        )
    return mean, std


def _weight_name(params: list[Any]) -> str:
    """Name of the sparsity weight in the search."""
    names = sorted(
        {name for each in params for name in each if f"__{name}".endswith(f"__{WEIGHT}")}
    )
    if len(names) != 1:
        searched = sorted({name for each in params for name in each})
        raise ValueError(
            f"cv_results['params'] has {names or 'no parameter'} named {WEIGHT}, alone or of a "
            f"step (<step>__{WEIGHT}), among {quoted(searched)}; expected one. Draw a search "
            f"over, for instance, {{'{WEIGHT}': [0, 0.01, 0.02, 0.05]}}."
        )
    return names[0]


def _valid_weights(params: list[Any], name: str) -> NDArray[np.float64]:
    for i, each in enumerate(params):
        weight = each.get(name)
        if not VALID_WEIGHT.is_satisfied_by(weight):
            raise ValueError(
                f"Candidate {i}, {quoted(each)}, has {name}={quoted(weight)}; expected a number "
                "of at least 0 for each candidate. Name the weight in every grid of the search."
            )
    return np.array([each[name] for each in params], dtype=np.float64)


class _Line(NamedTuple):
    """Candidates that differ only in the weight, ordered by it; any candidates if not joined."""

    label: str
    candidates: NDArray[np.intp]
    joined: bool = True


def _lines(
    cv_results: Mapping[str, Any], weight_name: str, weights: NDArray[np.float64]
) -> list[_Line]:
    columns = _other_columns(cv_results, weight_name)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in range(len(weights)):
        groups.setdefault(tuple(_identity(values[i]) for values in columns.values()), []).append(i)
    if len(groups) > len(COLOURS):
        return [_Line("", np.arange(len(weights)), joined=False)]
    lines = []
    for candidates in groups.values():
        label = ", ".join(
            f"{name.split('__')[-1]}={_shown(values[candidates[0]])}"
            for name, values in columns.items()
        )
        by_weight = sorted(candidates, key=lambda i: weights[i])
        lines.append(_Line(label, np.array(by_weight)))
    return lines


def _other_columns(cv_results: Mapping[str, Any], weight_name: str) -> dict[str, list[Any]]:
    """Parameters that vary beside the weight: for each candidate a value, or UNSET."""
    params = list(cv_results["params"])
    names = sorted({name for each in params for name in each} - {weight_name})
    columns = {name: [each.get(name, UNSET) for each in params] for name in names}
    if "n_resources" in cv_results:
        resources = [int(n) for n in cv_results["n_resources"]]
        if resources not in [[*map(_identity, values)] for values in columns.values()]:
            columns["n_resources"] = resources
    return {name: values for name, values in columns.items() if len({*map(_identity, values)}) > 1}


def _identity(value: Any) -> Any:
    """What tells values apart. Searches repeat the objects of their grids, so identity does."""
    return value if isinstance(value, str | Real) else id(value)


def _shown(value: Any) -> str:
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{value:g}"
    if value is None or isinstance(value, str | bool):
        return str(value)
    return str(getattr(value, "__name__", type(value).__name__))


def _axis_label(metric: str) -> str:
    """Label of a score, which is named <metric>, or <metric>_<set> for one set."""
    for name, label in AXIS_LABELS.items():
        if metric == name:
            return label
        if metric.startswith(f"{name}_"):
            return f"{label}, {metric.removeprefix(name + '_')}"
    return metric.removeprefix("neg_")


def _shade_from(ax: Axes, bottom: float) -> None:
    """Grey from a value upwards."""
    ax.axhline(bottom, color="0.5", linewidth=1, zorder=0)
    top = max(ax.get_ylim()[1], 0)
    ax.axhspan(bottom, top, color="0.92", zorder=0)
    ax.set_ylim(top=top)
