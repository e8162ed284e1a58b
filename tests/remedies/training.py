"""Training, and what is said of its outcome."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from modules import HARM, digit_images
from torch import nn

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.penalties import get_penalty, l1

from .common import (
    FRESH,
    KNOWN,
    KNOWN_Y,
    D,
    K,
    N,
    Told,
    X,
    Y,
    case,
    detector,
    fit,
    labels_of,
    network,
    network_labels,
    predicted,
    says,
    seeded,
)
from .forwards import ALIKE


def diverge(**parameters: Any) -> SparseEnergyOODDetector:
    return fit(network(), X, Y, max_epochs=3, **parameters)


def entropy(features: torch.Tensor) -> torch.Tensor:
    """A penalty that has no gradient where a feature is 0."""
    return torch.special.entr(features / (features.sum(1, keepdim=True) + 1e-12)).sum(1)


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


def let_in(weight: Any = HARM["sparsity_weight"], **parameters: Any) -> SparseEnergyOODDetector:
    """Fine-tuning that lets more outliers in."""
    images, labels, module = digit_images()
    settings = {**HARM, "sparsity_weight": weight, "random_state": 0, **parameters}
    return SparseEnergyOODDetector(module, **settings).fit(images, labels)


AUTO = {"sparsity_weight": "auto", "ood_label": 1}

CASES = [
    case(
        "steps of one row, on which batch-norm cannot train",
        lambda: fit(normalised(), batch_size=1),
        says("batch_size of at least 2", lambda: fit(normalised(), batch_size=32)),
    ),
    case(
        "steps of one row, on which batch-norm cannot train",
        lambda: fit(normalised(), ALIKE),
        says("and more rows", lambda: fit(normalised())),
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
                {"sparsity_weight": 1e5, "batch_size": 16},
                "sparsity_weight",
                0.02,
            ),
            (
                "The scores collapsed",
                {"sparsity_weight": 1e5, "batch_size": 16},
                "learning_rate",
                1e-9,
            ),
            (
                "The logits became NaN",
                {**AUTO, "learning_rate": 1e30},
                "learning_rate",
                1e-3,
            ),
        ]
    ),
    case(
        'sparsity_weight="auto" can try no weight above 0',
        lambda: diverge(**AUTO, penalty=entropy),
        says("or pass another penalty", lambda: diverge(**AUTO)),
    ),
    case(
        "check that X is on the scale that the network expects",
        lambda: fit(network(), 1e30 * X, penalty="l1"),
        lambda told: fit(network(), X, penalty="l1"),
    ),
    case(
        "has no memory for a training step",
        lambda: fit(Crowded(), batch_size=32),
        says("at batch_size=32", "pass a smaller one", lambda: fit(Crowded(), batch_size=16)),
    ),
    case(
        "memory= keeps nothing while random_state=None",
        lambda: fit(network(), memory="unused", random_state=None),
        says(
            "Pass an int as random_state",
            lambda: fit(network(), memory="unused", random_state=0, max_epochs=0),
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
                says(
                    "Pass ood_label=, their label in y",
                    lambda: fit(network(), KNOWN, KNOWN_Y, outlier_weight=0.5, ood_label=-1),
                ),
            ),
            (
                {"ood_label": -1},
                says(
                    "Label some rows of y with ood_label=-1",
                    lambda: fit(network(), KNOWN, KNOWN_Y, outlier_weight=0.5, ood_label=-1),
                ),
            ),
        ]
    ),
    case(
        "fit got n_samples",
        lambda: fit(network(), X[:1], Y[:1]),
        says("needs at least 2", lambda: fit(network(), ALIKE, max_epochs=0)),
    ),
    case(
        "of n_samples = ",
        lambda: fit(network(), X, Y, calibration_size=118),
        says("only 117 are free", lambda: fit(network(), X, Y, calibration_size=117)),
        says(
            "Pass more rows",
            lambda: fit(network(), np.concatenate([X, X + 1]), np.tile(Y, 2), calibration_size=118),
        ),
        says(
            "or None, and call calibrate(X) on fresh rows",
            lambda: predicted(fit(network(), X, Y, calibration_size=None).calibrate(FRESH)),
        ),
    ),
    case(
        "of n_samples = ",
        lambda: fit(network(), X[:3], [0, 1, 2]),
        says("asks for 1", "Pass more rows", lambda: fit(network(), X, Y)),
        says(
            "or None, and call calibrate(X) on fresh rows",
            lambda: predicted(fit(None, X[:3], [0, 1, 2], calibration_size=None).calibrate(FRESH)),
        ),
    ),
    case(
        "need batches of images, (n, c, h, w), (n, h, w, c) or (n, h, w)",
        lambda: fit(network(), augment="flip"),
        lambda told: fit(network(), **told.keywords("augment=None")),
        says(
            "or a callable on a batch", lambda: fit(network(), augment=lambda batch: batch + 0.01)
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
        lambda: fit(nn.Sequential(Zero(), network()[2]), **AUTO),
        lambda told: fit(
            nn.Sequential(Zero(0.1), network()[2]),
            **AUTO | told.keywords('penalty="l1"') | {"sparsity_weight": 1.0},
        ),
    ),
    case(
        "so it cannot be divided by it",
        lambda: fit(nn.Sequential(Zero(), network()[2]), penalty="relative_l1"),
        lambda told: fit(nn.Sequential(Zero(0.1), network()[2]), **told.keywords('penalty="l1"')),
        says("check the network", lambda: fit(network(), penalty="relative_l1")),
    ),
    *(
        case(
            words,
            lambda wrong=wrong: get_penalty(wrong),
            says("'l1', 'l1_over_l2', 'relative_l1'", lambda: get_penalty("l1")),
            says(
                "a callable from features (n, d) to values (n,)",
                lambda: get_penalty(lambda h: h.abs().sum(dim=1)),
            ),
        )
        for words, wrong in [("is unknown; pass", "l2"), (", not a penalty; pass", 0.5)]
    ),
    case(
        "The fit of penalty=",
        lambda: fit(network(), penalty=Fitted(3)),
        says(
            "nothing or the fitted penalty, a callable from features (n, d)",
            lambda: fit(network(), penalty=Fitted(None)) and fit(network(), penalty=Fitted(l1)),
        ),
    ),
    *(
        case(
            "hardly better than chance",
            lambda: fit(network(), -X, Y),
            remedy,
        )
        for remedy in (
            says(
                "in another order than the logits",
                lambda: fit(permuted([1, 2, 0]), X, labels_of(permuted([1, 2, 0]))),
            ),
            says(
                "(pretrain_epochs=)",
                lambda: fit(network(), X, labels_of(permuted([1, 2, 0])), pretrain_epochs=20),
            ),
        )
    ),
    case(
        "hardly better than chance",
        lambda: fit(network(), -X, Y),
        says("(preprocess=)", lambda: fit(network(), -X, Y, preprocess=torch.neg)),
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
        says(
            "calibrate(X_fresh) after fit",
            lambda: predicted(fit(network(), calibration_size=None).calibrate(FRESH)),
        ),
    ),
    case(
        "The threshold was placed on the training rows",
        lambda: rejecting().predict(X),
        says(
            "detector_.calibrate of a RejectingClassifier",
            lambda: (
                (classifier := rejecting()).detector_.calibrate(FRESH) and classifier.predict(X)
            ),
        ),
    ),
    case("Fine-tuning detects", let_in, says('sparsity_weight="auto"', lambda: let_in("auto"))),
    case("Fine-tuning detects", let_in, says("max_epochs=0", lambda: let_in(max_epochs=0))),
    *(
        case(
            "Fine-tuning took the accuracy",
            steps,
            says(*change, lambda change=change: steps(**change)),
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
