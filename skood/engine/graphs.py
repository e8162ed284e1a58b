"""Training steps of a small network on a GPU, replayed as CUDA graphs.

To run a network, Python launches its kernels (the GPU's programs) one by one. A GPU is done with a
small network sooner than Python with launching it. A CUDA graph is a recording of kernels, with the
memory that they read and write. One launch replays it all: here a forward pass, or a backward pass.

A replay repeats kernels alone. What Python does between them happens once, while it is recorded. So
a graph would be wrong, without an error, if the forward counts its calls, draws a random number on
the host (the CPU and its memory), keeps its weights in new memory, or reads a value from the GPU to
decide by it. Reading values also makes the recording itself fail.

So a network is recorded only if two tests find nothing:

1. Before the recording, a copy of the network makes one pass. It must leave all attributes and the
   random generators of the host as they were, and never make the host wait for the GPU.
2. After it, graphs and network make a pass with other rows and other weights than were recorded.
   Features, logits and gradients must be the same, but for rounding.

If a test or the recording fails, the network trains without graphs, from the state in which it was.
What a forward does to variables outside the network, or by the clock, is not seen.
"""

from __future__ import annotations

import gc
import io
import pickle
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .generators import random_states, restore_random_states
from .hardware import autocast
from .network import Forward, Network, trainable

FEWEST_STEPS = 50
"""Steps of a training from which on it pays to record, which takes as long as some ten of them."""

LASTING = (type, types.FunctionType, types.ModuleType, weakref.ReferenceType)
"""What a pass may use, but not change: compared by identity, because it cannot be pickled."""

PERTURBATION = 0.1
"""Change of the weights for the passes that are compared, relative to their mean size."""

TOLERANCE = 0.01
"""Relative difference that these passes may have: some kernels do not add in a fixed order."""


def replaying(network: Network, n_steps: int) -> Forward:
    """The forward to train a network with: by CUDA graphs if they pay, else the network's own.

    The network is recorded with the first batch. Batches of another shape run without graphs.

    Parameters
    ----------
    network : Network
        The network. If it is recorded, its attribute `replayed` becomes True.
    n_steps : int
        Steps of the training.

    Returns
    -------
    callable
        Features and logits of a batch, which the next call may overwrite. After the training, pass
        it to `release`.
    """
    pays = (
        network.device.type == "cuda"
        and n_steps >= FEWEST_STEPS
        # Threads that train at the same time would end up in each other's recording.
        and threading.current_thread() is threading.main_thread()
        # torch records what runs on the current GPU alone.
        and network.device.index in (None, torch.cuda.current_device())
    )
    return _Replaying(network) if pays else network.trained


def release(forward: Forward) -> bool:
    """Free the graphs of a forward, which goes on without them; whether there were any."""
    if not isinstance(forward, _Replaying) or forward.graphs is None:
        return False
    forward.graphs = None
    _free()
    return True


