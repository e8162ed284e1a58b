"""The network before fine-tuning, which keeps its logits of rows that come again as they were."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augmentation import mirror
from .generators import watched_draws
from .hardware import autocast, sent
from .network import Network

MOST_KEPT = 256_000_000
"""Bytes of logits that are kept, at most."""


class Views(NamedTuple):
    """Which training rows a batch holds, as they were read or mirrored.

    Parameters
    ----------
    rows : ndarray of int of shape (n,)
        Positions among the training rows.
    n_rows : int
        Number of training rows.
    mirrored : ndarray of bool of shape (n,), optional
        Which of them are mirrored images; None where none ever is.
    """

    rows: NDArray[np.intp]
    n_rows: int
    mirrored: NDArray[np.bool_] | None = None

    @property
    def n_views(self) -> int:
        """Number of views that there are of all training rows."""
        return self.n_rows if self.mirrored is None else 2 * self.n_rows

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Number of each view; those of mirrored rows come after all others."""
        return self.rows if self.mirrored is None else self.rows + self.n_rows * self.mirrored

    def turned(self, which: NDArray[np.bool_]) -> Views:
        """The same rows, of which some show their other side."""
        if self.mirrored is None:
            return self
        return self._replace(mirrored=self.mirrored ^ which)


class Teacher:
    """A copy of a network, which gives the logits of training batches in evaluation mode.

    In most networks, a row has bitwise the same logits in all batches of a size. So they are kept
    of batches of the first size, which is that of full ones, and computed of others. All are
    computed if they would be too many, if the network draws random numbers, or if a row has other
    bits at another place of the first batch.
    """

    def __init__(self, network: Network) -> None:
        self._network = network.uncompiled_copy()
        self._keeps = True
        self._kept: _Kept | None = None

    def logits(self, inputs: Tensor, views: Views | None = None) -> Tensor:
        """Logits (n, K) of a batch; it has no views if its rows do not come again as they are."""
        if views is None or not self._keeps:
            return self._computed(inputs)
        if self._kept is None:
            with watched_draws(inputs.device) as drew:
                logits = self._computed(inputs)
                few = views.n_views * logits[0].nbytes <= MOST_KEPT
                self._keeps = few and not drew() and self._same_elsewhere(inputs, logits)
            if self._keeps:
                self._kept = _Kept(logits, views)
            return logits
        if len(inputs) != self._kept.size:
            return self._computed(inputs)
        known = self._kept.known[views.numbers]
        if not known.all():
            # In the same forward, rows whose logits are known show their other side.
            turned = views.turned(known)
            if turned is not views:
                inputs = self._network.batcher.laid_out(mirror(inputs, torch.from_numpy(known)))
            self._kept.add(self._computed(inputs), turned)
        return self._kept.of(views)

    def _same_elsewhere(self, inputs: Tensor, logits: Tensor) -> bool:
        """Whether rows have bitwise the same logits at other places of a batch."""
        # An odd number of places: kernels for small matrices take rows by pairs, fours, eights.
        places = len(inputs) // 2 | 1
        moved = self._network.batcher.laid_out(inputs.roll(places, dims=0))
        return torch.equal(self._computed(moved), logits.roll(places, dims=0))

    def _computed(self, inputs: Tensor) -> Tensor:
        with torch.no_grad(), autocast(inputs.device, self._network.precision.training):
            # A copy, as the network may write into it, and terms of the loss may look at it.
            _, logits = self._network.trained(inputs.clone())
        return logits


class _Kept:
    """Logits of the views that came so far, in batches as large as the first."""

    def __init__(self, logits: Tensor, views: Views) -> None:
        self.size = len(logits)
        self.known = np.zeros(views.n_views, dtype=bool)
        self._logits = logits.new_empty((views.n_views, logits.shape[1]))
        self.add(logits, views)

    def add(self, logits: Tensor, views: Views) -> None:
        """Keep the logits of views."""
        self._logits[self._index(views)] = logits
        self.known[views.numbers] = True

    def of(self, views: Views) -> Tensor:
        """Logits of views, all of them known."""
        return self._logits[self._index(views)]

    def _index(self, views: Views) -> Tensor:
        return sent(torch.from_numpy(views.numbers), self._logits.device)
