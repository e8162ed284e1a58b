"""What would give a wrong answer in silence: other scales, lost values, company, random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from data_sets import Listed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from skood import SparseEnergyOODDetector
from skood.scores import Energy

from .common import (
    BYTES,
    FRESH,
    IDS,
    IMAGES,
    D,
    K,
    N,
    X,
    Y,
    case,
    convolutions,
    fit,
    fitted,
    labels_of,
    network,
    says,
    seeded,
)
from .training import permuted

NAMES = ["wolf", "ant", "cat"]
"""Classes in the order of a network's logits, which is not that of the alphabet."""

NAMED = np.array(NAMES)[Y]


def named(y: Any) -> Any:
    return fit(network(), X, y)


class Fractions(nn.Module):
    """Looks numbers up by their last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x.long() % 16).sum(1))


LARGE_IDS = IDS + 16 * np.arange(2**24, 2**24 + IDS.size).reshape(IDS.shape)


def centred(values: np.ndarray) -> Any:
    return fit(network(), values - values.mean(axis=0))


class Reaches(nn.Module):
    """Uses a layer that no module holds, or that it holds itself."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = network()
        layer = nn.Linear(K, K)
        if kind == "registered":
            self.layer = layer
        else:
            self.hidden = lambda: layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer if hasattr(self, "layer") else self.hidden()
        return layer(self.inner(x))


@seeded
class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(D, 8), nn.Linear(8, K), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant).relu())


@seeded
class Moving(nn.Module):
    """Subtracts a mean that moves with each batch, or in training alone."""

    def __init__(self, in_training: bool) -> None:
        super().__init__()
        self.inner, self.in_training = network(), in_training
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or not self.in_training:
            self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        return self.inner(x - self.mean)


def noisy(noise: bool) -> Listed:
    """A data set that adds noise to its rows."""

    class Noisy(Listed):
        def __getitem__(self, row: int) -> torch.Tensor:
            return self.items[row] + (torch.rand(D) if noise else 0)

    return Noisy(list(torch.from_numpy(X)))


class Drawn(nn.Module):
    """Draws numbers, and uses them if they count."""

    def __init__(self, inner: nn.Module, share: float | None) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.inner(x)
        return z if self.share is None else z + self.share * torch.rand(1)


