"""Every remedy that a message prints is followed to the letter, and then the call works.

A case is a mistake, a few words of the message that answers it, and what the message says to do.
Where that is code, it is taken out of the message: ``told("X.reshape(-1, 1)", X=...)`` says that
the message quotes this, and gives its value. The last tests read the package: each of its messages
has a case here, or a reason in `ELSEWHERE`.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.metadata
import operator
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from data_sets import Listed
from sklearn.cluster import KMeans
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import DataConversionWarning
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import LocalOutlierFactor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import skood
from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.exceptions import SkoodWarning
from skood.metrics import auroc, detection_report, fpr_at_tpr
from skood.model_selection import (
    AccuracyGuard,
    InDistributionKFold,
    make_ood_scorer,
    surrogate_outliers,
)
from skood.networks import CifarResNet, NormalizeImages, Standardize, default_network
from skood.penalties import get_penalty, l1
from skood.plotting import (
    DetectionRocDisplay,
    DetectionTableDisplay,
    FeatureActivityDisplay,
    ScoreDistributionDisplay,
    SelectionDisplay,
)
from skood.plotting.shared import new_axes
from skood.randomness import random_generator
from skood.scores import Knn, Vim

LONGEST = 400
"""Characters of a message, but for the parts of one that sum up a search."""

PACKAGE = Path(skood.__file__).parent

OURS = (SkoodWarning, DataConversionWarning)
"""Classes of the warnings that skood gives."""


# What a user has


N, D, K = 120, 6, 3
RANDOM = np.random.RandomState(0)
X = RANDOM.randn(N, D).astype(np.float32)
FRESH = RANDOM.randn(80, D).astype(np.float32)
OUTLIERS = (5 * RANDOM.randn(20, D)).astype(np.float32)
IMAGES = RANDOM.rand(60, 3, 8, 8).astype(np.float32)
BYTES = (255 * IMAGES).astype(np.uint8)
IDS = RANDOM.randint(0, 10, (60, 5))


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes the same network at every call."""

    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args, **options)

    return made


@seeded
def network(n_logits: int = K, width: int = D, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, n_logits), *after)


@seeded
def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)
    )


class Changed(nn.Module):
    """A classifier whose output goes through a function, or that is wrapped in another module."""

    def __init__(self, function: Callable[[Any], Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = network() if inner is None else inner
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(self.inner(x))


@seeded
class Body(nn.Module):
    """A classifier with a body and a head, put together by a function."""

    def __init__(self, forward: Callable[..., Any], head: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 8), nn.Linear(8, K) if head is None else head
        self.put_together = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.put_together(self, x)


def right(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.head(self.body(x).relu())


# What a user does


def fit(
    module: nn.Module | None = None, rows: Any = X, y: Any = None, **parameters: Any
) -> SparseEnergyOODDetector:
    """A detector that has been fitted, scores and travels."""
    settings = {
        "max_epochs": 1,
        "pretrain_epochs": 1 if module is None else 0,
        "num_workers": 0,
        "random_state": 0,
    }
    detector = SparseEnergyOODDetector(module, **(settings | parameters)).fit(rows, y)
    scores = detector.score_samples(rows)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > len(scores) / 2
    return detector


def labels_of(module: nn.Module, rows: np.ndarray = X) -> np.ndarray:
    """Labels of which a network gets nine of ten right."""
    with torch.no_grad():
        labels = module(torch.from_numpy(rows)).argmax(dim=1).numpy()
    return np.where(np.arange(len(rows)) % 10 == 0, (labels + 1) % K, labels)


Y = labels_of(network())
KNOWN, KNOWN_Y = np.concatenate([X, OUTLIERS]), np.concatenate([Y, [-1] * len(OUTLIERS)])


@functools.cache
def fitted() -> SparseEnergyOODDetector:
    """A detector to look at, which no case may change."""
    return fit(network(), X, Y).calibrate(FRESH)


# A message, and what it says to do


class Told:
    """A message: called with code that it quotes, it gives the value of this code."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, code: str, /, **names: Any) -> Any:
        assert code in self.message, self.message
        return eval(code, NAMES | names)

    def keywords(self, code: str, **names: Any) -> dict[str, Any]:
        """Arguments that the message quotes, as in ``preprocess=torch.Tensor.long``."""
        assert code in self.message, self.message
        return eval(f"dict({code})", NAMES | names)

    def run(self, code: str, **names: Any) -> dict[str, Any]:
        """What statements that the message quotes leave behind."""
        assert code in self.message, self.message
        exec(code, NAMES | names, names)
        return names

    def says(self, *words: str) -> bool:
        """Whether the message says this; for remedies that are no code."""
        for each in words:
            assert each in self.message, self.message
        return True


NAMES = {"torch": torch, "np": np, "skood": skood, "sklearn": sklearn} | {
    name: value
    for name, value in globals().items()
    if getattr(value, "__module__", "")[:5] == "skood"
}


@dataclass
class Case:
    """A mistake, words of its answer, and the remedies that it names."""

    words: str
    wrong: Callable[[], Any]
    remedies: tuple[Callable[[Told], Any], ...]


def case(words: str, wrong: Callable[[], Any], *remedies: Callable[[Told], Any]) -> Case:
    assert remedies
    return Case(words, wrong, remedies)


def answer_to(mistake: Callable[[], Any]) -> str:
    """What we say of a mistake: the notes to an error, its message, or the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except AssertionError:  # of `fit` here: scores are not sane, after the warnings
            pass
        except Exception as error:
            return "\n".join(getattr(error, "__notes__", [str(error)]))
    return "\n".join(str(w.message) for w in caught if issubclass(w.category, OURS))


def works(remedy: Callable[[], Any]) -> Any:
    """What a remedy gives: no error, and no warning of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in OURS:
            warnings.simplefilter("error", category)
        return remedy()


def check(mistake: Case) -> None:
    """Make a mistake, read the answer, and do what it says."""
    told = Told(answer_to(mistake.wrong))
    assert mistake.words in told.message, told.message
    assert max(map(len, told.message.splitlines())) <= LONGEST, told.message
    for remedy in mistake.remedies:
        works(functools.partial(remedy, told))


@pytest.fixture(autouse=True)
def _same_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where memory= keeps what it keeps
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# Rows


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


class FirstTwo(Dataset):
    """What the message on tuples of three says."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        item = self.items[row]
        x, y = item[0], item[1]
        return x, y


def from_names(names: np.ndarray) -> torch.Tensor:
    """A tensor with as many rows as there are names, such as row7.png."""
    return torch.from_numpy(X[[int(name[3:-4]) for name in names.tolist()]])


def from_dates(dates: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(dates.astype("datetime64[D]").astype(np.float32) / 100)


def with_value(value: float) -> np.ndarray:
    rows = X.astype(np.float64)
    rows[7, 1] = value
    return rows


MASKED = np.ma.masked_less(X, -2)
NAMES_OF_ROWS = [f"row{row}.png" for row in range(N)]
DATES = np.datetime64("2020-01-01") + (100 * np.abs(X)).astype(int)
FLAT = IMAGES.reshape(60, -1)
TRIPLES = [(x, int(y), row) for row, (x, y) in enumerate(zip(X, Y, strict=True))]
COMPLEX = torch.from_numpy(X[:, :3] + 1j * X[:, 3:])
SIZES = [torch.ones(D + row % 2) * torch.rand(1) for row in range(N)]


def impute(told: Told, rows: np.ndarray) -> np.ndarray:
    told.says("sklearn.impute.SimpleImputer")
    from sklearn.impute import SimpleImputer

    return SimpleImputer().fit_transform(rows)


ROWS = [
    case(
        "X is a masked array",
        lambda: fit(network(), MASKED),
        lambda told: fit(network(), told("X.filled(value)", X=MASKED, value=-2.0)),
        lambda told: (
            told.says("leave such rows out") and fit(network(), MASKED[~MASKED.mask.any(axis=1)])
        ),
    ),
    case(
        "X is a DataLoader",
        lambda: fit(network(), DataLoader(TensorDataset(torch.from_numpy(X)))),
        lambda told: fit(
            network(), told("X.dataset", X=DataLoader(TensorDataset(torch.from_numpy(X))))
        ),
    ),
    case(
        "which are no rows of numbers",
        lambda: fit(network(), NAMES_OF_ROWS),
        lambda told: (
            told.says("preprocess=", "an array of them into a tensor with as many rows")
            and fit(network(), NAMES_OF_ROWS, preprocess=from_names)
        ),
    ),
    case(
        "X has rows of shape",
        lambda: fit(convolutions(), IMAGES).score_samples(FLAT),
        lambda told: (
            told.says("an array of shape (n, 3, 8, 8)")
            and fit(convolutions(), IMAGES).score_samples(FLAT.reshape(-1, 3, 8, 8))
        ),
    ),
    case(
        "of which no surrogate outliers are made",
        lambda: fitted().score(Listed(list(X))),
        lambda told: told.says("in an array") and fitted().score(np.stack(Listed(list(X)).items)),
        lambda told: (
            told.says("make_ood_scorer(X_ood=...)")
            and make_ood_scorer(X_ood=OUTLIERS)(fitted(), Listed(list(X)))
        ),
        lambda told: (
            told.says("rows that y labels ood_label")
            and copy.deepcopy(fitted()).set_params(ood_label=-1).score(Listed(list(KNOWN)), KNOWN_Y)
        ),
    ),
    case(
        "which holds no numbers",
        lambda: fit(network(), DATES),
        lambda told: (
            told.says("Convert it to numbers")
            and fit(network(), (DATES - DATES.min()).astype(np.float32) / 100)
        ),
        lambda told: told.says("preprocess=") and fit(network(), DATES, preprocess=from_dates),
    ),
    case(
        "so its rows are empty",
        lambda: fit(nn.Sequential(nn.Flatten(), network()), X.reshape(N, 2, 3)[:, :, :0]),
        lambda told: (
            told.says("at least one value in each")
            and fit(nn.Sequential(nn.Flatten(), network(3, 4)), X.reshape(N, 2, 3)[:, :, :2])
        ),
    ),
    case(
        "X holds images in uint8",
        lambda: fit(convolutions(), BYTES),
        lambda told: fit(
            convolutions(),
            BYTES,
            **told.keywords("preprocess=NormalizeImages(mean, std)", mean=[0.5] * 3, std=[0.2] * 3),
        ),
        lambda told: fit(convolutions(), BYTES, **told.keywords("preprocess=torch.Tensor.float")),
    ),
    case(
        "which is no tensor",
        lambda: fit(network(), Listed(NAMES_OF_ROWS)),
        lambda told: (
            told.says("preprocess=")
            and fit(network(), Listed(NAMES_OF_ROWS), preprocess=from_names)
        ),
    ),
    case(
        "without __len__ and __getitem__",
        lambda: fit(network(), Stream()),
        lambda told: (
            told.says("map-style data set", "torch.utils.data.Dataset with both methods")
            and fit(network(), Listed(list(Stream())))
        ),
        lambda told: (
            told.says("the rows themselves in an array")
            and fit(network(), np.stack(list(Stream())))
        ),
    ),
    case(
        "with 0 rows",
        lambda: fit(network(), Listed([])),
        lambda told: told.says("one with items") and fit(network(), Listed(list(X))),
    ),
    case(
        "X is a tensor of shape",
        lambda: fit(network(width=1), torch.from_numpy(X[:, 0])),
        lambda told: fit(network(width=1), told("X.reshape(-1, 1)", X=torch.from_numpy(X[:, 0]))),
        lambda told: fitted().score_samples(told("X.reshape(1, -1)", X=torch.from_numpy(X[0]))),
        lambda told: fit(network(), told("X.to_dense()", X=torch.from_numpy(X).to_sparse())),
    ),
    *(
        case(
            "Input X contains NaN",
            lambda value=value: fit(network(), with_value(value)),
            lambda told: (
                told.says("in row 7", "Remove such rows")
                and fit(network(), np.delete(with_value(0), 7, axis=0))
            ),
            remedy,
        )
        for value, remedy in [
            (np.nan, lambda told: fit(network(), impute(told, with_value(np.nan)))),
            (
                np.inf,
                lambda told: fit(
                    network(), told("X.clip(low, high)", X=with_value(np.inf), low=-4, high=4)
                ),
            ),
            (
                1e300,
                lambda told: fit(
                    network(), told("X.clip(low, high)", X=with_value(1e300), low=-4, high=4)
                ),
            ),
        ]
    ),
    case(
        "The items of X are tuples of",
        lambda: fit(network(), Listed(TRIPLES)),
        lambda told: (
            told.says("x, y = item[0], item[1]") and fit(network(), FirstTwo(Listed(TRIPLES)))
        ),
    ),
    case(
        "it must return a torch tensor",
        lambda: fit(network(), preprocess=lambda batch: batch.numpy()),
        lambda told: (
            told.says("with the same number of rows")
            and fit(network(), preprocess=lambda batch: torch.from_numpy(batch.numpy()))
        ),
    ),
    case(
        "the number of rows must stay the same",
        lambda: fit(network(), preprocess=lambda row: row[None].flatten(1)),
        lambda told: (
            told.says("called on whole batches")
            and fit(network(), preprocess=lambda batch: batch.flatten(1))
        ),
    ),
    case(
        "called on whole batches, not on single rows",
        lambda: fit(network(), preprocess=lambda row: row.reshape(D)),
        lambda told: (
            told.says("called on whole batches", "(8, 6)")
            and fit(network(), preprocess=lambda batch: batch.reshape(-1, D))
        ),
    ),
    case(
        "the items of X are complex",
        lambda: fit(network(), Listed(list(COMPLEX))),
        lambda told: (
            told.says("real and imaginary parts side by side")
            and fit(
                network(), Listed([torch.cat([z.real, z.imag]) for z in COMPLEX]), num_workers=0
            )
        ),
    ),
    case(
        "The items of X have several shapes",
        lambda: fit(network(), Listed(SIZES)),
        lambda told: (
            told.says("resize, crop or pad") and fit(network(), Listed([x[:D] for x in SIZES]))
        ),
    ),
]


@pytest.mark.parametrize("mistake", ROWS, ids=lambda mistake: mistake.words)
def test_rows(mistake):
    check(mistake)


# Networks


class TwoAtATime(nn.Module):
    """Returns a row for two of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[::2]


class Detection(nn.Module):
    """An object detector: boxes, labels and scores of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = convolutions()[:-1]

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"boxes": h[None], "scores": h[:1].sigmoid()} for h in self.backbone(images)]


class Segmentation(nn.Module):
    """Logits of every pixel: a body, and a last layer that is a convolution."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
        self.last = nn.Conv2d(5, K, kernel, padding=kernel // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(images))


class Tagger(nn.Module):
    """Logits of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(10, 8), nn.ReLU())
        self.last = nn.Linear(8, K)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(ids))


