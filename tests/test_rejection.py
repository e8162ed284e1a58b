from __future__ import annotations

import pickle
import warnings
from unittest import SkipTest

import numpy as np
import pytest
import sklearn
from modules import WidthAgnostic
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_blobs
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import DecisionBoundaryDisplay
from sklearn.metrics import accuracy_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_classifiers_train, parametrize_with_checks

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.exceptions import LostRejectionWarning, SkoodWarning

# Rows are rejected, which these checks take for errors.
EXPECTED_FAILURES = {
    "check_classifiers_classes": "its labels are strings, then integers, then -1 itself; "
    "reject_label is of the kind of the labels and none of them",
    "check_classifiers_train": "predict is not the most probable class where a row is rejected",
}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [RejectingClassifier(SparseEnergyOODDetector(pretrain_epochs=2, max_epochs=1, random_state=0))],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_passes_the_checks_of_scikit_learn(estimator, check):
    try:
        check(estimator)
    except SkipTest as skipped:
        pytest.fail(f"scikit-learn skipped a check: {skipped}")


@pytest.mark.filterwarnings("ignore")
def test_passes_the_check_of_training_where_nothing_is_rejected():
    # The threshold is the lowest score of all training rows.
    detector = SparseEnergyOODDetector(calibration_size=None, tpr=0.9999, random_state=0)
    check_classifiers_train("RejectingClassifier", RejectingClassifier(detector))


@pytest.fixture(scope="module")
def labelled(digits):
    """Digits below 8, and the others as known outliers, labelled -1."""
    return np.where(digits.y < 8, digits.y, -1), np.where(digits.y_test < 8, digits.y_test, -1)


def quick(**parameters):
    """A detector that builds its network; with few epochs, as it need not be good."""
    defaults = {"pretrain_epochs": 8, "max_epochs": 1, "random_state": 0}
    return SparseEnergyOODDetector(**(defaults | parameters))


@pytest.fixture(scope="module")
def classifier(digits, labelled):
    return RejectingClassifier(quick(ood_label=-1)).fit(digits.X, labelled[0])


@pytest.fixture
def frozen(digits, fitted):
    """A classifier around the detector that is fitted and calibrated."""
    return RejectingClassifier(FrozenEstimator(fitted)).fit(digits.X, digits.y)


def test_answers_what_the_detector_says(classifier, digits):
    detector, X = classifier.detector_, digits.X_test
    kept = detector.predict(X) == 1
    assert 0 < kept.sum() < len(X)
    probabilities = classifier.predict_proba(X)
    assert np.array_equal(probabilities, detector.predict_class_proba(X))
    predicted = classifier.predict(X)
    assert predicted.dtype.kind == "i"
    assert np.array_equal(predicted[kept], classifier.classes_[probabilities.argmax(1)][kept])
    assert (predicted[~kept] == -1).all()


def test_known_outliers_are_no_class_and_their_rejection_is_right(classifier, digits, labelled):
    assert classifier.classes_.tolist() == list(range(8))
    assert classifier.predict_proba(digits.X_test).shape == (len(digits.X_test), 8)
    y, predicted = labelled[1], classifier.predict(digits.X_test)
    rejections = np.sum((y == -1) & (predicted == -1))
    right_classes = np.sum((y == predicted) & (y >= 0))
    assert rejections > 0
    assert classifier.score(digits.X_test, y) == (rejections + right_classes) / len(y)


def test_another_label_of_rejection_counts_known_outliers_as_errors(digits, labelled):
    y, y_test = (np.where(labels == -1, 99, labels) for labels in labelled)
    classifier = RejectingClassifier(quick(ood_label=99)).fit(digits.X, y)
    assert classifier.classes_.tolist() == list(range(8))
    predicted = classifier.predict(digits.X_test)
    assert set(predicted) <= {-1, *range(8)}
    assert classifier.score(digits.X_test, y_test) == np.mean(predicted == y_test)


