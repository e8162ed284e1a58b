"""Numbers of rows that forwards take: which of them give the same bits, and how requests use them.

A row's result is bitwise the same in any company and at any place within one shape of the batch. It
may round otherwise in another shape, where matrix libraries take other kernels. So rows are padded
to the shapes of a ladder, of which those are kept that round as the largest does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 4
"""Each shape of the ladder has this many times the rows of the next smaller one."""

SMALLEST = 4
"""Rows of the smallest shape: products with fewer rows have kernels of their own."""

Results = Callable[[int], Sequence[Tensor]]


@dataclass(frozen=True)
class Shapes:
    """Numbers of rows that the forwards of a network take.

    Parameters
    ----------
    ladder : tuple of int
        Ascending. Within each, and across all of them, the result for a row is bitwise the same in
        any company.
    small : int, default=0
        Requests of at most so many rows run in a forward of this size, and agree with the others to
        1e-5; 0 for none.
    """

    ladder: tuple[int, ...]
    small: int = 0

    @property
    def all(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return ((self.small,) if self.small else ()) + self.ladder

    def split(self, n_rows: int, start: int = 0) -> Iterator[tuple[slice, int]]:
        """Slices of the rows of a request from `start` on, and the shape that each is padded to."""
        while start < n_rows:
            shape = self.small if n_rows <= self.small else self._for(n_rows - start)
            stop = min(start + shape, n_rows)
            yield slice(start, stop), shape
            start = stop

    def below(self, shape: int) -> Shapes:
        """Shapes of fewer rows, for when there is no memory for one of so many."""
        ladder = tuple(s for s in self.ladder if s < shape) or (max(shape // 2, 1),)
        return Shapes(ladder, self.small if self.small < shape else 0)

    def _for(self, n_rows: int) -> int:
        """The smallest shape that holds all rows; where half of it were padding, the next lower."""
        smaller = [shape for shape in self.ladder if shape < n_rows]
        larger = [shape for shape in self.ladder if shape >= n_rows]
        if smaller and (not larger or larger[0] > 2 * n_rows):
            return smaller[-1]
        return larger[0]


def same_bits(results: Results, most: int) -> tuple[int, ...]:
    """Shapes, ascending, in which forwards give bitwise what one of the largest gives.

    `results` gives what forwards of so many rows return for some rows, always the same.
    """
    expected, shapes, shape = results(most), [most], most
    while (shape := shape // STEP) >= SMALLEST:
        if all(map(torch.equal, results(shape), expected)):
            shapes.insert(0, shape)
    return tuple(shapes)
