"""Trained networks kept on disk, keyed by the bytes of everything that made them."""

from __future__ import annotations

import hashlib
import io
import marshal
import os
import pickle
import sys
import sysconfig
import tempfile
import types
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Memory
from torch import Tensor

from .engine.network import Network
from .engine.objective import Term
from .engine.training import Progress, Recipe, TrainingData
from .exceptions import MemoryEntryWarning
from .notices import warn_user

__all__ = ["TrainingStore", "fingerprint", "training_key"]

DIGEST_BYTES = hashlib.sha256().digest_size

# What a class holds that decides behaviour: its functions and plain values.
TELLING = (
    types.FunctionType,
    property,
    staticmethod,
    classmethod,
    int,
    float,
    str,
    tuple,
    list,
    Tensor,
    np.ndarray,
)


class TrainingStore:
    """What is left of one training, after each of its epochs, in a folder.

    A training that was interrupted goes on from there, and one that was finished need not run. An
    entry carries a digest of its bytes: a damaged one counts as none. If `memory` is a
    `joblib.Memory`, its folder is used, which its ``clear`` empties.
    """

    def __init__(self, memory: str | PathLike[str] | Memory, key: str) -> None:
        memory = memory if isinstance(memory, Memory) else Memory(os.fspath(memory), verbose=0)
        backend = memory.store_backend
        self.path = None if backend is None else Path(backend.location) / "skood" / f"{key}.pt"

    def load(self) -> Progress | None:
        """The last epoch that was kept; None if there is none, or if it is damaged."""
        if self.path is None or not self.path.exists():
            return None
        content = self.path.read_bytes()
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            warn_user(
                f"{self.path} is damaged, so what it kept is computed again.",
                MemoryEntryWarning,
            )
            return None
        # What was trained on a GPU goes on anywhere. The bytes are our own, so they may hold code.
        progress: Progress = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)
        return progress

    def save(self, progress: Progress) -> None:
        """Keep an epoch in place of the one before; whoever is killed meanwhile leaves that one."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save(progress, buffer)
        payload = buffer.getvalue()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        try:
            os.replace(file.name, self.path)
        except BaseException:
            os.unlink(file.name)
            raise


def training_key(
    network: Network,
    data: TrainingData,
    terms: Sequence[Term],
    recipe: Recipe,
    augment: Any,
    seed: int,
) -> str:
    """Digest, in hexadecimal, of all that decides the outcome of a training."""
    digest = hashlib.sha256()
    settings = (
        torch.__version__,
        torch.get_num_threads(),
        str(network.device),
        data.ranks.size,
        network.precision,
        network.compiled,
        [(type(term).__name__, vars(term)) for term in terms],
        recipe,
        augment,
        seed,
    )
    digest.update(fingerprint((settings, network.public, data.labels, len(data.outliers))))
    # Batches as the network gets them: what preprocess and a data set make of X is what counts.
    for rows in (data.rows, data.outliers):
        for batch in network.batcher.stream(rows):
            digest.update(fingerprint(batch))
    return digest.hexdigest()


def fingerprint(thing: Any) -> bytes:
    """Bytes that are equal for things that behave alike, and outlive the process.

    They hold the code of functions and classes, and the values they use. A TypeError says if a part
    can be neither pickled nor read.
    """
    buffer = io.BytesIO()
    try:
        _Fingerprinter(buffer).dump(thing)
    except Exception as error:
        raise TypeError(
            f"memory= cannot tell what decides the training: {error}. Pass memory=None, or modules "
            "and callables whose attributes can be pickled."
        ) from error
    return buffer.getvalue()


class _Fingerprinter(pickle.Pickler):
    """Pickles behaviour instead of references: code, source and bytes, never names alone."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=4)
        # Without a memo, equal things give equal bytes, whichever of their parts are one object.
        self.fast = True
        self._seen: set[int] = set()

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.ModuleType):
            return str, (_source_of_module(thing),)
        if isinstance(thing, Tensor):
            raw = thing.detach().cpu().contiguous().flatten()
            values = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
            return tuple, ((str(thing.dtype), tuple(thing.shape), thing.requires_grad, values),)
        if isinstance(thing, np.ndarray) and thing.dtype != object:
            return tuple, ((str(thing.dtype), thing.shape, thing.tobytes()),)
        if isinstance(thing, type) and thing.__module__ != "builtins":
            return self._class(thing)
        if isinstance(thing, property):
            return tuple, ((thing.fget, thing.fset),)
        if isinstance(thing, staticmethod | classmethod):
            return tuple, ((thing.__func__,),)
        return NotImplemented

    def _class(self, thing: type) -> Any:
        name = f"{thing.__module__}.{thing.__qualname__}"
        if id(thing) in self._seen or _is_installed(sys.modules.get(thing.__module__)):
            return str, (name,)
        self._seen.add(id(thing))
        own = {
            key: value
            for key, value in vars(thing).items()
            if isinstance(value, TELLING) and key not in ("__doc__", "__module__")
        }
        return tuple, ((name, thing.__bases__, own),)

    def _function(self, function: types.FunctionType) -> Any:
        if id(function) in self._seen:  # functions may call each other
            return str, (function.__qualname__,)
        self._seen.add(id(function))
        names = _names_used(function.__code__)
        used = {name: function.__globals__[name] for name in names if name in function.__globals__}
        # What the function reaches through modules of the user's, such as helpers.scale.
        reached = [
            getattr(value, name)
            for value in used.values()
            if isinstance(value, types.ModuleType) and not _is_installed(value)
            for name in names
            if hasattr(value, name)
        ]
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
        code = marshal.dumps(_unplaced(function.__code__), 2)  # 2 has no reference counts in it
        return tuple, (
            (code, function.__defaults__, function.__kwdefaults__, closure, used, reached),
        )


def _unplaced(code: types.CodeType) -> types.CodeType:
    """Code without its file and lines, which change when other code of the file does."""
    constants = (_unplaced(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(
        co_consts=tuple(constants), co_filename="", co_firstlineno=1, co_linetable=b""
    )


def _names_used(code: types.CodeType) -> list[str]:
    """Names that a function and those defined in it look up, in order."""
    nested = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return [*code.co_names, *(name for part in nested for name in _names_used(part))]


def _source_of_module(module: types.ModuleType) -> str:
    """Name of an installed module, whose version decides; the text of any other."""
    path = getattr(module, "__file__", None)
    if _is_installed(module) or path is None:
        return f"{module.__name__} {getattr(module, '__version__', '')}"
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _is_installed(module: types.ModuleType | None) -> bool:
    """Whether a module is Python's own or an installed package, and not the user's code."""
    path = getattr(module, "__file__", None)
    if path is None:
        return module is not None and module.__name__ != "__main__"
    return any(Path(path).is_relative_to(folder) for folder in _installation_folders())


@cache
def _installation_folders() -> list[str]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return [folder for name in names if (folder := sysconfig.get_path(name))]
