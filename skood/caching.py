"""What is computed once and kept on disk, keyed by everything that decides what it becomes.

What cannot be kept or read costs no fit: it is said once, and the fit goes on without it.
"""

from __future__ import annotations

import hashlib
import operator
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from joblib import Memory
from torch import nn

from .engine.copying import deepcopied
from .engine.network import Network
from .engine.objective import Term
from .engine.rows import Rows
from .engine.training import Progress, Recipe, TrainingData
from .exceptions import MemoryEntryWarning
from .fingerprints import UnreadableError, fingerprint
from .notices import first_line, warn_user
from .storage import (
    UNFINISHED,
    Reader,
    UnusableError,
    Writer,
    code_of,
    fits,
    from_bytes,
    replace_file,
    set_state,
    to_bytes,
)

__all__ = ["DiskMemory", "TrainingStore", "outputs_key", "packed", "training_key", "unpacked"]

T = TypeVar("T")

KIND = "training"

SETTINGS = (
    "get_float32_matmul_precision",
    "are_deterministic_algorithms_enabled",
    *("backends.cudnn.enabled", "backends.cudnn.benchmark", "backends.cudnn.deterministic"),
    *("backends.cudnn.allow_tf32", "backends.cudnn.conv.fp32_precision"),
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    *("backends.cuda.flash_sdp_enabled", "backends.cuda.mem_efficient_sdp_enabled"),
    *("backends.cuda.math_sdp_enabled", "backends.cuda.cudnn_sdp_enabled"),
    *("backends.mkldnn.enabled", "backends.mkldnn.matmul.fp32_precision"),
    "backends.mkldnn.conv.fp32_precision",
    "backends.cpu.get_cpu_capability",
)
"""Of torch: what changes the last bits of a training."""

