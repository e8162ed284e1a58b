"""From rows of X, wherever they lie, to batches that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .loading import Index, is_loadable, load, load_batch, transformed

Rows = NDArray[Any] | Tensor | Dataset[Any]
Transform = Callable[[Any], Tensor]

STREAM_ROWS = 256
"""Rows of a batch where nothing else decides."""


@dataclass(frozen=True)
class Batcher:
    """Turns rows of X into batches on a device.

    Parameters
    ----------
    device : torch.device
        Where the batches go.
    dtype : torch.dtype
        Floating dtype of the batches.
    preprocess : callable or None
        Applied to each batch, in the dtype of X, before it is cast. Where X holds references it
        loads them.
    workers : int, optional
        Processes that load rows which are not in memory; None takes one a core.
    """

    device: torch.device
    dtype: torch.dtype
    preprocess: Transform | None
    workers: int | None = None

    def __call__(self, X: Rows, index: Index) -> Tensor:
        """Copy the rows `index` of X into a batch as the network takes them."""
        if is_loadable(X):
            return self._loaded(*load_batch(X, self.preprocess, index), index)
        # A copy of its own: what the network or preprocess does to it must not reach X, and memory
        # that torch allocates is aligned alike, on which the last bits of a product depend.
        dtype = self.dtype if self.preprocess is None else None
        return self._ready(_to_tensor(X[index]).to(self.device, dtype, copy=True), index)

    def stream(self, X: Rows, indices: Iterable[Index], n_rows: int) -> Iterator[Tensor]:
        """Batches of consecutive indices, of about `n_rows` rows in all.

        Rows that must be loaded are loaded ahead, by worker processes.
        """
        if is_loadable(X):
            fetch = partial(load_batch, X, self.preprocess)
            for index, loaded in load(fetch, indices, n_rows, self.workers):
                yield self._loaded(*loaded, index)
        else:
            for index in indices:
                yield self(X, index)

    def _loaded(self, batch: Tensor, preprocessed: bool, index: Index) -> Tensor:
        batch = batch.to(self.device)
        return self._finished(batch, index) if preprocessed else self._ready(batch, index)

    def _ready(self, batch: Tensor, index: Index) -> Tensor:
        if self.preprocess is not None:
            batch = transformed(batch, self.preprocess, "preprocess")
        return self._finished(batch, index)

    def _finished(self, batch: Tensor, index: Index) -> Tensor:
        """In the dtype and layout that the network takes."""
        if batch.is_floating_point() or self.preprocess is None:
            batch = batch.to(self.dtype)
        if batch.is_floating_point() and not torch.isfinite(batch).all():
            _refuse_nonfinite(batch, index)
        layout = torch.channels_last if batch.ndim == 4 else torch.contiguous_format
        return batch.contiguous(memory_format=layout)


def moments(batcher: Batcher, X: Rows, rows: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of rows, per column of a table or per channel of images.

    Parameters
    ----------
    batcher : Batcher
        Turns rows of X into batches.
    X : array or tensor of shape (n, ...)
        Rows.
    rows : ndarray of int
        Which rows of X.

    Returns
    -------
    mean, std : Tensor, float64
        Of shape (d,) for a table, (c,) for images with channels, (1,) for images without.
    """

    def mean_of(function: Transform) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        indices = (rows[piece] for piece in slices(len(rows), STREAM_ROWS))
        for batch in batcher.stream(X, indices, len(rows)):
            values = function(_by_channel(batch.cpu().double()))
            total = total + values.sum(dim=(0, 2))
            count += values.shape[0] * values.shape[2]
        return total / count

    mean = mean_of(lambda values: values)
    return mean, mean_of(lambda values: (values - mean[:, None]) ** 2).sqrt()


def _by_channel(batch: Tensor) -> Tensor:
    """A batch as (rows, columns or channels, pixels)."""
    if batch.ndim == 2:
        return batch[:, :, None]
    return batch.flatten(2) if batch.ndim > 3 else batch.flatten(1)[:, None]


def spaced(rows: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """At most `size` of some rows, evenly spaced: neighbours may be alike, or of one class."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), size)).astype(int)]


def slices(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def check_finite(X: NDArray[Any] | Tensor) -> None:
    """Refuse NaN and infinity in X, reading it slice by slice.

    Raises
    ------
    ValueError
        If X holds NaN or infinity; the message names the first such row.
    """
    for rows in slices(len(X), 4096):
        chunk = _to_tensor(X[rows])
        if chunk.is_floating_point() and not torch.isfinite(chunk).all():
            _refuse_nonfinite(chunk, rows)


def _to_tensor(rows: NDArray[Any] | Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.detach()
    dtype = rows.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    # torch takes native byte order, positive strides and writable memory only.
    return torch.from_numpy(np.require(rows, dtype=dtype, requirements=["C", "W"]))


def _refuse_nonfinite(batch: Tensor, index: Index) -> None:
    bad = (~torch.isfinite(batch)).flatten(1).any(dim=1).nonzero().flatten().cpu().numpy()
    rows = np.arange(index.start, index.stop) if isinstance(index, slice) else index
    raise ValueError(
        "Input X contains NaN, infinity or a value too large for "
        f"{str(batch.dtype).removeprefix('torch.')}: first in row {rows[bad[0]]}. Remove such "
        "rows, or fill them in, for instance with sklearn.impute.SimpleImputer."
    )


def check_tensor(X: Tensor) -> Tensor:
    """Detach a tensor, or refuse it where it cannot be rows.

    Raises
    ------
    ValueError
        If X has fewer than 2 dimensions, no rows, no columns, or complex values.
    """
    if X.ndim < 2 or X.numel() == 0 or X.is_complex() or X.layout != torch.strided:
        raise ValueError(
            f"X is a tensor of shape {tuple(X.shape)}, dtype {X.dtype} and layout {X.layout}; "
            "expected a dense real tensor with rows in the first of at least 2 dimensions and at "
            "least one value in each. Reshape your data: X.reshape(-1, 1) for one column, "
            "X.reshape(1, -1) for one row, X.to_dense() for a sparse tensor."
        )
    return X.detach()


def as_array(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Values as a numpy array, in float32 where numpy lacks their dtype."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether arrays of this shape are images (n, h, w, c), told by 1, 3 or 4 channels."""
    return len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4)


def channels_first(images: Tensor) -> Tensor:
    """Images (n, h, w, c) as float (n, c, h, w)."""
    return images.movedim(-1, 1).to(torch.promote_types(images.dtype, torch.float32))
