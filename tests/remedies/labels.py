"""y, and the labels of classifiers."""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood import RejectingClassifier, SparseEnergyOODDetector

from .common import (
    KNOWN,
    KNOWN_Y,
    ORDERED,
    D,
    K,
    N,
    Told,
    X,
    Y,
    case,
    detector,
    fit,
    fitted,
    network,
    says,
    search,
)

ONE_HOT = np.eye(K)[Y]
WORDS = np.array(["ant", "bee", "cat"])[Y]
MASKED_Y = np.ma.array(Y, mask=np.arange(N) < 3)


def to_indices(told: Told) -> np.ndarray:
    told.says("Map y to logit indices")
    return np.searchsorted([10, 20, 30], (Y + 1) * 10)


def given_other_weights() -> SparseEnergyOODDetector:
    """A detector whose module was changed after fit; its first weights are kept beside it."""
    changed = fit(network())
    changed.weights_of_fit = copy.deepcopy(changed.module.state_dict())
    with torch.no_grad():
        changed.module[0].weight.mul_(1.01)
    return changed


def given_back(told: Told) -> None:
    changed = given_other_weights()
    told(
        "module.load_state_dict(weights_of_fit)",
        module=changed.module,
        weights_of_fit=changed.weights_of_fit,
    )
    changed.id_accuracy(X, Y)