class Signals(Segmentation):
    """Logits of every time, by convolutions over it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(nn.Conv1d(2, 5, 2), nn.ReLU())
        self.last = nn.Conv1d(5, K, 1)


class Averaged(nn.Module):
    """The wrapper of a network with logits at positions, with what the message says it returns."""

    def __init__(self, module: nn.Module, told: Told, code: str) -> None:
        super().__init__()
        assert code in told.message, told.message
        self.body, self.last, self.code = module.body, module.last, code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        return eval(self.code, {"last": self.last, "h": h, "output": self.last(h)})


def with_head(module: nn.Module, *arguments: Any, **parameters: Any) -> SparseEnergyOODDetector:
    """A detector of a network whose head has to be named, as the message says."""
    told = Told(answer_to(lambda: fit(module, *arguments, **parameters)))
    return fit(module, *arguments, **told.keywords('head="last"'), **parameters)


class Pixels(nn.Module):
    """Class probabilities at one place, (n, K, 1, 1), of a network that ends in a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Conv2d(5, K, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(images))


def with_two_logits(told: Told, bias: bool = True) -> None:
    """A network with one output, changed as the message says: it predicts the same."""
    module = network(1).double()
    if not bias:
        module[2].bias = None
    with torch.no_grad():
        p = torch.sigmoid(module(torch.from_numpy(X).double())[:, 0]).numpy()
    code = re.search(r"two = torch.*items\(\)\}\)", told.message)[0]
    module[2] = told.run(code, last=module[2])["two"]
    detector = fit(module, X, p > 0.5, max_epochs=0)
    np.testing.assert_allclose(detector.predict_class_proba(X)[:, 1], p, rtol=1e-5)
    trained = fit(module, X, p > 0.5)
    assert trained.head_ == "2"
    assert trained.features(X).shape == (N, 8)
    travelled = pickle.loads(pickle.dumps(trained))
    assert np.array_equal(travelled.score_samples(X), trained.score_samples(X))


def one_output(*after: nn.Module) -> nn.Module:
    return network(1, D, *after)


SIGNS = np.sign(network()[0].weight[0].detach().numpy())
HUGE = 6e4 * SIGNS * (1 + np.tanh(X) / 100)
LARGE_ROW = np.where(np.arange(N)[:, None] == 41, HUGE, X)

OUTPUTS = [
    *(
        case(
            words,
            lambda module=module: fit(module, X),
            with_two_logits,
            functools.partial(with_two_logits, bias=False),
            *more,
        )
        for words, module, more in [
            (
                "For regression, pass module=None",
                one_output(),
                [lambda told: fit(**told.keywords("module=None"))],
            ),
            ("If it has one output for two classes", one_output(nn.Flatten(0)), []),
            ("returned logits of shape (8, 1)", one_output(nn.Sigmoid()), []),
            (
                "made of the one output of",
                Changed(lambda z: torch.cat([torch.zeros_like(z), z], 1), network(1)),
                [],
            ),
            ("made of the one output of", Changed(lambda z: torch.cat([-z, z], 1), network(1)), []),
        ]
    ),
    case(
        "Return them flat: ",
        lambda: fit(Pixels(), IMAGES),
        lambda told: with_head(Averaged(Pixels(), told, "output.flatten(1)"), IMAGES),
    ),
    case(
        "averages the positions",
        lambda: fit(Segmentation(), IMAGES),
        lambda told: with_head(
            Averaged(Segmentation(), told, "last(h.mean((2, 3), keepdim=True)).flatten(1)"), IMAGES
        ),
    ),
    case(
        "averages the positions",
        lambda: fit(Segmentation(kernel=3), IMAGES),
        lambda told: with_head(
            Averaged(Segmentation(3), told, "last(h.mean((2, 3), keepdim=True)).flatten(1)"), IMAGES
        ),
    ),
    case(
        "last(h.mean(dim=1)) for h (n, positions, d)",
        lambda: fit(Tagger(), IDS, preprocess=torch.Tensor.long),
        lambda told: fit(
            Averaged(Tagger(), told, "last(h.mean(dim=1))"), IDS, preprocess=torch.Tensor.long
        ),
    ),
    case(
        "averages the positions",
        lambda: fit(Signals(), X.reshape(N, 2, 3)),
        lambda told: with_head(
            Averaged(Signals(), told, "last(h.mean((2,), keepdim=True)).flatten(1)"),
            X.reshape(N, 2, 3),
        ),
    ),
    case(
        'or a dict with the key "logits"',
        lambda: fit(Changed(lambda z: {"scores": z})),
        lambda told: (
            told.says("['scores']", "one that returns its logits")
            and fit(Changed(lambda output: output["scores"], Changed(lambda z: {"scores": z})))
        ),
        lambda told: fit(Changed(lambda z: {"logits": z})),
        lambda told: (
            told.says("a tuple whose first element is that tensor")
            and fit(Changed(lambda z: (z, None)))
        ),
    ),
    case(
        "as an object detector",
        lambda: fit(Detection(), IMAGES),
        lambda told: (
            told.says("put a torch.nn.Linear on its backbone", "pretrain_epochs=")
            and fit(
                nn.Sequential(Detection().backbone, nn.Linear(4, K)),
                IMAGES,
                np.arange(60) % K,
                pretrain_epochs=2,
            )
        ),
    ),
    case(
        "one row of logits for each row",
        lambda: fit(TwoAtATime()),
        lambda told: told.says("averages or splits its rows") and fit(TwoAtATime().inner),
    ),
    case(
        "Return the values before argmax",
        lambda: fit(Changed(lambda z: z.argmax(dim=1))),
        lambda told: fit(Changed(lambda z: z)),
    ),
    case(
        "expected floating-point numbers",
        lambda: fit(Changed(lambda z: z.round().long())),
        lambda told: told.says("before argmax or rounding") and fit(network()),
    ),
    case(
        "expected floating-point numbers",
        lambda: fit(statically_quantized(), max_epochs=0),
        lambda told: told.says("as it was before that") and fit(network()),
    ),
    case(
        "moves data to a device of its own",
        lambda: fit(Changed(lambda z: z.to("meta"))),
        lambda told: told.says("Remove .to(...)") and fit(Changed(lambda z: z)),
    ),
    *(
        case(
            "leave out the last",
            lambda layer=layer: fit(network(K, D, layer)),
            lambda told, layer=layer: fit(network(K, D, layer)[:-1]),
            lambda told: told.says("where a loss needs it, apply it there"),
        )
        for layer in (nn.Softmax(1), nn.LogSoftmax(1))
    ),
    case(
        "holds such values: train it anew",
        lambda: fit(broken(network())),
        lambda told: told.says("train it anew, with a lower learning rate") and fit(network()),
    ),
    case(
        "a network in float16 may overflow",
        lambda: fit(network().half(), HUGE, max_epochs=0),
        lambda told: (
            told.says("Check the scale of X") and fit(network().half(), HUGE / 6e4, max_epochs=0)
        ),
        lambda told: (
            told.says("preprocess=")
            and fit(network().half(), HUGE, preprocess=lambda x: x.half() / 6e4, max_epochs=0)
        ),
        lambda told: (
            told.says("a network in float16 may overflow") and fit(network(), HUGE, max_epochs=0)
        ),
    ),
    case(
        "though the row itself is finite",
        lambda: fit(network().half(), LARGE_ROW, max_epochs=0),
        lambda told: (
            told.says("row 41", "Check the scale of X")
            and fit(network().half(), LARGE_ROW.clip(-4, 4), max_epochs=0)
        ),
        lambda told: (
            told.says("a network in float16 may overflow")
            and fit(network(), LARGE_ROW, max_epochs=0)
        ),
    ),
]


def broken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module[2].weight[0, 0] = float("nan")
    return module


def statically_quantized() -> nn.Module:
    """A network with its weights and activations in 8 bits, which forgets to leave them."""
    torch.backends.quantized.engine = "fbgemm"
    module = nn.Sequential(torch.ao.quantization.QuantStub(), *network()).eval()
    module.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare(module)
    prepared(torch.from_numpy(X))
    return torch.ao.quantization.convert(prepared)


@pytest.mark.parametrize("mistake", OUTPUTS, ids=lambda mistake: mistake.words)
def test_outputs(mistake):
    check(mistake)


# Heads


class Made(nn.Module):
    """A network with timm's way to be made without classes, and to be given some."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        self.body = nn.Linear(D, 8)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def reset(told: Told) -> nn.Module:
    module = Made()
    told(
        "network.reset_classifier(K)".removeprefix("network."),
        reset_classifier=module.reset_classifier,
        K=K,
    )
    return module


class Prototypes(nn.Module):
    """A head that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(K, 8))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(h, self.vectors)


