"""One fit: how it reads, what it records, and what it asks of a network that is used as it is."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import textwrap
import threading
import warnings
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

from skood import SparseEnergyOODDetector
from skood.engine.objective import FINE_TUNING_TERMS
from skood.exceptions import HeadNotFoundError, NonFiniteLogitsError, RoundedValuesWarning
from skood.fitting import HOW

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


# What is trained


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_first_layers_stay_as_they_are_if_the_last_are_to_be_trained(weight):
    torch.manual_seed(0)
    widths = [6, 8, 8, 8, 8, 3]
    linear = [nn.Linear(*pair) for pair in pairwise(widths)]
    module = nn.Sequential(*(part for one in linear for part in (one, nn.ReLU()))).eval()[:-1]
    X = np.random.RandomState(0).randn(200, 6)
    detector = SparseEnergyOODDetector(
        module, sparsity_weight=weight, layers="last", max_epochs=2, random_state=0
    )
    quiet_fit(detector, X)
    given, now = module.state_dict(), detector.module_.state_dict()
    # Of 8 (6 + 3 * 8) weights before the head, and 32 biases, 70 % are in the last three layers.
    assert [name for name in given if given[name].equal(now[name])] == ["0.weight", "0.bias"]
    assert all(p.requires_grad for p in detector.module_.parameters())
    assert {record["layers"] for record in detector.history_} == {"last"}


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
            *HOW,
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
    assert set(fine_tuning) - set(pretraining) == {"distillation", *HOW}


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


# Copies of the module given


class Reaching(nn.Module):
    """A classifier that keeps a function of its own layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 8), nn.Linear(8, 10)
        self.step = lambda x: self.body(x)

    def forward(self, x):
        return self.head(self.step(x).relu())


class InTraining(Reaching):
    def forward(self, x):
        return self.head((self.step if self.training else self.body)(x).relu())


class Method(Reaching):
    def __init__(self):
        super().__init__()
        del self.step

    def step(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("kind", "max_epochs"), [(Reaching, 0), (Reaching, 1), (InTraining, 1)], ids=str
)
def test_a_copy_that_reaches_the_module_given_is_refused(digits, kind, max_epochs):
    module = kind()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    detector = SparseEnergyOODDetector(module, max_epochs=max_epochs, random_state=0)
    with pytest.raises(TypeError, match=r"'body\.weight' of the module given.*method") as raised:
        quiet_fit(detector, digits.X, digits.y)
    assert not hasattr(raised.value, "__notes__")
    assert not hasattr(detector, "offset_")
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    quiet_fit(detector.set_params(module=Method()), digits.X, digits.y)


