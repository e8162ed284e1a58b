"""Trained networks kept on disk, keyed by everything that decides what they become.

What cannot be kept or read costs no fit: it is said once, and the fit goes on without it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
import time
import types
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Memory
from torch import Tensor, nn

from .engine.network import Network
from .engine.objective import Term
from .engine.training import Progress, Recipe, TrainingData
from .exceptions import MemoryEntryWarning
from .fingerprints import UnreadableError, fingerprint, found
from .notices import first_line, warn_user

__all__ = ["TrainingMemory", "TrainingStore", "packed", "training_key", "unpacked"]

DIGEST_BYTES = hashlib.sha256().digest_size

UNFINISHED = ".tmp"
"""How the name of a file ends that is being written."""

SECONDS_OF_A_WRITE = 24 * 3600
"""Age at which a file that is being written counts as left behind by a process that was killed."""

LONGEST_QUOTE = 120


class TrainingMemory:
    """The folder of ``memory=``, during one fit.

    If `memory` is a `joblib.Memory`, its folder is used, which its ``clear`` empties.
    """

    def __init__(self, memory: str | PathLike[str] | Memory) -> None:
        self._said: set[str] = set()
        self.folder = self._folder(memory)

    def store(self, key: str) -> TrainingStore:
        """What is kept under a key."""
        return TrainingStore(self, key)

    def key(self, *training: Any) -> str | None:
        """`training_key`; None, with a warning, where it cannot be told."""
        try:
            return training_key(*training)
        except UnreadableError as error:
            self.warn(
                "keeps nothing, as it cannot tell what decides the training",
                str(error),
                "Remove that part, or make it one that can be pickled",
            )
            return None

    def warn(self, problem: str, reason: str, remedy: str) -> None:
        """Say what is wrong with the memory, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            warn_user(f"memory= {problem}: {reason}. {remedy}.", MemoryEntryWarning)

    def _folder(self, memory: str | PathLike[str] | Memory) -> Path | None:
        if isinstance(memory, Memory):
            backend = memory.store_backend
            return None if backend is None else Path(backend.location) / "skood"
        folder = os.fsdecode(memory)
        if not folder or "\0" in folder:
            self.warn("keeps nothing", f"{_end_of(folder)!r} is no folder", "Pass one, or None")
            return None
        return Path(folder) / "joblib" / "skood"


