"""Photographs in folders: their paths and classes, and a function that loads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils._param_validation import StrOptions, validate_parameter_constraints
from torch import Tensor

from .exceptions import UnreadableImagesError, UnreadableImagesWarning
from .notices import first_line, quoted, warn_user
from .validation import validated

__all__ = ["ImageFiles", "LoadImages", "find_images"]

SHOWN = 190
"""Characters that a message shows of a path, or of the reason why it cannot be read."""

DEEP = ("I", "F")
"""How Pillow's modes of deep pixels begin, whose values Pillow cuts off at 255 for RGB."""


@dataclass(frozen=True)
class ImageFiles:
    """Photographs that `find_images` has found.

    Attributes
    ----------
    paths : ndarray of str of shape (n,), dtype object
        Their paths, in the order of their names.
    labels : ndarray of str of shape (n,), or None
        The names of the folders that they lie in; None if there are no folders.
    mean, std : ndarray of shape (3,), float64
        Mean and standard deviation of red, green and blue, on the scale 0..1, as `LoadImages` reads
        the images. Each image counts as much as any other.
    unreadable : dict of str to str
        The paths that were left out, each with the reason.
    """

    paths: NDArray[np.object_]
    labels: NDArray[np.str_] | None
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    unreadable: dict[str, str] = field(default_factory=dict)


@validated(folder=[str, PathLike], on_error=[StrOptions({"raise", "skip"})])
def find_images(folder: str | PathLike[str], *, on_error: str = "raise") -> ImageFiles:
    """Find the photographs in a folder, and read each once.

    Pass ``paths`` as X and ``labels`` as y, with ``preprocess=LoadImages(transform)``.

    Parameters
    ----------
    folder : str or path
        It has a folder for each class, named after the class, with images in it or in folders below
        it. Or it has images alone; these get no labels. Names that begin with a dot are left out,
        and so are files whose suffix is not that of an image format that Pillow reads. Links to
        folders are followed, but each folder is read once. Grey images of more than 8 bits cannot
        be read.
    on_error : {"raise", "skip"}, default="raise"
        What to do if files cannot be read: raise an error, or leave them out with a warning. Either
        names all of them.

    Returns
    -------
    ImageFiles
        Paths, labels, and the mean and standard deviation of the pixels.

    Raises
    ------
    UnreadableImagesError
        If files cannot be read, and `on_error` is "raise"; or if none can be.
    TypeError, ValueError
        If `folder` is no folder, has no images, or has some beside those in folders; or if
        `on_error` is another value.
    ImportError
        If Pillow is not installed.

    Warns
    -----
    UnreadableImagesWarning
        If files are left out.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from PIL import Image
    >>> from skood.datasets import find_images
    >>> with TemporaryDirectory() as folder:
    ...     for name, colour in {"cat": (0, 0, 255), "dog": (255, 0, 255)}.items():
    ...         (Path(folder) / name).mkdir()
    ...         Image.new("RGB", (8, 8), colour).save(Path(folder) / name / "1.png")
    ...     files = find_images(folder)
    >>> files.labels.tolist(), files.mean.tolist()
    (['cat', 'dog'], [0.5, 0.0, 1.0])
    """
    names = _names_of_images(str(folder))
    paths = [str(Path(folder, name)) for name in names]
    with ThreadPoolExecutor() as threads:
        read = [*threads.map(_moments, paths)]
    unreadable = {path: x for path, x in zip(paths, read, strict=True) if isinstance(x, str)}
    if unreadable:
        _refuse_or_warn(unreadable, paths, str(folder), skip=on_error == "skip")
    kept = np.array([path not in unreadable for path in paths])
    mean, square = np.mean([x for x in read if not isinstance(x, str)], axis=0)
    in_folders = len(Path(names[0]).parts) > 1
    return ImageFiles(
        paths=np.array(paths, dtype=object)[kept],
        labels=np.array([Path(name).parts[0] for name in names])[kept] if in_folders else None,
        mean=mean,
        std=np.sqrt(np.maximum(square - mean**2, 0)),
        unreadable=unreadable,
    )


