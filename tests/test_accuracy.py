from __future__ import annotations

import warnings

import numpy as np
import pytest

from skood.accuracy import seen_before, warn_if_accuracy_dropped, warn_if_near_chance
from skood.exceptions import AccuracyDropWarning, NearChanceWarning, ThresholdWarning


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


# Seen before


@pytest.mark.parametrize(("n_correct", "warns"), [(1000, True), (990, True), (989, False)])
def test_implausible_accuracy_is_99_per_cent(n_correct, warns):
    targets = np.zeros(1000, dtype=np.int64)
    doubt = seen_before(targets, with_correct(1000, n_correct))
    assert (doubt is not None) == warns
    if warns:
        assert type(doubt) is ThresholdWarning
        assert f"{n_correct / 10:.1f}% of its 1000 calibration rows" in str(doubt)
        assert "calibrate(X_fresh)" in str(doubt)


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
