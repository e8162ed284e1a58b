"""One fit: how it reads, what it records, and what it asks of a network that is used as it is."""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.utils.data import TensorDataset

from skood import SparseEnergyOODDetector
from skood.engine.objective import FINE_TUNING_TERMS
from skood.exceptions import HeadNotFoundError

LONGEST_FIT = 25
"""Lines of code that `fit` may have."""


def quiet_fit(detector, X, y=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


def test_fit_can_be_read_at_a_glance():
    source = textwrap.dedent(inspect.getsource(SparseEnergyOODDetector.fit))
    (function,) = ast.parse(source).body
    docstring, *body = function.body
    assert isinstance(docstring.value.value, str)
    lines = source.splitlines()[body[0].lineno - 1 : function.end_lineno]
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= LONGEST_FIT
    nested = (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.For, ast.While, ast.Try)
    assert not [node for statement in body for node in ast.walk(statement) if type(node) in nested]


# What is recorded


@pytest.mark.parametrize(
    ("parameters", "further"),
    [
        ({}, ()),
        ({"outlier_weight": 0.5}, ("outlier",)),
        ({"distillation_weight": 2.0}, ("distillation",)),
        ({"outlier_weight": 0.5, "distillation_weight": 2.0}, ("outlier", "distillation")),
        ({"sparsity_weight": 0.0}, ()),
    ],
    ids=str,
)
def test_the_loss_is_the_weighted_sum_of_the_terms_recorded(digits, parameters, further):
    noise = np.random.RandomState(0).rand(60, 64)
    X = np.concatenate([digits.X[:300], noise])
    y = np.concatenate([digits.y[:300], np.full(60, -1)])
    detector = SparseEnergyOODDetector(
        digits.module, ood_label=-1, max_epochs=2, random_state=0, **parameters
    )
    quiet_fit(detector, X, y)
    measured = {"accuracy", "mean_l1", "hoyer_index", "id_energy"}
    for record in detector.history_:
        assert set(record) == {
            *("phase", "epoch", "seconds", "loss", "cross_entropy", "penalty"),
            *measured,
            *further,
        }
        weights = {"cross_entropy": 1.0, "penalty": detector.sparsity_weight} | {
            term.name: getattr(detector, weight) for weight, term in FINE_TUNING_TERMS.items()
        }
        expected = sum(weights[name] * record[name] for name in weights if name in record)
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


def test_pretraining_records_no_further_terms(digits):
    detector = SparseEnergyOODDetector(
        pretrain_epochs=1, max_epochs=1, distillation_weight=1.0, random_state=0
    )
    pretraining, fine_tuning = quiet_fit(detector, digits.X[:300], digits.y[:300]).history_
    assert pretraining["phase"] == "pretrain"
    assert pretraining["loss"] == pytest.approx(pretraining["cross_entropy"], rel=1e-6)
    assert set(fine_tuning) - set(pretraining) == {"distillation"}


# A network that is used as it is


@pytest.fixture(params=["script", "trace"])
def scripted(request, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates both
        if request.param == "script":
            return torch.jit.script(digits.module)
        return torch.jit.trace(digits.module, torch.zeros(2, 64))


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"score_function": "msp"},
        {"score_function": "max_logit"},
        {"penalty": "relative_l1"},
        {"distillation_weight": 1.0},
    ],
    ids=str,
)
def test_torchscript_is_scored_by_its_logits(digits, scripted, parameters):
    settings = {"max_epochs": 0, "random_state": 0} | parameters
    found = quiet_fit(SparseEnergyOODDetector(scripted, **settings), digits.X, digits.y)
    expected = quiet_fit(SparseEnergyOODDetector(digits.module, **settings), digits.X, digits.y)
    for method in ("score_samples", "predict_class", "predict_class_proba"):
        np.testing.assert_allclose(
            getattr(found, method)(digits.X_test),
            getattr(expected, method)(digits.X_test),
            rtol=1e-5,
            atol=1e-7,
        )
    assert found.head_ is None
    assert found.id_accuracy_ == expected.id_accuracy_


@pytest.mark.parametrize(
    "parameters",
    [{"max_epochs": 1}, {"score_function": "knn"}, {"score_function": "react"}],
    ids=str,
)
def test_what_needs_features_asks_for_the_module_behind_torchscript(digits, scripted, parameters):
    detector = SparseEnergyOODDetector(scripted, random_state=0, **({"max_epochs": 0} | parameters))
    with pytest.raises(HeadNotFoundError, match="from which it was made"):
        quiet_fit(detector, digits.X, digits.y)
    assert not hasattr(detector, "history_")


def test_features_ask_for_the_module_behind_torchscript(digits, scripted):
    detector = SparseEnergyOODDetector(scripted, max_epochs=0, random_state=0)
    with pytest.raises(HeadNotFoundError, match="from which it was made"):
        quiet_fit(detector, digits.X, digits.y).features(digits.X_test)


def test_a_penalty_is_not_fitted_where_nothing_is_fine_tuned(digits):
    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.fill_(-1)  # so that features are zero, of which no unit can be made
    settings = {"penalty": "relative_l1", "random_state": 0}
    quiet_fit(SparseEnergyOODDetector(module, max_epochs=0, **settings), digits.X, digits.y)
    with pytest.raises(ValueError, match="mean before fine-tuning is 0"):
        quiet_fit(SparseEnergyOODDetector(module, max_epochs=1, **settings), digits.X, digits.y)


# Rows


