"""Images and trained networks from files: the options that name them, and their checks."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import import_torchvision
from kinds import NOISE, SUMMARIES
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from skood import SparseEnergyOODDetector
from skood.networks import CifarDenseNet, CifarResNet, NormalizeImages, WideResNet

Images = NDArray[np.uint8]

NORMALISATIONS = {
    "imagenet": NormalizeImages((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": NormalizeImages(
        (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
    ),
    "densenet": NormalizeImages((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "efficientnet": NormalizeImages((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

RESERVED = (*NOISE, *SUMMARIES, "id_test", "id_held_out", "surrogates")
"""What no OOD set may be called, as results are filed under these names."""


@dataclass(frozen=True)
class Data:
    """One ID set, OOD sets by name, and perhaps auxiliary outliers."""

    x_train: Images
    y_train: NDArray[np.int64]
    x_test: Images
    y_test: NDArray[np.int64]
    ood: dict[str, Images]
    outliers: Images | None = None

    @property
    def n_classes(self) -> int:
        return int(self.y_train.max()) + 1


# Options


def add_data_options(parser: argparse.ArgumentParser, ood: bool = True) -> None:
    """The files, and how the network takes their images."""
    add = parser.add_argument
    add("--id", type=Path, required=True, metavar="FILE.npz", help="x_train, y_train, x_test ...")
    if ood:
        add(
            "--ood",
            type=Path,
            required=True,
            nargs="+",
            metavar="FILE.npz",
            help="x, one set a file; of an ID set its x_test",
        )
    add("--network", required=True, help="resnet20, resnet56, wrn40_2, ...")
    add("--checkpoint", type=Path, required=True, metavar="FILE.pt", help="its state_dict")
    add(
        "--normalise",
        choices=sorted(NORMALISATIONS),
        help="mean and std that the network was trained with "
        "(default: imagenet for a resnet, cifar for a wrn; a densenet and an efficientnet have "
        "their own)",
    )


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of training and scoring (default: auto)",
    )


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the network."""
    if options.normalise is None:
        families = {
            "resnet": "imagenet",
            "densenet": "densenet",
            "efficientnet_lite": "efficientnet",
        }
        options.normalise = families.get(options.network.rstrip("_0123456789"), "cifar")


def number(text: str) -> float:
    """A number that is at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def count(text: str, least: int = 1) -> int:
    """A number that is at least 1, or another least."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return value


def count_or_zero(text: str) -> int:
    """A number that is at least 0."""
    return count(text, least=0)


def draw(n_rows: int, size: int | None, seed: int) -> NDArray[np.intp]:
    """Row numbers in an order of the seed's, at most `size` of them."""
    return np.random.RandomState(seed).permutation(n_rows)[:size]


# Detectors


def untrained(
    module: nn.Module, options: argparse.Namespace, data: Data, n_rows: int, **parameters: Any
) -> SparseEnergyOODDetector:
    """A detector around a network as it is, with some training rows for its statistics."""
    detector = SparseEnergyOODDetector(
        module,
        max_epochs=0,
        preprocess=NORMALISATIONS[options.normalise],
        random_state=0,
        **parameters,
    )
    return quietly_fitted(detector, data, draw(len(data.x_train), n_rows, seed=0))


def quietly_fitted(
    detector: SparseEnergyOODDetector, data: Data, rows: NDArray[np.intp]
) -> SparseEnergyOODDetector:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of rows seen before, and of accuracy lost, which reports show
        return detector.fit(data.x_train[rows], data.y_train[rows])


# Reading and checking


def read_data(id_path: Path, ood_paths: Sequence[Path], outliers: Path | None = None) -> Data:
    arrays = read_id(id_path)
    shape = arrays["x_train"].shape[1:]
    known = {str(id_path): image_hashes(arrays["x_train"]) | image_hashes(arrays["x_test"])}
    names = [path.stem for path in ood_paths]
    if len(set(names)) < len(names) or set(names) & set(RESERVED):
        raise ValueError(
            f"the OOD sets are named {', '.join(names)} after their files; give them names that "
            f"differ, none of them {', '.join(RESERVED[:-1])} or {RESERVED[-1]}."
        )
    if strange := [name for name in names if not re.fullmatch(r"[\w.-]+", name)]:
        raise ValueError(
            f"the OOD sets {', '.join(strange)} are named after their files; give these names of "
            "letters, digits, dots, dashes and underscores, that tables can hold."
        )
    ood = {}
    for name, path in zip(names, ood_paths, strict=True):
        ood[name] = read_set(path, shape)
        refuse_known(path, ood[name], known, "in-distribution")
    if outliers is None:
        return Data(**arrays, ood=ood)
    known |= {str(path): image_hashes(ood[path.stem]) for path in ood_paths}
    auxiliary = read_set(outliers, shape)
    refuse_known(outliers, auxiliary, known, "no auxiliary outliers")
    return Data(**arrays, ood=ood, outliers=auxiliary)


