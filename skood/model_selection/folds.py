"""Folds for outlier detectors: trained on in-distribution rows, tested on both kinds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import BaseCrossValidator, KFold, StratifiedKFold
from sklearn.utils._param_validation import validate_parameter_constraints

from ..exceptions import SelectionWarning
from ..labels import as_labels, is_outlier
from ..notices import quoted, warn_user
from ..randomness import random_generator
from ..validation import Number, number_of_rows

__all__ = ["InDistributionKFold"]

Indices = NDArray[np.intp]


class InDistributionKFold(BaseCrossValidator):
    """K folds that train on in-distribution rows alone and test on both kinds of rows.

    In-distribution (ID) rows are stratified by class, so rows ordered by class do no harm. Known
    out-of-distribution (OOD) rows are never trained on, and each is in exactly one test fold.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2.
    ood_label : int, str or bool, default=None
        Label in y of known OOD rows. None if all rows are ID.
    shuffle : bool, default=True
        Whether to shuffle the rows of each class before dividing them.
    random_state : int, RandomState or None, default=None
        Seed of the shuffling. Pass an int for the same folds at every call; halving searches need
        that. None draws fresh entropy; no global generator is read or advanced.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong type or out of range, or if `random_state` is set although
        ``shuffle=False``.

    Notes
    -----
    If a class has fewer rows than there are folds, some test folds lack it, but no training fold
    does.

    A search refits on all rows. `SparseEnergyOODDetector` leaves out those labelled `ood_label` if
    it is given the same ``ood_label=``. Refit an estimator without that parameter by hand, on the
    ID rows, and pass ``refit=False`` to the search.

    Training folds hold no OOD rows. Pass ``return_train_score=False`` to halving searches, or a
    scorer that looks for OOD rows there fails. If a detector learns from outliers
    (``outlier_weight > 0``), use scikit-learn's `StratifiedKFold` instead.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.model_selection import InDistributionKFold
    >>> X, y = np.zeros((6, 2)), ["cat", "cat", "dog", "dog", "ood", "ood"]
    >>> for train, test in InDistributionKFold(2, ood_label="ood", shuffle=False).split(X, y):
    ...     print(train, test)
    [1 3] [0 2 4]
    [0 2] [1 3 5]
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_splits": [Number(Integral, 2, None, closed="left")],
        "ood_label": [Integral, str, "boolean", None],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_splits: int = 5,
        *,
        ood_label: int | str | bool | None = None,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_splits = n_splits
        self.ood_label = ood_label
        self.shuffle = shuffle
        self.random_state = random_state
        validate_parameter_constraints(
            self._parameter_constraints, vars(self), caller_name=type(self).__name__
        )
        if random_state is not None and not shuffle:
            raise ValueError(
                f"random_state={random_state!r} has no effect with shuffle=False. Pass "
                "shuffle=True, or leave random_state out."
            )

    def get_n_splits(self, X: object = None, y: object = None, groups: object = None) -> int:
        """Number of folds.

        Parameters
        ----------
        X, y, groups : object
            Ignored.

        Returns
        -------
        int
            The parameter `n_splits`.
        """
        return self.n_splits

    def split(
        self, X: Any, y: ArrayLike | None = None, groups: object = None
    ) -> Iterator[tuple[Indices, Indices]]:
        """Row numbers of each training and test fold.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows; only their number matters.
        y : array-like of shape (n,), default=None
            Label of each row: integers, strings or booleans. Required if `ood_label` is set.
            Without it the folds are not stratified.
        groups : object
            Ignored, with a warning.

        Yields
        ------
        train, test : ndarray of int, shape (n_train,) and (n_test,)
            Row numbers, ascending.

        Raises
        ------
        ValueError
            If a fold would lack ID or OOD rows, a class has a single row, or y does not fit X or
            `ood_label`.

        Warns
        -----
        SelectionWarning
            If `groups` is given.
        """
        if groups is not None:
            warn_user(
                f"The groups parameter is ignored by {type(self).__name__}. Leave it out.",
                SelectionWarning,
            )
        fold, outlying = self._folds(number_of_rows(X, "X"), y)
        for i in range(self.n_splits):
            yield np.flatnonzero((fold != i) & ~outlying), np.flatnonzero(fold == i)

    def _folds(self, n_rows: int, y: ArrayLike | None) -> tuple[Indices, NDArray[np.bool_]]:
        """The fold that tests each row, and which rows are OOD."""
        options = {
            "shuffle": bool(self.shuffle),
            "random_state": random_generator(self.random_state) if self.shuffle else None,
        }
        plain = KFold(self.n_splits, **options)
        if y is None:
            self._check_unlabelled(n_rows)
            return _fold_of_each(plain, np.zeros(n_rows)), np.zeros(n_rows, dtype=bool)
        labels = as_labels(y, n_rows)
        outlying = is_outlier(labels, self.ood_label)
        self._check_outliers(labels, outlying)
        self._check_classes(labels[~outlying])
        stratified = StratifiedKFold(self.n_splits, **options)
        fold = np.empty(n_rows, dtype=np.intp)
        with warnings.catch_warnings():
            # Classes with fewer rows than folds do no harm: see the notes.
            warnings.filterwarnings("ignore", "The least populated class")
            fold[~outlying] = _fold_of_each(stratified, labels[~outlying])
        if outlying.any():
            fold[outlying] = _fold_of_each(plain, labels[outlying])
        return fold, outlying

    def _check_unlabelled(self, n_rows: int) -> None:
        if self.ood_label is not None:
            raise ValueError(
                f"split got y=None, so no row can carry ood_label={self.ood_label!r}. Pass y, one "
                "label per row, or ood_label=None if all rows are in-distribution."
            )
        self._check_enough(n_rows, "in-distribution")

    def _check_outliers(self, labels: NDArray[Any], outlying: NDArray[np.bool_]) -> None:
        if self.ood_label is None:
            return
        if not outlying.any():
            raise ValueError(
                f"No row of y carries ood_label={self.ood_label!r}; y holds labels such as "
                f"{quoted(np.unique(labels).tolist())}. Pass the label of the out-of-distribution "
                "rows, or ood_label=None if there are none."
            )
        self._check_enough(int(outlying.sum()), "out-of-distribution")

    def _check_classes(self, labels: NDArray[Any]) -> None:
        self._check_enough(len(labels), "in-distribution")
        classes, counts = np.unique(labels, return_counts=True)
        if counts.min() < 2:
            raise ValueError(
                f"The labels {quoted(classes[counts < 2].tolist())} have a single row each, too "
                "few to both train and test on. Leave these rows out, or give them the label of a "
                "larger class."
            )
        if counts.max() < self.n_splits:
            raise ValueError(
                f"n_splits={self.n_splits} folds cannot be stratified: no class of y has more than "
                f"{counts.max()} rows. Pass n_splits={counts.max()} or less."
            )

    def _check_enough(self, n_rows: int, kind: str) -> None:
        if n_rows < self.n_splits:
            raise ValueError(
                f"n_splits={self.n_splits} folds need at least as many {kind} rows, and there are "
                f"{n_rows}. Pass more rows, or a smaller n_splits."
            )


def _fold_of_each(splitter: BaseCrossValidator, labels: NDArray[Any]) -> Indices:
    """The test fold of each row."""
    fold = np.empty(len(labels), dtype=np.intp)
    for i, (_, test) in enumerate(splitter.split(labels, labels)):
        fold[test] = i
    return fold