class _Replaying:
    """A forward by graphs, once the first batch has been recorded."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.shape: torch.Size | None = None
        self.graphs: Forward | None = None

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if self.shape is None:
            self.shape, self.graphs = batch.shape, _recorded(self.network, batch)
            _free()  # what the tests took
            self.network.replayed |= self.graphs is not None
        if self.graphs is None:
            return self.network.trained(batch)
        if batch.shape != self.shape:
            return self.network.captured(batch)
        return self.graphs(batch)


def _free() -> None:
    gc.collect()  # graphs refer to themselves
    torch.cuda.empty_cache()


def _recorded(network: Network, batch: Tensor) -> Forward | None:
    """Graphs for batches of this shape, or None if they would be wrong.

    The network and the random generators are left as they were.
    """
    generator = torch.default_generator
    if batch.is_cuda:
        generator = torch.cuda.default_generators[batch.device.index]
    state = generator.get_state()
    kept: list[tuple[Tensor, Tensor]] = []

    def restore() -> None:
        generator.set_state(state)
        with torch.no_grad():
            for tensor, before in kept:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)

    try:
        tensors = _Host(network.module, batch.device).tensors
        copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
        for tensor, copy in copies:
            torch.equal(tensor, copy)  # an error for tensors that `restore` could not compare
        kept += copies
        if not _leaves_host_alone(network.uncompiled_copy(), batch):
            return None
        graphs = _record(network, batch, generator)
        return graphs if _same_results(network, graphs, batch, restore) else None
    except Exception:
        return None  # if it is the network's own, it will come up without graphs too
    finally:
        restore()


def _leaves_host_alone(twin: Network, batch: Tensor) -> bool:
    """Whether a pass, which may change this copy, changes nothing on the host and never waits."""
    twin.train(True)
    host, generators = _Host(twin.module, batch.device), random_states()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _pass(twin, twin.captured, batch)
            drew = pickle.dumps(random_states()) != pickle.dumps(generators)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            restore_random_states(generators)
    waited = any("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return not (drew or waited) and _Host(twin.module, batch.device).written == host.written


def _record(network: Network, batch: Tensor, generator: torch.Generator) -> Forward:
    """Graphs of the network's forward and backward pass; its dropout draws from the generator."""
    weights, precision = trainable(network.module), network.precision.training

    def forward(batch: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(batch.device, precision):  # in here, so that the backward pass has none
            return network.captured(batch)

    gc.collect()  # the end of older graphs must not fall into this recording
    before = generator.clone_state()
    try:
        # If recording fails, torch stays on its stream: the outer context leads back.
        here = torch.cuda.current_stream(batch.device)
        with torch.cuda.stream(here), autocast(batch.device, None):
            graphs = torch.cuda.make_graphed_callables(
                forward, (batch.clone(), *weights), allow_unused_input=True
            )
    except BaseException:
        # The generator still waits for the recording to end; its state from before does not. No
        # public call frees the memory of a failed recording: torch up to 2.13 keeps it until the
        # process ends, and before 2.13 also the memory of each later batch that came by a stream of
        # its own. This is rare: the test before finds most of what makes a recording fail.
        generator.graphsafe_set_state(before)
        raise
    return lambda batch: cast(Forward, graphs)(batch, *weights)


def _same_results(
    network: Network, graphs: Forward, batch: Tensor, restore: Callable[[], None]
) -> bool:
    """Whether graphs and network agree, but for rounding, on other rows and weights than recorded.

    The weights are left changed; `restore` takes that back.
    """
    others = batch.clone()  # with the same strides
    others.copy_(batch.roll(1, dims=0))

    def results(forward: Forward) -> list[Tensor]:
        restore()  # the generator too: both get the same weights and the same dropout
        with torch.no_grad():
            for p in trainable(network.module):
                p.add_(PERTURBATION * p.abs().mean() * torch.randn_like(p))
        return _pass(network, forward, others)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients come from the stream of the recording
        pairs = zip(results(network.captured), results(graphs), strict=True)
    return all(bool((x - y).norm() <= TOLERANCE * x.norm()) for x, y in pairs)


def _pass(network: Network, forward: Forward, batch: Tensor) -> list[Tensor]:
    """Features, logits, and all gradients in one, of a forward and a backward pass as in a step."""
    with autocast(batch.device, network.precision.training):
        outputs = forward(batch.clone())
    # Weighted, because a plain sum over the rows has no gradient through batch-norm.
    slopes = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x) for x in outputs]
    losses = [(x * y).sum() for x, y in zip(outputs, slopes, strict=True) if x.requires_grad]
    with autocast(batch.device, None):
        gradients = torch.autograd.grad(losses, trainable(network.module), allow_unused=True)
    together = torch.cat([g.flatten().float() for g in gradients if g is not None])
    return [*(x.detach().float().clone() for x in outputs), together]


class _Host(pickle.Pickler):
    """What the host knows of a network on a device: its attributes, with all that is in them.

    `written` is a pickle of them, which differs if a pass changed one; `tensors` are those in it. A
    network that cannot be pickled raises an error.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        file = io.BytesIO()
        super().__init__(file)
        self._device = device
        self._parts = {id(part) for part in module.modules()}
        self._things: dict[int, Any] = {}  # kept, so that nothing else takes their identity
        self.dump([vars(part) for part in module.modules()])
        self.written = file.getvalue()
        self.tensors = [thing for thing in self._things.values() if isinstance(thing, Tensor)]

    def persistent_id(self, thing: Any) -> Any:
        """Write a thing by its identity, or by value if this is None."""
        if isinstance(thing, Tensor):
            self._things[id(thing)] = thing
            # Values on the device may change: graphs change them too.
            values = None if thing.device == self._device else thing.detach().tolist()
            return id(thing), thing.data_ptr(), values
        if isinstance(thing, LASTING) or id(thing) in self._parts:
            self._things[id(thing)] = thing
            return id(thing)
        return None
