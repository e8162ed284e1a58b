from __future__ import annotations

import pickle
import re
import warnings
from functools import partial

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.covariance import EllipticEnvelope
from sklearn.datasets import make_moons
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, SGDOneClassSVM
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
    validation_curve,
)
from sklearn.model_selection._split import _yields_constant_splits
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import OneClassSVM

from skood import SparseEnergyOODDetector
from skood.exceptions import SelectionWarning
from skood.metrics import METRICS, aupr, auroc, detection_error, fpr_at_tpr
from skood.model_selection import (
    AccuracyGuard,
    InDistributionKFold,
    make_ood_scorer,
    surrogate_outliers,
)


class FirstColumn(OutlierMixin, BaseEstimator):
    """Scores a row by its first column, so that scores can be written down."""

    def __init__(self, power=1):
        self.power = power

    def fit(self, X, y=None):
        self.n_rows_ = len(X)
        return self

    def score_samples(self, X):
        return np.asarray(X, dtype=float)[:, 0] ** self.power


class Classifying(FirstColumn):
    """Knows the classes of its training rows, and "classifies" by the second column."""

    def __init__(self, power=1, loss=0.0, ood_label=None):
        super().__init__(power)
        self.loss = loss
        self.ood_label = ood_label

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self

    def id_accuracy(self, X, y):
        before = float(np.mean(np.asarray(X)[:, 1] == y))
        return {"before": before, "after": before - self.loss}


def column(*values):
    return np.array(values, dtype=float)[:, None]


ID, OOD = column(4, 3, 2, 1), column(3, 1, 0, 0)


def quick_detector(**parameters):
    defaults = {"max_epochs": 1, "pretrain_epochs": 3, "calibration_size": 60, "random_state": 0}
    return SparseEnergyOODDetector(**{**defaults, **parameters})


@pytest.fixture(scope="module")
def nines(digits):
    """Rows ordered by class, the nines labelled as outliers."""
    order = np.argsort(digits.y, kind="stable")
    return digits.X[order], np.where(digits.y == 9, -1, digits.y)[order]


# Folds


def labelled_rows(kind, order):
    """60 rows of three classes, or of one where labels are booleans, and 13 outliers."""
    names = {
        "int": [3, 0, 7, -1],
        "str": ["cat", "dog", "eel", "ood"],
        "bool": [True, True, True, False],
    }[kind]
    y = np.repeat(names, [20, 20, 20, 13])
    return (y if order == "ordered" else np.random.RandomState(0).permutation(y)), names[-1]


@pytest.mark.parametrize("container", [np.asarray, list, pd.Series, lambda y: y[:, None]])
@pytest.mark.parametrize("order", ["ordered", "shuffled"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["int", "str", "bool"])
def test_folds_train_on_id_rows_and_test_each_row_once(kind, shuffle, order, container):
    y, ood_label = labelled_rows(kind, order)
    random_state = 0 if shuffle else None
    cv = InDistributionKFold(4, ood_label=ood_label, shuffle=shuffle, random_state=random_state)
    folds = list(cv.split(np.zeros((73, 2)), container(y)))
    assert len(folds) == cv.get_n_splits() == 4
    inliers = np.flatnonzero(y != ood_label)
    for train, test in folds:
        assert np.array_equal(train, np.setdiff1d(inliers, test))
        assert (np.diff(test) > 0).all()
        for label, count in zip(*np.unique(y, return_counts=True), strict=True):
            share = (y[test] == label).sum()
            assert count // 4 <= share <= -(-count // 4)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(73))


def test_folds_without_labels_or_without_outliers():
    X = np.zeros((11, 3))
    for y in (None, np.arange(11) % 2):
        folds = list(InDistributionKFold(3, random_state=0).split(X, y))
        for train, test in folds:
            assert sorted([*train, *test]) == list(range(11))
        assert sorted(np.concatenate([test for _, test in folds])) == list(range(11))


def test_unshuffled_folds_keep_neighbours_together():
    y = [0, 0, 0, 0, -1, -1, 1, 1]
    folds = InDistributionKFold(2, ood_label=-1, shuffle=False).split(np.zeros((8, 1)), y)
    assert [(train.tolist(), test.tolist()) for train, test in folds] == [
        ([2, 3, 7], [0, 1, 4, 6]),
        ([0, 1, 6], [2, 3, 5, 7]),
    ]


def test_the_seed_decides_the_folds(generator_states):
    y, ood_label = labelled_rows("int", "shuffled")
    before = generator_states()

    def tests(random_state):
        cv = InDistributionKFold(3, ood_label=ood_label, random_state=random_state)
        return [tuple(test) for _ in range(2) for _, test in cv.split(y, y)]

    assert tests(0) == tests(0)
    assert tests(0)[:3] == tests(0)[3:]
    assert tests(0) != tests(1)
    assert tests(None)[:3] != tests(None)[3:]
    generator = np.random.RandomState(0)
    first, second = tests(generator)[:3], tests(generator)[3:]
    assert first == tests(0)[:3]
    assert second != first
    assert generator_states() == before


def test_a_rare_class_is_in_every_training_fold():
    y = np.array([0] * 20 + [1] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folds = list(InDistributionKFold(5, random_state=0).split(y, y))
    assert all(1 in y[train] for train, _ in folds)
    assert sum((y[test] == 1).sum() for _, test in folds) == 2


def test_folds_are_a_splitter_like_those_of_scikit_learn():
    cv = InDistributionKFold(3, ood_label="ood", random_state=7)
    text = repr(cv)
    for part in ("InDistributionKFold(", "n_splits=3", "ood_label='ood'", "random_state=7"):
        assert part in text
    y, _ = labelled_rows("str", "ordered")
    expected = [test.tolist() for _, test in cv.split(y, y)]
    for copy in (clone(cv, safe=False), pickle.loads(pickle.dumps(cv))):
        assert [test.tolist() for _, test in copy.split(y, y)] == expected
    assert _yields_constant_splits(cv)
    assert _yields_constant_splits(InDistributionKFold(shuffle=False))
    assert not _yields_constant_splits(InDistributionKFold())
    assert hasattr(KFold, "set_split_request") == hasattr(cv, "set_split_request")
    with pytest.warns(SelectionWarning, match="groups parameter is ignored"):
        next(cv.split(y, y, groups=y))


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n_splits": 1}, ValueError, r"'n_splits' .* int in the range \[2, inf\)\. Got 1"),
        ({"n_splits": 2.0}, ValueError, "'n_splits' .* int .* Got 2.0"),
        ({"n_splits": True}, ValueError, "'n_splits' .* int .* Got True"),
        ({"ood_label": [1]}, TypeError, r"'ood_label' .* Got \[1\]"),
        ({"shuffle": "yes"}, TypeError, "'shuffle' .*bool.* Got 'yes'"),
        ({"shuffle": False, "random_state": 0}, ValueError, "random_state=0 has no effect"),
        ({"random_state": "seed"}, TypeError, "'random_state' .* int .* Got 'seed'"),
    ],
)
def test_bad_parameters_of_folds_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        InDistributionKFold(**parameters)


