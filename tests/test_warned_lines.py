"""Warnings point at the line of the user's that led to them, whichever way it goes."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from modules import mlp
from torch import nn

from skood import SparseEnergyOODDetector
from skood.exceptions import (
    AccuracyDropWarning,
    FewCalibrationRowsWarning,
    MemoryEntryWarning,
    NearChanceWarning,
    PenaltyWithoutEffectWarning,
    SlowScoringWarning,
    ThresholdWarning,
    UnscaledImagesWarning,
)

N = 120
X = np.random.RandomState(0).randn(N, 6)
Y = np.arange(N) % 4
IMAGES = np.random.RandomState(0).randint(256, size=(N, 1, 4, 4)).astype(np.uint8)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp().eval()


WRONG = (network()(torch.tensor(X)).argmax(dim=1).numpy() + 1) % 4
"""Labels of which the network gives none."""


def detector(module=None, **parameters):
    module = network() if module is None else module
    return SparseEnergyOODDetector(module, **{"max_epochs": 0, "random_state": 0} | parameters)


def half_frozen():
    module = network()
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    return module


def quantized():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


class Crowded(nn.Module):
    """Has memory for a number of rows at a time."""

    most = N

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        if len(x) > Crowded.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.head(torch.relu(self.body(x)))


@pytest.fixture
def crowded(monkeypatch):
    """A fitted detector for whose usual batches there is no memory any more."""
    monkeypatch.setattr(Crowded, "most", 10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = detector(Crowded()).fit(X, Y)
    monkeypatch.setattr(Crowded, "most", 10)
    return fitted


def warned_at(category, function, *args):
    """Lines of this file at which a function warns, after the first line of the function."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    places = [(w.filename, w.lineno) for w in caught if issubclass(w.category, category)]
    assert {file for file, _ in places} == {__file__}, "no warning, or one elsewhere"
    first = inspect.getsourcelines(function)[1]
    return {line - first for _, line in places}


def learned(y):
    """A classifier that is right on X, and forgets it when it is trained on noise."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(torch.tensor(X)), torch.tensor(y)).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(
    ("category", "make", "data"),
    [
        (
            UnscaledImagesWarning,
            lambda: detector(nn.Sequential(nn.Flatten(), nn.Linear(16, 4))),
            IMAGES,
        ),
        (NearChanceWarning, detector, X),
        (NearChanceWarning, lambda: detector(max_epochs=1), X),
        (PenaltyWithoutEffectWarning, lambda: detector(half_frozen(), max_epochs=1), X),
        (SlowScoringWarning, lambda: detector(quantized()), X.astype(np.float32)),
        (FewCalibrationRowsWarning, lambda: detector(calibration_size=5), X),
        (
            AccuracyDropWarning,
            lambda: detector(
                learned(Y), max_epochs=2, sparsity_weight=1.0, learning_rate=0.1, batch_size=16
            ),
            X,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_warnings_of_fit(category, make, data):
    made = make()

    def user():
        made.fit(data, WRONG if category is NearChanceWarning else Y)

    assert warned_at(category, user) == {1}


def test_warnings_of_a_threshold():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = detector(calibration_size=None).fit(X, Y)

    def user():
        fitted.predict(X)

    assert warned_at(ThresholdWarning, user) == {1}


@pytest.mark.parametrize("method", ["score_samples", "predict", "decision_function", "p_values"])
def test_warnings_of_scoring(crowded, method):
    def user():
        getattr(crowded, method)(X)

    assert warned_at(SlowScoringWarning, user) == {1}


def test_warnings_of_scoring_by_way_of_features(crowded):
    def user():
        crowded.features(X)

    assert warned_at(SlowScoringWarning, user) == {1}


def test_a_damaged_entry(tmp_path):
    made = detector(max_epochs=1, memory=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(X, Y)
    (entry,) = tmp_path.rglob("*.pt")
    entry.write_bytes(entry.read_bytes()[:-1])

    def user():
        made.fit(X, Y)

    assert warned_at(MemoryEntryWarning, user) == {1}