class WithoutReturn(nn.Sequential):
    """Keeps its batch-norm in evaluation mode, and forgets to return itself."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()

    def eval(self):
        super().eval()


@pytest.mark.parametrize("parameters", [{"max_epochs": 0}, {"distillation_weight": 1.0}], ids=str)
def test_train_and_eval_may_return_nothing(digits, parameters):
    module = WithoutReturn(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    parameters = {"max_epochs": 1, "random_state": 0} | parameters
    detector = quiet_fit(SparseEnergyOODDetector(module, **parameters), digits.X, digits.y)
    assert torch.equal(detector.module_[1].running_mean, torch.zeros(8))
    assert not detector.module_[0].training


class Keeping(nn.Sequential):
    """Keeps what it computed, for a plot."""

    def forward(self, x):
        self.kept = {"last": [super().forward(x)]}
        return self.kept["last"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda module: nn.utils.weight_norm(module[0]),
        lambda module: nn.utils.spectral_norm(module[0]),
        lambda module: nn.utils.parametrizations.weight_norm(module[0]),
        lambda module: nn.utils.parametrizations.spectral_norm(module[0]),
        lambda module: prune.l1_unstructured(module[0], "weight", 0.5),
        lambda module: None,
    ],
    ids=[
        "weight norm",
        "spectral norm",
        "weight norm as parametrization",
        "spectral norm as parametrization",
        "pruned",
        "keeping",
    ],
)
def test_computed_weights_and_kept_activations_are_fitted_and_travel(digits, tmp_path, change):
    module = Keeping(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    change(module)
    module(torch.zeros(2, 64))
    detector = SparseEnergyOODDetector(
        module, max_epochs=1, distillation_weight=1.0, memory=tmp_path, random_state=0
    )
    scores = quiet_fit(detector, digits.X, digits.y).score_samples(digits.X_test)
    for other in (
        pickle.loads(pickle.dumps(detector)),
        copy.deepcopy(detector),
        quiet_fit(clone(detector), digits.X, digits.y),  # from memory
    ):
        assert np.array_equal(other.score_samples(digits.X_test), scores)


def test_a_head_for_some_classes_alone_takes_the_place_of_a_mask(digits):
    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 12))
    with torch.no_grad():
        module[2].bias[10:] = -torch.inf
    detector = SparseEnergyOODDetector(module, max_epochs=1, random_state=0)
    with pytest.raises(NonFiniteLogitsError, match="with the rows of weight and bias"):
        quiet_fit(detector, digits.X, digits.y)
    head = nn.Linear(8, 10)
    head.weight, head.bias = nn.Parameter(module[2].weight[:10]), nn.Parameter(module[2].bias[:10])
    module[2] = head
    assert quiet_fit(detector, digits.X, digits.y).head_ == "2"


# Values that a cast loses


def classes_half_a_minute_apart(offset, scale=1):
    y = np.arange(150) % 3
    noise = np.random.RandomState(0).randn(150, 4)
    return offset + scale * (30 * y[:, None] + 5 * noise), y


@pytest.mark.parametrize("form", ["float64", "int64", "preprocessed", "images"])
def test_the_built_network_sees_the_detail_of_columns_far_from_0(form):
    X, y = classes_half_a_minute_apart(1.7e9)
    if form == "int64":
        X, y = classes_half_a_minute_apart(1.7e18, 1e9)
        X = X.astype(np.int64)
    if form == "images":
        X = X.repeat(12, axis=1).reshape(150, 3, 4, 4)
    preprocess = torch.clone if form == "preprocessed" else None
    detector = SparseEnergyOODDetector(
        pretrain_epochs=15, max_epochs=0, random_state=0, preprocess=preprocess
    )
    quiet_fit(detector, X, y)
    assert detector.id_accuracy_["after"] == 1
    assert len(np.unique(detector.calibration_scores_)) == len(detector.calibration_scores_)
    assert (detector.predict_class(X) == y).all()
    copied = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(copied.score_samples(X), detector.score_samples(X))


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 6, 3), (8, 8, 6)], ids=str)
def test_the_built_network_finds_the_channels(shape):
    X = np.random.RandomState(0).rand(60, *shape)
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=0, random_state=0)
    last, first = (quiet_fit(clone(detector), x) for x in (X, np.moveaxis(X, 3, 1)))
    np.testing.assert_array_equal(last.score_samples(X), first.score_samples(np.moveaxis(X, 3, 1)))


class LookedUp(nn.Module):
    """A classifier that takes the class of a number from its last digits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 3), nn.Linear(3, 3)
        with torch.no_grad():
            for layer in (self.embedding, self.head):
                layer.weight.copy_(torch.eye(3) * 4)

    def forward(self, x):
        return self.head(self.embedding(x.long() % 3).mean(1))


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_the_users_network_gets_whole_numbers_by_the_remedy_of_the_warning(dtype):
    y = np.arange(60) % 3
    ids = (y[:, None] + 3 * np.random.RandomState(0).randint(2**24, 2**26, (60, 4))).astype(dtype)
    detector = SparseEnergyOODDetector(LookedUp(), max_epochs=0, random_state=0)
    with pytest.warns(RoundedValuesWarning, match=r"preprocess=torch\.Tensor\.long"):
        detector.fit(ids)
    assert (detector.predict_class(ids) != y).any()
    detector.set_params(preprocess=torch.Tensor.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundedValuesWarning)
        detector.fit(ids)
        assert (detector.predict_class(ids) == y).all()


def test_the_user_is_told_of_columns_that_the_cast_blurs_and_what_to_do():
    X, _ = classes_half_a_minute_apart(1.7e9)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    detector = SparseEnergyOODDetector(module, max_epochs=0, random_state=0)
    with pytest.warns(RoundedValuesWarning, match=r"blurs columns .*3\].*StandardScaler"):
        detector.fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoundedValuesWarning)
        make_pipeline(StandardScaler(), clone(detector)).fit(X).score_samples(X)


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
