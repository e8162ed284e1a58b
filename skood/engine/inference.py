"""The forward pass over any number of rows, on one padded shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batches import Rows, slices
from .loading import Index, row_count
from .network import Network

FORWARD_ROWS = 256
"""Rows of every forward: within one shape, a row's result is bitwise the same in any company."""


class NonFiniteLogitsError(ValueError):
    """The network gave NaN or infinite logits for finite rows."""


def forward_rows(
    network: Network,
    X: Rows,
    *,
    rows: NDArray[np.intp] | None = None,
    features: bool = False,
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Features and logits of rows of X, slice by slice.

    Parameters
    ----------
    network : Network
        The network, in evaluation mode.
    X : array or tensor of shape (n, ...)
        Any number of rows.
    rows : ndarray of shape (m,), optional
        Which rows of X; all without it.
    features : bool, default=False
        Whether to capture the features.

    Yields
    ------
    piece : slice
        Positions among the rows asked for.
    features : Tensor of shape (p, d) or None
        Their features.
    logits : Tensor of shape (p, K), float64
        Their logits.

    Raises
    ------
    NonFiniteLogitsError
        If a logit is NaN or infinite.
    """
    n_rows = row_count(X) if rows is None else len(rows)
    shape = 1 if n_rows <= network.few_rows else FORWARD_ROWS
    indices = (_padded(piece, shape, rows) for piece in slices(n_rows, shape))
    batches = network.batcher.stream(X, indices, n_rows)
    for piece in slices(n_rows, shape):
        size = piece.stop - piece.start
        with torch.inference_mode(), autocast(network.device, None):
            batch = next(batches)
        with torch.inference_mode(), autocast(network.device, network.precision.scoring):
            hidden, logits = (
                network.features_and_logits(batch) if features else (None, network.logits(batch))
            )
        logits = as_float64(logits[:size])
        if not torch.isfinite(logits).all():
            bad = piece.start + int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
            raise NonFiniteLogitsError(
                "The network gives NaN or infinite logits for row "
                f"{bad if rows is None else rows[bad]} of X, though the row itself is finite. "
                "Check the scale of X and preprocess=; a network in float16 may overflow."
            )
        # A copy, as the network may use the memory of its features again.
        yield piece, None if hidden is None else hidden[:size].clone(), logits


def _padded(piece: slice, shape: int, rows: NDArray[np.intp] | None) -> Index:
    """Index of `shape` rows, filled up with the last one: a value that the network can take."""
    full = piece.stop - piece.start == shape
    if full and rows is None:
        return piece
    positions = np.minimum(np.arange(piece.start, piece.start + shape), piece.stop - 1)
    return positions if rows is None else rows[positions]


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Autocast context for a precision; None switches off any that surrounds the call."""
    return torch.autocast(
        device.type, dtype=precision, enabled=precision is not None, cache_enabled=False
    )


def as_float64(values: Tensor) -> Tensor:
    """Values in float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
