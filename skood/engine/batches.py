"""From rows to batches that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .loading import Index, transformed
from .rows import STREAM_ROWS, Rows, check_finite, slices

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Batcher:
    """Turns rows into batches on a device.

    Parameters
    ----------
    device : torch.device
        Where the batches go.
    dtype : torch.dtype
        Floating dtype of the batches.
    preprocess : callable or None
        Applied to each batch, in the dtype of the rows, before it is cast.
    workers : int, optional
        Processes that load rows which are not in memory; None takes one a core.
    center : Tensor of shape (c,), optional
        What is subtracted from columns or channels in float64, before the cast.
    channels_last : bool, default=True
        Whether images lie in memory pixel by pixel, in which convolutions are fastest.
    """

    device: torch.device
    dtype: torch.dtype
    preprocess: Transform | None
    workers: int | None = None
    center: Tensor | None = None
    channels_last: bool = True

    def __call__(self, rows: Rows, index: Index | None = None) -> Tensor:
        """A batch of the rows at an index, or of all."""
        index = slice(0, len(rows)) if index is None else index
        return self._ready(rows, index, rows.read(index), own=False)

    def stream(
        self,
        rows: Rows,
        indices: Iterable[Index] | None = None,
        *,
        checked: bool = True,
    ) -> Iterator[Tensor]:
        """Batches at consecutive indices; of all rows by default.

        Rows that must be loaded, and what goes to a GPU, are made ready ahead. Unless `checked`,
        batches may hold NaN or infinity.
        """
        indices = slices(len(rows), STREAM_ROWS) if indices is None else indices
        ahead = self.device.type == "cuda"
        with closing(rows.stream(indices, self.workers)) as read:  # an error ends its processes
            for index, batch in self._ahead(read) if ahead else read:
                yield self._ready(rows, index, batch, own=ahead, checked=checked)

    def prepared(self, batch: Tensor) -> Tensor:
        """Raw rows as the network takes them, where they are: preprocessed, centred and cast."""
        if self.preprocess is None:
            return self._cast(batch)
        return self._cast(transformed(batch, self.preprocess, "preprocess").to(batch.device))

    def laid_out(self, batch: Tensor) -> Tensor:
        """A batch in the layout that the network takes."""
        last = self.channels_last and batch.ndim == 4
        return batch.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )

    def resident(self, rows: Rows) -> Rows:
        """Rows on the device, to be read many times, if it has room to spare; else themselves."""
        return rows.on(self.device, self._dtype_of_rows)

    def _ahead(self, read: Iterator[tuple[Index, Tensor]]) -> Iterator[tuple[Index, Tensor]]:
        """The same on the GPU; a batch travels there while that before it is in use."""
        transfers, waiting = _transfers(self.device), None
        for index, batch in read:
            if batch.device.type == "cpu":
                with torch.cuda.stream(transfers):
                    batch = batch.pin_memory().to(self.device, non_blocking=True)
                    arrived = transfers.record_event()
            else:  # on the stream that reads it: another would not wait until it is there
                batch = batch.clone()
                arrived = torch.cuda.current_stream(batch.device).record_event()
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = arrived, index, batch
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(
        self, arrived: torch.cuda.Event, index: Index, batch: Tensor
    ) -> tuple[Index, Tensor]:
        here = torch.cuda.current_stream(self.device)
        here.wait_event(arrived)
        batch.record_stream(here)
        return index, batch

    @property
    def _dtype_of_rows(self) -> torch.dtype | None:
        """Dtype of rows before preprocess and centring; None leaves theirs."""
        return self.dtype if self.preprocess is None and self.center is None else None

    def _cast(self, batch: Tensor) -> Tensor:
        """A preprocessed batch, centred, in the dtype that the network takes."""
        if self.center is not None:
            batch = _centered(batch, self.center.to(batch.device))
        if batch.is_floating_point() or self.preprocess is None:
            return batch.to(self.dtype)
        return batch

    def _ready(
        self, rows: Rows, index: Index, batch: Tensor, *, own: bool, checked: bool = True
    ) -> Tensor:
        """In the dtype and layout that the network takes, on its device."""
        if rows.preprocessed:
            batch = self._cast(batch.to(self.device))
        else:
            # A copy: what the network or preprocess does to it must not reach X, and memory that
            # torch allocates is aligned alike, on which the last bits of a product depend.
            raw = batch.to(self.device, self._dtype_of_rows, copy=not own)
            batch = self.prepared(raw).detach()  # no gradient reaches what preprocess holds
        if checked:
            check_finite(batch, rows, index)
        return self.laid_out(batch)


@cache
def _transfers(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches travel to a GPU; memory freed on one is of use to it alone."""
    return torch.cuda.Stream(device)


def moments(batcher: Batcher, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of rows, float64, each column or channel by itself.

    They have shape (d,) for a table, (c,) for images with channels, (1,) for images without.
    """

    def mean_of(function: Transform) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        for batch in batcher.stream(rows):
            values = function(by_channel(batch.cpu().double()))
            total = total + values.sum(dim=(0, 2))
            count += values.shape[0] * values.shape[2]
        return total / count

    mean = mean_of(lambda values: values)
    return mean, mean_of(lambda values: (values - mean[:, None]) ** 2).sqrt()


def _centered(batch: Tensor, center: Tensor) -> Tensor:
    """A batch without a mean of each column or channel, in float64."""
    return batch.double() - center.view(-1, *[1] * (batch.ndim - 2 if batch.ndim > 3 else 0))


def by_channel(batch: Tensor) -> Tensor:
    """A batch as (rows, columns or channels, pixels)."""
    if batch.ndim == 2:
        return batch[:, :, None]
    return batch.flatten(2) if batch.ndim > 3 else batch.flatten(1)[:, None]


def channels_first(images: Tensor) -> Tensor:
    """Images (n, h, w, c) as float (n, c, h, w)."""
    return images.movedim(-1, 1).to(torch.promote_types(images.dtype, torch.float32))
