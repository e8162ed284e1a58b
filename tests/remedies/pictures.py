"""Displays."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import sklearn
from sklearn.cluster import KMeans
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV, KFold

from skood import RejectingClassifier
from skood.model_selection import make_ood_scorer
from skood.plotting import (
    ClassCoverageDisplay,
    DetectionRocDisplay,
    DetectionTableDisplay,
    FeatureActivityDisplay,
    ImageGridDisplay,
    RejectionConfusionDisplay,
    RiskCoverageDisplay,
    ScoreDistributionDisplay,
    SelectionDisplay,
)
from skood.plotting.shared import new_axes

from .common import (
    LISTS,
    NANS,
    OUTLIERS,
    X,
    Y,
    case,
    detector,
    fit,
    fitted,
    network,
    refused,
    says,
)

IMAGES = np.random.RandomState(0).uniform(size=(2, 5, 6))
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


def risk(scores: Any = (2.0, 1.0), correct: Any = (True, False)) -> RiskCoverageDisplay:
    return RiskCoverageDisplay.from_predictions(scores, correct)


def cells(**options: Any) -> DetectionTableDisplay:
    settings = {"values": [[0.5, 0.6]], "methods": ["a"], "columns": ["x", "y"]}
    return DetectionTableDisplay(**(settings | options))


CASES = [
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
            says(
                "SparseEnergyOODDetector",
                lambda kind=kind: kind.from_estimator(fitted(), X, OUTLIERS),
            ),
            lambda told, kind=kind: kind.from_predictions([1.0, 2.0], [0.0]),
        )
        for kind in (ScoreDistributionDisplay, DetectionRocDisplay)
    ),
    case(
        "If you have answers, draw them with from_predictions",
        lambda: RejectionConfusionDisplay.from_estimator(fitted(), X, Y),
        says(
            "a fitted RejectingClassifier",
            lambda: RejectionConfusionDisplay.from_estimator(
                RejectingClassifier(detector()).fit(X, Y), X, Y
            ),
        ),
        lambda told: RejectionConfusionDisplay.from_predictions(Y, Y),
    ),
    case(
        "no class beside reject_label",
        lambda: RejectionConfusionDisplay.from_predictions([-1, -1], [0, 1]),
        says(
            "pass rows of some classes",
            lambda: RejectionConfusionDisplay.from_predictions([-1, 0], [0, 1]),
        ),
        says(
            "or another reject_label",
            lambda: RejectionConfusionDisplay.from_predictions([-1, -1], [0, 1], reject_label=7),
        ),
    ),
    case(
        "expected a dict from the title of a row to its images",
        lambda: ImageGridDisplay(images=IMAGES),
        lambda told: ImageGridDisplay(images={"title": IMAGES}).plot(),
    ),
    case(
        "images holds no image; pass at least one",
        lambda: ImageGridDisplay(images={"title": IMAGES[:0]}),
        lambda told: ImageGridDisplay(images={"title": IMAGES[:1]}).plot(),
    ),
    case(
        "expected images, numbers of shape",
        lambda: ImageGridDisplay(images={"title": IMAGES[0]}),
        says(
            "of shape (n, h, w), (n, h, w, c) or (n, c, h, w)",
            lambda: [
                ImageGridDisplay(images={"title": images}).plot()
                for images in (IMAGES[:1], IMAGES[..., None], IMAGES[:, None])
            ],
        ),
    ),
    case(
        "holds NaN or infinity; pass finite numbers",
        lambda: ImageGridDisplay(images={"title": np.nan * IMAGES}),
        lambda told: ImageGridDisplay(images={"title": 10 * IMAGES}).plot(),
    ),
    case(
        "expected a dict from the title of a row to the captions of its images",
        lambda: ImageGridDisplay(images={"title": IMAGES}, captions=["a", "b"]),
        lambda told: ImageGridDisplay(images={"title": IMAGES}, captions={"title": ["a", "b"]}),
    ),
    case(
        "captions for",
        lambda: ImageGridDisplay(images={"title": IMAGES}, captions={"titel": ["a", "b"]}),
        says(
            "pass one an image, by the titles of images",
            lambda: ImageGridDisplay(images={"title": IMAGES}, captions={"title": ["a", "b"]}),
        ),
    ),
    case(
        "pass one value an image",
        lambda: ImageGridDisplay.from_predictions([1.0], IMAGES),
        lambda told: ImageGridDisplay.from_predictions([1.0, 2.0], IMAGES),
    ),
    case(
        "answers for",
        lambda: RejectionConfusionDisplay.from_predictions([0, 1], [0]),
        says("pass one a row", lambda: RejectionConfusionDisplay.from_predictions([0, 1], [0, 1])),
    ),
    case(
        "does not hold labels",
        lambda: RejectionConfusionDisplay.from_predictions([0, 1], [0.5, 1]),
        lambda told: RejectionConfusionDisplay.from_predictions([0, 1], [0, 1]),
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
        says("3 candidates, from 0", lambda: draw(chosen=2)),
    ),
    case(
        "so there is nothing to draw. Call fit first",
        lambda: SelectionDisplay.from_estimator(sklearn.base.clone(SEARCHED())),
        lambda told: SelectionDisplay.from_estimator(SEARCHED()),
    ),
    case(
        "If you have results, draw them with from_cv_results",
        lambda: SelectionDisplay.from_estimator(sklearn.base.clone(fitted())),
        lambda told: SelectionDisplay.from_estimator(SEARCHED()),
        lambda told: SelectionDisplay.from_estimator(
            fit(network(), X, Y, **told.keywords('sparsity_weight="auto"'))
        ),
        lambda told: draw(),
    ),
    case(
        "has tried no path of weights",
        lambda: SelectionDisplay.from_estimator(fitted()),
        lambda told: SelectionDisplay.from_estimator(
            fit(network(), X, Y, **told.keywords('sparsity_weight="auto"'))
        ),
        says("or draw a search", lambda: SelectionDisplay.from_estimator(SEARCHED())),
    ),
    case(
        "expected the same detectors in both",
        lambda: risk({"a": [2.0, 1.0]}),
        lambda told: risk({"a": [2.0, 1.0]}, {"a": [True, False]}),
    ),
    case(
        "expected at least one detector",
        lambda: RiskCoverageDisplay.from_estimator({}, X, Y),
        lambda told: RiskCoverageDisplay.from_estimator({"a": fitted()}, X, Y),
    ),
    case(
        "rows; pass one a row",
        lambda: risk(correct=[True]),
        lambda told: risk(correct=[True, False]),
    ),
    case(
        "expected True or False for each row",
        lambda: ClassCoverageDisplay.from_predictions(Y, fitted().predict(X)),
        says(
            "Compare first",
            lambda: ClassCoverageDisplay.from_predictions(Y, fitted().predict(X) == 1),
        ),
    ),
    case(
        "none of the classes",
        lambda: ClassCoverageDisplay.from_estimator(fitted(), X, Y + 10),
        says(
            "Pass the true class of each row",
            lambda: ClassCoverageDisplay.from_estimator(fitted(), X, Y),
        ),
    ),
    case(
        "axes; expected",
        lambda: draw(ax=new_axes(3)),
        says("expected 2", lambda: draw(ax=new_axes(2))),
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
        says("(1, 2)", lambda: cells(spread=[[0.1, 0.2]])),
    ),
    case(
        "spread has a value of",
        lambda: cells(spread=[[0.1, -0.2]]),
        says("expected at least 0", lambda: cells(spread=[[0.1, 0.2]])),
    ),
    case(
        "names, none of them twice",
        lambda: cells(columns=["x", "x"]),
        says("expected 2", lambda: cells(columns=["x", "y"])),
    ),
]
