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

NUMBERS_OF_ROWS = (4, 8)
"""Rows of forwards that tell if a layer gives values for each row: sizes may agree by chance."""

MOST_CHANNELS = 256
"""Channels of a layer that are looked at, at most; evenly spaced ones of more."""


def inner_layers(module: nn.Module, head: str | None, batch: Tensor) -> tuple[str, ...]:
    """Names of the layers that scores see, found in two forwards; none if there are none.

    Layers count that are called once, before the head, and give values for each row. They are those
    of torch, or made of them, as others do not tell where their channels are.
    """
    if head is None:
        return ()
    parts = {n: p for n, p in module.named_modules() if isinstance(p, LAYERS) or n == head}
    found: dict[str, None] | None = None
    for n_rows in NUMBERS_OF_ROWS:
        rows = batch[torch.arange(n_rows, device=batch.device) % len(batch)]
        with torch.no_grad(), captured_calls(parts) as calls:
            module(rows)
        before = takewhile(lambda name: name != head, calls)
        usable = {name: None for name in before if _is_of_rows(calls[name], n_rows)}
        found = {n: None for n in usable if found is None or n in found}
    names = list(found or ())
    if not names:
        return ()
    third = len(names) // 3
    # The last one gives the features, at which scores look anyway.
    later = max(third, min(len(names) - third, len(names) - 2))
    return tuple(dict.fromkeys((names[third], names[later])))


def moments_of(layer: nn.Module, output: Tensor) -> Tensor:
    """Mean and standard deviation over the positions of each channel, shape (n, 2, c).

    Computed in float32 at least. Where a row has one position, the deviations are zero. Where their
    squares would overflow, they are what has the largest one.
    """
    values = output if isinstance(layer, _ConvNd) else output.movedim(-1, 1)
    values = values[:, :: -(-values.shape[1] // MOST_CHANNELS)]
    values = values if values.dtype.itemsize >= 4 else values.float()
    if values.ndim == 2:
        return torch.stack([values, torch.zeros_like(values)], dim=1)
    positions = tuple(range(2, values.ndim))
    means = values.mean(positions, keepdim=True)
    numbers = torch.finfo(values.dtype)
    # Above zero, where the gradient of a root is infinite.
    variances = (values - means).square().mean(positions).clamp(numbers.tiny, numbers.max)
    return torch.stack([means.flatten(1), variances.sqrt()], dim=1)


def _is_of_rows(call: Call, n_rows: int) -> bool:
    """Whether a layer was called once, and gave floats for each row."""
    output = call.output
    return (
        call.number == 1
        and isinstance(output, Tensor)
        and not output.is_nested
        and output.is_floating_point()
        and output.ndim >= 2
        and len(output) == n_rows
    )