CASES = [
    case(
        "Turn one-hot or multi-label rows into one label each",
        lambda: fit(network(), y=ONE_HOT),
        lambda told: fit(network(), y=told("y.argmax(axis=1)", y=ONE_HOT)),
        lambda told: fit(network(), y=told("y.argmax(axis=1)", y=torch.from_numpy(ONE_HOT))),
    ),
    case(
        "y is a masked array",
        lambda: fit(network(), y=MASKED_Y),
        says(
            "Leave those rows out of X and y",
            lambda: fit(network(), X[~MASKED_Y.mask], MASKED_Y[~MASKED_Y.mask]),
        ),
        lambda told: fit(network(), y=told("y.filled(label)", y=MASKED_Y, label=1)),
    ),
    case(
        "Complex data not supported: y has dtype",
        lambda: fit(network(), y=Y + 0j),
        says("Pass the class of each row", lambda: fit(network(), y=Y)),
    ),
    case(
        "pass one label a row",
        lambda: fit(network(), y=Y[:-1]),
        says("119 labels for 120 rows", lambda: fit(network(), y=Y)),
    ),
    case(
        "labels are integers, strings or booleans. Encode them first",
        lambda: fit(network(), y=WORDS.astype("S")),
        lambda told: fit(
            network(),
            y=told("sklearn.preprocessing.LabelEncoder")().fit_transform(WORDS.astype("S")),
        ),
    ),
    case(
        "so no row can carry it",
        lambda: fit(network(), KNOWN, KNOWN_Y, ood_label="outlier"),
        says("a label of the kind of y", lambda: fit(network(), KNOWN, KNOWN_Y, ood_label=-1)),
    ),
    case(
        "distinct labels: ",
        lambda: fit(network(), KNOWN, np.where(KNOWN_Y < 0, -1, 10 * (KNOWN_Y + 1))),
        lambda told: fit(network(), y=to_indices(told)),
        lambda told: fit(
            network(),
            KNOWN,
            np.where(KNOWN_Y < 0, -1, 10 * (KNOWN_Y + 1)),
            ood_label=-1 if told.says("with ood_label=") else None,
        ),
        says("or exactly 3 distinct values", lambda: fit(network(), y=WORDS)),
    ),
    case(
        "distinct labels: ",
        lambda: search(detector(), KFold(3), rows=X[ORDERED], y=WORDS[ORDERED]),
        lambda told: search(
            detector(),
            rows=X[ORDERED],
            y=WORDS[ORDERED],
            **told.keywords("cv=InDistributionKFold()"),
        ),
    ),
    case(
        "so there is nothing to learn from",
        lambda: fit(rows=np.ones((60, D))),
        says("Pass rows that differ", lambda: fit(rows=X)),
    ),
    case(
        "y mixes labels of the types",
        lambda: fit(network(), y=[None, *Y[1:].tolist()]),
        says(
            "labels of one kind, without missing values",
            lambda: fit(network(), X[1:], Y[1:].tolist()),
        ),
        says("None for all rows", lambda: fit(network(), y=None)),
    ),
    case(
        "y contains NaN or infinity",
        lambda: fit(network(), y=np.where(np.arange(N) < 3, np.nan, Y)),
        says("remove the rows without a label", lambda: fit(network(), X[3:], Y[3:])),
        lambda told: fit(network(), **told.keywords("y=None")),
    ),
    case(
        "y holds fractional or huge values",
        lambda: fit(y=X[:, 0]),
        lambda told: fit(y=told("np.digitize(y, edges)", y=X[:, 0], edges=[-0.5, 0.5])),
        lambda told: fit(**told.keywords("y=None")),
    ),
    case(
        "id_accuracy needs labels",
        lambda: fitted().id_accuracy(X),
        says(
            "pass y, one label of `classes_` a row",
            lambda: fitted().id_accuracy(X, fitted().classes_[Y]),
        ),
    ),
    case(
        "id_accuracy got y with the labels",
        lambda: fitted().id_accuracy(X, Y + 7),
        says("those of the classifier, [0, 1, 2]", lambda: fitted().id_accuracy(X, Y)),
    ),
    case(
        "The weights of module are not those that fit was given",
        lambda: given_other_weights().id_accuracy(X, Y),
        given_back,
        says(
            "or fit a new detector",
            lambda: given_other_weights().fit(X, Y).id_accuracy(X, Y),
        ),
    ),
    *(
        case(
            "expected one label for all rows that are rejected",
            lambda labels=labels: fitted().predict_class(X[:2], reject_label=labels),
            says("an int, str or bool", lambda: fitted().predict_class(X, reject_label="none")),
        )
        for labels in ((-1, -2), [-1], np.array([-1, -2]))
    ),
    *(
        case(
            "is one of the classes",
            lambda wrong=wrong: wrong(2),
            says("pass a label that no class has", lambda wrong=wrong: wrong(-1)),
        )
        for wrong in (
            lambda label: fitted().predict_class(X, reject_label=label),
            lambda label: (
                RejectingClassifier(detector(), reject_label=label).fit(X, Y).predict_proba(X)
            ),
        )
    ),
    case(
        "If y gives it to known outliers",
        lambda: RejectingClassifier(detector()).fit(KNOWN, KNOWN_Y),
        lambda told: RejectingClassifier(detector(**told.keywords("ood_label=-1"))).fit(
            KNOWN, KNOWN_Y
        ),
    ),
    case(
        "so no metric can compare predictions with y",
        lambda: RejectingClassifier(detector()).fit(X, WORDS),
        lambda told: RejectingClassifier(detector(), reject_label=told('"rejected"')).fit(X, WORDS),
        says(
            "an int such as -1 beside integers",
            lambda: RejectingClassifier(detector(), reject_label=-1).fit(X, Y),
        ),
    ),
    case(
        "so no metric can compare predictions with y",
        lambda: RejectingClassifier(detector(module=network(2))).fit(X, X[:, 0] > 0),
        says(
            "turn booleans into integers",
            lambda: RejectingClassifier(detector(module=None, pretrain_epochs=1)).fit(
                X, (X[:, 0] > 0).astype(int)
            ),
        ),
    ),
    case(
        "a Pipeline or a search goes around RejectingClassifier",
        lambda: RejectingClassifier(make_pipeline(StandardScaler(), detector())).fit(X, Y),
        says(
            "not inside it",
            lambda: make_pipeline(StandardScaler(), RejectingClassifier(detector())).fit(X, Y),
        ),
    ),
    case(
        "RejectingClassifier requires y to be passed",
        lambda: RejectingClassifier(detector()).fit(X, None),
        says("Pass one label a row", lambda: RejectingClassifier(detector()).fit(X, Y)),
        says("use the detector alone", lambda: detector().fit(X)),
    ),
    case(
        "A column-vector y was passed",
        lambda: RejectingClassifier(detector()).fit(X, Y[:, None]),
        lambda told: RejectingClassifier(detector()).fit(X, told("y.ravel()", y=Y[:, None])),
    ),
    case(
        "pass rows of at least 2, or use the detector alone",
        lambda: RejectingClassifier(detector()).fit(X, np.zeros(N, int)),
        lambda told: RejectingClassifier(detector()).fit(X, Y),
        lambda told: detector().fit(X, np.zeros(N, int)),
    ),
    case(
        "which the fitted detector does not have",
        lambda: RejectingClassifier(FrozenEstimator(fitted())).fit(X, Y + 5),
        says(
            "Pass the labels that the detector was fitted on",
            lambda: RejectingClassifier(FrozenEstimator(fitted())).fit(X, Y),
        ),
        says(
            "a detector that is not frozen", lambda: RejectingClassifier(detector()).fit(X, Y + 5)
        ),
    ),
]
