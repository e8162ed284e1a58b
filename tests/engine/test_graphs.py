from __future__ import annotations

import random
import warnings
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import graphs, training
from skood.engine.graphs import (
    FEWEST_STEPS,
    Replayed,
    _host_state,
    agree,
    recorded,
    repeats_itself,
    worth_recording,
)
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


@pytest.fixture
def network(opened):
    def open_in_training(module):
        torch.manual_seed(0)
        network = opened(module, X)
        network.train(True)
        return network

    return open_in_training


def test_kernels_alone_repeat_themselves(network):
    assert repeats_itself(network(Plain()), X)


def test_tensors_on_the_host_are_seen_to_change():
    module, gpu = CountsElsewhere(torch.zeros(3)), torch.device("cuda", 0)
    before = _host_state(module, gpu).written
    assert _host_state(module, gpu).written == before
    module(X)
    assert _host_state(module, gpu).written != before


def test_what_a_network_holds_and_uses_does_not_matter(network):
    uses = network(Plain())
    uses.adopt(Uses().train())
    assert repeats_itself(uses, X)


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
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_the_host_does_does_not_repeat_itself(network, module, generator_states):
    plain = network(Plain())
    plain.adopt(module.train())
    before = generator_states(), random.getstate()
    assert not repeats_itself(plain, X)
    assert (generator_states(), random.getstate()) == before


def test_the_host_is_looked_at_in_frozen_networks_too(network):
    plain = network(Plain())
    plain.module.body.requires_grad_(False)
    assert repeats_itself(plain, X)


def test_graphs_are_for_long_trainings_on_gpus(network, monkeypatch):
    plain = network(Plain())
    assert not worth_recording(plain, FEWEST_STEPS)
    monkeypatch.setattr(type(plain), "device", torch.device("cuda"))
    monkeypatch.setattr(graphs, "_records_on", lambda device: True)
    assert worth_recording(plain, FEWEST_STEPS)
    assert not worth_recording(plain, FEWEST_STEPS - 1)


def test_batches_of_another_shape_run_without_graphs(network, monkeypatch):
    plain, sizes = network(Plain()), []

    def record(network, batch):
        sizes.append(len(batch))
        return lambda batch: ("graph", len(batch))

    monkeypatch.setattr(graphs, "recorded", record)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forward = Replayed(plain)
    assert forward(X) == ("graph", 6)
    assert plain.execution["cuda_graphs"]
    features, logits = forward(X[:4])
    assert features.shape == (4, 5)
    assert logits.shape == (4, 3)
    assert forward(X) == ("graph", 6)
    assert sizes == [6]


def test_what_cannot_be_recorded_runs_without_graphs(network, monkeypatch):
    plain = network(Plain())
    monkeypatch.setattr(graphs, "recorded", lambda network, batch: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forward = Replayed(plain)
    assert [len(forward(X)[1]) for _ in range(2)] == [6, 6]
    assert not plain.execution["cuda_graphs"]


class WithDropout(Plain):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.body(x), 0.5, self.training))


@pytest.fixture
def dropping(network):
    plain = network(Plain())
    plain.adopt(WithDropout().train())
    return plain


def state_of(network):
    return [x.clone() for x in (*network.module.parameters(), *network.module.buffers())]


def restorer(network):
    kept = [(b, b.clone()) for b in network.module.buffers()]

    def restore():
        for buffer, before in kept:
            buffer.copy_(before)

    return restore


def test_passes_agree_with_themselves_and_leave_the_network_as_it_was(dropping):
    before = state_of(dropping)
    assert agree(dropping, dropping.captured, X, restorer(dropping))
    restorer(dropping)()
    for found, expected in zip(state_of(dropping)[:6], before[:6], strict=True):
        assert torch.equal(found, expected)


def of_other_weights(network):
    """What is recorded with weights that lie elsewhere than those which are trained."""
    twin = network.uncompiled_copy()
    originals = list(network.module.parameters())

    def forward(batch):
        features, logits = twin.captured(batch)
        # So that gradients reach the weights, as those of a recording do.
        return features, logits + 0 * sum(p.sum() for p in originals)

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
def test_what_gives_something_else_does_not_agree(dropping, wrong):
    before = state_of(dropping)
    assert not agree(dropping, wrong(dropping), X, restorer(dropping))
    for found, expected in zip(state_of(dropping)[:6], before[:6], strict=True):
        assert torch.equal(found, expected)


