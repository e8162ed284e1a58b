"""A doubtful threshold is said to be one where it is first used, and not before."""

from __future__ import annotations

import copy
import pickle
import warnings

import joblib
import numpy as np
import pytest
from modules import WidthAgnostic
from sklearn.frozen import FrozenEstimator

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.exceptions import FewCalibrationRowsWarning, SlowScoringWarning, ThresholdWarning
from skood.notices import held_back, warn_user

USES = {
    "predict": lambda detector, X: detector.predict(X),
    "decision_function": lambda detector, X: detector.decision_function(X),
    "p_values": lambda detector, X: detector.p_values(X),
    "predict_class": lambda detector, X: detector.predict_class(X, reject_label=-1),
}
"""What needs the threshold."""


def fit_of(digits, rows=slice(None), **parameters):
    """A fit of the network on rows that it was trained on; warnings are errors."""
    settings = {"max_epochs": 0, "random_state": 0} | parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return SparseEnergyOODDetector(digits.module, **settings).fit(
            digits.X[rows], digits.y[rows]
        )


@pytest.fixture(scope="module")
def on_seen_rows(digits):
    return fit_of(digits)


@pytest.fixture(scope="module")
def on_training_rows(digits):
    return fit_of(digits, calibration_size=None)


@pytest.fixture(params=["on_seen_rows", "on_training_rows"])
def doubtful(request):
    """A detector whose threshold is doubtful, and was never used."""
    return copy.deepcopy(request.getfixturevalue(request.param))


