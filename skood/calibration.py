"""Thresholds and p-values from the scores of in-distribution rows that played no part in training.

With n calibration scores and a fresh score exchangeable with them, the chance that the fresh one
falls below the k-th smallest is at most k / (n + 1), and exactly that without ties (split conformal
prediction). So the threshold is the score of rank ``floor((1 - tpr) (n + 1))``.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "calibration_rank",
    "calibration_split",
    "conformal_p_values",
    "minimum_rows",
    "place_threshold",
]

FloatArray = NDArray[np.float64]


def calibration_rank(n_rows: int, tpr: float) -> int:
    """Rank, from below, of the calibration score that becomes the threshold.

    Parameters
    ----------
    n_rows : int
        Number of calibration rows n.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1.

    Returns
    -------
    int
        ``floor((1 - tpr) (n + 1))``; a product that is an integer up to rounding counts as
        that integer. 0 means that n rows are too few to promise `tpr`.

    References
    ----------
    Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005, chapter 2.

    Examples
    --------
    >>> from skood.calibration import calibration_rank
    >>> calibration_rank(19, 0.95), calibration_rank(9, 0.9), calibration_rank(18, 0.95)
    (1, 1, 0)
    """
    expected_below = (1 - tpr) * (n_rows + 1)
    # 1 - 0.9 is just below 0.1 in binary: forgive an error of a few units in the last place of (n +
    # 1).
    return min(math.floor(expected_below + 4 * np.finfo(float).eps * (n_rows + 1)), n_rows)


def minimum_rows(rank: int, tpr: float) -> int:
    """Smallest number of calibration rows at which `calibration_rank` reaches a rank.

    Parameters
    ----------
    rank : int
        The rank, at least 1.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1.

    Returns
    -------
    int
        The number of rows.

    Examples
    --------
    >>> from skood.calibration import minimum_rows
    >>> minimum_rows(1, 0.95), minimum_rows(2, 0.95)
    (19, 39)
    """
    rows = max(math.floor(rank / (1 - tpr)) - 2, 1)
    while calibration_rank(rows, tpr) < rank:
        rows += 1
    return rows


def place_threshold(calibration_scores: ArrayLike, tpr: float) -> float:
    """Threshold that keeps at least a share `tpr` of fresh in-distribution rows, on average.

    A row is kept where its score is at least the threshold. The promise is marginal: it holds on
    average over calibration sets drawn like the fresh rows.

    Parameters
    ----------
    calibration_scores : array-like of shape (n,)
        Scores of in-distribution rows, higher is more in-distribution.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1.

    Returns
    -------
    float
        The calibration score of rank `calibration_rank`; the smallest one where that rank is 0.

    Warns
    -----
    UserWarning
        If there are too few rows for rank 1: the smallest score then stands in, and keeps n / (n +
        1).

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
    scores = np.asarray(calibration_scores, dtype=np.float64)
    rank = calibration_rank(scores.size, tpr)
    if rank == 0:
        warnings.warn(
            f"{scores.size} calibration rows are too few to keep {tpr:.4g} of fresh "
            f"in-distribution rows: that needs at least {minimum_rows(1, tpr)}. The smallest "
            f"calibration score stands in; it keeps {scores.size / (scores.size + 1):.4g} on "
            "average. Give more rows to calibrate(X), or lower tpr.",
            UserWarning,
            stacklevel=4,
        )
        rank = 1
    return float(np.partition(scores, rank - 1)[rank - 1])


def conformal_p_values(scores: ArrayLike, calibration_scores: ArrayLike, tpr: float) -> FloatArray:
    """Conformal p-values of "this row is in-distribution".

    Parameters
    ----------
    scores : array-like of shape (m,)
        Scores of the rows to test.
    calibration_scores : array-like of shape (n,)
        Scores of the calibration rows.
    tpr : float
        Share of in-distribution rows that the threshold keeps. Where a p-value equals ``1 - tpr``
        up to rounding, it is returned such that ``p <= 1 - tpr`` holds in floating point as well.

    Returns
    -------
    ndarray of shape (m,), float64
        ``(1 + #{calibration scores <= score}) / (n + 1)``. Below `place_threshold` exactly where
        ``p <= 1 - tpr``, provided its rank is at least 1.

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
    calibration = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    counts = 1 + np.searchsorted(calibration, np.asarray(scores, dtype=np.float64), side="right")
    p_values = counts / (calibration.size + 1)
    rejected = counts <= calibration_rank(calibration.size, tpr)
    return np.where(rejected, np.minimum(p_values, 1 - tpr), p_values)


def calibration_split(
    labels: NDArray[np.int64],
    size: int | float | str | None,
    tpr: float,
    random_state: np.random.RandomState,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split rows at random for training and calibration; every class keeps a training row.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Class of each row.
    size : int, float, "auto" or None
        Number or share of calibration rows. "auto" is a tenth, at least the rows for rank 2, at
        most a third. None calibrates on the training rows, whose scores flatter the detector.
    tpr : float
        Share of in-distribution rows to keep, between 0 and 1.
    random_state : numpy.random.RandomState
        Source of the split.

    Returns
    -------
    training, calibration : ndarray of int
        Row numbers, sorted.

    Raises
    ------
    ValueError
        If no row is left for one of the two.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.calibration import calibration_split
    >>> labels = np.repeat([0, 1], 500)
    >>> training, calibration = calibration_split(labels, "auto", 0.95, np.random.RandomState(0))
    >>> len(training), len(calibration)
    (900, 100)
    """
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
        n_calibration = min(n_calibration, len(free))
    if not 1 <= n_calibration <= len(free):
        raise ValueError(
            f"calibration_size={size!r} asks for {n_calibration} of n_samples = {n_rows} "
            f"in-distribution rows, but {len(free)} are free once each of the {len(reserved)} "
            "classes keeps a training row. Pass more rows, another calibration_size, or "
            "calibration_size=None followed by calibrate(X) on fresh rows."
        )
    return np.setdiff1d(everything, free[:n_calibration]), np.sort(free[:n_calibration])


def _calibration_rows(n_rows: int, size: int | float | str, tpr: float) -> int:
    if isinstance(size, str):
        return max(1, min(max(math.ceil(n_rows / 10), minimum_rows(2, tpr)), n_rows // 3))
    return int(size) if isinstance(size, Integral) else round(float(size) * n_rows)