def scattered(dtype: torch.dtype | None) -> nn.Module:
    """Convolutions whose features are put into a tensor of a dtype of their own."""

    def put(h: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(h.shape, dtype=dtype or h.dtype)
        out[h > 0] = h[h > 0]
        return out

    class Put(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return put(h)

    parts = list(convolutions())
    return nn.Sequential(*parts[:-1], Put(), parts[-1])


def mixing(features: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits - logits.mean(dim=0), dim=1)


def random_score(features: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits, dim=1) + torch.rand(len(logits), dtype=logits.dtype)


def drawing(features: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    torch.rand(1)
    return torch.logsumexp(logits, dim=1)


FRAME = pd.DataFrame(X)
LETTERS = pd.DataFrame(X, columns=list("abcdef"))


def of_frame() -> Any:
    return fit(network(), FRAME, Y)


def masked() -> nn.Module:
    module = network(K + 2)
    with torch.no_grad():
        module[2].bias[K:] = -torch.inf
    return module


def saturated(score: str) -> Any:
    """Decisions by a network whose probabilities round to 1."""
    module = network()
    with torch.no_grad():
        for parameter in module[2].parameters():
            parameter.mul_(1e6)
    detector = SparseEnergyOODDetector(
        module, max_epochs=0, score_function=score, num_workers=0, random_state=0
    )
    return detector.fit(X, Y).predict(X)


def quantising(observed: bool) -> nn.Module:
    """A network in quantization-aware training."""
    module = nn.Sequential(*network()[:2], torch.ao.quantization.FakeQuantize(), network()[2])
    module(torch.from_numpy(X))
    if not observed:
        module.apply(torch.ao.quantization.disable_observer)
    return module


CASES = [
    case(
        "in another order than the module's logits",
        lambda: named(NAMED),
        lambda told: named(
            told.run("y = [names.index(label) for label in y]", names=NAMES, y=NAMED.tolist())["y"]
        ),
    ),
    case(
        "in another order than the module's logits",
        lambda: fit(network(), X, labels_of(permuted([1, 2, 0]))),
        says(
            "Pass the place of each label among the logits",
            lambda: fit(permuted([1, 2, 0]), X, labels_of(permuted([1, 2, 0]))),
        ),
    ),
    case(
        "calibration scores are the same",
        lambda: saturated("msp"),
        lambda told: saturated(told('"energy"')),
        lambda told: saturated(told('"max_logit"')),
    ),
    case(
        "whole numbers are cast to",
        lambda: fit(Fractions(), LARGE_IDS, max_epochs=0),
        lambda told: fit(
            Fractions(), LARGE_IDS, max_epochs=0, **told.keywords("preprocess=torch.Tensor.long")
        ),
    ),
    case(
        "that lie far from 0",
        lambda: fit(network(), X.astype(float) + 1e9, max_epochs=0),
        says("Subtract their mean before", lambda: centred(X.astype(float))),
    ),
    case(
        "gives the network values from",
        lambda: fit(convolutions(), IMAGES).score_samples(BYTES),
        lambda told: fit(convolutions(), IMAGES).score_samples(
            told("X / 255", X=BYTES).astype(np.float32)
        ),
    ),
    case(
        "If they are outliers, ignore this",
        lambda: fit(network(), X, Y).score_samples(1000 * np.abs(FRESH) + 1000),
        says("scale X as in fit", lambda: fit(network(), X, Y).score_samples(FRESH)),
    ),
    case(
        "in another order than in fit",
        lambda: of_frame().score_samples(FRAME[FRAME.columns[::-1]]),
        lambda told: of_frame().score_samples(
            told("X[columns_of_fit]", X=FRAME, columns_of_fit=list(FRAME))
        ),
    ),
    case(
        "an exported program",
        lambda: fit(torch.export.export(network(), (torch.ones(8, D),)).module()),
        says("Pass the nn.Module from which it was exported", lambda: fit(network())),
    ),
    case(
        "The network gives logits of -inf",
        lambda: fit(masked()),
        says("Return the logits", lambda: fit(network())),
    ),
    case(
        "Register it: as an attribute of the module",
        lambda: fit(Reaches("hidden")),
        says("set in __init__", lambda: fit(Reaches("registered"))),
    ),
    case(
        "with use_reentrant=True on inputs",
        lambda: fit(Checkpointed(True)),
        says("use_reentrant=False", lambda: fit(Checkpointed(False))),
    ),
    case(
        "and its logits follow, so that a score would depend",
        lambda: fit(Moving(False)),
        says("Let it write only if self.training is set", lambda: fit(Moving(True))),
    ),
    case(
        "its observers move in evaluation mode",
        lambda: fit(quantising(True)),
        lambda told: (
            told.says("module.apply(torch.ao.quantization.disable_observer)")
            and fit(quantising(False), max_epochs=0)
        ),
    ),
    case(
        "When the same rows are read again",
        lambda: fit(network(), noisy(True)),
        says("Turn off what is random", lambda: fit(network(), noisy(False))),
        says("are passed as augment=", lambda: fit(network(), noisy(False), augment=F.dropout)),
    ),
    case(
        "preprocess gives other values for the same rows",
        lambda: fit(network(), preprocess=lambda x: x + torch.rand_like(x)),
        says("Leave out of it what is random", lambda: fit(network(), preprocess=lambda x: x)),
        says(
            "are passed as augment=",
            lambda: fit(network(), augment=F.dropout),
        ),
    ),
    case(
        "draws random numbers in evaluation mode",
        lambda: fit(Drawn(network(), 0.0)),
        says("random numbers", lambda: fit(Drawn(network(), None))),
    ),
    case(
        "gives a row another value if other rows",
        lambda: fit(network(), score_function=mixing),
        says("Compute along dim=1", lambda: fit(network(), score_function=Energy())),
    ),
    case(
        "gives the same rows other values",
        lambda: fit(network(), score_function=random_score),
        says("Draw no random numbers in it", lambda: fit(network(), score_function=Energy())),
    ),
    case(
        "did not change its values for the rows tried",
        lambda: fit(network(), score_function=drawing),
        says("Draw no random numbers in it", lambda: fit(network(), score_function=Energy())),
    ),
    case(
        "The network does not work with precision=",
        lambda: fit(scattered(torch.float32), IMAGES, precision="bfloat16"),
        lambda told: fit(scattered(torch.float32), IMAGES, **told.keywords('precision="float32"')),
        lambda told: fit(scattered(None), IMAGES, precision=told('"auto"')),
    ),
    case(
        "with the keys",
        lambda: fit(network(), {"a": X, "b": X}),
        lambda told: fit(network(), told("X['a']", X={"a": X, "b": X})),
        lambda told: fit(
            nn.Sequential(nn.Flatten(), network(K, 2 * D)),
            told("np.stack(list(X.values()), axis=1)", X={"a": X, "b": X}),
        ),
        lambda told: fit(
            network(K, D + 2),
            told(
                "np.hstack([x.reshape(len(x), -1) for x in X.values()])",
                X={"a": X, "b": X[:, :2]},
            ),
        ),
    ),
    case(
        "and their labels. Pass them apart",
        lambda: fit(network(), (X, Y)),
        says("fit(X, y) to learn, score_samples(X) to score", lambda: fit(network(), X, Y)),
    ),
    case(
        "whose rows cannot be read in any order",
        lambda: fit(network(), (row for row in X)),
        lambda told: fit(network(), told("list(X)", X=(row for row in X))),
    ),
    case(
        "integers of more than 64 bits",
        lambda: fit(network(1 + K, 1), np.array([[2**70 + n] for n in range(N)], dtype=object)),
        lambda told: fit(
            network(1 + K, 1),
            np.array([[float(told("x % 2**63", x=2**70 + n))] for n in range(N)], dtype=np.float32),
        ),
    ),
    case(
        "X holds no numbers",
        lambda: fit(network(D + 1), LETTERS.assign(g="red")),
        says(
            "Convert text and categories",
            lambda: fit(network(K, D + 1), LETTERS.assign(g=1.0)),
        ),
    ),
    case(
        "was fitted on numbers",
        lambda: fit(network(), X, preprocess=torch.Tensor.float).score_samples(
            LETTERS.assign(f="red")
        ),
        says(
            "Convert text, categories and dates as for fit",
            lambda: fit(network(), X, preprocess=torch.Tensor.float).score_samples(X),
        ),
    ),
    case(
        "Complex data not supported: X has dtype",
        lambda: fit(network(), X.astype(complex)),
        says(
            "real and imaginary parts side by side",
            lambda: fit(network(K, 2 * D), np.hstack([X, X])),
        ),
    ),
    case(
        "X.reshape(1, -1) if it is one row",
        lambda: fitted().score_samples(X[0]),
        lambda told: fitted().score_samples(told("X.reshape(1, -1)", X=X[0])),
    ),
    case(
        "Pass an array, a list, a frame",
        lambda: fitted().score_samples(3.0),
        says("an array", lambda: fitted().score_samples(X)),
    ),
    case(
        "Pass an array of shape (n, ",
        lambda: fit(convolutions(), IMAGES).score_samples(IMAGES[:, :, :4]),
        says("(n, 3, 8, 8)", lambda: fit(convolutions(), IMAGES).score_samples(IMAGES)),
    ),
]
