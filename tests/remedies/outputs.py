"""What a network returns."""

from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from skood import SparseEnergyOODDetector

from .common import (
    IDS,
    IMAGES,
    Changed,
    D,
    K,
    N,
    Told,
    X,
    answer_to,
    case,
    convolutions,
    fit,
    network,
    says,
)


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

    def __init__(self, kernel: int = 1, n_outputs: int = K) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
        self.last = nn.Conv2d(5, n_outputs, kernel, padding=kernel // 2)

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


POOLED = "last(h.mean((2, 3), keepdim=True)).flatten(1)"


class Averaged(nn.Module):
    """The wrapper of a network with logits at positions, with what the message says it returns."""

    def __init__(self, module: nn.Module, told: Told | None, code: str) -> None:
        super().__init__()
        if told is not None:
            told.says(code)
        self.body, self.last, self.code = module.body, module.last, code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        return eval(self.code, {"last": self.last, "h": h, "output": self.last(h)})


def with_head(module: nn.Module, *arguments: Any, **parameters: Any) -> SparseEnergyOODDetector:
    """A detector of a network whose head has to be named, as the message says."""
    told = Told(answer_to(lambda: fit(module, *arguments, **parameters)))
    return fit(module, *arguments, **told.keywords('head="last"'), **parameters)


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.complex64)


