"""What the cast to the network's dtype loses: integers, and columns far from 0."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..notices import quoted
from .batches import Batcher, by_channel
from .rows import PIECE, InMemory, Rows, slices

ROWS_OF_A_CAST = 64
"""Rows that tell which columns a cast blurs, at most."""

BLURRED = 0.01
"""Share of a column's standard deviation by which rounding may move its values."""

FLOAT64_NOISE = 1e-12
"""Relative standard deviation that float64 arithmetic leaves in a constant column."""


def rounded_integer(values: Tensor, dtype: torch.dtype) -> tuple[int, int] | None:
    """A whole number in values (n, ...), and what a cast makes of it; None if it keeps them all.

    Of floats, columns that hold whole numbers alone count.
    """
    if values.is_floating_point():
        columns = values.double().flatten(1)
        wide = columns[:, (columns == columns.round()).all(dim=0)]
    else:
        wide = values.double() if values.dtype == torch.uint64 else values.long()
    if wide.numel() == 0 or max(abs(x.item()) for x in wide.aminmax()) <= largest_exact(dtype):
        return None
    there = wide.to(dtype).to(wide.dtype)
    changed = wide != there
    return (int(wide[changed][0]), int(there[changed][0])) if changed.any() else None


def largest_exact(dtype: torch.dtype) -> float:
    """The number up to which a floating dtype holds all whole numbers."""
    return 2 / torch.finfo(dtype).eps


def rounded_number(rows: Rows, batcher: Batcher) -> tuple[int, int] | None:
    """A whole number of the rows that the network gets rounded, and what it gets.

    All integers in memory are looked at, and a few of the rows that are floats or must be loaded.
    """
    all_of_them = isinstance(rows, InMemory) and "int" in rows.dtype
    few = rows if all_of_them else rows.spaced(ROWS_OF_A_CAST)
    found = (rounded_integer(few.read(piece), batcher.dtype) for piece in slices(len(few), PIECE))
    return next((pair for pair in found if pair is not None), None)


def rounding_message(found: tuple[int, int], dtype: torch.dtype) -> str:
    """What a cast makes of a whole number, and what to do."""
    before, after = found
    return (
        f"The network gets {before} of X as {after}, because whole numbers are cast to "
        f"{str(dtype).removeprefix('torch.')}. If it looks them up, as token ids or hashes, pass "
        "preprocess=torch.Tensor.long; if they are quantities, let a Pipeline standardise them, "
        "for instance by StandardScaler."
    )


def blur_message(center: Tensor, rows: Rows, dtype: torch.dtype) -> str:
    """Which columns a cast blurs, and what to do."""
    numbers = center.nonzero().flatten().tolist()
    names = numbers if rows.columns is None else [rows.columns[number] for number in numbers]
    what = "columns" if len(rows.shape) == 1 else "channels"
    return (
        f"The cast of X to {str(dtype).removeprefix('torch.')} blurs {what} that lie far from 0, "
        f"{quoted(names)}: it moves values by more than {BLURRED:.0%} of their standard deviation. "
        "Subtract their mean before, for instance by StandardScaler in a Pipeline, when you train "
        "the network too."
    )


def far_from_zero(batcher: Batcher, rows: Rows) -> Tensor | None:
    """Float64 means (c,) of columns or channels whose detail the cast to a dtype blurs, others 0.

    None if there is none.
    """
    batch = dataclasses.replace(batcher, dtype=torch.float64)(rows.spaced(ROWS_OF_A_CAST))
    if not batch.is_floating_point():
        return None
    there = batch.to(batcher.dtype).double()
    if torch.equal(there, batch):
        return None
    values = by_channel(batch)
    moved = (by_channel(there) - values).abs().amax(dim=(0, 2))
    mean = values.mean(dim=(0, 2))
    std = (values - mean[:, None]).square().mean(dim=(0, 2)).sqrt()
    blurred = (moved > BLURRED * std) & (std > FLOAT64_NOISE * mean.abs())
    return torch.where(blurred, mean, 0.0) if blurred.any() else None
