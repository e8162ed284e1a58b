"""Inner layers of a network, and what of their outputs scores see.

A score that looks at features alone is blind to what the layers before have dropped, and on that
outliers may differ most: strokes, flat areas, foreign textures. Of the outputs of two layers, a
third and two thirds of the way to the head, it gets two numbers a channel.
"""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .trials import Call, captured_calls

LAYERS = (nn.Linear, _ConvNd)
"""What counts as a layer."""

MOST_CHANNELS = 256
"""Channels of a layer that are looked at, at most; evenly spaced ones of more."""


def inner_layers(module: nn.Module, head: str | None, batch: Tensor) -> tuple[str, ...]:
    """Names of the layers that scores see, found in one forward; none if there are none.

    Layers count that are called once, before the head, and give values for each row. They are those
    of torch, or made of them, as others do not tell where their channels are.
    """
    parts = {n: p for n, p in module.named_modules() if isinstance(p, LAYERS) or n == head}
    with torch.no_grad(), captured_calls(parts) as calls:
        module(batch.clone())
    if head is None:
        return ()
    before = takewhile(lambda name: name != head, calls)
    found = [name for name in before if _is_of_rows(calls[name], len(batch))]
    if not found:
        return ()
    third, last = len(found) // 3, len(found) - 1
    return tuple(dict.fromkeys((found[third], found[min(len(found) - third, last)])))


def moments_of(layer: nn.Module, output: Tensor) -> Tensor:
    """Mean and standard deviation over the positions of each channel, shape (n, 2, c).

    Computed in float32 at least. Where a row has one position, the deviations are zero.
    """
    values = output if isinstance(layer, _ConvNd) else output.movedim(-1, 1)
    values = values[:, :: -(-values.shape[1] // MOST_CHANNELS)]
    values = values if values.dtype.itemsize >= 4 else values.float()
    if values.ndim == 2:
        return torch.stack([values, torch.zeros_like(values)], dim=1)
    positions = tuple(range(2, values.ndim))
    means = values.mean(positions, keepdim=True)
    deviations = (values - means).square().mean(positions).sqrt()
    return torch.stack([means.flatten(1), deviations], dim=1)


def _is_of_rows(call: Call, n_rows: int) -> bool:
    """Whether a layer was called once, and gave floats for each row."""
    output = call.output
    return (
        call.number == 1
        and isinstance(output, Tensor)
        and output.is_floating_point()
        and output.ndim >= 2
        and len(output) == n_rows
    )
