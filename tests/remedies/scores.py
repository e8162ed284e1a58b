"""Scores, thresholds and arrays of numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skood import SparseEnergyOODDetector
from skood.calibration import place_class_thresholds, tpr_by_cost
from skood.metrics import auroc, detection_report
from skood.randomness import random_generator
from skood.scores import (
    Head,
    Knn,
    LayeredOutputs,
    LayerMoments,
    Odin,
    Outputs,
    TwoViews,
    Vim,
    apply_score,
    fit_score,
)

from .common import (
    FRESH,
    IDS,
    Body,
    D,
    K,
    X,
    case,
    embedding,
    fit,
    fitted,
    network,
    predicted,
    right,
    says,
    seeded,
)

OF_EACH_CLASS = (3 * np.random.RandomState(0).randn(12000, D)).astype(np.float32)


@seeded
def one_feature() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 1), nn.Linear(1, K))


@seeded
def one_layer() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Linear(D, K))


class Skipping(nn.Module):
    """Passes over its first layer if all values are large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x if (x > 50).all() else self.first(x))


def skipped(score: str) -> Any:
    """A network that passes over a layer for new rows, judged by a score."""
    return judged(seeded(Skipping)(), score).score_samples(0 * X + 60)


def moments(layers: torch.Tensor) -> LayerMoments:
    return LayerMoments().fit([LayeredOutputs(*SOME, layers)])


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


def checkpointed(reentrant: bool) -> Callable[..., torch.Tensor]:
    return lambda self, x: self.head(checkpoint(self.body, x, use_reentrant=reentrant).relu())


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

HEAD = Head(torch.eye(2).double(), torch.zeros(2).double())
SOME = Outputs(
    *2 * [torch.tensor([[4.0, 0.0], [3.0, 0.5], [0.5, 3.0], [0.0, 5.0]]).double()],
    torch.tensor([0, 0, 1, 1]),
)

LAYERS = torch.tensor([[[1.0], [0.5]], [[2.0], [0.4]], [[1.5], [0.6]], [[1.2], [0.5]]]).double()