def test_strings_take_a_string(digits):
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "8", "9"])
    classifier = RejectingClassifier(quick(), reject_label="rejected")
    classifier.fit(digits.X, names[digits.y])
    predicted = classifier.predict(digits.X_test)
    assert set(predicted) - set(names) == {"rejected"}
    assert accuracy_score(names[digits.y_test], predicted) == np.mean(
        names[digits.y_test] == predicted
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64])
def test_predictions_compare_with_labels_of_any_number_type(digits, dtype):
    y, y_test = digits.y.astype(dtype), digits.y_test.astype(dtype)
    classifier = RejectingClassifier(quick(max_epochs=0)).fit(digits.X, y)
    predicted = classifier.predict(digits.X_test)
    assert -1 in predicted
    assert classifier.score(digits.X_test, y_test) == np.mean(predicted == y_test) > 0.5
    frozen = RejectingClassifier(FrozenEstimator(quick(max_epochs=0).fit(digits.X, y)))
    assert np.array_equal(frozen.fit(digits.X, y).predict(digits.X_test), predicted)


def test_a_frozen_detector_is_kept_as_it_is(frozen, fitted, digits):
    before = fitted.score_samples(digits.X_test) - fitted.offset_
    again = clone(frozen).fit(digits.X[:50], digits.y[:50])
    assert again.detector_.estimator is fitted
    assert np.array_equal(fitted.decision_function(digits.X_test), before)
    assert np.array_equal(again.predict(digits.X_test), frozen.predict(digits.X_test))
    assert np.array_equal(
        frozen.predict(digits.X_test), fitted.predict_class(digits.X_test, reject_label=-1)
    )
    assert np.array_equal(frozen.classes_, fitted.classes_)


def test_a_detector_that_is_not_frozen_is_cloned(digits, labelled):
    detector = quick(ood_label=-1)
    classifier = RejectingClassifier(detector).fit(digits.X, labelled[0])
    assert not hasattr(detector, "offset_")
    assert classifier.detector is detector
    assert classifier.detector_ is not detector


def test_moving_the_threshold_of_the_fitted_detector_moves_rejection(classifier, digits):
    moved = pickle.loads(pickle.dumps(classifier))
    moved.detector_.calibrate(digits.X_fresh, tpr=0.6)
    n_rejected = np.sum(moved.predict(digits.X_test) == -1)
    assert n_rejected > np.sum(classifier.predict(digits.X_test) == -1)


def test_clones_and_pickles(classifier, digits):
    loaded = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(loaded.predict(digits.X_test), classifier.predict(digits.X_test))
    copy = clone(classifier)
    assert copy.get_params()["detector__ood_label"] == -1
    with pytest.raises(NotFittedError, match="RejectingClassifier"):
        copy.predict(digits.X_test)
    with pytest.raises(NotFittedError, match="RejectingClassifier"):
        copy.predict_proba(digits.X_test)
    assert not hasattr(copy, "classes_")
    assert not hasattr(copy, "n_features_in_")


def test_sits_in_a_pipeline(digits, labelled):
    y, y_test = labelled
    pipeline = make_pipeline(StandardScaler(), RejectingClassifier(quick(ood_label=-1)))
    assert is_classifier(pipeline)
    pipeline.fit(digits.X, y)
    scaled = StandardScaler().fit(digits.X).transform(digits.X_test)
    assert np.array_equal(pipeline.predict(digits.X_test), pipeline[-1].predict(scaled))
    assert pipeline.classes_.tolist() == list(range(8))
    assert pipeline.score(digits.X_test, y_test) == accuracy_score(
        y_test, pipeline[-1].predict(scaled)
    )


def test_cross_validation_counts_right_rejections(digits, labelled):
    X, y = digits.X[:400], labelled[0][:400]
    classifier = RejectingClassifier(quick(ood_label=-1))
    scores = cross_validate(
        classifier,
        X,
        y,
        scoring=["accuracy", "balanced_accuracy"],
        cv=2,
        error_score="raise",
        return_estimator=True,
        return_indices=True,
    )
    for part, fold in zip(scores["estimator"], scores["indices"]["test"], strict=True):
        predicted = part.predict(X[fold])
        assert np.mean(predicted == y[fold]) in scores["test_accuracy"]
        recalls = [np.mean(predicted[y[fold] == label] == label) for label in np.unique(y)]
        assert np.isclose(np.mean(recalls), scores["test_balanced_accuracy"]).any()
    assert np.array_equal(
        cross_val_score(classifier, X, y, cv=2, error_score="raise"), scores["test_accuracy"]
    )


def test_scorers_take_probabilities_of_the_classes(digits):
    few = digits.y[:400] < 4
    scores = cross_val_score(
        RejectingClassifier(quick()),
        digits.X[:400][few],
        digits.y[:400][few],
        scoring="neg_log_loss",
        cv=2,
        error_score="raise",
    )
    assert (scores > -np.log(4)).all()