@pytest.mark.parametrize(
    ("ood_label", "y", "message"),
    [
        (-1, [0] * 2 + [-1] * 9, "at least as many in-distribution rows, and there are 2"),
        (-1, [-1] * 9, "at least as many in-distribution rows, and there are 0"),
        (-1, [0] * 9 + [-1] * 2, "at least as many out-of-distribution rows, and there are 2"),
        (-2, [0] * 9 + [-1] * 9, r"No row of y carries ood_label=-2; .* such as \[-1, 0\]"),
        ("ood", [0] * 9, "no row can carry it"),
        (-1, None, "got y=None, so no row can carry ood_label=-1"),
        (None, [0] * 9 + [1], r"labels \[1\] have a single row each"),
        (None, [0, 0, 1, 1], "no class of y has more than 2 rows. Pass n_splits=2"),
        (None, [0] * 8, "8 labels for 9 rows"),
        (None, [0.5] * 9, "fractional"),
    ],
)
def test_rows_that_cannot_be_folded_are_refused(ood_label, y, message):
    n_rows = 9 if y is None or len(y) == 8 else len(y)
    cv = InDistributionKFold(3, ood_label=ood_label, random_state=0)
    with pytest.raises(ValueError, match=message):
        next(cv.split(np.zeros((n_rows, 2)), y))


def test_too_few_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="and there are 2"):
        next(InDistributionKFold(3).split(np.zeros((2, 2))))


# Scorer: values


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("auroc", 13 / 16),
        # Precision at recalls 1/4, 2/4, 3/4, 4/4: 1/1, 2/3, 3/4, 4/6.
        ("aupr", (1 + 2 / 3 + 3 / 4 + 4 / 6) / 4),
        ("neg_fpr_at_tpr", -2 / 4),
        ("neg_detection_error", -1 / 4),
        (lambda score_id, score_ood: score_id.min() - score_ood.max(), -2.0),
        (partial(lambda score_id, score_ood, shift: score_id.min() + shift, shift=1), 2.0),
    ],
)
def test_metrics_against_values_worked_out_by_hand(metric, value):
    for scored in (
        make_ood_scorer(metric, OOD)(FirstColumn(), ID),
        make_ood_scorer(metric, {"only": OOD})(FirstColumn(), ID),
        make_ood_scorer(metric, ood_label=-1)(
            FirstColumn(), np.concatenate([ID, OOD])[::-1], [-1] * 4 + [0, 1, 1, 2]
        ),
    ):
        assert isinstance(scored, float)
        assert scored == pytest.approx(value, rel=1e-12)


def test_the_positive_class_reaches_the_metrics_that_have_one():
    estimator = FirstColumn()
    # OOD positive at thresholds 0, 1, 2, 3: precisions 2/2, 3/4, 3/5, 4/7 gain 1/2, 1/4, 0, 1/4.
    expected = 1 / 2 + 3 / 16 + 1 / 7
    for metric in ("aupr", aupr):
        scored = make_ood_scorer(metric, OOD, positive="ood")(estimator, ID)
        assert scored == pytest.approx(expected, rel=1e-12)
    # All OOD rows are detected at a threshold of 3, and three ID rows with them.
    assert make_ood_scorer("neg_fpr_at_tpr", OOD, positive="ood")(estimator, ID) == -3 / 4
    fixed = partial(aupr, positive="ood")
    assert make_ood_scorer(fixed, OOD)(estimator, ID) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name_in_searches)