SCORES = [
    *(
        case(
            words,
            lambda wrong=wrong: judged(score=wrong),
            says("'energy'", "'knn'", lambda: judged(score="knn")),
            says("an object from skood.scores", lambda: judged(score=Knn(5))),
            says(
                "a callable of (features, logits)",
                lambda: judged(score=lambda features, logits: logits.amax(dim=1)),
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
        says(ANOTHER, lambda: judged(nn.Sequential(nn.Linear(D, 8), nn.Linear(8, K)), "energy")),
    ),
    case(
        "must be at least twice n_neighbors",
        lambda: judged(score=Knn(n_neighbors=20, bank_size=30)),
        says("n_neighbors, 40", lambda: judged(score=Knn(20, bank_size=40))),
    ),
    case(
        "must be at most the number of training rows",
        lambda: judged(score="knn", rows=X[:40]),
        says("Pass fewer neighbours", "27.", lambda: judged(score=Knn(27), rows=X[:40])),
        says("or more rows", lambda: judged(score="knn")),
    ),
    case(
        "needs features that vary within the classes",
        lambda: judged(Constant(), "mahalanobis"),
        says("Check X and the network", lambda: judged(score="mahalanobis")),
    ),
    case(
        "needs features that vary within the classes",
        lambda: judged(Constant(), "direction_length"),
        says("Check X and the network", lambda: judged(score="direction_length")),
    ),
    case(
        "needs inner layers whose outputs vary within the classes",
        lambda: moments(0 * LAYERS),
        says("Check X and the network", lambda: judged(score="layer_moments")),
    ),
    case(
        "looks at inner layers, and there are none",
        lambda: judged(one_layer(), "three_views"),
        says('"two_views" in the place', lambda: judged(one_layer(), "two_views")),
    ),
    case(
        "does not call it once for all rows",
        lambda: skipped("three_views"),
        says('Pass score_function="two_views"', lambda: skipped("two_views")),
    ),
    case(
        "moments of as many rows as the logits have",
        lambda: apply_score(moments(LAYERS), *SOME[:2], LAYERS[1:]),
        says("as many rows", lambda: apply_score(moments(LAYERS), *SOME[:2], LAYERS)),
    ),
    case(
        "which scores inputs that it moves",
        lambda: judged(score=TwoViews(Odin())),
        says("Pass a score without uses_gradient", lambda: judged(score=TwoViews("gen"))),
    ),
    case(
        "needs rows that the network was not trained on",
        lambda: fit_score(TwoViews(), [SOME], lambda: HEAD),
        says(
            "Pass held_out, a callable",
            lambda: fit_score(TwoViews(), [SOME], lambda: HEAD, lambda: [SOME]),
        ),
    ),
    case(
        "outputs is an iterator, which can be read once",
        lambda: fit_score(TwoViews("react"), iter([SOME]), lambda: HEAD, lambda: [SOME]),
        says(
            "Pass a list of Outputs",
            lambda: fit_score(TwoViews("react"), [SOME], lambda: HEAD, lambda: [SOME]),
        ),
    ),
    case(
        "against other views, as it is the same",
        lambda: fit_score(
            TwoViews(), [SOME], lambda: HEAD, lambda: [Outputs(*(t[:1] for t in SOME))]
        ),
        says("Pass more rows", lambda: fit_score(TwoViews(), [SOME], lambda: HEAD, lambda: [SOME])),
        says("one of them alone", lambda: judged(score="energy")),
    ),
    case(
        "holds rows out of training, at least 2",
        lambda: judged(score="two_views", rows=X[:6], calibration_size=4),
        says("Pass more rows", lambda: judged(score="two_views")),
        says("or another score", lambda: judged(rows=X[:6], calibration_size=4)),
    ),
    case(
        "too few for their covariance",
        few_rows,
        says("Pass more rows", lambda: judged(score="mahalanobis")),
        says("or another score", lambda: judged(score="energy", rows=X[:9], calibration_size=None)),
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
        says(ANOTHER, lambda: judged(one_feature(), "msp")),
    ),
    case(
        "must be less than the number of features",
        lambda: judged(score=Vim(n_components=8)),
        says("features, 8", lambda: judged(score=Vim(n_components=7))),
    ),
    case(
        "round away",
        lambda: judged(network().bfloat16(), "odin"),
        says("Pass the network in float32", lambda: judged(network(), "odin")),
        says("or another score", lambda: judged(network().bfloat16(), "max_logit")),
    ),
    case(
        "needs the gradient of the logits with respect to",
        lambda: judged(Body(lambda self, x: right(self, x.detach())), "odin"),
        says(
            "detaches",
            ANOTHER,
            lambda: judged(Body(lambda self, x: right(self, x.detach())), "energy"),
        ),
    ),
    case(
        "with use_reentrant=True does not give",
        lambda: judged(Body(checkpointed(True)), "odin"),
        says("Pass use_reentrant=False", lambda: judged(Body(checkpointed(False)), "odin")),
        says("or another score", lambda: judged(Body(checkpointed(True)), "energy")),
    ),
    case(
        "which an input of dtype",
        lambda: judged(embedding(), "odin", rows=IDS, preprocess=torch.Tensor.long),
        says(
            "Pass another score_function",
            lambda: judged(embedding(), "energy", rows=IDS, preprocess=torch.Tensor.long),
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
        says(
            "perturbation(logits, batch) that gives what to add to the batch",
            lambda: judged(score=Gradient(lambda batch: 0.1 * batch)),
        ),
    ),
    case(
        "tpr_by_cost needs outliers",
        lambda: tpr_by_cost([1.0, 2.0]),
        says("pass score_ood", lambda: tpr_by_cost([1.0, 2.0], [0.0])),
        says(
            "or score_new, scores of rows as they come, with ood_share",
            lambda: tpr_by_cost([1.0, 2.0], score_new=[0.0, 1.5], ood_share=0.5),
        ),
    ),
    case(
        "expected the number of a class for each of",
        lambda: place_class_thresholds(np.arange(3.0), [0, 1], 2, 0.5),
        says("3 scores", lambda: place_class_thresholds(np.arange(3.0), [0, 1, 1], 2, 0.5)),
    ),
    case(
        "expected numbers of classes, from 0",
        lambda: place_class_thresholds(np.arange(3.0), [0, 1, 2], 2, 0.5),
        says("from 0 to 1", lambda: place_class_thresholds(np.arange(3.0), [0, 1, 1], 2, 0.5)),
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
        says(
            "or lower tpr", lambda: predicted(copy.deepcopy(fitted()).calibrate(FRESH[:5], tpr=0.8))
        ),
    ),
    case(
        "are predicted for fewer",
        lambda: predicted(copy.deepcopy(fitted()).calibrate(FRESH[:60], per_class=True)),
        says(
            "Pass more rows to calibrate(X, per_class=True)",
            lambda: predicted(copy.deepcopy(fitted()).calibrate(OF_EACH_CLASS, per_class=True)),
        ),
        says(
            "or lower tpr",
            lambda: predicted(
                copy.deepcopy(fitted()).calibrate(OF_EACH_CLASS[:2000], tpr=0.5, per_class=True)
            ),
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


# Arrays of scores


def rates(scores: Any) -> float:
    return auroc(scores, [-1.0, 0.0])


NUMBERS = [
    case(
        "has masked entries; expected none",
        lambda: rates(np.ma.masked_less([1.0, 2.0], 1.5)),
        says("Drop their rows", lambda: rates(np.ma.masked_less([1.0, 2.0], 1.5).compressed())),
    ),
    case(
        "does not form an array",
        lambda: rates([[1.0], [1.0, 2.0]]),
        says("expected the shape (n,)", lambda: rates([1.0, 2.0])),
    ),
    case(
        "expected real numbers (float, int or bool)",
        lambda: rates(["0.5", "1.5"]),
        says("Convert them", lambda: rates(np.array(["0.5", "1.5"]).astype(float))),
    ),
    case(
        "expected real numbers (float, int or bool)",
        lambda: rates([0.5, None]),
        says("or drop rows that lack one", lambda: rates([0.5])),
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
        says("at least one set", lambda: detection_report([1.0], {"far": [0.0]})),
    ),
    case(
        "has a set named 'mean'",
        lambda: detection_report([1.0], {"mean": [0.0]}),
        says("Rename the set", lambda: detection_report([1.0], {"far": [0.0]})),
    ),
    case(
        "; expected an int, a numpy.random.RandomState or None",
        lambda: random_generator("seed"),
        says("an int", lambda: random_generator(0)),
        lambda told: random_generator(told("numpy.random.RandomState", numpy=np)(0)),
        says("or None", lambda: random_generator(None)),
    ),
]


CASES = [*SCORES, *NUMBERS]
