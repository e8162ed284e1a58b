"""What a report of a fault should say of the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

__all__ = ["show_versions"]

PACKAGES = ("skood", "torch", "scikit-learn", "numpy", "scipy", "joblib", "tqdm")


def show_versions() -> None:
    """Print the versions of what skood computes with, and the machine, for reports of faults.

    Examples
    --------
    >>> import skood
    >>> skood.show_versions()  # doctest: +ELLIPSIS
    skood ...
    """
    for name in PACKAGES:
        print(f"{name} {importlib.metadata.version(name)}")
    print(f"Python {sys.version.split()[0]}, {platform.platform()}")
    print(f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for number in range(torch.cuda.device_count()):
        print(f"GPU {torch.cuda.get_device_name(number)}, CUDA {torch.version.cuda}")
