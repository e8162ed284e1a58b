"""What a result depends on beside its settings."""

from __future__ import annotations

import os
import platform
import shlex
import types
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sklearn
import torch

import skood


def versions() -> str:
    return (
        f"skood {skood.__version__}, torch {torch.__version__}, scikit-learn "
        f"{sklearn.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, threads used {torch.get_num_threads()}"


def command_line(script: str, arguments: Iterable[str]) -> str:
    """To be repeated elsewhere: files without their folders."""
    words = [Path(word).name if os.sep in word else word for word in arguments]
    return shlex.join(["python", *script.split(), *words])


def import_torchvision() -> types.ModuleType:
    """Import torchvision, also where its operators were built for another torch: none is used."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.schemas = library  # which live as long as this
    return torchvision
