"""Which classes are taken for which, and which are rejected."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix
from sklearn.utils._param_validation import validate_parameter_constraints

from ..labels import labels_named
from ..model_selection.steps import last_step
from ..notices import quoted
from ..validation import number_of_rows
from .shared import Display, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RejectionConfusionDisplay"]

REJECTED, OUTLIERS = "rejected", "outliers"
PALE = 0.5
"""Share up to which a cell is pale enough for black numbers."""


class RejectionConfusionDisplay(Display):
    """Confusion matrix of a classifier that rejects: the last column is what it rejected.

    Make it with `from_estimator` or `from_predictions`. Rows are the true classes, and below them
    the outliers, if y labels any with the label of rejection. Columns are the answers. A cell says
    how many rows got the answer; its colour is their share of the rows of the true class.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        True classes; outliers carry `reject_label`.
    y_pred : array-like of shape (n,)
        Answers, classes or `reject_label`.
    reject_label : int or str, default=-1
        Label of rejection.

    Attributes
    ----------
    confusion_matrix : ndarray of shape (K or K + 1, K + 1), int
        Number of rows of each true class, and of outliers if there are any, with each answer.
    labels : ndarray of shape (K,)
        The classes.
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If labels are of different numbers or kinds, or there is no row of any class.

    Examples
    --------
    >>> from skood.plotting import RejectionConfusionDisplay
    >>> y_true, y_pred = ["cat", "cat", "dog", "?"], ["cat", "?", "dog", "dog"]
    >>> display = RejectionConfusionDisplay.from_predictions(y_true, y_pred, reject_label="?")
    >>> display.confusion_matrix
    array([[1, 0, 1],
           [0, 1, 0],
           [0, 1, 0]])
    """

    def __init__(
        self, *, y_true: ArrayLike, y_pred: ArrayLike, reject_label: int | str = -1
    ) -> None:
        validate_parameter_constraints(
            {"reject_label": [Integral, str]},
            {"reject_label": reject_label},
            caller_name=type(self).__name__,
        )
        true, predicted = (
            labels_named(labels, name, number_of_rows(labels, name))
            for labels, name in ((y_true, "y_true"), (y_pred, "y_pred"))
        )
        if len(true) != len(predicted):
            raise ValueError(
                f"y_pred has {len(predicted)} answers for {len(true)} rows of y_true; pass one a "
                "row."
            )
        everything = np.unique(np.concatenate([true, predicted]))
        classes = everything[everything != reject_label]
        if len(classes) == 0 or not (true != reject_label).any():
            raise ValueError(
                f"y_true holds {quoted(np.unique(true).tolist())}, no class beside reject_label="
                f"{quoted(reject_label)}; pass rows of some classes, or another reject_label."
            )
        numbers = {label: i for i, label in enumerate([*classes.tolist(), reject_label])}
        counts = confusion_matrix(
            [numbers[label] for label in true.tolist()],
            [numbers[label] for label in predicted.tolist()],
            labels=np.arange(len(numbers)),
        )
        self.labels: NDArray[Any] = classes
        self.confusion_matrix: NDArray[np.int64] = counts if counts[-1].any() else counts[:-1]

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: ArrayLike, *, ax: Axes | None = None
    ) -> Self:
        """Classify rows with a fitted `RejectingClassifier`, and draw.

        Parameters
        ----------
        estimator : RejectingClassifier
            The classifier, fitted; or a pipeline or a search around one.
        X : array-like of shape (n, ...)
            Rows that it was not trained on.
        y : array-like of shape (n,)
            True classes; outliers carry its ``reject_label``.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        RejectionConfusionDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` has no ``reject_label``.
        """
        classifier = last_step(estimator)
        if not hasattr(classifier, "reject_label"):
            raise TypeError(
                f"estimator={quoted(estimator)} has no reject_label; expected a fitted "
                "RejectingClassifier. If you have answers, draw them with from_predictions."
            )
        label = classifier.reject_label
        return cls.from_predictions(y, estimator.predict(X), reject_label=label, ax=ax)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        *,
        reject_label: int | str = -1,
        ax: Axes | None = None,
    ) -> Self:
        """Draw answers.

        Parameters
        ----------
        y_true : array-like of shape (n,)
            True classes; outliers carry `reject_label`.
        y_pred : array-like of shape (n,)
            Answers, classes or `reject_label`.
        reject_label : int or str, default=-1
            Label of rejection.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        RejectionConfusionDisplay
            The display, drawn.
        """
        return cls(y_true=y_true, y_pred=y_pred, reject_label=reject_label).plot(ax)

    def _draw(self, ax: Axes) -> None:
        counts = self.confusion_matrix
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(counts):
            colour = "black" if shares[row, column] <= PALE else "white"
            if count:
                ax.text(column, row, f"{count}", ha="center", va="center", color=colour)
        names = [plain(label) for label in self.labels.tolist()]
        rows = [*names, OUTLIERS][: len(counts)]
        ax.set_xticks(range(len(names) + 1), [*names, REJECTED], rotation=45, ha="right")
        ax.set_yticks(range(len(rows)), rows)
        ax.set(xlabel="answer", ylabel="truth")
        ax.axvline(len(names) - 0.5, color="black", linewidth=1)
        if len(rows) > len(names):
            ax.axhline(len(names) - 0.5, color="black", linewidth=1)
        ax.figure.colorbar(image, ax=ax, label="share of the row")

    def _size(self) -> tuple[float, float] | None:
        side = 2.5 + 0.45 * (len(self.labels) + 1)
        return side + 1, side
