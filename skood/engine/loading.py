"""Rows that are not in memory: data sets, and references such as paths, loaded by workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import tee
from multiprocessing import current_process
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Index = slice | NDArray[np.intp]
Loadable = NDArray[Any] | Dataset[Any]
Loader = Callable[[Any], Tensor]
T = TypeVar("T")

FEW_ROWS = 32
"""Rows up to this number are loaded by the process itself: quicker than to start others."""

LABELS_AT_ONCE = 256


def is_loadable(X: Any) -> TypeGuard[Loadable]:
    """Whether rows must be loaded: those of a data set, or of an array of references.

    References are values of a single dimension, or of another kind than numbers.
    """
    if isinstance(X, Dataset):
        return True
    return isinstance(X, np.ndarray) and (X.ndim == 1 or X.dtype.kind not in "biufc")


def row_count(X: Any) -> int:
    """Number of rows, of a data set too, which need not have a length for type checkers."""
    return len(X)


def row_shape(X: Any) -> tuple[int, ...]:
    """Shape of a row; () where it is no array of numbers."""
    if isinstance(X, Dataset):
        return tuple(_collated(_inputs(X, np.arange(1))).shape[1:])
    return tuple(X.shape[1:])


def as_references(X: Any) -> NDArray[Any] | None:
    """An array of references, or None where X is numbers in two dimensions or more.

    Parameters
    ----------
    X : array-like or Tensor
        Paths, row numbers, or any other objects.

    Returns
    -------
    ndarray of shape (n,) or (n, d), or None
        The references.
    """
    if isinstance(X, Tensor):
        return X.detach().cpu().numpy() if X.ndim == 1 else None
    try:
        array = np.asarray(X)
    except ValueError:  # objects of several shapes
        array = _objects(X)
    return array if array.ndim > 0 and is_loadable(array) else None


def load(
    fetch: Callable[[Index], T], indices: Iterable[Index], n_rows: int, workers: int | None
) -> Iterator[tuple[Index, T]]:
    """Fetch batches ahead of their use, by worker processes, in the order of their indices.

    Parameters
    ----------
    fetch : callable
        Gives what lies at an index.
    indices : iterable of slice or ndarray of int
        Rows of each batch.
    n_rows : int
        Number of rows in all.
    workers : int or None
        Number of processes; None takes one a core, and 0 none beside this one.

    Yields
    ------
    index : slice or ndarray of int
        The rows of a batch.
    fetched : object
        What `fetch` gives.
    """
    n_workers = _available_workers() if workers is None else workers
    if n_workers == 0 or n_rows <= FEW_ROWS:
        for index in indices:
            yield index, fetch(index)
        return
    here, there = tee(indices)
    loader: DataLoader[T] = DataLoader(
        _Fetched(fetch),
        sampler=there,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=n_workers,
        # A fork needs nothing pickled, and does not run the main module again.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator(device="cpu"),
    )
    yield from zip(here, loader, strict=False)


def load_batch(X: Loadable, preprocess: Loader | None, index: Index) -> tuple[Tensor, bool]:
    """One batch, and whether preprocess has been applied: it is where it alone can make a tensor.

    Parameters
    ----------
    X : Dataset or ndarray
        Rows to load.
    preprocess : callable or None
        Maps an array of references to a tensor with as many rows.
    index : slice or ndarray of int
        Rows of the batch.

    Returns
    -------
    batch : Tensor of shape (m, ...)
        The rows.
    preprocessed : bool
        Whether preprocess made them.

    Raises
    ------
    TypeError, ValueError
        If the rows make no tensor; errors of the data set and of preprocess pass through.
    """
    rows = np.arange(*index.indices(row_count(X))) if isinstance(index, slice) else index
    distinct, places = np.unique(rows, return_inverse=True)
    if len(distinct) < len(rows):  # padding repeats a row
        batch, preprocessed = load_batch(X, preprocess, distinct)
        return batch[torch.from_numpy(places)], preprocessed
    loaded = _collated(_inputs(X, rows)) if isinstance(X, Dataset) else X[rows]
    if isinstance(loaded, Tensor):
        return loaded, False
    if preprocess is None:
        raise TypeError(
            f"The rows of X are of type {type(loaded[0]).__name__}, which is no tensor. Pass "
            f"preprocess=, a function that turns an array of them, of shape {loaded.shape}, into "
            "a tensor with as many rows."
        )
    return transformed(loaded, preprocess, "preprocess"), True


def transformed(batch: Any, transform: Loader, name: str) -> Tensor:
    """A batch after a user's function, which must keep the number of rows.

    Raises
    ------
    TypeError, ValueError
        If it returns anything but a tensor with as many rows; the message calls it `name`. Its own
        errors pass through, with a note.
    """
    try:
        result = transform(batch)
    except Exception as error:
        error.add_note(
            f"Raised by {name}, on a batch of shape {tuple(batch.shape)} and dtype {batch.dtype}. "
            "It is called on whole batches, not on single rows."
        )
        raise
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
    # Gradients stop here: what the function holds is the user's.
    return result.detach()


def read_labels(X: Dataset[Any], workers: int | None) -> Any:
    """Labels of a data set of pairs (x, y), or None where its items are inputs alone.

    Every item is read once, unless the data set is a `TensorDataset`.
    """
    if type(X) is TensorDataset:
        return _label(X.tensors)
    if _label(X[0]) is None:
        return None
    n_rows = row_count(X)
    starts = range(0, n_rows, LABELS_AT_ONCE)
    indices = [np.arange(start, min(start + LABELS_AT_ONCE, n_rows)) for start in starts]
    pieces = load(partial(_labels, X), indices, n_rows, workers)
    return [label for _, labels in pieces for label in labels]


def check_dataset(X: Dataset[Any]) -> Loadable | Tensor:
    """A data set whose rows can be read in any order, or the tensor that it wraps.

    Raises
    ------
    TypeError, ValueError
        If it has no length, cannot be indexed, or is empty, or its items are not x or (x, y).
    """
    if not hasattr(X, "__len__") or not hasattr(X, "__getitem__"):
        raise TypeError(
            f"X is a {type(X).__name__} without __len__ and __getitem__; rows are read in random "
            "order. Pass a map-style data set, such as torch.utils.data.Dataset with both methods, "
            "or the rows themselves in an array."
        )
    if len(X) == 0:
        raise ValueError(
            f"X is a {type(X).__name__} with 0 rows (n_samples = 0); pass one with items."
        )
    if type(X) is TensorDataset:  # a subclass may give its items otherwise
        tensor: Tensor = _input(X.tensors)
        return tensor
    _input(X[0])
    return X


class _Fetched(Dataset[T]):
    """What lies at an index, as an item of a data set, which is what a DataLoader takes."""

    def __init__(self, fetch: Callable[[Index], T]) -> None:
        self.fetch = fetch

    def __getitem__(self, index: Any) -> T:
        return self.fetch(index)


def _unchanged(fetched: T) -> T:
    return fetched


def _available_workers() -> int:
    """One process a core, where processes can be forked."""
    if sys.platform != "linux" or current_process().daemon:
        return 0
    return len(os.sched_getaffinity(0))


def _inputs(X: Dataset[Any], rows: NDArray[np.intp]) -> list[Any]:
    return [_input(item) for item in _items(X, rows)]


def _labels(X: Dataset[Any], rows: Index) -> list[Any]:
    labels = [_label(item) for item in _items(X, rows)]
    return [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in labels]


def _items(X: Dataset[Any], rows: Any) -> list[Any]:
    if hasattr(X, "__getitems__"):
        return list(X.__getitems__(rows.tolist()))
    return [X[row] for row in rows.tolist()]


def _input(item: Any) -> Any:
    if not isinstance(item, tuple):
        return item
    if len(item) in (1, 2):
        return item[0]
    kinds = ", ".join(type(part).__name__ for part in item)
    raise TypeError(
        f"The items of X are tuples of {len(item)} ({kinds}); expected x or (x, y). Wrap the data "
        "set in one that returns these alone, for instance a Dataset whose __getitem__ is "
        "x, y = item[0], item[1]."
    )


def _label(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) and len(item) == 2 else None


def _collated(inputs: list[Any]) -> Tensor | NDArray[Any]:
    """A tensor where the inputs are numbers, an array of objects otherwise."""
    if not all(isinstance(x, Tensor) for x in inputs):
        try:
            arrays = [np.asarray(x) for x in inputs]
        except ValueError:  # lists of several lengths
            arrays = []
        if not arrays or any(a.dtype.kind not in "biuf" for a in arrays):
            return _objects(inputs)
        inputs = [torch.from_numpy(np.array(a)) for a in arrays]
    if any(x.is_complex() for x in inputs):
        raise ValueError(
            "Complex data not supported: the items of X are complex tensors. Let the data set give "
            "real ones, for instance their real and imaginary parts side by side."
        )
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise ValueError(
            f"The items of X have several shapes, such as {sorted(shapes)[:3]}; rows need one. "
            "Let the data set resize, crop or pad them, for instance by its transform=."
        )
    return torch.stack([x.detach() for x in inputs])


def _objects(things: list[Any]) -> NDArray[Any]:
    array = np.empty(len(things), dtype=object)
    for row, thing in enumerate(things):
        array[row] = thing
    return array