@pytest.mark.parametrize("positive", ["id", "ood"])
def test_scorers_of_all_metrics_maximise_and_can_be_pickled(metric, positive):
    name = metric.name_in_searches
    value = metric.function(ID[:, 0], OOD[:, 0], positive=positive)
    scorer = pickle.loads(pickle.dumps(make_ood_scorer(name, OOD, positive=positive)))
    assert scorer(FirstColumn(), ID) == (-value if metric.is_error else value)
    assert name.startswith("neg_") == metric.is_error


def test_the_mean_over_sets_and_each_set_from_one_scoring():
    class Counting(FirstColumn):
        scored = ()

        def score_samples(self, X):
            self.scored = (*self.scored, len(X))
            return super().score_samples(X)

    sets = {"near": OOD, "far": column(0, 0, 0, -1, -1)}
    estimator = Counting()
    scores = make_ood_scorer(["auroc", "neg_fpr_at_tpr"], sets)(estimator, ID)
    assert scores == {
        "auroc": (13 / 16 + 1) / 2,
        "auroc_near": 13 / 16,
        "auroc_far": 1.0,
        "neg_fpr_at_tpr": -1 / 4,
        "neg_fpr_at_tpr_near": -1 / 2,
        "neg_fpr_at_tpr_far": 0.0,
    }
    assert sorted(estimator.scored) == [4, 4, 5]
    assert make_ood_scorer("auroc", sets)(FirstColumn(), ID) == (13 / 16 + 1) / 2
    assert make_ood_scorer(["auroc"], OOD)(FirstColumn(), ID) == {"auroc": 13 / 16}


def test_with_both_x_ood_decides_and_labelled_rows_are_dropped():
    scorer = make_ood_scorer("auroc", OOD, ood_label="ood")
    X, y = np.concatenate([ID, column(-9, 9)]), [*"abab", "ood", "ood"]
    assert scorer(FirstColumn(), X, y) == 13 / 16
    assert scorer(FirstColumn(), ID, [*"abab"]) == 13 / 16


