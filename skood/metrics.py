"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) rows.

Every function takes the scores of ID rows and those of OOD rows, higher meaning more
in-distribution, and names the positive class in words: with ``positive="id"`` a row is detected
where ``score >= threshold``, with ``positive="ood"`` where ``score <= threshold``. Rows of equal
score cross a threshold together, so no result depends on how a sort orders ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import pandas as pd

from .randomness import random_generator

__all__ = [
    "DetectionReport",
    "aupr",
    "auroc",
    "detection_error",
    "detection_report",
    "fpr_at_tpr",
]

Positive = Literal["id", "ood"]
Scores = NDArray[Any]
Counts = NDArray[np.int64]


def fpr_at_tpr(
    score_id: ArrayLike,
    score_ood: ArrayLike,
    tpr: float = 0.95,
    *,
    positive: Positive = "id",
    method: Literal["at_least", "nearest"] = "at_least",
) -> float:
    """Rate of false positives at a given true positive rate (FPR95 where ``tpr=0.95``).

    With ``positive="id"`` this is the share of OOD rows taken for ID at a threshold that keeps
    `tpr` of the ID rows [1]_ [2]_; with ``positive="ood"``, the share of ID rows taken for OOD at a
    threshold that detects `tpr` of the OOD rows. The two differ widely: say which one you report.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    tpr : float, default=0.95
        True positive rate, in (0, 1].
    positive : {"id", "ood"}, default="id"
        The class to detect.
    method : {"at_least", "nearest"}, default="at_least"
        Which observed score is the threshold.

        - "at_least": the strictest one that detects at least ``ceil(tpr * n_positive)`` rows.
        - "nearest": the one whose true positive rate is nearest `tpr`, possibly below it, as in the
          code published with [3]_ and [2]_. Of two rates at equal distance, the higher is taken; of
          several thresholds with one rate, the most lenient, except that a rate of 1 stands for
          the strictest threshold attaining it. Distances are float64, as in that code, so that
          rates such as 9/10 and 10/10 around 0.95 are told apart by rounding. Use it to reproduce
          published numbers.

    Returns
    -------
    float
        The false positive rate, in [0, 1].

    Raises
    ------
    TypeError
        If scores are not real numbers, or `tpr` is not a number.
    ValueError
        If scores are empty, not 1-D, masked or NaN, or another argument is out of range.

    References
    ----------
    .. [1] Liang, S., Li, Y. & Srikant, R., "Enhancing the reliability of out-of-distribution image
       detection in neural networks", ICLR 2018.
    .. [2] Liu, W., Wang, X., Owens, J. & Li, Y., "Energy-based out-of-distribution detection",
       NeurIPS 2020.
    .. [3] Hendrycks, D., Mazeika, M. & Dietterich, T., "Deep anomaly detection with outlier
       exposure", ICLR 2019.

    Examples
    --------
    >>> from skood.metrics import fpr_at_tpr
    >>> fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], tpr=0.75)
    0.25
    >>> fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], tpr=0.75, positive="ood")
    0.25
    >>> fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], tpr=0.8)
    0.5
    >>> fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], tpr=0.8, method="nearest")
    0.25
    """
    _check_fraction(tpr, "tpr")
    if method not in ("at_least", "nearest"):
        raise ValueError(f"method={method!r}; expected 'at_least' or 'nearest'.")
    tp, fp = _roc_counts(score_id, score_ood, positive)
    return (_fpr_at_least if method == "at_least" else _fpr_nearest)(tp, fp, tpr)


