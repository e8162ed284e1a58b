"""The detector as a user meets it: labels, thresholds, warnings, errors, methods."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import warnings
from multiprocessing import active_children

import numpy as np
import pandas as pd
import pytest
import torch
from contexts import default_dtype
from data_sets import Listed
from modules import WidthAgnostic, trained_mlp
from numpy.testing import assert_array_equal
from scipy.special import logsumexp, softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from skood import SparseEnergyOODDetector
from skood.calibration import place_threshold
from skood.engine import loading
from skood.exceptions import (
    AccuracyDropWarning,
    DivergenceError,
    FewCalibrationRowsWarning,
    LabelOrderWarning,
    MemoryEntryWarning,
    NearChanceWarning,
    SelectionWarning,
)
from skood.metrics import auroc
from skood.model_selection import make_ood_scorer, surrogate_outliers


def plain(module, **parameters):
    """The plain energy detector on a network: nothing is trained."""
    return SparseEnergyOODDetector(
        module, sparsity_weight=0, max_epochs=0, random_state=0, **parameters
    )


def quiet_fit(detector, X, y=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


def logits_of(module, X):
    with torch.no_grad():
        return module(torch.as_tensor(X, dtype=torch.float32)).double().numpy()


# What the methods give


def test_numbers_of_narrow_types_mean_what_they_say(digits):
    numbers = {"pretrain_epochs": 2, "max_epochs": 2, "batch_size": 100}
    scores = [
        quiet_fit(
            SparseEnergyOODDetector(module, random_state=0, **of_type), digits.X, digits.y
        ).score_samples(digits.X_test)
        for module in (None, digits.module)
        for of_type in (numbers, {name: np.int8(value) for name, value in numbers.items()})
    ]
    assert_array_equal(scores[0], scores[1])
    assert_array_equal(scores[2], scores[3])


def test_without_training_it_is_the_plain_energy_detector(digits):
    detector = quiet_fit(plain(digits.module), digits.X, digits.y)
    expected = logsumexp(logits_of(digits.module, digits.X_test), axis=1)
    scores = detector.score_samples(digits.X_test)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert detector.history_ == []
    assert detector.id_accuracy_["before"] == detector.id_accuracy_["after"]


def test_scores_are_the_energy_of_the_fine_tuned_network(fitted, digits):
    expected = logsumexp(logits_of(fitted.module_, digits.X_test), axis=1)
    np.testing.assert_allclose(fitted.score_samples(digits.X_test), expected, rtol=1e-6)


def test_decision_prediction_and_threshold_agree(fitted, digits):
    X = digits.X_test
    decision = fitted.decision_function(X)
    assert np.array_equal(decision, fitted.score_samples(X) - fitted.offset_)
    prediction = fitted.predict(X)
    assert np.array_equal(prediction, np.where(decision >= 0, 1, -1))
    assert prediction.dtype.kind == "i"
    assert set(prediction) == {-1, 1}


def test_rejected_exactly_where_the_p_value_is_at_most_one_minus_tpr(fitted, digits):
    for tpr in (0.5, 0.9, 0.95):
        detector = copy.deepcopy(fitted).calibrate(digits.X_fresh, tpr=tpr)
        for X in (digits.X_test, digits.X_fresh):  # the calibration rows tie with themselves
            p = detector.p_values(X)
            assert np.array_equal(detector.predict(X) == -1, p <= 1 - tpr)
            assert ((p > 0) & (p <= 1)).all()


@pytest.mark.parametrize("travel", ["here", "pickled", "saved", "wrapped"])
def test_accuracy_before_is_that_of_the_weights_given(digits, travel, tmp_path):
    module = copy.deepcopy(digits.module)
    detector = SparseEnergyOODDetector(module, max_epochs=1, random_state=0)
    quiet_fit(detector, digits.X, digits.y)
    expected = detector.id_accuracy(digits.X_fresh, digits.y_fresh)
    if travel == "pickled":
        detector = pickle.loads(pickle.dumps(detector))
    if travel == "saved":
        detector.save(tmp_path / "detector")
        detector = SparseEnergyOODDetector.load(tmp_path / "detector", module=module)
    if travel == "wrapped":
        detector.set_params(module=torch.compile(module))
    assert detector.id_accuracy(digits.X_fresh, digits.y_fresh) == expected
    next(detector.module.buffers()).add_(1)
    with pytest.raises(ValueError, match="not those that fit was given"):
        detector.id_accuracy(digits.X_fresh, digits.y_fresh)
    untrained = quiet_fit(plain(module), digits.X, digits.y)
    next(module.buffers()).add_(1)
    untrained.id_accuracy(digits.X_fresh, digits.y_fresh)


def test_classes_with_and_without_rejection(fitted, digits):
    X = digits.X_test
    winners = logits_of(fitted.module_, X).argmax(axis=1)
    assert np.array_equal(fitted.predict_class(X), winners)
    rejected = fitted.predict_class(X, reject_label=-1)
    assert np.array_equal(rejected, np.where(fitted.predict(X) == 1, winners, -1))
    worded = fitted.predict_class(X, reject_label="unknown")
    assert worded.dtype == object
    assert set(worded[fitted.predict(X) == -1]) == {"unknown"}
    with pytest.raises(ValueError, match=r"reject_label=3 is one of the classes"):
        fitted.predict_class(X, reject_label=3)


@pytest.mark.parametrize(
    ("dtype", "offset", "kind"),
    [(np.uint64, 2**60, object), (np.int64, 2**60, np.int64), (np.uint8, 200, np.int64)],
)
def test_labels_that_floats_would_round_stay_what_they_are(digits, dtype, offset, kind):
    y = digits.y.astype(dtype) + dtype(offset)
    detector = plain(digits.module).fit(digits.X, y).calibrate(digits.X_fresh)
    labels = detector.predict_class(digits.X_test, reject_label=-1)
    kept = detector.predict(digits.X_test) == 1
    assert labels.dtype == kind
    assert set(labels[~kept].tolist()) == {-1}
    assert labels[kept].tolist() == detector.predict_class(digits.X_test)[kept].tolist()


def test_probabilities_and_features(fitted, digits):
    X = digits.X_test
    logits = logits_of(fitted.module_, X)
    np.testing.assert_allclose(fitted.predict_class_proba(X), softmax(logits, axis=1), atol=1e-6)
    features = fitted.features(X)
    assert features.shape == (len(X), 64)
    head = fitted.module_.get_submodule(fitted.head_)
    np.testing.assert_allclose(logits_of(head, features), logits, rtol=1e-5, atol=1e-5)


def test_fine_tuning_makes_features_smaller(digits):
    sizes = {}
    for weight in (0.0, 10.0):
        detector = SparseEnergyOODDetector(digits.module, sparsity_weight=weight, random_state=0)
        quiet_fit(detector, digits.X, digits.y)
        sizes[weight] = np.abs(detector.features(digits.X_test)).sum(axis=1).mean()
    assert sizes[10.0] < 0.9 * sizes[0.0]


def test_the_default_asks_the_same_of_narrow_and_wide_networks():
    sizes = []
    for width in (16, 1024):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        X, y = load_digits(return_X_y=True)
        detector = SparseEnergyOODDetector(module, max_epochs=1, pretrain_epochs=5, random_state=0)
        quiet_fit(detector, X / 16, y)
        sizes.append(detector.history_[-1]["penalty"])
    # In units of the features before fine-tuning.
    assert all(0.7 < size < 1 for size in sizes)


@pytest.mark.parametrize("given", [True, False])
def test_a_relative_penalty_is_one_before_fine_tuning(digits, given):
    detector = SparseEnergyOODDetector(
        digits.module[:3] + digits.module[4:] if given else None,  # without its dropout
        penalty="relative_l1",
        learning_rate=1e-12,
        max_epochs=1,
        random_state=0,
    )
    quiet_fit(detector, digits.X, digits.y)
    assert detector.history_[-1]["penalty"] == pytest.approx(1, abs=0.05)


def test_features_that_are_all_zero_have_no_scale_which_matters_only_to_a_weight(digits):
    class Zeros(nn.Module):
        def forward(self, x):
            return 0 * x

    module = nn.Sequential(nn.Linear(64, 16), Zeros(), nn.Linear(16, 10))
    detector = SparseEnergyOODDetector(module, max_epochs=1, pretrain_epochs=0, random_state=0)
    with pytest.raises(ValueError, match="mean before fine-tuning is 0"):
        quiet_fit(detector, digits.X, digits.y)
    quiet_fit(detector.set_params(sparsity_weight=0), digits.X, digits.y)
    assert detector.history_[-1]["penalty"] == 0


def test_where_nothing_is_fine_tuned_calibration_rows_are_scored_once(digits, monkeypatch):
    monkeypatch.delattr("skood.fitting.winners_of")
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0)
    detector.fit(digits.X, digits.y)
    assert detector.id_accuracy_["before"] == detector.id_accuracy_["after"] > 0.9


def test_history_and_fitted_facts(fitted):
    assert [record["epoch"] for record in fitted.history_] == [1, 2]
    assert {record["phase"] for record in fitted.history_} == {"fine-tune"}
    expected = "loss cross_entropy penalty accuracy mean_l1 hoyer_index id_energy seconds"
    for name in expected.split():
        assert all(np.isfinite(record[name]) for record in fitted.history_)
    assert fitted.precision_ == {"training": "float32", "scoring": "float32"}
    assert fitted.device_ == torch.device("cpu")
    assert fitted.head_ == "6"
    assert fitted.tpr_ == 0.95
    assert 0.5 < fitted.id_accuracy_["after"] <= 1


def test_a_score_set_after_fit_waits_for_the_next_fit(fitted, digits):
    detector = copy.deepcopy(fitted).set_params(score_function="msp")
    scores = detector.score_samples(digits.X_test)
    assert np.array_equal(scores, fitted.score_samples(digits.X_test))


# Calibration


def test_the_threshold_is_the_calibration_score_of_its_rank(fitted, digits):
    scores = np.sort(fitted.score_samples(digits.X_fresh))
    assert np.array_equal(np.sort(fitted.calibration_scores_), scores)
    assert fitted.offset_ == scores[int(0.05 * 401) - 1]


def test_calibrate_moves_the_threshold_and_nothing_else(fitted, digits):
    detector = copy.deepcopy(fitted)
    before = detector.score_samples(digits.X_test)
    assert detector.calibrate(digits.X_fresh, tpr=0.5) is detector
    assert detector.offset_ > fitted.offset_
    assert detector.tpr_ == 0.5
    assert detector.tpr == 0.95
    assert np.array_equal(detector.score_samples(digits.X_test), before)
    for tpr in (0, 1, 1.5, "high"):
        with pytest.raises(ValueError, match="tpr"):
            detector.calibrate(digits.X_fresh, tpr=tpr)
    assert detector.tpr_ == 0.5


def test_fresh_rows_are_kept_as_promised_and_training_rows_break_the_promise(digits):
    """An overfitted network: a threshold from its own training rows keeps too few fresh ones."""
    random = np.random.RandomState(0)
    y = np.where(random.rand(len(digits.y)) < 0.3, random.randint(10, size=len(digits.y)), digits.y)
    module = trained_mlp(digits.X, y, epochs=150)
    fresh = np.concatenate([digits.X_fresh, digits.X_test])
    detector = quiet_fit(plain(module), digits.X, y)
    shares = []
    for _ in range(200):
        order = random.permutation(len(fresh))
        detector.calibrate(fresh[order[:99]])
        shares.append(np.mean(detector.predict(fresh[order[99:]]) == 1))
    promised = 1 - 5 / 100
    error = np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - promised) < 4 * error
    detector.calibrate(digits.X)
    assert np.mean(detector.predict(fresh) == 1) < promised - 4 * np.std(shares)


def test_calibration_rows_take_no_part_in_training(digits):
    """Changing the calibration rows changes no weight."""
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(detector, digits.X, digits.y)
    calibration = [
        row
        for row, score in enumerate(detector.score_samples(digits.X))
        if score in detector.calibration_scores_
    ]
    assert len(calibration) == 100
    X = digits.X.copy()
    X[calibration] = np.random.RandomState(0).rand(100, 64)
    other = quiet_fit(
        SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0), X, digits.y
    )
    assert not np.array_equal(other.calibration_scores_, detector.calibration_scores_)
    assert np.array_equal(other.score_samples(digits.X_test), detector.score_samples(digits.X_test))


# Labels


def test_a_fold_without_a_class_keeps_the_head_aligned(digits):
    rows = digits.y != 3
    detector = quiet_fit(plain(digits.module), digits.X[rows], digits.y[rows])
    assert detector.classes_.tolist() == list(range(10))
    assert detector.id_accuracy_["before"] > 0.9
    assert np.mean(detector.predict_class(digits.X_test) == digits.y_test) > 0.9


@pytest.mark.parametrize(
    "name",
    [
        lambda y: np.array(
            [
                ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][i]
                for i in y
            ]
        ),
        lambda y: 10 * y + 100,
        lambda y: y.astype(float),
        lambda y: y.astype(object),
        lambda y: torch.as_tensor(y),
        lambda y: y.astype(np.uint8)[:, None],
        lambda y: y.tolist(),
    ],
    ids=["strings", "integers", "floats", "objects", "tensor", "column", "list"],
)
def test_labels_of_other_kinds(digits, name):
    y, truth = name(digits.y), name(digits.y_test)
    # Words sort by the alphabet, which is not the order of the logits: a new network learns them.
    module = None if isinstance(y, np.ndarray) and y.dtype.kind == "U" else digits.module
    detector = SparseEnergyOODDetector(
        module, max_epochs=0, pretrain_epochs=10 if module is None else 0, random_state=0
    )
    quiet_fit(detector, digits.X, y)
    predicted = detector.predict_class(digits.X_test)
    assert np.mean(predicted == np.ravel(np.asarray(truth))) > 0.85


def test_boolean_labels(digits):
    y = digits.y >= 5
    detector = SparseEnergyOODDetector(pretrain_epochs=10, max_epochs=0, random_state=0)
    detector.fit(digits.X, y)
    assert detector.classes_.tolist() == [False, True]
    assert np.mean(detector.predict_class(digits.X_test) == (digits.y_test >= 5)) > 0.85
    assert detector.predict_class(digits.X_test, reject_label="neither").dtype == object


def test_labels_that_fit_no_logit_are_refused(digits):
    message = r"10 logits.* 5 distinct labels: \[100, 101, 102, 103, 104\]"
    with pytest.raises(ValueError, match=message):
        plain(digits.module).fit(digits.X, digits.y % 5 + 100)


def test_without_labels_a_network_labels_its_rows(digits):
    detector = quiet_fit(plain(digits.module), digits.X)
    assert detector.id_accuracy_ == {"before": 1.0, "after": 1.0}
    assert detector.classes_.tolist() == list(range(10))
    one_label = quiet_fit(plain(digits.module), digits.X, np.ones(len(digits.X)))
    assert np.array_equal(
        one_label.score_samples(digits.X_test), detector.score_samples(digits.X_test)
    )


def test_without_labels_or_a_network_clusters_stand_in(digits):
    detector = SparseEnergyOODDetector(random_state=0, pretrain_epochs=20, max_epochs=1)
    detector.fit(digits.X)
    assert len(detector.classes_) == 8
    noise = np.random.RandomState(0).rand(200, 64)
    assert auroc(detector.score_samples(digits.X_test), detector.score_samples(noise)) > 0.8


def test_known_outliers_are_not_trained_on(digits):
    noise = np.random.RandomState(0).rand(100, 64)
    X = np.concatenate([digits.X, noise])
    y = np.concatenate([digits.y, np.full(100, -1)])
    mixed = SparseEnergyOODDetector(digits.module, ood_label=-1, max_epochs=1, random_state=0)
    clean = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(mixed, X, y)
    quiet_fit(clean, digits.X, digits.y)
    test = digits.X_test
    assert np.array_equal(mixed.score_samples(test), clean.score_samples(test))
    expected = auroc(mixed.score_samples(digits.X), mixed.score_samples(noise))
    assert mixed.score(X, y) == expected


def test_outliers_in_the_loss_raise_their_energy(digits):
    random = np.random.RandomState(0)
    X = np.concatenate([digits.X, random.rand(200, 64)])
    y = np.concatenate([digits.y, np.full(200, -1)])
    noise = random.rand(200, 64)
    means = {}
    for weight in (0.0, 0.5):
        detector = SparseEnergyOODDetector(
            digits.module, ood_label=-1, outlier_weight=weight, random_state=0
        )
        means[weight] = quiet_fit(detector, X, y).score_samples(noise).mean()
    assert means[0.5] < means[0.0]


def test_outlier_weight_needs_outliers(digits):
    detector = SparseEnergyOODDetector(digits.module, outlier_weight=0.5, ood_label=-1)
    with pytest.raises(ValueError, match=r"outlier_weight=0.5 .* ood_label=-1"):
        detector.fit(digits.X, digits.y)


def test_score_makes_outliers_where_none_are_known(fitted, digits):
    first = fitted.score(digits.X_test)
    assert 0.5 < first <= 1
    assert fitted.score(digits.X_test, digits.y_test) == first


def test_score_says_when_no_row_carries_the_label_of_outliers(digits):
    detector = quiet_fit(plain(digits.module, ood_label=-1), digits.X, digits.y)
    with pytest.warns(SelectionWarning, match="No row of y carries ood_label=-1"):
        detector.score(digits.X_test, digits.y_test)
    with pytest.raises(ValueError, match="expected in-distribution rows as well"):
        detector.score(digits.X_test, np.full(len(digits.X_test), -1))


# Default networks


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (8, 8, 1)], ids=str)
def test_default_networks_learn_digits(shape):
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X.reshape(-1, *shape), y, stratify=y, random_state=0)
    detector = SparseEnergyOODDetector(random_state=0, precision="float32").fit(X, y)
    assert np.mean(detector.predict_class(X_test) == y_test) > 0.97


# Warnings


def test_permuted_labels_warn(digits):
    with pytest.warns(LabelOrderWarning, match=r"right on 0% of 200 rows; .* on 100%"):
        plain(digits.module).fit(digits.X, (digits.y + 1) % 10)


NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (NAMES, str),
        ([8, 9, 10, 11, 12, 13, 14, 15, 16, 17], str),
        ([0, 1, 2, 3, 4, 5, 6, 7, 9, 8], float),
        ([50, 1, 2, 3, 4, 5, 6, 7, 8, 9], int),
    ],
    ids=["words", "numbers as words", "floats", "other numbers"],
)
def test_labels_in_another_order_than_the_logits_are_named_and_the_remedy_helps(
    digits, names, label
):
    detector, names = plain(digits.module), [label(name) for name in names]
    y = [names[digit] for digit in digits.y_fresh]
    with pytest.warns(LabelOrderWarning, match=r"y = \[names\.index\(label\) for label in y\]"):
        detector.fit(digits.X_fresh, y)
    y = [names.index(label) for label in y]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelOrderWarning)
        detector.fit(digits.X_fresh, y)
    assert np.mean(detector.predict_class(digits.X_test) == digits.y_test) > 0.9


def test_an_untrained_network_warns(digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.warns(NearChanceWarning, match=r"hardly better than chance"):
        plain(untrained).fit(digits.X, digits.y)


def test_a_drop_in_accuracy_warns(digits):
    # The default rate is safe; this one is not.
    detector = SparseEnergyOODDetector(
        digits.module, sparsity_weight=30, learning_rate=0.01, random_state=0
    )
    with pytest.warns(AccuracyDropWarning, match=r"Lower sparsity_weight \(now 30\)"):
        detector.fit(digits.X, digits.y)
    assert detector.id_accuracy_["after"] < detector.id_accuracy_["before"] - 0.01


def test_memory_without_a_seed_warns(digits, tmp_path):
    detector = SparseEnergyOODDetector(WidthAgnostic(), max_epochs=0, memory=str(tmp_path))
    with pytest.warns(MemoryEntryWarning, match="random_state"):
        detector.fit(digits.X)


# Failure


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"learning_rate": 1e6}, r"epoch 1 .*Lower sparsity_weight.*learning_rate"),
        ({"learning_rate": 1e6, "sparsity_weight": 0}, r"epoch 1 .*Lower learning_rate"),
        ({"sparsity_weight": 1000, "learning_rate": 0.01}, r"collapsed .* in epoch \d+.*sparsity"),
    ],
    ids=["nan", "nan without a penalty", "collapse"],
)
def test_divergence_is_an_error_that_leaves_the_detector_as_it_was(digits, parameters, message):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(detector, digits.X, digits.y)
    scores = detector.score_samples(digits.X_test)
    state = dict(vars(detector))
    detector.set_params(**parameters, max_epochs=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DivergenceError, match=message):
            detector.fit(digits.X[:, ::-1].copy(), digits.y)
    assert np.array_equal(detector.score_samples(digits.X_test), scores)
    assert set(vars(detector)) == set(state)
    assert detector.history_ is state["history_"]


def test_a_failed_first_fit_leaves_the_detector_unfitted(digits):
    detector = SparseEnergyOODDetector()
    with pytest.raises(ValueError, match="NaN"):
        detector.fit(np.full((50, 3), np.nan), np.arange(50) % 2)
    with pytest.raises(NotFittedError):
        detector.predict(digits.X_test)
    assert not hasattr(detector, "n_features_in_")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_no_numbers_are_refused_by_row(fitted, digits, bad):
    X = digits.X_test.copy()
    X[7, 3] = bad
    with pytest.raises(ValueError, match=r"NaN, infinity or a value too large .* row 7"):
        fitted.predict(X)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((3, 5)), "5 features"),
        (np.zeros(64), "Reshape your data"),
        (np.zeros((0, 64)), "0 sample"),
        (np.zeros((3, 64), dtype=complex), "Complex"),
        (np.full((3, 64), "a"), "Convert"),
        (torch.zeros(64), "Reshape your data"),
        (torch.zeros(3, 64, dtype=torch.complex64), "dense real"),
    ],
    ids=["width", "1-D", "empty", "complex", "strings", "1-D tensor", "complex tensor"],
)
def test_rows_unlike_those_of_fit_are_refused(fitted, X, message):
    for method in (
        "score_samples",
        "predict",
        "p_values",
        "predict_class",
        "features",
        "calibrate",
    ):
        with pytest.raises(ValueError, match=message):
            getattr(fitted, method)(X)


@pytest.mark.parametrize("fdr", [1e-17, 1e-300])
def test_a_rate_near_zero_selects_nothing_and_tells_why(digits, fitted, fdr):
    with pytest.warns(FewCalibrationRowsWarning, match=f"too few .* at fdr={fdr:.4g}"):
        assert not fitted.select_outliers(digits.X_test, fdr=fdr).any()


def test_rows_of_a_class_may_be_too_few_to_select_outliers(digits, fitted):
    detector = copy.deepcopy(fitted).calibrate(digits.X_fresh, per_class=True)
    counts = np.bincount(detector.predict_class(digits.X_fresh))
    few = rf"^{counts.max()} calibration rows of a class, at most, are too few"
    with pytest.warns(FewCalibrationRowsWarning, match=few):
        assert not detector.select_outliers(0 * digits.X_test, fdr=0.99 / (counts.max() + 1)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewCalibrationRowsWarning)
        detector.select_outliers(digits.X_test, fdr=1.01 / (counts.max() + 1))


@pytest.mark.parametrize("per_class", [False, True])
def test_a_frame_has_what_the_methods_give(digits, fitted, per_class):
    detector = copy.deepcopy(fitted).calibrate(digits.X, per_class=per_class)
    frame = detector.predict_frame(digits.X)
    assert frame.dtypes.astype(str).tolist() == [
        str(detector.classes_.dtype),
        "float64",
        "float64",
        "bool",
    ]
    assert_array_equal(frame["class"], detector.predict_class(digits.X))
    assert_array_equal(frame["score"], detector.score_samples(digits.X))
    assert_array_equal(frame["p_value"], detector.p_values(digits.X))
    assert_array_equal(frame["rejected"], detector.predict(digits.X) == -1)
    assert frame["rejected"].any()


def test_a_frame_has_the_index_of_the_rows(digits, fitted):
    rows = digits.X[:3].reshape(3, -1)
    detector = SparseEnergyOODDetector(
        nn.Linear(rows.shape[1], 3), max_epochs=0, calibration_size=None
    )
    frame = pd.DataFrame(rows, index=["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted = detector.fit(frame).predict_frame(frame[::-1])
    assert predicted.index.tolist() == ["c", "b", "a"]


def test_a_frame_without_pandas_says_what_to_do(digits, fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        fitted.predict_frame(digits.X)


def test_everything_asks_for_a_fit_first(digits):
    detector = SparseEnergyOODDetector(digits.module)
    for method in [
        "score_samples",
        "predict",
        "decision_function",
        "p_values",
        "predict_class",
        "predict_class_proba",
        "predict_frame",
        "features",
        "score",
        "calibrate",
    ]:
        with pytest.raises(NotFittedError):
            getattr(detector, method)(digits.X)
    for attribute in ("module_", "head_", "device_", "precision_", "offset_", "classes_"):
        assert not hasattr(detector, attribute)


class Pairs(Dataset):
    """Digits as pairs (x, y), one by one."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], self.y[row]