def test_a_search_sets_parameters_of_the_detector(digits):
    X, y = digits.X[:400], digits.y[:400]
    grid = {"detector__sparsity_weight": [0.0, 30.0], "detector__learning_rate": [0.01]}
    search = GridSearchCV(RejectingClassifier(quick()), grid, cv=2, error_score="raise").fit(X, y)
    scores = [
        cross_val_score(
            RejectingClassifier(quick(sparsity_weight=weight, learning_rate=0.01)), X, y, cv=2
        ).mean()
        for weight in (0.0, 30.0)
    ]
    assert scores[0] != scores[1]
    assert search.cv_results_["mean_test_score"].tolist() == scores
    best = grid["detector__sparsity_weight"][np.argmax(scores)]
    assert search.best_estimator_.detector_.sparsity_weight == best


def test_knows_the_columns_of_fit(digits):
    pandas = pytest.importorskip("pandas")
    columns = [f"pixel{i}" for i in range(64)]
    frame = pandas.DataFrame(digits.X, columns=columns)
    classifier = RejectingClassifier(quick(max_epochs=0)).fit(frame, pandas.Series(digits.y))
    assert classifier.n_features_in_ == 64
    assert classifier.feature_names_in_.tolist() == columns
    classifier.fit(digits.X.reshape(-1, 8, 8), digits.y)
    assert not hasattr(classifier, "n_features_in_")
    assert not hasattr(classifier, "feature_names_in_")


def test_takes_the_inputs_of_its_detector():
    assert get_tags(RejectingClassifier(quick())).input_tags == get_tags(quick()).input_tags
    assert get_tags(quick()).input_tags.three_d_array


def test_representations_name_the_detector():
    classifier = RejectingClassifier(SparseEnergyOODDetector(WidthAgnostic()))
    assert "RejectingClassifier(detector=SparseEnergyOODDetector" in repr(classifier)
    assert "SparseEnergyOODDetector" in classifier._repr_html_()


# What is wrong, the exception, and words of the message: what was got, and what to do.
MISTAKES = {
    "no detector": (
        lambda d: RejectingClassifier(StandardScaler()),
        lambda d: d.y,
        ValueError,
        ["'detector'", "Got StandardScaler()", "'predict_class'", "SparseEnergyOODDetector"],
    ),
    "a pipeline inside": (
        lambda d: RejectingClassifier(make_pipeline(StandardScaler(), quick())),
        lambda d: d.y,
        ValueError,
        ["'predict_class'", "Pipeline", "goes around RejectingClassifier"],
    ),
    "a class": (
        lambda d: RejectingClassifier(SparseEnergyOODDetector),
        lambda d: d.y,
        TypeError,
        ["provide an instance"],
    ),
    "a frozen detector that is not fitted": (
        lambda d: RejectingClassifier(FrozenEstimator(quick())),
        lambda d: d.y,
        NotFittedError,
        ["SparseEnergyOODDetector", "not fitted"],
    ),
    "a label that is a class": (
        lambda d: RejectingClassifier(quick(), reject_label=3),
        lambda d: d.y,
        ValueError,
        ["reject_label=3", "[0, 1, 2, 3", "no class has"],
    ),
    "outliers in y without ood_label": (
        lambda d: RejectingClassifier(quick()),
        lambda d: np.where(d.y < 8, d.y, -1),
        ValueError,
        ["reject_label=-1 is one of the classes [-1, 0,", "ood_label=-1"],
    ),
    "a logit that y lacks": (
        lambda d: RejectingClassifier(
            SparseEnergyOODDetector(d.module, ood_label=-1, max_epochs=0), reject_label=9
        ),
        lambda d: np.where(d.y < 8, d.y, -1),
        ValueError,
        ["reject_label=9 is one of the classes [0, 1,"],
    ),
    "a number beside strings": (
        lambda d: RejectingClassifier(quick()),
        lambda d: d.y.astype(str),
        ValueError,
        ["reject_label=-1 is of type int", "<U", 'such as "rejected"'],
    ),
    "a string beside numbers": (
        lambda d: RejectingClassifier(quick(), reject_label="rejected"),
        lambda d: d.y,
        ValueError,
        ["reject_label='rejected' is of type str", "int64", "such as -1"],
    ),
    "booleans": (
        lambda d: RejectingClassifier(quick()),
        lambda d: d.y > 4,
        ValueError,
        ["reject_label=-1", "bool", "turn booleans into integers"],
    ),
    "a boolean": (
        lambda d: RejectingClassifier(quick(), reject_label=True),
        lambda d: d.y + 2,
        ValueError,
        ["reject_label=True is of type bool", "int64"],
    ),
    "another type": (
        lambda d: RejectingClassifier(quick(), reject_label=None),
        lambda d: d.y,
        ValueError,
        ["'reject_label'", "Got None"],
    ),
    "no y": (
        lambda d: RejectingClassifier(quick()),
        lambda d: None,
        ValueError,
        ["requires y", "y is None", "one label a row"],
    ),
    "one class": (
        lambda d: RejectingClassifier(quick(ood_label=-1)),
        lambda d: np.where(d.y < 1, 7, -1),
        ValueError,
        ["1 class(es), [7]", "ood_label=-1", "at least 2"],
    ),
    "nothing but outliers": (
        lambda d: RejectingClassifier(quick(ood_label=-1)),
        lambda d: np.full(1000, -1),
        ValueError,
        ["0 class(es)", "at least 2"],
    ),
    "a row too few in y": (
        lambda d: RejectingClassifier(quick()),
        lambda d: d.y[:-1],
        ValueError,
        ["999 labels for 1000 rows"],
    ),
    "measurements in y": (
        lambda d: RejectingClassifier(quick()),
        lambda d: d.y + 0.5,
        ValueError,
        ["fractional", "labels are integers"],
    ),
}


