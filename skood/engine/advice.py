"""What to add to an error of the user's network: what it was given, and what may help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .batches import Batcher
from .rows import Rows, has_channels_last

ANYTHING_ELSE = (
    "If it expects another shape, dtype or layout, pass a function that makes it as preprocess=."
)


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
    convolution = next((part for part in parts if isinstance(part, nn.Conv2d)), None)
    integers = rows.dtype.startswith(("int", "uint")) and batcher.preprocess is None
    if (integers and batch.ndim < 4) or any(isinstance(part, nn.Embedding) for part in parts):
        yield (
            "Without preprocess=, integers are cast to "
            f"{str(batcher.dtype).removeprefix('torch.')}; a network on token ids takes them with "
            "preprocess=torch.Tensor.long."
        )
    if has_channels_last(tuple(batch.shape)):
        yield (
            "The batch looks like images with channels last, (n, h, w, c), where networks take "
            "(n, c, h, w): np.moveaxis(X, 3, 1) puts them first, and so does "
            "preprocess=skood.networks.NormalizeImages(mean, std), which scales them too."
        )
    elif convolution and batch.ndim < 4:
        yield (
            "It has 2-D convolutions, which take images (n, c, h, w): X.reshape(n, c, h, w) makes "
            "them of flat rows, X[:, None] of gray images (n, h, w)."
        )
    elif convolution and batch.shape[1] != convolution.in_channels:
        yield (
            f"Its first convolution takes {convolution.in_channels} channels, and the batch has "
            f"{batch.shape[1]}: np.repeat(X, 3, axis=1) makes three of one, X[:, :3] leaves out a "
            "fourth."
        )
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
