from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.plotting import RejectionConfusionDisplay

TRUE = np.array([0, 0, 0, 1, 1, 2, -1, -1])
ANSWERS = np.array([0, 1, -1, 1, 1, 2, -1, 0])


def drawn(display):
    """Numbers on the picture, by row and column."""
    return {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in display.ax_.texts
    }


def test_counts_answers_and_rejections():
    display = RejectionConfusionDisplay.from_predictions(TRUE, ANSWERS)
    expected = [[1, 1, 0, 1], [0, 2, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    assert display.confusion_matrix.tolist() == expected
    assert display.labels.tolist() == [0, 1, 2]
    ax = display.ax_
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2", "rejected"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2", "outliers"]
    assert drawn(display) == {
        (row, column): str(count)
        for row, counts in enumerate(expected)
        for column, count in enumerate(counts)
        if count
    }
    colours = ax.images[0].get_array()
    np.testing.assert_allclose(colours.sum(axis=1), 1)
    plt.close("all")


def test_without_outliers_there_is_no_row_for_them():
    display = RejectionConfusionDisplay.from_predictions(TRUE[:6], ANSWERS[:6])
    assert display.confusion_matrix.shape == (3, 4)
    strings = RejectionConfusionDisplay.from_predictions(
        ["cat", "dog"], ["dog", "none"], reject_label="none"
    )
    assert strings.confusion_matrix.tolist() == [[0, 1, 0], [0, 0, 1]]
    plt.close("all")


def test_draws_a_classifier_and_a_pipeline(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = RejectingClassifier(detector).fit(digits.X, digits.y)
        display = RejectionConfusionDisplay.from_estimator(classifier, digits.X_test, digits.y_test)
        piped = make_pipeline(FunctionTransformer(), RejectingClassifier(detector))
        piped.fit(digits.X, digits.y)
        same = RejectionConfusionDisplay.from_estimator(piped, digits.X_test, digits.y_test)
    assert np.array_equal(same.confusion_matrix, display.confusion_matrix)
    answers = classifier.predict(digits.X_test)
    assert display.confusion_matrix.shape == (10, 11)
    assert display.confusion_matrix[:, -1].sum() == (answers == -1).sum()
    assert np.trace(display.confusion_matrix) == (answers == digits.y_test).sum()
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([-1, -1], [0, -1]), ValueError, "no class beside reject_label=-1; pass rows"),
        (([0, 1], [0]), ValueError, "y_pred has 1 answers for 2 rows"),
        (([0, 1], [0.5, 1]), ValueError, "y_pred does not hold labels"),
    ],
)
def test_refuses_what_is_no_answer(arguments, error, message):
    with pytest.raises(error, match=message):
        RejectionConfusionDisplay.from_predictions(*arguments)


def test_refuses_what_does_not_reject(fitted, digits):
    with pytest.raises(TypeError, match="has no reject_label; expected a fitted Rejecting"):
        RejectionConfusionDisplay.from_estimator(fitted, digits.X_test, digits.y_test)
