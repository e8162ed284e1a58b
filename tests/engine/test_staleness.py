from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.exceptions import StaleValuesWarning


class Layers(nn.Module):
    """Two layers, and a third of which a subclass says how its weights are read."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.mixing = nn.Parameter(torch.eye(32) + torch.randn(32, 32) / 10)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.head((hidden @ (self.mixing if self.training else self.kept(x))).relu())

    def now(self):
        return self.mixing.detach().clone()


class InAttribute(Layers):
    cache = None

    def kept(self, x):
        if self.cache is None:
            self.cache = self.now()
        return self.cache


class InDict(Layers):
    def __init__(self):
        super().__init__()
        self.by_size = {}

    def kept(self, x):
        return self.by_size.setdefault(len(x), self.now())


class InList(Layers):
    def __init__(self):
        super().__init__()
        self.cached = []

    def kept(self, x):
        if not self.cached:
            self.cached.append(self.now())
        return self.cached[0]


class InBuffer(Layers):
    def __init__(self):
        super().__init__()
        self.register_buffer("cache", None, persistent=False)

    kept = InAttribute.kept


class InFunctools(Layers):
    @functools.lru_cache(maxsize=None)  # noqa: B019, UP033 (what users write)
    def once(self):
        return self.now()

    def kept(self, x):
        return self.once()


class Cleared(InAttribute):
    def train(self, mode=True):
        self.cache = None
        return super().train(mode)


class Anew(Layers):
    def kept(self, x):
        return self.now()


class Normalized(Anew):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))


class MovingAverage(Anew):
    """A plain attribute that training changes, beside one that forward cannot do without."""

    def __init__(self):
        super().__init__()
        self.mean, self.ones = torch.zeros(64), torch.ones(64)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return super().forward((x - self.mean) * self.ones)


class Counting(Anew):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def warned(make, digits, *, evaluated=False, **parameters):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    if evaluated:
        module.eval()(torch.tensor(digits.X[:8], dtype=torch.float32))
    settings = {
        "sparsity_weight": 0,
        "learning_rate": 0.05,
        "batch_size": 16,
        "max_epochs": 2,
        "random_state": 0,
    } | parameters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparseEnergyOODDetector(module, **settings).fit(digits.X[:300], digits.y[:300])
    return [w for w in caught if issubclass(w.category, StaleValuesWarning)]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("make", [InAttribute, InDict, InList, InBuffer, InFunctools])
def test_what_was_computed_from_weights_before_training_is_told(make, evaluated, digits):
    (warning,) = warned(make, digits, evaluated=evaluated)
    assert "Clear that in the train()" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("make", [Cleared, Anew, Normalized, MovingAverage, Counting])
def test_networks_that_compute_anew_are_not_told(make, evaluated, digits):
    assert warned(make, digits, evaluated=evaluated) == []


def test_without_training_nothing_can_be_stale(digits):
    assert warned(InAttribute, digits, max_epochs=0) == []
