"""Whether the values of a row depend on that row alone: asked of networks, scores and penalties.

A function is called on some rows in several arrangements: reversed, permuted, behind and before
other rows, one by one, and again. A row must get the same values in all of them, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..exceptions import RandomScoresWarning
from ..notices import warn_user
from .generators import watched_draws
from .outputs import all_finite
from .rows import spaced

MOST_ROWS = 64
"""Rows on which functions are tried, at most."""

ALONE = 4
"""Rows that are also tried one by one."""

REPEATS = 32
"""Calls on the same rows, if the function draws random numbers."""

Values = Callable[[NDArray[np.intp]], Tensor]
"""Values (m, ...) of the rows at m positions, computed in one batch."""


class Dependence(Enum):
    """What the values of a row depend on, beside the row."""

    NOTHING = 0
    DRAWS = 1
    """Random numbers are drawn, without any effect that was seen."""
    COMPANY = 2
    CALL = 3


class Finding(NamedTuple):
    """What was found, whether rounding may explain it, and the arrangement that shows it."""

    dependence: Dependence
    certain: bool
    arrangement: NDArray[np.intp]


class Rounding:
    """How far values (n, ...) of the same rows may lie apart by rounding alone.

    What counts is how far rows lie apart from each other, because that is what tells them apart.
    """

    def __init__(self, values: Tensor) -> None:
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        values = _precise(values)
        spread = float((values - values.mean(dim=0)).abs().amax())
        scale = float(values.abs().amax())
        self._of_float32 = 1e-4 * spread + 2e-6 * scale
        self._of_any = 1e-2 * spread + max(2 * eps, 1e-5) * scale

    def may_explain(self, values: Tensor, others: Tensor) -> bool:
        """Whether values differ by no more than coarse rounding, as of bfloat16, TF32, 8 bits."""
        return _distance(values, others) <= self._of_any

    def explains(self, values: Tensor, others: Tensor) -> bool:
        """Whether they differ by no more than the rounding of float32."""
        return _distance(values, others) <= self._of_float32


def dependence(
    values: Values, n_rows: int, device: torch.device | None = None, *, draws: bool = False
) -> Finding:
    """What the values of `n_rows` rows depend on, beside their rows.

    `draws` says if random numbers are known to be drawn, from generators that are not global.
    """
    whole = np.arange(n_rows)
    nothing = Finding(Dependence.NOTHING, True, whole)
    with watched_draws(device) as drew:
        expected = values(whole)
        if not all_finite(expected):  # which has its own message, elsewhere
            return nothing
        rounding = Rounding(expected)
        for arrangement in (*_arrangements(n_rows), whole):
            try:
                got = values(arrangement)
            except Exception:
                if len(arrangement) > 1:
                    raise
                continue  # it takes no single row
            if rounding.explains(expected[arrangement], got):
                continue
            far = not rounding.may_explain(expected[arrangement], got)
            # A single row may round otherwise: where scores run alone, that is tried apart.
            if far or len(arrangement) > 1:
                kind = _kind(values, arrangement, got, expected)
                return Finding(kind, far or draws or drew(), arrangement)
        if not (draws or drew()):
            return nothing
        for _ in range(REPEATS):
            if not rounding.explains(expected, values(whole)):
                return Finding(Dependence.CALL, True, whole)
    return Finding(Dependence.DRAWS, True, whole)


def check_row_by_row(what: str, values: Values, n_rows: int, device: torch.device) -> None:
    """Refuse a user's function that mixes rows or draws at random; `what` names it."""
    found = dependence(values, n_rows, device).dependence
    if found is Dependence.COMPANY:
        raise ValueError(
            f"{what} gives a row another value if other rows are in its batch; expected one that "
            "depends on the row alone. Compute along dim=1, and take means, maxima and ranks over "
            "rows from training rows: in a method fit, of an object."
        )
    if found is Dependence.CALL:
        raise ValueError(
            f"{what} gives the same rows other values when called again; expected a function of "
            "its arguments alone. Draw no random numbers in it, and keep nothing between calls."
        )
    if found is Dependence.DRAWS:
        warn_user(
            f"{what} draws random numbers. They did not change its values for the rows tried, but "
            "may do so for others. Draw no random numbers in it.",
            RandomScoresWarning,
        )


def _arrangements(n_rows: int) -> Iterator[NDArray[np.intp]]:
    whole = np.arange(n_rows)
    half, others = whole[: max(n_rows // 2, 1)], np.zeros(n_rows, dtype=np.intp)
    yield np.concatenate([half, others])
    yield np.concatenate([others + n_rows - 1, half])
    yield whole[::-1].copy()
    yield np.random.RandomState(0).permutation(n_rows)
    for row in spaced(n_rows, ALONE):
        yield np.array([row])


def _kind(
    values: Values, arrangement: NDArray[np.intp], got: Tensor, expected: Tensor
) -> Dependence:
    """Whether values that differ would differ again in the same company."""
    rounding = Rounding(expected)
    pairs = ((got, arrangement), (expected, np.arange(len(expected))))
    changes = any(
        not rounding.explains(once, values(rows)) for once, rows in pairs for _ in range(3)
    )
    return Dependence.CALL if changes else Dependence.COMPANY


def _distance(values: Tensor, others: Tensor) -> float:
    if values.shape != others.shape:
        return math.inf
    return float((_precise(values) - _precise(others)).abs().amax().nan_to_num(math.inf))


def _precise(values: Tensor) -> Tensor:
    return values.detach().float() if values.device.type == "mps" else values.detach().double()