@pytest.mark.parametrize(
    "convert", [np.asarray, torch.as_tensor, pd.DataFrame, pl.DataFrame, np.ndarray.tolist]
)
def test_without_outliers_surrogates_are_made_from_the_id_rows(digits, convert):
    forest = IsolationForest(n_estimators=5, random_state=0).fit(digits.X)
    X = digits.X_test
    expected = roc_auc_score(
        [1] * len(X) + [0] * len(X),
        [
            *forest.score_samples(X),
            *forest.score_samples(surrogate_outliers(X, digits.y_test, random_state=0)),
        ],
    )
    scorer = make_ood_scorer()
    assert scorer(forest, X) == pytest.approx(expected, rel=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # frames have names that forest has not seen
        assert scorer(forest, convert(X), digits.y_test) == scorer(forest, X)


def test_surrogates_of_a_tensor_that_numpy_has_no_dtype_for(fitted, digits):
    X = torch.as_tensor(digits.X_test).bfloat16()
    assert 0.8 < make_ood_scorer()(fitted, X, digits.y_test) <= 1


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_surrogates_of_a_frame_are_a_frame_with_its_names(digits, frame):
    X = frame({f"pixel {i}": digits.X[:200, i] for i in range(64)})
    forest = IsolationForest(n_estimators=5, random_state=0).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.5 < make_ood_scorer()(forest, X) <= 1


@pytest.mark.parametrize(
    "detector",
    [
        IsolationForest(n_estimators=10, random_state=0),
        OneClassSVM(),
        LocalOutlierFactor(novelty=True),
        EllipticEnvelope(support_fraction=0.9, random_state=0),
        SGDOneClassSVM(random_state=0),
    ],
    ids=lambda detector: type(detector).__name__,
)
@pytest.mark.parametrize("wrap", ["alone", "pipeline", "frozen", "search"])
def test_any_outlier_detector_in_any_wrapping(detector, wrap):
    random = np.random.RandomState(0)
    X, X_ood = random.randn(60, 3) * [1, 50, 1], random.randn(30, 3) * [1, 50, 1] + [4, 0, 4]
    estimator = {
        "alone": detector,
        "pipeline": make_pipeline(StandardScaler(), detector),
        "frozen": FrozenEstimator(make_pipeline(StandardScaler(), clone(detector)).fit(X)),
        "search": GridSearchCV(
            make_pipeline(StandardScaler(), detector),
            {"standardscaler__with_std": [True]},
            cv=InDistributionKFold(2),
            scoring=make_ood_scorer(X_ood=X_ood),
        ),
    }[wrap]
    if wrap != "frozen":
        estimator = clone(estimator).fit(X)
    scaler = StandardScaler().fit(X)
    reference = clone(detector).fit(X if wrap == "alone" else scaler.transform(X))
    scores = [
        reference.score_samples(rows if wrap == "alone" else scaler.transform(rows))
        for rows in (X, X_ood)
    ]
    expected = roc_auc_score([1] * 60 + [0] * 30, np.concatenate(scores))
    assert make_ood_scorer("auroc", X_ood)(estimator, X) == pytest.approx(expected, rel=1e-9)


def test_decision_function_where_there_is_no_score_samples():
    class Deciding(BaseEstimator):
        def decision_function(self, X):
            return X[:, 0]

    assert make_ood_scorer("auroc", OOD)(Deciding(), ID) == 13 / 16


# Scorer: the change of accuracy


def two_columns(labels, predictions):
    return np.column_stack([np.arange(len(labels)), predictions]), np.array(labels)


def test_accuracy_change_is_after_less_before_on_id_rows():
    X, y = two_columns([0, 1, 0, 1, -1, -1], [0, 1, 0, 0, -1, -1])
    detector = Classifying(loss=0.25, ood_label=-1).fit(X[:4], y[:4])
    scorer = make_ood_scorer("accuracy_change", ood_label=-1)
    assert scorer(detector, X, y) == -0.25
    assert scorer(detector, X[:4], y[:4]) == -0.25  # which needs no outliers
    both = make_ood_scorer(["accuracy_change", "auroc"], {"a": X[:2], "b": X[:1]}, ood_label=-1)
    assert set(both(detector, X, y)) == {"accuracy_change", "auroc", "auroc_a", "auroc_b"}
    assert both(detector, X, y)["accuracy_change"] == -0.25


def test_accuracy_change_sees_what_the_last_step_sees():
    X, y = two_columns([0, 1, 0, 1], [1, 2, 1, 2])

    class Strict(Classifying):
        def id_accuracy(self, X, y):
            assert (X[:, 1] == y).all()
            return super().id_accuracy(X, y)

    shifted = make_pipeline(FunctionTransformer(lambda X: X - [0, 1]), Strict(loss=0.5)).fit(X, y)
    scorer = make_ood_scorer("accuracy_change")
    for estimator in (shifted, make_pipeline(shifted), FrozenEstimator(shifted)):
        assert scorer(estimator, X, y) == -0.5
    search = GridSearchCV(shifted, {"strict__loss": [0.5]}, scoring=scorer, cv=[([0, 1], [2, 3])])
    assert scorer(search.fit(X, y), X, y) == -0.5


def test_accuracy_change_of_the_detector(digits):
    detector = quick_detector(
        module=digits.module, pretrain_epochs=0, sparsity_weight=300.0, learning_rate=0.01
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
    with torch.no_grad():
        before = digits.module(torch.as_tensor(digits.X_test, dtype=torch.float32)).argmax(1)
    expected = np.mean(detector.predict_class(digits.X_test) == digits.y_test) - np.mean(
        before.numpy() == digits.y_test
    )
    assert expected < -0.1
    scorer = make_ood_scorer("accuracy_change")
    assert scorer(detector, digits.X_test, digits.y_test) == pytest.approx(expected, abs=1e-12)


# Scorer: what it refuses


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("fpr_at_tpr", ValueError, "Pass 'neg_fpr_at_tpr'"),
        ("detection_error", ValueError, "Pass 'neg_detection_error'"),
        (fpr_at_tpr, ValueError, "Pass 'neg_fpr_at_tpr'"),
        (partial(fpr_at_tpr, tpr=0.8), ValueError, "returns it negated"),
        (["auroc", detection_error], ValueError, "Pass 'neg_detection_error'"),
        ("auc", ValueError, "expected one of .*'auroc'.*'neg_fpr_at_tpr'"),
        (["auroc", None], TypeError, "metric=None; expected one of"),
        (3, TypeError, "metric=3; expected one of"),
        (np.zeros((99, 2)), TypeError, r"metric=array\(.{,50}; expected one of.* rows as X_ood"),
        ([], ValueError, "at least one"),
        (["auroc", "auroc"], ValueError, "no name twice"),
        (["auroc", auroc], ValueError, "no name twice"),
    ],
)
def test_bad_metrics_are_refused(metric, error, message):
    with pytest.raises(error, match=message):
        make_ood_scorer(metric, OOD)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="empty dict"):
        make_ood_scorer("auroc", {})
    with pytest.raises(ValueError, match="set 'far' has no rows"):
        make_ood_scorer("auroc", {"near": OOD, "far": OOD[:0]})
    with pytest.raises(ValueError, match="set 'X_ood' has no rows"):
        make_ood_scorer("auroc", OOD[:0])
    with pytest.raises(TypeError, match="NoneType"):
        make_ood_scorer("auroc", {"near": None})
    with pytest.raises(ValueError, match=r"'positive' .*'ood'.* Got 'inlier' instead"):
        make_ood_scorer("auroc", positive="inlier")
    with pytest.raises(TypeError, match=r"'ood_label' parameter of make_ood_scorer .* Got 0.5"):
        make_ood_scorer("auroc", ood_label=0.5)

    def auroc_near(score_id, score_ood):
        return 0.0

    with pytest.raises(ValueError, match="no name twice"):
        make_ood_scorer(["auroc", auroc_near], {"near": OOD})


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, r"got y=None.*cv=InDistributionKFold\(ood_label=-1\)"),
        ([0, 1, 0, 1], r"None of the 4 rows .*cv=InDistributionKFold\(ood_label=-1\).*train_score"),
        ([-1] * 4, r"All 4 rows .*cv=InDistributionKFold\(ood_label=-1\)"),
        (list("abab"), "no row can carry it"),
        ([0, 1, 0], "3 labels for 4 rows"),
    ],
)
def test_folds_without_labelled_outliers_or_without_id_rows_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        make_ood_scorer("auroc", ood_label=-1)(FirstColumn(), ID, y)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.array([["a", "b"]] * 4), "dtype <U1, is no array of numbers.* X_ood=.* ood_label="),
        (pd.DataFrame({"a": [1.0] * 4, "b": ["x"] * 4}), "DataFrame of dtype object"),
        (np.arange(4.0), "neither a table"),
    ],
)
def test_rows_without_surrogates_are_refused(X, message):
    class Lengths(BaseEstimator):
        def score_samples(self, X):
            return np.arange(float(len(X)))

    with pytest.raises(ValueError, match=message):
        make_ood_scorer()(Lengths(), X)
    assert make_ood_scorer(X_ood=X)(Lengths(), X) == 0.5


