"""Detectors as graphs: one module or one file, from raw rows to decisions and p-values."""

from . import files, module
from .files import *  # noqa: F403
from .module import *  # noqa: F403

__all__ = [*files.__all__, *module.__all__]
