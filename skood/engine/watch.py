"""What the network got in fit, and a word where what it gets to score is on another scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..exceptions import AnotherScaleWarning, RoundedValuesWarning
from ..notices import warn_user
from .batches import Batcher
from .rounding import largest_exact, rounded_integer, rounding_message
from .rows import Rows

ROWS_OF_A_SCALE = 256
"""Rows of fit that tell its scale, at most."""

FAR = 30.0
"""Factor beyond the largest values of fit that is another scale."""

FAR_OF_BOUNDED = 10.0
"""The same where the largest values of all rows are alike, as those of images are."""

BOUNDED = 2.0
"""Factor between the largest values of rows up to which they count as alike."""

NEARLY_ALL = 0.9
"""Share of rows on another scale above which it is no matter of outliers among them."""

ROWS_TO_TELL = 4
"""Rows in sequence that must be on another scale: fewer may be outliers."""

EXACTLY_CAST = {"float32", "float16", "bfloat16", "bool", "uint8", "int8"}
"""Dtypes of X whose whole numbers no network gets rounded."""


@dataclass(frozen=True)
class Scale:
    """Values that the network got in fit.

    Parameters
    ----------
    dtype : str
        Dtype of X.
    least, most : float
        Between which the largest absolute values of the rows were.
    below_zero : bool or None
        Whether all rows had values below 0, or none had; None if some had.
    """

    dtype: str
    least: float
    most: float
    below_zero: bool | None

    @classmethod
    def of(cls, batches: Iterable[Tensor], dtype: str) -> Scale | None:
        """The scale of batches; None if they hold no floats, or zeros alone."""
        lowest, largest = [], []
        for batch in batches:
            if not batch.is_floating_point():
                return None
            lows, sizes = _lowest_and_largest(batch)
            lowest.append(lows[sizes > 0])
            largest.append(sizes[sizes > 0])
        sizes, below = torch.cat(largest).double(), torch.cat(lowest) < 0
        if len(sizes) == 0:
            return None
        signs = below.double().mean().item()
        return cls(
            dtype,
            torch.quantile(sizes, 0.05).item(),
            sizes.max().item(),
            {0.0: False, 1.0: True}.get(signs),
        )

    @property
    def far(self) -> float:
        """Factor that is another scale."""
        return FAR_OF_BOUNDED if self.most <= BOUNDED * self.least else FAR

    def holds(self, row: Tensor) -> bool:
        """Whether a single row (1, ...) lies on this scale."""
        low, high = (x.item() for x in row.aminmax())
        size = max(-low, high)
        in_range = self.least / self.far <= size <= self.most * self.far
        return in_range and not self._has_other_signs(low, row.ndim == 2)

    def misses(self, batch: Tensor) -> tuple[int, int]:
        """Rows of a batch that lie on another scale, and those of which can be told."""
        lows, sizes = _lowest_and_largest(batch)
        told = sizes > 0
        off = (sizes > self.most * self.far) | (sizes < self.least / self.far)
        if self.below_zero is not None:
            varied = batch.flatten(1).amax(dim=1) > lows
            off |= varied & self._has_other_signs(lows, batch.ndim == 2)
        return int((off & told).sum()), int(told.sum())

    def _has_other_signs(self, low: Any, is_table: bool) -> Any:
        """Whether rows have values below 0 where no row of fit had, or none where all had."""
        if self.below_zero:
            return low >= 0
        # Noise on a table is no rare outlier; interpolation brings images a little below 0.
        return self.below_zero is False and not is_table and low < -self.most / 4


class Watch:
    """Compares rows with those of fit when the network gets them; it warns once in each process.

    Parameters
    ----------
    scale : Scale or None
        What the network got in fit; None compares nothing.
    exact : bool
        Whether the network may need integers as they are.
    warned : bool, default=False
        Whether fit has warned of integers that the network gets rounded.
    """

    def __init__(self, scale: Scale | None, exact: bool, warned: bool = False) -> None:
        self.scale = scale
        self.exact = exact
        self.warned = warned
        self._sequence = 0
        self._said: set[type[Warning]] = {RoundedValuesWarning} if warned else set()

    def see(self, batch: Tensor, rows: Rows, batcher: Batcher) -> None:
        """Compare the first rows of a request with those of fit."""
        if self.scale is None or not batch.is_floating_point():
            return
        if self.exact and rows.dtype not in EXACTLY_CAST:
            self._tell_of_rounding(batch, rows, batcher.dtype)
        if self.scale.holds(batch[:1]):
            self._sequence = 0
            return
        off, told = self.scale.misses(batch)
        if told == 0:
            return
        if off < NEARLY_ALL * told:
            self._sequence = 0
            return
        if batch.ndim > 2 and _of_other_storage(rows.dtype, self.scale.dtype):
            raise ValueError(self._message(batch, rows))
        self._sequence += off
        if self._sequence >= ROWS_TO_TELL:
            advice = " If they are outliers, ignore this."
            self._say(self._message(batch, rows) + advice, AnotherScaleWarning)

    def _message(self, batch: Tensor, rows: Rows) -> str:
        scale = self.scale
        assert scale is not None
        low, high = (x.item() for x in batch.aminmax())
        signs = {True: ", each with values below 0", False: ", none with values below 0", None: ""}
        return (
            f"X, of dtype {rows.dtype}, gives the network values from {low:.5g} to {high:.5g}. In "
            f"fit, X had dtype {scale.dtype}, and its rows had largest absolute values from "
            f"{scale.least:.5g} to {scale.most:.5g}{signs[scale.below_zero]}. Scores on another "
            f"scale mean nothing: scale X as in fit{_for_example(rows.dtype, scale)}."
        )

    def _tell_of_rounding(self, batch: Tensor, rows: Rows, dtype: torch.dtype) -> None:
        if RoundedValuesWarning in self._said:
            return
        if max(abs(x.item()) for x in batch.aminmax()) > largest_exact(dtype):
            found = rounded_integer(rows.read(slice(0, len(batch))), dtype)
            if found is not None:
                self._say(rounding_message(found, dtype), RoundedValuesWarning)

    def _say(self, message: str, category: type[Warning]) -> None:
        if category not in self._said:
            self._said.add(category)
            warn_user(message, category)

    def __getstate__(self) -> dict[str, Any]:
        return {"scale": self.scale, "exact": self.exact, "warned": self.warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Watch.__init__(self, **state)


def _lowest_and_largest(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the lowest value, and the largest absolute one."""
    lows, highs = batch.flatten(1).aminmax(dim=1)
    return lows, torch.maximum(-lows, highs)


def _of_other_storage(dtype: str, of_fit: str) -> bool:
    """Whether one of two dtypes holds integers of files or sensors, and the other does not.

    Python's own integers have 64 bits, and say nothing.
    """
    stored = {name: getattr(torch, name) for name in (dtype, of_fit) if hasattr(torch, name)}
    small = {
        name for name, kind in stored.items() if not kind.is_floating_point and kind.itemsize < 8
    }
    return dtype != of_fit and len(small) > 0


def _for_example(dtype: str, scale: Scale) -> str:
    """How to bring integers to a scale up to 1, or the reverse."""
    white = {"uint8": 255, "uint16": 65535, "int16": 32768}
    if dtype in white and 0.5 < scale.most <= 1:
        return f", for instance X / {white[dtype]}"
    if scale.dtype in white and not dtype.startswith(("int", "uint")):
        return f", for instance X * {white[scale.dtype]}"
    return ""