CHOOSING_KERNELS = (
    *("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OPENBLAS_CORETYPE"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)
"""Variables of the environment that do the same."""

SECONDS_OF_A_WRITE = 24 * 3600
"""Age at which a file that is being written counts as left behind by a process that was killed."""

LONGEST_QUOTE = 120


class DiskMemory:
    """The folder of ``memory=``, during one fit or one scoring of a search.

    If `memory` is a `joblib.Memory`, its folder is used, which its ``clear`` empties. An entry is a
    file without code (see `skood.storage`) that names its key: one that is damaged, or of something
    else, counts as none.
    """

    def __init__(self, memory: str | PathLike[str] | Memory) -> None:
        self._said: set[str] = set()
        self.folder = self._folder(memory)

    @property
    def exists(self) -> bool:
        """Whether anything was ever kept: a folder of another machine may not even be there."""
        return self.folder is not None and os.path.isdir(self.folder)

    def has(self, name: str) -> bool:
        """Whether there is an entry, of whatever use."""
        path = self._path(name)
        return path is not None and os.path.exists(path)

    def entries(self, pattern: str) -> list[Path]:
        """Entries whose names are like a pattern."""
        return [] if self.folder is None else list(self.folder.glob(pattern))

    def load(self, name: str, read: Callable[[bytes], T]) -> T | None:
        """What is read of an entry; None, with a warning if it is of no use, if there is none."""
        path = self._path(name)
        if path is None:
            return None
        try:
            return read(path.read_bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # of the disk, or whatever a damaged entry may raise
            self.warn(
                "cannot use what was kept, so it is computed again",
                _reason(error),
                f"The entry is {_end_of(path)}",
            )
            return None

    def save(self, name: str, content: Callable[[], bytes]) -> None:
        """Keep an entry in place of the one before; whoever is killed meanwhile leaves that one."""
        path = self._path(name)
        if path is None:
            return
        try:
            entry = content()
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(path.parent)
            replace_file(path, entry)
        except Exception as error:  # of the disk, or of what in a network no file keeps
            of_disk = isinstance(error, OSError)
            remedy = "a folder with room that you may write to" if of_disk else "memory=None"
            self.warn(
                "cannot keep what was computed, and all goes on without that",
                _reason(error),
                f"Pass {remedy}. The entry would be {_end_of(path)}",
            )

    def key(self, make: Callable[[], str], problem: str) -> str | None:
        """A key; None, with a warning of the problem, where it cannot be told."""
        try:
            return make()
        except UnreadableError as error:
            remedy = "Remove that part, or make it one that can be pickled"
            self.warn(problem, str(error), remedy)
            return None

    def warn(self, problem: str, reason: str, remedy: str) -> None:
        """Say what is wrong with the memory, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            warn_user(f"memory= {problem}: {reason}. {remedy}.", MemoryEntryWarning)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

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
    """What is left of one training, after each of its epochs.

    A training that was interrupted goes on from there, and one that was finished need not run.
    """

    def __init__(self, memory: DiskMemory, key: str) -> None:
        self._memory = memory
        self.key = key
        self._name = f"{key}.safetensors"
        self._code: bytes | None = None

    def load(self, module: nn.Module) -> Progress | None:
        """The last epoch kept of a module to be trained; None if there is none, or none of use."""

        def read(entry: bytes) -> Progress:
            return unpacked(entry, module, self.key)

        self._code = code_of(module)
        return self._memory.load(self._name, read)

    def save(self, progress: Progress) -> None:
        """Keep an epoch in place of the one before."""

        def content() -> bytes:
            if code_of(progress.module) != self._code:
                raise UnusableError("training changes more of the network than tensors and numbers")
            return packed(progress, self.key)

        self._memory.save(self._name, content)


def packed(progress: Progress, key: str = "") -> bytes:
    """An epoch as bytes without code, which `unpacked` understands where there is the network."""
    writer = Writer()
    content = {
        "key": key,
        "history": writer.write(progress.history, "history"),
        "initial_spread": progress.initial_spread,
        "module": writer.module(progress.module, "module"),
        "optimizer": writer.write(progress.optimizer, "optimizer"),
    }
    return to_bytes(KIND, content, writer.tensors)


def unpacked(payload: bytes, module: nn.Module, key: str = "") -> Progress:
    """An epoch from its bytes, in a copy of a module of the same make."""
    content, tensors = from_bytes(KIND, payload)
    if content["key"] != key:
        raise UnusableError("the entry is of another training")
    reader = Reader(tensors)
    history, optimizer = reader.read(content["history"]), reader.read(content["optimizer"])
    if not (fits(history, list[dict[str, float]]) and fits(optimizer, dict[str, Any])):
        raise UnusableError("the entry holds something else")
    twin = set_state(deepcopied(module).cpu(), reader.state(content["module"]))
    return Progress(history, float(content["initial_spread"]), twin, optimizer)


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
    return _digest_of(parts, network, data.rows, data.outliers)


def outputs_key(network: Network, rows: Rows) -> str:
    """Digest, in hexadecimal, of all that decides what a network gives of rows.

    An `UnreadableError` says what cannot be told.
    """
    parts = {
        "module": network.public,
        "head": network.head,
        "folded": network.pairs,
        "layers": network.layers,
        "shapes": network.shapes,
        "computation": _computation(network),
    }
    return _digest_of(parts, network, rows)


def _digest_of(parts: dict[str, Any], network: Network, *several: Rows) -> str:
    """Digest of parts, and of rows as the network gets them.

    So what preprocess and a data set make of X is what counts.
    """
    hashed = hashlib.sha256()
    for name, part in parts.items():
        hashed.update(fingerprint(part, name))
    for rows in several:
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
        "settings": {name: _setting(name) for name in SETTINGS},
        "GPU": _name_of_gpu(network.device),
        "environment": {name: os.environ.get(name) for name in CHOOSING_KERNELS},
        "hooks": _hooks_of_all_modules(),
    }


def _setting(name: str) -> Any:
    """A setting of torch; None if this torch lacks it, or refuses to tell it beside others."""
    try:
        setting = operator.attrgetter(name)(torch)
        return setting() if callable(setting) else setting
    except (AttributeError, RuntimeError):
        return None


def _name_of_gpu(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


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
