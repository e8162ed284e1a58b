"""Searches in parallel give what they give in turn, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import warnings
from typing import ClassVar

import joblib
import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine.training import Training
from skood.model_selection import InDistributionKFold, make_ood_scorer

WEIGHTS = [0.0, 0.02, 0.2]


def search(digits, n_jobs=None, weights=WEIGHTS, **parameters):
    """A fitted search over weights, in as many threads of torch as elsewhere."""
    found = GridSearchCV(
        SparseEnergyOODDetector(digits.module, max_epochs=2, random_state=0, **parameters),
        {"sparsity_weight": weights},
        cv=InDistributionKFold(2, random_state=0),
        scoring=make_ood_scorer("auroc", 1 - digits.X_test),
        n_jobs=n_jobs,
        error_score="raise",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found.fit(digits.X[:400], digits.y[:400])


def assert_same(found, expected, digits):
    for split in range(2):
        name = f"split{split}_test_score"
        assert np.array_equal(found.cv_results_[name], expected.cv_results_[name])
    assert found.best_params_ == expected.best_params_
    assert np.array_equal(
        found.best_estimator_.score_samples(digits.X_test),
        expected.best_estimator_.score_samples(digits.X_test),
    )


@pytest.fixture(scope="module")
def in_turn(digits):
    return search(digits)


@pytest.fixture
def _one_thread(monkeypatch):
    # Workers of loky and dask start with one thread of torch.
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_threads_give_what_one_gives_in_turn(digits, in_turn):
    with parallel_config("threading"):
        assert_same(search(digits, n_jobs=2), in_turn, digits)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_processes_give_what_one_gives_in_turn(digits):
    with parallel_config("loky", inner_max_num_threads=1):
        assert_same(search(digits, n_jobs=2), search(digits), digits)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_dask_gives_what_one_process_gives_in_turn(digits):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        parallel_config("dask"),
    ):
        found = search(digits, n_jobs=2)
    assert_same(found, search(digits), digits)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_dask_array_is_scored_in_one_line(fitted, digits):
    import dask.array as da

    X = da.from_array(digits.X_test, chunks=(100, 64))
    scores = X.map_blocks(fitted.score_samples, drop_axis=1, dtype="float64")
    # Threads compute the blocks, each of which is bitwise what it is alone.
    assert np.array_equal(scores.compute(), fitted.score_samples(digits.X_test))


class Slow(nn.Sequential):
    """Takes its time, and notes the thread in which it works."""

    threads: ClassVar[set[int]] = set()

    def forward(self, x):
        self.threads.add(threading.get_ident())
        time.sleep(0.02)
        return super().forward(x)


def answers_in_a_child(function):
    """Whether a forked child ends, having called a function."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(2000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("work", ["fit", "features"])
def test_a_child_that_is_forked_while_a_thread_works_can_do_all(digits, work):
    X, y = digits.X[:60], digits.y[:60]
    detector = SparseEnergyOODDetector(
        Slow(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), max_epochs=0, calibration_size=10
    ).fit(X, y)
    Slow.threads.clear()
    slow = clone(detector).set_params(max_epochs=5) if work == "fit" else detector
    stop = threading.Event()

    def in_a_thread():
        while not stop.is_set():
            getattr(slow, work)(X)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    while thread.ident not in Slow.threads:
        time.sleep(0.01)
    try:
        assert answers_in_a_child(lambda: pickle.loads(pickle.dumps(detector)).predict(X))
        assert answers_in_a_child(lambda: clone(detector).fit(X, y).features(X))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("parameters", [{"score_function": "vim"}, {"pretrain_epochs": 1}])
def test_the_hash_of_a_detector_changes_with_its_threshold_and_not_with_its_use(digits, parameters):
    detector = SparseEnergyOODDetector(max_epochs=1, random_state=0, **parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
        for fitted in (detector, pickle.loads(pickle.dumps(detector))):
            expected = joblib.hash(fitted)
            fitted.predict(digits.X_test)
            fitted.features(digits.X_test[:1])
            fitted.module_(torch.zeros(1, 64))
            assert joblib.hash(fitted) == expected
    detector.calibrate(digits.X_fresh)
    assert joblib.hash(detector) != expected


@pytest.mark.slow
def test_candidates_leave_nothing_behind(digits):
    def living():
        gc.collect()
        return sum(issubclass(type(thing), nn.Module | torch.Tensor) for thing in gc.get_objects())

    def after(n_candidates):
        kept = search(digits, weights=np.linspace(0, 0.1, n_candidates))
        number = living()
        assert kept.best_estimator_ is not None
        return number

    after(2)
    assert after(32) == after(2)


def test_candidates_share_what_is_the_same(digits, tmp_path, monkeypatch):
    epochs = []
    run = Training.run

    def counted(self, *arguments):
        history = run(self, *arguments)
        epochs.extend(record["seconds"] for record in history)
        return history

    monkeypatch.setattr(Training, "run", counted)

    def trained(**grid):
        """Epochs in the records of all candidates, and those among them that were run."""
        epochs.clear()
        found = GridSearchCV(
            SparseEnergyOODDetector(
                pretrain_epochs=3, max_epochs=2, memory=str(tmp_path), random_state=0
            ),
            grid,
            cv=InDistributionKFold(2, random_state=0),
            refit=False,
            error_score="raise",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.fit(digits.X[:800], digits.y[:800])
        # What comes from memory has the seconds of the run that it was kept from.
        return len(epochs), len(set(epochs))

    # Two folds, each pre-trained once (3 epochs) and fine-tuned for each of two weights (2).
    assert trained(sparsity_weight=[0.0, 0.1]) == (2 * 2 * (3 + 2), 2 * (3 + 2 * 2))
    known = set(epochs)
    # Scores, tpr and calibration share the fine-tuned network.
    assert trained(sparsity_weight=[0.1], score_function=["energy", "msp"], tpr=[0.9, 0.95]) == (
        2 * 4 * (3 + 2),
        2 * (3 + 2),
    )
    assert set(epochs) < known


def test_a_fitted_search_travels(digits, in_turn):
    assert_same(pickle.loads(pickle.dumps(in_turn)), in_turn, digits)