def test_labels_that_the_detector_was_not_trained_on_are_refused():
    X, y = two_columns([0, 1, 2, 2], [0, 1, 2, 2])
    detector = Classifying().fit(X[:2], y[:2])
    for estimator in (detector, make_pipeline(detector), FrozenEstimator(detector)):
        with pytest.raises(ValueError, match=r"labels \[2\].*\[0, 1\].*cv=InDistributionKFold\(\)"):
            make_ood_scorer("auroc", X)(estimator, X, y)
    with pytest.raises(ValueError, match=r"cv=InDistributionKFold\(ood_label=-1\)"):
        make_ood_scorer("auroc", X, ood_label=-1)(detector, X, y)
    assert make_ood_scorer("auroc", X)(detector, X[:2], y[:2]) == 2 / 8


def test_labels_that_are_no_classes_are_left_alone():
    """With a single label the detector makes up classes, which are integers."""
    detector = Classifying().fit(ID, [0, 1, 2, 3])
    scorer = make_ood_scorer("auroc", ood_label="ood")
    y = ["id"] * 4 + ["ood"] * 4
    with pytest.warns(UserWarning, match="ood_label=None"):
        assert scorer(detector, np.concatenate([ID, OOD]), y) == 13 / 16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="1 NaN or infinite scores for the in-distribution rows"):
        make_ood_scorer("auroc", OOD)(FirstColumn(), column(1, bad, 2))
    with pytest.raises(ValueError, match="infinite scores for the out-of-distribution rows far"):
        make_ood_scorer("auroc", {"near": OOD, "far": column(bad)})(FirstColumn(), ID)


def test_estimators_and_metrics_that_give_no_scores_are_refused(digits):
    with pytest.raises(TypeError, match="neither score_samples nor decision_function"):
        make_ood_scorer("auroc", OOD)(LocalOutlierFactor(), ID)
    classifier = LogisticRegression().fit(digits.X[:100], digits.y[:100])
    with pytest.raises(ValueError, match=r"shape \(5, 10\) .* expected one per row, \(5,\)"):
        make_ood_scorer("auroc", digits.X[:5])(classifier, digits.X[:5])


@pytest.mark.parametrize("value", [np.nan, np.inf, None, "high", np.zeros(2)])
def test_metrics_that_give_no_number_are_refused(value):
    def the_metric(score_id, score_ood):
        return value

    with pytest.raises(ValueError, match=r"'the_metric' gave .* expected a finite number"):
        make_ood_scorer(the_metric, OOD)(FirstColumn(), ID)


def test_accuracy_change_says_what_it_lacks():
    scorer = make_ood_scorer("accuracy_change")
    with pytest.raises(TypeError, match="FirstColumn has no id_accuracy"):
        scorer(FirstColumn(), ID, [0, 1, 0, 1])
    detector = Classifying().fit(ID, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="at least two classes, and got none"):
        scorer(detector, ID)
    with pytest.raises(ValueError, match=r"and got \[1\] alone"):
        scorer(detector, ID, [1, 1, 1, 1])


