"""Photographs in folders."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from skood.datasets import LoadImages, find_images

from .common import Told, case, says

SIZE = v2.Compose([v2.Resize(4), v2.CenterCrop(4)])
AS_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@functools.cache
def folder() -> Path:
    """Two classes of images, one of which is damaged, and no others."""
    made = Path(tempfile.mkdtemp())
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png"]):
        (made / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4 + number, 4), (80 * number, 0, 0)).save(made / name)
    (made / "dog" / "damaged.png").touch()
    return made


@functools.cache
def mixed() -> Path:
    """Images in a folder, and beside it."""
    made = Path(tempfile.mkdtemp())
    (made / "cat").mkdir()
    for name in ("cat/1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(made / name)
    return made


@functools.cache
def moved() -> Path:
    """The same, after what the message says."""
    made = mixed()
    (made / "2.png").rename(made / "cat" / "2.png")
    return made


def without_the_damaged() -> Any:
    path = folder() / "dog" / "damaged.png"
    path.unlink()
    found = find_images(folder())
    path.touch()
    return found


@functools.cache
def deep() -> Path:
    """An image of 16 bits."""
    made = Path(tempfile.mkdtemp())
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(made / "1.png")
    return made


def in_8_bits() -> Any:
    path = deep() / "1.png"
    Image.fromarray((np.array(Image.open(path)) // 256).astype(np.uint8)).save(path)
    return find_images(deep())


def skipped(told: Told) -> Any:
    """What is left, with the warning that it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find_images(folder(), **told.keywords('on_error="skip"'))


def loaded(*steps: Any) -> torch.Tensor:
    return LoadImages(v2.Compose(steps))(find_images(folder() / "cat").paths)


CASES = [
    case(
        "is no folder that there is",
        lambda: find_images("nowhere"),
        says("pass its path", lambda: find_images(folder() / "cat")),
    ),
    case(
        "has no images, such as .jpg or .png",
        lambda: find_images(Path(tempfile.mkdtemp())),
        says("pass one that has", lambda: find_images(folder() / "cat")),
        says("a folder of them for each class", without_the_damaged),
    ),
    case(
        "has images beside its folders",
        lambda: find_images(mixed()),
        says("the folder of one class", lambda: find_images(mixed() / "cat")),
        says("Move them into a folder", lambda: find_images(moved())),
    ),
    case(
        "images in folder=",
        lambda: find_images(folder()),
        skipped,
        says("remove them", without_the_damaged),
    ),
    case(
        "of more than 8 bits",
        lambda: find_images(deep()),
        says("save it in 8 bits", in_8_bits),
    ),
    case(
        "paths cannot be read as images",
        lambda: LoadImages(AS_TENSOR)(sorted((folder() / "dog").iterdir())),
        says("Leave them out", lambda: LoadImages(AS_TENSOR)([folder() / "dog" / "1.png"])),
        lambda told: LoadImages(AS_TENSOR)(
            skipped(Told('on_error="skip"')).paths[-1:] if told.says("find_images(folder") else 0
        ),
    ),
    case(
        "in a list or an array",
        lambda: LoadImages(AS_TENSOR)("1.png"),
        lambda told: LoadImages(AS_TENSOR)(told("[path]", path=folder() / "dog" / "1.png")),
    ),
    case(
        "expected a tensor (c, h, w)",
        lambda: loaded(SIZE),
        lambda told: loaded(
            SIZE,
            told("v2.ToImage()", v2=v2),
            told("v2.ToDtype(torch.float32, scale=True)", v2=v2),
        ),
        lambda told: LoadImages(lambda image: torch.tensor(np.array(image)).movedim(-1, 0))(
            [folder() / "dog" / "1.png"]
        ),
    ),
    case(
        "tensors of several shapes",
        lambda: loaded(AS_TENSOR),
        lambda told: loaded(
            told("v2.Resize(256)", v2=v2), told("v2.CenterCrop(224)", v2=v2), AS_TENSOR
        ),
    ),
]