@pytest.mark.filterwarnings("ignore:The module given classifies")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_and_change_nothing(digits, mistake):
    make, labels, error, words = MISTAKES[mistake]
    classifier = make(digits)
    before = vars(classifier).copy()
    with pytest.raises(error) as raised:
        classifier.fit(digits.X, labels(digits))
    for word in words:
        assert word in str(raised.value)
    assert vars(classifier) == before


def test_a_label_that_is_a_class_is_refused_before_training(digits, monkeypatch):
    def fit(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(SparseEnergyOODDetector, "fit", fit)
    with pytest.raises(ValueError, match="reject_label=3"):
        RejectingClassifier(quick(), reject_label=3).fit(digits.X, digits.y)


def test_a_frozen_detector_refuses_labels_it_does_not_know(digits, fitted):
    classifier = RejectingClassifier(FrozenEstimator(fitted))
    with pytest.raises(ValueError, match=r"y holds the labels \[10\], which .* \[0, 1, 2.*frozen"):
        classifier.fit(digits.X, digits.y + 1)
    with pytest.raises(ValueError, match="999 labels for 1000 rows"):
        classifier.fit(digits.X, digits.y[:-1])
    with pytest.raises(ValueError, match=r"reject_label='none' is of type str.*int64"):
        RejectingClassifier(FrozenEstimator(fitted), reject_label="none").fit(
            digits.X, digits.y.astype(str)
        )


def test_a_failed_fit_leaves_the_last_one(classifier, digits):
    classifier = pickle.loads(pickle.dumps(classifier))
    predicted = classifier.predict(digits.X_test)
    with pytest.raises(ValueError, match="class"):
        classifier.fit(digits.X, np.zeros(1000))
    assert np.array_equal(classifier.predict(digits.X_test), predicted)


# Inside other estimators


@pytest.fixture(scope="module")
def rejecting(digits):
    return RejectingClassifier(
        SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0), reject_label=-1
    )


@pytest.mark.parametrize(
    "around",
    [
        lambda one: VotingClassifier([("one", one)], voting="hard"),
        lambda one: VotingClassifier([("one", one)], voting="soft"),
        lambda one: StackingClassifier([("one", one)], cv=2),
        lambda one: BaggingClassifier(one, 1),
        lambda one: CalibratedClassifierCV(one, cv=2),
    ],
    ids=["hard voting", "soft voting", "stacking", "bagging", "calibrated"],
)
def test_fit_says_that_an_estimator_around_it_does_not_reject(rejecting, digits, around):
    with pytest.warns(LostRejectionWarning, match=r"does not reject") as told:
        around(rejecting).fit(digits.X_fresh, digits.y_fresh)
    assert all(len(str(warning.message)) <= 400 for warning in told)


