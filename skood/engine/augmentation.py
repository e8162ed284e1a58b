"""Augmentation of training batches, drawn per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .loading import transformed

Augment = Callable[[Tensor, torch.Generator], Tensor]

CROP_PADDING = 4


def get_augment(augment: str | Callable[[Tensor], Tensor] | None) -> Augment | None:
    """Augmentation for ``augment=``: a name, a callable on a batch, or none."""
    if augment is None:
        return None
    if callable(augment):
        return lambda batch, generator: transformed(batch, augment, "augment")
    return AUGMENTATIONS[augment]


def flip(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, each drawn on its own, left to right.

    Parameters
    ----------
    batch : Tensor of shape (n, c, h, w) or (n, h, w)
        Images, width last.
    generator : torch.Generator
        Source of the draws, on the CPU.

    Returns
    -------
    Tensor of the same shape
        The images.
    """
    _check_images(batch)
    draws = torch.rand(len(batch), generator=generator, device="cpu") < 0.5
    mirrored = draws.to(batch.device).view(-1, *[1] * (batch.ndim - 1))
    return torch.where(mirrored, batch.flip(-1), batch)


def flip_crop(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, and shift by up to 4 pixels into a zero border, each image drawn on its own.

    Parameters
    ----------
    batch : Tensor of shape (n, c, h, w) or (n, h, w)
        Images, width last.
    generator : torch.Generator
        Source of the draws, on the CPU.

    Returns
    -------
    Tensor of the same shape
        The images.
    """
    batch = flip(batch, generator)
    height, width = batch.shape[-2:]
    draws = torch.randint(2 * CROP_PADDING + 1, (2, len(batch)), generator=generator, device="cpu")
    top, left = draws.to(batch.device)
    padded = F.pad(batch, [CROP_PADDING] * 4)
    rows = top[:, None] + torch.arange(height, device=batch.device)
    columns = left[:, None] + torch.arange(width, device=batch.device)
    images = torch.arange(len(batch), device=batch.device)[:, None, None]
    if batch.ndim == 3:
        return padded[images, rows[:, :, None], columns[:, None, :]]
    cropped = padded.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]]
    return cropped.movedim(-1, 1)


AUGMENTATIONS: dict[str, Augment] = {"flip": flip, "flip-crop": flip_crop}


def _check_images(batch: Tensor) -> None:
    if batch.ndim not in (3, 4):
        raise ValueError(
            'augment="flip" and "flip-crop" need batches of images, (n, c, h, w) or (n, h, w); '
            f"got {tuple(batch.shape)}. Pass augment=None, or a callable on a batch."
        )
