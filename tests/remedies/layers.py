"""Modules and functions of `skood.networks`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skood.networks import CifarResNet, NormalizeImages, Standardize, default_network

from .common import BYTES, case, says
from .forwards import MEAN, STD


def normalized(images: Any, *arguments: Any) -> Any:
    return NormalizeImages(*arguments)(images)


PIXELS = torch.from_numpy(BYTES)

CASES = [
    case(
        "one per column or channel",
        lambda: default_network((3, 8, 8), 2, mean=[0.5], std=[0.2]),
        says("must have 3 values", lambda: default_network((3, 8, 8), 2, mean=MEAN, std=STD)),
    ),
    case(
        "must be vectors of one length",
        lambda: Standardize([0.5], STD),
        lambda told: Standardize(MEAN, STD),
    ),
    case(
        "must be numbers or vectors of one length",
        lambda: NormalizeImages([0.5], STD),
        lambda told: NormalizeImages(MEAN, STD),
        lambda told: NormalizeImages(0.5, 0.2),
    ),
    case(
        "must be finite in float32",
        lambda: NormalizeImages(0.5, -1),
        says("std at least 0", lambda: NormalizeImages(0.5, 1)),
    ),
    case(
        "expected 0..1, the scale of pixels",
        lambda: NormalizeImages([124.0, 116.0, 104.0], [58.0, 57.0, 57.0]),
        says(
            "divide both by 255",
            lambda: NormalizeImages(
                np.array([124.0, 116.0, 104.0]) / 255, np.array([58.0, 57.0, 57.0]) / 255
            ),
        ),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(PIXELS[:, :, :, :3]),
        says(
            "mean and std with one value per channel",
            "on only one of",
            lambda: normalized(PIXELS, MEAN, STD),
        ),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(torch.cat([PIXELS, PIXELS[:, :1]], 1).movedim(1, 3), MEAN, STD),
        lambda told: normalized(
            told("images[..., :3]", images=torch.cat([PIXELS, PIXELS[:, :1]], 1).movedim(1, 3)),
            MEAN,
            STD,
        ),
    ),
    case(
        "do not show which axis has the channels",
        lambda: normalized(PIXELS[0], MEAN, STD),
        lambda told: normalized(told("images[None]", images=PIXELS[0]), MEAN, STD),
    ),
    case(
        "expected a dense tensor, such as",
        lambda: normalized(BYTES),
        lambda told: normalized(told("torch.from_numpy(images)", images=BYTES)),
    ),
    case(
        "Cast pixels of 0..255 to uint8",
        lambda: normalized(PIXELS.long()),
        lambda told: normalized(PIXELS.long().to(torch.uint8)),
    ),
    case(
        "expected 0..1. Scale them",
        lambda: normalized(PIXELS.float()),
        lambda told: normalized(told("images / 255", images=PIXELS.float())),
        says(
            "or cast pixels of 0..255 to uint8", lambda: normalized(PIXELS.float().to(torch.uint8))
        ),
        says("Clamp them", lambda: normalized((PIXELS / 250).clamp(0, 1))),
    ),
    case(
        "depth must be",
        lambda: CifarResNet(19),
        says("(8, 14, 20, ...)", lambda: CifarResNet(8)),
    ),
    case(
        "input_shape must be the shape of one row",
        lambda: default_network((3, 3), 2),
        says("h and w of at least 4", lambda: default_network((4, 4), 2)),
    ),
]
