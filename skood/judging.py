"""What a fitted detector says of rows in one pass, and shares of rows with their intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from .detector import SparseEnergyOODDetector
from .exchangeability import proportion_interval
from .model_selection.steps import last_step, seen_by_last_step
from .notices import quoted
from .rejection import RejectingClassifier

__all__ = ["Judgement", "Share", "fitted_detector", "judged", "known_labels", "shares_by_class"]


class Judgement(NamedTuple):
    """What a detector says of rows."""

    scores: NDArray[np.float64]
    margins: NDArray[np.float64]
    """Score minus the threshold, which may be that of the predicted class."""
    classes: NDArray[Any]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether each row is kept."""
        return self.margins >= 0


class Share(NamedTuple):
    """A number of rows of which some are counted."""

    n_counted: int
    n_rows: int

    @property
    def value(self) -> float:
        """The share."""
        return self.n_counted / self.n_rows

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of Clopper and Pearson, of 95 %, for the share among all such rows."""
        return proportion_interval(self.n_counted, self.n_rows)

    @classmethod
    def of(cls, counted: NDArray[np.bool_]) -> Share:
        """The share of rows that are True."""
        return cls(int(np.count_nonzero(counted)), len(counted))


def shares_by_class(labels: NDArray[Any], counted: NDArray[np.bool_]) -> dict[Any, Share]:
    """The share of each class that occurs, in the order of the labels."""
    return {label: Share.of(counted[labels == label]) for label in np.unique(labels).tolist()}


def fitted_detector(estimator: Any, name: str) -> SparseEnergyOODDetector:
    """The fitted detector in what was built around it, which the user calls `name`."""
    step = last_step(estimator)
    if isinstance(step, RejectingClassifier):
        check_is_fitted(step)
        step = last_step(step.detector_)
    if not isinstance(step, SparseEnergyOODDetector):
        raise TypeError(
            f"{name}={quoted(estimator)} holds no detector; expected a fitted "
            "SparseEnergyOODDetector, or a fitted pipeline or search that ends in one."
        )
    check_is_fitted(step)
    return step


def judged(estimator: Any, X: Any) -> Judgement:
    """What the detector in an estimator says of rows."""
    detector = fitted_detector(estimator, "estimator")
    rows = detector._rows(seen_by_last_step(estimator, X))
    scores, margins, winners = detector._judged(rows)
    return Judgement(scores, margins, detector.classes_[winners])


def known_labels(
    labels: NDArray[Any], detector: SparseEnergyOODDetector, name: str, *, outliers: bool
) -> NDArray[np.bool_]:
    """Which labels are classes of the detector: at least one, and without outliers all of them.

    A ValueError names those that are not, and calls the labels as the user does.
    """
    known = np.isin(labels, detector.classes_)
    if not (known.any() if outliers else known.all()):
        raise ValueError(
            f"{name} holds the labels {quoted(np.unique(labels[~known]).tolist())}, which are none "
            f"of the classes {quoted(detector.classes_.tolist())}. Pass the true class of each "
            f"row{'' if outliers else ', and outliers apart, as X_ood'}."
        )
    return known