class Rows(Dataset):
    """Digits without labels."""

    def __init__(self, X):
        self.X = X

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row]


def normalised(digits):
    """A classifier of digits with a batch-norm."""
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, len(set(digits.y)))
    )


@pytest.mark.parametrize("score", ["energy", "two_views"])
def test_folded_batch_norms_change_no_score_beyond_rounding(digits, score):
    parameters = {"max_epochs": 1, "pretrain_epochs": 1, "random_state": 0, "score_function": score}
    detector = SparseEnergyOODDetector(normalised(digits), **parameters)
    folded, plain = (
        quiet_fit(clone(detector).set_params(fold_batch_norm=fold), digits.X, digits.y)
        for fold in (True, False)
    )
    assert (folded.execution_["folded"], plain.execution_["folded"]) == (1, 0)
    expected = plain.decision_function(digits.X_test)
    np.testing.assert_allclose(
        folded.decision_function(digits.X_test), expected, rtol=0, atol=2e-5 * np.ptp(expected)
    )
    assert folded.module_[1].num_batches_tracked > 0


def test_a_network_that_training_made_disagree_scores_as_it_is(digits, monkeypatch):
    monkeypatch.setattr("skood.fitting.folds", lambda network, rows: False)
    detector = SparseEnergyOODDetector(normalised(digits), max_epochs=1, random_state=0)
    assert quiet_fit(detector, digits.X, digits.y).execution_["folded"] == 0