def said(use, *arguments):
    """Warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use(*arguments)
    return caught


def assert_silent(detector, X):
    for use in USES.values():
        assert not said(use, detector, X)


# Silence where nothing is wrong


@pytest.mark.parametrize(
    "parameters", [{}, {"calibration_size": None}, {"max_epochs": 0}], ids=["", "None", "0 epochs"]
)
def test_fit_followed_by_calibrate_is_silent(digits, parameters):
    detector = SparseEnergyOODDetector(digits.module, random_state=0, **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.fit(digits.X, digits.y).calibrate(digits.X_fresh)
        for use in USES.values():
            use(detector, digits.X_test)


@pytest.mark.parametrize("n_rows", [12, 40])
def test_fit_on_few_rows_followed_by_calibrate_is_silent(digits, n_rows):
    detector = fit_of(digits, slice(n_rows), max_epochs=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.calibrate(digits.X_fresh)
        for use in USES.values():
            use(detector, digits.X_test)


def test_a_network_that_fit_builds_leaves_no_doubt(digits):
    detector = SparseEnergyOODDetector(pretrain_epochs=5, max_epochs=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_silent(detector.fit(digits.X, digits.y), digits.X_test)


def test_calibration_rows_that_the_network_has_not_seen_leave_no_doubt(digits):
    detector = SparseEnergyOODDetector(
        digits.module, max_epochs=0, calibration_size=350, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.fit(digits.X_fresh, digits.y_fresh)
    assert 0.9 < detector.id_accuracy_["before"] < 0.99
    assert_silent(detector, digits.X_test)


def test_what_needs_no_threshold_does_not_doubt_it(doubtful, digits):
    for method in ("score_samples", "predict_class", "predict_class_proba", "features", "score"):
        assert not said(getattr(doubtful, method), digits.X_test), method
    assert not said(doubtful.id_accuracy, digits.X_test, digits.y_test)
    assert len(said(doubtful.predict, digits.X_test)) == 1


# The doubt at the first use


@pytest.mark.parametrize("name", USES)
def test_the_first_use_warns_once_and_names_the_line_of_the_user(doubtful, digits, name):
    (warning,) = said(USES[name], doubtful, digits.X_test)
    assert warning.category is ThresholdWarning
    assert "calibrate(X_fresh) after fit" in str(warning.message)
    assert warning.filename == __file__
    assert_silent(doubtful, digits.X_test)


def test_each_reason_is_told(on_seen_rows, on_training_rows, digits):
    (seen,) = said(copy.deepcopy(on_seen_rows).predict, digits.X_test)
    assert "100.0% of its 100 calibration rows correctly" in str(seen.message)
    (training,) = said(copy.deepcopy(on_training_rows).predict, digits.X_test)
    assert "placed on the training rows (calibration_size=None)" in str(training.message)


@pytest.mark.parametrize(
    "travel", [lambda d: pickle.loads(pickle.dumps(d)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_where_a_detector_arrives_it_warns_again(doubtful, digits, travel):
    doubtful.predict_class(digits.X_test)
    for detector in (doubtful, travel(doubtful)):
        assert len(said(detector.predict, digits.X_test)) == 1
        assert not said(detector.predict, digits.X_test)
    assert len(said(travel(doubtful).predict, digits.X_test)) == 1


@pytest.mark.parametrize("used", [False, True])
def test_calibrate_clears_the_doubt_for_good(doubtful, digits, used):
    if used:
        said(doubtful.predict, digits.X_test)
    assert not said(doubtful.calibrate, digits.X_fresh)
    assert_silent(doubtful, digits.X_test)
    assert_silent(pickle.loads(pickle.dumps(doubtful)), digits.X_test)


def test_two_doubts_are_both_told_even_as_errors(digits):
    detector = fit_of(digits, calibration_size=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ThresholdWarning, match="trained on them"):
            detector.predict(digits.X_test)
        with pytest.raises(FewCalibrationRowsWarning):
            detector.predict(digits.X_test)
        detector.predict(digits.X_test)


def test_warnings_from_the_threads_of_a_library_name_the_line_of_the_user(doubtful, digits):
    classifier = RejectingClassifier(FrozenEstimator(doubtful)).fit(digits.X, digits.y)
    (warning,) = said(joblib.Parallel(n_jobs=1), [joblib.delayed(classifier.predict)(digits.X)])
    assert warning.filename == __file__


def test_only_warnings_of_the_kind_wait(recwarn):
    with held_back(ThresholdWarning) as notices:
        warn_user("few", FewCalibrationRowsWarning)
        warn_user("slow", SlowScoringWarning)
    assert [str(warning.message) for warning in recwarn] == ["slow"]
    assert notices == [("few", FewCalibrationRowsWarning)]


def test_a_failed_calibrate_leaves_the_doubt(doubtful, digits):
    with pytest.raises(ValueError, match="5 features"):
        doubtful.calibrate(np.zeros((3, 5)))
    assert len(said(doubtful.predict, digits.X_test)) == 1


def test_a_new_fit_brings_new_doubts(digits, on_seen_rows):
    detector = copy.deepcopy(on_seen_rows).calibrate(digits.X_fresh)
    assert not said(detector.fit, digits.X, digits.y)
    assert len(said(detector.predict, digits.X_test)) == 1
    with pytest.raises(ValueError, match="NaN"):
        detector.fit(np.full_like(digits.X, np.nan), digits.y)
    assert not said(detector.predict, digits.X_test)  # said of this very threshold before


def test_a_warning_changes_nothing_in_the_detector(digits):
    # Of tensors joblib.hash gives another value each time; this module hides its own.
    detector = SparseEnergyOODDetector(WidthAgnostic(), max_epochs=0, calibration_size=None)
    detector.fit(digits.X)
    attributes, hashed = vars(detector).copy(), joblib.hash(detector)
    assert len(said(detector.predict, digits.X_test)) == 1
    assert joblib.hash(detector) == hashed
    assert vars(detector) == attributes


def test_as_an_error_it_stops_the_first_use_alone(doubtful, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ThresholdWarning):
            doubtful.predict(digits.X_test)
        doubtful.predict(digits.X_test)


def test_it_can_be_silenced_by_its_class(doubtful, digits):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ThresholdWarning)
        doubtful.predict(digits.X_test)
    assert not caught


def test_a_rejecting_classifier_warns_at_the_line_of_its_user(digits):
    classifier = RejectingClassifier(
        SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0)
    )
    assert not said(classifier.fit, digits.X, digits.y)
    assert not said(classifier.predict_proba, digits.X_test)
    (warning,) = said(lambda: classifier.predict(digits.X_test))
    assert (warning.category, warning.filename) == (ThresholdWarning, __file__)
    assert not said(classifier.predict, digits.X_test)


# Too few calibration rows


def test_few_calibration_rows_are_doubted_at_the_first_use(digits):
    detector = fit_of(digits, calibration_size=10, tpr=0.95)
    found = said(lambda: detector.predict(digits.X_test))
    assert {warning.filename for warning in found} == {__file__}
    (few,) = (w for w in found if w.category is FewCalibrationRowsWarning)
    assert "10 calibration rows" in str(few.message)
    assert "at least 19" in str(few.message)
    assert_silent(detector, digits.X_test)


def test_calibrate_says_at_once_that_rows_are_too_few(doubtful, digits):
    (warning,) = said(lambda: doubtful.calibrate(digits.X_fresh[:10]))
    assert (warning.category, warning.filename) == (FewCalibrationRowsWarning, __file__)
    assert doubtful.offset_ == doubtful.score_samples(digits.X_fresh[:10]).min()
    assert_silent(doubtful, digits.X_test)
