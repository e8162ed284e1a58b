"""From rows of X, wherever they lie, to batches that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows = NDArray[Any] | Tensor
Index = slice | NDArray[np.intp]
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batcher:
    """Turns slices of X into batches on a device.

    Parameters
    ----------
    device : torch.device
        Where the batches go.
    dtype : torch.dtype
        Floating dtype of the batches.
    preprocess : callable or None
        Applied to each batch, in the dtype of X, before it is cast.
    """

    device: torch.device
    dtype: torch.dtype
    preprocess: Transform | None

    def __call__(self, X: Rows, index: Index) -> Tensor:
        """Copy the rows `index` of X into a batch as the network takes them."""
        # A copy of its own: what the network or preprocess does to it must not reach X, and memory
        # that torch allocates is aligned alike, on which the last bits of a product depend.
        dtype = self.dtype if self.preprocess is None else None
        batch = _to_tensor(X[index]).to(self.device, dtype, copy=True)
        if self.preprocess is not None:
            batch = transformed(batch, self.preprocess, "preprocess")
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
        for piece in slices(len(rows), 4096):
            values = function(_by_channel(batcher(X, rows[piece]).cpu().double()))
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


def slices(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def transformed(batch: Tensor, transform: Transform, name: str) -> Tensor:
    """A batch after a user's function, which must keep the number of rows.

    Raises
    ------
    TypeError, ValueError
        If it returns anything but a tensor with as many rows; the message calls it `name`.
    """
    result = transform(batch)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"{name} returned a {type(result).__name__} for a batch of shape "
            f"{tuple(batch.shape)}; it must return a torch tensor with the same number of rows."
        )
    if result.ndim == 0 or len(result) != len(batch):
        raise ValueError(
            f"{name} turned a batch of shape {tuple(batch.shape)} into {tuple(result.shape)}; the "
            "number of rows must stay the same. It is called on whole batches, not on single "
            "rows."
        )
    return result


def check_finite(X: Rows) -> None:
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


def _to_tensor(rows: Rows) -> Tensor:
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


def as_array(values: Rows) -> NDArray[Any]:
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