@pytest.mark.usefixtures("impatient")
def test_a_fit_starts_its_workers_once(digits, monkeypatch):
    started = []

    class Workers(loading._Workers):
        def __init__(self, *arguments):
            started.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(loading, "_Workers", Workers)
    detector = plain(digits.module, num_workers=1).set_params(max_epochs=3)
    quiet_fit(detector, Pairs(digits.X, digits.y))
    # One to read the labels of all, and one for every pass over the rows.
    assert len(started) == 2
    detector.score_samples(Pairs(digits.X_test, digits.y_test))
    assert len(started) == 3


@pytest.mark.parametrize("fault", ["rows", "network"])
@pytest.mark.usefixtures("impatient")
def test_an_error_ends_the_workers_even_if_it_is_kept(digits, fault, monkeypatch):
    detector = quiet_fit(plain(digits.module, num_workers=1), digits.X, digits.y)
    before = set(active_children())  # of other tests
    X = digits.X_test.copy()
    if fault == "rows":
        X[3] = np.nan
    else:
        monkeypatch.setattr("skood.engine.inference._forward", lambda *_: 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError)) as caught:
        detector.score_samples(Listed(list(X)))
    assert caught.value.__traceback__ is not None
    assert set(active_children()) <= before


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.usefixtures("impatient")
def test_data_sets_and_references_give_what_arrays_give(digits, num_workers):
    parameters = {"max_epochs": 1, "random_state": 0, "num_workers": num_workers}
    expected = quiet_fit(SparseEnergyOODDetector(digits.module, **parameters), digits.X, digits.y)
    scores = expected.score_samples(digits.X_test)

    def check(detector, X_test):
        assert np.array_equal(detector.score_samples(X_test), scores)
        assert detector.offset_ == expected.offset_
        assert np.array_equal(detector.features(X_test), expected.features(digits.X_test))
        moved = copy.deepcopy(detector).calibrate(X_test)
        assert np.array_equal(moved.calibration_scores_, scores)

    train, test = Pairs(digits.X, digits.y), Pairs(digits.X_test, digits.y_test)
    by_pairs = quiet_fit(SparseEnergyOODDetector(digits.module, **parameters), train)
    assert by_pairs.n_features_in_ == 64
    check(by_pairs, test)
    check(by_pairs, Subset(test, range(len(test))))
    check(by_pairs, digits.X_test)

    tensors = TensorDataset(torch.from_numpy(digits.X), torch.from_numpy(digits.y))
    check(quiet_fit(SparseEnergyOODDetector(digits.module, **parameters), tensors), test)

    everything = np.concatenate([digits.X, digits.X_test])
    by_numbers = SparseEnergyOODDetector(
        digits.module, preprocess=lambda rows: torch.from_numpy(everything[rows]), **parameters
    )
    quiet_fit(by_numbers, np.arange(len(digits.X)), digits.y)
    assert by_numbers.input_shape_ == ()
    check(by_numbers, np.arange(len(digits.X), len(everything)))


