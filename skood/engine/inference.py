"""The forward pass over any number of rows, on padded batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..exceptions import NonFiniteLogitsError, SlowScoringWarning
from ..notices import warn_user
from .hardware import keep_freed_memory
from .loading import Index
from .network import Network
from .outputs import Seen, all_finite, as_float64, run
from .rows import Rows
from .surroundings import under_autocast, undisturbed

T = TypeVar("T", bound=tuple[Any, ...])

Source = Callable[[Network, Rows], Seen | None]
"""What a network gives of all rows, as `whole_pass` does; None leaves it to a pass."""

_source: ContextVar[Source | None] = ContextVar("_source", default=None)


@contextmanager
def passes_from(source: Source | None) -> Iterator[None]:
    """Inside, what a source gives takes the place of a pass through the network."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


def forward_rows(
    network: Network,
    rows: Rows,
    *,
    features: bool = False,
) -> Iterator[tuple[slice, Seen]]:
    """Positions of rows, and what is seen of them, slice by slice; the logits are in float64.

    Features and inner layers are None unless asked for. A `NonFiniteLogitsError` names the first
    row with NaN or infinite logits.
    """

    def given(piece: slice, seen: Seen) -> Callable[[], tuple[slice, Seen]]:
        own = _own(seen, piece)
        own = own._replace(logits=as_float64(own.logits))

        def finish() -> tuple[slice, Seen]:
            _check_finite(own.logits, piece, rows)
            return piece, own

        return finish

    yield from _over_outputs(network, rows, features, given)


def whole_pass(network: Network, rows: Rows) -> Seen:
    """What is seen of all rows, one at least, on the CPU and in the dtypes of the network."""

    def forward(piece: slice, batch: Tensor) -> Callable[[], tuple[slice, Seen]]:
        visible = network.head is not None
        own = _own(_forward(network, batch, visible, network.precision.scoring), piece)

        def finish() -> tuple[slice, Seen]:
            _check_finite(as_float64(own.logits), piece, rows)
            return piece, own.each(Tensor.cpu)

        return finish

    return Seen.joined([own for _, own in _over_batches(network, rows, forward)])


def _own(seen: Seen, piece: slice) -> Seen:
    """A copy without the padding, as the network may use the memory of its features again."""
    size = piece.stop - piece.start
    return seen.each(lambda values: values[:size].clone())


