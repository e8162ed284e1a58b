"""Loading: items of data sets, worker processes, and functions of the user's."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from multiprocessing import current_process
from numbers import Integral
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Index = slice | NDArray[np.intp]
Loader = Callable[[Any], Tensor]
T = TypeVar("T")

PATIENCE = 0.3
"""Seconds that the process itself reads before it starts others, which takes about as long."""


def load(
    fetch: Callable[[Index], T],
    indices: Iterable[Index],
    workers: int | None,
    source: object = None,
) -> Iterator[T]:
    """Fetch batches before they are needed, by worker processes, in the order of their indices.

    This process fetches them if that takes little time. `workers` is the number of processes; None
    takes one a core, and 0 fetches in this process. Within `workers_kept`, those that fetch from a
    `source` fetch from it again.
    """
    n_workers = _available_workers() if workers is None else workers
    rest, spent = iter(indices), 0.0
    if n_workers > 0 and (kept := _taken(source)) is not None:
        yield from kept.fetched(rest)
        return
    for index in rest:
        if n_workers > 0 and spent > PATIENCE:
            yield from _Workers(fetch, n_workers, source).fetched(chain([index], rest))
            return
        started = time.perf_counter()
        fetched = fetch(index)
        spent += time.perf_counter() - started
        yield fetched


@contextmanager
def workers_kept() -> Iterator[None]:
    """Let worker processes wait for the next pass over their source, until this ends."""
    idle: list[_Workers[Any]] = []
    token = _idle.set(idle)
    try:
        yield
    finally:
        _idle.reset(token)
        for workers in idle:
            workers.stop()


class _Workers(Generic[T]):
    """Worker processes that fetch from a source, pass after pass."""

    def __init__(self, fetch: Callable[[Index], T], n_workers: int, source: object) -> None:
        self.source = source
        self._order = _Order()
        self._loader: DataLoader[T] = DataLoader(
            _Fetched(fetch),
            sampler=self._order,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=n_workers,
            persistent_workers=True,
            # A fork needs nothing pickled, and does not run the main module again.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(device="cpu"),
        )

    def fetched(self, indices: Iterator[Index]) -> Iterator[T]:
        """Batches at indices, after which the workers wait for others, if they may."""
        order, idle = self._order, _idle.get()
        order.begin(indices)
        self._pass: Any = iter(self._loader)
        try:
            for fetched in self._pass:
                order.n_awaited -= 1
                yield fetched
        finally:
            if idle is not None and self.source is not None and order.is_done:
                idle.append(self)
            else:
                self.stop()

    def stop(self) -> None:
        """End the processes; the garbage collector would wait for each after an error."""
        self._pass._shutdown_workers()


_idle: ContextVar[list[_Workers[Any]] | None] = ContextVar("idle", default=None)


def _taken(source: object) -> _Workers[Any] | None:
    """Workers that wait and fetch from a source, for whoever asks first."""
    idle = _idle.get() or []
    for i, workers in enumerate(idle):
        if workers.source is source:
            return idle.pop(i)
    return None


class _Order(Sampler[Index]):
    """The indices of a pass, which a DataLoader asks for ahead of what it gives."""

    def begin(self, indices: Iterator[Index]) -> None:
        """Take the indices of another pass."""
        self._indices = indices
        self._has_ended = False
        self.n_awaited = 0

    def __iter__(self) -> Iterator[Index]:
        for index in self._indices:
            self.n_awaited += 1
            yield index
        self._has_ended = True

    @property
    def is_done(self) -> bool:
        """Whether all that there was to ask for has come."""
        return self._has_ended and self.n_awaited == 0


def transformed(batch: Any, transform: Loader, name: str) -> Tensor:
    """A batch after a user's function, which must return a tensor with as many rows.

    Errors call the function `name`; its own get a note.
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
    if result.ndim == 0 or result.shape[0] != batch.shape[0]:
        raise ValueError(
            f"{name} turned a batch of shape {tuple(batch.shape)} into {tuple(result.shape)}; the "
            "number of rows must stay the same. It is called on whole batches, not on single "
            "rows."
        )
    return result


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


def items(X: Dataset[Any], index: Any) -> list[Any]:
    """Items of a data set."""
    if hasattr(X, "__getitems__"):
        return list(X.__getitems__(index.tolist()))
    return [X[row] for row in index.tolist()]


def is_array(x: Any) -> bool:
    """Whether something is a list or has dimensions, as arrays, tensors and images have."""
    if isinstance(x, list | tuple):
        return len(x) > 0
    is_image = hasattr(x, "__array_interface__") and not isinstance(x, np.generic)
    return len(getattr(x, "shape", ())) > 0 or is_image


def is_pair(item: Any) -> bool:
    """Whether an item can only be (x, y): an array or a list, and a label."""
    if not isinstance(item, tuple | list) or len(item) != 2 or not is_array(item[0]):
        return False
    label = item[1].item() if getattr(item[1], "shape", None) in ((), (1,)) else item[1]
    return isinstance(label, str | Integral)


def _parts(item: Any) -> tuple[Any, ...]:
    """An item as x or (x, y); lists are what default_collate makes of pairs."""
    if isinstance(item, list) and is_pair(item[:2]):
        return tuple(item)
    return item if isinstance(item, tuple) else (item,)


def input_of(item: Any) -> Any:
    """The x of an item that is x or (x, y)."""
    parts = _parts(item)
    if len(parts) in (1, 2):
        return parts[0]
    kinds = ", ".join(type(part).__name__ for part in parts[:6])
    raise TypeError(
        f"The items of X are tuples of {len(parts)} ({kinds}); expected x or (x, y). Wrap the data "
        "set in one that returns these alone, for instance a Dataset whose __getitem__ is "
        "x, y = item[0], item[1]."
    )


def label_of(item: Any) -> Any:
    """The y of an item (x, y); None where there is none."""
    parts = _parts(item)
    return parts[1] if len(parts) == 2 else None


def collated(inputs: list[Any]) -> Tensor | NDArray[Any]:
    """A tensor where the inputs are numbers, an array of objects otherwise."""
    if not all(isinstance(x, Tensor) for x in inputs):
        try:
            arrays = [np.asarray(x) for x in inputs]
        except ValueError:  # lists of several lengths
            arrays = []
        if not arrays or any(a.dtype.kind not in "biuf" for a in arrays):
            return objects(inputs)
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


def objects(things: list[Any]) -> NDArray[Any]:
    """Things of any kind and shape, as an array with one dimension."""
    array = np.empty(len(things), dtype=object)
    for row, thing in enumerate(things):
        array[row] = thing
    return array
