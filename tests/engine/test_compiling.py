from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch
from modules import hooks_of, mlp
from torch import nn

from skood.engine.compiling import Compiled
from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)


@pytest.fixture(autouse=True)
def _eager_compiler(monkeypatch):
    """The compiler's capture without its code generator, which needs a C++ compiler."""
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    yield
    torch.compiler.reset()


def test_a_compiled_forward_shares_the_tensors_and_not_the_hooks():
    module = mlp().eval()
    compiled = Compiled(module, "4", torch.device("cpu"))
    batch = torch.tensor(X)
    with torch.no_grad():
        module[4].bias.fill_(7)
        features, logits = compiled(batch)
        torch.testing.assert_close(features, module[:4](batch))
        torch.testing.assert_close(logits, module(batch))
    assert hooks_of(module) == []


def test_a_compiled_forward_changes_its_mode_apart_from_the_module():
    module = mlp().eval()
    compiled = Compiled(module, "4", torch.device("cpu"))
    compiled.train(True)
    first, second = (compiled(torch.tensor(X))[1] for _ in range(2))
    assert not torch.equal(first, second)  # by dropout
    assert not module.training


def test_a_compiled_network_agrees_with_the_plain_one(opened):
    module = mlp()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = plain.batcher(as_rows(X))
    for network in (compiled, pickle.loads(pickle.dumps(compiled))):
        with torch.inference_mode():
            torch.testing.assert_close(
                network.features_and_logits(batch),
                plain.features_and_logits(batch),
                rtol=1e-5,
                atol=1e-8,
            )
            torch.testing.assert_close(network.logits(batch), plain.logits(batch))
        assert hooks_of(network.module) == []


def test_a_compiled_network_trains_the_weights_that_it_shows(opened):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = torch.tensor(X)
    for network in (plain, compiled):
        network.train(True)
        features, logits = network.features_and_logits(batch)
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