def score_rows(
    network: Network,
    rows: Rows,
    score: Callable[[Tensor | None, Tensor, Tensor | None], Tensor],
    *,
    features: bool = True,
    perturbation: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Positions, scores and logits (float64) of rows, slice by slice.

    A score works on whole padded batches, as the network does, so that within one shape its result
    for a row is bitwise the same in any company.

    Parameters
    ----------
    network : Network
        The network, in evaluation mode.
    rows : Rows
        Any number of rows.
    score : callable
        What is seen of a batch, in float64, to values (p,).
    features : bool, default=True
        Whether the score wants more than logits.
    perturbation : callable, optional
        Logits and the batch that they depend on to what is added to the batch, before the forward
        that is scored. The logits that are yielded are those of the rows as they are.
    """

    def given(
        piece: slice, seen: Seen, unmoved: Tensor | None = None
    ) -> Callable[[], tuple[slice, Tensor, Tensor]]:
        size = piece.stop - piece.start
        kept = seen.each(as_float64)

        def finish() -> tuple[slice, Tensor, Tensor]:
            _check_finite(kept.logits[:size], piece, rows)
            scores = score(*kept)
            return piece, scores[:size], (kept.logits if unmoved is None else unmoved)[:size]

        return finish

    if perturbation is None:
        yield from _over_outputs(network, rows, features, given)
        return

    def moved(piece: slice, batch: Tensor) -> Callable[[], tuple[slice, Tensor, Tensor]]:
        unmoved, batch = _perturbed(network, batch, perturbation)
        _check_finite(unmoved[: piece.stop - piece.start], piece, rows)
        # A small step would be lost in less than the network's own precision.
        return given(piece, _forward(network, batch, features, None), unmoved)

    yield from _over_batches(network, rows, moved)


def _forward(
    network: Network, batch: Tensor, features: bool, precision: torch.dtype | None
) -> Seen:
    """What is seen of a batch; the logits alone if no more is wanted."""

    def forward() -> Seen:
        return network.seen(batch) if features else Seen(None, network.logits(batch))

    # In one layout, kept or not: last bits of a score depend on it.
    return under_autocast(forward, network.device, precision).each(Tensor.contiguous)


def _over_outputs(
    network: Network,
    rows: Rows,
    features: bool,
    given: Callable[[slice, Seen], Callable[[], T]],
) -> Iterator[T]:
    """What comes of the outputs of each padded batch, kept ones or those of a forward."""
    source = _source.get()
    kept = None if source is None else source(network, rows)
    if kept is None:

        def forward(piece: slice, batch: Tensor) -> Callable[[], T]:
            return given(piece, _forward(network, batch, features, network.precision.scoring))

        yield from _over_batches(network, rows, forward)
        return

    def finished(piece: slice, shape: int) -> T:
        # Padded as a batch is, and in memory of its own: last bits of a score depend on both.
        index = torch.from_numpy(_padded_index(piece, shape))
        wanted = kept if features else Seen(None, kept.logits)
        return given(piece, wanted.each(lambda values: values[index].to(network.device)))()

    for piece, shape in network.shapes.split(len(rows)):
        yield undisturbed(partial(finished, piece, shape), network.device, network.default_dtype)


def _over_batches(
    network: Network,
    rows: Rows,
    forward: Callable[[slice, Tensor], Callable[[], T]],
) -> Iterator[T]:
    """What a forward gives for each batch of the rows, first its position among them.

    Where a GPU has no memory for a batch, the rest goes on in smaller ones.
    """
    if network.device.type == "cpu":
        keep_freed_memory()
    n_rows, done = len(rows), 0
    while done < n_rows:
        steps = _Steps(network, rows, done, forward)
        try:
            with closing(steps.batches):  # which what holds an error would keep open
                while done < n_rows:
                    # Nothing of torch's is switched at the yield: the caller's modes are its own.
                    for result in undisturbed(steps, network.device, network.default_dtype):
                        done = result[0].stop
                        yield result
        except torch.OutOfMemoryError:
            shape = steps.shape
            if shape == 1 and not network.shapes.small:
                raise
            del steps  # and with the error, all that it holds
        else:
            return
        _shrink(network, shape)


class _Steps(Generic[T]):
    """A forward over the batches of rows, a call for each of them.

    The forward starts the work on a batch and returns what waits for it and finishes it: meanwhile
    the next batch is made ready. A call returns what is finished.
    """

    def __init__(
        self,
        network: Network,
        rows: Rows,
        start: int,
        forward: Callable[[slice, Tensor], Callable[[], T]],
    ) -> None:
        self.shape = network.shapes.ladder[-1]
        self._network = network
        self._rows = rows
        self.batches = _batches(network, rows, start)
        self._forward = forward
        self._finish: Callable[[], T] | None = None

    def __call__(self) -> list[T]:
        piece, batch = next(self.batches)
        if piece.start == 0:
            _compare(batch[: piece.stop], self._rows, self._network)
        finished = [] if self._finish is None else [self._finish()]
        self.shape = len(batch)
        self._network.evaluate()
        self._finish = self._forward(piece, batch)
        return [*finished, self._finish()] if piece.stop == len(self._rows) else finished


def see(network: Network, rows: Rows) -> None:
    """Compare rows with those of fit, as a pass through the network does."""
    piece, _ = next(network.shapes.split(len(rows)))
    _compare(network.batcher(rows, piece), rows, network)


def _compare(batch: Tensor, rows: Rows, network: Network) -> None:
    if rows.watch is not None:
        rows.watch.see(batch, rows, network.batcher)


def _batches(
    network: Network, rows: Rows, start: int
) -> Generator[tuple[slice, Tensor], None, None]:
    """Positions of the rows from `start` on, and the padded batches that hold them."""
    pieces: deque[slice] = deque()

    def indices() -> Iterator[Index]:
        for piece, shape in network.shapes.split(len(rows), start):
            pieces.append(piece)
            yield _padded(piece, shape)

    # Some are asked for ahead of the batch that is given.
    for batch in network.batcher.stream(rows, indices()):
        yield pieces.popleft(), batch


def _shrink(network: Network, shape: int) -> None:
    """Go on without forwards of so many rows, for which there is no memory."""
    network.without_shape(shape)
    warn_user(
        f"{network.device} has no memory for a forward of {shape} rows: from here on, scores are "
        f"computed {network.shapes.ladder[-1]} at a time, and may differ from earlier ones by "
        "rounding.",
        SlowScoringWarning,
    )


def _perturbed(
    network: Network, batch: Tensor, perturbation: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of a batch, and the batch moved as a score wants it."""
    if not batch.is_floating_point():
        raise ValueError(
            "The score moves the network's input along a gradient, which an input of dtype "
            f"{batch.dtype} does not have. Pass another score_function."
        )
    with torch.enable_grad():
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


def _check_finite(logits: Tensor, piece: slice, rows: Rows) -> None:
    if all_finite(logits):
        return
    bad = piece.start + int((~torch.isfinite(logits)).any(dim=1).nonzero()[0])
    raise NonFiniteLogitsError(
        f"The network gives NaN or infinite logits for row {rows.number(bad)} of X, though the row "
        "itself is finite. Check the scale of X and preprocess=; a network in float16 may overflow."
    )


def _padded(piece: slice, shape: int) -> Index:
    """Index of `shape` rows, filled up with the last one: a value that the network can take."""
    return piece if piece.stop - piece.start == shape else _padded_index(piece, shape)


def _padded_index(piece: slice, shape: int) -> NDArray[np.intp]:
    return np.minimum(np.arange(piece.start, piece.start + shape), piece.stop - 1)
