"""Data, networks and detectors of the cases, and what a case is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import DataConversionWarning
from sklearn.model_selection import GridSearchCV, KFold
from torch import nn

import skood.model_selection
import skood.networks
from skood import SparseEnergyOODDetector
from skood.exceptions import SkoodWarning

OURS = (SkoodWarning, DataConversionWarning)
"""Classes of the warnings that skood gives."""

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


def from_names(names: np.ndarray) -> torch.Tensor:
    """A tensor with as many rows as there are names, such as row7.png."""
    return torch.from_numpy(X[[int(name[3:-4]) for name in names.tolist()]])


NAMES_OF_ROWS = [f"row{row}.png" for row in range(N)]


FLAT = IMAGES.reshape(60, -1)


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
    if isinstance(cv, skood.model_selection.InDistributionKFold):
        cv.random_state = 0  # as a message names it, it draws other folds at every run
    return GridSearchCV(estimator, grid, cv=cv, scoring=scoring, **options).fit(rows, y)


LISTS = {
    "params": [{"sparsity_weight": weight} for weight in (0.0, 0.02, 0.2)],
    "mean_test_auroc": [0.8, 0.9, 0.95],
    "std_test_auroc": [0.01, 0.01, 0.01],
    "mean_test_accuracy_change": [-0.02, -0.05, -0.1],
    "std_test_accuracy_change": [0.01, 0.01, 0.01],
}


NANS = LISTS | {"mean_test_auroc": [np.nan] * 3}


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


def network_labels() -> np.ndarray:
    with torch.no_grad():
        return network()(torch.from_numpy(X)).argmax(dim=1).numpy()


def predicted(fitted: SparseEnergyOODDetector) -> np.ndarray:
    """Predictions, with which doubts of the threshold are told."""
    return fitted.predict(X)


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.script(module.eval())


def embedding(n_ids: int = 10) -> nn.Module:
    return nn.Sequential(nn.Embedding(n_ids, 4), nn.Flatten(), nn.Linear(20, K))


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
    name: getattr(module, name)
    for module in (skood.model_selection, skood.networks)
    for name in module.__all__
}
"""What a message may name without saying where it is from."""


@dataclass
class Case:
    """A mistake, words of its answer, and the remedies that it names."""

    words: str
    wrong: Callable[[], Any]
    remedies: tuple[Callable[[Told], Any], ...]


def case(words: str, wrong: Callable[[], Any], *remedies: Callable[[Told], Any]) -> Case:
    assert remedies
    return Case(words, wrong, remedies)


def says(*words_and_remedy: Any) -> Callable[[Told], Any]:
    """A remedy that a message names in these words; the last argument follows it."""
    *words, remedy = words_and_remedy

    def follow(told: Told) -> Any:
        told.says(*words)
        return remedy()

    return follow


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