def test_labels_given_take_the_place_of_those_of_a_data_set(digits):
    pairs = Pairs(digits.X, [99] * len(digits.X))
    detector = quiet_fit(plain(digits.module), pairs, digits.y)
    assert detector.classes_.tolist() == list(range(10))


@pytest.mark.slow
def test_a_search_over_references(digits):
    search = GridSearchCV(
        SparseEnergyOODDetector(
            digits.module,
            preprocess=lambda rows: torch.from_numpy(digits.X[rows]),
            max_epochs=1,
            ood_label=9,
            random_state=0,
        ),
        {"sparsity_weight": [0.0, 0.1]},
        cv=StratifiedKFold(2),
        error_score="raise",
    )
    quiet_fit(search, np.arange(len(digits.X)), digits.y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_surrogate_outliers_are_made_of_what_references_load(digits):
    images = digits.X_test[:60].reshape(-1, 1, 8, 8)
    names = [f"{row}.png" for row in range(len(images))]
    detector = plain(
        nn.Sequential(nn.Flatten(), digits.module),
        preprocess=lambda paths: torch.from_numpy(images[[int(name[:-4]) for name in paths]]),
        num_workers=0,
    )
    in_memory = clone(detector).set_params(preprocess=None).fit(images)
    detector.fit(names)
    assert detector.score(names) == in_memory.score(images)
    assert make_ood_scorer()(FrozenEstimator(detector), names) == detector.score(names)


def test_few_of_many_references_are_loaded_for_surrogates(digits, monkeypatch):
    monkeypatch.setattr("skood.model_selection.scorers.LOADED_ROWS", 50)
    detector = plain(
        digits.module, preprocess=lambda rows: torch.from_numpy(digits.X[rows]), num_workers=0
    )
    detector.fit(np.arange(100))
    spaced = digits.X[np.linspace(0, 999, 50).astype(int)]
    surrogates = surrogate_outliers(spaced, random_state=0)
    plainly = plain(digits.module).fit(digits.X[:100])
    expected = auroc(plainly.score_samples(digits.X), plainly.score_samples(surrogates))
    assert detector.score(np.arange(1000)) == expected


def test_a_data_set_is_scored_by_its_labels(digits):
    detector = quiet_fit(plain(digits.module, ood_label=9), digits.X, digits.y)
    expected = detector.score(digits.X_test, digits.y_test)
    assert detector.score(Pairs(digits.X_test, digits.y_test)) == expected
    assert detector.score(Rows(digits.X_test)) == detector.score(digits.X_test)


def test_rows_ordered_by_class_are_answered_with_the_splitter_to_pass(digits):
    order = np.argsort(digits.y)
    search = GridSearchCV(
        SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=0, random_state=0),
        {"tpr": [0.9]},
        cv=3,
        error_score="raise",
    )
    with pytest.raises(ValueError, match=r"not trained on.*cv=InDistributionKFold\(\)"):
        quiet_fit(search, digits.X[order], digits.y[order])