class Two(nn.Module):
    """A classifier with two heads on features of their own, put together by a function."""

    def __init__(self, forward: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(D, 8), nn.Linear(D, 8)
        self.first, self.second = nn.Linear(8, K), nn.Linear(8, K)
        self.both = nn.Linear(16, K)
        self.put_together = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.put_together(self, self.left(x).relu(), self.right(x).relu())


def merged(told: Told) -> nn.Module:
    """One layer on the features of both heads, which gives their sum."""
    told.says("concatenates their features and has one torch.nn.Linear on them")
    module = Two(lambda self, a, b: self.both(torch.cat([a, b], dim=1)))
    with torch.no_grad():
        module.both.weight.copy_(torch.cat([module.first.weight, module.second.weight], dim=1))
        module.both.bias.copy_(module.first.bias + module.second.bias)
    return module


def on_positions(pick: Callable[..., torch.Tensor]) -> nn.Module:
    """A classifier of which the head sees several positions, or what a function picks of them."""
    return Body(lambda self, x: pick(self.head, self.body(torch.stack([x, -x], dim=1)).relu()))


def named(told: Told, module: nn.Module, code: str) -> SparseEnergyOODDetector:
    return fit(module, **told.keywords(code))


HEADS = [
    case(
        "names no submodule",
        lambda: fit(network(), head="fc"),
        lambda told: told.says("0, 2", "module.named_modules()") and fit(network(), head="2"),
    ),
    *(
        case(
            "or head=None, which finds it",
            lambda: fit(network(), head="0"),
            lambda told, code=code: named(told, network(), code),
        )
        for code in ('head="2"', "head=None")
    ),
    case(
        "Let forward return what this layer gives",
        lambda: fit(Body(lambda self, x: right(self, x) / 2), head="head"),
        lambda told: told.says("something after it changes them") and fit(Body(right), head="head"),
    ),
    case(
        "so either may be the logits",
        lambda: fit(Body(lambda self, x: ((h := self.body(x)), self.head(h)))),
        lambda told: fit(
            Changed(
                lambda output: told("output[1]", output=output),
                Body(lambda self, x: ((h := self.body(x)), self.head(h))),
            )
        ),
    ),
    case(
        "so it was made without classes",
        lambda: fit(Made()),
        lambda told: fit(Made(**told.keywords("num_classes=K", K=K))),
        lambda told: fit(reset(told)),
    ),
    case(
        "times in one forward",
        lambda: fit(Body(lambda self, x: right(self, x) + right(self, -x))),
        lambda told: (
            told.says("calls its head once")
            and fit(Body(lambda self, x: self.head(self.body(x).relu() + self.body(-x).relu())))
        ),
        lambda told: (
            told.says("or that calls it last for what it returns")
            and fit(Body(lambda self, x: right(self, -x) is not None and right(self, x)))
        ),
    ),
    case(
        "Not its first element but element",
        lambda: fit(Body(lambda self, x: ((h := self.body(x).relu()), self.head(h)))),
        lambda told: fit(
            Changed(
                lambda output: told("output[1]", output=output),
                Body(lambda self, x: ((h := self.body(x).relu()), self.head(h))),
            )
        ),
    ),
    case(
        "first element does not come from a linear layer",
        lambda: fit(Body(lambda self, x: ((h := self.body(x).relu()), self.head(h)), Prototypes())),
        lambda told: (
            told.says("Wrap the module in one that returns the logits alone")
            and fit(
                Changed(
                    operator.itemgetter(1),
                    Body(lambda self, x: ((h := self.body(x).relu()), self.head(h)), Prototypes()),
                ),
                head="inner.head",  # as the next message says
            )
        ),
    ),
    case(
        "no linear layer gives the logits",
        lambda: fit(Body(right, Prototypes())),
        lambda told: named(told, Body(right, Prototypes()), 'head="head"'),
    ),
    case(
        "so no one layer gives them",
        lambda: fit(Two(lambda self, a, b: self.first(a) + self.second(b))),
        lambda told: (
            told.says("returns the output of one of them")
            and fit(Two(lambda self, a, b: self.first(a)))
        ),
        lambda told: fit(merged(told)),
    ),
    *(
        case(
            "is applied at every position",
            lambda pick=pick: fit(on_positions(pick)),
            lambda told, code=code: fit(
                on_positions(lambda head, hidden: told(code, head=head, hidden=hidden))
            ),
        )
        for pick, code in [
            (lambda head, hidden: head(hidden)[:, -1], "head(hidden[:, -1])"),
            (lambda head, hidden: head(hidden).mean(dim=1), "head(hidden.mean(dim=1))"),
        ]
    ),
    *(
        case(
            "is not what its linear layer",
            lambda after=after: fit(Body(lambda self, x: after(right(self, x)))),
            lambda told: told.says("return what the layer gives") and fit(Body(right)),
        )
        for after in (torch.sigmoid, lambda z: z / 2, lambda z: z[:, :2])
    ),
    case(
        "If forward computes the logits itself",
        lambda: fit(Body(lambda self, x: F.linear(self.body(x).relu(), self.head.weight))),
        lambda told: (
            told.says("make that a submodule, a torch.nn.Linear, and call it as layer(h)")
            and fit(Body(right))
        ),
    ),
    case(
        "forward calls no torch.nn.Linear",
        lambda: fit(Body(lambda self, x: self.head.forward(self.body.forward(x).relu()))),
        lambda told: told.says("call it as layer(h)") and fit(Body(right)),
    ),
    case(
        "forward calls no torch.nn.Linear",
        lambda: fit(convolutions()[:-1], IMAGES),  # features alone
        lambda told: (
            told.says("A network of features alone needs one after them")
            and fit(
                nn.Sequential(*convolutions()[:-1], nn.Linear(4, K)),
                IMAGES,
                np.arange(60) % K,
                pretrain_epochs=1,
            )
        ),
    ),
    case(
        "is not affine in its features",
        lambda: fit(Body(right, Prototypes()), head="head", score_function="react"),
        lambda told: (
            told.says("Pass head= the last linear layer")
            and fit(Body(right), head="head", score_function="react")
        ),
        lambda told: (
            told.says("or another score")
            and fit(Body(right, Prototypes()), head="head", score_function="msp")
        ),
    ),
]


@pytest.mark.parametrize("mistake", HEADS, ids=lambda mistake: mistake.words)
def test_heads(mistake):
    check(mistake)


# What a network does, in evaluation and in training


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.script(module.eval())


class Sizes(nn.Module):
    """Reads the number of rows where it is traced, or at each call, as the message says."""

    def __init__(self, told: Told | None = None) -> None:
        super().__init__()
        self.inner, self.told = network(), told

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n_rows = 8 if self.told is None else self.told("x.shape[0]", x=x)
        return self.inner(x.reshape(n_rows, D))


class Dropping(nn.Module):
    """A classifier that forgets to switch its dropout off, or does what the message says."""

    def __init__(self, told: Told | None = None) -> None:
        super().__init__()
        self.inner, self.told, self.p = network(), told, 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.told is None:
            return self.inner(F.dropout(x, self.p))
        names = {"F": F, "self": self, "x": x, "p": self.p}
        return self.inner(self.told("F.dropout(x, p, training=self.training)", **names))


class Otherwise(nn.Module):
    """A classifier that answers otherwise in training mode."""

    def __init__(self, in_training: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.head, self.other = nn.Linear(D, 8), nn.Linear(8, K), nn.Linear(8, K)
        self.in_training = in_training

    def forward(self, x: torch.Tensor) -> Any:
        h = self.body(x).relu()
        return self.in_training(self, h) if self.training else self.head(h)


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})


def on_meta() -> nn.Module:
    return network().to("meta")


def loaded(told: Told) -> nn.Module:
    module = told('module.to_empty(device="cpu")', module=on_meta())
    told.says("module.load_state_dict(...)")
    module.load_state_dict(network().state_dict())
    return module


def with_frozen_body(told: Told | None = None) -> nn.Module:
    module = network()
    module[:2].requires_grad_(told is not None)
    return module


ALIKE = X[:1] + np.array([[0], [0.001]], dtype=np.float32)
"""Two rows of one class, of which only one is trained on."""

AS_IT_IS = "max_epochs=0"

NETWORKS = [
    case(
        "compile=True cannot compile",
        lambda: fit(scripted(network()), max_epochs=0, compile=True),
        lambda told: fit(scripted(network()), max_epochs=0, **told.keywords("compile=False")),
    ),
    case(
        "is on the meta device",
        lambda: fit(on_meta()),
        lambda told: fit(loaded(told)),
    ),
    case(
        "dynamically quantized layers",
        lambda: fit(quantized_dynamically(), max_epochs=0),
        lambda told: told.says("The network before quantization") and fit(network(), max_epochs=0),
    ),
    case(
        "TorchScript hides its layers",
        lambda: fit(scripted(network()), head="2", max_epochs=0),
        lambda told: told.says("the nn.Module from which it was made") and fit(network(), head="2"),
        lambda told: fit(
            scripted(network()), **told.keywords("head=None"), **told.keywords(AS_IT_IS)
        ),
    ),
    case(
        "which of them are the logits cannot be told",
        lambda: fit(scripted(Pair()), max_epochs=0),
        lambda told: (
            told.says("Wrap the module in one that returns its logits alone")
            and fit(Changed(operator.itemgetter(1), scripted(Pair())), max_epochs=0)
        ),
    ),
    case(
        "so there are no features",
        lambda: fit(scripted(network())),
        lambda told: told.says("the nn.Module from which it was made") and fit(network()),
        lambda told: [
            fit(
                scripted(network()),
                **told.keywords("max_epochs=0"),
                **told.keywords("pretrain_epochs=0"),
                score_function=score,
            )
            for score in re.findall(r'"(\w+)"', told.message)
        ],
    ),
    case(
        "which cannot be trained",
        lambda: fit(nn.Sequential(scripted(network()[:2]), network()[2])),
        lambda told: (
            told.says("the nn.Module from which it was made")
            and fit(nn.Sequential(network()[:2], network()[2]))
        ),
        lambda told: fit(
            nn.Sequential(scripted(network()[:2]), network()[2]), **told.keywords(AS_IT_IS)
        ),
    ),
    case(
        "The logits carry no gradient",
        lambda: fit(network().requires_grad_(False)),
        lambda told: (
            told.says("Unfreeze parameters")
            and fit(network().requires_grad_(False).requires_grad_(True))
        ),
        lambda told: fit(network().requires_grad_(False), **told.keywords(AS_IT_IS)),
        lambda told: fit(WithoutGradient(), **told.keywords(AS_IT_IS)),
        lambda told: told.says("remove what cuts, ") and fit(WithoutGradient().inner),
    ),
    case(
        "In training mode the module does not return what its head",
        lambda: fit(Otherwise(lambda self, h: self.head(h).softmax(dim=1))),
        lambda told: (
            told.says("make its forward return the same in both modes")
            and fit(Otherwise(lambda self, h: self.head(h)))
        ),
    ),
    case(
        "In training mode the module does not call its head",
        lambda: fit(Otherwise(lambda self, h: self.other(h)), ALIKE),
        lambda told: (
            told.says("Make its forward call it in both modes")
            and fit(Otherwise(lambda self, h: self.head(h)), ALIKE)
        ),
    ),
    case(
        "in evaluation mode, but",
        lambda: fit(Otherwise(lambda self, h: self.head(h)[:, :2]), ALIKE),
        lambda told: (
            told.says("Make its forward return the same in both")
            and fit(Otherwise(lambda self, h: self.head(h)), ALIKE)
        ),
    ),
    case(
        "can be trained: its features carry no gradient",
        lambda: fit(with_frozen_body()),
        lambda told: told.says("Unfreeze the body") and fit(with_frozen_body(told)),
        lambda told: (
            told.says("remove the torch.no_grad or .detach() before the head")
            and fit(Body(lambda self, x: self.head(self.body(x).relu())))
        ),
        lambda told: fit(with_frozen_body(), **told.keywords("sparsity_weight=0")),
    ),
    case(
        "gives other logits for the same rows when called again",
        lambda: fit(Dropping()),
        lambda told: fit(Dropping(told)),
        lambda told: told.says("or pass it as augment=") and fit(network(), augment=F.dropout),
    ),
    case(
        "Let forward read the number of rows",
        lambda: fit(Sizes()),
        lambda told: fit(Sizes(told)),
        lambda told: (
            told.says("and trace a module with that")
            and fit(torch.jit.trace(Sizes(told).eval(), torch.ones(8, D)), max_epochs=0)
        ),
    ),
    case(
        "depend on the other rows of its batch",
        lambda: fit(nn.Sequential(nn.BatchNorm1d(D, track_running_stats=False), *network())),
        lambda told: (
            told.says("Use statistics fixed at training time")
            and fit(nn.Sequential(nn.BatchNorm1d(D), *network()))
        ),
    ),
    case(
        "depend on the other rows of its batch",
        lambda: fit(network(), preprocess=lambda batch: batch - batch.mean(dim=0)),
        lambda told: (
            told.says("Use statistics fixed at training time")
            and fit(network(), preprocess=lambda batch: batch - X.mean(axis=0))
        ),
    ),
]


