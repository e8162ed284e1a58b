"""Folds, scorers, searches and surrogates."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.ensemble import IsolationForest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import KFold
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from torch import nn

from skood import SparseEnergyOODDetector
from skood.metrics import auroc, fpr_at_tpr
from skood.model_selection import (
    AccuracyGuard,
    InDistributionKFold,
    make_ood_scorer,
    surrogate_outliers,
)

from .common import (
    KNOWN,
    KNOWN_Y,
    LISTS,
    NANS,
    ORDERED,
    OUTLIERS,
    K,
    N,
    X,
    Y,
    case,
    detector,
    fit,
    fitted,
    labels_of,
    network,
    refused,
    says,
    search,
    whole,
)

COLUMNS = {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "d": X[:, 3], "e": X[:, 4], "f": X[:, 5]}
LABELS_OF_ONE = labels_of(network(K, 1), X[:, :1])
BOTH = ["auroc", "accuracy_change"]
SHAPES = np.random.RandomState(0).rand(20, 8, 8) > 0.5  # their own silhouettes


def score(
    metric: Any = "auroc", X_ood: Any = None, rows: Any = X, y: Any = Y, **options: Any
) -> Any:
    return make_ood_scorer(metric, X_ood, **options)(fitted(), rows, y)


def folds(y: Any = Y, rows: Any = X, **options: Any) -> list[Any]:
    return list(InDistributionKFold(**({"n_splits": 3} | options)).split(rows, y))


def chosen(rows: Any, y: Any) -> SparseEnergyOODDetector:
    settings = {"score_function": "auto", "max_epochs": 0, "ood_label": -1}
    return fit(network(), rows, y, **settings)


INDICES = np.random.RandomState(0).randint(0, 9, (60, 2, 5))
"""Of two embeddings, which have nine and two."""
INDICES[:, 1] %= 2


class Embeddings(nn.Module):
    """Adds what two tables have of the indices of a row, (2, m)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(9, 8), nn.Embedding(2, 8), nn.Linear(8, K)

    def forward(self, x: Any) -> Any:
        words, kinds = x.long().unbind(dim=1)
        return self.head((self.words(words) + self.kinds(kinds)).relu().mean(dim=1))


@functools.cache
def of_indices() -> SparseEnergyOODDetector:
    return fit(Embeddings(), INDICES, np.arange(60) % K)


class Fixed:
    """An outlier detector that gives the scores that it is given."""

    def __init__(self, scores: Callable[[Any], Any]) -> None:
        self.score_samples = scores


