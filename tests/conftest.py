from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

# Read by scipy at its first import; without it scikit-learn skips its array API checks.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

import numpy as np
import pytest
import torch
from modules import trained_mlp
from processes import Group
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

from skood import SparseEnergyOODDetector
from skood.engine import loading
from skood.engine.batches import Batcher
from skood.engine.copying import copy_module
from skood.engine.network import floating_dtype
from skood.engine.opening import open_network
from skood.engine.rows import Rows
from skood.rows import as_rows

try:
    import torchvision
except RuntimeError:
    # Its operators were built for another torch. Their schemas are enough to import the rest.
    TORCHVISION_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        TORCHVISION_OPERATORS.define(
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision  # noqa: F401


@pytest.fixture
def opened():
    """A function that makes a copy of a module ready to run on rows, on the CPU."""

    def open_module(module, X, *, head=None, preprocess=None, precision="float32", **options):
        batcher = Batcher(torch.device("cpu"), floating_dtype(module), preprocess)
        return open_network(
            copy_module(module),
            X if isinstance(X, Rows) else as_rows(X, preprocess),
            head=head,
            batcher=batcher,
            precision=precision,
            compiled=options.get("compiled", False),
            small_shape=options.get("small_shape", False),
            fold_batch_norm=options.get("fold_batch_norm", True),
            layers=options.get("layers", False),
        )

    return open_module


@pytest.fixture(scope="session")
def digits():
    """Disjoint parts of scikit-learn's digits, and a classifier trained on the first."""
    X, y = load_digits(return_X_y=True)
    # Shuffled: the digits come writer by writer.
    X, y = shuffle(X / 16, y, random_state=0)
    return SimpleNamespace(
        X=X[:1000],
        y=y[:1000],
        X_fresh=X[1000:1400],
        y_fresh=y[1000:1400],
        X_test=X[1400:],
        y_test=y[1400:],
        module=trained_mlp(X[:1000], y[:1000]),
    )


@pytest.fixture(scope="session")
def fitted(digits):
    """A detector around the trained classifier, calibrated on rows it has not seen."""
    detector = SparseEnergyOODDetector(digits.module, max_epochs=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(digits.X, digits.y).calibrate(digits.X_fresh)


@pytest.fixture
def generator_states():
    """A function that tells the states of the global generators of numpy and torch."""

    def states():
        _, keys, position, *_ = np.random.get_state()
        return keys.tolist(), position, torch.get_rng_state().tolist()

    return states


@pytest.fixture(scope="session")
def group(tmp_path_factory):
    """Two processes that wait for functions to run as the ranks of a group."""
    processes = Group(tmp_path_factory.mktemp("group"))
    yield processes
    processes.end()


@pytest.fixture
def mortal_group(tmp_path):
    """Two processes of a group that may be killed, whose time-out is short."""
    processes = Group(tmp_path, timeout=3)
    yield processes
    processes.end()


@pytest.fixture
def impatient(monkeypatch):
    """Worker processes load from the first batch on."""
    monkeypatch.setattr(loading, "PATIENCE", -1.0)