class Pair(nn.Module):
    """A network that returns features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 8), nn.Linear(8, K)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x).relu()
        return h, self.head(h)


@pytest.mark.parametrize("mistake", NETWORKS, ids=lambda mistake: mistake.words)
def test_networks(mistake):
    check(mistake)


class Inferring(nn.Module):
    """A classifier whose body runs in a context."""

    def __init__(self, context: Callable[[], Any] = torch.inference_mode) -> None:
        super().__init__()
        self.body, self.head, self.context = nn.Linear(D, 8), nn.Linear(8, K), context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context():
            h = self.body(x).relu()
        return self.head(h)


class Elsewhere(nn.Module):
    """Keeps a tensor as a plain attribute, or in a buffer."""

    def __init__(self, registered: bool = False) -> None:
        super().__init__()
        self.inner = network()
        if registered:
            self.register_buffer("scale", torch.ones(D))
        else:
            self.scale = torch.ones(D, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.addcmul(x, x, self.scale) / 2)


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(20, K))


LAST = np.moveaxis(IMAGES, 1, 3)
MEAN, STD = [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]

NOTES = [
    *(
        case(
            "a network on token ids takes them with",
            lambda ids=ids: fit(embedding(), ids),
            lambda told, ids=ids: fit(
                embedding(), ids, **told.keywords("preprocess=torch.Tensor.long")
            ),
        )
        for ids in (IDS, IDS.astype(float), torch.from_numpy(IDS), IDS.tolist())
    ),
    case(
        "The batch looks like images with channels last",
        lambda: fit(convolutions(), LAST),
        lambda told: fit(convolutions(), told("np.moveaxis(X, 3, 1)", X=LAST)),
        lambda told: fit(
            convolutions(),
            LAST,
            **told.keywords(
                "preprocess=skood.networks.NormalizeImages(mean, std)", mean=MEAN, std=STD
            ),
        ),
    ),
    case(
        "The batch looks like images with channels last",
        lambda: fit(convolutions(), 4 * LAST - 2),
        lambda told: fit(convolutions(), told("np.moveaxis(X, 3, 1)", X=4 * LAST - 2)),
    ),
    case(
        "It has 2-D convolutions",
        lambda: fit(convolutions(), FLAT),
        lambda told: fit(
            convolutions(), told("X.reshape(n, c, h, w)", X=FLAT, n=60, c=3, h=8, w=8)
        ),
    ),
    case(
        "It has 2-D convolutions",
        lambda: fit(gray(), IMAGES[:, 0]),
        lambda told: fit(gray(), told("X[:, None]", X=IMAGES[:, 0])),
    ),
    case(
        "channels, and the batch has 1",
        lambda: fit(convolutions(), IMAGES[:, :1]),
        lambda told: fit(convolutions(), told("np.repeat(X, 3, axis=1)", X=IMAGES[:, :1])),
    ),
    case(
        "channels, and the batch has",
        lambda: fit(convolutions(), IMAGES[:, [0, 1, 2, 0]]),
        lambda told: fit(convolutions(), told("X[:, :3]", X=IMAGES[:, [0, 1, 2, 0]])),
    ),
    case(
        "runs under torch.inference_mode()",
        lambda: fit(Inferring()),
        lambda told: told.says("remove it") and fit(Inferring(nullcontext)),
        lambda told: fit(Inferring(), **told.keywords("max_epochs=0")),
    ),
    case(
        "Tensors kept as plain attributes stay where they were",
        lambda: fit(Elsewhere()),
        lambda told: told.says("use register_buffer") and fit(Elsewhere(registered=True)),
    ),
    case(
        "pass a function that makes it as preprocess=",
        lambda: fit(network(), X[:, :4]),
        lambda told: (
            told.says("(8, 4)", "pass a function that makes it as preprocess=")
            and fit(network(), X[:, :4], preprocess=lambda batch: F.pad(batch, (0, 2)))
        ),
    ),
]


def gray() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, K))


@pytest.mark.parametrize("mistake", NOTES, ids=lambda mistake: mistake.words)
def test_notes(mistake):
    check(mistake)


# Labels


ONE_HOT = np.eye(K)[Y]
WORDS = np.array(["ant", "bee", "cat"])[Y]
MASKED_Y = np.ma.array(Y, mask=np.arange(N) < 3)
ORDERED = np.argsort(Y, kind="stable")


def detector(**parameters: Any) -> SparseEnergyOODDetector:
    """A detector that is not fitted."""
    settings = {"module": network(), "max_epochs": 0, "random_state": 0}
    return SparseEnergyOODDetector(**(settings | parameters))


def search(
    estimator: Any, cv: Any, scoring: Any = None, rows: Any = X, y: Any = Y, **options: Any
) -> GridSearchCV:
    """A small search, done."""
    grid = {} if isinstance(estimator, IsolationForest) else {"tpr": [0.9]}
    options = {"error_score": "raise"} | options
    return GridSearchCV(estimator, grid, cv=cv, scoring=scoring, **options).fit(rows, y)


def to_indices(told: Told) -> np.ndarray:
    told.says("Map y to logit indices")
    return np.searchsorted([10, 20, 30], (Y + 1) * 10)


LABELS = [
    case(
        "Turn one-hot or multi-label rows into one label each",
        lambda: fit(network(), y=ONE_HOT),
        lambda told: fit(network(), y=told("y.argmax(axis=1)", y=ONE_HOT)),
        lambda told: fit(network(), y=told("y.argmax(axis=1)", y=torch.from_numpy(ONE_HOT))),
    ),
    case(
        "y is a masked array",
        lambda: fit(network(), y=MASKED_Y),
        lambda told: (
            told.says("Leave those rows out of X and y")
            and fit(network(), X[~MASKED_Y.mask], MASKED_Y[~MASKED_Y.mask])
        ),
        lambda told: fit(network(), y=told("y.filled(label)", y=MASKED_Y, label=1)),
    ),
    case(
        "Complex data not supported: y has dtype",
        lambda: fit(network(), y=Y + 0j),
        lambda told: told.says("Pass the class of each row") and fit(network(), y=Y),
    ),
    case(
        "pass one label a row",
        lambda: fit(network(), y=Y[:-1]),
        lambda told: told.says("119 labels for 120 rows") and fit(network(), y=Y),
    ),
    case(
        "labels are integers, strings or booleans. Encode them first",
        lambda: fit(network(), y=WORDS.astype("S")),
        lambda told: fit(
            network(),
            y=told("sklearn.preprocessing.LabelEncoder")().fit_transform(WORDS.astype("S")),
        ),
    ),
    case(
        "so no row can carry it",
        lambda: fit(network(), KNOWN, KNOWN_Y, ood_label="outlier"),
        lambda told: (
            told.says("a label of the kind of y") and fit(network(), KNOWN, KNOWN_Y, ood_label=-1)
        ),
    ),
    case(
        "distinct labels: ",
        lambda: fit(network(), KNOWN, np.where(KNOWN_Y < 0, -1, 10 * (KNOWN_Y + 1))),
        lambda told: fit(network(), y=to_indices(told)),
        lambda told: fit(
            network(),
            KNOWN,
            np.where(KNOWN_Y < 0, -1, 10 * (KNOWN_Y + 1)),
            ood_label=-1 if told.says("with ood_label=") else None,
        ),
        lambda told: told.says("or exactly 3 distinct values") and fit(network(), y=WORDS),
    ),
    case(
        "distinct labels: ",
        lambda: search(detector(), KFold(3), rows=X[ORDERED], y=WORDS[ORDERED]),
        lambda told: search(
            detector(),
            rows=X[ORDERED],
            y=WORDS[ORDERED],
            **told.keywords("cv=InDistributionKFold()"),
        ),
    ),
    case(
        "so there is nothing to learn from",
        lambda: fit(rows=np.ones((60, D))),
        lambda told: told.says("Pass rows that differ") and fit(rows=X),
    ),
    case(
        "y mixes labels of the types",
        lambda: fit(network(), y=[None, *Y[1:].tolist()]),
        lambda told: (
            told.says("labels of one kind, without missing values")
            and fit(network(), X[1:], Y[1:].tolist())
        ),
        lambda told: told.says("None for all rows") and fit(network(), y=None),
    ),
    case(
        "y contains NaN or infinity",
        lambda: fit(network(), y=np.where(np.arange(N) < 3, np.nan, Y)),
        lambda told: told.says("remove the rows without a label") and fit(network(), X[3:], Y[3:]),
        lambda told: fit(network(), **told.keywords("y=None")),
    ),
    case(
        "y holds fractional or huge values",
        lambda: fit(y=X[:, 0]),
        lambda told: fit(y=told("np.digitize(y, edges)", y=X[:, 0], edges=[-0.5, 0.5])),
        lambda told: fit(**told.keywords("y=None")),
    ),
    case(
        "id_accuracy needs labels",
        lambda: fitted().id_accuracy(X),
        lambda told: (
            told.says("pass y, one label of `classes_` a row")
            and fitted().id_accuracy(X, fitted().classes_[Y])
        ),
    ),
    case(
        "id_accuracy got y with the labels",
        lambda: fitted().id_accuracy(X, Y + 7),
        lambda told: told.says("those of the classifier, [0, 1, 2]") and fitted().id_accuracy(X, Y),
    ),
    *(
        case(
            "is one of the classes",
            lambda wrong=wrong: wrong(2),
            lambda told, wrong=wrong: told.says("pass a label that no class has") and wrong(-1),
        )
        for wrong in (
            lambda label: fitted().predict_class(X, reject_label=label),
            lambda label: (
                RejectingClassifier(detector(), reject_label=label).fit(X, Y).predict_proba(X)
            ),
        )
    ),
    case(
        "If y gives it to known outliers",
        lambda: RejectingClassifier(detector()).fit(KNOWN, KNOWN_Y),
        lambda told: RejectingClassifier(detector(**told.keywords("ood_label=-1"))).fit(
            KNOWN, KNOWN_Y
        ),
    ),
    case(
        "so no metric can compare predictions with y",
        lambda: RejectingClassifier(detector()).fit(X, WORDS),
        lambda told: RejectingClassifier(detector(), reject_label=told('"rejected"')).fit(X, WORDS),
        lambda told: (
            told.says("an int such as -1 beside integers")
            and RejectingClassifier(detector(), reject_label=-1).fit(X, Y)
        ),
    ),
    case(
        "so no metric can compare predictions with y",
        lambda: RejectingClassifier(detector(module=network(2))).fit(X, X[:, 0] > 0),
        lambda told: (
            told.says("turn booleans into integers")
            and RejectingClassifier(detector(module=None, pretrain_epochs=1)).fit(
                X, (X[:, 0] > 0).astype(int)
            )
        ),
    ),
    case(
        "RejectingClassifier requires y to be passed",
        lambda: RejectingClassifier(detector()).fit(X, None),
        lambda told: (
            told.says("Pass one label a row") and RejectingClassifier(detector()).fit(X, Y)
        ),
        lambda told: told.says("use the detector alone") and detector().fit(X),
    ),
    case(
        "A column-vector y was passed",
        lambda: RejectingClassifier(detector()).fit(X, Y[:, None]),
        lambda told: RejectingClassifier(detector()).fit(X, told("y.ravel()", y=Y[:, None])),
    ),
    case(
        "pass rows of at least 2, or use the detector alone",
        lambda: RejectingClassifier(detector()).fit(X, np.zeros(N, int)),
        lambda told: RejectingClassifier(detector()).fit(X, Y),
        lambda told: detector().fit(X, np.zeros(N, int)),
    ),
    case(
        "which the fitted detector does not have",
        lambda: RejectingClassifier(FrozenEstimator(fitted())).fit(X, Y + 5),
        lambda told: (
            told.says("Pass the labels that the detector was fitted on")
            and RejectingClassifier(FrozenEstimator(fitted())).fit(X, Y)
        ),
        lambda told: (
            told.says("a detector that is not frozen")
            and RejectingClassifier(detector()).fit(X, Y + 5)
        ),
    ),
]


@pytest.mark.parametrize("mistake", LABELS, ids=lambda mistake: mistake.words)
def test_labels(mistake):
    check(mistake)


# Training


def diverge(**parameters: Any) -> SparseEnergyOODDetector:
    return fit(network(), X, Y, max_epochs=3, **parameters)


def lowered(told: Told, name: str, value: float) -> dict[str, float]:
    """A parameter that the message names, lower than it is now."""
    now = re.search(rf"{name} \(now (\S+)\)", told.message)
    assert float(now[1]) > value, told.message
    return {name: value}


class Crowded(nn.Module):
    """Has memory for a few rows at a time."""

    def __init__(self, most: int = 16) -> None:
        super().__init__()
        self.inner, self.most = network(), most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


@seeded
def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, K))


def permuted(order: list[int], module: nn.Module | None = None) -> nn.Module:
    """A network with its logits in another order."""
    module = network() if module is None else module
    with torch.no_grad():
        module[2].weight.copy_(module[2].weight[order])
        module[2].bias.copy_(module[2].bias[order])
    return module


def steps(**parameters: Any) -> SparseEnergyOODDetector:
    """Fine-tuning that harms a network that was right."""
    settings = {"max_epochs": 5, "learning_rate": 0.02, "sparsity_weight": 5.0}
    return fit(network(), X, network_labels(), **(settings | parameters))


def network_labels() -> np.ndarray:
    with torch.no_grad():
        return network()(torch.from_numpy(X)).argmax(dim=1).numpy()


def predicted(fitted: SparseEnergyOODDetector) -> np.ndarray:
    """Predictions, with which doubts of the threshold are told."""
    return fitted.predict(X)


TRAINING = [
    case(
        "steps of one row, on which batch-norm cannot train",
        lambda: fit(normalised(), batch_size=1),
        lambda told: told.says("batch_size of at least 2") and fit(normalised(), batch_size=32),
    ),
    case(
        "steps of one row, on which batch-norm cannot train",
        lambda: fit(normalised(), ALIKE),
        lambda told: told.says("and more rows") and fit(normalised()),
    ),
    *(
        case(
            words,
            lambda wrong=wrong: diverge(**wrong),
            lambda told, wrong=wrong, name=name, value=value: diverge(
                **(wrong | lowered(told, name, value))
            ),
        )
        for words, wrong, name, value in [
            ("The loss is", {"sparsity_weight": 1e38}, "sparsity_weight", 0.02),
            ("The logits became NaN", {"learning_rate": 1e30}, "learning_rate", 1e-3),
            (
                "The scores collapsed",
                {"sparsity_weight": 1e3, "batch_size": 16},
                "sparsity_weight",
                0.02,
            ),
            (
                "The scores collapsed",
                {"sparsity_weight": 1e3, "batch_size": 16},
                "learning_rate",
                1e-9,
            ),
        ]
    ),
    case(
        "check that X is on the scale that the network expects",
        lambda: fit(network(), 1e30 * X),
        lambda told: fit(network(), X),
    ),
    case(
        "has no memory for a training step",
        lambda: fit(Crowded(), batch_size=32),
        lambda told: (
            told.says("at batch_size=32", "pass a smaller one") and fit(Crowded(), batch_size=16)
        ),
    ),
    case(
        "memory= keeps nothing while random_state=None",
        lambda: fit(network(), memory="unused", random_state=None),
        lambda told: (
            told.says("Pass an int as random_state")
            and fit(network(), memory="unused", random_state=0, max_epochs=0)
        ),
    ),
    *(
        case(
            "needs known outliers, and there are none",
            lambda settings=settings: fit(network(), KNOWN[:N], Y, outlier_weight=0.5, **settings),
            remedy,
            lambda told, settings=settings: fit(
                network(), X, Y, **settings, **told.keywords("outlier_weight=0")
            ),
        )
        for settings, remedy in [
            (
                {},
                lambda told: (
                    told.says("Pass ood_label=, their label in y")
                    and fit(network(), KNOWN, KNOWN_Y, outlier_weight=0.5, ood_label=-1)
                ),
            ),
            (
                {"ood_label": -1},
                lambda told: (
                    told.says("Label some rows of y with ood_label=-1")
                    and fit(network(), KNOWN, KNOWN_Y, outlier_weight=0.5, ood_label=-1)
                ),
            ),
        ]
    ),
    case(
        "fit got n_samples",
        lambda: fit(network(), X[:1], Y[:1]),
        lambda told: told.says("needs at least 2") and fit(network(), ALIKE, max_epochs=0),
    ),
    case(
        "of n_samples = ",
        lambda: fit(network(), X, Y, calibration_size=118),
        lambda told: told.says("only 117 are free") and fit(network(), X, Y, calibration_size=117),
        lambda told: (
            told.says("Pass more rows")
            and fit(network(), np.concatenate([X, X + 1]), np.tile(Y, 2), calibration_size=118)
        ),
        lambda told: (
            told.says("or None, and call calibrate(X) on fresh rows")
            and predicted(fit(network(), X, Y, calibration_size=None).calibrate(FRESH))
        ),
    ),
    case(
        "need batches of images, (n, c, h, w) or (n, h, w)",
        lambda: fit(network(), augment="flip"),
        lambda told: fit(network(), **told.keywords("augment=None")),
        lambda told: (
            told.says("or a callable on a batch")
            and fit(network(), augment=lambda batch: batch + 0.01)
        ),
    ),
    case(
        "it must return one value per row, a tensor of shape",
        lambda: fit(network(), penalty=lambda h: h.abs().sum()),
        lambda told: fit(network(), penalty=lambda h: h.abs().sum(**told.keywords("dim=1"))),
    ),
    case(
        "it must return floating ones",
        lambda: fit(network(), penalty=lambda h: (h > 0).sum(dim=1)),
        lambda told: fit(network(), penalty=lambda h: h.sigmoid().sum(dim=1)),
    ),
    case(
        "so it cannot be divided by it",
        lambda: fit(nn.Sequential(Zero(), network()[2]), penalty="relative_l1"),
        lambda told: fit(nn.Sequential(Zero(0.1), network()[2]), **told.keywords('penalty="l1"')),
        lambda told: told.says("check the network") and fit(network(), penalty="relative_l1"),
    ),
    *(
        case(
            words,
            lambda wrong=wrong: get_penalty(wrong),
            lambda told: told.says("'l1', 'l1_over_l2', 'relative_l1'") and get_penalty("l1"),
            lambda told: (
                told.says("a callable from features (n, d) to values (n,)")
                and get_penalty(lambda h: h.abs().sum(dim=1))
            ),
        )
        for words, wrong in [("is unknown; pass", "l2"), (", not a penalty; pass", 0.5)]
    ),
    case(
        "The fit of penalty=",
        lambda: fit(network(), penalty=Fitted(3)),
        lambda told: (
            told.says("nothing or the fitted penalty, a callable from features (n, d)")
            and fit(network(), penalty=Fitted(None))
            and fit(network(), penalty=Fitted(l1))
        ),
    ),
    *(
        case(
            "hardly better than chance",
            lambda: fit(network(), X, labels_of(permuted([1, 2, 0]))),
            remedy,
        )
        for remedy in (
            lambda told: (
                told.says("in another order than the logits")
                and fit(permuted([1, 2, 0]), X, labels_of(permuted([1, 2, 0])))
            ),
            lambda told: (
                told.says("(pretrain_epochs=)")
                and fit(network(), X, labels_of(permuted([1, 2, 0])), pretrain_epochs=20)
            ),
        )
    ),
    case(
        "hardly better than chance",
        lambda: fit(network(), -X, Y),
        lambda told: told.says("(preprocess=)") and fit(network(), -X, Y, preprocess=torch.neg),
    ),
    case(
        "so it was probably trained on them",
        lambda: predicted(fit(network(), X, network_labels(), max_epochs=0)),
        lambda told: predicted(
            fit(network(), X, network_labels(), max_epochs=0).calibrate(FRESH)
            if told.says("calibrate(X_fresh) after fit")
            else None
        ),
    ),
    case(
        "The threshold was placed on the training rows",
        lambda: predicted(fit(network(), calibration_size=None)),
        lambda told: (
            told.says("calibrate(X_fresh) after fit")
            and predicted(fit(network(), calibration_size=None).calibrate(FRESH))
        ),
    ),
    case(
        "The threshold was placed on the training rows",
        lambda: rejecting().predict(X),
        lambda told: (
            told.says("detector_.calibrate of a RejectingClassifier")
            and (classifier := rejecting()).detector_.calibrate(FRESH)
            and classifier.predict(X)
        ),
    ),
    *(
        case(
            "Fine-tuning took the accuracy",
            steps,
            lambda told, change=change: told.says(*change) and steps(**change),
        )
        for change in ({"sparsity_weight": 0.01}, {"learning_rate": 1e-4}, {"max_epochs": 0})
    ),
]


class Zero(nn.Module):
    """Features that are all zero, or nearly so."""

    def __init__(self, scale: float = 0.0) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(D, 8), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x)


class Fitted:
    """A penalty whose fit returns something."""

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return l1(features)

    def fit(self, features: torch.Tensor) -> Any:
        return self.returned


def rejecting() -> RejectingClassifier:
    return RejectingClassifier(detector(calibration_size=None)).fit(X, Y)


@pytest.mark.parametrize("mistake", TRAINING, ids=lambda mistake: mistake.words)
def test_training(mistake):
    check(mistake)


# Scores


@seeded
def one_feature() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 1), nn.Linear(1, K))


class Gradient:
    """A score that moves the input, in one way or another."""

    uses_features, uses_gradient = False, True

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        if step is not None:
            self.perturbation = lambda logits, batch: step(batch)

    def __call__(self, features: None, logits: torch.Tensor) -> torch.Tensor:
        return logits.logsumexp(dim=1)


def judged(module: nn.Module | None = None, score: Any = "energy", **options: Any) -> Any:
    """A network as it is, judged by a score."""
    module = network() if module is None else module
    return fit(module, score_function=score, **({"max_epochs": 0} | options))


def few_rows() -> SparseEnergyOODDetector:
    return judged(score="mahalanobis", rows=X[:9], calibration_size=None)


class Constant(nn.Module):
    """Features that are the same for all rows but for the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[2](torch.ones_like(self.inner[:2](x)))


