"""From rows of X, wherever they lie, to batches that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .hardware import free_memory, sent
from .loading import Index, is_loadable, load, load_batch, transformed
from .outputs import all_finite

Rows = NDArray[Any] | Tensor | Dataset[Any]
Transform = Callable[[Any], Tensor]

STREAM_ROWS = 256
"""Rows of a batch where nothing else decides."""

SHARE_OF_FREE_MEMORY = 0.25
"""Share of a GPU's free memory that rows may take which stay there; training needs the rest."""


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
            return self._ready(*load_batch(X, self.preprocess, index), index)
        return self._ready(self._copied(X, index), False, index)

    def stream(
        self, X: Rows, indices: Iterable[Index], n_rows: int, *, checked: bool = True
    ) -> Iterator[Tensor]:
        """Batches of consecutive indices, of about `n_rows` rows in all.

        Rows that must be loaded are loaded ahead, by worker processes; what goes to a GPU is copied
        there ahead. Not `checked`, batches may hold NaN or infinity.
        """
        fetched = self._fetched(X, indices, n_rows)
        if self.device.type == "cuda":
            fetched = self._ahead(fetched)
        for index, batch, preprocessed in fetched:
            yield self._ready(batch, preprocessed, index, checked)

    def resident(self, X: Rows) -> Rows:
        """X on the device, to be read many times, where it has room to spare; else X itself."""
        if isinstance(X, Dataset) or is_loadable(X) or self._is_there(X):
            return X
        row = _to_tensor(X[:1]).to(self._dtype_of_rows)
        if row.nbytes * len(X) > SHARE_OF_FREE_MEMORY * free_memory(self.device):
            return X
        there = torch.empty((len(X), *row.shape[1:]), dtype=row.dtype, device=self.device)
        for piece in slices(len(X), STREAM_ROWS):
            there[piece] = _to_tensor(X[piece])
        return there

    def _is_there(self, X: Rows) -> bool:
        return isinstance(X, Tensor) and X.device.type == self.device.type

    def _fetched(
        self, X: Rows, indices: Iterable[Index], n_rows: int
    ) -> Iterator[tuple[Index, Tensor, bool]]:
        """Index, rows, and whether they are preprocessed."""
        if is_loadable(X):
            fetch = partial(load_batch, X, self.preprocess)
            for index, (batch, preprocessed) in load(fetch, indices, n_rows, self.workers):
                yield index, batch, preprocessed
        elif self.device.type == "cuda" and not self._is_there(X):
            for index in indices:
                yield index, _to_tensor(X[index]), False
        else:
            for index in indices:
                yield index, self._copied(X, index), False

    def _ahead(
        self, fetched: Iterator[tuple[Index, Tensor, bool]]
    ) -> Iterator[tuple[Index, Tensor, bool]]:
        """The same on the device; a batch travels to a GPU while that before it is in use."""
        transfers, waiting = _transfers(self.device), None
        for index, batch, preprocessed in fetched:
            with torch.cuda.stream(transfers):
                if batch.device.type == "cpu":
                    batch = batch.pin_memory().to(self.device, non_blocking=True)
                arrived = transfers.record_event()
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = arrived, index, batch, preprocessed
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(
        self, arrived: torch.cuda.Event, index: Index, batch: Tensor, preprocessed: bool
    ) -> tuple[Index, Tensor, bool]:
        here = torch.cuda.current_stream(self.device)
        here.wait_event(arrived)
        batch.record_stream(here)
        return index, batch, preprocessed

    def _copied(self, X: Any, index: Index) -> Tensor:
        if isinstance(X, Tensor) and not isinstance(index, slice):
            picks = sent(torch.from_numpy(index), X.device)
            return X.detach()[picks].to(self.device, self._dtype_of_rows)
        # A copy of its own: what the network or preprocess does to it must not reach X, and memory
        # that torch allocates is aligned alike, on which the last bits of a product depend.
        return _to_tensor(X[index]).to(self.device, self._dtype_of_rows, copy=True)

    @property
    def _dtype_of_rows(self) -> torch.dtype | None:
        """Dtype of rows before preprocess; None leaves that of X."""
        return self.dtype if self.preprocess is None else None

    def _ready(
        self, batch: Tensor, preprocessed: bool, index: Index, checked: bool = True
    ) -> Tensor:
        """In the dtype and layout that the network takes, on its device."""
        batch = batch.to(self.device)
        if not preprocessed and self.preprocess is not None:
            batch = transformed(batch, self.preprocess, "preprocess")
        if batch.is_floating_point() or self.preprocess is None:
            batch = batch.to(self.dtype)
        if checked and batch.is_floating_point() and not all_finite(batch):
            _refuse_nonfinite(batch, index)
        layout = torch.channels_last if batch.ndim == 4 else torch.contiguous_format
        return batch.contiguous(memory_format=layout)


@cache
def _transfers(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches travel to a GPU; memory freed on one is of use to it alone."""
    return torch.cuda.Stream(device)


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
        if chunk.is_floating_point() and not all_finite(chunk):
            _refuse_nonfinite(chunk, rows)


def _to_tensor(rows: NDArray[Any] | Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.detach()
    if rows.flags.carray and rows.dtype.isnative and rows.dtype.char in "fdB":  # mostly so
        return torch.from_numpy(rows)
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
