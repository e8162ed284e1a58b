from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from skood.engine.modes import set_mode


def frozen(module):
    return module.requires_grad_(False)


def norm(**parameters):
    return nn.BatchNorm1d(4, **parameters)


class Adapted(nn.Module):
    """A frozen linear layer with trainable weights of low rank."""

    def __init__(self):
        super().__init__()
        self.base = frozen(nn.Linear(4, 4))
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OwnNorm(nn.Module):
    """A normalisation of the user's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return (x - self.mean) * self.scale


def partly_frozen_norm():
    layer = norm()
    layer.weight.requires_grad_(False)
    return layer


def moved(module):
    """Names of the buffers that a forward in training mode changes."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    set_mode(module, training=True)
    module(torch.arange(32.0).reshape(8, 4))
    after = dict(module.named_buffers())
    return {n.rpartition(".")[0] for n, b in before.items() if not torch.equal(b, after[n])}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), norm(), nn.Linear(4, 3)), {"1"}),
        (
            lambda: nn.Sequential(norm(affine=False), nn.Linear(4, 4), norm(affine=False)),
            {"0", "2"},
        ),
        (
            lambda: nn.Sequential(frozen(nn.Sequential(nn.Linear(4, 4), norm())), nn.Linear(4, 3)),
            set(),
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), frozen(norm()), nn.Linear(4, 3)), set()),
        (lambda: nn.Sequential(frozen(nn.Linear(4, 4)), norm(), nn.Linear(4, 3)), {"1"}),
        (lambda: nn.Sequential(nn.Linear(4, 4), partly_frozen_norm()), {"1"}),
        (
            lambda: nn.Sequential(
                norm(affine=False),
                nn.Sequential(frozen(nn.Linear(4, 4)), nn.Linear(4, 4)),
                nn.Linear(4, 3),
            ),
            set(),
        ),
        (
            lambda: nn.Sequential(
                frozen(nn.Linear(4, 4)), nn.Sequential(norm(affine=False), nn.Linear(4, 3))
            ),
            {"1.0"},
        ),
        (
            lambda: nn.Sequential(
                frozen(nn.Sequential(norm(affine=False), nn.Linear(4, 4), norm(affine=False))),
                nn.Linear(4, 3),
            ),
            set(),
        ),
        (
            lambda: nn.Sequential(
                frozen(nn.Linear(4, 4)), nn.ReLU(), norm(affine=False), nn.Linear(4, 3)
            ),
            set(),
        ),
        (lambda: nn.Sequential(Adapted(), frozen(norm()), norm(affine=False)), set()),
        (lambda: nn.Sequential(Adapted(), norm(affine=False), nn.Linear(4, 3)), {"1"}),
        (lambda: nn.Sequential(nn.Linear(4, 4), frozen(OwnNorm())), set()),
        (lambda: nn.Sequential(nn.Linear(4, 4), OwnNorm()), {"1"}),
        (lambda: nn.Sequential(frozen(spectral_norm(nn.Linear(4, 4))), nn.Linear(4, 3)), set()),
        (lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3)), {"0"}),
        (
            lambda: nn.Sequential(
                frozen(parametrizations.spectral_norm(nn.Linear(4, 4))), nn.Linear(4, 3)
            ),
            set(),
        ),
    ],
    ids=[
        "trainable",
        "trainable, without parameters",
        "frozen part",
        "frozen norm",
        "norm between",
        "partly frozen norm",
        "before a frozen layer, without parameters",
        "before a trainable layer, without parameters",
        "frozen part, without parameters",
        "after a frozen layer, without parameters",
        "frozen norm after an adapter",
        "after an adapter, without parameters",
        "frozen norm of the user's",
        "norm of the user's",
        "frozen spectral norm",
        "spectral norm",
        "frozen parametrization",
    ],
)
def test_frozen_parts_keep_their_statistics(module, expected):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert moved(module()) == expected


def test_frozen_dropout_goes_on():
    module = nn.Sequential(frozen(nn.Sequential(nn.Linear(4, 4), nn.Dropout())), nn.Linear(4, 3))
    set_mode(module, training=True)
    assert module[0][1].training
    set_mode(module, training=False)
    assert not any(part.training for part in module.modules())


class WithoutReturn(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()


class Loop(nn.Linear):
    def train(self, batches):
        for batch in batches:
            self(batch)


@pytest.mark.parametrize("training", [True, False])
def test_a_train_of_another_meaning_is_refused_by_what_it_must_be(training):
    message = rf"own train\(mode\) fails at train\({training}\).*train\(self, mode=True\)"
    with pytest.raises(TypeError, match=message):
        set_mode(nn.Sequential(Loop(4, 3)), training)


def test_a_train_of_the_users_need_not_return_anything():
    module = nn.Sequential(WithoutReturn(nn.Linear(4, 4), norm()), nn.Linear(4, 3))
    set_mode(module, training=True)
    assert module.training
    assert not module[0][1].training
