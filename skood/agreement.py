"""What the processes of a group must have in common, told in a few characters each."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import nn
from torch.utils._pytree import tree_leaves

from .engine.rows import Rows
from .fingerprints import UnreadableError, fingerprint
from .labels import as_labels
from .parameters import Detector, memory_of

__all__ = ["facts_of"]

PARAMETERS_OF_A_RANK = {"module", "device", "num_workers", "memory", "random_state", "verbose"}
"""Parameters that may differ between the processes of a group, or are compared by what they do."""


def facts_of(
    detector: Detector, rows: Rows, y: ArrayLike | None, seeds: Iterable[int]
) -> dict[str, str]:
    """What must be the same on all ranks: X, y, the module, parameters, seeds."""
    columns = getattr(detector, "feature_names_in_", None)
    pieces = [fingerprint(piece.contiguous()) for piece in rows.compared()]
    shown = f"{len(rows)} rows of shape {rows.shape}, {rows.dtype}"
    facts = {"X": f"{shown}, digest {_digest([columns, pieces])}", "y": "none"}
    if y is not None:
        labels, indices = np.unique(as_labels(y, len(rows)), return_inverse=True)
        facts["y"] = f"{len(labels)} labels, digest {_digest([labels.tolist(), indices])}"
    if (module := detector.module) is not None:
        told = _told(_deciding(module)) or _told([*module.parameters(), *module.buffers()])
        facts["module"] = f"{type(module).__name__}{told}"
    for name, value in detector.get_params(deep=False).items():
        if name not in PARAMETERS_OF_A_RANK:
            plain = isinstance(value, str | Real | None)
            facts[name] = repr(value) if plain else f"{type(value).__name__}{_told(value)}"
    given = detector.random_state is not None
    facts["random_state"] = f"seeds {_digest(list(seeds))}" if given else "None"
    facts["memory"] = "none" if memory_of(detector) is None else "a folder"
    return facts


def _deciding(module: nn.Module) -> list[Any]:
    """What must be the same of a module on all ranks: not what a forward has left in it."""
    return [
        (
            name,
            type(part),
            {k: v for k, v in vars(part).items() if isinstance(v, tuple) or _is_plain(v)},
            part._parameters,
            part._buffers,
        )
        for name, part in module.named_modules(remove_duplicate=False)
    ]


def _is_plain(thing: Any) -> bool:
    """Whether a thing is text or a number, or a dict or list of such, as settings are."""
    return all(isinstance(leaf, str | Real | None) for leaf in tree_leaves(thing))


def _told(thing: Any) -> str:
    """A digest of what a thing does, to be read after the name of its type, if it can be told."""
    try:
        return f", digest {_digest(thing)}"
    except UnreadableError:
        return ""


def _digest(thing: Any) -> str:
    return fingerprint(thing).hex()[:8]
