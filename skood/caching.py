"""Trained networks kept on disk, keyed by the bytes of everything that made them."""

from __future__ import annotations

import hashlib
import io
import marshal
import os
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Memory
from torch import Tensor, nn

from .engine.batches import STREAM_ROWS, slices
from .engine.network import Network, on_cpu
from .engine.training import Objective, Recipe, Record, TrainingData

__all__ = ["fingerprint", "training_key", "with_memory"]

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

Result = tuple[list[Record], nn.Module]


def with_memory(
    memory: str | PathLike[str] | Memory,
    key: str,
    network: Network,
    run: Callable[[], list[Record]],
) -> list[Record]:
    """Train a network, or load what an equal training left in a memory.

    Parameters
    ----------
    memory : path or joblib.Memory
        Where results are kept.
    key : str
        From `training_key`.
    network : Network
        Trained in place by `run`, or given the weights that were kept.
    run : callable
        Trains the network and returns its history.

    Returns
    -------
    list of dict
        The history.
    """
    memory = memory if isinstance(memory, Memory) else Memory(os.fspath(memory), verbose=0)
    history, module = memory.cache(_trained, ignore=["network", "run"])(key, network, run)
    if module is not network.module:
        network.adopt(module.to(network.device))
    return history


def _trained(key: str, network: Network, run: Callable[[], list[Record]]) -> Result:
    # The module itself and not its state_dict, which leaves out what training may change as well.
    return run(), on_cpu(network.module)


def training_key(
    network: Network,
    data: TrainingData,
    objective: Objective,
    recipe: Recipe,
    augment: Any,
    seed: int,
) -> str:
    """Digest of all that decides the outcome of a training.

    Parameters
    ----------
    network : Network
        The network before training: its weights, its code, and how batches reach it.
    data : TrainingData
        Rows and labels.
    objective : Objective
        Terms of the loss.
    recipe : Recipe
        Epochs and optimizer settings.
    augment : str, callable or None
        The augmentation.
    seed : int
        The seed.

    Returns
    -------
    str
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256()
    settings = (
        torch.__version__,
        torch.get_num_threads(),
        str(network.device),
        network.precision,
        network.compiled,
        objective,
        recipe,
        augment,
        seed,
    )
    digest.update(fingerprint((settings, network.module, data.labels, len(data.outliers))))
    # Batches as the network gets them: what preprocess and a data set make of X is what counts.
    for rows in (data.rows, data.outliers):
        indices = (rows[piece] for piece in slices(len(rows), STREAM_ROWS))
        for batch in network.batcher.stream(data.X, indices, len(rows)):
            digest.update(fingerprint(batch))
    return digest.hexdigest()


def fingerprint(thing: Any) -> bytes:
    """Bytes that are equal for things that behave alike, and outlive the process.

    Parameters
    ----------
    thing : object
        Modules, functions, tensors, arrays and whatever pickle takes.

    Returns
    -------
    bytes
        Code of functions and classes, and the values they use.

    Raises
    ------
    TypeError
        If a part can be neither pickled nor read.
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
        code = marshal.dumps(function.__code__, 2)  # version 2 has no reference counts in it
        return tuple, (
            (code, function.__defaults__, function.__kwdefaults__, closure, used, reached),
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
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(Path(path).is_relative_to(folder) for folder in folders if folder)