def test_fit_says_that_a_classifier_with_a_threshold_does_not_reject(rejecting, digits):
    of_two = digits.y_fresh < 2
    with pytest.warns(LostRejectionWarning, match=r"does not reject"):
        FixedThresholdClassifier(rejecting).fit(digits.X_fresh[of_two], digits.y_fresh[of_two])


@pytest.mark.parametrize(
    "around",
    [
        lambda one: StackingClassifier([("one", one)], cv="prefit"),
        lambda one: CalibratedClassifierCV(FrozenEstimator(one)),
    ],
    ids=["stacking", "calibrated"],
)
def test_an_estimator_around_a_fitted_one_is_told_of_too(rejecting, digits, around):
    fitted = clone(rejecting).fit(digits.X, digits.y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LostRejectionWarning)
        fitted.predict_proba(digits.X_fresh)
        with pytest.raises(LostRejectionWarning, match=r"does not reject"):
            around(fitted).fit(digits.X_fresh, digits.y_fresh)


def test_rejection_outside_of_an_ensemble_is_that_of_the_message(rejecting, digits):
    noise = np.random.RandomState(0).uniform(0, 1, (100, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkoodWarning)
        ensemble = BaggingClassifier(rejecting, 2, random_state=0).fit(digits.X, digits.y)
        detector = clone(rejecting.detector).fit(digits.X, digits.y).calibrate(digits.X_fresh)
    labels = np.where(detector.predict(noise) == 1, ensemble.predict(noise), -1)
    assert np.mean(labels == -1) > 0.5
    assert (ensemble.predict(noise) != -1).all()


@pytest.mark.parametrize(
    "around",
    [
        lambda one: make_pipeline(StandardScaler(with_std=False), one),
        lambda one: GridSearchCV(one, {"detector__tpr": [0.9]}, cv=2),
    ],
    ids=["pipeline", "search"],
)
def test_what_keeps_the_rejection_does_not_warn(rejecting, digits, around):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", LostRejectionWarning)
        around(rejecting).fit(digits.X_fresh, digits.y_fresh)


def test_the_line_at_which_predict_changes_is_drawn_by_the_decision_function():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    X, y = make_blobs(200, centers=[[-2, 0], [2, 0]], random_state=0)
    detector = SparseEnergyOODDetector(pretrain_epochs=3, max_epochs=1, random_state=0)
    detector = RejectingClassifier(detector).fit(X, y).detector_
    display = DecisionBoundaryDisplay.from_estimator(
        detector, X, response_method="decision_function", plot_method="contour", levels=[0]
    )
    drawn = np.column_stack([display.xx0.ravel(), display.xx1.ravel()])
    assert np.array_equal(display.response.ravel() >= 0, detector.predict(drawn) == 1)


def test_probabilities_may_have_a_column_for_rejection(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, tpr=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = RejectingClassifier(detector).fit(digits.X, digits.y)
        rejected = classifier.predict(digits.X_test) == -1
        whole = classifier.predict_proba(digits.X_test, rejection=True)
    assert 0 < rejected.sum() < len(rejected)
    assert np.array_equal(whole[:, -1] == 1, rejected)
    assert whole.sum(axis=1) == pytest.approx(1)
    assert not whole[rejected, :-1].any()
    plain = classifier.predict_proba(digits.X_test)
    assert np.array_equal(whole[~rejected, :-1], plain[~rejected])
    with pytest.raises(ValueError, match="'rejection' parameter of predict_proba"):
        classifier.predict_proba(digits.X_test, rejection="yes")


def test_metadata_routing_does_not_get_in_the_way():
    X, y = make_blobs(120, centers=3, random_state=0)
    classifier = RejectingClassifier(SparseEnergyOODDetector(max_epochs=1, random_state=0))
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = make_pipeline(StandardScaler(), classifier).fit(X, y)
        assert pipe.score(X, y) > 0.5
        assert pipe.predict_proba(X).shape == (120, 3)
        assert cross_val_score(pipe, X, y, cv=2).min() > 0.5


@pytest.mark.parametrize("label", [None, 0.5, [-1]])
def test_a_label_that_is_set_after_fit_is_checked(label):
    X, y = make_blobs(120, centers=3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = RejectingClassifier(SparseEnergyOODDetector(max_epochs=1, random_state=0))
        classifier.fit(X, y).set_params(reject_label=label)
        with pytest.raises(ValueError, match="'reject_label' parameter of RejectingClassifier"):
            classifier.predict(X)
