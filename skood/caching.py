"""Trained networks kept on disk, keyed by the bytes of everything that made them."""

from __future__ import annotations

import hashlib
import inspect
import marshal
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
from joblib import Memory
from torch import Tensor, nn

from .engine.batches import as_array, slices
from .engine.network import Network
from .engine.training import Objective, Recipe, Record, TrainingData

__all__ = ["training_key", "with_memory"]

Result = tuple[list[Record], dict[str, Tensor]]


def with_memory(
    memory: str | Memory, key: str, network: Network, run: Callable[[], list[Record]]
) -> list[Record]:
    """Train a network, or load what an equal training left in a memory.

    Parameters
    ----------
    memory : str or joblib.Memory
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
    memory = Memory(memory, verbose=0) if isinstance(memory, str) else memory
    history, weights = memory.cache(_trained, ignore=["network", "run"])(key, network, run)
    network.module.load_state_dict(weights)
    return history


def _trained(key: str, network: Network, run: Callable[[], list[Record]]) -> Result:
    history = run()
    return history, {
        name: tensor.detach().cpu().clone() for name, tensor in network.module.state_dict().items()
    }


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
        str(network.precision),
        network.compiled,
        objective.sparsity_weight,
        objective.outlier_weight,
        recipe,
        seed,
    )
    digest.update(repr(settings).encode())
    for code in (network.module, network.batcher.preprocess, objective.penalty, augment):
        digest.update(_code_bytes(code))
    for name, tensor in network.module.state_dict().items():
        _update(digest, name, tensor)
    for name in ("rows", "labels", "outliers"):
        _update(digest, name, torch.from_numpy(getattr(data, name)))
    for rows in (data.rows, data.outliers):
        for piece in slices(len(rows), 4096):
            chunk = as_array(data.X[rows[piece]])
            digest.update(f"{chunk.dtype}{chunk.shape}".encode())
            digest.update(chunk.tobytes())
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _code_bytes(code: Any) -> bytes:
    """What decides the behaviour of a module, a function or another object."""
    if isinstance(code, nn.Module):
        return "".join(
            f"{name}:{part.extra_repr()}:{_source(type(part))}"
            for name, part in code.named_modules()
        ).encode()
    if isinstance(code, types.FunctionType):
        named = {name: code.__globals__.get(name) for name in code.__code__.co_names}
        values = [
            *(code.__defaults__ or ()),
            *(cell.cell_contents for cell in code.__closure__ or ()),
        ]
        used = [
            value for value in named.values() if not inspect.ismodule(value) and value is not code
        ]
        return marshal.dumps(code.__code__) + b"".join(
            _code_bytes(value) for value in [*values, *used]
        )
    return pickle.dumps(code) + _source(type(code)).encode()


def _source(thing: type) -> str:
    name = f"{thing.__module__}.{thing.__qualname__}"
    try:
        return name + inspect.getsource(thing)
    except (OSError, TypeError):
        return name