class LoadImages:
    """Load photographs by their paths: a ``preprocess`` for an X of paths.

    The network sees them as a viewer shows them: upright, as the orientation in their EXIF data
    says, and on white where they are transparent. `torchvision.datasets.ImageFolder` does neither.

    Parameters
    ----------
    transform : callable
        Maps one image, a `PIL.Image.Image` in RGB, to the tensor (c, h, w) that the network takes:
        the transform of its evaluation, with nothing random. It comes with a network of torchvision
        or timm; or compose it from ``torchvision.transforms.v2``.

    Raises
    ------
    UnreadableImagesError
        In a call, if files cannot be read. It names them.
    TypeError, ValueError
        If `transform` is not callable. In a call, if paths are none, or `transform` gives other
        things than tensors, or tensors of several shapes.
    ImportError
        In a call, if Pillow is not installed.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> import numpy as np
    >>> import torch
    >>> from PIL import Image
    >>> from skood.datasets import LoadImages
    >>> load = LoadImages(lambda image: torch.tensor(np.array(image)).movedim(-1, 0) / 255)
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "red.png"
    ...     Image.new("RGB", (8, 6), (255, 0, 0)).save(path)
    ...     load([path, path]).shape
    torch.Size([2, 3, 6, 8])
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        validate_parameter_constraints(
            {"transform": [callable]}, {"transform": transform}, caller_name="LoadImages"
        )
        self.transform = transform

    def __call__(self, paths: Iterable[str | PathLike[str]]) -> Tensor:
        """Images (n, c, h, w) as the network takes them."""
        valid = _valid_paths(paths)
        images, unreadable = [], {}
        for path in valid:
            try:
                image = _opened(path)
            except Exception as error:  # Pillow's readers raise what they like
                unreadable[str(path)] = _reason(error)
            else:
                images.append(self.transform(image))
        if unreadable:
            raise UnreadableImagesError(
                f"{len(unreadable)} of {len(valid)} paths cannot be read as images. Leave them "
                'out, as find_images(folder, on_error="skip") does:'
                f"{_on_lines_of_their_own(unreadable)}"
            )
        return _stacked(images)


def _names_of_images(folder: str) -> list[str]:
    """Names of the images in a folder, relative to it: all lie in folders below it, or none."""
    image = _pillow()
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"folder={quoted(folder)} is no folder that there is; pass its path.")
    suffixes = image.registered_extensions()
    readable = {suffix for suffix, kind in suffixes.items() if kind in image.OPEN}
    names = sorted(
        os.path.relpath(path, folder)
        for path in _files_below(folder)
        if Path(path).suffix.lower() in readable and Path(path).is_file()
    )
    if not names:
        raise ValueError(
            f"folder={quoted(folder)} has no images, such as .jpg or .png; pass one that has, or "
            "that has a folder of them for each class."
        )
    bare = [name for name in names if len(Path(name).parts) == 1]
    if 0 < len(bare) < len(names):
        raise ValueError(
            f"folder={quoted(folder)} has images beside its folders, {quoted(bare)}, which belong "
            "to no class. Move them into a folder, or pass the folder of one class."
        )
    return names


def _files_below(folder: str) -> Iterator[str]:
    """Paths of the files in a folder and below it, without hidden ones; each folder once."""
    seen, unvisited = set(), [folder]
    while unvisited:
        for here, below, names in os.walk(unvisited.pop(0)):
            if (real := os.path.realpath(here)) in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            paths = [os.path.join(here, name) for name in below]
            # Links come last, so that a folder that one leads to keeps its own place.
            unvisited += filter(os.path.islink, paths)
            yield from (os.path.join(here, name) for name in names if not name.startswith("."))


def _refuse_or_warn(
    unreadable: dict[str, str], paths: list[str], folder: str, *, skip: bool
) -> None:
    """Name the images that cannot be read, in a warning if they may be left out."""
    told = f"{len(unreadable)} of {len(paths)} images in folder={quoted(folder)} cannot be read"
    others = len(unreadable) < len(paths)
    if skip and others:
        warn_user(
            f"{told}, and are left out:{_on_lines_of_their_own(unreadable)}",
            UnreadableImagesWarning,
        )
        return
    or_skip = ', or pass on_error="skip" to go on without them' * others
    raise UnreadableImagesError(
        f"{told}. Repair or remove them{or_skip}:{_on_lines_of_their_own(unreadable)}"
    )


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading images needs Pillow, which is not installed: run "
            "`pip install 'skood[vision]'`."
        ) from error
    return Image


def _opened(path: str | PathLike[str]) -> Any:
    """An image in RGB, read to its end; deep pixels are refused."""
    with _pillow().open(path) as image:
        if image.mode.startswith(DEEP):
            raise ValueError(
                f"its pixels are of more than 8 bits (Pillow's mode {image.mode}), which RGB would "
                "cut off; save it in 8 bits"
            )
        return _as_seen(image)


def _as_seen(image: Any) -> Any:
    """An image in RGB as a viewer shows it: upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if "transparency" not in upright.info and "A" not in upright.getbands():
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")


def _moments(path: str) -> NDArray[np.float64] | str:
    """Mean and mean square (2, 3) of the pixels of an image; or why it cannot be read."""
    from PIL import ImageStat

    try:
        pixels = ImageStat.Stat(_opened(path))
    except Exception as error:  # Pillow's readers raise what they like
        return _reason(error)
    sums = np.array([pixels.sum, pixels.sum2]) / np.array(pixels.count)
    return sums / np.array([[255.0], [255.0**2]])


def _reason(error: Exception) -> str:
    """Why an image cannot be read, without its path."""
    return first_line(error).partition(" '")[0].rstrip(":") or type(error).__name__


def _on_lines_of_their_own(unreadable: dict[str, str]) -> str:
    """All that cannot be read, each with the reason; of a path that is very long, the end."""
    lines = [f"{path[-SHOWN:]}: {reason[:SHOWN]}" for path, reason in unreadable.items()]
    return "\n  ".join(["", *lines])


def _valid_paths(paths: Any) -> list[str | PathLike[str]]:
    try:
        valid = [] if isinstance(paths, str | bytes) else list(paths)
    except TypeError:
        valid = []
    if not valid or not all(isinstance(path, str | PathLike) for path in valid):
        raise TypeError(
            f"paths is {quoted(paths)}; expected at least one path, a str or a pathlib.Path, in a "
            "list or an array. Pass [path] for a single one."
        )
    return valid


def _stacked(images: list[Any]) -> Tensor:
    """Images in one tensor; an error says what the transform must change."""
    wrong = [image for image in images if not isinstance(image, Tensor)]
    if wrong:
        raise TypeError(
            f"transform gave a {type(wrong[0]).__name__}; expected a tensor (c, h, w). End it with "
            "v2.ToImage() and v2.ToDtype(torch.float32, scale=True) from torchvision.transforms."
        )
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"transform gave tensors of several shapes, such as {sorted(shapes)[:3]}; a batch "
            "needs one. Let it resize and crop: v2.Resize(256) and v2.CenterCrop(224) from "
            "torchvision.transforms, first."
        )
    return torch.stack(images)