def read_id(path: Path) -> dict[str, NDArray[Any]]:
    arrays = read_arrays(path, ["x_train", "y_train", "x_test", "y_test"])
    x_train, y_train, x_test, y_test = arrays.values()
    check_images(x_train, f"{path}: x_train")
    check_images(x_test, f"{path}: x_test", x_train.shape[1:])
    check_labels(y_train, len(x_train), f"{path}: y_train")
    check_labels(y_test, len(x_test), f"{path}: y_test")
    if y_test.max() > y_train.max():
        raise ValueError(
            f"{path}: y_test goes up to class {y_test.max()}, y_train to {y_train.max()}; "
            "expected the same classes."
        )
    return arrays


def read_set(path: Path, shape: tuple[int, ...]) -> Images:
    """Images of one set; of an ID set those that no network was trained on."""
    name = "x_test" if "x_test" in names_in(path) else "x"
    x = read_arrays(path, [name])[name]
    check_images(x, f"{path}: {name}", shape)
    return x


def refuse_known(path: Path, x: Images, known: dict[str, set[int]], what: str) -> None:
    """Refuse a set of which most images are those of another file."""
    images = image_hashes(x)
    for other, hashes in known.items():
        if len(images & hashes) > len(images) / 2:
            raise ValueError(
                f"{path}: {len(images & hashes) / len(images):.0%} of its images are also in "
                f"{other}, so they are {what}. Give another set."
            )


def check_available(option: str, wanted: int | None, available: int, path: Path) -> None:
    if wanted is not None and wanted > available:
        raise ValueError(f"{option} {wanted} exceeds the {available} rows of {path}.")


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    return path


def names_in(path: Path) -> list[str]:
    if not zipfile.is_zipfile(existing(path)):
        raise ValueError(f"{path}: not an .npz file; write it with numpy.savez.")
    with np.load(path) as arrays:
        return list(arrays.files)


def read_arrays(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    found = names_in(path)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{path}: lacks {', '.join(missing)}; expected the arrays {', '.join(names)}, got "
            f"{', '.join(found)}."
        )
    with np.load(path) as arrays:
        try:
            return {name: arrays[name] for name in names}
        except (ValueError, zipfile.BadZipFile) as error:  # pickled objects, damaged bytes
            raise ValueError(f"{path}: {error}") from error


def check_images(x: NDArray[Any], name: str, shape: tuple[int, ...] | None = None) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0:
        raise ValueError(
            f"{name} has shape {x.shape} and dtype {x.dtype}; expected RGB images (n, h, w, 3) "
            "of uint8."
        )
    if shape is not None and x.shape[1:] != shape:
        raise ValueError(
            f"{name} has images of {x.shape[1:]}, but x_train of {shape}; resize them to that."
        )


def check_labels(y: NDArray[Any], n_rows: int, name: str) -> None:
    if y.shape != (n_rows,) or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(
            f"{name} has shape {y.shape} and dtype {y.dtype}; expected one class a row, ({n_rows},)"
            ", of integers from 0 on."
        )


def image_hashes(x: Images) -> set[int]:
    return {hash(image.tobytes()) for image in x}


def make_network(name: str, n_classes: int) -> nn.Module:
    """A network with fresh weights; the dropout in its name acts while it is trained."""
    if match := re.fullmatch(r"resnet(\d+)", name):
        return CifarResNet(int(match[1]), n_classes=n_classes)
    if match := re.fullmatch(r"wrn(\d+)_(\d+)(?:_dropout(0?\.\d+))?", name):
        depth, width, dropout = match.groups(default="0")
        return WideResNet(int(depth), int(width), dropout=float(dropout), n_classes=n_classes)
    if match := re.fullmatch(r"densenet(\d+)_(\d+)", name):
        return CifarDenseNet(int(match[1]), int(match[2]), n_classes=n_classes)
    if match := re.fullmatch(r"efficientnet_lite0_(\d+)", name):
        return Enlarged(efficientnet_lite0(n_classes), int(match[1]))
    raise ValueError(
        f"--network {name} is unknown; expected resnet<depth>, wrn<depth>_<width>, "
        "wrn<depth>_<width>_dropout<share>, densenet<depth>_<growth> or "
        "efficientnet_lite0_<pixels>, such as resnet20, wrn16_2, wrn40_2_dropout0.3, "
        "densenet100_12 or efficientnet_lite0_80."
    )


def efficientnet_lite0(n_classes: int) -> nn.Module:
    """EfficientNet-lite0 of timm, with 1,280 features.

    Batch-norm is frozen, and so is all before the last two stages.
    """
    import_torchvision()  # which timm imports
    import timm

    network = timm.create_model("tf_efficientnet_lite0", num_classes=n_classes)
    norms = (part for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    for part in (network.conv_stem, network.blocks[:-2], *norms):
        part.requires_grad_(False)
    return network


class Enlarged(nn.Module):
    """A network that sees its images enlarged to squares of `pixels`."""

    def __init__(self, network: nn.Module, pixels: int) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def forward(self, x: Tensor) -> Tensor:
        size = (self.pixels, self.pixels)
        return self.network(F.interpolate(x, size, mode="bilinear", align_corners=False))


def read_network(options: argparse.Namespace, n_classes: int) -> nn.Module:
    module = make_network(options.network, n_classes)
    try:
        module.load_state_dict(torch.load(existing(options.checkpoint), weights_only=True))
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{options.checkpoint} does not fit {options.network} with {n_classes} classes; "
            f"expected its plain state_dict. {shortened(str(error))}"
        ) from error
    return module


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