def test_graphs_are_given_up_where_memory_is_short(dropping, monkeypatch):
    monkeypatch.setattr(graphs, "recorded", lambda network, batch: lambda batch: "graph")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forward = Replayed(dropping)
    assert not forward.release()
    assert forward(X) == "graph"
    assert forward.release()
    assert not forward.release()
    assert forward(X)[1].shape == (6, 3)


# With a device that only seems to record


@pytest.fixture
def recorder(monkeypatch):
    """Takes the place of a GPU: its graphs are the network's own passes, or those of `instead`."""
    made = SimpleNamespace(callables=[], instead=lambda module: module, error=None)

    def record(module, samples, *, allow_unused_input, pool):
        module(*samples)  # as warm-ups do
        made.callables.append(module)
        if made.error is not None:
            raise made.error
        return made.instead(module)

    def do_nothing(*args):
        pass

    # Dropout of a GPU draws nothing on the host.
    monkeypatch.setattr(graphs, "_random_states", random.getstate)
    monkeypatch.setattr(graphs, "_restore_random_states", random.setstate)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    for name in ("set_sync_debug_mode", "set_stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, do_nothing)
    for name in ("get_sync_debug_mode", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 0)
    return made


def test_a_network_is_recorded_and_left_as_it_was(dropping, recorder):
    before, state = state_of(dropping), torch.get_rng_state()
    found = recorded(dropping, X)
    assert [found] == recorder.callables
    assert torch.equal(torch.get_rng_state(), state)
    for tensor, expected in zip(state_of(dropping), before, strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("wrong", [of_other_weights, of_the_first_rows, of_half_the_gradient])
def test_a_wrong_recording_is_not_used(dropping, recorder, wrong):
    recorder.instead = lambda module: wrong(dropping)
    assert recorded(dropping, X) is None
    assert len(recorder.callables) == 1


def test_a_recording_may_fail(dropping, recorder):
    before, state = state_of(dropping), torch.get_rng_state()
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    assert recorded(dropping, X) is None
    assert torch.equal(torch.get_rng_state(), state)
    for tensor, expected in zip(state_of(dropping), before, strict=True):
        assert torch.equal(tensor, expected)


def test_a_network_with_a_host_of_its_own_is_not_recorded(network, recorder):
    plain = network(Plain())
    plain.adopt(Counts().train())
    assert recorded(plain, X) is None
    assert recorder.callables == []
    assert plain.module.calls == 0


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
    plain = network(Plain())
    plain.adopt(Averages().train())
    assert recorded(plain, X) is not None
    assert torch.equal(plain.module.kept[0], torch.zeros(3))


def test_what_could_not_be_put_back_is_not_recorded(network, recorder):
    plain = network(Plain())
    module = Plain().train()
    module.register_buffer("graph", torch.eye(3).to_sparse())
    plain.adopt(module)
    assert recorded(plain, X) is None
    assert recorder.callables == []


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x.unflatten(1, (2, 2)))[0][:, -1])


def test_recurrent_networks_are_recorded(network, recorder):
    assert recorded(network(Recurrent()), X) is not None


def test_a_frozen_body_is_recorded(network, recorder):
    plain = network(Plain())
    plain.module.body.requires_grad_(False)
    assert recorded(plain, X) is not None


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
        assert recorded(network, images) is not None, type(module)


def test_training_with_replays_is_training(digits, monkeypatch, recorder):
    def history():
        detector = SparseEnergyOODDetector(digits.module, max_epochs=2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(digits.X, digits.y)
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in detector.history_]
        return records, detector.score_samples(digits.X_test), detector.execution_["cuda_graphs"]

    records, scores, by_graphs = history()
    assert not by_graphs
    monkeypatch.setattr(training, "worth_recording", lambda network, n_steps: True)
    replayed, same_scores, by_graphs = history()
    assert by_graphs
    assert len(recorder.callables) == 1
    assert replayed == records
    assert np.array_equal(same_scores, scores)


def test_graphs_make_room_where_a_step_has_none(digits, monkeypatch, recorder):
    calls = []

    class Short(nn.Module):
        def forward(self, batch):
            calls.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "worth_recording", lambda network, n_steps: True)
    monkeypatch.setattr(graphs, "recorded", lambda network, batch: Short())
    detector = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
    assert len(calls) == 1
    assert np.isfinite(detector.history_[0]["loss"])
    assert all(p.grad is None for p in detector.module_.parameters())
