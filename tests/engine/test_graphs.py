from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from skood.engine import graphs
from skood.engine.graphs import FEWEST_STEPS, Replayed, repeats_itself, worth_recording

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


@pytest.mark.parametrize(
    "kind", [Counts, Notes, ReplacesBuffer, Draws, DrawsFromNumpy, DrawsFromTorch, DrawsFromItsOwn]
)
def test_what_the_host_does_does_not(network, kind):
    plain = network(Plain())
    plain.adopt(kind().train())
    assert not repeats_itself(plain, X)


def test_the_host_is_looked_at_in_frozen_networks_too(network):
    plain = network(Plain())
    plain.module.body.requires_grad_(False)
    assert repeats_itself(plain, X)


def test_graphs_are_for_long_trainings_on_gpus(network, monkeypatch):
    plain = network(Plain())
    assert not worth_recording(plain, FEWEST_STEPS)
    monkeypatch.setattr(type(plain), "device", torch.device("cuda"))
    assert worth_recording(plain, FEWEST_STEPS)
    assert not worth_recording(plain, FEWEST_STEPS - 1)


def test_batches_of_another_shape_run_without_graphs(network, monkeypatch):
    plain, recorded = network(Plain()), []

    def record(network, batch):
        recorded.append(len(batch))
        return lambda batch: ("graph", len(batch))

    monkeypatch.setattr(graphs, "recorded", record)
    forward = Replayed(plain)
    assert forward(X) == ("graph", 6)
    assert plain.execution["cuda_graphs"]
    features, logits = forward(X[:4])
    assert features.shape == (4, 5)
    assert logits.shape == (4, 3)
    assert forward(X) == ("graph", 6)
    assert recorded == [6]


def test_what_cannot_be_recorded_runs_without_graphs(network, monkeypatch):
    plain = network(Plain())
    monkeypatch.setattr(graphs, "recorded", lambda network, batch: None)
    forward = Replayed(plain)
    assert [len(forward(X)[1]) for _ in range(2)] == [6, 6]
    assert not plain.execution["cuda_graphs"]