class TrainingStore:
    """What is left of one training, after each of its epochs, in a folder.

    A training that was interrupted goes on from there, and one that was finished need not run. An
    entry carries a digest of its bytes: a damaged one counts as none.
    """

    def __init__(self, memory: TrainingMemory, key: str) -> None:
        self._memory = memory
        self.path = None if memory.folder is None else memory.folder / f"{key}.pt"

    def load(self, module: nn.Module) -> Progress | None:
        """The last epoch kept of a module; None if there is none, or if it cannot be used."""
        if self.path is None:
            return None
        try:
            content = self.path.read_bytes()
            digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() != digest:
                raise ValueError("the entry is damaged")
            progress = unpacked(payload, module)
            if not isinstance(progress, Progress):
                raise TypeError(f"the entry holds a {type(progress).__name__}")
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the classes of a network raise, if they are there
            self._memory.warn(
                "cannot use what was kept, so it is computed again",
                _reason(error),
                f"The entry is {_end_of(self.path)}",
            )
            return None
        return progress

    def save(self, progress: Progress) -> None:
        """Keep an epoch in place of the one before; whoever is killed meanwhile leaves that one."""
        if self.path is None:
            return
        try:
            self._write(progress, self.path)
        except Exception as error:  # of the disk, or of what in a network cannot be pickled
            of_disk = isinstance(error, OSError)
            remedy = "a folder with room that you may write to" if of_disk else "memory=None"
            self._memory.warn(
                "cannot keep this training, and the fit goes on without that",
                _reason(error),
                f"Pass {remedy}. The entry would be {_end_of(self.path)}",
            )

    def _write(self, progress: Progress, path: Path) -> None:
        payload = packed(progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(path.parent)
        handle, name = tempfile.mkstemp(UNFINISHED, dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def packed(progress: Progress) -> bytes:
    """An epoch as bytes, which `unpacked` understands wherever there is the same network."""
    buffer = io.BytesIO()
    torch.save(progress, buffer, pickle_module=_pickling(_Pickler, None))
    return buffer.getvalue()


def unpacked(payload: bytes, module: nn.Module) -> Progress:
    """An epoch from its bytes, with the classes and functions of a module of the same make."""
    names = _Pickler(io.BytesIO(), tensors=False)
    names.dump(module)

    class Unpickler(pickle.Unpickler):
        def find_class(self, place: str, name: str) -> Any:
            if name == _held_by_network.__name__:
                return lambda place, name: names.held.get((place, name)) or found(place, name)
            return names.held.get((place, name)) or super().find_class(place, name)

    # What was trained on a GPU goes on anywhere. The bytes are our own, and may hold code.
    progress: Progress = torch.load(
        io.BytesIO(payload),
        map_location="cpu",
        weights_only=False,
        pickle_module=_pickling(None, Unpickler),
    )
    return progress


class _Pickler(pickle.Pickler):
    """Names classes and functions that a network holds and no module does.

    Such are the local ones; and in a worker of joblib, all of those of the script.
    """

    def __init__(self, file: Any, protocol: int | None = None, *, tensors: bool = True) -> None:
        super().__init__(file, protocol)
        self.held: dict[tuple[str, str], Any] = {}
        self._tensors = tensors

    def persistent_id(self, thing: Any) -> Any:
        return "tensor" if not self._tensors and isinstance(thing, Tensor) else None

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, type | types.FunctionType):
            return NotImplemented
        name = thing.__module__, thing.__qualname__
        if found(*name) is thing:
            return NotImplemented
        if self.held.setdefault(name, thing) is not thing:
            raise pickle.PicklingError(f"the network holds two things of the name {name[1]}")
        return _held_by_network, name


def _held_by_network(place: str, name: str) -> Any:
    """Stands in a pickle for what `unpacked` finds in the network."""


def _pickling(pickler: Any, unpickler: Any) -> Any:
    """A module for pickling, as torch wants it."""
    return types.SimpleNamespace(__name__=__name__, Pickler=pickler, Unpickler=unpickler)


def training_key(
    network: Network,
    data: TrainingData,
    terms: Sequence[Term],
    recipe: Recipe,
    augment: Any,
    seed: int,
    before: Network | None = None,
) -> str:
    """Digest, in hexadecimal, of all that decides the outcome of a training.

    An `UnreadableError` says what cannot be told.
    """
    parts = {
        "module": network.public,
        "head": network.head,
        "before": None if before is None else before.public,
        "penalty": list(terms),
        "augment": augment,
        "recipe": recipe,
        "seed": seed,
        "labels": data.labels,
        "outliers": len(data.outliers),
        "processes": data.ranks.size,
        "computation": _computation(network),
    }
    hashed = hashlib.sha256()
    for name, part in parts.items():
        hashed.update(fingerprint(part, name))
    # Batches as the network gets them: what preprocess and a data set make of X is what counts.
    for rows in (data.rows, data.outliers):
        for batch in network.batcher.stream(rows):
            hashed.update(fingerprint(batch, "X"))
    return hashed.hexdigest()


def _computation(network: Network) -> dict[str, Any]:
    """In which numbers the training computes, and what rounds them."""
    return {
        "skood, torch and numpy": [Network, torch, np],  # each with its version
        "device": network.device,
        "dtypes": network.dtypes,
        "compiled": network.compiled,
        "threads": torch.get_num_threads(),
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "convolutions": torch.backends.cudnn.allow_tf32,
        "hooks": _hooks_of_all_modules(),
    }


def _hooks_of_all_modules() -> list[Any]:
    """What `torch.nn.modules.module.register_module_forward_hook` and its like have put in."""
    kinds = vars(nn.modules.module).items()
    return [list(v.values()) for k, v in kinds if k.startswith("_global_") and k.endswith("_hooks")]


def _remove_unfinished(folder: Path) -> None:
    """Remove what processes have left behind that were killed while they wrote."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(OSError):  # another process may do the same
            if time.time() - path.stat().st_mtime > SECONDS_OF_A_WRITE:
                path.unlink()


def _reason(error: Exception) -> str:
    """What an error says, without the path, which may be long."""
    text = error.strerror if isinstance(error, OSError) else None
    return _end_of(text or first_line(error) or type(error).__name__)


def _end_of(thing: Any) -> str:
    """The end of a text, which tells more of a path than its beginning."""
    text = str(thing)
    return text if len(text) <= LONGEST_QUOTE else f"...{text[-LONGEST_QUOTE:]}"
