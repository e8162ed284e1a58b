from __future__ import annotations

import warnings

import numpy as np
import pytest

from skood.accuracy import (
    first_of_each_class,
    warn_if_accuracy_dropped,
    warn_if_labels_doubtful,
    warn_if_near_chance,
    warn_if_seen_before,
    warn_if_tied,
)
from skood.exceptions import (
    AccuracyDropWarning,
    LabelOrderWarning,
    NearChanceWarning,
    ThresholdWarning,
    TiedScoresWarning,
)


def with_correct(n_rows, n_correct, first=0):
    """Predictions of class 0 for targets 0, of which `n_correct` are right."""
    predictions = np.ones(n_rows, dtype=np.int64)
    predictions[first : first + n_correct] = 0
    return predictions


def warned(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    assert len(caught) <= 1
    category = {
        warn_if_near_chance: NearChanceWarning,
        warn_if_accuracy_dropped: AccuracyDropWarning,
        warn_if_seen_before: ThresholdWarning,
    }[function]
    assert all(warning.category is category for warning in caught)
    return str(caught[0].message) if caught else None


# Near chance


def predictions_of_kappa(kappa, n_rows=4000):
    """Two balanced classes, and balanced predictions: kappa is 2 accuracy - 1."""
    targets = np.arange(n_rows) % 2
    n_wrong = round((1 - kappa) / 2 * n_rows / 2)
    predictions = targets.copy()
    for label in (0, 1):
        predictions[np.flatnonzero(targets == label)[:n_wrong]] = 1 - label
    return targets, predictions


@pytest.mark.parametrize(("kappa", "warns"), [(0.09, True), (0.0, True), (0.11, False)])
def test_chance_is_judged_by_agreement_beyond_it(kappa, warns):
    assert bool(warned(warn_if_near_chance, *predictions_of_kappa(kappa))) == warns


def test_the_majority_class_alone_is_chance_however_accurate():
    targets = np.array([0] * 95 + [1] * 5)
    message = warned(warn_if_near_chance, targets, np.zeros(100, dtype=np.int64))
    assert "classifies 95.0% of 100 held-out rows" in message
    assert "kappa 0.00" in message


def test_permuted_labels_are_chance_and_the_message_names_the_causes():
    targets = np.arange(300) % 3
    message = warned(warn_if_near_chance, targets, (targets + 1) % 3)
    assert "classifies 0.0%" in message
    for cause in ("another order", "preprocess=", "pretrain_epochs="):
        assert cause in message


@pytest.mark.parametrize("targets", [[0, 0, 0], [0, 1, 2]])
def test_full_agreement_is_never_chance(targets):
    targets = np.array(targets)
    assert warned(warn_if_near_chance, targets, targets.copy()) is None


# The order of the labels


def predictions_of(true, accuracy, *, n_classes, seed=0):
    """Predictions right on about a share of the rows, else any."""
    random = np.random.RandomState(seed)
    is_right = random.random_sample(len(true)) < accuracy
    return np.where(is_right, true, random.randint(n_classes, size=len(true)))


def order_warning(labels, predictions, classes):
    """The message about the order of labels, if it is what is warned of; else None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_labels_doubtful(labels, predictions, classes, (labels, predictions))
    assert len(caught) <= 1
    found = [str(w.message) for w in caught if w.category is LabelOrderWarning]
    return found[0] if found else None


def swapped(n_classes):
    return np.r_[1, 0, 2:n_classes]


def reversed_order(n_classes):
    return np.arange(n_classes)[::-1]


def as_words(n_classes):
    """Where each of the numbers from 0 lies among them as words: 10 before 2."""
    return np.argsort(np.argsort(np.arange(n_classes).astype(str)))


@pytest.mark.parametrize(
    ("order", "n_classes", "n_rows", "accuracy"),
    [
        (swapped, 2, 20, 0.9),
        (swapped, 10, 5, 0.97),
        (swapped, 100, 20, 0.7),
        (swapped, 100, 5, 1.0),
        (reversed_order, 10, 20, 0.4),
        (reversed_order, 100, 5, 0.7),
        (as_words, 12, 20, 0.8),
        (as_words, 1000, 3, 0.8),
    ],
)
def test_labels_in_another_order_are_found(order, n_classes, n_rows, accuracy):
    true = np.repeat(np.arange(n_classes), n_rows)
    predictions = predictions_of(true, accuracy, n_classes=n_classes)
    message = order_warning(order(n_classes)[true], predictions, np.arange(n_classes))
    assert len(message) <= 400
    assert "names.index(label) for label in y" in message


@pytest.mark.parametrize("accuracy", [0.0, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize(
    ("n_classes", "n_rows"), [(3, 20), (10, 20), (100, 2), (100, 20), (500, 3)]
)
def test_a_network_that_is_merely_bad_is_no_matter_of_order(n_classes, n_rows, accuracy):
    true = np.repeat(np.arange(n_classes), n_rows)
    for seed in range(3):
        predictions = predictions_of(true, accuracy, n_classes=n_classes, seed=seed)
        assert order_warning(true, predictions, np.arange(n_classes)) is None


def test_classes_that_a_network_confuses_are_no_matter_of_order():
    true = np.repeat(np.arange(4), 20)
    confused = np.where(true < 2, np.arange(80) // 2 % 2, true)
    all_as_one = np.where(true < 2, 0, true)
    for predictions in (confused, all_as_one, np.zeros(80, dtype=int)):
        assert order_warning(true, predictions, np.arange(4)) is None


def test_labels_that_lack_a_class_may_be_one_off():
    true = np.repeat(np.arange(5), 20)
    message = order_warning(true + 1, true, np.arange(10))
    assert "0 where y says 1" in message


def test_rare_classes_in_their_places_do_not_hide_two_that_are_not():
    true = np.r_[np.repeat(np.arange(2), 20), np.arange(2, 60)]
    message = order_warning(swapped(60)[true], true, np.arange(60))
    assert "1 where y says 0, 0 where y says 1. It" in message
    assert "on 59% of 98 rows; in its own order, on 100%" in message


def test_long_names_are_cut():
    classes = np.array([f"{letter}{'x' * 200}" for letter in "abcdefgh"])
    true = np.repeat(np.arange(8), 20)
    assert len(order_warning(reversed_order(8)[true], true, classes)) <= 400


def test_as_many_rows_of_each_class_are_taken():
    labels = np.array([2, 2, 0, 2, 0, 1])
    assert first_of_each_class(labels, 1).tolist() == [0, 2, 5]
    assert first_of_each_class(labels, 9).tolist() == list(range(6))


# Seen before


@pytest.mark.parametrize(("n_correct", "warns"), [(1000, True), (990, True), (989, False)])
def test_implausible_accuracy_is_99_per_cent(n_correct, warns):
    targets = np.zeros(1000, dtype=np.int64)
    message = warned(warn_if_seen_before, targets, with_correct(1000, n_correct))
    assert (message is not None) == warns
    if warns:
        assert f"{n_correct / 10:.1f}% of its 1000 calibration rows" in message
        assert "calibrate(X_fresh)" in message


# Drop


@pytest.mark.parametrize(
    ("n_rows", "lost", "gained", "warns"),
    [
        # Every change a loss: the drop is d, its paired variance d (1 - d) n / (n - 1).
        (10_000, 101, 0, True),  # 1.01 points, standard error 0.10
        (10_000, 100, 0, False),  # a point is tolerated
        (300, 5, 0, True),  # 1.67 points, standard error 0.74
        (10, 3, 0, False),  # 30 points, standard error 15.3
        (8, 3, 0, True),  # 37.5 points, standard error 18.3
        (200, 3, 0, False),  # 1.5 points, standard error 0.86
        # Changes both ways widen the error: variance (lost + gained) / n - drop^2.
        (1000, 59, 40, False),  # 1.9 points, standard error 0.99
        (1000, 65, 40, True),  # 2.5 points, standard error 1.02
        (1000, 0, 500, False),
    ],
)
def test_drop_must_exceed_a_point_and_twice_its_paired_error(n_rows, lost, gained, warns):
    targets = np.zeros(n_rows, dtype=np.int64)
    before = with_correct(n_rows, n_rows - gained)
    after = with_correct(n_rows, n_rows - lost, first=lost)
    assert bool(warned(warn_if_accuracy_dropped, targets, before, after, 0.02)) == warns


def test_drop_names_its_size_and_the_parameters_to_lower():
    targets = np.zeros(400, dtype=np.int64)
    before, after = with_correct(400, 400), with_correct(400, 360)
    message = warned(warn_if_accuracy_dropped, targets, before, after, 0.3)
    assert "from 100.0% to 90.0%" in message
    assert "drop of 10.0 points, standard error 1.5" in message
    assert "Lower sparsity_weight (now 0.3), learning_rate or max_epochs" in message


def test_a_single_row_has_no_error_and_does_not_warn():
    targets = np.array([0])
    assert warned(warn_if_accuracy_dropped, targets, targets, np.array([1]), 0.02) is None


def test_one_error_among_rows_of_nearly_one_class_is_no_chance():
    targets = np.array([0] * 38 + [1])
    assert not warned(warn_if_near_chance, targets, np.zeros(39, dtype=np.int64))
    assert not warned(warn_if_near_chance, np.zeros(39, dtype=np.int64), targets)


# Ties


@pytest.mark.parametrize(
    ("scores", "warns"),
    [
        (np.zeros(2), True),
        (np.zeros(100), True),
        (np.r_[np.ones(51), np.arange(49) / 49], True),  # saturated
        (np.r_[np.ones(49), np.arange(51) / 51], False),
        (np.repeat(np.arange(9), 20), True),
        (np.r_[np.zeros(11), np.arange(1, 90)], True),  # at the threshold
        (np.r_[np.zeros(10), np.arange(1, 91)], False),
        (np.r_[np.zeros(3), np.ones(1)], False),  # as few rows may be the same
        (np.arange(20), False),
        (np.zeros(1), False),
    ],
)
def test_ties_are_told_if_the_threshold_tells_little_apart(scores, warns):
    scores = scores.astype(float)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_tied(scores, float(np.sort(scores)[max(len(scores) // 20 - 1, 0)]))
    assert [w.category for w in caught] == [TiedScoresWarning] * warns


def test_a_warning_of_ties_names_the_score_and_what_the_threshold_keeps():
    with pytest.warns(TiedScoresWarning, match=r"^60 of 100 .* same, 0\.999, .* keeps 95%") as told:
        warn_if_tied(np.r_[np.full(60, 0.999), np.arange(40) / 100], 0.05)
    assert len(str(told[0].message)) <= 400


@pytest.mark.parametrize("n_classes", [3, 10])
def test_a_row_of_each_class_suggests_no_other_order(n_classes):
    targets = np.arange(n_classes)
    predictions = np.roll(targets, 1)
    with pytest.warns(NearChanceWarning):
        warn_if_labels_doubtful(targets, predictions, targets, (targets, predictions))