def test_a_detector_that_would_be_refitted_on_the_outliers_is_warned_of():
    X, y = np.concatenate([ID, OOD]), [0, 1, 0, 1, -1, -1, -1, -1]
    scorer = make_ood_scorer("auroc", ood_label=-1)
    with pytest.warns(SelectionWarning, match="has ood_label=None, the scorer -1"):
        scorer(Classifying().fit(ID, y[:4]), X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer(Classifying(ood_label=-1).fit(ID, y[:4]), X, y)
        scorer(FirstColumn(), X, y)
        scorer(make_pipeline(Classifying(ood_label=-1)).fit(ID, y[:4]), X, y)


def test_scorers_can_be_pickled_copied_and_read():
    sets = {"near": OOD, "far": OOD - 9}
    scorer = make_ood_scorer(["auroc", "neg_fpr_at_tpr"], sets, ood_label=-1, positive="ood")
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy(FirstColumn(), ID, [0] * 4) == scorer(FirstColumn(), ID, [0] * 4)
    assert repr(scorer) == (
        "make_ood_scorer(['auroc', 'neg_fpr_at_tpr'], X_ood={'near': '<4 rows>', "
        "'far': '<4 rows>'}, ood_label=-1, positive='ood')"
    )
    assert "X_ood=<4 rows>" in repr(make_ood_scorer("auroc", OOD))
    search = clone(GridSearchCV(FirstColumn(), {}, scoring=scorer, refit=AccuracyGuard()))
    assert repr(search.scoring) == repr(scorer)
    assert repr(search.refit) == "AccuracyGuard('auroc', tolerance=0.01)"


# The guard


def results(metric, change, name="auroc"):
    return {
        "params": [{}] * len(metric),
        f"mean_test_{name}": np.array(metric),
        "mean_test_accuracy_change": np.array(change),
    }


@pytest.mark.parametrize(
    ("metric", "change", "index"),
    [
        ([0.7, 0.8, 0.9], [0.0, -0.005, -0.02], 1),
        ([0.7, 0.8, 0.9], [0.0, 0.01, 0.02], 2),
        ([0.7, 0.9, 0.9], [0.0, 0.0, 0.0], 1),
        ([np.nan, 0.8, 0.9], [0.0, -0.005, np.nan], 1),
        ([-0.5, -0.2, -0.1], [0.0, 0.0, -0.5], 1),
        ([0.7, 0.8, 0.9], [0.0, 0.89 - 0.90, 0.8 - 0.9], 1),
    ],
)
def test_the_guard_takes_the_best_of_the_accurate(metric, change, index):
    chosen = AccuracyGuard()(results(metric, change))
    assert chosen == index
    assert isinstance(chosen, int)
    named = AccuracyGuard("neg_fpr_at_tpr_svhn")
    assert named(results(metric, change, "neg_fpr_at_tpr_svhn")) == index


def test_the_tolerance_decides():
    candidates = results([0.7, 0.8, 0.9], [0.0, -0.02, -0.04])
    chosen = [AccuracyGuard(tolerance=tolerance)(candidates) for tolerance in (0, 0.02, 0.05)]
    assert chosen == [0, 1, 2]


def test_without_an_accurate_candidate_the_least_loss_is_taken():
    with pytest.warns(SelectionWarning, match=r"more than tolerance=0.01 .* loses least, 0.0200"):
        index = AccuracyGuard()(results([0.7, 0.8, 0.9, np.nan], [-0.03, -0.02, -0.4, -0.011]))
    assert index == 1


def test_the_guard_says_what_it_lacks():
    guard = AccuracyGuard("aupr")
    with pytest.raises(ValueError, match=r"'aupr', only \['score'\].*make_ood_scorer\(\['aupr', '"):
        guard({"mean_test_score": [0.5]})
    with pytest.raises(ValueError, match="no scores named 'accuracy_change'"):
        guard({"mean_test_aupr": [0.5]})
    with pytest.raises(ValueError, match="All 2 candidates have NaN"):
        guard(results([np.nan, 0.5], [0.0, np.nan], "aupr"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"metric": ["auroc"]}, TypeError),
        ({"tolerance": "1 %"}, TypeError),
        ({"tolerance": True}, TypeError),
        ({"tolerance": -0.01}, ValueError),
        ({"tolerance": np.nan}, ValueError),
    ],
)
def test_bad_arguments_of_the_guard_are_refused(arguments, error):
    ((name, value),) = arguments.items()
    message = f"The '{name}' parameter of AccuracyGuard must be .* Got {value!r} instead"
    with pytest.raises(error, match=re.escape(message).replace(re.escape(".*"), ".*")):
        AccuracyGuard(**arguments)


def test_the_guard_can_be_pickled():
    guard = pickle.loads(pickle.dumps(AccuracyGuard("aupr", tolerance=0.02)))
    assert guard == AccuracyGuard("aupr", tolerance=0.02) != AccuracyGuard("aupr")


# In scikit-learn's searches


@pytest.fixture(scope="module")
def moon():
    """A moon of ID rows, ordered, then a cluster of outliers in its hollow; labels 1 and -1."""
    X, y = make_moons(400, noise=0.05, random_state=0)
    X_ood = np.random.RandomState(0).normal([0, -0.2], 0.1, size=(60, 2))
    return np.concatenate([X[y == 0], X_ood]), np.repeat([1, -1], [200, 60])


def test_plain_folds_go_wrong_where_in_distribution_folds_do_not(moon):
    X, y = moon
    detector, grid = LocalOutlierFactor(novelty=True), {"n_neighbors": [20, 100]}

    def search(cv, scoring):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return GridSearchCV(detector, grid, cv=cv, scoring=scoring, refit=False).fit(X, y)

    # What each candidate is worth, trained on ID rows alone.
    X_id, X_ood = X[y == 1], X[y == -1]
    worth = {}
    for n_neighbors in grid["n_neighbors"]:
        values = []
        for train, test in KFold(5, shuffle=True, random_state=0).split(X_id):
            fitted = clone(detector).set_params(n_neighbors=n_neighbors).fit(X_id[train])
            scores = [fitted.score_samples(rows) for rows in (X_id[test], X_ood)]
            truth = [1] * len(test) + [0] * len(X_ood)
            values.append(roc_auc_score(truth, np.concatenate(scores)))
        worth[n_neighbors] = np.mean(values)
    assert worth[20] > 0.99
    assert worth[100] < 0.85

    # Folds of ordered rows lack one kind or the other.
    assert np.isnan(search(KFold(5), "roc_auc").cv_results_["mean_test_score"]).all()
    # Outliers leak into the training folds, and the wrong candidate wins.
    leaking = StratifiedKFold(5, shuffle=True, random_state=0)
    assert search(leaking, "roc_auc").best_params_ == {"n_neighbors": 100}

    for scorer in ("roc_auc", make_ood_scorer(ood_label=-1)):
        ours = search(InDistributionKFold(ood_label=-1, random_state=0), scorer)
        assert ours.best_params_ == {"n_neighbors": 20}
        assert ours.cv_results_["mean_test_score"] == pytest.approx(list(worth.values()), abs=0.03)