def test_a_network_that_copy_refuses_can_be_cloned(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has another weight_norm now
        module = nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 16)), nn.Linear(16, 10))
    module(torch.zeros(2, 64))
    detector = SparseEnergyOODDetector(module, max_epochs=1, random_state=0)
    twin = clone(detector)
    assert twin.get_params()["max_epochs"] == 1
    assert twin.module is not module
    expected = quiet_fit(detector, digits.X, digits.y).score_samples(digits.X_test)
    scores = quiet_fit(twin, digits.X, digits.y).score_samples(digits.X_test)
    assert np.array_equal(scores, expected)


class Buffered(nn.Module):
    """A classifier that writes its features into the same memory at every call."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 16), nn.Linear(16, 10)
        self.memory = nn.Buffer(torch.zeros(4096, 16))

    def forward(self, x):
        self.memory[: len(x)] = self.body(x).detach()
        return self.head(self.memory[: len(x)])


def test_features_survive_that_their_memory_is_used_again(digits):
    module = Buffered()
    detector = quiet_fit(plain(module), digits.X, digits.y)
    with torch.no_grad():
        expected = module.body(torch.as_tensor(digits.X, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(detector.features(digits.X), expected, atol=1e-5)


def test_accuracy_of_a_lazy_network_is_that_of_its_fit(digits, generator_states):
    module = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
    detector = quiet_fit(plain(module), digits.X, digits.y)
    before = generator_states()
    accuracy = detector.id_accuracy(digits.X_test, digits.y_test)
    assert accuracy["before"] == accuracy["after"]
    assert generator_states() == before


def test_accuracy_before_and_after(digits):
    detector = plain(digits.module, ood_label=9)
    quiet_fit(detector, digits.X, digits.y)
    accuracy = detector.id_accuracy(digits.X_test, digits.y_test)
    kept = digits.y_test != 9
    right = (detector.predict_class(digits.X_test) == digits.y_test)[kept]
    assert accuracy == {"before": right.mean(), "after": right.mean()}
    trained = quiet_fit(
        SparseEnergyOODDetector(pretrain_epochs=20, sparsity_weight=50.0, random_state=0),
        digits.X,
        digits.y,
    )
    accuracy = trained.id_accuracy(digits.X_test, digits.y_test)
    assert accuracy["after"] == np.mean(trained.predict_class(digits.X_test) == digits.y_test)
    assert accuracy["before"] > accuracy["after"]
    assert pickle.loads(pickle.dumps(trained)).id_accuracy(digits.X_test, digits.y_test) == accuracy


@pytest.mark.parametrize(
    ("y", "message"),
    [(None, "pass y"), ([10, 1], r"labels \[1, 10\]; expected"), ([0], "1 labels for 2 rows")],
)
def test_accuracy_needs_labels_of_the_classifier(fitted, digits, y, message):
    with pytest.raises(ValueError, match=message):
        fitted.id_accuracy(digits.X_test[:2], y)


def test_another_default_dtype_is_no_obstacle(digits):
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=1, random_state=0)
    with default_dtype(torch.float64):
        quiet_fit(detector, digits.X, digits.y)
        scores = detector.score_samples(digits.X_test)
    assert np.array_equal(detector.score_samples(digits.X_test), scores)
    assert detector.precision_["scoring"] == "float32"


@pytest.mark.parametrize("n_rows", [0, 1])
def test_too_few_rows(n_rows):
    with pytest.raises(ValueError, match=r"1 sample|n_samples = 1|0 sample"):
        SparseEnergyOODDetector().fit(np.zeros((n_rows, 3)))


# Parameters that reach the engine


def test_penalty_score_and_augmentation_may_be_callables(digits):
    seen = []

    def augment(batch):
        seen.append(len(batch))
        return batch + 0.01

    detector = SparseEnergyOODDetector(
        digits.module,
        penalty=lambda features: features.pow(2).sum(dim=1),
        score_function=lambda features, logits: logits.amax(dim=1),
        augment=augment,
        max_epochs=1,
        random_state=0,
    )
    quiet_fit(detector, digits.X, digits.y)
    assert sum(seen) == 900
    expected = logits_of(detector.module_, digits.X_test).max(axis=1)
    np.testing.assert_allclose(detector.score_samples(digits.X_test), expected, rtol=1e-6)


def test_preprocess_is_applied_at_training_and_at_scoring(digits):
    """Images of bytes, prepared by preprocess, score like the same images prepared beforehand."""
    images = np.rint(digits.X * 16).astype(np.uint8)
    byte_detector = SparseEnergyOODDetector(
        digits.module, preprocess=lambda batch: batch.float() / 16, max_epochs=1, random_state=0
    )
    quiet_fit(byte_detector, images, digits.y)
    float_detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(float_detector, digits.X.astype(np.float32), digits.y)
    assert np.array_equal(
        byte_detector.score_samples(images[:50]),
        float_detector.score_samples(digits.X[:50].astype(np.float32)),
    )


@pytest.mark.parametrize("name", ["flip", "flip-crop"])
def test_named_augmentations_train_images(digits, name):
    detector = SparseEnergyOODDetector(
        augment=name, pretrain_epochs=2, max_epochs=1, random_state=0
    )
    detector.fit(digits.X.reshape(-1, 8, 8), digits.y)
    with pytest.raises(ValueError, match="need batches of images"):
        detector.fit(digits.X, digits.y)


def test_bfloat16_scores_near_float32(digits):
    X, test = digits.X.reshape(-1, 8, 8), digits.X_test.reshape(-1, 8, 8)
    base = SparseEnergyOODDetector(
        pretrain_epochs=5, max_epochs=0, random_state=0, precision="float32"
    ).fit(X, digits.y)
    half = quiet_fit(plain(base.module_, precision="bfloat16"), X, digits.y)
    assert half.precision_ == {"training": "bfloat16", "scoring": "bfloat16"}
    difference = half.score_samples(test) - base.score_samples(test)
    assert 0 < np.abs(difference).max() < 0.5
    order = np.random.RandomState(0).permutation(len(test))
    assert np.array_equal(half.score_samples(test[order]), half.score_samples(test)[order])


def test_calibration_size_none_uses_the_training_rows(digits):
    detector = quiet_fit(plain(digits.module, calibration_size=None), digits.X, digits.y)
    assert np.array_equal(
        np.sort(detector.calibration_scores_), np.sort(detector.score_samples(digits.X))
    )


def test_what_was_picked_is_said(digits, capsys):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0, verbose=1)
    quiet_fit(detector, digits.X, digits.y)
    picked = detector.execution_
    assert picked["layout"] == "contiguous"
    assert picked["scoring_rows"][-1] == 4096
    assert not picked["compiled"]
    rows = ", ".join(map(str, picked["scoring_rows"]))
    assert f"layout contiguous, rows of a scoring forward {rows}" in capsys.readouterr().out
    images = digits.X.reshape(-1, 1, 8, 8)
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=0, random_state=0)
    assert quiet_fit(detector, images, digits.y).execution_["layout"] == "channels_last"


def test_rows_on_the_device_change_nothing(digits, monkeypatch):
    parameters = {"max_epochs": 2, "random_state": 0}
    expected = quiet_fit(SparseEnergyOODDetector(digits.module, **parameters), digits.X, digits.y)
    monkeypatch.setattr("skood.engine.rows.InMemory._lies_on", lambda rows, device: False)
    monkeypatch.setattr("skood.engine.rows.free_memory", lambda device: 10**9)
    found = quiet_fit(SparseEnergyOODDetector(digits.module, **parameters), digits.X, digits.y)
    assert np.array_equal(found.score_samples(digits.X), expected.score_samples(digits.X))


def test_verbose_shows_epochs(digits, capsys):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=2, random_state=0, verbose=1)
    quiet_fit(detector, digits.X, digits.y)
    shown = capsys.readouterr()
    assert "fine-tune" in shown.err
    assert "2/2" in shown.err
    assert "float32" in shown.out + shown.err


def test_all_penalties_and_scores_run(digits):
    from skood.penalties import PENALTIES
    from skood.scores import Dice, Knn, list_scores

    # The head is small, and a class has hardly 30 rows.
    fitting = {"dice": Dice(sparsity=0.1), "knn": Knn(n_neighbors=5)}
    scores = [fitting.get(name, name) for name in list_scores()]
    for penalty, score in itertools.product(PENALTIES, scores):
        detector = SparseEnergyOODDetector(
            digits.module, penalty=penalty, score_function=score, max_epochs=1, random_state=0
        )
        quiet_fit(detector, digits.X[:300], digits.y[:300])
        noise = np.random.RandomState(0).rand(100, 64)
        scores = detector.score_samples(digits.X_test), detector.score_samples(noise)
        assert auroc(*scores) > 0.7


def test_transforms_of_torchvision_work_on_batches(digits):
    from torchvision.transforms import v2

    images = (digits.X.reshape(-1, 1, 8, 8) * 255).astype(np.uint8)
    transform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25]), torch.nn.Flatten()]
    )
    detector = plain(digits.module, preprocess=transform)
    quiet_fit(detector, images, digits.y)
    by_hand = (images.reshape(-1, 64) / 255 - 0.5) / 0.25
    expected = logsumexp(logits_of(digits.module, by_hand), axis=1)
    np.testing.assert_allclose(detector.score_samples(images), expected, rtol=1e-4)


def test_each_class_has_its_share_of_kept_rows(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, tpr=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
    assert detector.class_offsets_ is None
    rows = np.concatenate([digits.X_fresh, digits.X_test])
    detector.calibrate(digits.X_fresh, per_class=True)
    predicted = detector.predict_class(rows)
    scores = detector.score_samples(rows)
    assert detector.class_offsets_.shape == (10,)
    for one, offset in enumerate(detector.class_offsets_):
        own = detector.score_samples(digits.X_fresh)[detector.predict_class(digits.X_fresh) == one]
        assert offset == place_threshold(own, 0.8)
    margins = scores - detector.class_offsets_[predicted]
    assert np.array_equal(detector.decision_function(rows), margins)
    assert np.array_equal(detector.predict(rows), np.where(margins >= 0, 1, -1))
    assert np.array_equal(detector.p_values(rows) <= 1 - 0.8, margins < 0)
    rejected = detector.predict_class(rows, reject_label=-1) == -1
    assert np.array_equal(rejected, margins < 0)
    copied = pickle.loads(pickle.dumps(detector))
    assert np.array_equal(copied.p_values(rows), detector.p_values(rows))
    detector.calibrate(digits.X_fresh)
    assert detector.class_offsets_ is None
    assert np.array_equal(detector.decision_function(rows), scores - detector.offset_)


def test_a_class_of_few_calibration_rows_is_told_of(fitted, digits):
    detector = copy.deepcopy(fitted)
    with pytest.warns(FewCalibrationRowsWarning, match="of 10 classes, such as number"):
        detector.calibrate(digits.X_fresh[:60], per_class=True)
    with pytest.raises(ValueError, match="'per_class' parameter of calibrate"):
        detector.calibrate(digits.X_fresh, per_class="yes")
