"""How well a score tells in-distribution (ID) from out-of-distribution (OOD) rows.

Most functions take the scores of ID rows and those of OOD rows; higher is more in-distribution. The
positive class is named in words: with ``positive="id"`` a row is detected if ``score >=
threshold``, with ``positive="ood"`` if ``score <= threshold``. Rows of equal score cross a
threshold together, so no result depends on how a sort orders ties.

`aurc` and `risk_coverage_curve` judge a classifier that rejects: how often it is wrong on the rows
that it keeps.

To add a metric, write its function and name it in `METRICS`: reports, scorers and pictures read it
from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import StrOptions

from .randomness import random_generator
from .validation import Number, comparable, valid_scores, valid_truths, validated

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DetectionReport",
    "aupr",
    "aurc",
    "auroc",
    "detection_error",
    "detection_report",
    "fpr_at_tpr",
    "risk_coverage_curve",
]

Positive = Literal["id", "ood"]
Scores = NDArray[Any]
Counts = NDArray[np.int64]

POSITIVE = [StrOptions({"id", "ood"})]
SHARE = [Number(Real, 0, 1, closed="right")]


@validated(tpr=SHARE, positive=POSITIVE, method=[StrOptions({"at_least", "nearest"})])
def fpr_at_tpr(
    score_id: ArrayLike,
    score_ood: ArrayLike,
    tpr: float = 0.95,
    *,
    positive: Positive = "id",
    method: Literal["at_least", "nearest"] = "at_least",
) -> float:
    """Rate of false positives at a given true positive rate (FPR95 if ``tpr=0.95``).

    With ``positive="id"`` this is the share of OOD rows that are kept by a threshold that keeps
    `tpr` of the ID rows [1]_ [2]_. With ``positive="ood"`` it is the share of ID rows that are
    rejected by a threshold that rejects `tpr` of the OOD rows. The two differ widely: say which one
    you report.

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
        - "nearest": the one whose true positive rate is nearest to `tpr`, possibly below it, as in
          the code published with [3]_ and [2]_. Use it to reproduce published numbers. Of two rates
          at equal distance, the higher is taken. Of several thresholds with one rate, the most
          lenient is taken, but the strictest if the rate is 1. Distances are float64, as in that
          code, so rounding decides between 9/10 and 10/10 for a `tpr` of 0.95.

    Returns
    -------
    float
        The false positive rate, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or if another argument is not
        one of those above.

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
    tp, fp = _roc_counts(score_id, score_ood, positive)
    return (_fpr_at_least if method == "at_least" else _fpr_nearest)(tp, fp, tpr)


