"""The detector as a classifier that may decline to answer."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.exceptions import DataConversionWarning
from sklearn.utils import Tags, get_tags
from sklearn.utils._param_validation import HasMethods, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from .detector import SparseEnergyOODDetector
from .exceptions import LostRejectionWarning
from .labels import as_labels, is_outlier
from .notices import is_called_from, quoted, warn_user
from .rows import as_rows

__all__ = ["RejectingClassifier"]

WITHOUT_REJECTION = (
    "sklearn.calibration",
    "sklearn.ensemble",
    "sklearn.model_selection._classification_threshold",
    "sklearn.multiclass",
    "sklearn.multioutput",
)
"""Modules whose estimators combine classifiers by their probabilities, or count their labels."""


class _Classifying(HasMethods):
    """What a detector must offer, with a hint for users who nest the other way round."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()}, such as SparseEnergyOODDetector (a Pipeline or a search goes "
            "around RejectingClassifier, not inside it)"
        )


class RejectingClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """Classifier that gives rows unlike the training data a label of their own.

    Put a `Pipeline` or a search around it, as around any scikit-learn classifier.

    Parameters
    ----------
    detector : SparseEnergyOODDetector
        What classifies and rejects. `fit` fits a clone of it. To use a detector that is fitted and
        calibrated already, wrap it: ``FrozenEstimator(detector)`` from `sklearn.frozen`.
    reject_label : int or str, default=-1
        Answer for rows that the detector rejects. It must not be one of the classes, and must have
        their type: an int such as -1 if they are integers, a str such as "rejected" if they are
        strings.

    Attributes
    ----------
    detector_ : SparseEnergyOODDetector
        The fitted detector. ``detector_.calibrate(X_fresh)`` moves its threshold.
    classes_ : ndarray of shape (K,)
        Labels of the classes, without `reject_label` and the detector's ``ood_label``.
    n_features_in_ : int
        Number of columns, for X of two dimensions.
    feature_names_in_ : ndarray of str
        Names of the columns, if all are strings.

    Notes
    -----
    If y labels outliers with `reject_label`, a right rejection counts as a right answer, in `score`
    and in cross-validation. A rejected row of a class counts as an error. Give the detector the
    same label as ``ood_label``, so that `fit` does not take it for a class. `predict_proba` ignores
    rejection, so scorers that use it need rows of the classes only. So do ensembles of scikit-learn
    and `CalibratedClassifierCV`: `fit` warns if it is called by one. A `Pipeline`, a search and
    cross-validation by `predict` keep the rejection.

    Examples
    --------
    Outliers in y and rejected rows are both -1. Here digits below 8 are classes, the 8 is an
    outlier known at training, and the 9 appears in the test rows alone.

    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from skood import RejectingClassifier, SparseEnergyOODDetector
    >>> X, digits = load_digits(return_X_y=True)
    >>> y = np.where(digits < 8, digits, -1)
    >>> train = (np.arange(len(X)) < 1200) & (digits < 9)
    >>> X_test, y_test = X[1200:], y[1200:]
    >>> detector = SparseEnergyOODDetector(ood_label=-1, random_state=0)
    >>> classifier = RejectingClassifier(detector, reject_label=-1).fit(X[train], y[train])
    >>> classifier.classes_
    array([0, 1, 2, 3, 4, 5, 6, 7])
    >>> right = classifier.predict(X_test) == y_test
    >>> bool(right[y_test == -1].any())
    True
    >>> bool(classifier.score(X_test, y_test) == right.mean())
    True

    For deployment, a detector that is fitted and calibrated already:

    >>> from sklearn.frozen import FrozenEstimator
    >>> detector = classifier.detector_.calibrate(X_test[y_test >= 0])
    >>> frozen = RejectingClassifier(FrozenEstimator(detector)).fit(X[train], y[train])
    >>> bool((frozen.predict(X_test[y_test >= 0]) >= 0).mean() > 0.9)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "detector": [_Classifying(["predict_class", "predict_class_proba"])],
        "reject_label": [Integral, str],
    }

    def __init__(self, detector: SparseEnergyOODDetector, *, reject_label: int | str = -1) -> None:
        self.detector = detector
        self.reject_label = reject_label

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit a clone of the detector.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows as `detector` takes them.
        y : array-like of shape (n,)
            Labels of at least two classes; rows labelled with the detector's ``ood_label`` are
            known outliers.

        Returns
        -------
        self : RejectingClassifier
            The fitted classifier. If fit fails, the classifier stays as it was.

        Raises
        ------
        ValueError
            If a parameter, X or y cannot be used; if `reject_label` is one of the classes or has
            another type; or if a frozen detector does not know a label of y.

        Warns
        -----
        LostRejectionWarning
            If it is fitted inside an ensemble of scikit-learn, such as `VotingClassifier`, or
            inside `CalibratedClassifierCV`, `OneVsRestClassifier` or `FixedThresholdClassifier`.
        """
        self._validate_params()
        loses_rejection = self._warn_if_rejection_is_lost()
        detector = clone(self.detector)
        rows = as_rows(X, detector.preprocess)
        labels = self._check_labels(y, len(rows))
        classes = np.unique(labels[~is_outlier(labels, detector.ood_label)])
        # Once before training, to fail early; a given module may bring further classes.
        self._check_reject_label(classes)
        if len(classes) < 2:  # of which the detector would make clusters
            raise ValueError(
                f"y holds {len(classes)} class(es), {classes.tolist()}, where rows labelled "
                f"ood_label={detector.ood_label!r} do not count; pass rows of at least 2, or use "
                "the detector alone."
            )
        detector.fit(X, labels)
        self._check_reject_label(detector.classes_)
        unknown = np.setdiff1d(classes, detector.classes_)
        if len(unknown) > 0:
            raise ValueError(
                f"y holds the labels {quoted(unknown.tolist())}, which the fitted detector does "
                f"not have; expected {quoted(detector.classes_.tolist())} and perhaps "
                f"ood_label={detector.ood_label!r}. Pass the labels that the detector was fitted "
                "on, or a detector that is not frozen."
            )
        self.detector_, self._told_of_loss = detector, loses_rejection
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Class of each row, or `reject_label` if the row is out-of-distribution.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,)
            Labels.

        Raises
        ------
        ValueError
            If `reject_label` was set to something that is no label since fit.

        Warns
        -----
        ThresholdWarning
            If the threshold of the detector's `fit` is doubtful, at its first use;
            ``detector_.calibrate(X_fresh)`` clears that.
        """
        check_is_fitted(self)
        self._validate_params()  # as reject_label may have been set since
        return self.detector_.predict_class(X, reject_label=self.reject_label)

    def predict_proba(self, X: Any, *, rejection: bool = False) -> NDArray[np.float64]:
        """Probabilities of the classes, as if no row were rejected.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        rejection : bool, default=False
            Whether to add a last column for rejection: 1 for rows that `predict` rejects, whose
            classes are then all at 0, and 0 for the others.

        Returns
        -------
        ndarray of shape (n, K) or (n, K + 1), float64
            Probabilities in the order of `classes_`, and perhaps of rejection; each row sums to 1.

        Warns
        -----
        LostRejectionWarning
            If such an estimator, to which it was given fitted, calls it.
        """
        check_is_fitted(self)
        validate_parameter_constraints(
            {"rejection": ["boolean"]}, {"rejection": rejection}, caller_name="predict_proba"
        )
        if not self._told_of_loss:
            self._warn_if_rejection_is_lost()
        if not rejection:
            return self.detector_.predict_class_proba(X)
        probabilities, kept = self.detector_._class_proba_and_kept(X)
        rejected = ~kept
        return np.column_stack([np.where(rejected[:, None], 0, probabilities), rejected])

    @property
    def classes_(self) -> NDArray[Any]:
        """Labels of the classes."""
        return self.detector_.classes_

    @property
    def n_features_in_(self) -> int:
        """Number of columns."""
        return self.detector_.n_features_in_

    @property
    def feature_names_in_(self) -> NDArray[np.object_]:
        """Names of the columns."""
        return self.detector_.feature_names_in_

    def _warn_if_rejection_is_lost(self) -> bool:
        """Warn if an estimator calls that does not reject; whether one does."""
        lost = is_called_from(*WITHOUT_REJECTION)
        if lost:
            warn_user(
                "The estimator around RejectingClassifier does not reject: it combines "
                "probabilities, which know no rejection, or counts labels, and hard voting fails "
                "on reject_label. Reject outside of it, with a SparseEnergyOODDetector fitted on "
                "the same rows: np.where(detector.predict(X) == 1, ensemble.predict(X), "
                f"{quoted(self.reject_label)}).",
                LostRejectionWarning,
            )
        return lost

    def _check_labels(self, y: ArrayLike, n_rows: int) -> NDArray[Any]:
        if y is None:
            raise ValueError(
                "RejectingClassifier requires y to be passed, but the target y is None. Pass one "
                "label a row, also for a data set. Without labels, use the detector alone."
            )
        if getattr(y, "ndim", 1) > 1:
            warn_user(
                "A column-vector y was passed when a 1d array was expected. Pass y.ravel().",
                DataConversionWarning,
            )
        return as_labels(y, n_rows)

    def _check_reject_label(self, classes: NDArray[Any]) -> None:
        label = self.reject_label
        try:
            taken = is_outlier(classes, label).any()
        except ValueError:  # of another kind
            raise ValueError(
                f"reject_label={quoted(label)} is of type {type(label).__name__}, but the classes "
                f"have dtype {classes.dtype}, so no metric can compare predictions with y. Pass a "
                'label of their kind: an int such as -1 beside integers, a str such as "rejected" '
                "beside strings; turn booleans into integers."
            ) from None
        if taken:
            raise ValueError(
                f"reject_label={quoted(label)} is one of the classes {quoted(classes.tolist())}; "
                "pass a label that no class has. If y gives it to known outliers, set the "
                f"detector's ood_label={quoted(label)}."
            )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags = get_tags(self.detector).input_tags
        return tags
