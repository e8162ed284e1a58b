"""Numbers of rows that forwards take: which of them give the same bits, and how requests use them.

A row's result is bitwise the same in any company and at any place within one shape of the batch. It
may round otherwise in another shape, where matrix libraries take other kernels. So rows are padded
to the shapes of a ladder, of which those are kept that round as the largest does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

STEP = 4
"""Each shape of the ladder has this many times the rows of the next smaller one."""

SMALLEST = 4
"""Rows of the smallest shape: products with fewer rows have kernels of their own."""

Outputs = Callable[[int], Sequence[Tensor]]


def same_bits(outputs: Outputs, most: int) -> tuple[int, ...]:
    """Shapes in which forwards give bitwise what one of the largest gives.

    Parameters
    ----------
    outputs : callable
        Gives what forwards of so many rows return for some rows, always the same.
    most : int
        Rows of the largest shape.

    Returns
    -------
    tuple of int
        The shapes, ascending.
    """
    expected, shapes, shape = outputs(most), [most], most
    while (shape := shape // STEP) >= SMALLEST:
        if all(map(torch.equal, outputs(shape), expected)):
            shapes.insert(0, shape)
    return tuple(shapes)


def split(n_rows: int, shapes: Sequence[int], start: int = 0) -> Iterator[tuple[slice, int]]:
    """Slices of rows, and the shape that each is padded to: little more than what it holds.

    Parameters
    ----------
    n_rows : int
        Number of rows.
    shapes : sequence of int
        The shapes, ascending.
    start : int, default=0
        The first row.

    Yields
    ------
    piece : slice
        Consecutive rows.
    shape : int
        The shape, of at least as many rows.
    """
    while start < n_rows:
        shape = _shape_for(n_rows - start, shapes)
        stop = min(start + shape, n_rows)
        yield slice(start, stop), shape
        start = stop


def _shape_for(n_rows: int, shapes: Sequence[int]) -> int:
    """The smallest shape that holds all rows; where half of it were padding, the next smaller."""
    smaller = [shape for shape in shapes if shape < n_rows]
    larger = [shape for shape in shapes if shape >= n_rows]
    if smaller and (not larger or larger[0] > 2 * n_rows):
        return smaller[-1]
    return larger[0]
