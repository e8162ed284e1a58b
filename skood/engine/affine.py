"""The head as an affine function of the features, for scores that need its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .network import TRIAL_ROWS, Network, floating_dtype
from .outputs import as_float64, logits_of, run
from .rows import Rows
from .trials import captured_calls

PROBED_FEATURES = 256
"""Features of which the weights are read at a time."""

PROBE = 256
"""Size of a feature when its weights are read, at least."""


def affine_head(network: Network, rows: Rows) -> tuple[Tensor, Tensor]:
    """Weight (K, d) and bias (K,) of a head, in float64, read from what it returns.

    The head maps features h to ``h @ weight.T + bias``. A ValueError says if it is not affine.
    """
    name = network.visible_head
    head = network.module.get_submodule(name)
    batch = network.batcher(rows.spaced(TRIAL_ROWS))
    with _as_it_is(network), captured_calls({name: head}) as calls:
        run(network.module, batch)
    features = calls[name].features
    flat = features.flatten(1)

    def output_in(dtype: torch.dtype, values: Tensor) -> Any:
        with _as_it_is(network):
            return head(values.to(flat.device, dtype).reshape(-1, *features.shape[1:]))

    dtype = flat.dtype
    try:
        output_in(dtype, flat[:1])
    except RuntimeError:  # forward calls it under an autocast of its own
        dtype = floating_dtype(head)

    def logits(values: Tensor) -> Tensor:
        output = output_in(dtype, values)
        # A convolution of size 1 gives (n, K, 1, 1).
        return as_float64(logits_of(output.flatten(1) if isinstance(output, Tensor) else output))

    bias = logits(torch.zeros_like(flat[:1]))
    units = torch.arange(flat.shape[1], device=flat.device).split(PROBED_FEATURES)
    # Large, as the sum with a bias would round the digits of a weight away.
    probe = PROBE if dtype.itemsize < 4 else max(PROBE, _power_above(flat))
    columns = [logits(probe * F.one_hot(some, flat.shape[1]).double()) - bias for some in units]
    weight, bias = torch.cat(columns).T.contiguous() / probe, bias[0]
    tried = torch.cat([flat, -2 * flat])
    expected = tried.to(weight) @ weight.T + bias
    error = (logits(tried) - expected).abs().amax()
    # A bfloat16 head rounds each of its products.
    if error > max(1e-4, 8 * torch.finfo(flat.dtype).eps) * expected.abs().amax():
        raise ValueError(
            f"The head, {name!r} ({type(head).__name__}), is not affine in its features, "
            "as this score needs it to be. Pass head= the last linear layer, or another score."
        )
    return weight, bias


def _power_above(values: Tensor) -> float:
    """The power of two that is at least as large as all values."""
    largest = float(values.abs().amax())
    return 2.0 ** math.ceil(math.log2(max(largest, 1))) if math.isfinite(largest) else 1.0


@contextmanager
def _as_it_is(network: Network) -> Iterator[None]:
    """Without gradients, in the network's own precision, whatever surrounds the call."""
    with torch.no_grad(), torch.autocast(network.device.type, enabled=False):
        yield