def test_every_tool_of_scikit_learn_takes_the_scorer(moon):
    X, y = moon
    detector = IsolationForest(n_estimators=5, random_state=0)
    cv = InDistributionKFold(3, ood_label=-1, random_state=0)
    one = make_ood_scorer(ood_label=-1)
    two = make_ood_scorer(["auroc", "neg_fpr_at_tpr"], ood_label=-1)
    arguments = {"cv": cv, "error_score": "raise"}

    expected = cross_val_score(detector, X, y, scoring=one, **arguments)
    assert expected.shape == (3,)
    assert np.array_equal(
        cross_validate(detector, X, y, scoring=two, **arguments)["test_auroc"], expected
    )
    assert np.array_equal(
        cross_validate(detector, X, y, scoring={"ours": one}, **arguments)["test_ours"], expected
    )
    grid = {"n_estimators": [5, 6]}
    for search in (
        GridSearchCV(detector, grid, scoring=two, refit="auroc", **arguments),
        RandomizedSearchCV(detector, grid, n_iter=2, scoring=two, refit="auroc", **arguments),
    ):
        results = search.fit(X, y).cv_results_
        assert results["mean_test_auroc"][0] == pytest.approx(expected.mean(), rel=1e-12)
        assert (results["mean_test_neg_fpr_at_tpr"] < 0).all()
    with sklearn.config_context(enable_metadata_routing=True):
        routed = GridSearchCV(detector, grid, scoring=one, refit=False, **arguments).fit(X, y)
    assert routed.cv_results_["mean_test_score"][0] == pytest.approx(expected.mean(), rel=1e-12)
    sets = {"scoring": make_ood_scorer(X_ood={"a": X[200:230], "b": X[230:]}), "cv": 3}
    _, values = validation_curve(
        detector, X[:200], None, param_name="n_estimators", param_range=[5, 6], **sets
    )
    assert np.isfinite(values).all()
    halving = HalvingGridSearchCV(
        detector,
        {"max_features": [1, 2]},
        resource="n_estimators",
        min_resources=2,
        max_resources=4,
        factor=2,
        scoring=one,
        return_train_score=False,
        **arguments,
    ).fit(X, y)
    assert halving.cv_results_["n_resources"].tolist() == [2, 2, 4]


def test_training_scores_of_folds_without_outliers_are_refused(moon):
    with pytest.raises(ValueError, match="return_train_score=False"):
        cross_validate(
            IsolationForest(n_estimators=2),
            *moon,
            cv=InDistributionKFold(3, ood_label=-1),
            scoring=make_ood_scorer(ood_label=-1),
            return_train_score=True,
            error_score="raise",
        )