ANOTHER = "Pass another score"

SCORES = [
    *(
        case(
            words,
            lambda wrong=wrong: judged(score=wrong),
            lambda told: told.says("'energy'", "'knn'") and judged(score="knn"),
            lambda told: told.says("an object from skood.scores") and judged(score=Knn(5)),
            lambda told: (
                told.says("a callable of (features, logits)")
                and judged(score=lambda features, logits: logits.amax(dim=1))
            ),
        )
        for words, wrong in [("is unknown; pass", "entropy"), ("is not callable on a batch", Knn)]
    ),
    case(
        "expected one value per row, a tensor",
        lambda: judged(score=lambda features, logits: logits),
        lambda told: judged(score=lambda features, logits: logits.amax(dim=1)),
    ),
    case(
        "returned complex values; expected real ones",
        lambda: judged(score=lambda features, logits: logits[:, 0] + 0j),
        lambda told: judged(score=lambda features, logits: (logits[:, 0] + 0j).real),
    ),
    case(
        "returned NaN or infinity; expected finite values",
        lambda: judged(score=lambda features, logits: logits[:, 0] / 0),
        lambda told: judged(score=lambda features, logits: logits[:, 0]),
    ),
    case(
        "needs features of at least 0, such as after a ReLU",
        lambda: judged(nn.Sequential(nn.Linear(D, 8), nn.Linear(8, K)), "scale"),
        lambda told: judged(network(), "scale"),
        lambda told: (
            told.says(ANOTHER) and judged(nn.Sequential(nn.Linear(D, 8), nn.Linear(8, K)), "energy")
        ),
    ),
    case(
        "must be at least twice n_neighbors",
        lambda: judged(score=Knn(n_neighbors=20, bank_size=30)),
        lambda told: told.says("n_neighbors, 40") and judged(score=Knn(20, bank_size=40)),
    ),
    case(
        "must be at most the number of training rows",
        lambda: judged(score="knn", rows=X[:40]),
        lambda told: (
            told.says("Pass fewer neighbours", "27.") and judged(score=Knn(27), rows=X[:40])
        ),
        lambda told: told.says("or more rows") and judged(score="knn"),
    ),
    case(
        "needs features that vary within the classes",
        lambda: judged(Constant(), "mahalanobis"),
        lambda told: told.says("Check X and the network") and judged(score="mahalanobis"),
    ),
    case(
        "too few for their covariance",
        few_rows,
        lambda told: told.says("Pass more rows") and judged(score="mahalanobis"),
        lambda told: (
            told.says("or another score")
            and judged(score="energy", rows=X[:9], calibration_size=None)
        ),
    ),
    case(
        "finds nothing outside the principal space",
        lambda: judged(nn.Sequential(nn.Linear(D, 2), Repeated(), nn.Linear(8, K)), "vim"),
        lambda told: judged(
            nn.Sequential(nn.Linear(D, 2), Repeated(), nn.Linear(8, K)),
            told.says("a smaller Vim(n_components=...)") and Vim(n_components=1),
        ),
    ),
    case(
        "needs at least 2 features, and the network has 1",
        lambda: judged(one_feature(), "vim"),
        lambda told: judged(network(), "vim"),
        lambda told: told.says(ANOTHER) and judged(one_feature(), "msp"),
    ),
    case(
        "must be less than the number of features",
        lambda: judged(score=Vim(n_components=8)),
        lambda told: told.says("features, 8") and judged(score=Vim(n_components=7)),
    ),
    case(
        "round away",
        lambda: judged(network().bfloat16(), "odin"),
        lambda told: told.says("Pass the network in float32") and judged(network(), "odin"),
        lambda told: told.says("or another score") and judged(network().bfloat16(), "max_logit"),
    ),
    case(
        "needs the gradient of the logits with respect to",
        lambda: judged(Body(lambda self, x: right(self, x.detach())), "odin"),
        lambda told: (
            told.says("detaches", ANOTHER)
            and judged(Body(lambda self, x: right(self, x.detach())), "energy")
        ),
    ),
    case(
        "which an input of dtype",
        lambda: judged(embedding(), "odin", rows=IDS, preprocess=torch.Tensor.long),
        lambda told: (
            told.says("Pass another score_function")
            and judged(embedding(), "energy", rows=IDS, preprocess=torch.Tensor.long)
        ),
    ),
    case(
        "it must return what is added to the batch",
        lambda: judged(score=Gradient(lambda batch: batch[:, :1])),
        lambda told: judged(score=Gradient(lambda batch: 0.1 * batch)),
    ),
    case(
        "sets uses_gradient, but has no method",
        lambda: judged(score=Gradient(None)),
        lambda told: (
            told.says("perturbation(logits, batch) that gives what to add to the batch")
            and judged(score=Gradient(lambda batch: 0.1 * batch))
        ),
    ),
    case(
        "calibration rows are too few",
        lambda: predicted(copy.deepcopy(fitted()).calibrate(FRESH[:5])),
        lambda told: (
            told.says("Pass more rows to calibrate(X)")
            and predicted(
                copy.deepcopy(fitted()).calibrate(
                    FRESH[: int(re.search(r"at least (\d+)", told.message)[1])]
                )
            )
        ),
        lambda told: (
            told.says("or lower tpr")
            and predicted(copy.deepcopy(fitted()).calibrate(FRESH[:5], tpr=0.8))
        ),
    ),
    case(
        "calibration rows are too few",
        lambda: predicted(fit(network(), X, calibration_size=5)),
        lambda told: predicted(fit(network(), X, calibration_size=5).calibrate(FRESH)),
    ),
]


