"""What to add to an error of the user's network: what it was given, and what may help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .batches import Batcher
from .rows import Rows, has_channels_last

ANYTHING_ELSE = (
    "If it expects another shape, dtype or layout, pass a function that makes it as preprocess=."
)

AXES = {1: "l", 2: "h, w", 3: "d, h, w"}
"""What convolutions take after rows and channels, by their number of dimensions."""


@contextmanager
def explained(module: nn.Module, batch: Tensor, rows: Rows, batcher: Batcher) -> Iterator[None]:
    """Add a note to an error of the user's network: what it was given, and what may help."""
    try:
        yield
    except Exception as error:
        hints = list(_hints(module, batch, rows, batcher, str(error))) or [ANYTHING_ELSE]
        error.add_note(
            f"Raised by the module given, {type(module).__name__}, on a batch of shape "
            f"{tuple(batch.shape)} and dtype {batch.dtype}. {' '.join(hints)}"
        )
        raise


def _hints(
    module: nn.Module, batch: Tensor, rows: Rows, batcher: Batcher, error: str
) -> Iterator[str]:
    parts = list(module.modules())
    if batcher.preprocess is None:
        yield from _of_integers(parts, batch, rows)
    yield from _of_ids(parts, batch)
    yield from _of_layout(parts, batch)
    if "inference" in error.lower():
        yield (
            "A part of forward runs under torch.inference_mode(), through which nothing can be "
            "trained: remove it, or pass max_epochs=0 to use the network as it is."
        )
    if "device" in error.lower() or "cuda" in error.lower():
        yield (
            f"Its parameters and buffers, and the batch, are on {batch.device}. Tensors kept as "
            "plain attributes stay where they were: use register_buffer. Remove .cuda() and "
            ".to(...) from forward, or pass device= the device that they name."
        )
    if "required positional argument" in error:
        yield (
            "It is called with the batch alone: wrap it in a module whose forward takes one tensor "
            "and passes on all that it needs."
        )


def _of_integers(parts: list[nn.Module], batch: Tensor, rows: Rows) -> Iterator[str]:
    """What is done to integers, for networks on token ids."""
    integers = rows.dtype.startswith(("int", "uint")) and batch.ndim < 4
    if integers or any(isinstance(part, nn.Embedding) for part in parts):
        yield (
            "Without preprocess=, integers are cast to "
            f"{str(batch.dtype).removeprefix('torch.')}; a network on token ids takes them with "
            "preprocess=torch.Tensor.long."
        )


def _of_ids(parts: list[nn.Module], batch: Tensor) -> Iterator[str]:
    """Ids that the first embedding does not have."""
    embedding = next((part for part in parts if isinstance(part, nn.Embedding)), None)
    if embedding and not batch.is_floating_point() and batch.max() >= embedding.num_embeddings:
        yield (
            f"Its embedding has the ids 0 to {embedding.num_embeddings - 1}, and the batch holds "
            f"{int(batch.max())}: number the ids from 0, or give the embedding more rows."
        )


def _of_layout(parts: list[nn.Module], batch: Tensor) -> Iterator[str]:
    """Axes that are missing or in another order than convolutions take them."""
    first = next((part for part in parts if isinstance(part, _ConvNd)), None)
    if has_channels_last(tuple(batch.shape)):
        yield (
            "The batch looks like images with channels last, (n, h, w, c), where networks take "
            "(n, c, h, w): np.moveaxis(X, 3, 1) puts them first, and so does "
            "preprocess=skood.networks.NormalizeImages(mean, std), which scales them too."
        )
    elif first is None or not first.in_channels:
        return
    elif batch.ndim < 2 + len(first.kernel_size):
        axes = AXES[len(first.kernel_size)]
        yield (
            f"Its convolutions take (n, c, {axes}): X.reshape(n, c, {axes}) makes that of flat "
            f"rows, X[:, None] of (n, {axes})."
        )
    elif batch.shape[1] == first.in_channels:
        return
    elif batch.shape[-1] == first.in_channels:
        yield (
            f"Its first convolution takes {first.in_channels} channels, and the batch has as many "
            "in its last axis: np.moveaxis(X, -1, 1) puts them first."
        )
    else:
        yield (
            f"Its first convolution takes {first.in_channels} channels, and the batch has "
            f"{batch.shape[1]}: np.repeat(X, 3, axis=1) makes three of one, X[:, :3] leaves out a "
            "fourth."
        )
