from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch
from modules import hooks_of, mlp
from torch import nn

from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)


@pytest.fixture(autouse=True)
def _eager_compiler(monkeypatch):
    """The compiler's capture without its code generator, which needs a C++ compiler."""
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    yield
    torch.compiler.reset()


def test_a_compiled_network_shares_its_tensors_and_not_its_mode_with_what_users_see(opened):
    network = opened(mlp(), X, compiled=True)
    public, batch = network.public, torch.tensor(X)
    public.train()
    with torch.no_grad():
        public[4].bias.fill_(7)
        features, logits = network.seen(batch)[:2]
        torch.testing.assert_close(features, public.eval()[:4](batch))
        torch.testing.assert_close(logits, public(batch))
    assert hooks_of(public) == []


def test_a_compiled_network_changes_its_mode(opened):
    network = opened(mlp(), X, compiled=True)
    network.train(True)
    first, second = (network.logits(torch.tensor(X)) for _ in range(2))
    assert not torch.equal(first, second)  # by dropout
    network.train(False)
    first, second = (network.logits(torch.tensor(X)) for _ in range(2))
    assert torch.equal(first, second)


def test_what_a_compiled_network_puts_in_the_place_of_a_buffer_is_seen(opened):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            if self.training:
                self.mean = 0.5 * self.mean + 0.5 * x.mean(dim=0)
            return self.head(x - self.mean)

    network = opened(Counts().double(), X, compiled=True)
    network.train(True)
    network.logits(torch.tensor(X))
    network.train(False)
    assert network.public.mean.any()
    assert torch.equal(network.logits(torch.tensor(X)), network.public(torch.tensor(X)))


def test_a_compiled_network_agrees_with_the_plain_one(opened):
    module = mlp()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = plain.batcher(as_rows(X))
    for network in (compiled, pickle.loads(pickle.dumps(compiled))):
        with torch.inference_mode():
            torch.testing.assert_close(
                network.seen(batch)[:2],
                plain.seen(batch)[:2],
                rtol=1e-5,
                atol=1e-8,
            )
            torch.testing.assert_close(network.logits(batch), plain.logits(batch))
        assert hooks_of(network.public) == []


def test_a_compiled_network_trains_the_weights_that_it_shows(opened):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = torch.tensor(X)
    for network in (plain, compiled):
        network.train(True)
        features, logits = network.trained(batch)
        (features.sum() + logits.square().sum()).backward()
        network.train(False)
    for own, expected in zip(compiled.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-5, atol=1e-8)
    for name, expected in plain.module.named_buffers():
        torch.testing.assert_close(compiled.module.get_buffer(name), expected)
    with torch.no_grad():
        for network in (plain, compiled):
            network.module[3].weight.mul_(2)
            network.module[3].bias.add_(1)
        torch.testing.assert_close(compiled.logits(batch), plain.logits(batch))


def test_an_uncompiled_copy_gives_the_same_and_is_its_own(opened):
    network = opened(mlp(), X, compiled=True)
    twin = network.uncompiled_copy()
    batch = torch.tensor(X)
    with torch.no_grad():
        expected = network.logits(batch)
        assert not twin.compiled
        torch.testing.assert_close(twin.logits(batch), expected)
        next(twin.module.parameters()).zero_()
        assert torch.equal(network.logits(batch), expected)
