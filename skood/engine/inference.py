"""The forward pass over any number of rows, on one padded shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batches import Rows, slices
from .loading import Index, row_count
from .network import Network
from .outputs import as_float64, run

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
    for piece, batch in _batches(network, X, rows):
        size = piece.stop - piece.start
        with torch.inference_mode(), autocast(network.device, network.precision.scoring):
            hidden, logits = (
                network.features_and_logits(batch) if features else (None, network.logits(batch))
            )
        logits = as_float64(logits[:size])
        _check_finite(logits, piece, rows)
        # A copy, as the network may use the memory of its features again.
        yield piece, None if hidden is None else hidden[:size].clone(), logits


def score_rows(
    network: Network,
    X: Rows,
    score: Callable[[Tensor | None, Tensor], Tensor],
    *,
    rows: NDArray[np.intp] | None = None,
    features: bool = True,
    perturbation: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Scores and logits of rows of X, slice by slice.

    A score works on whole padded batches, as the network does, so that within one shape its result
    for a row is bitwise the same in any company.

    Parameters
    ----------
    network : Network
        The network, in evaluation mode.
    X : array or tensor of shape (n, ...)
        Any number of rows.
    score : callable
        Features (p, d) or None and logits (p, K), both float64, to values (p,).
    rows : ndarray of shape (m,), optional
        Which rows of X; all without it.
    features : bool, default=True
        Whether the score wants features.
    perturbation : callable, optional
        Logits and the batch that they depend on to what is added to the batch, before the forward
        that is scored.

    Yields
    ------
    piece : slice
        Positions among the rows asked for.
    scores : Tensor of shape (p,)
        Their scores.
    logits : Tensor of shape (p, K), float64
        Their logits, of the rows as they are.

    Raises
    ------
    NonFiniteLogitsError
        If a logit is NaN or infinite.
    ValueError
        If a perturbation is asked for of an input that has no gradient.
    """
    for piece, batch in _batches(network, X, rows):
        size = piece.stop - piece.start
        unmoved = None
        if perturbation is not None:
            unmoved, batch = _perturbed(network, batch, perturbation)
            _check_finite(unmoved[:size], piece, rows)
        # A small step would be lost in less than the network's own precision.
        precision = network.precision.scoring if unmoved is None else None
        with torch.inference_mode(), autocast(network.device, precision):
            hidden, logits = (
                network.features_and_logits(batch) if features else (None, network.logits(batch))
            )
        logits = as_float64(logits)
        _check_finite(logits[:size], piece, rows)
        with torch.inference_mode(), autocast(network.device, None):
            scores = score(None if hidden is None else as_float64(hidden), logits)
        yield piece, scores[:size], (logits if unmoved is None else unmoved)[:size]


def _batches(
    network: Network, X: Rows, rows: NDArray[np.intp] | None
) -> Iterator[tuple[slice, Tensor]]:
    """Positions of the rows asked for and the padded batch that holds them."""
    n_rows = row_count(X) if rows is None else len(rows)
    shape = 1 if n_rows <= network.few_rows else FORWARD_ROWS
    indices = (_padded(piece, shape, rows) for piece in slices(n_rows, shape))
    batches = network.batcher.stream(X, indices, n_rows)
    for piece in slices(n_rows, shape):
        with torch.inference_mode(), autocast(network.device, None):
            batch = next(batches)
        yield piece, batch


def _perturbed(
    network: Network, batch: Tensor, perturbation: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of a batch, and the batch moved as a score wants it."""
    if not batch.is_floating_point():
        raise ValueError(
            "The score moves the network's input along a gradient, which an input of dtype "
            f"{batch.dtype} does not have. Pass another score_function."
        )
    with torch.inference_mode(False), torch.enable_grad(), autocast(network.device, None):
        batch = batch.clone().requires_grad_()
        # A copy, as the network may write into its input; uncompiled, as gradients would make the
        # compiler start again.
        logits = as_float64(run(network.module, batch.clone()))
        step = perturbation(logits, batch)
    if step.shape != batch.shape:
        raise ValueError(
            f"The perturbation of the score has shape {tuple(step.shape)} for a batch of "
            f"{tuple(batch.shape)}; it must return what is added to the batch."
        )
    return logits.detach(), batch.detach() + step


def _check_finite(logits: Tensor, piece: slice, rows: NDArray[np.intp] | None) -> None:
    if torch.isfinite(logits).all():
        return
    bad = piece.start + int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
    raise NonFiniteLogitsError(
        f"The network gives NaN or infinite logits for row {bad if rows is None else rows[bad]} of "
        "X, though the row itself is finite. Check the scale of X and preprocess=; a network in "
        "float16 may overflow."
    )


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
