"""Forward and backward passes of training, replayed as CUDA graphs.

A GPU is done with a small network before Python has launched its kernels. A graph launches those of
a whole pass at once, and so repeats what the host did when it was recorded. A network whose host
does something of its own in a pass (draws a random number, counts, reads a value from the GPU)
would be repeated wrongly: it is not recorded, and trains without graphs.
"""

from __future__ import annotations

import operator
import pickle
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .network import Captured, Forward, Network
from .scripted import scripted_parts

FEWEST_STEPS = 50
"""Steps of a training from which on recording, which takes as long as some ten, is worth it."""

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def worth_recording(network: Network, n_steps: int) -> bool:
    """Whether graphs are to be tried in a training of so many steps."""
    return (
        network.device.type == "cuda"
        and n_steps >= FEWEST_STEPS
        and not scripted_parts(network.module)
        # While one thread records, others must not ask the driver for memory.
        and threading.current_thread() is threading.main_thread()
    )


class Replayed:
    """Features and logits of batches in training, by graphs where they have the first one's shape.

    What graphs return is overwritten by their next replay.

    Parameters
    ----------
    network : Network
        The network, on a GPU.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._shape: torch.Size | None = None
        self._graphs: Forward | None = None

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch."""
        if self._shape is None:
            self._shape, self._graphs = batch.shape, recorded(self.network, batch)
            self.network.replayed = self._graphs is not None
        if self._graphs is None or batch.shape != self._shape:
            return self.network.features_and_logits(batch)
        return self._graphs(batch)


def recorded(network: Network, batch: Tensor) -> Forward | None:
    """Graphs of a network's passes over batches like this one; None where they would be wrong.

    Statistics and random generators are left as they were.
    """
    device = network.device
    buffers = [(buffer, buffer.clone()) for buffer in network.module.buffers()]
    state = torch.cuda.get_rng_state(device)
    try:
        with _waits_noted() as waits:
            repeats = repeats_itself(network, batch)
        return _graphs(network, batch) if repeats and not waits else None
    except Exception:
        return None  # an error of the network's own will come up without graphs too
    finally:
        torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.cuda.empty_cache()  # trials took memory of their own


def _graphs(network: Network, batch: Tensor) -> Forward:
    pool = torch.cuda.graph_pool_handle()
    index = batch.device.index
    generator = torch.cuda.default_generators[index]
    before = generator.clone_state()
    try:
        graphs = torch.cuda.make_graphed_callables(
            Captured(network), (batch.clone(),), allow_unused_input=True, pool=pool
        )
    except Exception:
        # torch goes on as if it were still recording: dropout would fail, and memory that another
        # stream has used would never be free again.
        generator.graphsafe_set_state(before)
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(index, pool)
        raise
    return cast(Forward, graphs)


def repeats_itself(network: Network, batch: Tensor) -> bool:
    """Whether nothing on the host has changed after a forward and a backward pass."""
    attributes, states = _attributes(network.module), _random_states()
    outputs = [x for x in network.features_and_logits(batch.clone()) if x.requires_grad]
    parameters = [p for p in network.module.parameters() if p.requires_grad]
    torch.autograd.grad([x.sum() for x in outputs], parameters, allow_unused=True)
    after = _attributes(network.module)
    same = len(attributes) == len(after) and all(map(operator.is_, attributes, after))
    own_generator = any(isinstance(value, GENERATORS) for value in after)
    return same and not own_generator and _random_states() == states


def _attributes(module: nn.Module) -> list[Any]:
    """The values of all attributes, and those in their dictionaries, lists and tuples."""
    values = [value for part in module.modules() for value in vars(part).values()]
    inside = [list(v.values()) if isinstance(v, dict) else v for v in values]
    return values + [v for some in inside if isinstance(some, list | tuple) for v in some]


def _random_states() -> tuple[Any, ...]:
    """States of the generators that a forward may draw from on the host."""
    of_numpy = pickle.dumps(np.random.get_state())  # noqa: NPY002, read and left alone
    return random.getstate(), of_numpy, torch.default_generator.get_state().tolist()


@contextmanager
def _waits_noted() -> Iterator[list[str]]:
    """Warnings of operations inside that make the host wait for the GPU."""
    waits: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits += [text for w in caught if "synchronizing CUDA operation" in (text := str(w.message))]
