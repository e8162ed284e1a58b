"""Rows: what a user passes as X, in one of two forms.

`InMemory` holds an array, a memory map or a tensor. `Loaded` holds a data set or references, such
as paths, and loads rows when they are asked for. Both have the same face, so nobody else asks what
X is. To add a form, write another class of `Rows`, and name it in `skood.rows.as_rows`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from ..notices import quoted
from .generators import watched_draws
from .hardware import free_memory, sent
from .loading import Index, Loader, collated, input_of, items, label_of, load, transformed
from .outputs import all_finite

if TYPE_CHECKING:
    from .watch import Watch

SHARE_OF_FREE_MEMORY = 0.25
"""Share of a GPU's free memory that rows may take which stay there; training needs the rest."""

PIECE = 4096
"""Rows that are checked at a time."""

BYTES_TO_COMPARE = 2**30
"""Bytes of X by which processes compare it, at most: about a second."""

LOADED_TO_COMPARE = 16
"""Rows by which processes compare an X that must be loaded."""
SPOT_CHECK = 32
"""One in so many rows of a data set is read twice, to see whether it stays the same."""

STREAM_ROWS = 256
"""Rows of a batch where nothing else decides."""

USUAL_CHANNELS = {1, 3, 4}
"""Numbers of channels by which images are told: grey, colours, and colours with transparency."""