class Repeated(nn.Module):
    """Four times two features."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.repeat(1, 4)


@pytest.mark.parametrize("mistake", SCORES, ids=lambda mistake: mistake.words)
def test_scores(mistake):
    check(mistake)


# Arrays of scores


def rates(scores: Any) -> float:
    return auroc(scores, [-1.0, 0.0])


NUMBERS = [
    case(
        "has masked entries; expected none",
        lambda: rates(np.ma.masked_less([1.0, 2.0], 1.5)),
        lambda told: (
            told.says("Drop their rows") and rates(np.ma.masked_less([1.0, 2.0], 1.5).compressed())
        ),
    ),
    case(
        "does not form an array",
        lambda: rates([[1.0], [1.0, 2.0]]),
        lambda told: told.says("expected the shape (n,)") and rates([1.0, 2.0]),
    ),
    case(
        "expected real numbers (float, int or bool)",
        lambda: rates(["0.5", "1.5"]),
        lambda told: told.says("Convert them") and rates(np.array(["0.5", "1.5"]).astype(float)),
    ),
    case(
        "expected real numbers (float, int or bool)",
        lambda: rates([0.5, None]),
        lambda told: told.says("or drop rows that lack one") and rates([0.5]),
    ),
    case(
        "Take one column, or flatten it with .ravel()",
        lambda: rates(np.ones((3, 1))),
        lambda told: rates(np.ones((3, 1))[:, 0]),
        lambda told: rates(np.ones((3, 1)).ravel()),
    ),
    case(
        "pass at least one row",
        lambda: rates([]),
        lambda told: rates([1.0]),
    ),
    case(
        "or drop their rows",
        lambda: rates([1.0, np.nan]),
        lambda told: rates([1.0]),
    ),
    case(
        "score_ood is an empty dict",
        lambda: detection_report([1.0], {}),
        lambda told: told.says("at least one set") and detection_report([1.0], {"far": [0.0]}),
    ),
    case(
        "has a set named 'mean'",
        lambda: detection_report([1.0], {"mean": [0.0]}),
        lambda told: told.says("Rename the set") and detection_report([1.0], {"far": [0.0]}),
    ),
    case(
        "; expected an int, a numpy.random.RandomState or None",
        lambda: random_generator("seed"),
        lambda told: told.says("an int") and random_generator(0),
        lambda told: random_generator(told("numpy.random.RandomState", numpy=np)(0)),
        lambda told: told.says("or None") and random_generator(None),
    ),
]


@pytest.mark.parametrize("mistake", NUMBERS, ids=lambda mistake: mistake.words)
def test_numbers(mistake):
    check(mistake)


# Selection of a detector


COLUMNS = {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "d": X[:, 3], "e": X[:, 4], "f": X[:, 5]}
LISTS = {
    "params": [{"sparsity_weight": weight} for weight in (0.0, 0.02, 0.2)],
    "mean_test_auroc": [0.8, 0.9, 0.95],
    "std_test_auroc": [0.01, 0.01, 0.01],
    "mean_test_accuracy_change": [-0.02, -0.05, -0.1],
    "std_test_accuracy_change": [0.01, 0.01, 0.01],
}
NANS = LISTS | {"mean_test_auroc": [np.nan] * 3}
BOTH = ["auroc", "accuracy_change"]


def score(
    metric: Any = "auroc", X_ood: Any = None, rows: Any = X, y: Any = Y, **options: Any
) -> Any:
    return make_ood_scorer(metric, X_ood, **options)(fitted(), rows, y)


def folds(y: Any = Y, rows: Any = X, **options: Any) -> list[Any]:
    return list(InDistributionKFold(**({"n_splits": 3} | options)).split(rows, y))


class Fixed:
    """An outlier detector that gives the scores that it is given."""

    def __init__(self, scores: Callable[[Any], Any]) -> None:
        self.score_samples = scores


def whole(search: GridSearchCV) -> GridSearchCV:
    """A search of which no score is NaN."""
    columns = [v for name, v in search.cv_results_.items() if name.startswith("mean_test")]
    assert all(np.isfinite(column).all() for column in columns)
    return search


def refused(told: Told) -> bool:
    """Whether a search shows what makes all its fits fail, if it is told so by a message."""
    options = told.keywords("error_score='raise'")
    shown = answer_to(lambda: search(detector(module=Refusing()), KFold(3), **options))
    return "Raised by the module given, Refusing" in shown


class Refusing(nn.Module):
    """A module that fails, so that every fit of a search does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("what went wrong")


