"""What the parameters of a detector come to."""

from __future__ import annotations

from typing import Any

import torch

from .caching import DiskMemory
from .engine.batches import Batcher
from .engine.training import Recipe
from .notices import quoted
from .scores import get_score, list_scores
from .scores.protocol import ScoreFunction, uses_gradient

__all__ = [
    "Detector",
    "batcher_of",
    "chosen_parameters",
    "is_auto",
    "memory_of",
    "n_workers",
    "pretraining_epochs",
    "recipe_of",
    "scores_of",
]

Detector = Any
"""A `SparseEnergyOODDetector`, which lives above this module."""

AUTO = "auto"
"""What a parameter is that `fit` chooses."""

CHOOSABLE = ("sparsity_weight", "score_function")
"""Parameters that `fit` can choose."""


def is_auto(value: Any) -> bool:
    """Whether a parameter leaves the choice to `fit`."""
    return isinstance(value, str) and value == AUTO


def chosen_parameters(detector: Detector) -> list[str]:
    """Parameters that `fit` is to choose."""
    return [name for name in CHOOSABLE if is_auto(getattr(detector, name))]


def scores_of(detector: Detector) -> dict[str, str | ScoreFunction]:
    """The score by its name; or all that may be chosen, if the choice is left to `fit`.

    A name that is unknown is refused. A score that needs the gradient of the network takes several
    times as long as the others, and is not chosen unasked.
    """
    asked = detector.score_function
    if not is_auto(asked):
        get_score(asked)
        return {asked if isinstance(asked, str) else quoted(asked): asked}
    return {name: name for name in list_scores() if not uses_gradient(get_score(name))}


def pretraining_epochs(detector: Detector) -> int | None:
    """Epochs of pre-training; None if they depend on the number of rows."""
    if detector.pretrain_epochs == "auto":
        return 0 if detector.module is not None else None
    return int(detector.pretrain_epochs)


def recipe_of(detector: Detector) -> Recipe:
    """How long and how fast fine-tuning is."""
    return Recipe(
        int(detector.max_epochs),
        int(detector.batch_size),
        float(detector.learning_rate),
        float(detector.momentum),
        float(detector.weight_decay),
        layers=detector.layers,
    )


def n_workers(detector: Detector) -> int | None:
    """Processes that load rows; None for one a core."""
    return None if detector.num_workers == "auto" else int(detector.num_workers)


def batcher_of(detector: Detector, device: torch.device, dtype: torch.dtype) -> Batcher:
    """What turns rows into batches, for a network on a device."""
    return Batcher(device, dtype, detector.preprocess, n_workers(detector))


def memory_of(detector: Detector) -> DiskMemory | None:
    """Where what a detector computes is kept; None where nothing would ever be found again."""
    if detector.memory is None or detector.random_state is None:
        return None
    return DiskMemory(detector.memory)
