"""What a network does with a batch, in evaluation and in training."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .common import (
    FLAT,
    IDS,
    IMAGES,
    Body,
    Changed,
    D,
    K,
    Told,
    X,
    case,
    convolutions,
    embedding,
    fit,
    network,
    says,
    scripted,
    seeded,
)


def captured(module: nn.Module, **parameters: Any) -> Any:
    """A fit by the compiler's capture, without its code generator, which needs a C++ compiler."""
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        return fit(module, max_epochs=0, score_function="knn", **parameters)


def asking(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Ask for a value, as for a log."""
    features = self.body(x)
    self.seen = float(features.sum())
    return self.head(features)


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


@seeded
class Keeping(nn.Module):
    """Keeps weights that it has read in evaluation mode, and may clear them where it is told."""

    def __init__(self, told: Told | None = None) -> None:
        super().__init__()
        self.body, self.head, self.told = nn.Linear(D, 8), nn.Linear(8, K), told
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and self.kept is None:
            self.kept = self.body.weight.detach().clone()
        weight = self.body.weight if self.training or self.kept is None else self.kept
        return self.head(F.linear(x, weight).relu())

    def train(self, mode: bool = True) -> Keeping:
        if self.told is not None and self.told.says("Clear that in the train() of the module"):
            self.kept = None
        return super().train(mode)


NETWORKS = [
    case(
        "a fresh copy with the same weights gives other logits",
        lambda: fit(Keeping(), sparsity_weight=0, learning_rate=0.1, batch_size=8),
        lambda told: fit(Keeping(told), sparsity_weight=0, learning_rate=0.1, batch_size=8),
    ),
    case(
        "compile=True cannot compile",
        lambda: fit(scripted(network()), max_epochs=0, compile=True),
        lambda told: fit(scripted(network()), max_epochs=0, **told.keywords("compile=False")),
    ),
    case(
        "torch.compile lost what enters the head",
        lambda: captured(Body(asking), compile=True),
        lambda told: captured(Body(asking), **told.keywords("compile=False")),
    ),
    case(
        "is on the meta device",
        lambda: fit(on_meta()),
        lambda told: fit(loaded(told)),
    ),
    case(
        "dynamically quantized layers",
        lambda: fit(quantized_dynamically(), max_epochs=0),
        says("The network before quantization", lambda: fit(network(), max_epochs=0)),
    ),
    case(
        "TorchScript hides its layers",
        lambda: fit(scripted(network()), head="2", max_epochs=0),
        says("the nn.Module from which it was made", lambda: fit(network(), head="2")),
        lambda told: fit(
            scripted(network()), **told.keywords("head=None"), **told.keywords(AS_IT_IS)
        ),
    ),
    case(
        "which of them are the logits cannot be told",
        lambda: fit(scripted(Pair()), max_epochs=0),
        says(
            "Wrap the module in one that returns its logits alone",
            lambda: fit(Changed(operator.itemgetter(1), scripted(Pair())), max_epochs=0),
        ),
    ),
    case(
        "so there are no features",
        lambda: fit(scripted(network())),
        says("the nn.Module from which it was made", lambda: fit(network())),
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
        says(
            "the nn.Module from which it was made",
            lambda: fit(nn.Sequential(network()[:2], network()[2])),
        ),
        lambda told: fit(
            nn.Sequential(scripted(network()[:2]), network()[2]), **told.keywords(AS_IT_IS)
        ),
    ),
    case(
        "The logits carry no gradient",
        lambda: fit(network().requires_grad_(False)),
        says(
            "Unfreeze parameters", lambda: fit(network().requires_grad_(False).requires_grad_(True))
        ),
        lambda told: fit(network().requires_grad_(False), **told.keywords(AS_IT_IS)),
        lambda told: fit(WithoutGradient(), **told.keywords(AS_IT_IS)),
        says("remove what cuts, ", lambda: fit(WithoutGradient().inner)),
    ),
    case(
        "In training mode the module does not return what its head",
        lambda: fit(Otherwise(lambda self, h: self.head(h).softmax(dim=1))),
        says(
            "make its forward return the same in both modes",
            lambda: fit(Otherwise(lambda self, h: self.head(h))),
        ),
    ),
    case(
        "In training mode the module does not call its head",
        lambda: fit(Otherwise(lambda self, h: self.other(h)), ALIKE),
        says(
            "Make its forward call it in both modes",
            lambda: fit(Otherwise(lambda self, h: self.head(h)), ALIKE),
        ),
    ),
    case(
        "in evaluation mode, but",
        lambda: fit(Otherwise(lambda self, h: self.head(h)[:, :2]), ALIKE),
        says(
            "Make its forward return the same in both",
            lambda: fit(Otherwise(lambda self, h: self.head(h)), ALIKE),
        ),
    ),
    case(
        "can be trained: its features carry no gradient",
        lambda: fit(with_frozen_body()),
        lambda told: told.says("Unfreeze the body") and fit(with_frozen_body(told)),
        says(
            "remove the torch.no_grad or .detach() before the head",
            lambda: fit(Body(lambda self, x: self.head(self.body(x).relu()))),
        ),
        lambda told: fit(with_frozen_body(), **told.keywords("sparsity_weight=0")),
    ),
    case(
        "gives other logits for the same rows when called again",
        lambda: fit(Dropping()),
        lambda told: fit(Dropping(told)),
        says("or pass it as augment=", lambda: fit(network(), augment=F.dropout)),
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
        says(
            "use statistics fixed at training time",
            lambda: fit(nn.Sequential(nn.BatchNorm1d(D), *network())),
        ),
    ),
    case(
        "preprocess gives a row other values if other rows are in its batch",
        lambda: fit(network(), preprocess=lambda batch: batch - batch.mean(dim=0)),
        says(
            "Use statistics, scales and lengths fixed at training time",
            lambda: fit(network(), preprocess=lambda batch: batch - X.mean(axis=0)),
        ),
    ),
    case(
        "preprocess gives a row other values if other rows are in its batch",
        lambda: fit(network(), preprocess=lambda x: x / 255 if x.max() > 99 else x),
        says(
            "x / 255, not x / x.max() nor a test of x.max()",
            lambda: fit(network(), preprocess=lambda x: x / 255),
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
        "Its convolutions take (n, c, ",
        lambda: fit(convolutions(), FLAT),
        lambda told: fit(
            convolutions(), told("X.reshape(n, c, h, w)", X=FLAT, n=60, c=3, h=8, w=8)
        ),
    ),
    case(
        "Its convolutions take (n, c, ",
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
        "Its convolutions take (n, c, ",
        lambda: fit(over_time(1), X),
        lambda told: fit(over_time(1), told("X.reshape(n, c, l)", X=X, n=120, c=1, l=D)),
        lambda told: fit(over_time(1), told("X[:, None]", X=X)),
    ),
    case(
        "in its last axis: ",
        lambda: fit(over_time(2), X.reshape(-1, 3, 2)),
        lambda told: fit(over_time(2), told("np.moveaxis(X, -1, 1)", X=X.reshape(-1, 3, 2))),
    ),
    case(
        "Its embedding has the ids 0 to",
        lambda: fit(embedding(), IDS + 1, preprocess=torch.Tensor.long),
        says("number the ids from 0", lambda: fit(embedding(), IDS, preprocess=torch.Tensor.long)),
        says(
            "give the embedding more rows",
            lambda: fit(embedding(11), IDS + 1, preprocess=torch.Tensor.long),
        ),
    ),
    case(
        "It is called with the batch alone",
        lambda: fit(TwoInputs(), X),
        says("wrap it in a module whose forward takes one tensor", lambda: fit(OneInput(), X)),
    ),
    case(
        "runs under torch.inference_mode()",
        lambda: fit(Inferring()),
        says("remove it", lambda: fit(Inferring(nullcontext))),
        lambda told: fit(Inferring(), **told.keywords("max_epochs=0")),
    ),
    case(
        "Tensors kept as plain attributes stay where they were",
        lambda: fit(Elsewhere()),
        says("use register_buffer", lambda: fit(Elsewhere(registered=True))),
    ),
    case(
        "pass a function that makes it as preprocess=",
        lambda: fit(network(), X[:, :4]),
        says(
            "(8, 4)",
            "pass a function that makes it as preprocess=",
            lambda: fit(network(), X[:, :4], preprocess=lambda batch: F.pad(batch, (0, 2))),
        ),
    ),
]


def over_time(n_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(n_channels, 4, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, K),
    )


class TwoInputs(nn.Module):
    """A network that takes a mask beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.inner(x * mask)


class OneInput(nn.Module):
    """What the message says: it makes the mask itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoInputs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, torch.ones_like(x))


def gray() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, K))


CASES = [*NETWORKS, *NOTES]
