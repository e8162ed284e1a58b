"""The head of a network."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from skood import SparseEnergyOODDetector

from .common import IMAGES, Body, Changed, D, K, Told, case, convolutions, fit, network, right, says


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


class Overwriting(nn.Module):
    """Changes its features after its head, or at its begin."""

    def __init__(self, *, after: bool = False, inplace: bool = False, copies: bool = False) -> None:
        super().__init__()
        self.body, self.after, self.copies = nn.Linear(D, 8), after, copies
        self.head = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(8, K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        logits = self.head(features)
        if self.after:
            (features.clone() if self.copies else features).mul_(2)
        return logits


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


CASES = [
    case(
        "changes in place what enters its head",
        lambda: fit(Overwriting(after=True), head="head"),
        says(
            "Let it change a copy, features.clone()",
            lambda: fit(Overwriting(after=True, copies=True), head="head"),
        ),
    ),
    case(
        "changes in place what enters its head",
        lambda: fit(Overwriting(inplace=True), head="head"),
        lambda told: fit(Overwriting(**told.keywords("inplace=False")), head="head"),
    ),
    case(
        "names no submodule",
        lambda: fit(network(), head="fc"),
        says("0, 2", "module.named_modules()", lambda: fit(network(), head="2")),
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
        says("something after it changes them", lambda: fit(Body(right), head="head")),
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
        says(
            "calls its head once",
            lambda: fit(
                Body(lambda self, x: self.head(self.body(x).relu() + self.body(-x).relu()))
            ),
        ),
        says(
            "or that calls it last for what it returns",
            lambda: fit(Body(lambda self, x: right(self, -x) is not None and right(self, x))),
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
        says(
            "Wrap the module in one that returns the logits alone",
            lambda: fit(
                Changed(
                    operator.itemgetter(1),
                    Body(lambda self, x: ((h := self.body(x).relu()), self.head(h)), Prototypes()),
                ),
                head="inner.head",  # as the next message says
            ),
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
        says(
            "returns the output of one of them", lambda: fit(Two(lambda self, a, b: self.first(a)))
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
            says("return what the layer gives", lambda: fit(Body(right))),
        )
        for after in (torch.sigmoid, lambda z: z / 2, lambda z: z[:, :2])
    ),
    case(
        "If forward computes the logits itself",
        lambda: fit(Body(lambda self, x: F.linear(self.body(x).relu(), self.head.weight))),
        says(
            "make that a submodule, a torch.nn.Linear, and call it as layer(h)",
            lambda: fit(Body(right)),
        ),
    ),
    case(
        "forward calls no torch.nn.Linear",
        lambda: fit(Body(lambda self, x: self.head.forward(self.body.forward(x).relu()))),
        says("call it as layer(h)", lambda: fit(Body(right))),
    ),
    case(
        "forward calls no torch.nn.Linear",
        lambda: fit(convolutions()[:-1], IMAGES),  # features alone
        says(
            "A network of features alone needs one after them",
            lambda: fit(
                nn.Sequential(*convolutions()[:-1], nn.Linear(4, K)),
                IMAGES,
                np.arange(60) % K,
                pretrain_epochs=1,
            ),
        ),
    ),
    case(
        "is not affine in its features",
        lambda: fit(Body(right, Prototypes()), head="head", score_function="react"),
        says(
            "Pass head= the last linear layer",
            lambda: fit(Body(right), head="head", score_function="react"),
        ),
        says(
            "or another score",
            lambda: fit(Body(right, Prototypes()), head="head", score_function="msp"),
        ),
    ),
]