def auroc(score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id") -> float:
    """Area under the receiver operating characteristic.

    The probability that an ID row scores higher than an OOD row, a tie counting one half [1]_. It
    is the same whichever class is positive.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        Accepted for uniformity with the other metrics; does not change the result.

    Returns
    -------
    float
        The area, in [0, 1]; 0.5 is chance.

    Raises
    ------
    TypeError
        If scores are not real numbers.
    ValueError
        If scores are empty, not 1-D, masked or NaN, or `positive` is unknown.

    References
    ----------
    .. [1] Fawcett, T., "An introduction to ROC analysis", Pattern Recognition Letters 27(8), 2006.

    Examples
    --------
    >>> from skood.metrics import auroc
    >>> auroc([3, 2], [2, 1])
    0.875
    """
    return _auroc(*_roc_counts(score_id, score_ood, positive))


def aupr(score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id") -> float:
    """Area under the precision-recall curve, as average precision.

    The sum over thresholds of precision times the gain in recall, ``sum_k (R_k - R_(k-1)) P_k``,
    without interpolation [1]_, as `sklearn.metrics.average_precision_score` has it. Chance is
    the share of positive rows, ``n_positive / (n_id + n_ood)``, so values compare only where both
    the positive class and that share are the same.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        The class whose precision and recall are meant.

    Returns
    -------
    float
        The average precision, in (0, 1].

    Raises
    ------
    TypeError
        If scores are not real numbers.
    ValueError
        If scores are empty, not 1-D, masked or NaN, or `positive` is unknown.

    References
    ----------
    .. [1] Davis, J. & Goadrich, M., "The relationship between precision-recall and ROC curves",
       ICML 2006.

    Examples
    --------
    >>> from skood.metrics import aupr
    >>> aupr([4, 2], [3, 3, 1])
    0.75
    """
    return _aupr(*_roc_counts(score_id, score_ood, positive))


def detection_error(
    score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id"
) -> float:
    """Least error of any threshold, both classes being equally likely.

    The minimum over all thresholds of ``(FNR + FPR) / 2``, with FNR and FPR the false negative and
    false positive rates [1]_. It is symmetric in the classes: `positive` does not change it.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        Accepted for uniformity with the other metrics; does not change the result.

    Returns
    -------
    float
        The error, in [0, 0.5]; 0.5 is chance.

    Raises
    ------
    TypeError
        If scores are not real numbers.
    ValueError
        If scores are empty, not 1-D, masked or NaN, or `positive` is unknown.

    References
    ----------
    .. [1] Liang, S., Li, Y. & Srikant, R., "Enhancing the reliability of out-of-distribution image
       detection in neural networks", ICLR 2018.

    Examples
    --------
    >>> from skood.metrics import detection_error
    >>> detection_error([4, 3, 2, 1], [3, 1, 0, 0])
    0.25
    """
    return _detection_error(*_roc_counts(score_id, score_ood, positive))


@dataclass(frozen=True)
class DetectionReport:
    """Metrics of one ID set against one or several OOD sets; made by `detection_report`.

    ``str(report)`` is a text table in percent. Attributes, one per parameter,
    and methods give fractions.

    Parameters
    ----------
    rows : dict of str to dict of str to float
        For each OOD set, and for "mean" where sets were named: the metrics by name. With intervals,
        each metric is followed by its ends, ``<metric>_low`` and ``<metric>_high``.
    n_id : int
        Number of ID rows.
    n_ood : dict of str to int
        Number of rows of each OOD set.
    tpr : float
        True positive rate at which the false positive rate is taken.
    positive : {"id", "ood"}
        The positive class.
    n_bootstrap : int
        Number of bootstrap replicates; 0 where there are no intervals.
    confidence : float
        Confidence level of the intervals.
    """

    rows: dict[str, dict[str, float]]
    n_id: int
    n_ood: dict[str, int]
    tpr: float
    positive: Positive
    n_bootstrap: int
    confidence: float

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Copy of `rows`: a dict of metrics for each row, as fractions.

        Returns
        -------
        dict of str to dict of str to float
            One entry per row, of one entry per metric.
        """
        return {name: dict(row) for name, row in self.rows.items()}

    def to_frame(self) -> pd.DataFrame:
        """Put rows and metrics in a data frame, as fractions.

        Returns
        -------
        pandas.DataFrame of shape (n_rows, n_metrics)
            One row per OOD set, and "mean"; float64.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_frame needs pandas, which is not installed: run `pip install pandas`, or use "
                "to_dict."
            ) from error
        return pd.DataFrame.from_dict(self.rows, orient="index")

    def __str__(self) -> str:
        metrics = _metric_names(self.tpr)
        table = [["", "rows", *metrics]]
        for name, row in self.rows.items():
            cells = [self._cell(row, metric) for metric in metrics]
            table.append([str(name), str(self.n_ood.get(name, "")), *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in table
        ]
        return "\n".join([*self._header(), "", *lines])

    def _header(self) -> list[str]:
        side = {"id": "ID, score >= threshold", "ood": "OOD, score <= threshold"}[self.positive]
        lines = [
            f"{self.n_id} ID rows against OOD rows; values in percent",
            f"positive class: {side}",
            f"{_metric_names(self.tpr)[0]}: FPR where TPR is at least {_percent(self.tpr)} %",
        ]
        if self.n_bootstrap:
            lines.append(
                f"[low, high]: {_percent(self.confidence)} % percentile intervals, "
                f"{self.n_bootstrap} bootstrap replicates"
            )
        return lines

    def _cell(self, row: dict[str, float], metric: str) -> str:
        cell = f"{100 * row[metric]:.2f}"
        if self.n_bootstrap:
            cell += f" [{100 * row[metric + '_low']:.2f}, {100 * row[metric + '_high']:.2f}]"
        return cell


def detection_report(
    score_id: ArrayLike,
    score_ood: ArrayLike | Mapping[str, ArrayLike],
    *,
    tpr: float = 0.95,
    positive: Positive = "id",
    n_bootstrap: int = 0,
    confidence: float = 0.95,
    random_state: int | np.random.RandomState | None = None,
) -> DetectionReport:
    """All metrics of one ID set against one or several OOD sets, and their mean over the sets.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of OOD rows. A dict gives one row per set, in its order, and a row "mean", the
        unweighted mean over the sets; an array gives the single row "ood".
    tpr : float, default=0.95
        True positive rate, in (0, 1], at which `fpr_at_tpr` is taken; it names the metric, "fpr95".
    positive : {"id", "ood"}, default="id"
        The positive class, as in `fpr_at_tpr`.
    n_bootstrap : int, default=0
        Number of bootstrap replicates for intervals; 0 gives no intervals.
    confidence : float, default=0.95
        Confidence level of the intervals, in (0, 1].
    random_state : int, RandomState instance or None, default=None
        Seed or generator of the replicates. None draws fresh entropy; NumPy's global generator is
        neither read nor advanced.

    Returns
    -------
    DetectionReport
        Metrics "fpr<100 tpr>", "auroc", "aupr" and "detection_error", as fractions.

    Raises
    ------
    TypeError
        If scores are not real numbers, or another argument has the wrong type.
    ValueError
        If scores are empty, not 1-D, masked or NaN (the error names the set), `score_ood` is an
        empty dict or has a set named "mean", or another argument is out of range.

    Notes
    -----
    Intervals are percentile intervals [1]_. In each replicate, ID rows and the rows of each OOD set
    are drawn independently with replacement; the ID draw is shared by all sets, so that the
    interval of the mean accounts for the ID rows they have in common. They cover the choice of
    test rows, not that of training seeds. The detection error is a minimum over thresholds, hence
    biased low in a replicate: on few rows its interval may lie below the estimate.

    References
    ----------
    .. [1] Efron, B. & Tibshirani, R. J., "An introduction to the bootstrap", Chapman & Hall, 1993,
       chapter 13.

    Examples
    --------
    >>> from skood.metrics import detection_report
    >>> report = detection_report([4, 3, 2, 1], {"near": [3, 1, 0, 0], "far": [0, -1]}, tpr=0.75)
    >>> print(report)
    4 ID rows against OOD rows; values in percent
    positive class: ID, score >= threshold
    fpr75: FPR where TPR is at least 75 %
    <BLANKLINE>
          rows  fpr75   auroc    aupr  detection_error
    near     4  25.00   81.25   77.08            25.00
    far      2   0.00  100.00  100.00             0.00
    mean        12.50   90.62   88.54            12.50
    >>> report.to_dict()["mean"]["auroc"]
    0.90625
    """
    _check_fraction(tpr, "tpr")
    _check_positive(positive)
    _check_fraction(confidence, "confidence")
    _check_n_bootstrap(n_bootstrap)
    generator = random_generator(random_state)
    valid_id = _valid_scores(score_id, "score_id")
    valid_ood = _valid_sets(score_ood)

    groups = [_tie_groups(valid_id, scores) for scores in valid_ood.values()]
    # (1 + n_bootstrap, n_sets, n_metrics): the estimate, then its replicates
    values = np.empty((1 + n_bootstrap, len(groups), len(_metric_names(tpr))))
    values[0] = [_all_metrics(*group, tpr, positive) for group in groups]
    for replicate in values[1:]:
        replicate[:] = [
            _all_metrics(*rows, tpr, positive) for rows in _resampled(groups, generator)
        ]
    names = list(valid_ood)
    if isinstance(score_ood, Mapping):
        names.append("mean")
        values = np.concatenate((values, values.mean(axis=1, keepdims=True)), axis=1)
    return DetectionReport(
        rows=_report_rows(names, _metric_names(tpr), values, confidence),
        n_id=len(valid_id),
        n_ood={name: len(scores) for name, scores in valid_ood.items()},
        tpr=tpr,
        positive=positive,
        n_bootstrap=n_bootstrap,
        confidence=confidence,
    )


# From scores to counts: the one place where ties and the positive class are dealt with.


def _tie_groups(score_id: Scores, score_ood: Scores) -> tuple[Counts, Counts]:
    """For each ID and each OOD row, the rank of its score among the distinct scores of both."""
    _, group = np.unique(np.concatenate((score_id, score_ood)), return_inverse=True)
    return group[: len(score_id)], group[len(score_id) :]


def _cumulative_counts(
    group_id: Counts, group_ood: Counts, positive: Positive
) -> tuple[Counts, Counts]:
    """Count true and false positives, int64, at each observed score, the strictest first.

    Both arrays have shape (n_thresholds,), one threshold per group of tied rows, and end in the
    numbers of positive and negative rows.
    """
    n_groups = 1 + max(group_id.max(), group_ood.max())
    n_id = np.bincount(group_id, minlength=n_groups)
    n_ood = np.bincount(group_ood, minlength=n_groups)
    observed = (n_id + n_ood) > 0  # a bootstrap draw leaves groups empty
    n_id, n_ood = n_id[observed], n_ood[observed]
    if positive == "id":
        return np.cumsum(n_id[::-1]), np.cumsum(n_ood[::-1])
    return np.cumsum(n_ood), np.cumsum(n_id)


def _roc_counts(
    score_id: ArrayLike, score_ood: ArrayLike, positive: Positive
) -> tuple[Counts, Counts]:
    _check_positive(positive)
    groups = _tie_groups(_valid_scores(score_id, "score_id"), _valid_scores(score_ood, "score_ood"))
    return _cumulative_counts(*groups, positive)


# The metrics, from cumulative counts of true (tp) and false (fp) positives.


def _fpr_at_least(tp: Counts, fp: Counts, tpr: float) -> float:
    n_positive = int(tp[-1])
    # 0.07 * 100 is just above 7 in binary: forgive a few units in the last place of n_positive.
    slack = 4 * np.finfo(float).eps * n_positive
    needed = max(math.ceil(tpr * n_positive - slack), 1)
    return float(fp[np.searchsorted(tp, needed)] / fp[-1])


def _fpr_nearest(tp: Counts, fp: Counts, tpr: float) -> float:
    full_recall = np.searchsorted(tp, tp[-1])
    # The lenient end first: argmin takes the first of several minima.
    recall = tp[full_recall::-1] / tp[-1]
    return float(fp[full_recall - np.argmin(np.abs(recall - tpr))] / fp[-1])


def _auroc(tp: Counts, fp: Counts) -> float:
    # Twice the number of (positive, negative) pairs in the right order, a tie counting one.
    tp_before = np.concatenate(([0], tp[:-1]))
    doubled = np.sum(np.diff(fp, prepend=0) * (tp_before + tp))
    return int(doubled) / (2 * int(tp[-1]) * int(fp[-1]))


def _aupr(tp: Counts, fp: Counts) -> float:
    return float(np.sum(np.diff(tp, prepend=0) * (tp / (tp + fp))) / tp[-1])


def _detection_error(tp: Counts, fp: Counts) -> float:
    n_positive, n_negative = int(tp[-1]), int(fp[-1])
    # The threshold that detects no row errs by 0.5, as does the last one here, which detects all.
    scaled = np.min((n_positive - tp) * n_negative + fp * n_positive)
    return int(scaled) / (2 * n_positive * n_negative)


def _all_metrics(
    group_id: Counts, group_ood: Counts, tpr: float, positive: Positive
) -> tuple[float, float, float, float]:
    """Values in the order of `_metric_names`."""
    tp, fp = _cumulative_counts(group_id, group_ood, positive)
    return _fpr_at_least(tp, fp, tpr), _auroc(tp, fp), _aupr(tp, fp), _detection_error(tp, fp)


# The report.


def _metric_names(tpr: float) -> tuple[str, str, str, str]:
    return f"fpr{_percent(tpr)}", "auroc", "aupr", "detection_error"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.10g}"


def _resampled(
    groups: list[tuple[Counts, Counts]], generator: np.random.RandomState
) -> Iterator[tuple[Counts, Counts]]:
    """One bootstrap draw of every set, sharing one draw of ID rows."""
    n_id = len(groups[0][0])
    drawn_id = generator.randint(n_id, size=n_id)
    for group_id, group_ood in groups:
        drawn_ood = generator.randint(len(group_ood), size=len(group_ood))
        yield group_id[drawn_id], group_ood[drawn_ood]


def _report_rows(
    names: list[str], metrics: tuple[str, ...], values: NDArray[np.float64], confidence: float
) -> dict[str, dict[str, float]]:
    estimate, replicates = values[0], values[1:]
    columns = {"": estimate}
    if len(replicates):
        ends = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        columns.update(_low=ends[0], _high=ends[1])
    return {
        name: {
            metric + suffix: float(column[i, j])
            for j, metric in enumerate(metrics)
            for suffix, column in columns.items()
        }
        for i, name in enumerate(names)
    }


# Validation.


def _valid_scores(scores: ArrayLike, name: str) -> Scores:
    if np.ma.is_masked(scores):
        raise ValueError(f"{name} has masked entries; expected a score for every row. Remove them.")
    try:
        values = np.asarray(scores)
    except ValueError as error:  # a ragged list
        raise ValueError(
            f"{name} does not form an array ({error}); expected one number per row."
        ) from error
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} has dtype {values.dtype}; expected real numbers (float, int or bool). "
            "Convert it, or drop rows that have no score."
        )
    if values.ndim != 1:
        raise ValueError(
            f"{name} has shape {values.shape}; expected a 1-D array, one score per row. Take one "
            "column, or flatten a column vector with .ravel()."
        )
    if not values.size:
        raise ValueError(f"{name} is empty; expected at least one score.")
    n_nan = np.count_nonzero(np.isnan(values))
    if n_nan:
        raise ValueError(
            f"{name} has {n_nan} NaN in {values.size} scores; expected none, for NaN has no order. "
            "Find what made them, or drop those rows."
        )
    return values


def _valid_sets(score_ood: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, Scores]:
    if not isinstance(score_ood, Mapping):
        return {"ood": _valid_scores(score_ood, "score_ood")}
    if not score_ood:
        raise ValueError("score_ood is an empty dict; expected at least one set of OOD scores.")
    if "mean" in score_ood:
        raise ValueError(
            "score_ood has a set named 'mean', the name of the row of means. Rename the set."
        )
    return {
        name: _valid_scores(scores, f"score_ood[{name!r}]") for name, scores in score_ood.items()
    }


def _check_fraction(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}; expected a number in (0, 1], such as 0.95.")
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name}={value!r}; expected a fraction in (0, 1], such as 0.95.")


def _check_positive(positive: object) -> None:
    if positive not in ("id", "ood"):
        raise ValueError(f"positive={positive!r}; expected 'id' or 'ood', the class to detect.")


def _check_n_bootstrap(n_bootstrap: object) -> None:
    message = f"n_bootstrap={n_bootstrap!r}; expected an integer >= 0, such as 200."
    if not isinstance(n_bootstrap, Integral):
        raise TypeError(message)
    if n_bootstrap < 0:
        raise ValueError(message)