class Rows(ABC):
    """Some or all rows of X.

    Attributes
    ----------
    shape : tuple of int
        Shape of a row; () where rows are references.
    preprocessed : bool
        Whether `read` has applied ``preprocess`` already.
    index : ndarray of int or None
        Which rows of X they are; None for all.
    columns : list of str or None
        Names of the columns of a frame.
    watch : Watch or None
        What compares them with the rows of fit, when the network gets them.
    """

    shape: tuple[int, ...]
    preprocessed: bool = False
    index: NDArray[np.intp] | None = None
    columns: list[str] | None = None
    watch: Watch | None = None
    why_changing: str = "X changed while it was read. Let nothing write into it meanwhile."
    """What to say if rows have other values when they are read again."""

    def __len__(self) -> int:
        return self._n_rows() if self.index is None else len(self.index)

    def read(self, index: Index) -> Tensor:
        """Rows as a tensor (m, ...), which may share memory with X."""
        return self._read(index if self.index is None else self.index[index])

    def stream(
        self, indices: Iterable[Index], workers: int | None
    ) -> Generator[tuple[Index, Tensor], None, None]:
        """Rows at each index in turn."""
        for index in indices:
            yield index, self.read(index)

    def pick(self, index: NDArray[np.intp]) -> Self:
        """Some of these rows; nothing is copied."""
        picked = copy.copy(self)
        picked.index = index if self.index is None else self.index[index]
        return picked

    def spaced(self, size: int) -> Self:
        """At most `size` of these rows, evenly spaced: neighbours may be alike, or of one class."""
        return self.pick(spaced(len(self), size))

    def in_memory(self, workers: int | None) -> NDArray[Any]:
        """All of these rows in one array, loaded by worker processes if they must be loaded."""
        pieces = [np.arange(piece.start, piece.stop) for piece in slices(len(self), STREAM_ROWS)]
        read = self.stream(pieces, workers)
        return np.concatenate([as_array(batch) for _, batch in read])

    def like(self, values: NDArray[Any]) -> Rows:
        """Rows of other values, such as `in_memory` gives of these."""
        rows = InMemory(values)
        rows.preprocessed, rows.columns = self.preprocessed, self.columns
        return rows

    def number(self, position: int) -> int:
        """Number in X of the row at a position, for messages."""
        return position if self.index is None else int(self.index[position])

    def on(self, device: torch.device, dtype: torch.dtype | None) -> Rows:
        """These rows on a device, to be read many times, if there is room; else themselves."""
        return self

    def labels(self, workers: int | None) -> Any:
        """The labels that X brings along for these rows; None if it brings none."""
        return None

    def compared(self) -> Iterator[Tensor]:
        """Rows by which two processes see whether they have the same X: few, which are loaded."""
        yield self.read(spaced(len(self), LOADED_TO_COMPARE))

    def check_finite(self) -> None:
        """Refuse NaN and infinity, if the rows are in memory; others are checked when loaded."""
        return

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Dtype of the rows, or the type of what gives them."""

    @abstractmethod
    def _n_rows(self) -> int: ...

    @abstractmethod
    def _read(self, index: Index) -> Tensor: ...


class InMemory(Rows):
    """Rows of an array, a memory map or a tensor.

    Parameters
    ----------
    values : ndarray or Tensor of shape (n, ...)
        Numbers.
    labels : ndarray or Tensor of shape (n,), optional
        Labels that came with them.
    """

    def __init__(self, values: NDArray[Any] | Tensor, labels: Any = None) -> None:
        self._values = values.detach() if isinstance(values, Tensor) else values
        self._labels = labels
        self.shape = tuple(values.shape[1:])

    @property
    def dtype(self) -> str:
        """Dtype of the rows."""
        return str(self._values.dtype).removeprefix("torch.")

    def on(self, device: torch.device, dtype: torch.dtype | None) -> Rows:
        """These rows on a device, to be read many times, if there is room for X; else as here."""
        row = self._read(slice(0, 1)).to(dtype)
        too_large = row.nbytes * self._n_rows() > SHARE_OF_FREE_MEMORY * free_memory(device)
        if self._lies_on(device) or too_large:
            return self
        values = torch.empty((self._n_rows(), *self.shape), dtype=row.dtype, device=device)
        for piece in slices(self._n_rows(), STREAM_ROWS):
            values[piece] = self._read(piece)
        moved = copy.copy(self)
        moved._values = values
        return moved

    def labels(self, workers: int | None) -> Any:
        """The labels that came with these rows; None if there are none."""
        if self._labels is None or self.index is None:
            return self._labels
        return self._labels[np.ascontiguousarray(self.index)]

    def compared(self) -> Iterator[Tensor]:
        """Rows by which two processes compare their X: all, or spaced ones of a large X."""
        bytes_of_a_row = max(self._read(slice(0, 1)).nbytes, 1)
        index = spaced(len(self), max(BYTES_TO_COMPARE // bytes_of_a_row, 1))
        for piece in slices(len(index), PIECE):
            yield self.read(index[piece])

    def check_finite(self) -> None:
        """Refuse NaN and infinity, slice by slice."""
        for piece in slices(len(self), PIECE):
            check_finite(self.read(piece), self, piece)

    def _lies_on(self, device: torch.device) -> bool:
        return isinstance(self._values, Tensor) and self._values.device.type == device.type

    def _n_rows(self) -> int:
        return len(self._values)

    def _read(self, index: Index) -> Tensor:
        if not isinstance(self._values, Tensor):
            return as_tensor(self._values[index])
        if isinstance(index, slice):
            return self._values[index]
        picks = torch.from_numpy(np.ascontiguousarray(index))  # which takes no negative strides
        return self._values[sent(picks, self._values.device)]


class Loaded(Rows):
    """Rows of a data set, or rows that a function makes of references.

    Parameters
    ----------
    source : Dataset or ndarray
        A map-style data set, or what has its methods, whose items are x or (x, y); or an array of
        references.
    preprocess : callable or None
        Maps an array of references, or of items that are no numbers, to a tensor with as many rows.

    Raises
    ------
    TypeError, ValueError
        If the rows cannot be read in any order, or make no tensor; errors of the data set and of
        preprocess pass through.
    """

    def __init__(self, source: Any, preprocess: Loader | None) -> None:
        self._source = source
        self._preprocess = preprocess
        self._whole = object()  # the same of all rows that are picked of these
        self.without_numbers = ""
        reader = f"the data set, {type(source).__name__}," if self._has_items else "preprocess"
        self.why_changing = (
            f"When the same rows are read again, {reader} gives other values, as random "
            "transforms do, so no score would mean anything. Turn off what is random; random "
            "changes of training batches are passed as augment=."
        )
        first = self._items(np.arange(1))
        self.shape = tuple(first.shape[1:])
        self.preprocessed = not isinstance(first, Tensor)
        self._dtype = str(first.dtype).removeprefix("torch.")
        self.sample = first[0] if self.preprocessed else None

    @property
    def dtype(self) -> str:
        """Dtype of the first row or reference."""
        return self._dtype

    @property
    def _has_items(self) -> bool:
        return not isinstance(self._source, np.ndarray)

    def stream(
        self, indices: Iterable[Index], workers: int | None
    ) -> Generator[tuple[Index, Tensor], None, None]:
        """Rows at each index in turn, loaded ahead by worker processes."""
        asked: deque[Index] = deque()

        def numbers() -> Iterator[Index]:
            for index in indices:
                asked.append(index)
                yield index if self.index is None else self.index[index]

        # By their numbers in X, the same processes load whatever rows are picked of it.
        for batch in load(self._read, numbers(), workers, self._whole):
            yield asked.popleft(), batch

    def labels(self, workers: int | None) -> Any:
        """Labels of a data set of pairs, of which every item is read once."""
        if not self._has_items:
            return None
        if label_of(items(self._source, np.arange(1))[0]) is None:
            return None
        indices = (np.arange(piece.start, piece.stop) for piece in slices(len(self), STREAM_ROWS))
        pieces = load(self._labels_at, indices, workers)
        return [label for labels in pieces for label in labels]

    def _labels_at(self, index: Index) -> list[Any]:
        numbers = index if self.index is None else self.index[index]
        labels = [label_of(item) for item in items(self._source, numbers)]
        return [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in labels]

    def _n_rows(self) -> int:
        return len(self._source)

    def _read(self, index: Index) -> Tensor:
        numbers = np.arange(*index.indices(self._n_rows())) if isinstance(index, slice) else index
        distinct, places = np.unique(numbers, return_inverse=True)
        if len(distinct) < len(numbers):  # padding repeats a row
            return self._read(distinct)[torch.from_numpy(places)]
        return self._steady(numbers)

    def _steady(self, numbers: NDArray[np.intp]) -> Tensor:
        """Rows by their numbers, which are read again if reading them drew random numbers."""
        with watched_draws() as drew:
            values = self._values(numbers)
            drawn = drew()
        # A generator that the data set keeps to itself is not seen, so some rows are tried.
        some = slice(None) if drawn else slice(SPOT_CHECK - 1, None, SPOT_CHECK)
        # What preprocess makes of references is of the whole batch, and cannot be read in parts.
        if (drawn or not self.preprocessed) and len(numbers[some]):
            again = self._values(numbers[some])
            if not ((again == values[some]) | (again != again)).all():
                raise ValueError(self.why_changing)
        return values

    def _values(self, numbers: NDArray[np.intp]) -> Tensor:
        loaded = self._items(numbers)
        if isinstance(loaded, Tensor):
            return loaded
        if self._preprocess is None:
            raise TypeError(
                f"The rows of X are of type {type(loaded[0]).__name__}, which is no tensor. Pass "
                "preprocess=, a function that turns an array of them, of shape "
                f"{loaded.shape}, into a tensor with as many rows{_for_example(loaded[0])}."
            )
        try:
            return transformed(loaded, self._preprocess, "preprocess").detach()
        except Exception as error:
            if self.without_numbers:
                error.add_note(
                    f"X holds no numbers in the columns {self.without_numbers}, so "
                    "preprocess gets an array of objects."
                )
            raise

    def _items(self, numbers: NDArray[np.intp]) -> Tensor | NDArray[Any]:
        if self._has_items:
            return collated([input_of(item) for item in items(self._source, numbers)])
        return self._source[numbers]


def _for_example(row: Any) -> str:
    """How preprocess may take a row that is a dict."""
    if not isinstance(row, Mapping) or not row:
        return ""
    keys = [key for key in row if np.ndim(row[key]) > 0] or list(row)
    return (
        f": torch.stack([torch.as_tensor(row[{quoted(keys[0])}]) for row in rows]), if that is "
        f"what your network takes (keys: {quoted(list(row))})"
    )


def rows_of_dataset(X: Any, preprocess: Loader | None) -> Rows:
    """Rows of a data set; those of a `TensorDataset` are in memory, unless they are references.

    A TypeError or ValueError says if it has no length, cannot be indexed or is empty, or if its
    items are not x or (x, y).
    """
    indexed = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not indexed or isinstance(X, IterableDataset):
        raise TypeError(
            f"X is a {type(X).__name__} without __len__ and __getitem__; rows are read in random "
            "order. Pass a map-style data set, such as torch.utils.data.Dataset with both methods, "
            "or the rows themselves in an array: list(X), if they fit in memory."
        )
    if len(X) == 0:
        raise ValueError(
            f"X is a {type(X).__name__} with 0 rows (n_samples = 0); pass one with items."
        )
    # A subclass may give its items otherwise, and numbers of rows are for preprocess to load.
    if type(X) is TensorDataset and (preprocess is None or input_of(X.tensors).ndim > 1):
        return rows_of_tensor(input_of(X.tensors), label_of(X.tensors))
    return Loaded(X, preprocess)


def rows_of_tensor(X: Tensor, labels: Any = None) -> InMemory:
    """Rows of a tensor; a ValueError says if it cannot be rows."""
    if X.is_nested:
        raise ValueError(
            "X is a nested tensor, whose rows have several lengths; expected rows of one shape. "
            "Pad them, X.to_padded_tensor(0.0), if the network takes that; or pass them in a list, "
            "list(X.unbind()), with preprocess=, which makes one tensor of some of them."
        )
    if X.is_meta or X.is_quantized:
        raise ValueError(
            f"X is a {'meta' if X.is_meta else 'quantized'} tensor of dtype {X.dtype}; expected "
            "one with plain values. Pass X.dequantize() in place of a quantized one, and the rows "
            "themselves in place of one on the meta device, which has no values."
        )
    if X.ndim < 2 or X.numel() == 0 or X.is_complex() or X.layout != torch.strided:
        raise ValueError(
            f"X is a tensor of shape {tuple(X.shape)}, dtype {X.dtype} and layout {X.layout}; "
            "expected a dense real tensor with rows in the first of at least 2 dimensions and at "
            "least one value in each. Reshape your data: X.reshape(-1, 1) for one column, "
            "X.reshape(1, -1) for one row, X.to_dense() for a sparse tensor."
        )
    return InMemory(X, labels)


def check_finite(batch: Tensor, rows: Rows, index: Index) -> None:
    """Refuse a batch with NaN or infinity, naming the first such row of X."""
    if not batch.is_floating_point() or all_finite(batch):
        return
    bad, *place = (~torch.isfinite(batch)).nonzero()[0].tolist()
    position = index.start + bad if isinstance(index, slice) else int(index[bad])
    named = rows.columns is not None and tuple(batch.shape[1:]) == (len(rows.columns),)
    column = f", column {quoted(rows.columns[place[0]])}" if named and rows.columns else ""
    dtype = str(batch.dtype).removeprefix("torch.")
    raise ValueError(
        f"Input X contains NaN, infinity or a value too large for {dtype}: first in row "
        f"{rows.number(position)}{column}. Remove such rows; or fill in NaN, for instance with "
        "sklearn.impute.SimpleImputer, and limit the rest to the range of the other rows, "
        "X.clip(low, high)."
    )


def spaced(n_rows: int, size: int) -> NDArray[np.intp]:
    """At most `size` positions among `n_rows`, evenly spaced."""
    return np.linspace(0, n_rows - 1, min(n_rows, size)).astype(np.intp)


def slices(n_rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def as_tensor(values: NDArray[Any]) -> Tensor:
    """An array as a tensor, which shares its memory if torch can."""
    if min(values.strides, default=0) < 0:  # which numpy calls contiguous, in an axis of length 1
        values = values.copy()
    if values.flags.carray and values.dtype.isnative and values.dtype.char in "fdB":  # mostly so
        return torch.from_numpy(values)
    dtype = values.dtype.newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    # torch takes native byte order, positive strides and writable memory only.
    return torch.from_numpy(np.require(values, dtype=dtype, requirements=["C", "W"]))


def as_array(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Values as a numpy array, in float32 if numpy lacks their dtype."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether arrays of this shape are images (n, h, w, c).

    Told by 1, 3 or 4 channels; of other numbers of channels, by images as high as they are wide.
    """
    if len(shape) != 4:
        return False
    _, second, third, last = shape
    if {second, last} & USUAL_CHANNELS:
        return last in USUAL_CHANNELS and second not in USUAL_CHANNELS
    return second == third != last


def image_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The axes of images (n, ...) of this shape that are their height and width."""
    return (1, 2) if len(shape) == 3 or has_channels_last(shape) else (2, 3)