@pytest.mark.slow
def test_parallel_is_bitwise_serial(digits):
    order = np.argsort(digits.y, kind="stable")
    search = GridSearchCV(
        quick_detector(module=digits.module, pretrain_epochs=0),
        {"sparsity_weight": [0.0, 0.1]},
        cv=InDistributionKFold(2, random_state=0),
        scoring=make_ood_scorer(["auroc", "accuracy_change"], {"negative": 1 - digits.X_test}),
        refit=False,
        error_score="raise",
    )

    def scores(n_jobs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.set_params(n_jobs=n_jobs).fit(digits.X[order], digits.y[order])
        return {k: v.tolist() for k, v in search.cv_results_.items() if "_test_" in k}

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert scores(2) == scores(1)
    finally:
        torch.set_num_threads(threads)


# With the detector


def test_class_ordered_rows_under_plain_folds_name_the_cure(digits):
    order = np.argsort(digits.y, kind="stable")
    X, y = digits.X[order], digits.y[order]
    scorer = make_ood_scorer(["auroc", "accuracy_change"])
    arguments = {"scoring": scorer, "error_score": "raise"}
    with pytest.raises(ValueError, match=r"not trained on.*cv=InDistributionKFold\(\)"):
        cross_validate(quick_detector(), X, y, cv=5, **arguments)
    scores = cross_validate(
        quick_detector(), X, y, cv=InDistributionKFold(2, random_state=0), **arguments
    )
    assert (scores["test_auroc"] > 0.8).all()
    assert (np.abs(scores["test_accuracy_change"]) < 0.1).all()


def test_failed_scorers_end_in_words(digits):
    order = np.argsort(digits.y, kind="stable")
    search = GridSearchCV(
        quick_detector(),
        {"sparsity_weight": [0.0]},
        cv=2,
        scoring=make_ood_scorer(["auroc", "accuracy_change"]),
        refit=AccuracyGuard(),
    )
    with (
        pytest.warns(UserWarning, match=r"Scoring failed[\s\S]*cv=InDistributionKFold\(\)"),
        pytest.raises(ValueError, match="error_score='raise' shows why"),
    ):
        search.fit(digits.X[order], digits.y[order])


@pytest.mark.parametrize("order", ["ordered", "shuffled"])
def test_a_guarded_search_with_outliers_among_the_rows(nines, order):
    X, y = nines
    if order == "shuffled":
        rows = np.random.RandomState(0).permutation(len(X))
        X, y = X[rows], y[rows]
    search = GridSearchCV(
        quick_detector(ood_label=-1),
        {"sparsity_weight": [0.0, 0.02]},
        cv=InDistributionKFold(2, ood_label=-1, random_state=0),
        scoring=make_ood_scorer(["auroc", "accuracy_change"], ood_label=-1),
        refit=AccuracyGuard("auroc", tolerance=0.1),
        error_score="raise",
    ).fit(X, y)
    scores = search.cv_results_["mean_test_auroc"]
    assert (scores > 0.6).all()
    assert search.best_index_ == np.argmax(scores)
    assert search.best_estimator_.classes_.tolist() == list(range(9))  # refit left the nines out
    assert search.score(X, y) == make_ood_scorer(ood_label=-1)(search.best_estimator_, X, y)


def test_a_search_in_a_pipeline_with_outliers_apart(nines):
    X, y = nines
    X_id, y_id, X_ood = X[y >= 0], y[y >= 0], X[y == -1]
    scorer = make_ood_scorer(["auroc", "accuracy_change"], {"nines": X_ood, "negative": 1 - X_ood})
    pipeline = make_pipeline(StandardScaler(), quick_detector())
    search = GridSearchCV(
        pipeline,
        {"sparseenergyooddetector__sparsity_weight": [0.0, 0.02]},
        cv=InDistributionKFold(2, random_state=0),
        scoring=scorer,
        refit=AccuracyGuard("auroc_nines", tolerance=0.1),
        error_score="raise",
    ).fit(X_id, y_id)
    train, test = next(InDistributionKFold(2, random_state=0).split(X_id, y_id))
    fitted = clone(pipeline).set_params(sparseenergyooddetector__sparsity_weight=0.0)
    fitted.fit(X_id[train], y_id[train])
    scores = [fitted.score_samples(rows) for rows in (X_id[test], X_ood)]
    expected = roc_auc_score([1] * len(test) + [0] * len(X_ood), np.concatenate(scores))
    assert search.cv_results_["split0_test_auroc_nines"][0] == pytest.approx(expected, rel=1e-9)


def test_halving_over_epochs(nines):
    X, y = nines
    search = HalvingGridSearchCV(
        quick_detector(ood_label=-1),
        {"sparsity_weight": [0.0, 0.02]},
        resource="max_epochs",
        max_resources=2,
        factor=2,
        cv=InDistributionKFold(2, ood_label=-1, random_state=0),
        scoring=make_ood_scorer("neg_fpr_at_tpr", ood_label=-1),
        return_train_score=False,
        error_score="raise",
    ).fit(X, y)
    assert search.cv_results_["n_resources"].tolist() == [1, 1, 2]
    assert -1 <= search.best_score_ < 0
    assert search.best_estimator_.max_epochs == 2


# Scorer: the size of the features


def test_mean_l1_is_that_of_the_features_of_id_rows(digits):
    """It is what enters the last layer, from the rows as the steps of a pipeline leave them."""
    detector = quick_detector(module=digits.module, pretrain_epochs=0, max_epochs=0)
    pipeline = make_pipeline(FunctionTransformer(lambda X: X / 16), detector)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(16 * digits.X, digits.y)
    X = torch.as_tensor(digits.X_test, dtype=torch.float32)
    with torch.no_grad():
        norms = digits.module[:-1](X).abs().sum(dim=1).double().numpy()
    scorer = make_ood_scorer("mean_l1", ood_label=9)
    X, y = 16 * digits.X_test, digits.y_test
    with pytest.warns(UserWarning, match="has ood_label=None, the scorer 9"):
        assert scorer(pipeline, X, y) == pytest.approx(norms[y != 9].mean(), rel=1e-5)
    assert norms[y != 9].mean() != pytest.approx(norms.mean(), rel=1e-3)
    assert make_ood_scorer("mean_l1")(pipeline, X) == pytest.approx(norms.mean(), rel=1e-5)
    several = make_ood_scorer(["mean_l1", "auroc", "accuracy_change"], {"a": X[:9], "b": X[9:]})
    assert set(several(pipeline, X, y)) == {
        *("mean_l1", "auroc", "auroc_a", "auroc_b", "accuracy_change")
    }


def test_mean_l1_says_what_it_lacks():
    with pytest.raises(TypeError, match="FirstColumn has no features, which 'mean_l1' needs"):
        make_ood_scorer("mean_l1")(FirstColumn(), ID)
