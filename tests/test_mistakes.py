"""Every mistake is answered: what is wrong, the error, and the words that name value and remedy.

After each, the detector and the network are as before.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from skood import SparseEnergyOODDetector
from skood.engine.objective import FINE_TUNING_TERMS
from skood.exceptions import DivergenceError, HeadNotFoundError, NonFiniteLogitsError

N, D, K = 60, 6, 3
X = np.random.RandomState(0).randn(N, D).astype(np.float32)
Y = np.arange(N) % K
IMAGES = np.random.RandomState(0).randint(0, 256, (N, 8, 8, 3), dtype=np.uint8)


def network(*after: nn.Module, n_logits: int = K, width: int = D) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n_logits), *after
        )


def changed(row: int, value: float) -> np.ndarray:
    rows = X.copy()
    rows[row, 1] = value
    return rows


class Broken(nn.Module):
    """A classifier whose output goes through a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.net = network()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.net(x))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("a part that is missing")


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(10, 4)
        self.head = nn.Linear(4, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(1))


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


def without_gradient(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach()


@dataclass
class Mistake:
    """One mistake in `fit`: what is passed, and the answer."""

    wrong: str
    error: type[Exception]
    words: tuple[str, ...]
    X: Any = field(default_factory=lambda: X)
    y: Any = field(default_factory=lambda: Y)
    module: nn.Module | None = field(default_factory=network)
    parameters: dict[str, Any] = field(default_factory=dict)


def parameter(name: str, value: Any, *words: str, error: type[Exception] = ValueError) -> Mistake:
    return Mistake(f"{name}={value!r}"[:60], error, (name, *words), parameters={name: value})


PARAMETERS = [
    Mistake("module is a function", ValueError, ("'module'", "torch.nn"), module=len),
    Mistake("module is a class", ValueError, ("'module'", "torch.nn"), module=nn.Linear),
    *(
        parameter(name, value, repr(value) if not isinstance(value, type) else "")
        for name, values in {
            "sparsity_weight": [-0.1, float("nan"), "0.02", None],
            "penalty": ["l2", 0.5, None],
            "score_function": ["entropy", 3, None],
            "tpr": [0, 1, 1.5, "0.95", None],
            "calibration_size": [0, -3, 1.0, 1.5, "all"],
            "pretrain_epochs": [-1, 2.5, "all", None],
            "max_epochs": [-1, 1.5, "10", None],
            "batch_size": [0, -1, 12.5, None],
            "learning_rate": [0, -1e-3, 1e39, "fast", None],
            "momentum": [-0.1, 1, 1.5],
            "weight_decay": [-1e-4, 1e300, "none"],
            "layers": ["first", 0.7, None],
            "preprocess": ["scale", 3],
            "augment": ["flips", 3],
            "ood_label": [1.5],
            **{weight: [-0.5, "0.5"] for weight in FINE_TUNING_TERMS},
            "precision": ["float16", 16],
            "compile": ["yes", 2],
            "num_workers": [-1, 1.5, "all"],
            "memory": [3],
            "random_state": ["seed", -1],
            "verbose": ["loud"],
        }.items()
        for value in values
    ),
    parameter("head", 3),
    parameter("head", "fc", "names no submodule", "linear layers are 0, 3"),
    parameter("head", "0", "is not the head"),
    parameter("device", "gpu", '"cpu"'),
    parameter("device", "cuda:99", '"auto", "cpu"'),
    parameter("device", 3),
]

ROWS = [
    Mistake("NaN", ValueError, ("NaN", "row 41"), X=changed(41, np.nan)),
    Mistake("infinity", ValueError, ("infinity", "row 41"), X=changed(41, np.inf)),
    Mistake(
        "too large",
        ValueError,
        ("too large for float32", "row 7"),
        X=np.where(np.arange(N)[:, None] == 7, 1e300, X.astype(float)),
    ),
    Mistake("no rows", ValueError, ("0 sample(s)",), X=X[:0], y=Y[:0]),
    Mistake("no columns", ValueError, ("0 feature(s)",), X=X[:, :0]),
    Mistake("one row", ValueError, ("n_samples = 1", "at least 2"), X=X[:1], y=Y[:1]),
    Mistake("1-D", ValueError, ("Expected 2D array", "Reshape your data"), X=X[:, 0]),
    Mistake("a number", ValueError, ("Expected 2D array, got scalar",), X=3.0),
    Mistake("None", ValueError, ("Expected 2D array",), X=None),
    Mistake("complex", ValueError, ("Complex data not supported",), X=X + 1j),
    Mistake("complex tensor", ValueError, ("complex64", "real tensor"), X=torch.tensor(X + 1j)),
    Mistake("masked", ValueError, ("masked array", "X.filled"), X=np.ma.masked_less(X, 0)),
    Mistake("sparse", TypeError, ("Sparse data", "dense"), X=scipy.sparse.csr_matrix(X)),
    Mistake("sparse tensor", ValueError, ("sparse", "X.to_dense()"), X=torch.tensor(X).to_sparse()),
    Mistake("paths, no preprocess", ValueError, ("'a.png'", "preprocess="), X=["a.png"] * N),
    Mistake("a table of words", ValueError, ("string",), X=np.full((N, D), "a")),
    Mistake("objects", TypeError, ("float",), X=np.full((N, D), object())),
    Mistake("ragged", ValueError, ("60 values", "preprocess="), X=[[1.0], [1.0, 2.0]] * (N // 2)),
    Mistake(
        "a DataLoader",
        TypeError,
        ("DataLoader", "X.dataset"),
        X=DataLoader(TensorDataset(torch.tensor(X))),
    ),
    Mistake("an iterable data set", TypeError, ("Endless", "map-style"), X=Endless()),
    Mistake(
        "a data set of triples",
        TypeError,
        ("tuples of 3", "x or (x, y)"),
        X=TensorDataset(*[torch.tensor(X)] * 3),
    ),
    Mistake("other width", RuntimeError, ("shapes cannot be multiplied",), X=X[:, :4]),
]

LABELS = [
    Mistake("too few labels", ValueError, ("59 labels for 60 rows",), y=Y[:-1]),
    Mistake("one-hot", ValueError, ("(60, 3)", "argmax"), y=np.eye(K)[Y]),
    Mistake("fractions", ValueError, ("whole|integers",), y=Y + 0.5),
    Mistake("NaN label", ValueError, ("NaN|missing|whole",), y=np.where(Y == 0, np.nan, Y)),
    Mistake("None among labels", ValueError, ("missing|None",), y=[None, *Y[1:].tolist()]),
    Mistake(
        "masked labels",
        ValueError,
        ("masked", "Leave those rows out"),
        y=np.ma.array(Y, mask=Y == 0),
    ),
    Mistake("complex labels", ValueError, ("complex",), y=Y + 1j),
    Mistake("too many classes", ValueError, ("3 logits", "5 distinct labels"), y=np.arange(N) % 5),
    Mistake(
        "negative label",
        ValueError,
        ("3 logits", "-1", "ood_label="),
        y=np.where(Y == 0, -1, Y + 5) * (np.arange(N) > 3) + 0,
    ),
    Mistake(
        "two words for three logits",
        ValueError,
        ("3 logits", "'cat'", "exactly 3"),
        y=np.where(Y == 0, "cat", "dog"),
    ),
    Mistake(
        "ood_label of another kind",
        ValueError,
        ("ood_label='x'", "str"),
        parameters={"ood_label": "x"},
    ),
    Mistake(
        "outlier_weight without outliers",
        ValueError,
        ("outlier_weight=0.5", "ood_label="),
        parameters={"outlier_weight": 0.5},
    ),
    Mistake(
        "only outliers",
        ValueError,
        ("n_samples = 0", "ood_label=1"),
        y=np.ones(N, int),
        parameters={"ood_label": 1},
    ),
]

NETWORKS = [
    Mistake("1-D output", ValueError, ("(8,)", "(n, K)"), module=Broken(lambda z: z[:, 0])),
    Mistake(
        "one logit",
        ValueError,
        ("(8, 1)", "last.out_features = 2"),
        module=network(n_logits=1),
    ),
    Mistake(
        "3-D output", ValueError, ("(8, 3, 1)", "(n, K)"), module=Broken(lambda z: z[..., None])
    ),
    Mistake(
        "numpy output",
        TypeError,
        ("ndarray", "tensor"),
        module=Broken(lambda z: z.detach().numpy()),
    ),
    Mistake("no output", TypeError, ("None", "return", "logits"), module=Broken(lambda z: None)),
    Mistake(
        "dict without logits",
        TypeError,
        ("['scores']", '"logits"'),
        module=Broken(lambda z: {"scores": z}),
    ),
    Mistake(
        "softmax at the end", ValueError, ("probabilities", "logits"), module=network(nn.Softmax(1))
    ),
    Mistake(
        "log-softmax at the end",
        ValueError,
        ("robabilities", "logits"),
        module=network(nn.LogSoftmax(1)),
    ),
    Mistake(
        "a sum after the head",
        HeadNotFoundError,
        ("No classification head",),
        module=Broken(lambda z: z + 1),
    ),
    Mistake(
        "mean over rows",
        ValueError,
        ("(1, 3)", "8 rows"),
        module=Broken(lambda z: z.mean(0, keepdim=True)),
    ),
    Mistake(
        "NaN logits",
        NonFiniteLogitsError,
        ("NaN or infinite logits", "float16"),
        module=Broken(lambda z: z * float("nan")),
        parameters={"head": "net.3"},
    ),
    Mistake(
        "random logits",
        ValueError,
        ("called again", "self.training"),
        module=Broken(lambda z: z + torch.randn_like(z)),
    ),
    Mistake(
        "batch statistics",
        ValueError,
        ("other rows", "track_running_stats"),
        module=nn.Sequential(nn.BatchNorm1d(D, track_running_stats=False), nn.Linear(D, K)),
    ),
    Mistake(
        "no gradient", ValueError, ("gradient", "max_epochs=0"), module=Broken(without_gradient)
    ),
    Mistake(
        "all frozen",
        ValueError,
        ("requires_grad=False", "max_epochs=0"),
        module=network().requires_grad_(False),
    ),
    Mistake("fails inside", KeyError, ("a part that is missing",), module=Failing()),
    Mistake(
        "no linear layer",
        HeadNotFoundError,
        ("No classification head", "a torch.nn.Linear"),
        module=nn.Flatten(),
    ),
    Mistake(
        "images channels last",
        RuntimeError,
        ("channels|expected input",),
        X=IMAGES,
        module=Convolutional(),
    ),
    Mistake(
        "token ids cast to floats",
        RuntimeError,
        ("Long|Int",),
        X=np.ones((N, 4), int),
        module=Tokens(),
    ),
    Mistake("on no device", Exception, ("meta",), module=network().to("meta")),
]

FUNCTIONS = [
    Mistake(
        "preprocess drops rows",
        ValueError,
        ("preprocess turned", "number of rows"),
        parameters={"preprocess": lambda b: b[:1]},
    ),
    Mistake(
        "preprocess gives an array",
        TypeError,
        ("preprocess returned a ndarray", "torch tensor"),
        parameters={"preprocess": lambda b: b.numpy()},
    ),
    Mistake(
        "preprocess fails",
        ZeroDivisionError,
        ("division",),
        parameters={"preprocess": lambda b: 1 / 0},
    ),
    Mistake(
        "preprocess is random",
        ValueError,
        ("called again", "augment="),
        parameters={"preprocess": lambda b: b + torch.randn_like(b)},
    ),
    Mistake(
        "preprocess gives NaN",
        ValueError,
        ("NaN", "row 0"),
        parameters={"preprocess": lambda b: b * float("nan")},
    ),
    Mistake(
        "augment drops rows",
        ValueError,
        ("augment turned",),
        parameters={"augment": lambda b: b[:1]},
    ),
    Mistake(
        "flips of a table", ValueError, ("images", "augment=None"), parameters={"augment": "flip"}
    ),
    Mistake(
        "penalty sums all",
        ValueError,
        ("penalty returned", "dim=1"),
        parameters={"penalty": lambda h: h.sum()},
    ),
    Mistake(
        "penalty counts",
        TypeError,
        ("penalty returned", "floating"),
        parameters={"penalty": lambda h: (h > 0).sum(1)},
    ),
    Mistake(
        "score of no rows",
        (ValueError, TypeError),
        ("score",),
        parameters={"score_function": lambda h, z: 0.0},
    ),
    Mistake(
        "weight that breaks the network",
        DivergenceError,
        ("collapsed|loss is|became NaN", "sparsity_weight (now"),
        parameters={"sparsity_weight": 1e6, "learning_rate": 1e6, "max_epochs": 5},
    ),
]

ALL = [*PARAMETERS, *ROWS, *LABELS, *NETWORKS, *FUNCTIONS]


def state_of(module: Any) -> Any:
    if not isinstance(module, nn.Module):
        return module
    return (
        {name: (t.device, t.clone()) for name, t in module.state_dict().items()},
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )


def assert_same(before: Any, after: Any) -> None:
    if not isinstance(before, tuple):
        assert before is after
        return
    assert before[1:] == after[1:]
    for (device, tensor), (other, same) in zip(before[0].values(), after[0].values(), strict=True):
        assert device == other
        assert device.type == "meta" or torch.equal(tensor, same)


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.wrong)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mistake_in_fit_is_answered_and_changes_nothing(mistake):
    settings = {"max_epochs": 1, "random_state": 0} | mistake.parameters
    detector = SparseEnergyOODDetector(mistake.module, **settings)
    attributes, module = vars(detector).copy(), state_of(mistake.module)
    with pytest.raises(mistake.error) as caught:
        detector.fit(mistake.X, mistake.y)
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    for words in mistake.words:
        assert any(choice in message for choice in words.split("|")), message
    assert vars(detector) == attributes
    assert_same(module, state_of(mistake.module))


@pytest.fixture(scope="module")
def detector():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparseEnergyOODDetector(network(), max_epochs=1, random_state=0).fit(X, Y)


SCORING = [
    ("NaN", changed(41, np.nan), ValueError, "first in row 41"),
    ("no rows", X[:0], ValueError, r"0 sample\(s\)"),
    ("1-D", X[0], ValueError, "Reshape your data"),
    ("other width", X[:, :4], ValueError, "X has 4 features, but .* is expecting 6"),
    ("images", np.zeros((2, 3, 8, 8)), ValueError, r"\(3, 8, 8\).*fitted on rows of shape \(6,\)"),
    ("complex", X + 1j, ValueError, "Complex"),
    ("sparse", scipy.sparse.csr_matrix(X), TypeError, "dense"),
    ("words", ["a", "b"], ValueError, "preprocess="),
    ("other width in a tensor", torch.zeros(2, 4), ValueError, "X has 4 features"),
    ("items of other width", TensorDataset(torch.zeros(2, 4)), ValueError, "X has 4 features"),
]
METHODS = [
    "score_samples",
    "decision_function",
    "predict",
    "p_values",
    "predict_class",
    "predict_class_proba",
    "predict_frame",
    "features",
    "score",
    "calibrate",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("wrong", "rows", "error", "words"), SCORING, ids=[s[0] for s in SCORING])
def test_a_mistake_in_scoring_is_answered_and_changes_nothing(
    detector, method, wrong, rows, error, words
):
    attributes = vars(detector).copy()
    with pytest.raises(error, match=words):
        getattr(detector, method)(rows)
    assert vars(detector) == attributes


@pytest.mark.parametrize("method", METHODS)
def test_scoring_before_fit_says_what_to_call(method):
    with pytest.raises(NotFittedError, match="Call 'fit'"):
        getattr(SparseEnergyOODDetector(network()), method)(X)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.calibrate(X, tpr=1.5), r"'tpr' parameter of calibrate .* Got 1\.5"),
        (lambda d: d.calibrate(X, tpr="high"), "'tpr' parameter of calibrate .* Got 'high'"),
        (lambda d: d.predict_class(X, reject_label=2), "reject_label=2 is one of the classes"),
        (lambda d: d.score(X, Y[:-1]), "59 labels for 60 rows"),
        (lambda d: d.id_accuracy(X), "pass y"),
        (lambda d: d.id_accuracy(X, Y + 7), r"labels \[7, 8, 9\]"),
        (lambda d: d.set_params(ood_label=7).id_accuracy(X, Y * 0 + 7), r"labels \[7\]"),
    ],
)
def test_a_mistake_in_an_argument_is_answered(detector, call, words):
    detector = copy.deepcopy(detector)
    attributes = vars(detector).copy()
    with pytest.raises(ValueError, match=words):
        call(detector)
    attributes["ood_label"] = detector.ood_label
    assert vars(detector) == attributes