@pytest.mark.parametrize("labelled", [True, False])
def test_a_tensor_data_set_may_hold_numbers_of_rows(digits, labelled):
    """Which preprocess loads, as it does those of an array."""
    settings = {"max_epochs": 1, "random_state": 0}
    expected = quiet_fit(SparseEnergyOODDetector(digits.module, **settings), digits.X, digits.y)
    numbers = torch.arange(len(digits.X))
    detector = SparseEnergyOODDetector(
        digits.module,
        preprocess=lambda rows: torch.from_numpy(digits.X[np.asarray(rows)]),
        **settings,
    )
    if labelled:
        quiet_fit(detector, TensorDataset(numbers, torch.from_numpy(digits.y)))
    else:
        quiet_fit(detector, TensorDataset(numbers), digits.y)
    assert detector.offset_ == expected.offset_
    assert np.array_equal(
        detector.score_samples(TensorDataset(numbers[:300])), expected.score_samples(digits.X[:300])
    )


def test_a_fit_leaves_what_it_was_given_and_keeps_no_rows(digits):
    X, y = digits.X.copy(), digits.y.copy()
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    given = clone(detector).get_params(deep=False)
    quiet_fit(detector, X, y)
    assert np.array_equal(X, digits.X)
    assert np.array_equal(y, digits.y)
    kept = detector.get_params(deep=False)
    assert all(kept[name] == given[name] for name in given if name != "module")
    assert not any(value is X or value is y for value in vars(detector).values())


@pytest.mark.parametrize("kind", ["M8[s]", "m8[s]"])
def test_dates_are_no_numbers(kind):
    with pytest.raises(ValueError, match="holds no numbers"):
        SparseEnergyOODDetector().fit(np.zeros((120, 6), dtype=kind))


def test_fractions_count_as_the_numbers_that_they_are(digits):
    exact = {"tpr": Fraction(9, 10), "sparsity_weight": Fraction(1, 50), "momentum": Fraction(1, 2)}
    settings = {"max_epochs": 1, "random_state": 0}
    detector = SparseEnergyOODDetector(digits.module, **exact, **settings)
    rounded = {name: float(value) for name, value in exact.items()}
    expected = SparseEnergyOODDetector(digits.module, **rounded, **settings)
    for each in (detector, expected):
        quiet_fit(each, digits.X, digits.y).calibrate(digits.X_fresh)
    assert detector.offset_ == expected.offset_
    p_values = detector.p_values(digits.X_test)
    assert p_values.dtype == np.float64
    assert np.array_equal(p_values, expected.p_values(digits.X_test))


@pytest.mark.parametrize("distillation_weight", [0.0, 1.0])
def test_preprocess_need_not_be_copied(digits, distillation_weight):
    lock = threading.Lock()  # which copy.deepcopy refuses

    def scaled(batch):
        with lock:
            return batch.float()

    detector = SparseEnergyOODDetector(
        digits.module,
        preprocess=partial(scaled),
        max_epochs=1,
        pretrain_epochs=1,
        distillation_weight=distillation_weight,
        random_state=0,
    )
    assert len(quiet_fit(detector, digits.X, digits.y).history_) == 2


# Scores and penalties of the user's


class Drifting:
    """A score that follows the rows scored before."""

    uses_features = False

    def __init__(self):
        self.mean = 0.0

    def __call__(self, features, logits):
        self.mean = 0.9 * self.mean + 0.1 * float(logits.mean())
        return logits.logsumexp(dim=1) - self.mean


class Stepping:
    """A score whose step for a row depends on the batch."""

    uses_gradient, uses_features = True, False

    def __call__(self, features, logits):
        return logits.logsumexp(dim=1)

    def perturbation(self, logits, batch):
        (slope,) = torch.autograd.grad(logits.sum(), batch)
        return slope * len(batch) * batch.mean(dim=0)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda h, z: z.softmax(dim=0).amax(dim=1), "if other rows are in its batch"),
        (lambda h, z: z.amax(dim=1) - z.amax(dim=1).mean(), "if other rows are in its batch"),
        (lambda h, z: z.amax(dim=1).argsort().argsort().double(), "if other rows are in its batch"),
        (lambda h, z: -torch.cdist(h, h).kthvalue(2)[0], "if other rows are in its batch"),
        (lambda h, z: z.amax(dim=1) + 0.01 * torch.rand(len(z)), "when called again"),
        (Drifting(), "when called again"),
        (Stepping(), "if other rows are in its batch"),
    ],
    ids=["softmax", "mean", "ranks", "neighbours", "random", "drifting", "step"],
)
def test_a_score_that_mixes_rows_or_draws_is_refused(digits, score, message):
    detector = SparseEnergyOODDetector(digits.module, score_function=score, max_epochs=0)
    with pytest.raises(ValueError, match=rf"^score_function=.*{message}"):
        detector.fit(digits.X[:200], digits.y[:200])


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (lambda h: (h - h.mean(dim=0)).abs().sum(dim=1), "if other rows are in its batch"),
        (lambda h: h.softmax(dim=0).sum(dim=1), "if other rows are in its batch"),
        (lambda h: nn.functional.dropout(h).abs().sum(dim=1), "when called again"),
    ],
    ids=["mean", "softmax", "dropout"],
)
def test_a_penalty_that_mixes_rows_or_draws_is_refused(digits, penalty, message):
    detector = SparseEnergyOODDetector(digits.module, penalty=penalty, max_epochs=1)
    with pytest.raises(ValueError, match=rf"^penalty=.*{message}"):
        quiet_fit(detector, digits.X[:200], digits.y[:200])
