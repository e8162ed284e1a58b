from __future__ import annotations

import numpy as np
import pytest
import torch
from modules import hooks_of, mlp
from torch import nn
from torch.nn import functional as F

from skood.engine.affine import affine_head
from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)


class Mapped(nn.Module):
    """A classifier whose features have a shape of their own."""

    def __init__(self, head, width=8, shape=None):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.ReLU()), head
        self.shape = (width,) if shape is None else shape

    def forward(self, x):
        return self.head(self.body(x).reshape(len(x), *self.shape)).flatten(1)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def layer_of(head):
    """The layer with the weights, in float64."""
    layer = [part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return layer.weight.detach().flatten(1).double(), bias.detach().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("head", "width", "shape"),
    [
        (nn.Linear(8, 4), 8, None),
        (nn.Linear(8, 4, bias=False), 8, None),
        (nn.Sequential(nn.Dropout(0.9), nn.Linear(8, 4)), 8, None),
        (nn.Conv2d(8, 4, 1), 8, (8, 1, 1)),
        (nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten()), 8, (8, 1, 1)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 12, (3, 2, 2)),
        (nn.Linear(1, 2), 1, None),
        (nn.Linear(700, 4), 700, None),
        (nn.Linear(512, 4), 512, None),
    ],
    ids=str,
)
def test_an_affine_head_is_read_from_what_it_returns(opened, head, width, shape, dtype):
    network = opened(Mapped(head, width, shape).to(dtype), X, head="head")
    weight, bias = affine_head(network, as_rows(X))
    for found, expected in zip((weight, bias), layer_of(network.module.head), strict=True):
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert not found.is_inference()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_affine_head_in_half_precision_is_read_to_its_precision(opened, dtype):
    module = Mapped(nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        module.head.weight.mul_(0.1)
        module.head.bias.fill_(3)  # beside which the weights are small
    network = opened(module, X)
    weight, bias = affine_head(network, as_rows(X))
    expected, _ = layer_of(network.module.head)
    error = (weight - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    assert bias.tolist() == [3] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_that_forward_calls_under_autocast_is_read_in_its_own_dtype(opened, dtype):
    class Mixed(Mapped):
        def forward(self, x):
            with torch.autocast("cpu", dtype=dtype):
                return super().forward(x).float()

    network = opened(Mixed(nn.Linear(8, 4)), X)
    weight, _ = affine_head(network, as_rows(X))
    torch.testing.assert_close(weight, layer_of(network.module.head)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(8, 4), nn.Tanh()),
        Cosine(8, 4),
    ],
    ids=["mlp", "tanh", "cosine"],
)
def test_a_head_that_is_not_affine_is_refused(opened, head):
    network = opened(Mapped(head), X, head="head")
    with pytest.raises(ValueError, match=r"head, 'head' \(.*\), is not affine .* another score"):
        affine_head(network, as_rows(X))


def test_reading_a_head_leaves_no_hook_and_no_gradient(opened):
    network = opened(mlp(), X)
    affine_head(network, as_rows(X))
    assert hooks_of(network.public) == []
    assert all(parameter.grad is None for parameter in network.module.parameters())
    assert not network.module.training


@pytest.mark.parametrize("factor", [1e-7, 1e5, 1e7, 1e20])
def test_a_head_of_features_of_any_size_is_read_to_the_last_digits(opened, factor):
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        module[0].weight.mul_(factor)
        module[0].bias.mul_(factor)
        module[2].weight.div_(factor)
    X = np.random.RandomState(0).randn(30, 4).astype(np.float32)
    weight, bias = affine_head(opened(module, X), as_rows(X))
    torch.testing.assert_close(
        factor * weight, factor * module[2].weight.double(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(bias, module[2].bias.double(), rtol=1e-6, atol=0)
