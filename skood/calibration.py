"""Thresholds and p-values from the scores of in-distribution rows that played no part in training.

Take n calibration scores and a fresh score that is exchangeable with them. The chance that the
fresh one is below the k-th smallest is at most k / (n + 1), and exactly that without ties (split
conformal prediction). So the threshold is the score of rank ``floor((1 - tpr) (n + 1))``.

If each class has a threshold of its own, the same holds among the rows of a class (Mondrian
conformal prediction).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control
from sklearn.utils._param_validation import StrOptions, validate_parameter_constraints

from .exceptions import FewCalibrationRowsWarning
from .notices import warn_user
from .validation import Number, comparable, valid_array, valid_scores

__all__ = [
    "calibration_rank",
    "calibration_split",
    "conformal_p_values",
    "minimum_rows",
    "outliers_at_fdr",
    "place_class_thresholds",
    "place_threshold",
    "tpr_by_cost",
]

FloatArray = NDArray[np.float64]

MOST_ROWS = 2**62
MOST_CLASSES = 2**24
SIZE = [
    StrOptions({"auto"}),
    Number(Integral, 1, None, closed="left"),
    Number(Real, 0, 1, closed="neither"),
    None,
]
CONSTRAINTS = {
    "n_rows": [Number(Integral, 0, MOST_ROWS, closed="both")],
    "rank": [Number(Integral, 1, MOST_ROWS, closed="both")],
    "tpr": [Number(Real, 0, 1, closed="neither")],
    "fdr": [Number(Real, 0, 1, closed="neither")],
    "size": SIZE,
    "n_classes": [Number(Integral, 1, MOST_CLASSES, closed="both")],
    "cost_of_rejecting": [Number(Real, 0, None, closed="neither")],
    "cost_of_keeping": [Number(Real, 0, None, closed="neither")],
    "ood_share": [Number(Real, 0, 1, closed="neither"), None],
    "random_state": [np.random.RandomState],
}


def calibration_rank(n_rows: int, tpr: float) -> int:
    """Rank, from below, of the calibration score that becomes the threshold.

    Parameters
    ----------
    n_rows : int
        Number of calibration rows n.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1, both excluded.

    Returns
    -------
    int
        ``floor((1 - tpr) (n + 1))``, at most n. A product that is an integer up to rounding counts
        as that integer. 0 means that n rows are too few to promise `tpr`.

    Raises
    ------
    TypeError, ValueError
        If `n_rows` is not an integer from 0 to 2**62, or `tpr` is not between 0 and 1.

    References
    ----------
    Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005, chapter 2.

    Examples
    --------
    >>> from skood.calibration import calibration_rank
    >>> calibration_rank(19, 0.95), calibration_rank(9, 0.9), calibration_rank(18, 0.95)
    (1, 1, 0)
    """
    _check("calibration_rank", n_rows=n_rows, tpr=tpr)
    return _rank(int(n_rows), float(tpr))


def _rank(n_rows: int, tpr: float) -> int:
    expected_below = (1 - tpr) * (n_rows + 1)
    # 1 - 0.9 is just below 0.1 in binary: forgive a few units in the last place of n + 1.
    return min(math.floor(expected_below + 4 * np.finfo(float).eps * (n_rows + 1)), n_rows)


def minimum_rows(rank: int, tpr: float) -> int:
    """Smallest number of calibration rows at which `calibration_rank` reaches a rank.

    Parameters
    ----------
    rank : int
        The rank, at least 1.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1, both excluded.

    Returns
    -------
    int
        The number of rows.

    Raises
    ------
    TypeError, ValueError
        If `rank` is not an integer from 1 to 2**62, `tpr` is not between 0 and 1, or more than
        2**62 rows were needed.

    Examples
    --------
    >>> from skood.calibration import minimum_rows
    >>> minimum_rows(1, 0.95), minimum_rows(2, 0.95)
    (19, 39)
    """
    _check("minimum_rows", rank=rank, tpr=tpr)
    rows = bisect_left(range(MOST_ROWS), rank, key=lambda n_rows: _rank(n_rows, float(tpr)))
    if rows == MOST_ROWS:
        raise ValueError(
            f"rank={rank} at tpr={tpr} needs more than 2**62 rows. Pass a lower rank or tpr."
        )
    return rows


def place_threshold(calibration_scores: ArrayLike, tpr: float) -> float:
    """Threshold that keeps at least a share `tpr` of fresh in-distribution rows, on average.

    A row is kept if its score is at least the threshold. The promise is marginal: it holds on
    average over calibration sets drawn like the fresh rows.

    Parameters
    ----------
    calibration_scores : array-like of shape (n,)
        Scores of in-distribution rows, higher is more in-distribution. Any real dtype.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1, both excluded.

    Returns
    -------
    float
        The calibration score of rank `calibration_rank`, or the smallest one if that rank is 0. A
        score that no float equals, such as an integer beyond 2**53, is given as it is.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `tpr` is not between 0 and
        1.

    Warns
    -----
    FewCalibrationRowsWarning
        If there are too few rows for rank 1. The smallest score is taken, which keeps a share of
        n / (n + 1).

    References
    ----------
    Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005, chapter 2.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.calibration import place_threshold
    >>> place_threshold(np.arange(39.0), 0.95)
    1.0
    """
    _check("place_threshold", tpr=tpr)
    tpr = float(tpr)
    scores = valid_scores(calibration_scores, "calibration_scores")
    if _rank(scores.size, tpr) == 0:
        warn_user(
            f"{scores.size} calibration rows are too few to keep {tpr:.4g} of fresh "
            f"in-distribution rows: that needs at least {minimum_rows(1, tpr)}. The threshold is "
            f"the smallest score, which keeps {scores.size / (scores.size + 1):.4g} on average. "
            "Pass more rows to calibrate(X), or lower tpr.",
            FewCalibrationRowsWarning,
        )
    return _threshold(scores, tpr)


def _threshold(scores: NDArray[Any], tpr: float) -> float:
    rank = max(_rank(scores.size, tpr), 1)
    threshold = np.partition(scores, rank - 1)[rank - 1]
    return float(threshold) if float(threshold) == threshold.item() else threshold.item()


def place_class_thresholds(
    calibration_scores: ArrayLike, classes: ArrayLike, n_classes: int, tpr: float
) -> FloatArray:
    """A threshold for each class, which keeps at least a share `tpr` of its fresh rows.

    Parameters
    ----------
    calibration_scores : array-like of shape (n,)
        Scores of in-distribution rows, higher is more in-distribution.
    classes : array-like of shape (n,), int
        Predicted class of each row, from 0 to `n_classes` - 1. It must be the predicted one, as
        the true class of a row to test is not known.
    n_classes : int
        Number of classes, from 1 to 2**24.
    tpr : float
        Share of in-distribution rows to keep in each class, between 0 and 1, both excluded.

    Returns
    -------
    ndarray of shape (n_classes,), float64
        The thresholds. A class with fewer rows than `minimum_rows` of rank 1 has that of all rows.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or another argument is not
        one of those above.

    Warns
    -----
    FewCalibrationRowsWarning
        If a class has too few rows for a threshold of its own.

    References
    ----------
    Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005, section 4.5,
    on Mondrian conformal prediction.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.calibration import place_class_thresholds
    >>> scores, classes = np.arange(80.0), np.repeat([0, 1], 40)
    >>> place_class_thresholds(scores, classes, 2, tpr=0.95)
    array([ 1., 41.])
    """
    _check("place_class_thresholds", tpr=tpr, n_classes=n_classes)
    scores = valid_scores(calibration_scores, "calibration_scores")
    classes = _valid_classes(classes, "classes", scores.size, n_classes)
    tpr = float(tpr)
    thresholds = np.full(n_classes, _threshold(scores, tpr), dtype=np.float64)
    has_own = _has_threshold(classes, n_classes, tpr)
    for one in np.flatnonzero(has_own):
        thresholds[one] = _threshold(scores[classes == one], tpr)
    if not has_own.all():
        few = np.flatnonzero(~has_own)
        warn_user(
            f"{len(few)} of {n_classes} classes, such as number {few[0]}, are predicted for fewer "
            f"than {minimum_rows(1, tpr)} of {scores.size} calibration rows, too few to keep "
            f"{tpr:.4g} of the fresh rows of each. They take the threshold of all rows. Pass more "
            "rows to calibrate(X, per_class=True), or lower tpr.",
            FewCalibrationRowsWarning,
        )
    return thresholds


def tpr_by_cost(
    score_id: ArrayLike,
    score_ood: ArrayLike | None = None,
    *,
    score_new: ArrayLike | None = None,
    cost_of_rejecting: float = 1.0,
    cost_of_keeping: float = 1.0,
    ood_share: float | None = None,
) -> float:
    """The share of in-distribution (ID) rows to keep at which mistakes cost least.

    Pass it on: ``detector.calibrate(X_fresh, tpr=tpr_by_cost(...))``.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows that the detector was not trained on, higher is more in-distribution.
    score_ood : array-like of shape (n_ood,), default=None
        Scores of out-of-distribution (OOD) rows, such as are to come.
    score_new : array-like of shape (n_new,), default=None
        Scores of rows as they come, if nobody knows which are OOD: of them, `ood_share` is assumed
        to be. Pass either these or `score_ood`.
    cost_of_rejecting : float, default=1.0
        What it costs to reject an ID row. Positive.
    cost_of_keeping : float, default=1.0
        What it costs to keep an OOD row. Positive.
    ood_share : float, default=None
        Share of OOD rows among those to come, between 0 and 1. None takes the share among the rows
        passed; beside `score_new` it must be given.

    Returns
    -------
    float
        The `tpr` of the threshold with the least expected cost, ``(1 - ood_share) *
        cost_of_rejecting * P(reject | ID) + ood_share * cost_of_keeping * P(keep | OOD)``, within
        ``1 / (n_id + 1)`` and ``n_id / (n_id + 1)``: no calibration on as many rows can promise
        more or less. Of several, the largest.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or another argument is not
        one of those above; or if not exactly one of `score_ood` and `score_new` is given.

    Notes
    -----
    Of new rows, a share ``P(keep) = (1 - ood_share) P(keep | ID) + ood_share P(keep | OOD)`` is
    kept. So `score_new` and `score_id` tell ``P(keep | OOD)``.

    References
    ----------
    Chow, "On optimum recognition error and reject tradeoff", IEEE Trans. Inf. Theory 16(1), 1970.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.calibration import tpr_by_cost
    >>> score_id, score_ood = np.arange(100.0), np.arange(-70.0, 30.0)
    >>> round(tpr_by_cost(score_id, score_ood, cost_of_keeping=5), 2)
    0.69
    >>> round(tpr_by_cost(score_id, score_ood, cost_of_keeping=5, ood_share=0.01), 2)
    0.99
    """
    costs = {"cost_of_rejecting": cost_of_rejecting, "cost_of_keeping": cost_of_keeping}
    _check("tpr_by_cost", **costs, ood_share=ood_share)
    if (score_ood is None) == (score_new is None) or (score_new is not None and ood_share is None):
        raise ValueError(
            "tpr_by_cost needs outliers: pass score_ood, the scores of known ones; or score_new, "
            "scores of rows as they come, with ood_share, the share of outliers assumed among them."
        )
    name, others = ("score_new", score_new) if score_ood is None else ("score_ood", score_ood)
    tested, compared = comparable(
        valid_scores(score_id, "score_id"), valid_scores(cast(ArrayLike, others), name)
    )
    share = compared.size / (tested.size + compared.size) if ood_share is None else ood_share
    tested = np.sort(tested)
    rejected = np.arange(tested.size) / tested.size  # by a threshold at each of the scores
    kept = 1 - np.searchsorted(np.sort(compared), tested, side="left") / compared.size
    if score_ood is None:
        kept = ((kept - (1 - share) * (1 - rejected)) / share).clip(0, 1)
    cost = (1 - share) * cost_of_rejecting * rejected + share * cost_of_keeping * kept
    least = int(np.argmin(cost))  # of equal scores the first, as each after it seems to cost more
    return 1 - (least + 1) / (tested.size + 1)


def conformal_p_values(
    scores: ArrayLike,
    calibration_scores: ArrayLike,
    tpr: float,
    classes: ArrayLike | None = None,
    calibration_classes: ArrayLike | None = None,
) -> FloatArray:
    """Conformal p-values of "this row is in-distribution".

    Parameters
    ----------
    scores : array-like of shape (m,)
        Scores of the rows to test. Any real dtype.
    calibration_scores : array-like of shape (n,)
        Scores of the calibration rows.
    tpr : float
        Share of in-distribution rows that the threshold keeps, between 0 and 1, both excluded. A
        p-value that equals ``1 - tpr`` up to rounding is given as at most ``1 - tpr``.
    classes : array-like of shape (m,), int, default=None
        Predicted class of each row to test, from 0. Each is then compared with the calibration rows
        of its class alone; with all, if these are too few for a threshold of their own.
    calibration_classes : array-like of shape (n,), int, default=None
        Predicted class of each calibration row, if `classes` is given.

    Returns
    -------
    ndarray of shape (m,), float64
        ``(1 + #{calibration scores <= score}) / (n + 1)``. If the rank of the threshold is at least
        1, a score is below it exactly if ``p <= 1 - tpr``.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked or NaN, or `tpr` is not between 0 and
        1.

    References
    ----------
    Bates, Candes, Lei, Romano & Sesia, "Testing for outliers with conformal p-values", Ann.
    Statist. 51(1), 2023, equation 2.

    Examples
    --------
    >>> from skood.calibration import conformal_p_values
    >>> conformal_p_values([0.5, 2.5], [1.0, 2.0, 3.0], tpr=0.5)
    array([0.25, 0.75])
    """
    _check("conformal_p_values", tpr=tpr)
    tpr = float(tpr)
    tested, calibration = comparable(
        valid_scores(scores, "scores"), valid_scores(calibration_scores, "calibration_scores")
    )
    p_values = _p_values(tested, calibration, tpr)
    if classes is None or calibration_classes is None:
        return p_values
    own = _valid_classes(calibration_classes, "calibration_classes", calibration.size)
    of_tested = _valid_classes(classes, "classes", tested.size)
    n_classes = 1 + max(int(own.max()), int(of_tested.max()))
    for one in np.flatnonzero(_has_threshold(own, n_classes, tpr)):
        rows = of_tested == one
        p_values[rows] = _p_values(tested[rows], calibration[own == one], tpr)
    return p_values


def _p_values(tested: NDArray[Any], calibration: NDArray[Any], tpr: float) -> FloatArray:
    counts = 1 + np.searchsorted(np.sort(calibration), tested, side="right")
    p_values = counts / (calibration.size + 1)
    rejected = counts <= _rank(calibration.size, tpr)
    return np.where(rejected, np.minimum(p_values, 1 - tpr), p_values)


def outliers_at_fdr(p_values: ArrayLike, fdr: float) -> NDArray[np.bool_]:
    """Rows to call outliers, so that at most a share `fdr` of these is in-distribution on average.

    Parameters
    ----------
    p_values : array-like of shape (n,)
        Conformal p-values of the rows.
    fdr : float
        False discovery rate, between 0 and 1, both excluded.

    Returns
    -------
    ndarray of shape (n,), bool
        True for outliers.

    Raises
    ------
    TypeError, ValueError
        If p-values are not numbers between 0 and 1, empty, not 1-D, masked or NaN, or `fdr` is not
        between 0 and 1.

    References
    ----------
    Benjamini & Hochberg, "Controlling the false discovery rate", J. R. Statist. Soc. B 57(1), 1995.
    Bates et al., "Testing for outliers with conformal p-values", Ann. Statist. 51(1), 2023,
    theorem 2.

    Examples
    --------
    >>> from skood.calibration import outliers_at_fdr
    >>> outliers_at_fdr([0.01, 0.02, 0.5, 0.9], fdr=0.1)
    array([ True,  True, False, False])
    """
    _check("outliers_at_fdr", fdr=fdr)
    tested = valid_scores(p_values, "p_values").astype(np.float64)
    if tested.min() < 0 or tested.max() > 1:
        raise ValueError(
            f"p_values range from {tested.min():.4g} to {tested.max():.4g}; expected numbers "
            "from 0 to 1, as conformal_p_values gives them."
        )
    # A p-value at the limit is a product that was rounded.
    return false_discovery_control(tested) <= float(fdr) * (1 + 4 * np.finfo(float).eps)


def calibration_split(
    labels: NDArray[np.int64],
    size: int | float | str | None,
    tpr: float,
    random_state: np.random.RandomState,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split rows at random into training and calibration; every class keeps a training row.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Class of each row.
    size : int, float, "auto" or None
        Number or share of calibration rows. "auto" is a tenth of the rows, at least as many as
        rank 2 needs, at most a third. None calibrates on the training rows, whose scores flatter
        the detector.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1, both excluded.
    random_state : numpy.random.RandomState
        Source of the split.

    Returns
    -------
    training, calibration : ndarray of int
        Row numbers, sorted.

    Raises
    ------
    TypeError, ValueError
        If no row is left for training or for calibration, if labels are not finite numbers, empty
        or not 1-D, or if another argument is not one of those above.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.calibration import calibration_split
    >>> labels = np.repeat([0, 1], 500)
    >>> training, calibration = calibration_split(labels, "auto", 0.95, np.random.RandomState(0))
    >>> len(training), len(calibration)
    (900, 100)
    """
    _check("calibration_split", size=size, tpr=tpr, random_state=random_state)
    labels = valid_array(labels, "labels", ("n",))
    n_rows = len(labels)
    everything = np.arange(n_rows)
    if size is None:
        return everything, everything
    order = random_state.permutation(n_rows)
    # The first row of each class in random order stays in training, whatever the split.
    reserved = order[np.unique(labels[order], return_index=True)[1]]
    free = order[~np.isin(order, reserved)]
    n_calibration = _calibration_rows(n_rows, size, tpr)
    if isinstance(size, str):
        n_calibration = min(n_calibration, max(len(free), 1))
    if not 1 <= n_calibration <= len(free):
        raise ValueError(
            f"calibration_size={size!r} asks for {n_calibration} of n_samples = {n_rows} "
            f"in-distribution rows, but only {len(free)} are free, because each of the "
            f"{len(reserved)} classes keeps a training row. Pass more rows, another "
            "calibration_size, or None, and call calibrate(X) on fresh rows."
        )
    return np.setdiff1d(everything, free[:n_calibration]), np.sort(free[:n_calibration])


def _has_threshold(classes: NDArray[np.intp], n_classes: int, tpr: float) -> NDArray[np.bool_]:
    """Which classes have calibration rows enough for a threshold of their own."""
    counts = np.bincount(classes, minlength=n_classes)
    return counts >= minimum_rows(1, tpr)


def _valid_classes(
    classes: ArrayLike, name: str, n_rows: int, n_classes: int | None = None
) -> NDArray[np.intp]:
    values = valid_array(classes, name, ("n",))
    if values.shape != (n_rows,) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; expected the number of a "
            f"class for each of {n_rows} scores."
        )
    largest = math.inf if n_classes is None else n_classes - 1
    if n_rows and not 0 <= values.min() <= values.max() <= largest:
        raise ValueError(
            f"{name} is from {values.min()} to {values.max()}; expected numbers of classes, from 0"
            f"{'' if n_classes is None else f' to {largest}'}."
        )
    return values.astype(np.intp)


def _check(function: str, **parameters: Any) -> None:
    # Not by a decorator, which takes ten times as long: single rows are tested, too.
    validate_parameter_constraints(CONSTRAINTS, parameters, caller_name=function)


def _calibration_rows(n_rows: int, size: int | float | str, tpr: float) -> int:
    if isinstance(size, str):
        return max(1, min(max(math.ceil(n_rows / 10), minimum_rows(2, tpr)), n_rows // 3))
    return int(size) if isinstance(size, Integral) else round(float(size) * n_rows)
