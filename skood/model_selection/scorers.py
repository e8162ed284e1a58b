"""Scorers of outlier detectors, for scikit-learn's searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import _num_samples

from ..caching import DiskMemory
from ..detector import SparseEnergyOODDetector
from ..engine.network import TRIAL_ROWS
from ..engine.rows import Loaded, Rows, spaced
from ..exceptions import SelectionWarning
from ..labels import as_labels, is_outlier
from ..metrics import METRICS, POSITIVE, Positive
from ..notices import quoted, warn_user
from ..parameters import memory_of, n_workers
from ..passes import passes_shared
from ..rows import as_numbers, in_frame, rows_like_fit, take
from ..validation import number_of_rows, validated
from .steps import last_step, seen_by_last_step, unwrapped
from .surrogates import refuse_indices, surrogate_outliers

__all__ = ["make_ood_scorer"]

Scores = NDArray[np.float64]
Metric = Callable[..., float]

LOADED_ROWS = 1000
"""Rows of which surrogates are made, at most, if they are loaded: all are in memory at once."""


@validated(ood_label=[Integral, str, "boolean", None], positive=POSITIVE)
def make_ood_scorer(
    metric: str | Metric | Sequence[str | Metric] = "auroc",
    X_ood: Any = None,
    *,
    ood_label: int | str | bool | None = None,
    positive: Positive = "id",
) -> _OODScorer:
    """Scorer of how well a detector tells in-distribution (ID) from out-of-distribution (OOD) rows.

    Pass it as ``scoring=`` to scikit-learn's searches or to `cross_validate`. It works for any
    outlier detector, also as the last step of a `Pipeline`, whose `score_samples` (or else
    `decision_function`) is higher for ID rows.

    Parameters
    ----------
    metric : str, callable or list, default="auroc"
        What to compute; greater is better.

        - a function of `skood.metrics` by its name, such as "auroc". An error such as
          "neg_fpr_at_tpr" has the prefix ``neg_``, which negates it.
        - "accuracy_change": accuracy of the fine-tuned classifier on the ID rows, minus that of the
          untouched one, from `SparseEnergyOODDetector.id_accuracy`; see `AccuracyGuard`.
        - "mean_l1": mean L1 norm of the ID rows' features, from `SparseEnergyOODDetector.features`.
          It describes a detector (`skood.plotting.SelectionDisplay` draws it); do not maximise it.
        - a callable: maps the scores of ID and of OOD rows, (n_id,) and (n_ood,), to a float.

        If this is a list, the scorer returns a dict; it scores the rows once.
    X_ood : array-like of shape (n_ood, ...) or dict of str to array-like, default=None
        OOD rows like those of X. For several named sets, the mean over the sets is taken, and a
        list of metrics adds the value of each set as ``<metric>_<set>``.
    ood_label : int, str or bool, default=None
        Label in y of known OOD rows. Without `X_ood`, they are the OOD rows. With it, they are left
        out.
    positive : {"id", "ood"}, default="id"
        The positive class of the named metrics, as in `skood.metrics`.

    Returns
    -------
    callable
        ``scorer(estimator, X, y=None)`` gives a float, or a dict of floats if `metric` is a list.

        Without `X_ood` and `ood_label`, it makes OOD rows from the ID rows; see
        `surrogate_outliers`. If a detector loads X, from paths or a data set, it makes them from at
        most 1,000 rows that are loaded. It raises ValueError or TypeError if it cannot score,
        because a fold lacks ID or labelled OOD rows, the detector was not trained on a label of the
        ID rows, or scores are not finite.

    Raises
    ------
    TypeError, ValueError
        If a metric is unknown, or an error measure without the prefix ``neg_``; if a set of OOD
        rows is empty; or if another argument is not one of those above.

    Warns
    -----
    SelectionWarning
        When scoring, if the detector has another `ood_label`. A search that refits would train it
        on the OOD rows.

    Notes
    -----
    If the detector has a `memory`, the scorer keeps features and logits there, and takes them from
    there: candidates of a search that have the same network share them.

    Training folds of `InDistributionKFold` hold no labelled OOD rows. Pass
    ``return_train_score=False`` to halving searches; it is the default of the others.

    If scoring fails, searches warn and go on with NaN; for a list of metrics, they may stop with
    another error at the end. ``error_score="raise"`` stops them at the cause.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.ensemble import IsolationForest
    >>> from sklearn.model_selection import GridSearchCV
    >>> from skood.model_selection import InDistributionKFold, make_ood_scorer
    >>> X, y = load_digits(return_X_y=True)
    >>> search = GridSearchCV(
    ...     IsolationForest(n_estimators=10, random_state=0),
    ...     {"max_features": [0.1, 1.0]},
    ...     cv=InDistributionKFold(2, random_state=0),
    ...     scoring=make_ood_scorer("auroc", X_ood=16 - X),
    ... ).fit(X, y)
    >>> bool(search.best_score_ > 0.9)
    True

    Several metrics and sets at once:

    >>> scorer = make_ood_scorer(["auroc", "neg_fpr_at_tpr"], {"dark": 0 * X, "light": 16 - X})
    >>> sorted(scorer(search.best_estimator_, X))  # doctest: +NORMALIZE_WHITESPACE
    ['auroc', 'auroc_dark', 'auroc_light',
     'neg_fpr_at_tpr', 'neg_fpr_at_tpr_dark', 'neg_fpr_at_tpr_light']
    """
    return _OODScorer(metric, X_ood, ood_label, positive)


class _OODScorer:
    """What `make_ood_scorer` returns."""

    def __init__(
        self,
        metric: str | Metric | Sequence[str | Metric],
        X_ood: Any,
        ood_label: int | str | bool | None,
        positive: Positive,
    ) -> None:
        _check_sets(X_ood)
        self.metric = metric
        self.X_ood = X_ood
        self.ood_label = ood_label
        self.positive = positive
        self._several = isinstance(metric, list | tuple)
        listed = cast(Sequence[str | Metric], metric if self._several else [metric])
        self._names = [_name(each) for each in listed]
        self._metrics = {
            name: _as_metric(each, positive)
            for name, each in zip(self._names, listed, strict=True)
            if name not in OF_ID_ROWS
        }
        self._check_names()

    def __call__(
        self, estimator: Any, X: Any, y: ArrayLike | None = None
    ) -> float | dict[str, float]:
        X_id, labels, X_labelled = self._split(X, y)
        detector = last_step(estimator)
        self._check_classes(detector, labels)
        self._warn_if_refit_learns_outliers(detector, X_labelled)
        with passes_shared(_memory_of(detector)):
            values = {}
            if self._metrics:
                outliers = self._outliers(estimator, X_id, labels, X_labelled)
                values = self._detection(estimator, X_id, outliers)
            described = [name for name in self._names if name in OF_ID_ROWS]
            if described:
                seen = seen_by_last_step(estimator, X_id)
                for name in described:
                    values[name] = _finite(name, OF_ID_ROWS[name](detector, seen, labels))
        return values if self._several else values[self._names[0]]

    def __repr__(self) -> str:
        X_ood: Any = None if self.X_ood is None else f"<{_num_samples(self.X_ood)} rows>"
        if isinstance(self.X_ood, Mapping):
            X_ood = {name: f"<{_num_samples(rows)} rows>" for name, rows in self.X_ood.items()}
        return (
            f"make_ood_scorer({self.metric!r}, X_ood={X_ood}, ood_label={self.ood_label!r}, "
            f"positive={self.positive!r})"
        )

    def _split(self, X: Any, y: ArrayLike | None) -> tuple[Any, NDArray[Any] | None, Any]:
        """ID rows with their labels, and the labelled OOD rows, or None if there are none."""
        if y is None:
            if self.ood_label is not None:
                raise ValueError(
                    f"{quoted(self)} got y=None, so no row can carry ood_label. Pass y, one label "
                    f"per row, and {self._cure()}."
                )
            return X, None, None
        labels = as_labels(y, number_of_rows(X, "X"))
        outlying = is_outlier(labels, self.ood_label)
        if outlying.all():
            raise ValueError(
                f"All {len(labels)} rows to score carry ood_label={self.ood_label!r}; expected "
                f"in-distribution rows as well. Pass {self._cure()}, which puts both kinds in "
                "every test fold."
            )
        if not outlying.any():
            return X, labels, None
        inliers, outliers = np.flatnonzero(~outlying), np.flatnonzero(outlying)
        return take(X, inliers), labels[inliers], take(X, outliers)

    def _outliers(
        self, estimator: Any, X_id: Any, labels: NDArray[Any] | None, X_labelled: Any
    ) -> dict[str, Any]:
        """Sets of OOD rows by name; a single set has the name ""."""
        if isinstance(self.X_ood, Mapping):
            return dict(self.X_ood)
        if self.X_ood is not None:
            return {"": self.X_ood}
        if self.ood_label is None:
            return {"": _surrogates(unwrapped(estimator), X_id, labels)}
        if X_labelled is None:
            raise ValueError(
                f"None of the {_num_samples(X_id)} rows to score carries ood_label="
                f"{self.ood_label!r}. Pass {self._cure()}, which puts such rows in every test "
                "fold, and return_train_score=False, because training folds hold none."
            )
        return {"": X_labelled}

    def _detection(self, estimator: Any, X_id: Any, outliers: dict[str, Any]) -> dict[str, float]:
        """The mean of each metric over the sets, and its value for each named set."""
        score_id = _scores(estimator, X_id, "the in-distribution rows")
        score_ood = {
            name: _scores(estimator, rows, f"the out-of-distribution rows {name}".strip())
            for name, rows in outliers.items()
        }
        values = {}
        for name, metric in self._metrics.items():
            of_sets = {
                f"{name}_{of}": _finite(name, metric(score_id, scores))
                for of, scores in score_ood.items()
            }
            values[name] = float(np.mean(list(of_sets.values())))
            if isinstance(self.X_ood, Mapping):
                values |= of_sets
        return values

    def _check_classes(self, detector: Any, labels: NDArray[Any] | None) -> None:
        """Refuse labels that the detector was not trained on."""
        if labels is None or not hasattr(detector, "classes_"):
            return
        trained_on = set(np.asarray(detector.classes_).tolist())
        unknown = set(labels.tolist()) - trained_on
        # If labels are of another kind than the classes, the detector made up its classes.
        if not {type(label) for label in unknown} & {type(label) for label in trained_on}:
            return
        raise ValueError(
            f"The rows to score have the labels {quoted(sorted(unknown))}, which "
            f"{type(detector).__name__} was not trained on; its classes_ are "
            f"{quoted(sorted(trained_on))}. If rows are ordered by class, plain folds leave "
            f"classes out: pass {self._cure()}. If such a label marks known outliers, pass it as "
            "ood_label=. If y holds no classes, pass y=None."
        )

    def _warn_if_refit_learns_outliers(self, detector: Any, X_labelled: Any) -> None:
        if X_labelled is None or not hasattr(detector, "ood_label"):
            return
        if detector.ood_label != self.ood_label:
            warn_user(
                f"{type(detector).__name__} has ood_label={detector.ood_label!r}, the scorer "
                f"{self.ood_label!r}. A search that refits would train it on the outliers, as a "
                f"class of their own. Pass ood_label={self.ood_label!r} to both.",
                SelectionWarning,
            )

    def _check_names(self) -> None:
        sets = list(self.X_ood) if isinstance(self.X_ood, Mapping) else []
        names = self._names + [f"{name}_{of}" for name in self._metrics for of in sets]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"metric={quoted(self.metric)} and the sets {quoted(sets)} give scores named "
                f"{quoted(names)}; expected at least one, and no name twice."
            )

    def _cure(self) -> str:
        label = "" if self.ood_label is None else f"ood_label={self.ood_label!r}"
        return f"cv=InDistributionKFold({label})"


def _check_sets(X_ood: Any) -> None:
    if X_ood is None:
        return
    sets = X_ood if isinstance(X_ood, Mapping) else {"X_ood": X_ood}
    if not sets:
        raise ValueError("X_ood is an empty dict; expected at least one set of rows.")
    for name, rows in sets.items():
        if number_of_rows(rows, "X_ood") == 0:
            raise ValueError(f"The out-of-distribution set {name!r} has no rows; expected some.")


def _name(metric: object) -> str:
    """Name of a metric in the scores of a search."""
    names = [*OF_SCORES, *OF_ID_ROWS]
    if not isinstance(metric, str) and not callable(metric):
        raise TypeError(
            f"metric={quoted(metric)}; expected one of {names}, a function of the scores of "
            "in-distribution and of out-of-distribution rows, or a list of these. Pass rows as "
            "X_ood=."
        )
    function = metric.func if isinstance(metric, partial) else metric
    name = metric if isinstance(metric, str) else getattr(function, "__name__", "metric")
    errors = [each.function for each in METRICS if each.is_error]
    if function in errors or f"neg_{metric}" in names:
        raise ValueError(
            f"metric={quoted(metric)} is an error: less is better, but searches maximise. Pass "
            f"'neg_{name}', or a function that returns it negated."
        )
    if isinstance(metric, str) and metric not in names:
        here = [each.name_in_searches for each in METRICS if each.is_named(metric)]
        hint = f" It is named {here[0]!r} here." if here else ""
        raise ValueError(f"metric={quoted(metric)} is unknown; expected one of {names}.{hint}")
    return name


def _as_metric(metric: str | Metric, positive: Positive) -> Metric:
    """Function of the scores of ID and of OOD rows."""
    if isinstance(metric, str):
        named = OF_SCORES[metric]
        function = partial(named.function, positive=positive)
        return partial(_negated, function) if named.is_error else function
    takes_positive = any(metric == each.function for each in METRICS)
    return partial(metric, positive=positive) if takes_positive else metric


def _negated(function: Metric, score_id: Scores, score_ood: Scores) -> float:
    return -function(score_id, score_ood)


def _memory_of(detector: Any) -> DiskMemory | None:
    """Where the candidates of a search share passes; where fit kept nothing, it begins nothing."""
    own = isinstance(detector, SparseEnergyOODDetector)
    memory = memory_of(detector) if own else None
    return memory if memory is not None and memory.exists else None


def _scores(estimator: Any, X: Any, rows: str) -> Scores:
    for method in ("score_samples", "decision_function"):
        if hasattr(estimator, method):
            break
    else:
        raise TypeError(
            f"estimator is a {type(estimator).__name__}, which has neither score_samples nor "
            "decision_function; expected an outlier detector (LocalOutlierFactor with "
            "novelty=True)."
        )
    scores = np.asarray(getattr(estimator, method)(X), dtype=np.float64)
    n_rows = len(X) if isinstance(X, Rows) else _num_samples(X)
    if scores.shape != (n_rows,):
        raise ValueError(
            f"{type(estimator).__name__}.{method} gave scores of shape {scores.shape} for {rows}; "
            f"expected one per row, ({n_rows},). Pass an outlier detector."
        )
    n_bad = np.count_nonzero(~np.isfinite(scores))
    if n_bad:
        raise ValueError(
            f"{type(estimator).__name__}.{method} gave {n_bad} NaN or infinite scores for {rows}, "
            f"of {len(scores)}. Find out what made them: rows out of range, or training that "
            "diverged."
        )
    return scores


def _finite(name: str, value: object) -> float:
    if not isinstance(value, Real) or not np.isfinite(float(value)):
        raise ValueError(f"The metric {name!r} gave {quoted(value)}; expected a finite number.")
    return float(value)


def _accuracy_change(detector: Any, X: Any, labels: NDArray[Any] | None) -> float:
    _check_has(detector, "id_accuracy", "accuracy_change")
    if labels is None or len(np.unique(labels)) < 2:
        given = "none" if labels is None else f"{np.unique(labels).tolist()} alone"
        raise ValueError(
            "'accuracy_change' needs in-distribution rows with labels of at least two classes, "
            f"and got {given}. Pass y with the classes, or leave this metric out."
        )
    accuracy = detector.id_accuracy(X, labels)
    return float(accuracy["after"] - accuracy["before"])


def _mean_l1(detector: Any, X: Any, labels: NDArray[Any] | None) -> float:
    _check_has(detector, "features", "mean_l1")
    return float(np.abs(detector.features(X)).sum(axis=1).mean())


def _check_has(detector: Any, method: str, metric: str) -> None:
    if not hasattr(detector, method):
        raise TypeError(
            f"{type(detector).__name__} has no {method}, which {metric!r} needs; expected a "
            "SparseEnergyOODDetector. Leave this metric out for other detectors."
        )


OF_SCORES = {
    metric.name_in_searches: metric
    for metric in sorted(METRICS, key=lambda metric: metric.is_error)
}
"""Metrics of the scores, the errors last."""

OF_ID_ROWS: dict[str, Callable[[Any, Any, NDArray[Any] | None], float]] = {
    "accuracy_change": _accuracy_change,
    "mean_l1": _mean_l1,
}
"""Metrics of a detector, of the ID rows as it sees them, and of their labels."""


def _surrogates(estimator: Any, X: Any, labels: NDArray[Any] | None) -> Any:
    """Surrogate outliers, in a data frame if X is one; of rows that a detector loads, as `Rows`."""
    if hasattr(estimator, "preprocess"):
        loaded = rows_like_fit(estimator, X, estimator.preprocess)
        if isinstance(loaded, Loaded):
            some = loaded.spaced(LOADED_ROWS)
            values = some.in_memory(n_workers(estimator))
            refuse_indices(estimator._network, some)
            return some.like(surrogate_outliers(values, random_state=0))
    rows = as_numbers(X)
    if rows.dtype.kind not in "biuf":
        raise ValueError(
            f"X, a {type(X).__name__} of dtype {rows.dtype}, is no array of numbers, so no "
            "surrogate outliers are made of it. Pass out-of-distribution rows to make_ood_scorer "
            "as X_ood=, or name their label in y with ood_label=."
        )
    detector = last_step(estimator)
    if isinstance(detector, SparseEnergyOODDetector):
        few = take(X, spaced(len(rows), TRIAL_ROWS))
        seen = rows_like_fit(detector, seen_by_last_step(estimator, few), detector.preprocess)
        refuse_indices(detector._network, seen)
    return in_frame(surrogate_outliers(rows, labels, random_state=0), X)
