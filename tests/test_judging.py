from __future__ import annotations

import numpy as np
import pytest

from skood.judging import Judgement, Share, judged, known_labels, shares_by_class


def test_one_pass_says_what_the_detector_says(fitted, digits):
    found = judged(fitted, digits.X_test)
    np.testing.assert_array_equal(found.scores, fitted.score_samples(digits.X_test))
    np.testing.assert_array_equal(found.margins, fitted.decision_function(digits.X_test))
    np.testing.assert_array_equal(found.classes, fitted.predict_class(digits.X_test))
    np.testing.assert_array_equal(found.kept, fitted.predict(digits.X_test) == 1)


def test_shares_of_classes_are_in_the_order_of_the_labels():
    shares = shares_by_class(np.array(["b", "a", "b"]), np.array([True, False, False]))
    assert list(shares.items()) == [("a", Share(0, 1)), ("b", Share(1, 2))]
    assert shares["b"].value == 0.5
    low, high = shares["a"].interval
    # All tails of a coin that shows heads with chance p have chance 1 - p, here 2.5 %.
    assert (low, high) == (0, pytest.approx(0.975))


def test_rows_of_no_class_are_told_apart(fitted):
    labels = np.array([3, -1, 99])
    assert known_labels(labels, fitted, "y", outliers=True).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"^y holds the labels \[-1, 99\], which are none of"):
        known_labels(labels, fitted, "y", outliers=False)


def test_a_row_at_the_threshold_is_kept():
    kept = Judgement(np.zeros(3), np.array([0.1, 0.0, -0.1]), np.arange(3)).kept
    assert kept.tolist() == [True, True, False]
