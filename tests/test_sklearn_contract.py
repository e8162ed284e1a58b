"""The detector against scikit-learn's own checks, its composition tools and its persistence."""

from __future__ import annotations

import pickle
from unittest import SkipTest

import cloudpickle
import joblib
import numpy as np
import pytest
from modules import WidthAgnostic
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from skood import SparseEnergyOODDetector
from skood.exceptions import DeviceWarning, ThresholdWarning


# How long they train is nothing that a check looks at.
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        SparseEnergyOODDetector(pretrain_epochs=2, max_epochs=1),
        SparseEnergyOODDetector(WidthAgnostic(), max_epochs=1),
    ],
)
def test_passes_every_check_of_scikit_learn(estimator, check):
    try:
        check(estimator)
    except SkipTest as skipped:
        pytest.fail(f"scikit-learn skipped a check: {skipped}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [SparseEnergyOODDetector(sparsity_weight="auto", score_function="auto", max_epochs=1)]
)
def test_passes_every_check_with_what_fit_chooses(estimator, check):
    try:
        check(estimator)
    except SkipTest as skipped:
        pytest.fail(f"scikit-learn skipped a check: {skipped}")


def test_clone_is_unfitted_and_shares_nothing(fitted):
    copy = clone(fitted)
    with pytest.raises(NotFittedError):
        copy.predict(np.zeros((1, 64)))
    theirs, ours = copy.module.state_dict(), fitted.module.state_dict()
    for name in ours:
        assert theirs[name].equal(ours[name])
        assert theirs[name].data_ptr() != ours[name].data_ptr() or ours[name].numel() == 0


@pytest.mark.parametrize(
    "round_trip",
    [
        lambda detector, path: pickle.loads(pickle.dumps(detector)),
        lambda detector, path: cloudpickle.loads(cloudpickle.dumps(detector)),
        lambda detector, path: joblib.load(joblib.dump(detector, path / "detector.joblib")[0]),
    ],
    ids=["pickle", "cloudpickle", "joblib"],
)
def test_round_trips_are_bitwise(fitted, digits, tmp_path, round_trip):
    loaded = round_trip(fitted, tmp_path)
    X = digits.X_test
    assert np.array_equal(loaded.score_samples(X), fitted.score_samples(X))
    assert np.array_equal(loaded.features(X), fitted.features(X))
    assert np.array_equal(loaded.p_values(X), fitted.p_values(X))
    assert loaded.offset_ == fitted.offset_
    assert loaded.history_ == fitted.history_
    loaded.calibrate(digits.X_fresh)
    assert loaded.offset_ == clone_of(fitted).calibrate(digits.X_fresh).offset_


def clone_of(fitted):
    return pickle.loads(pickle.dumps(fitted))


def test_pipeline_takes_float64(digits):
    detector = SparseEnergyOODDetector(random_state=0, max_epochs=1, pretrain_epochs=5)
    pipeline = make_pipeline(StandardScaler(), detector).fit(digits.X, digits.y)
    scaled = StandardScaler().fit(digits.X).transform(digits.X_test)
    assert scaled.dtype == np.float64
    assert np.array_equal(pipeline.predict(digits.X_test), pipeline[-1].predict(scaled))
    assert pipeline.score_samples(digits.X_test).dtype == np.float64


def test_grid_search_runs_without_scoring(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    search = GridSearchCV(detector, {"sparsity_weight": [0.0, 0.05]}, cv=2, error_score="raise")
    search.fit(digits.X, digits.y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert (scores > 0.5).all()
    with pytest.warns(ThresholdWarning, match="calibrate"):
        assert set(search.predict(digits.X_test)) <= {-1, 1}


def test_a_score_function_parameter_can_be_searched(digits):
    from skood.scores import Energy

    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, score_function=Energy())
    detector.set_params(score_function__temperature=2.0)
    assert detector.get_params()["score_function__temperature"] == 2.0
    assert clone(detector).score_function.temperature == 2.0


@pytest.mark.parametrize("fit_first", [False, True])
def test_html_and_text_representations(digits, fitted, fit_first):
    detector = fitted if fit_first else SparseEnergyOODDetector(digits.module)
    assert "SparseEnergyOODDetector" in detector._repr_html_()
    assert "SparseEnergyOODDetector" in repr(detector)


def test_parameters_do_not_shadow_methods():
    for name in SparseEnergyOODDetector().get_params():
        assert not callable(getattr(SparseEnergyOODDetector, name, None))


def test_nonsense_parameters_are_stored_and_refused_at_fit(digits):
    for name in SparseEnergyOODDetector().get_params():
        nonsense = object()
        detector = SparseEnergyOODDetector(**{name: nonsense})
        assert getattr(detector, name) is nonsense
        with pytest.raises(ValueError, match=name) as raised:
            detector.fit(digits.X, digits.y)
        assert "Got" in str(raised.value)


def test_data_frames_keep_their_column_names(digits):
    pandas = pytest.importorskip("pandas")
    columns = [f"pixel{i}" for i in range(64)]
    frame = pandas.DataFrame(digits.X, columns=columns)
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=1, random_state=0)
    detector.fit(frame, pandas.Series(digits.y))
    assert detector.feature_names_in_.tolist() == columns
    with pytest.raises(ValueError, match="feature names"):
        detector.predict(frame[columns[::-1]])


def test_refits_on_another_kind_of_rows(digits):
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=0, random_state=0)
    detector.fit(digits.X, digits.y)
    assert detector.n_features_in_ == 64
    assert not hasattr(detector, "input_shape_")
    detector.fit(digits.X.reshape(-1, 8, 8), digits.y)
    assert detector.input_shape_ == (8, 8)
    assert not hasattr(detector, "n_features_in_")
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        detector.predict(digits.X)


def test_a_detector_fitted_on_an_absent_device_computes_on_the_cpu(fitted, digits, monkeypatch):
    import dataclasses

    import torch

    travelled = pickle.loads(pickle.dumps(fitted))
    batcher = dataclasses.replace(travelled._network.batcher, device=torch.device("cuda:7"))
    monkeypatch.setattr(travelled._network, "batcher", batcher)
    data = pickle.dumps(travelled)
    with pytest.warns(DeviceWarning, match=r"cuda:7.*CPU"):
        loaded = pickle.loads(data)
    assert loaded.device_ == torch.device("cpu")
    X = digits.X_test
    assert np.array_equal(loaded.score_samples(X), fitted.score_samples(X))


def test_the_head_of_a_pickled_module_is_no_hook(fitted):
    loaded = pickle.loads(pickle.dumps(fitted))
    for module in (fitted.module_, loaded.module_):
        assert isinstance(module, nn.Module)
        assert all(not part._forward_hooks for part in module.modules())
