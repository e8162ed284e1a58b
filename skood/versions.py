"""What a report of a fault should say of the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

__all__ = ["show_versions", "version_lines"]

PACKAGES = ("skood", "torch", "scikit-learn", "numpy", "scipy", "joblib", "tqdm")


def show_versions() -> None:
    """Print the versions of skood and its libraries, and the machine, for bug reports.

    Examples
    --------
    >>> import skood
    >>> skood.show_versions()  # doctest: +ELLIPSIS
    skood ...
    """
    print("\n".join(version_lines()))


def version_lines() -> list[str]:
    """What `show_versions` prints."""
    n_gpus = torch.cuda.device_count()
    return [
        *(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        f"Python {sys.version.split()[0]}, {platform.platform()}",
        f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        *(f"GPU {torch.cuda.get_device_name(i)}, CUDA {torch.version.cuda}" for i in range(n_gpus)),
    ]
