"""Warnings at the line of the user's that led to them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import sklearn
import torch

BETWEEN = (
    f"{Path(__file__).parents[1]}{os.sep}",
    f"{Path(sklearn.__file__).parent}{os.sep}",
    f"{Path(torch.__file__).parent}{os.sep}",
    contextlib.__file__,
)
"""Files that may lie between a warning and the user's line: our own, and those of decorators."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the user's line that led here, however deep inside skood this is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