SELECTION = [
    case(
        "has no effect with shuffle=False",
        lambda: InDistributionKFold(shuffle=False, random_state=0),
        lambda told: InDistributionKFold(random_state=0, **told.keywords("shuffle=True")),
        lambda told: told.says("or leave random_state out") and InDistributionKFold(shuffle=False),
    ),
    case(
        "split got y=None",
        lambda: folds(None, ood_label=-1),
        lambda told: told.says("Pass y, one label per row") and folds(KNOWN_Y, KNOWN, ood_label=-1),
        lambda told: folds(None, **told.keywords("ood_label=None")),
    ),
    case(
        "Pass the label of the out-of-distribution rows",
        lambda: folds(KNOWN_Y, KNOWN, ood_label=-7),
        lambda told: (
            told.says("labels such as [-1, 0, 1, 2]") and folds(KNOWN_Y, KNOWN, ood_label=-1)
        ),
        lambda told: folds(**told.keywords("ood_label=None")),
    ),
    case(
        "have a single row each",
        lambda: folds(np.where(np.arange(N) == 5, 9, Y)),
        lambda told: (
            told.says("[9]", "Leave these rows out")
            and folds(np.delete(Y, 5), np.delete(X, 5, axis=0))
        ),
        lambda told: told.says("give them the label of a larger class") and folds(Y),
    ),
    case(
        "folds cannot be stratified",
        lambda: folds(np.arange(10) % 5, X[:10]),
        lambda told: (
            told.says("or less") and folds(np.arange(10) % 5, X[:10], **told.keywords("n_splits=2"))
        ),
    ),
    case(
        "folds need at least as many",
        lambda: folds(None, X[:2]),
        lambda told: told.says("Pass more rows") and folds(None, X[:3]),
        lambda told: told.says("or a smaller n_splits") and folds(None, X[:2], n_splits=2),
    ),
    case(
        "The groups parameter is ignored by",
        lambda: list(InDistributionKFold(3).split(X, Y, groups=Y)),
        lambda told: told.says("Leave it out") and folds(),
    ),
    case(
        "or accuracy_change: fitting or scoring failed",
        lambda: AccuracyGuard()(NANS),
        lambda told: told.says("The warnings of the search say why") and refused(told),
    ),
    case(
        "Every candidate loses more than tolerance",
        lambda: AccuracyGuard()(LISTS),
        lambda told: (
            told.says("The one that loses least, 0.0200", "raise the tolerance")
            and AccuracyGuard(tolerance=0.02)(LISTS)
        ),
        lambda told: (
            told.says("Search smaller values of sparsity_weight")
            and AccuracyGuard()(LISTS | {"mean_test_accuracy_change": [0, -0.05, -0.1]})
        ),
    ),
    case(
        "cv_results_ has no scores named",
        lambda: AccuracyGuard()({"mean_test_score": [0.9]}),
        lambda told: (
            told.says("scoring=make_ood_scorer(['auroc', 'accuracy_change'], ...)")
            and whole(
                search(
                    detector(),
                    KFold(3),
                    make_ood_scorer(["auroc", "accuracy_change"], OUTLIERS),
                    refit=told("AccuracyGuard('auroc', tolerance=0.01)"),
                )
            )
        ),
        lambda told: told.says("is all there is") and refused(told),
    ),
    case(
        "got y=None, so no row can carry ood_label",
        lambda: score(ood_label=-1, y=None),
        lambda told: (
            told.says("Pass y, one label per row")
            and whole(
                search(
                    detector(ood_label=-1),
                    **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                    scoring=make_ood_scorer(ood_label=-1),
                    rows=KNOWN,
                    y=KNOWN_Y,
                )
            )
        ),
    ),
    *(
        case(
            words,
            lambda rows=rows, y=y: score(ood_label=-1, rows=rows, y=y),
            lambda told: whole(
                search(
                    detector(ood_label=-1),
                    **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                    scoring=make_ood_scorer(ood_label=-1),
                    rows=KNOWN,
                    y=KNOWN_Y,
                )
            ),
        )
        for words, rows, y in [
            ("expected in-distribution rows as well", OUTLIERS, [-1] * len(OUTLIERS)),
            ("because training folds hold none", X, Y),
        ]
    ),
    case(
        "If rows are ordered by class",
        lambda: search(
            detector(module=None, pretrain_epochs=1), KFold(3), rows=X[ORDERED], y=Y[ORDERED]
        ),
        lambda told: whole(
            search(
                detector(module=None, pretrain_epochs=1),
                **told.keywords("cv=InDistributionKFold()"),
                rows=X[ORDERED],
                y=Y[ORDERED],
            )
        ),
    ),
    case(
        "If such a label marks known outliers",
        lambda: score(rows=KNOWN, y=KNOWN_Y),
        lambda told: (
            told.says("pass it as ood_label=")
            and make_ood_scorer(ood_label=-1)(
                copy.deepcopy(fitted()).set_params(ood_label=-1), KNOWN, KNOWN_Y
            )
        ),
    ),
    case(
        "If y holds no classes",
        lambda: score(y=Y + 7),
        lambda told: score(**told.keywords("y=None")),
    ),
    case(
        "A search that refits would train it on the outliers",
        lambda: make_ood_scorer(ood_label=-1)(fitted(), KNOWN, KNOWN_Y),
        lambda told: (
            told.says("to both")
            and make_ood_scorer(**told.keywords("ood_label=-1"))(
                copy.deepcopy(fitted()).set_params(**told.keywords("ood_label=-1")), KNOWN, KNOWN_Y
            )
        ),
    ),
    case(
        "so score makes outliers from X",
        lambda: copy.deepcopy(fitted()).set_params(ood_label=-1).score(X, Y),
        lambda told: whole(
            search(
                detector(ood_label=-1),
                **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                rows=KNOWN,
                y=KNOWN_Y,
            )
        ),
    ),
    case(
        "expected at least one, and no name twice",
        lambda: make_ood_scorer(["auroc", "auroc"]),
        lambda told: make_ood_scorer(["auroc"]),
    ),
    case(
        "X_ood is an empty dict; expected at least one set of rows",
        lambda: make_ood_scorer(X_ood={}),
        lambda told: score(X_ood={"far": OUTLIERS}),
    ),
    case(
        "has no rows; expected some",
        lambda: make_ood_scorer(X_ood={"far": OUTLIERS[:0]}),
        lambda told: told.says("'far'") and score(X_ood={"far": OUTLIERS}),
    ),
    case(
        "Pass rows as X_ood=",
        lambda: make_ood_scorer(OUTLIERS),
        lambda told: score(X_ood=OUTLIERS),
        lambda told: told.says("'auroc'", "a function of the scores") and score([auroc], OUTLIERS),
    ),
    case(
        "is an error: less is better",
        lambda: make_ood_scorer("fpr_at_tpr"),
        lambda told: score(told("'neg_fpr_at_tpr'"), OUTLIERS),
        lambda told: (
            told.says("or a function that returns it negated")
            and score(lambda score_id, score_ood: -fpr_at_tpr(score_id, score_ood), OUTLIERS)
        ),
    ),
    case(
        "is unknown; expected one of",
        lambda: make_ood_scorer("roc_auc"),
        lambda told: score(told("'auroc'"), OUTLIERS),
    ),
    case(
        "has neither score_samples nor decision_function",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(LocalOutlierFactor().fit(X), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(
            LocalOutlierFactor(**told.keywords("novelty=True")).fit(X), X
        ),
    ),
    case(
        "expected one per row, (",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(IsolationForest(n_estimators=10).fit(X), X),
    ),
    case(
        "Find out what made them: rows out of range",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows[:, 0] / 0), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows[:, 0]), X),
    ),
    case(
        "expected a finite number",
        lambda: score(lambda score_id, score_ood: float("nan"), OUTLIERS),
        lambda told: score(lambda score_id, score_ood: 0.5, OUTLIERS),
    ),
    case(
        "or leave this metric out",
        lambda: score("accuracy_change", y=np.zeros(N, int)),
        lambda told: told.says("Pass y with the classes") and score("accuracy_change"),
        lambda told: score("auroc"),
    ),
    case(
        "Leave this metric out for other detectors",
        lambda: make_ood_scorer(["auroc", "mean_l1"], OUTLIERS)(
            IsolationForest(n_estimators=10).fit(X), X
        ),
        lambda told: make_ood_scorer(["auroc"], OUTLIERS)(
            IsolationForest(n_estimators=10).fit(X), X
        ),
        lambda told: (
            told.says("a SparseEnergyOODDetector") and score(["auroc", "mean_l1"], OUTLIERS)
        ),
    ),
    case(
        "is no array of numbers, so no surrogate outliers are made of it",
        lambda: make_ood_scorer()(with_names(), NAMES_OF_ROWS),
        lambda told: (
            told.says("as X_ood=")
            and make_ood_scorer(X_ood=NAMES_OF_ROWS[:5])(with_names(), NAMES_OF_ROWS)
        ),
        lambda told: (
            told.says("with ood_label=")
            and make_ood_scorer(ood_label=9)(
                copy.deepcopy(with_names()).set_params(ood_label=9),
                NAMES_OF_ROWS,
                np.where(np.arange(N) < 9, 9, Y),
            )
        ),
    ),
    case(
        "is no surrogate for X of shape",
        lambda: surrogate_outliers(X, kind="blur"),
        lambda told: surrogate_outliers(X, kind=told("'columns'")),
    ),
    *(
        case(
            words,
            lambda rows=rows: surrogate_outliers(rows),
            lambda told: (
                told.says("make_ood_scorer(X_ood=...)")
                and make_ood_scorer(X_ood=OUTLIERS[:, :1])(narrow(), X[:, :1])
            ),
            lambda told: (
                told.says("make_ood_scorer(ood_label=...)")
                and make_ood_scorer(ood_label=-1)(
                    copy.deepcopy(narrow()).set_params(ood_label=-1), KNOWN[:, :1], KNOWN_Y
                )
            ),
        )
        for words, rows in [
            ("Use known outliers instead", np.ones((3, 2, 2, 2, 2))),
            ("surrogate outliers need at least 2 rows and 2 columns", X[:, :1]),
            ("are too small to permute patches", np.ones((3, 1, 1))),
        ]
    ),
]


@functools.cache
def with_names() -> SparseEnergyOODDetector:
    return fit(network(), NAMES_OF_ROWS, Y, preprocess=from_names)


@functools.cache
def narrow() -> SparseEnergyOODDetector:
    return fit(network(K, 1), X[:, :1])


@pytest.mark.parametrize("mistake", SELECTION, ids=lambda mistake: mistake.words)
def test_selection(mistake):
    check(mistake)


# Pictures


SEARCHED = functools.cache(
    lambda: GridSearchCV(
        detector(),
        {"sparsity_weight": [0.0, 0.1]},
        cv=KFold(2),
        scoring=make_ood_scorer(X_ood=OUTLIERS),
    ).fit(X, Y)
)


def draw(results: Any = LISTS, **options: Any) -> SelectionDisplay:
    return SelectionDisplay.from_cv_results(results, **options)


def without(*columns: str) -> dict[str, Any]:
    return {name: column for name, column in LISTS.items() if name not in columns}


def table(id_scores: Any = None, ood_scores: Any = None) -> DetectionTableDisplay:
    id_scores = {"a": [1.0, 2.0], "b": [1.0, 2.0]} if id_scores is None else id_scores
    ood_scores = {"a": {"far": [0.0]}, "b": {"far": [0.0]}} if ood_scores is None else ood_scores
    return DetectionTableDisplay.from_predictions(id_scores, ood_scores)


def cells(**options: Any) -> DetectionTableDisplay:
    settings = {"values": [[0.5, 0.6]], "methods": ["a"], "columns": ["x", "y"]}
    return DetectionTableDisplay(**(settings | options))


