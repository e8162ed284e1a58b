from __future__ import annotations

import collections
import functools
import warnings

import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import staleness
from skood.engine.staleness import warn_if_stale
from skood.exceptions import StaleValuesWarning
from skood.rows import as_rows


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


class InProperty(Layers):
    @functools.cached_property
    def cached(self):
        return self.now()

    def kept(self, x):
        return self.cached


class InMissingAttribute(Layers):
    def kept(self, x):
        if not hasattr(self, "cache"):
            self.cache = self.now()
        return self.cache


class InDefaultDict(Layers):
    def __init__(self):
        super().__init__()
        self.lists = collections.defaultdict(list)

    def kept(self, x):
        if not self.lists["mixing"]:
            self.lists["mixing"].append(self.now())
        return self.lists["mixing"][0]


class BesideConstant(InAttribute):
    """A cache beside a tensor that forward cannot do without."""

    def __init__(self):
        super().__init__()
        self.ones = torch.ones(64)

    def forward(self, x):
        return super().forward(x * self.ones)


class MergedByEval(Layers):
    """Has a layer that is merged by a call of the user's alone, and works without."""

    merged = None

    def eval(self):
        self.merged = self.now()
        return super().eval()

    def kept(self, x):
        return self.mixing if self.merged is None else self.merged


class Cleared(InAttribute):
    def train(self, mode=True):
        self.cache = None
        return super().train(mode)


class ClearedFunctools(InFunctools):
    def train(self, mode=True):
        self.once.cache_clear()
        return super().train(mode)


class ClearedProperty(InProperty):
    def train(self, mode=True):
        vars(self).pop("cached", None)
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


class InNumber(Anew):
    """A moving average that is a number."""

    scale = 1.0

    def forward(self, x):
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * float(x.detach().std())
        return super().forward(x / self.scale)


class AveragesInList(Anew):
    def __init__(self):
        super().__init__()
        self.stats = [torch.zeros(64), torch.ones(64)]

    def forward(self, x):
        if self.training:
            self.stats[0] = 0.9 * self.stats[0] + 0.1 * x.detach().mean(dim=0)
        return super().forward((x - self.stats[0]) / self.stats[1])


class FromFirstBatch(Anew):
    """A statistic that is there only once training has begun."""

    mean = None

    def forward(self, x):
        if self.training and self.mean is None:
            self.mean = x.detach().mean(dim=0)
        return super().forward(x if self.mean is None else 3 * (x - self.mean))


class OptionalTensor(Anew):
    """A setting that forward can do without, with other logits."""

    def __init__(self):
        super().__init__()
        self.mean = torch.full((64,), 0.3)

    def forward(self, x):
        return super().forward(x if self.mean is None else 3 * x - self.mean)


class OptionalBuffer(Anew):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", (torch.arange(64) % 2).float(), persistent=False)

    def forward(self, x):
        return super().forward(x if self.mask is None else x * self.mask)


class Recurrent(Anew):
    """An LSTM, which lists its parameters in an attribute."""

    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(8, 64, batch_first=True)

    def forward(self, x):
        return super().forward(self.rows(x.reshape(-1, 8, 8))[0][:, -1])


class CountingInPlace(Anew):
    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(1)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Drawing(Anew):
    """Draws a random number without any effect."""

    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


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


KEEPING = [
    InAttribute,
    InDict,
    InList,
    InBuffer,
    InFunctools,
    InProperty,
    InMissingAttribute,
    InDefaultDict,
    BesideConstant,
]

COMPUTING_ANEW = [
    Cleared,
    ClearedFunctools,
    ClearedProperty,
    Anew,
    Normalized,
    MovingAverage,
    InNumber,
    AveragesInList,
    FromFirstBatch,
    OptionalTensor,
    OptionalBuffer,
    Recurrent,
    CountingInPlace,
    Drawing,
    Counting,
]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("make", KEEPING)
def test_what_was_computed_from_weights_before_training_is_told(make, evaluated, digits):
    (warning,) = warned(make, digits, evaluated=evaluated)
    assert "Clear that in the train()" in str(warning.message)
    assert warning.filename == __file__


class OfASmallPart(InAttribute):
    """The part of the weights that is kept moves the logits by a thousandth of their spread."""

    def now(self):
        return torch.eye(32) + self.mixing.detach() / 200


@pytest.mark.parametrize(("precision", "told"), [("float32", 1), ("bfloat16", 0)])
def test_a_small_difference_is_told_where_rounding_is_smaller(precision, told, digits):
    assert len(warned(OfASmallPart, digits, evaluated=True, precision=precision)) == told


class Convolutions(nn.Sequential):
    """In channels_last, with batch-norm and dropout."""

    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convolutions_are_not_told_in_any_precision(precision, digits):
    assert warned(Convolutions, digits, evaluated=True, precision=precision) == []


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_that_was_merged_before_fit_is_told(merged, digits):
    assert len(warned(MergedByEval, digits, evaluated=merged)) == merged


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("make", COMPUTING_ANEW)
def test_networks_that_compute_anew_are_not_told(make, evaluated, digits):
    assert warned(make, digits, evaluated=evaluated) == []


@pytest.mark.parametrize("make", [Anew, Normalized, Recurrent])
def test_what_keeps_nothing_costs_a_copy_and_two_forwards(make, digits, monkeypatch):
    calls = collections.Counter()
    for name in ("copy_module", "run"):
        counted = getattr(staleness, name)

        def count(*args, name=name, counted=counted):
            calls[name] += 1
            return counted(*args)

        monkeypatch.setattr(staleness, name, count)
    assert warned(make, digits, evaluated=True, max_epochs=1) == []
    assert calls == {"copy_module": 1, "run": 2}


@pytest.mark.parametrize("max_epochs", [0, 1])
def test_it_is_told_once_for_all_training(max_epochs, digits):
    settings = {"pretrain_epochs": 2, "max_epochs": max_epochs}
    assert len(warned(InAttribute, digits, **settings)) == 1


def test_without_training_nothing_can_be_stale(digits):
    assert warned(InAttribute, digits, max_epochs=0) == []


@pytest.mark.filterwarnings("ignore::skood.exceptions.SkoodWarning")
def test_nothing_of_the_network_or_of_random_generators_changes(digits):
    class Both(CountingInPlace, Drawing):
        pass

    detector = SparseEnergyOODDetector(Both(), max_epochs=1, random_state=0)
    network = detector.fit(digits.X[:100], digits.y[:100])._network
    calls, state = network.module.calls.clone(), torch.get_rng_state()
    weights = {name: t.clone() for name, t in network.module.state_dict().items()}
    warn_if_stale(network, detector.module, as_rows(digits.X[:100]))
    assert network.module.calls == calls + 1
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.filterwarnings("ignore::skood.exceptions.SkoodWarning")
def test_networks_that_cannot_be_copied_are_not_judged(digits):
    detector = SparseEnergyOODDetector(Anew(), max_epochs=1, random_state=0)
    network = detector.fit(digits.X[:100], digits.y[:100])._network

    class Uncopied(Anew):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copy")

    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleValuesWarning)
        warn_if_stale(network, Uncopied(), as_rows(digits.X[:100]))
        warn_if_stale(network, nn.Linear(64, 10), as_rows(digits.X[:100]))
