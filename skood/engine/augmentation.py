"""Augmentation of training batches, drawn per row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .hardware import sent
from .loading import transformed
from .rows import image_axes

CROP_PADDING = 4


class Share(NamedTuple):
    """Which rows of a whole batch a batch holds, where other processes hold the rest."""

    positions: NDArray[np.intp]
    n_rows: int


class Augmented(NamedTuple):
    """A batch after augmentation, and which rows are mirrored; None if more may have changed."""

    batch: Tensor
    mirrored: Tensor | None  # (n,), bool, on the CPU


Augment = Callable[[Tensor, torch.Generator, Share | None], Augmented]


def get_augment(augment: str | Callable[[Tensor], Tensor] | None) -> Augment | None:
    """Augmentation for ``augment=``: a name, a callable on a batch, or none."""
    if augment is None:
        return None
    if callable(augment):
        return partial(_transformed, augment)
    return AUGMENTATIONS[augment]


def flip(batch: Tensor, generator: torch.Generator, share: Share | None = None) -> Augmented:
    """Mirror half of the images, left to right; each is drawn on its own.

    If the batch is a `share` of a larger one, draws are those of the whole, and its rows get
    theirs.
    """
    _check_images(batch)
    share = share or _whole(batch)
    draws = torch.rand(share.n_rows, generator=generator, dtype=torch.float32, device="cpu") < 0.5
    mirrored = draws[share.positions]
    return Augmented(mirror(batch, mirrored), mirrored)


def mirror(batch: Tensor, which: Tensor) -> Tensor:
    """Mirror some images, left to right; `which` (n,) is on the CPU."""
    mirrored = sent(which, batch.device).view(-1, *[1] * (batch.ndim - 1))
    _, width = image_axes(tuple(batch.shape))
    return torch.where(mirrored, batch.flip(width), batch)


def flip_crop(batch: Tensor, generator: torch.Generator, share: Share | None = None) -> Augmented:
    """Mirror, and shift by up to 4 pixels into a zero border; each image is drawn on its own."""
    share = share or _whole(batch)
    batch, _ = flip(batch, generator, share)
    shape = (2, share.n_rows)
    draws = torch.randint(2 * CROP_PADDING + 1, shape, generator=generator, device="cpu")
    top, left = sent(draws[:, share.positions], batch.device)
    axes = image_axes(tuple(batch.shape))
    images = batch.movedim(axes, (1, 2))
    _, height, width, *channels = images.shape
    padded = F.pad(images, [0, 0] * len(channels) + [CROP_PADDING] * 4)
    rows = top[:, None] + torch.arange(height, device=batch.device)
    columns = left[:, None] + torch.arange(width, device=batch.device)
    numbers = torch.arange(len(batch), device=batch.device)[:, None, None]
    cropped = padded[numbers, rows[:, :, None], columns[:, None, :]]
    return Augmented(cropped.movedim((1, 2), axes), None)


AUGMENTATIONS: dict[str, Augment] = {"flip": flip, "flip-crop": flip_crop}


def _transformed(
    augment: Callable[[Tensor], Tensor],
    batch: Tensor,
    generator: torch.Generator,
    share: Share | None = None,
) -> Augmented:
    return Augmented(transformed(batch, augment, "augment").detach(), None)


def _whole(batch: Tensor) -> Share:
    return Share(np.arange(len(batch)), len(batch))


def _check_images(batch: Tensor) -> None:
    if batch.ndim not in (3, 4):
        raise ValueError(
            'augment="flip" and "flip-crop" need batches of images, (n, c, h, w), (n, h, w, c) or '
            f"(n, h, w); got {tuple(batch.shape)}. Pass augment=None, or a callable on a batch."
        )