@validated(positive=POSITIVE)
def auroc(score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id") -> float:
    """Area under the receiver operating characteristic.

    The probability that an ID row scores higher than an OOD row; a tie counts one half [1]_. It is
    the same for either positive class.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        Does not change the result; all metrics take it.

    Returns
    -------
    float
        The area, in [0, 1]; 0.5 is chance.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `positive` is unknown.

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


@validated(positive=POSITIVE)
def aupr(score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id") -> float:
    """Area under the precision-recall curve, as average precision.

    The sum over thresholds of precision times the gain in recall, ``sum_k (R_k - R_(k-1)) P_k``,
    without interpolation [1]_, as in `sklearn.metrics.average_precision_score`. Chance is the share
    of positive rows, ``n_positive / (n_id + n_ood)``: compare values only if both the positive
    class and that share are the same.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        The class to detect.

    Returns
    -------
    float
        The average precision, in (0, 1].

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `positive` is unknown.

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


@validated(positive=POSITIVE)
def detection_error(
    score_id: ArrayLike, score_ood: ArrayLike, *, positive: Positive = "id"
) -> float:
    """Error of the best threshold, if both classes are equally likely.

    The minimum over all thresholds of ``(FNR + FPR) / 2``, with FNR and FPR the false negative and
    false positive rates [1]_. It is the same for either positive class.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, higher is more in-distribution. Any real dtype; infinities are allowed.
    score_ood : array-like of shape (n_ood,)
        Scores of OOD rows.
    positive : {"id", "ood"}, default="id"
        Does not change the result; all metrics take it.

    Returns
    -------
    float
        The error, in [0, 0.5]; 0.5 is chance.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `positive` is unknown.

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


def risk_coverage_curve(
    scores: ArrayLike, correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often a classifier is wrong on the rows that it keeps, from one row kept to all.

    The rows with the highest scores are kept first. The coverage is the share of rows kept, the
    risk the share of wrong ones among them [1]_ [2]_.

    Parameters
    ----------
    scores : array-like of shape (n,)
        Scores of rows, higher is kept earlier. Any real dtype; infinities are allowed.
    correct : array-like of shape (n,), bool
        Whether the classifier is right on each row. An outlier counts as wrong.

    Returns
    -------
    coverage : ndarray of shape (n,), float64
        1 / n, 2 / n, ..., 1.
    risk : ndarray of shape (n,), float64
        The risk at each coverage. Within rows of equal score it is the mean over their orders.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `correct` does not hold
        one truth value a row.

    References
    ----------
    .. [1] El-Yaniv, R. & Wiener, Y., "On the foundations of noise-free selective classification",
       JMLR 11, 2010.
    .. [2] Geifman, Y. & El-Yaniv, R., "Selective classification for deep neural networks", NeurIPS
       2017.

    Examples
    --------
    >>> from skood.metrics import risk_coverage_curve
    >>> coverage, risk = risk_coverage_curve([4, 3, 2, 1], [True, True, False, True])
    >>> coverage.tolist(), risk.round(2).tolist()
    ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.33, 0.25])
    """
    valid = valid_scores(scores, "scores")
    wrong = ~valid_truths(correct, "correct", len(valid))
    _, group = np.unique(valid, return_inverse=True)
    n_kept = np.cumsum(np.bincount(group)[::-1])
    n_wrong = np.cumsum(np.bincount(group, weights=wrong)[::-1])
    kept = np.arange(1, len(valid) + 1)
    return kept / len(valid), np.interp(kept, [0, *n_kept], [0, *n_wrong]) / kept


def aurc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean risk over all shares of rows kept.

    It is low if the classifier is often right, and if the rows on which it is wrong have low scores
    [1]_. See `risk_coverage_curve`.

    Parameters
    ----------
    scores : array-like of shape (n,)
        Scores of rows, higher is kept earlier. Any real dtype; infinities are allowed.
    correct : array-like of shape (n,), bool
        Whether the classifier is right on each row. An outlier counts as wrong.

    Returns
    -------
    float
        The area, in [0, 1]; less is better. Scores without any order among the rows give the share
        of wrong rows.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `correct` does not hold
        one truth value a row.

    References
    ----------
    .. [1] Geifman, Y., Uziel, G. & El-Yaniv, R., "Bias-reduced uncertainty estimation for deep
       neural classifiers", ICLR 2019.

    Examples
    --------
    >>> from skood.metrics import aurc
    >>> round(aurc([4, 3, 2, 1], [True, True, False, True]), 4)
    0.1458
    >>> aurc([1, 1, 1, 1], [True, True, False, True])
    0.25
    """
    return float(risk_coverage_curve(scores, correct)[1].mean())


@dataclass(frozen=True)
class DetectionReport:
    """Metrics of one ID set against one or several OOD sets; made by `detection_report`.

    ``str(report)`` is a text table in percent. Attributes (one per parameter) and methods give
    fractions.

    Parameters
    ----------
    rows : dict of str to dict of str to float
        The metrics of each OOD set by name, and of "mean" if the sets have names. If there are
        intervals, ``<metric>_low`` and ``<metric>_high`` follow each metric.
    n_id : int
        Number of ID rows.
    n_ood : dict of str to int
        Number of rows of each OOD set.
    tpr : float
        True positive rate at which the false positive rate is taken.
    positive : {"id", "ood"}
        The positive class.
    n_bootstrap : int
        Number of bootstrap replicates; 0 if there are no intervals.
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
        metrics = [metric.name_at(self.tpr) for metric in METRICS]
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
        percent = _percent(self.tpr)
        side = {"id": "ID, score >= threshold", "ood": "OOD, score <= threshold"}[self.positive]
        lines = [
            f"{self.n_id} ID rows against OOD rows; values in percent",
            f"positive class: {side}",
            f"fpr{percent}: FPR where TPR is at least {percent} %",
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


@validated(
    tpr=SHARE,
    positive=POSITIVE,
    n_bootstrap=[Number(Integral, 0, 10_000_000, closed="both")],
    confidence=SHARE,
    random_state=["random_state"],
)
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
        unweighted mean over the sets. An array gives the single row "ood".
    tpr : float, default=0.95
        True positive rate of `fpr_at_tpr`, in (0, 1]; it names the metric, "fpr95".
    positive : {"id", "ood"}, default="id"
        The positive class, as in `fpr_at_tpr`.
    n_bootstrap : int, default=0
        Number of bootstrap replicates for intervals; 0 gives no intervals.
    confidence : float, default=0.95
        Confidence level of the intervals, in (0, 1].
    random_state : int, RandomState instance or None, default=None
        Seed or generator of the replicates. None draws fresh entropy. NumPy's global generator is
        neither read nor advanced.

    Returns
    -------
    DetectionReport
        All metrics of ID against OOD rows, as fractions; `fpr_at_tpr` is named "fpr<100 tpr>".

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN (the error names the set), if
        `score_ood` is an empty dict or has a set named "mean", or if another argument is not one of
        those above.

    Notes
    -----
    Intervals are percentile intervals [1]_. Each replicate draws ID rows and the rows of each OOD
    set independently, with replacement. All sets share the draw of ID rows, so the interval of the
    mean accounts for the ID rows that they have in common. Intervals cover the choice of test rows,
    not that of training seeds. The detection error is a minimum over thresholds and so biased low
    in a replicate: if rows are few, its interval may lie below the estimate.

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
    generator = random_generator(random_state)
    valid_id = valid_scores(score_id, "score_id")
    valid_ood = _valid_sets(score_ood)
    metrics = [metric.name_at(tpr) for metric in METRICS]

    groups = [_tie_groups(valid_id, scores) for scores in valid_ood.values()]
    # (1 + n_bootstrap, n_sets, n_metrics): the estimate, then its replicates
    values = np.empty((1 + n_bootstrap, len(groups), len(metrics)))
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
        rows=_report_rows(names, metrics, values, confidence),
        n_id=len(valid_id),
        n_ood={name: len(scores) for name, scores in valid_ood.items()},
        tpr=tpr,
        positive=positive,
        n_bootstrap=n_bootstrap,
        confidence=confidence,
    )


# From scores to counts: the one place that deals with ties and the positive class.


def _roc_counts(
    score_id: ArrayLike, score_ood: ArrayLike, positive: Positive
) -> tuple[Counts, Counts]:
    groups = _tie_groups(valid_scores(score_id, "score_id"), valid_scores(score_ood, "score_ood"))
    return _cumulative_counts(*groups, positive)


def _tie_groups(score_id: Scores, score_ood: Scores) -> tuple[Counts, Counts]:
    """For each ID and each OOD row, the rank of its score among the distinct scores of both."""
    everything = np.concatenate(comparable(score_id, score_ood))
    _, group = np.unique(everything, return_inverse=True)
    return group[: len(score_id)], group[len(score_id) :]


def _cumulative_counts(
    group_id: Counts, group_ood: Counts, positive: Positive
) -> tuple[Counts, Counts]:
    """Count true and false positives, int64, at each observed score, the strictest first.

    Both arrays have shape (n_thresholds,), with one threshold per group of tied rows. They end in
    the numbers of positive and negative rows.
    """
    n_groups = 1 + max(group_id.max(), group_ood.max())
    n_id = np.bincount(group_id, minlength=n_groups)
    n_ood = np.bincount(group_ood, minlength=n_groups)
    observed = (n_id + n_ood) > 0  # a bootstrap draw leaves groups empty
    n_id, n_ood = n_id[observed], n_ood[observed]
    if positive == "id":
        return np.cumsum(n_id[::-1]), np.cumsum(n_ood[::-1])
    return np.cumsum(n_ood), np.cumsum(n_id)


# The metrics, from cumulative counts of true (tp) and false (fp) positives, and perhaps a rate.


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


def _auroc(tp: Counts, fp: Counts, _: float = 1) -> float:
    # Twice the number of (positive, negative) pairs in the right order, a tie counting one.
    tp_before = np.concatenate(([0], tp[:-1]))
    doubled = np.sum(np.diff(fp, prepend=0) * (tp_before + tp))
    return int(doubled) / (2 * int(tp[-1]) * int(fp[-1]))


def _aupr(tp: Counts, fp: Counts, _: float = 1) -> float:
    return float(np.sum(np.diff(tp, prepend=0) * (tp / (tp + fp))) / tp[-1])


def _detection_error(tp: Counts, fp: Counts, _: float = 1) -> float:
    n_positive, n_negative = int(tp[-1]), int(fp[-1])
    # The threshold that detects no row is left out: its error is 0.5, like that of the last one.
    scaled = np.min((n_positive - tp) * n_negative + fp * n_positive)
    return int(scaled) / (2 * n_positive * n_negative)


# The list of metrics.


class _Metric(NamedTuple):
    """A metric, with what reports, scorers and pictures need to know about it."""

    name: str
    """In reports and tables; "{}" stands for the true positive rate in percent."""

    title: str
    """In pictures, at a true positive rate of 95 %."""

    function: Callable[..., float]
    """Maps the scores of ID and of OOD rows, and ``positive=``, to the value."""

    of_counts: Callable[[Counts, Counts, float], float]
    """Maps the counts of true and false positives, and a true positive rate, to the value."""

    is_error: bool = False
    """Whether less is better."""

    def name_at(self, tpr: float) -> str:
        return self.name.format(_percent(tpr))

    def is_named(self, name: str) -> bool:
        """Whether this is its name in code, reports, searches or pictures."""
        function = self.function.__name__
        names = {function, f"neg_{function}", self.name_at(0.95), self.title.lower()}
        return name.lower() in names

    @property
    def name_in_searches(self) -> str:
        """That of the function, after "neg_" for an error, because searches maximise."""
        return f"neg_{self.function.__name__}" if self.is_error else self.function.__name__


METRICS = (
    _Metric("fpr{}", "FPR95", fpr_at_tpr, _fpr_at_least, is_error=True),
    _Metric("auroc", "AUROC", auroc, _auroc),
    _Metric("aupr", "AUPR", aupr, _aupr),
    _Metric("detection_error", "detection error", detection_error, _detection_error, is_error=True),
)
"""All metrics, in the order of reports."""


def _all_metrics(
    group_id: Counts, group_ood: Counts, tpr: float, positive: Positive
) -> list[float]:
    tp, fp = _cumulative_counts(group_id, group_ood, positive)
    return [metric.of_counts(tp, fp, tpr) for metric in METRICS]


# The report.


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
    names: list[str], metrics: list[str], values: NDArray[np.float64], confidence: float
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


def _valid_sets(score_ood: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, Scores]:
    if not isinstance(score_ood, Mapping):
        return {"ood": valid_scores(score_ood, "score_ood")}
    if not score_ood:
        raise ValueError("score_ood is an empty dict; expected at least one set of OOD scores.")
    if "mean" in score_ood:
        raise ValueError(
            "score_ood has a set named 'mean', the name of the row of means. Rename the set."
        )
    return {
        name: valid_scores(scores, f"score_ood[{name!r}]") for name, scores in score_ood.items()
    }