class Pixels(nn.Module):
    """Class probabilities at one place, (n, K, 1, 1), of a network that ends in a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Conv2d(5, K, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(images))


def with_a_second_output(told: Told, last: nn.Module) -> None:
    """Run what the message says of the last layer of a network with one output."""
    told.run(re.search(r"for k, v in .* = 2", told.message)[0], last=last)


def with_two_logits(told: Told, bias: bool = True) -> None:
    """A network with one output, changed as the message says: it predicts the same."""
    module = network(1).double()
    if not bias:
        module[2].bias = None
    with torch.no_grad():
        p = torch.sigmoid(module(torch.from_numpy(X).double())[:, 0]).numpy()
    with_a_second_output(told, module[2])
    as_it_is = fit(module, X, p > 0.5, max_epochs=0)
    np.testing.assert_allclose(as_it_is.predict_class_proba(X)[:, 1], p, rtol=1e-5)
    trained = fit(module, X, p > 0.5)
    assert trained.head_ == "2"
    assert trained.features(X).shape == (N, 8)
    assert not np.array_equal(trained.score_samples(X), as_it_is.score_samples(X))
    travelled = pickle.loads(pickle.dumps(trained))
    assert np.array_equal(travelled.score_samples(X), trained.score_samples(X))


def with_convolution(told: Told) -> SparseEnergyOODDetector:
    """The same for a last layer that is a convolution."""
    module = Averaged(Segmentation(n_outputs=1), None, POOLED)
    with_a_second_output(told, module.last)
    return with_head(module, IMAGES)


def one_output(*after: nn.Module) -> nn.Module:
    return network(1, D, *after)


SIGNS = np.sign(network()[0].weight[0].detach().numpy())
HUGE = 6e4 * SIGNS * (1 + np.tanh(X) / 100)
LARGE_ROW = np.where(np.arange(N)[:, None] == 41, HUGE, X)

CASES = [
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
            ("of shape (8, 1) (in a tuple", Changed(lambda z: (z, z, z), network(1)), []),
            (
                "made of the one output of",
                Changed(lambda z: torch.cat([torch.zeros_like(z), z], 1), network(1)),
                [],
            ),
            ("made of the one output of", Changed(lambda z: torch.cat([-z, z], 1), network(1)), []),
        ]
    ),
    case(
        "is no logits, but a loss",
        lambda: fit(Changed(lambda z: (z.mean(), z))),
        says("returns its logits alone", lambda: fit(network())),
    ),
    case(
        "leave out the last",
        lambda: fit(Changed(lambda z: torch.cat([1 - z.sigmoid(), z.sigmoid()], 1), network(1))),
        says("(or sigmoid)", lambda: with_two_logits(Told(answer_to(lambda: fit(network(1)))))),
    ),
    case(
        "If it has one output for two classes",
        lambda: fit(Averaged(Segmentation(n_outputs=1), None, POOLED), IMAGES),
        with_convolution,
    ),
    case(
        "end a complex one in a torch.nn.Linear",
        lambda: fit(nn.Sequential(complexes(), nn.Linear(8, K).to(torch.complex64))),
        lambda told: fit(
            nn.Sequential(Changed(lambda h: told("h.abs()", h=h), complexes()), nn.Linear(8, K))
        ),
    ),
    case(
        "Return them flat: ",
        lambda: fit(Pixels(), IMAGES),
        lambda told: with_head(Averaged(Pixels(), told, "output.flatten(1)"), IMAGES),
    ),
    case(
        "averages the positions",
        lambda: fit(Segmentation(), IMAGES),
        lambda told: with_head(Averaged(Segmentation(), told, POOLED), IMAGES),
    ),
    case(
        "averages the positions",
        lambda: fit(Segmentation(kernel=3), IMAGES),
        lambda told: with_head(Averaged(Segmentation(3), told, POOLED), IMAGES),
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
        says(
            "['scores']",
            "one that returns its logits",
            lambda: fit(Changed(lambda output: output["scores"], Changed(lambda z: {"scores": z}))),
        ),
        lambda told: fit(Changed(lambda z: {"logits": z})),
        says(
            "a tuple whose first element is that tensor", lambda: fit(Changed(lambda z: (z, None)))
        ),
    ),
    case(
        "as an object detector",
        lambda: fit(Detection(), IMAGES),
        says(
            "put a torch.nn.Linear on its backbone",
            "pretrain_epochs=",
            lambda: fit(
                nn.Sequential(Detection().backbone, nn.Linear(4, K)),
                IMAGES,
                np.arange(60) % K,
                pretrain_epochs=2,
            ),
        ),
    ),
    case(
        "one row of logits for each row",
        lambda: fit(TwoAtATime()),
        says("averages or splits its rows", lambda: fit(TwoAtATime().inner)),
    ),
    case(
        "Return the values before argmax",
        lambda: fit(Changed(lambda z: z.argmax(dim=1))),
        lambda told: fit(Changed(lambda z: z)),
    ),
    case(
        "expected floating-point numbers",
        lambda: fit(Changed(lambda z: z.round().long())),
        says("before argmax or rounding", lambda: fit(network())),
    ),
    case(
        "expected floating-point numbers",
        lambda: fit(statically_quantized(), max_epochs=0),
        says("as it was before that", lambda: fit(network())),
    ),
    case(
        "moves data to a device of its own",
        lambda: fit(Changed(lambda z: z.to("meta"))),
        says("Remove .to(...)", lambda: fit(Changed(lambda z: z))),
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
        says("train it anew, with a lower learning rate", lambda: fit(network())),
    ),
    case(
        "a network in float16 may overflow",
        lambda: fit(network().half(), HUGE, max_epochs=0),
        says(
            "Check the scale of X",
            lambda: fit(network().half(), (HUGE - HUGE.mean(0)) / HUGE.std(0), max_epochs=0),
        ),
        says(
            "preprocess=",
            lambda: fit(network().half(), HUGE, preprocess=lambda x: x.half() / 6e4, max_epochs=0),
        ),
        says("a network in float16 may overflow", lambda: fit(network(), HUGE, max_epochs=0)),
    ),
    case(
        "though the row itself is finite",
        lambda: fit(network().half(), LARGE_ROW, max_epochs=0),
        says(
            "row 41",
            "Check the scale of X",
            lambda: fit(network().half(), LARGE_ROW.clip(-4, 4), max_epochs=0),
        ),
        says("a network in float16 may overflow", lambda: fit(network(), LARGE_ROW, max_epochs=0)),
    ),
]


def complexes() -> nn.Module:
    """A body with complex features."""
    return nn.Sequential(Complex(), nn.Linear(D, 8).to(torch.complex64))


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
