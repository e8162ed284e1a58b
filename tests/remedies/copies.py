"""Copies of a network, devices, and what is kept on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .common import IMAGES, X, case, convolutions, fit, network, says, scripted


class Reaching(nn.Module):
    """Calls its layer through a lambda or a method."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = network()
        if kind == "lambda":
            self.call = lambda x: self.inner(x)

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "call", self.method)(x)


class Renamed(nn.Module):
    """Has a method that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def train_on(self, batches: Any) -> None:
        for batch in batches:
            self(batch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Looping(Renamed):
    train = Renamed.train_on


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


CASES = [
    case(
        "cannot be copied",
        lambda: fit(storing(row for row in X)),
        says("remove what copy.deepcopy refuses", lambda: fit(storing())),
    ),
    case(
        "own train(mode) fails",
        lambda: fit(Looping()),
        says("another name", lambda: fit(Renamed())),
    ),
    case(
        "of the module given, which fit must not touch",
        lambda: fit(replaced()),
        says("to compile, use module.compile()", lambda: fit(compiled_in_place())),
    ),
    case(
        "of the module given, which fit must not touch",
        lambda: fit(Reaching("lambda")),
        says("Call self.layer(x) in forward or another method", lambda: fit(Reaching("method"))),
    ),
    case(
        "as after torch.jit.optimize_for_inference",
        lambda: fit(optimized(convolutions()), IMAGES, max_epochs=0),
        says(
            "pass the module as it was before that",
            lambda: fit(scripted(convolutions()), IMAGES, max_epochs=0),
        ),
    ),
    case(
        "keeps nothing, as it cannot tell what decides what the network gives",
        lambda: fit(storing(Unpicklable()), memory="kept"),
        says("Remove that part", lambda: fit(storing(), memory="kept")),
        says("make it one that can be pickled", lambda: fit(storing("text"), memory="kept")),
    ),
    case(
        "keeps no training, as it cannot tell what decides it",
        lambda: fit(network(), memory="kept", penalty=Summing(Unpicklable())),
        says("Remove that part", lambda: fit(network(), memory="kept", penalty=Summing())),
        says(
            "make it one that can be pickled",
            lambda: fit(network(), memory="kept", penalty=Summing("text")),
        ),
    ),
    case(
        "cannot be used here",
        lambda: fit(network(), device="cuda:99"),
        lambda told: fit(network(), device=told('"auto"')),
        lambda told: fit(network(), device=told('"cpu"')),
    ),
]


class Summing:
    """A penalty that holds a thing it does not need."""

    def __init__(self, thing: Any = None) -> None:
        self.thing = thing

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features.abs().sum(dim=1)


class Unpicklable:
    """Can be copied, and not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpicklable:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("no pickle of this")
