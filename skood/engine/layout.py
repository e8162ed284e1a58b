"""The order in memory in which a network takes images."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batcher
from .outputs import run
from .precision import failure_in_training
from .rows import Rows
from .rowwise import Rounding


def fastest_layout(
    module: nn.Module, batcher: Batcher, rows: Rows, precision: torch.dtype | None
) -> Batcher:
    """Turn a network of images to channels_last, if it works there as in contiguous memory.

    Convolutions are fastest there. But a view after them may fail, and a network that reads its
    memory in order may give other logits. It is tried in evaluation mode, and in a training step in
    a precision. What is returned gives batches in the layout of the network.
    """
    batch = batcher(rows)
    if batch.ndim != 4:
        return batcher
    plain = dataclasses.replace(batcher, channels_last=False)
    expected = _logits(module, plain, rows)
    _turn(module, torch.channels_last)
    alike = _same(expected, _logits(module, batcher, rows))
    if alike and failure_in_training(module, batch, precision) is None:
        return batcher
    _turn(module, torch.contiguous_format)
    if alike and failure_in_training(module, plain(rows), precision) is not None:
        _turn(module, torch.channels_last)  # it is not for its layout that a step fails
        return batcher
    return plain


def _turn(module: nn.Module, layout: torch.memory_format) -> None:
    """Lay out the weights of convolutions; those of three dimensions have layouts of their own."""
    if all(p.ndim < 5 for p in module.parameters()):
        module.to(memory_format=layout)  # type: ignore[call-overload]


def _logits(module: nn.Module, batcher: Batcher, rows: Rows) -> list[Tensor | None]:
    """Logits of all rows in one batch, and of the first alone; None if it takes none."""
    found: list[Tensor | None] = []
    for size in (len(rows), 1):
        try:
            found.append(run(module, batcher(rows, np.arange(size))))
        except Exception:
            found.append(None)
    return found


def _same(expected: list[Tensor | None], got: list[Tensor | None]) -> bool:
    whole, _ = expected
    if whole is None:
        return True
    pairs = ((x, y) for x, y in zip(expected, got, strict=True) if x is not None)
    return all(y is not None and Rounding(whole).may_explain(x, y) for x, y in pairs)