CASES = [
    case(
        "has no effect with shuffle=False",
        lambda: InDistributionKFold(shuffle=False, random_state=0),
        lambda told: InDistributionKFold(random_state=0, **told.keywords("shuffle=True")),
        says("or leave random_state out", lambda: InDistributionKFold(shuffle=False)),
    ),
    case(
        "known outlier(s) of y, too few to tell much",
        lambda: chosen(KNOWN[: N + 19], KNOWN_Y[: N + 19]),
        says("Label at least 20", lambda: chosen(KNOWN, KNOWN_Y)),
        says("or leave them out of X and y", lambda: chosen(X, Y)),
    ),
    case(
        "X holds indices for the embedding",
        lambda: make_ood_scorer()(of_indices(), INDICES),
        says(
            "make_ood_scorer(X_ood=...)",
            lambda: make_ood_scorer(X_ood=INDICES)(of_indices(), INDICES),
        ),
    ),
    case(
        "X holds indices for the embedding",
        lambda: fit(Embeddings(), INDICES, score_function="auto"),
        says(
            "pass score_function yourself", lambda: fit(Embeddings(), INDICES, score_function="msp")
        ),
    ),
    case(
        "split got y=None",
        lambda: folds(None, ood_label=-1),
        says("Pass y, one label per row", lambda: folds(KNOWN_Y, KNOWN, ood_label=-1)),
        lambda told: folds(None, **told.keywords("ood_label=None")),
    ),
    case(
        "Pass the label of the out-of-distribution rows",
        lambda: folds(KNOWN_Y, KNOWN, ood_label=-7),
        says("labels such as [-1, 0, 1, 2]", lambda: folds(KNOWN_Y, KNOWN, ood_label=-1)),
        lambda told: folds(**told.keywords("ood_label=None")),
    ),
    case(
        "have a single row each",
        lambda: folds(np.where(np.arange(N) == 5, 9, Y)),
        says(
            "[9]", "Leave these rows out", lambda: folds(np.delete(Y, 5), np.delete(X, 5, axis=0))
        ),
        says("give them the label of a larger class", lambda: folds(Y)),
    ),
    case(
        "folds cannot be stratified",
        lambda: folds(np.arange(10) % 5, X[:10]),
        lambda told: (
            told.says("or less") and folds(np.arange(10) % 5, X[:10], **told.keywords("n_splits=2"))
        ),
    ),
    case(
        "folds need at least as many",
        lambda: folds(None, X[:2]),
        says("Pass more rows", lambda: folds(None, X[:3])),
        says("or a smaller n_splits", lambda: folds(None, X[:2], n_splits=2)),
    ),
    case(
        "The groups parameter is ignored by",
        lambda: list(InDistributionKFold(3).split(X, Y, groups=Y)),
        says("Leave it out", lambda: folds()),
    ),
    case(
        "or accuracy_change: fitting or scoring failed",
        lambda: AccuracyGuard()(NANS),
        lambda told: told.says("The warnings of the search say why") and refused(told),
    ),
    case(
        "Every candidate loses more than tolerance",
        lambda: AccuracyGuard()(LISTS),
        says(
            "The one that loses least, 0.0200",
            "raise the tolerance",
            lambda: AccuracyGuard(tolerance=0.02)(LISTS),
        ),
        says(
            "Search smaller values of sparsity_weight",
            lambda: AccuracyGuard()(LISTS | {"mean_test_accuracy_change": [0, -0.05, -0.1]}),
        ),
    ),
    case(
        "cv_results_ has no scores named",
        lambda: AccuracyGuard()({"mean_test_score": [0.9]}),
        lambda told: (
            told.says("scoring=make_ood_scorer(['auroc', 'accuracy_change'], ...)")
            and whole(
                search(
                    detector(),
                    KFold(3),
                    make_ood_scorer(["auroc", "accuracy_change"], OUTLIERS),
                    refit=told("AccuracyGuard('auroc', tolerance=0.01)"),
                )
            )
        ),
        lambda told: told.says("is all there is") and refused(told),
    ),
    case(
        "got y=None, so no row can carry ood_label",
        lambda: score(ood_label=-1, y=None),
        lambda told: (
            told.says("Pass y, one label per row")
            and whole(
                search(
                    detector(ood_label=-1),
                    **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                    scoring=make_ood_scorer(ood_label=-1),
                    rows=KNOWN,
                    y=KNOWN_Y,
                )
            )
        ),
    ),
    *(
        case(
            words,
            lambda rows=rows, y=y: score(ood_label=-1, rows=rows, y=y),
            lambda told: whole(
                search(
                    detector(ood_label=-1),
                    **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                    scoring=make_ood_scorer(ood_label=-1),
                    rows=KNOWN,
                    y=KNOWN_Y,
                )
            ),
        )
        for words, rows, y in [
            ("expected in-distribution rows as well", OUTLIERS, [-1] * len(OUTLIERS)),
            ("because training folds hold none", X, Y),
        ]
    ),
    case(
        "If rows are ordered by class",
        lambda: search(
            detector(module=None, pretrain_epochs=1), KFold(3), rows=X[ORDERED], y=Y[ORDERED]
        ),
        lambda told: whole(
            search(
                detector(module=None, pretrain_epochs=1),
                **told.keywords("cv=InDistributionKFold()"),
                rows=X[ORDERED],
                y=Y[ORDERED],
            )
        ),
    ),
    case(
        "If such a label marks known outliers",
        lambda: score(rows=KNOWN, y=KNOWN_Y),
        says(
            "pass it as ood_label=",
            lambda: make_ood_scorer(ood_label=-1)(
                copy.deepcopy(fitted()).set_params(ood_label=-1), KNOWN, KNOWN_Y
            ),
        ),
    ),
    case(
        "If y holds no classes",
        lambda: score(y=Y + 7),
        lambda told: score(**told.keywords("y=None")),
    ),
    case(
        "A search that refits would train it on the outliers",
        lambda: make_ood_scorer(ood_label=-1)(fitted(), KNOWN, KNOWN_Y),
        lambda told: (
            told.says("to both")
            and make_ood_scorer(**told.keywords("ood_label=-1"))(
                copy.deepcopy(fitted()).set_params(**told.keywords("ood_label=-1")), KNOWN, KNOWN_Y
            )
        ),
    ),
    case(
        "so score makes outliers from X",
        lambda: copy.deepcopy(fitted()).set_params(ood_label=-1).score(X, Y),
        lambda told: whole(
            search(
                detector(ood_label=-1),
                **told.keywords("cv=InDistributionKFold(ood_label=-1)"),
                rows=KNOWN,
                y=KNOWN_Y,
            )
        ),
    ),
    case(
        "expected at least one, and no name twice",
        lambda: make_ood_scorer(["auroc", "auroc"]),
        lambda told: make_ood_scorer(["auroc"]),
    ),
    case(
        "X_ood is an empty dict; expected at least one set of rows",
        lambda: make_ood_scorer(X_ood={}),
        lambda told: score(X_ood={"far": OUTLIERS}),
    ),
    case(
        "has no rows; expected some",
        lambda: make_ood_scorer(X_ood={"far": OUTLIERS[:0]}),
        says("'far'", lambda: score(X_ood={"far": OUTLIERS})),
    ),
    case(
        "Pass rows as X_ood=",
        lambda: make_ood_scorer(OUTLIERS),
        lambda told: score(X_ood=OUTLIERS),
        says("'auroc'", "a function of the scores", lambda: score([auroc], OUTLIERS)),
    ),
    case(
        "is an error: less is better",
        lambda: make_ood_scorer("fpr_at_tpr"),
        lambda told: score(told("'neg_fpr_at_tpr'"), OUTLIERS),
        says(
            "or a function that returns it negated",
            lambda: score(lambda score_id, score_ood: -fpr_at_tpr(score_id, score_ood), OUTLIERS),
        ),
    ),
    case(
        "is unknown; expected one of",
        lambda: make_ood_scorer("roc_auc"),
        lambda told: score(told("'auroc'"), OUTLIERS),
    ),
    case(
        "has neither score_samples nor decision_function",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(LocalOutlierFactor().fit(X), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(
            LocalOutlierFactor(**told.keywords("novelty=True")).fit(X), X
        ),
    ),
    case(
        "expected one per row, (",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(IsolationForest(n_estimators=10).fit(X), X),
    ),
    case(
        "Find out what made them: rows out of range",
        lambda: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows[:, 0] / 0), X),
        lambda told: make_ood_scorer(X_ood=OUTLIERS)(Fixed(lambda rows: rows[:, 0]), X),
    ),
    case(
        "expected a finite number",
        lambda: score(lambda score_id, score_ood: float("nan"), OUTLIERS),
        lambda told: score(lambda score_id, score_ood: 0.5, OUTLIERS),
    ),
    case(
        "or leave this metric out",
        lambda: score("accuracy_change", y=np.zeros(N, int)),
        says("Pass y with the classes", lambda: score("accuracy_change")),
        lambda told: score("auroc"),
    ),
    case(
        "Leave this metric out for other detectors",
        lambda: make_ood_scorer(["auroc", "mean_l1"], OUTLIERS)(
            IsolationForest(n_estimators=10).fit(X), X
        ),
        lambda told: make_ood_scorer(["auroc"], OUTLIERS)(
            IsolationForest(n_estimators=10).fit(X), X
        ),
        says("a SparseEnergyOODDetector", lambda: score(["auroc", "mean_l1"], OUTLIERS)),
    ),
    case(
        "is no array of numbers, so no surrogate outliers are made of it",
        lambda: make_ood_scorer()(of_words(), WORDS),
        says("as X_ood=", lambda: make_ood_scorer(X_ood=WORDS[:5])(of_words(), WORDS)),
        says(
            "with ood_label=",
            lambda: make_ood_scorer(ood_label=9)(of_words(), WORDS, [9] * 5 + [0] * 7),
        ),
    ),
    case(
        "judges by outliers that it makes of X, and cannot",
        lambda: fit(network(K, 1), X[:, :1], LABELS_OF_ONE, sparsity_weight="auto"),
        says(
            "with ood_label=",
            lambda: fit(
                network(K, 1),
                KNOWN[:, :1],
                np.concatenate([LABELS_OF_ONE, [-1] * len(OUTLIERS)]),
                sparsity_weight="auto",
                ood_label=-1,
            ),
        ),
        says(
            "or pass sparsity_weight yourself",
            lambda: fit(network(K, 1), X[:, :1], LABELS_OF_ONE, sparsity_weight=0.3),
        ),
    ),
    case(
        "in units of the penalty's mean",
        lambda: fit(network(), X, Y, sparsity_weight="auto", penalty=negative),
        says(
            "Pass a number as sparsity_weight",
            lambda: fit(network(), X, Y, sparsity_weight=0.01, penalty=negative),
        ),
        says(
            "or a penalty that is positive",
            lambda: fit(network(), X, Y, sparsity_weight="auto", penalty="l1"),
        ),
    ),
    case(
        "is no surrogate for X of shape",
        lambda: surrogate_outliers(X, kind="blur"),
        lambda told: surrogate_outliers(X, kind=told("'columns'")),
    ),
    case(
        "Pass kind='auto', which takes",
        lambda: surrogate_outliers(SHAPES, kind="silhouettes"),
        lambda told: surrogate_outliers(SHAPES, **told.keywords("kind='auto'")),
    ),
    *(
        case(
            words,
            lambda rows=rows: surrogate_outliers(rows),
            says(
                "make_ood_scorer(X_ood=...)",
                lambda: make_ood_scorer(X_ood=OUTLIERS[:, :1])(narrow(), X[:, :1]),
            ),
            says(
                "make_ood_scorer(ood_label=...)",
                lambda: make_ood_scorer(ood_label=-1)(
                    copy.deepcopy(narrow()).set_params(ood_label=-1), KNOWN[:, :1], KNOWN_Y
                ),
            ),
        )
        for words, rows in [
            ("Use known outliers instead", np.ones((3, 2, 2, 2, 2))),
            ("surrogate outliers need at least 2 rows and 2 columns", X[:, :1]),
            ("would be rows like those of X", np.ones((3, 2))),
            ("are too small to permute patches", np.ones((3, 1, 1))),
        ]
    ),
]


def negative(features: Any) -> Any:
    return -features.abs().sum(dim=1)


WORDS = np.array(["one", "two", "three"] * 4, dtype=object)


@functools.cache
def of_words() -> Any:
    return make_pipeline(CountVectorizer(), IsolationForest(n_estimators=5)).fit(WORDS)


@functools.cache
def narrow() -> SparseEnergyOODDetector:
    return fit(network(K, 1), X[:, :1])
