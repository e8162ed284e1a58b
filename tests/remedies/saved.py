"""Detectors in files and pickles: what they need, and what they cannot hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.scores import Energy

from .common import FRESH, X, case, fit, network, says

load = SparseEnergyOODDetector.load


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.float() * 2


def magnitude(features: torch.Tensor) -> torch.Tensor:
    return features.abs().sum(dim=1)


class Listing(nn.Module):
    """Remembers its training batches in a list, or counts them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind, self.seen, self.count = network(), kind, [], 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.kind == "list":
            self.seen.append(len(x))
        return self.inner(x)


def saved(detector: SparseEnergyOODDetector) -> str:
    """The name of a file of a detector."""
    detector.save("detector")
    return "detector"


def scores(detector: SparseEnergyOODDetector) -> Any:
    return detector.score_samples(FRESH)


def same(detector: SparseEnergyOODDetector, other: SparseEnergyOODDetector) -> None:
    assert (scores(detector) == scores(other)).all()


def of_own() -> str:
    return saved(fit(network(), preprocess=doubled))


def other_activation() -> nn.Module:
    module = network()
    module[1] = nn.Tanh()
    return module


def cut() -> str:
    """The name of a file of which the end is missing."""
    content = Path(saved(fit())).read_bytes()
    Path("detector").write_bytes(content[:-100])
    return "detector"


def foreign() -> str:
    torch.save(network().state_dict(), "weights.pt")
    return "weights.pt"


def without_penalty() -> SparseEnergyOODDetector:
    return load(saved(fit(network(), penalty=magnitude)), module=network())


def by_pickle(detector: SparseEnergyOODDetector) -> None:
    same(pickle.loads(pickle.dumps(detector)), detector)


def with_a_set() -> SparseEnergyOODDetector:
    detector = fit()
    detector.writers_ = {"one", "two"}
    return detector


def older() -> SparseEnergyOODDetector:
    with mock.patch("skood.detector.__version__", "0.0.1"):
        content = pickle.dumps(fit(network()))
    return pickle.loads(content)


def newer() -> str:
    with mock.patch("skood.storage.FORMAT", 2):
        return saved(fit())


CASES = [
    case(
        "it holds no code, and needs",
        lambda: load(of_own()),
        says(
            *("module=", "preprocess=", "the module may be untrained"),
            lambda: load(of_own(), module=network(), preprocess=doubled),
        ),
    ),
    case(
        "the module does not fit",
        lambda: load(of_own(), module=network(5), preprocess=doubled),
        says(
            "Pass a module of the architecture that was saved",
            lambda: load(of_own(), module=network(), preprocess=doubled),
        ),
    ),
    case(
        "it takes no score_function=",
        lambda: load(saved(fit()), score_function=Energy()),
        says("Leave score_function= out", lambda: load(saved(fit()))),
    ),
    case(
        "is no nn.Module",
        lambda: load(of_own(), module=network, preprocess=doubled),
        says("Pass what fit had", lambda: load(of_own(), module=network(), preprocess=doubled)),
    ),
    case(
        "does not do what fit had as",
        lambda: load(of_own(), module=other_activation(), preprocess=doubled),
        says("Pass what fit had", lambda: load(of_own(), module=network(), preprocess=doubled)),
    ),
    case(
        "cannot be loaded",
        lambda: load(cut()),
        says("other bytes", "Save the detector again", lambda: load(saved(fit()))),
    ),
    case(
        "cannot be loaded",
        lambda: load(foreign()),
        says("Pass a file that the detector's save has written", lambda: load(saved(fit()))),
    ),
    case(
        "Install a newer skood",
        lambda: load(newer()),
        says("in format '2'", "reads format 1 at most", lambda: load(saved(fit()))),
    ),
    case(
        "The detector was loaded from a file, which holds no code",
        lambda: without_penalty().fit(X),
        lambda told: told(
            "detector.set_params(penalty=penalty)", detector=without_penalty(), penalty=magnitude
        ).fit(X),
    ),
    case(
        "The detector cannot be saved",
        lambda: saved(with_a_set()),
        says("Use pickle instead", lambda: by_pickle(with_a_set())),
    ),
    case(
        "in more than its tensors and numbers",
        lambda: saved(fit(Listing("list"))),
        says("compare scores", "or use pickle", lambda: by_pickle(fit(Listing("list")))),
    ),
    case(
        "This pickle was written by",
        older,
        says("Compare scores", "or fit again", lambda: fit(network())),
        says("save writes", lambda: load(saved(fit()))),
    ),
]
