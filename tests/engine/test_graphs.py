from __future__ import annotations

import random
import threading
import warnings
from collections import deque
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import graphs, training
from skood.engine.graphs import FEWEST_STEPS, _Host, _recorded, release, replaying
from skood.engine.network import Network
from skood.networks import CifarResNet, WideResNet

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A network of kernels alone: batch-norm and dropout keep and draw what is the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Counts(Plain):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Notes(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


class ReplacesBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.total = self.total + 1
        return super().forward(x)


class Draws(Plain):
    """Leaves its head's input as it is in half of the calls, as layers are dropped."""

    draw = staticmethod(random.random)

    def forward(self, x):
        features = self.body(x)
        return self.head(features if self.draw() < 0.5 else 2 * features)


class DrawsFromNumpy(Draws):
    draw = staticmethod(np.random.random)


class DrawsFromTorch(Draws):
    draw = staticmethod(lambda: float(torch.rand(())))


class DrawsFromItsOwn(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def draw(self):
        return self.generator.random()


class DrawsByAMethod(Draws):
    def __init__(self, generator) -> None:
        super().__init__()
        self.draw = generator.random


class CountsElsewhere(Plain):
    """Counts in an object of its own, within others."""

    def __init__(self, counter) -> None:
        super().__init__()
        self.deep = SimpleNamespace(within=[{"counter": counter}])

    def forward(self, x):
        counter = self.deep.within[0]["counter"]
        if isinstance(counter, deque):
            counter.append(1)
        else:
            counter += 1
        return super().forward(x)


class Renormalises(Plain):
    """Gives its weight other memory in each forward, as layers with a largest norm do."""

    def forward(self, x):
        self.head.weight.data = torch.renorm(self.head.weight.data, 2, 0, 0.5)
        return super().forward(x)


class HoldsALock(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lock = LockOfItsOwn()


class LockOfItsOwn:
    """What can be copied, but not be written down."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("no")


class Uses(Plain):
    """Holds what networks use and do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = torch.tanh
        self.normalise = partial(nn.functional.layer_norm, normalized_shape=(5,))
        self.settings = {"widths": (4, 5), "dtype": torch.float32, "kind": nn.ReLU}
        self.table = torch.arange(5.0)
        self.apart = [nn.Identity()]
        self.own = self.forward

    def forward(self, x):
        return self.head(self.normalise(self.activation(self.body(x))) + self.table)


class Waits(Plain):
    """Warns as torch does of what makes the host wait for a GPU."""

    def forward(self, x):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return super().forward(x)


class WithDropout(Plain):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.body(x), 0.5, self.training))


@pytest.fixture
def network(opened):
    """A function that opens a module as a network in training mode."""

    def open_in_training(module):
        torch.manual_seed(0)
        network = opened(Plain(), X)
        network.adopt(module)
        network.train(True)
        return network

    return open_in_training


@pytest.fixture
def recorder(monkeypatch):
    """Takes the place of a GPU: its graphs are the network's own passes, or those of `instead`."""
    made = SimpleNamespace(samples=[], instead=None, error=None, streams=0)

    def record(forward, samples, *, allow_unused_input):
        forward(*samples)  # as warm-ups do
        made.samples.append(samples)
        if made.error is not None:
            raise made.error
        if made.instead is None:
            return forward
        return lambda batch, *weights: made.instead(batch)

    @contextmanager
    def stream(here):
        try:
            yield
        finally:
            made.streams += 1

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    for name in ("set_sync_debug_mode", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("get_sync_debug_mode", "current_stream", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    return made


@pytest.fixture
def gpu_dropout(monkeypatch):
    """Dropout draws nothing on the host, as on a GPU."""
    monkeypatch.setattr(graphs, "random_states", lambda: ())
    monkeypatch.setattr(graphs, "restore_random_states", lambda states: None)


@pytest.fixture
def dropping(network, gpu_dropout):
    """A network with dropout."""
    return network(WithDropout())


@pytest.fixture
def on_a_gpu(recorder, monkeypatch):
    """A function like `replaying`, for a network that seems to be on a GPU."""

    def start(network, n_steps=FEWEST_STEPS, device="cuda"):
        with monkeypatch.context() as patch:
            patch.setattr(Network, "device", torch.device(device))
            return replaying(network, n_steps)

    return start


def state_of(network):
    tensors = (*network.module.parameters(), *network.module.buffers())
    return torch.get_rng_state(), *(x.detach().clone() for x in tensors)


def assert_left_as_it_was(network, before):
    for found, expected in zip(state_of(network), before, strict=True):
        assert torch.equal(found, expected)


# Which trainings replay


def test_graphs_are_for_long_trainings_on_the_gpu_in_use(network, on_a_gpu):
    plain = network(Plain())
    assert replaying(plain, FEWEST_STEPS) == plain.trained
    assert on_a_gpu(plain, FEWEST_STEPS - 1) == plain.trained
    assert on_a_gpu(plain, device="cuda:1") == plain.trained
    assert on_a_gpu(plain) != plain.trained
    assert on_a_gpu(plain, device="cuda:0") != plain.trained


def test_threads_train_without_graphs(network, on_a_gpu):
    plain, found = network(Plain()), []
    thread = threading.Thread(target=lambda: found.append(on_a_gpu(plain)))
    thread.start()
    thread.join()
    assert found == [plain.trained]


def test_batches_of_another_shape_run_without_graphs(network, on_a_gpu, recorder):
    plain = network(Plain())
    forward = on_a_gpu(plain)
    forward(X)
    assert plain.execution["cuda_graphs"]
    features, logits = forward(X[:4])
    assert features.shape == (4, 5)
    assert logits.shape == (4, 3)
    assert [len(batch) for batch, *_ in recorder.samples] == [6]


def test_what_cannot_be_recorded_runs_without_graphs(network, on_a_gpu, recorder):
    plain = network(Counts())
    forward = on_a_gpu(plain)
    assert [len(forward(X)[1]) for _ in range(2)] == [6, 6]
    assert not plain.execution["cuda_graphs"]
    assert recorder.samples == []
    assert plain.module.calls == 2
    assert not release(forward)


def test_graphs_are_released_once(network, on_a_gpu, monkeypatch):
    plain = network(Plain())
    monkeypatch.setattr(graphs, "_recorded", lambda network, batch: lambda batch: "graph")
    forward = on_a_gpu(plain)
    assert not release(forward)
    assert [forward(X), forward(X)] == ["graph", "graph"]
    assert forward(X[:4])[1].shape == (4, 3)
    assert release(forward)
    assert not release(forward)
    assert forward(X)[1].shape == (6, 3)
    assert not release(plain.trained)


# What is recorded


def test_a_network_is_recorded_and_left_as_it_was(dropping, recorder):
    before = state_of(dropping)
    forward = _recorded(dropping, X)
    assert_left_as_it_was(dropping, before)
    assert len(recorder.samples) == 1
    assert forward(X)[1].shape == (6, 3)


def test_what_a_network_holds_and_uses_does_not_matter(network, recorder):
    assert _recorded(network(Uses()), X) is not None


def test_tensors_on_the_host_are_seen_to_change():
    module, gpu = CountsElsewhere(torch.zeros(3)), torch.device("cuda", 0)
    before = _Host(module, gpu)
    assert _Host(module, gpu).written == before.written
    module(X)
    assert _Host(module, gpu).written != before.written


@pytest.mark.parametrize(
    "module",
    [
        Counts(),
        Notes(),
        ReplacesBuffer(),
        CountsElsewhere(np.zeros(3)),
        CountsElsewhere(deque()),
        Renormalises(),
        HoldsALock(),
        Draws(),
        DrawsFromNumpy(),
        DrawsFromTorch(),
        DrawsFromItsOwn(),
        DrawsByAMethod(np.random.default_rng(0)),
        DrawsByAMethod(random.Random(0)),
        Waits(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_has_a_host_of_its_own_is_not_recorded(network, recorder, module, generator_states):
    own = network(module)
    before, states = state_of(own), (generator_states(), random.getstate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _recorded(own, X) is None
    assert recorder.samples == []
    assert_left_as_it_was(own, before)
    assert (generator_states(), random.getstate()) == states


def of_other_weights(network):
    """What is recorded with weights that lie elsewhere than those which are trained."""
    twin = network.uncompiled_copy()

    def forward(batch):
        with torch.random.fork_rng():  # both with the same dropout
            values = twin.captured(batch)
        # The gradients are right, for they reach the weights, as those of a recording do.
        return tuple(
            value.detach() + new - new.detach()
            for value, new in zip(values, network.captured(batch), strict=True)
        )

    return forward


def of_the_first_rows(network):
    return lambda batch: network.captured(X)


def of_a_forward_without_dropout(network):
    def forward(batch):
        network.train(False)
        outputs = network.captured(batch)
        network.train(True)
        return outputs

    return forward


def of_half_the_gradient(network):
    def forward(batch):
        features, logits = network.captured(batch)
        return features, (logits + logits.detach()) / 2

    return forward


@pytest.mark.parametrize(
    "wrong",
    [of_other_weights, of_the_first_rows, of_a_forward_without_dropout, of_half_the_gradient],
)
def test_a_wrong_recording_is_not_used(dropping, recorder, wrong):
    before = state_of(dropping)
    recorder.instead = wrong(dropping)
    assert _recorded(dropping, X) is None
    assert len(recorder.samples) == 1
    assert_left_as_it_was(dropping, before)


def test_a_recording_may_fail(dropping, recorder):
    before = state_of(dropping)
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    assert _recorded(dropping, X) is None
    assert recorder.streams == 1
    assert_left_as_it_was(dropping, before)


class Averages(Plain):
    """Keeps a moving average in a list, where no buffer is."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.zeros(3)]

    def forward(self, x):
        logits = super().forward(x)
        self.kept[0].lerp_(logits.detach().mean(dim=0), 0.1)
        return logits


def test_what_forwards_change_in_place_is_put_back(network, recorder):
    own = network(Averages())
    assert _recorded(own, X) is not None
    assert torch.equal(own.module.kept[0], torch.zeros(3))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.eye(3).to_sparse(),
        torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ],
    ids=["sparse", "nested"],
)
def test_what_could_not_be_put_back_is_not_recorded(network, recorder, buffer):
    module = Plain()
    module.register_buffer("graph", buffer)
    assert _recorded(network(module), X) is None
    assert recorder.samples == []


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x.unflatten(1, (2, 2)))[0][:, -1])


def test_recurrent_networks_are_recorded(network, recorder):
    assert _recorded(network(Recurrent()), X) is not None


def test_parts_that_refuse_to_be_pickled_or_are_not_used_are_recorded(network, recorder):
    module = Plain()
    nn.utils.parametrizations.weight_norm(module.head)
    module.spare = nn.Linear(2, 2)
    assert _recorded(network(module), X) is not None


def test_batches_are_left_as_they_were(network, recorder):
    class Doubles(Plain):
        def forward(self, x):
            return super().forward(x.mul_(2))

    batch = X.clone()
    forward = _recorded(network(Doubles()), batch)
    assert torch.equal(batch, X)
    forward(batch)
    assert torch.equal(batch, 2 * X)


def test_a_frozen_body_is_recorded(network, recorder):
    plain = network(Plain())
    plain.module.body.requires_grad_(False)
    assert _recorded(plain, X) is not None


def test_known_networks_are_recorded(opened, recorder):
    torchvision = pytest.importorskip("torchvision")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module, precision in (
        (CifarResNet(8), "bfloat16"),
        (WideResNet(10, 1, dropout=0.0), "float32"),
        (torchvision.models.mobilenet_v3_small(num_classes=3, dropout=0.0), "float32"),
    ):
        network = opened(module, images, precision=precision)
        network.train(True)
        assert _recorded(network, images) is not None, type(module)


def test_training_with_replays_is_training(digits, monkeypatch, recorder, gpu_dropout, on_a_gpu):
    def history():
        detector = SparseEnergyOODDetector(digits.module, max_epochs=2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(digits.X, digits.y)
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in detector.history_]
        return records, detector.score_samples(digits.X_test), detector.execution_["cuda_graphs"]

    records, scores, by_graphs = history()
    assert not by_graphs
    monkeypatch.setattr(training, "replaying", lambda network, n_steps: on_a_gpu(network))
    replayed, same_scores, by_graphs = history()
    assert by_graphs
    assert len(recorder.samples) == 1
    assert replayed == records
    assert np.array_equal(same_scores, scores)


def test_graphs_make_room_where_a_step_has_none(digits, monkeypatch, on_a_gpu):
    calls = []

    def short(batch):
        calls.append(len(batch))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "replaying", lambda network, n_steps: on_a_gpu(network))
    monkeypatch.setattr(graphs, "_recorded", lambda network, batch: short)
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
    assert len(calls) == 1
    assert np.isfinite(detector.history_[0]["loss"])
    assert all(p.grad is None for p in detector.module_.parameters())