PICTURES = [
    *(
        case(
            "is an empty dict; expected at least one set of OOD rows",
            lambda kind=kind: kind.from_estimator(fitted(), X, {}),
            lambda told, kind=kind: kind.from_estimator(fitted(), X, {"far": OUTLIERS}),
        )
        for kind in (ScoreDistributionDisplay, DetectionRocDisplay, FeatureActivityDisplay)
    ),
    *(
        case(
            "If you have scores, draw them with from_predictions",
            lambda kind=kind: kind.from_estimator(KMeans(2), X, OUTLIERS),
            lambda told, kind=kind: (
                told.says("SparseEnergyOODDetector") and kind.from_estimator(fitted(), X, OUTLIERS)
            ),
            lambda told, kind=kind: kind.from_predictions([1.0, 2.0], [0.0]),
        )
        for kind in (ScoreDistributionDisplay, DetectionRocDisplay)
    ),
    case(
        "If you have features, draw them with from_predictions",
        lambda: FeatureActivityDisplay.from_estimator(IsolationForest(), X, OUTLIERS),
        lambda told: FeatureActivityDisplay.from_estimator(fitted(), X, OUTLIERS),
        lambda told: FeatureActivityDisplay.from_predictions(X, OUTLIERS),
    ),
    case(
        "expected features of one network",
        lambda: FeatureActivityDisplay.from_predictions(X, OUTLIERS[:, :3]),
        lambda told: FeatureActivityDisplay.from_predictions(X, OUTLIERS),
    ),
    case(
        "expected the cv_results_ of a fitted search",
        lambda: draw(without("mean_test_auroc", "mean_test_accuracy_change")),
        lambda told: draw(SEARCHED().cv_results_),
    ),
    case(
        "among the metrics of the search's scoring",
        lambda: draw(metric="mean_l1"),
        lambda told: draw(
            GridSearchCV(
                detector(),
                {"sparsity_weight": [0.0, 0.1]},
                cv=KFold(2),
                refit=False,
                scoring=told(
                    "make_ood_scorer(['neg_fpr_at_tpr', 'accuracy_change', 'mean_l1'])",
                    make_ood_scorer=functools.partial(make_ood_scorer, X_ood=OUTLIERS),
                ),
            )
            .fit(X, Y)
            .cv_results_,
            metric="mean_l1",
        ),
    ),
    case(
        "because fitting or scoring failed",
        lambda: draw(NANS, metric="auroc"),
        lambda told: refused(told),
    ),
    case(
        "Draw a search over, for instance",
        lambda: draw(LISTS | {"params": [{"tpr": 0.9}] * 3}),
        lambda told: (
            GridSearchCV(
                detector(),
                told("{'sparsity_weight': [0, 0.01, 0.02, 0.05]}"),
                cv=KFold(2),
                scoring=make_ood_scorer(X_ood=OUTLIERS),
            ).fit(X, Y)
            and draw(SEARCHED().cv_results_)
        ),
    ),
    case(
        "Name the weight in every grid of the search",
        lambda: draw(LISTS | {"params": [{"sparsity_weight": 0.1}, {"tpr": 0.9}, {"tpr": 0.8}]}),
        lambda told: draw(LISTS),
    ),
    case(
        "expected the index of one of",
        lambda: draw(chosen=3),
        lambda told: told.says("3 candidates, from 0") and draw(chosen=2),
    ),
    case(
        "so there is nothing to draw. Call fit first",
        lambda: SelectionDisplay.from_estimator(sklearn.base.clone(SEARCHED())),
        lambda told: SelectionDisplay.from_estimator(SEARCHED()),
    ),
    case(
        "If you have results, draw them with from_cv_results",
        lambda: SelectionDisplay.from_estimator(fitted()),
        lambda told: SelectionDisplay.from_estimator(SEARCHED()),
        lambda told: draw(),
    ),
    case(
        "axes; expected",
        lambda: draw(ax=new_axes(3)),
        lambda told: told.says("expected 2") and draw(ax=new_axes(2)),
    ),
    case(
        "expected a dict from the names of methods",
        lambda: table([1.0, 2.0]),
        lambda told: table(),
    ),
    case(
        "the same, at least one",
        lambda: table({"a": [1.0, 2.0]}),
        lambda told: table({"a": [1.0, 2.0]}, {"a": [0.0]}),
    ),
    case(
        "expected the same sets for each method",
        lambda: table(ood_scores={"a": {"far": [0.0]}, "b": {"near": [0.0]}}),
        lambda told: table(),
    ),
    case(
        "expected that of values",
        lambda: cells(spread=[[0.1]]),
        lambda told: told.says("(1, 2)") and cells(spread=[[0.1, 0.2]]),
    ),
    case(
        "spread has a value of",
        lambda: cells(spread=[[0.1, -0.2]]),
        lambda told: told.says("expected at least 0") and cells(spread=[[0.1, 0.2]]),
    ),
    case(
        "names, none of them twice",
        lambda: cells(columns=["x", "x"]),
        lambda told: told.says("expected 2") and cells(columns=["x", "y"]),
    ),
]


@pytest.mark.parametrize("mistake", PICTURES, ids=lambda mistake: mistake.words)
def test_pictures(mistake):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    check(mistake)
    pyplot.close("all")


# Modules and functions of skood.networks


def normalized(images: Any, *arguments: Any) -> Any:
    return NormalizeImages(*arguments)(images)


PIXELS = torch.from_numpy(BYTES)

LAYERS = [
    case(
        "one per column or channel",
        lambda: default_network((3, 8, 8), 2, mean=[0.5], std=[0.2]),
        lambda told: (
            told.says("must have 3 values") and default_network((3, 8, 8), 2, mean=MEAN, std=STD)
        ),
    ),
    case(
        "must be vectors of one length",
        lambda: Standardize([0.5], STD),
        lambda told: Standardize(MEAN, STD),
    ),
    case(
        "must be numbers or vectors of one length",
        lambda: NormalizeImages([0.5], STD),
        lambda told: NormalizeImages(MEAN, STD),
        lambda told: NormalizeImages(0.5, 0.2),
    ),
    case(
        "must be finite in float32",
        lambda: NormalizeImages(0.5, -1),
        lambda told: told.says("std at least 0") and NormalizeImages(0.5, 1),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(PIXELS[:, :, :, :3]),
        lambda told: (
            told.says("mean and std with one value per channel", "on only one of")
            and normalized(PIXELS, MEAN, STD)
        ),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(torch.cat([PIXELS, PIXELS[:, :1]], 1).movedim(1, 3), MEAN, STD),
        lambda told: normalized(
            told("images[..., :3]", images=torch.cat([PIXELS, PIXELS[:, :1]], 1).movedim(1, 3)),
            MEAN,
            STD,
        ),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(PIXELS[0], MEAN, STD),
        lambda told: normalized(told("images[None]", images=PIXELS[0]), MEAN, STD),
    ),
    case(
        "expected a tensor, such as",
        lambda: normalized(BYTES),
        lambda told: normalized(told("torch.from_numpy(images)", images=BYTES)),
    ),
    case(
        "Cast pixels of 0..255 to uint8",
        lambda: normalized(PIXELS.long()),
        lambda told: normalized(PIXELS.long().to(torch.uint8)),
    ),
    case(
        "expected 0..1. Scale them",
        lambda: normalized(PIXELS.float()),
        lambda told: normalized(told("images / 255", images=PIXELS.float())),
        lambda told: (
            told.says("or cast pixels of 0..255 to uint8")
            and normalized(PIXELS.float().to(torch.uint8))
        ),
        lambda told: told.says("Clamp them") and normalized((PIXELS / 250).clamp(0, 1)),
    ),
    case(
        "depth must be",
        lambda: CifarResNet(19),
        lambda told: told.says("(8, 14, 20, ...)") and CifarResNet(8),
    ),
    case(
        "input_shape must be the shape of one row",
        lambda: default_network((3, 3), 2),
        lambda told: told.says("h and w of at least 4") and default_network((4, 4), 2),
    ),
]


@pytest.mark.parametrize("mistake", LAYERS, ids=lambda mistake: mistake.words)
def test_layers(mistake):
    check(mistake)


# Copies, devices and what is kept on disk


class Reaching(nn.Module):
    """Calls its layer through a lambda, a method, or a module."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = network()
        if kind == "lambda":
            self.call = lambda x: self.inner(x)
        elif kind == "module":
            self.call = nn.Sequential(self.inner)

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "call", self.method)(x)


def replaced() -> nn.Module:
    module = network()
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def storing(stored: Any = None) -> nn.Module:
    module = network()
    module.stored = stored
    return module


def compiled_in_place() -> nn.Module:
    module = network()
    module.compile(backend="eager")
    return module


def optimized(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.optimize_for_inference(scripted(module))


REST = [
    case(
        "cannot be copied",
        lambda: fit(storing(row for row in X)),
        lambda told: told.says("remove what copy.deepcopy refuses") and fit(storing()),
    ),
    case(
        "was replaced by a function",
        lambda: fit(replaced()),
        lambda told: told.says("module.compile()") and fit(compiled_in_place()),
        lambda told: fit(told("torch.compile(module)", module=network())),
        lambda told: told.says("a subclass with another forward") and fit(Plain()),
    ),
    case(
        "holds a function that reaches a module",
        lambda: fit(Reaching("lambda")),
        lambda told: told.says("Make it a method") and fit(Reaching("method")),
        lambda told: (
            told.says("or an nn.Module that holds what it calls") and fit(Reaching("module"))
        ),
    ),
    case(
        "as after torch.jit.optimize_for_inference",
        lambda: fit(optimized(convolutions()), IMAGES, max_epochs=0),
        lambda told: (
            told.says("pass the module as it was before that")
            and fit(scripted(convolutions()), IMAGES, max_epochs=0)
        ),
    ),
    case(
        "memory= cannot tell what decides the training",
        lambda: fit(storing(Unpicklable()), memory="kept"),
        lambda told: fit(storing(Unpicklable()), **told.keywords("memory=None")),
        lambda told: (
            told.says("whose attributes can be pickled") and fit(storing("text"), memory="kept")
        ),
    ),
    case(
        "cannot be used here",
        lambda: fit(network(), device="cuda:99"),
        lambda told: fit(network(), device=told('"auto"')),
        lambda told: fit(network(), device=told('"cpu"')),
    ),
]


class Unpicklable:
    """Can be copied, and not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpicklable:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("no pickle of this")


class Plain(nn.Module):
    """A classifier with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("mistake", REST, ids=lambda mistake: mistake.words)
def test_rest(mistake):
    check(mistake)


# Packages that are not installed


def test_what_needs_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    told = Told(answer_to(lambda: draw()))
    assert told.says("run `pip install 'skood[plot]'`")
    extras = importlib.metadata.metadata("skood").get_all("Requires-Dist")
    assert any(re.fullmatch(r"matplotlib; extra == .plot.", extra) for extra in extras)


def test_what_needs_pandas_says_how_to_install_it_and_what_needs_none(monkeypatch):
    report = detection_report([1.0, 2.0], [0.0])
    monkeypatch.setitem(sys.modules, "pandas", None)
    told = Told(answer_to(report.to_frame))
    assert told.says("run `pip install pandas`", "or use to_dict")
    assert report.to_dict()["ood"]["auroc"] == 1


# Every message is met

CASES = [
    *(*ROWS, *OUTPUTS, *HEADS, *NETWORKS, *NOTES, *LABELS, *TRAINING, *SCORES, *NUMBERS),
    *(*SELECTION, *PICTURES, *LAYERS, *REST),
]

ELSEWHERE = {
    "is damaged, so what it kept": "nothing to do: it is computed again",
    "it now computes on the CPU": "nothing to do: it computes elsewhere",
    "has no memory for a forward of": "nothing to do: it goes on with fewer rows",
    "Drawing needs matplotlib": "a test above, without matplotlib",
    "to_frame needs pandas": "a test above, without pandas",
    "lost the others of its torch.distributed group": "processes: tests/test_torchrun.py",
    "calls fit with another": "processes: tests/engine/test_distributed.py",
    "processes without rows": "processes: tests/engine/test_distributed.py",
    "processes without any": "processes: tests/engine/test_distributed.py",
    "trains on one process, and there are": "processes: tests/engine/test_distributed.py",
    "so there is nothing to fine-tune": "met before by what carries no gradient",
}
"""Messages without a case: words of each, and why."""


def sentences(code: ast.AST) -> Iterator[str]:
    """Strings of a program that read as sentences, with {} for what is put in; no docstrings."""
    if isinstance(code, ast.Expr) and isinstance(code.value, ast.Constant):
        return
    parts = code.values if isinstance(code, ast.JoinedStr) else [code]
    text = "".join(
        str(part.value) if isinstance(part, ast.Constant) else "{}"
        for part in parts
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )
    if len(text.split()) > 3 and text.endswith("."):
        yield text
    for child in ast.iter_child_nodes(code):
        if not (isinstance(code, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from sentences(child)


MESSAGES = {
    text: path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    for text in sentences(ast.parse(path.read_text()))
}


def test_each_message_has_a_case_or_a_reason_to_have_none():
    known = [*(mistake.words for mistake in CASES), *ELSEWHERE]
    unmet = {text: path for text, path in MESSAGES.items() if not any(w in text for w in known)}
    assert not unmet


def test_no_reason_is_left_of_a_message_that_is_gone():
    assert [words for words in ELSEWHERE if not any(words in text for text in MESSAGES)] == []
