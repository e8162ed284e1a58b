"""Forward and backward passes of training, replayed as CUDA graphs.

A GPU is done with a small network before Python has launched its kernels. A graph launches those of
a whole pass at once, and so repeats what the host did when it was recorded. A network whose host
does something of its own in a pass (draws a random number, counts, reads a value from the GPU)
would be repeated wrongly. So each is watched in one pass before it is recorded, and what was
recorded is compared with it afterwards. Where anything differs, it trains without graphs.
"""

from __future__ import annotations

import gc
import io
import pickle
import random
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .hardware import autocast
from .network import Forward, Network, trainable

FEWEST_STEPS = 50
"""Steps of a training from which on recording, which takes as long as some ten, is worth it."""

LASTING = (type, types.FunctionType, types.ModuleType, weakref.ReferenceType)
"""Attributes that stand for themselves, beside the parts of a network."""

SEED = 0
"""Of the dropout in which two passes are compared."""

PERTURBATION = 0.1
"""Change of the weights for it, as a share of their size."""

TOLERANCE = 0.01
"""Relative difference that kernels may make which do not add in a fixed order."""


def worth_recording(network: Network, n_steps: int) -> bool:
    """Whether graphs are to be tried in a training of so many steps."""
    return (
        network.device.type == "cuda"
        and n_steps >= FEWEST_STEPS
        # Threads that train would disturb each other's recording.
        and threading.current_thread() is threading.main_thread()
        and _records_on(network.device)
    )


def _records_on(device: torch.device) -> bool:
    """Whether torch would record what runs on a GPU, and not on another."""
    current = torch.cuda.current_device()
    stream = getattr(torch.cuda.graph, "default_capture_stream", None)
    return device.index in (None, current) and (stream is None or stream.device.index == current)


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
            _free()  # what trials took
            self.network.replayed |= self._graphs is not None
        if self._graphs is None:
            return self.network.features_and_logits(batch)
        if batch.shape != self._shape:
            return self.network.captured(batch)
        return self._graphs(batch)

    def release(self) -> bool:
        """Go on without graphs, whose memory becomes free; whether there were any."""
        if self._graphs is None:
            return False
        self._graphs = None
        _free()
        return True


def _free() -> None:
    """Give back the memory of graphs, which refer to themselves, and of their trials."""
    gc.collect()
    torch.cuda.empty_cache()


def recorded(network: Network, batch: Tensor) -> Forward | None:
    """Graphs of a network's passes over batches like this one; None where they would be wrong.

    Statistics and random generators are left as they were.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    generator = _generator(batch.device)
    state = generator.get_state()

    def restore() -> None:
        generator.set_state(state)
        with torch.no_grad():
            for tensor, before in kept:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)

    try:
        known = _host_state(network.module, batch.device)
        if known is None or any(t.layout != torch.strided or t.is_meta for t in known.tensors):
            return None
        kept += [(t, t.clone()) for t in known.tensors if not t.requires_grad]
        twin = network.uncompiled_copy()
        with _waits_noted() as waits:
            repeats = repeats_itself(twin, batch)
        del twin
        if waits or not repeats:
            return None
        graphs = _graphs(network, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the stream on which graphs were recorded
            return graphs if agree(network, graphs, batch, restore) else None
    except Exception:
        return None  # if it is the network's own, it will come up without graphs too
    finally:
        restore()


class Captured(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.trained = nn.ParameterList(network.module.parameters())
        self.network = network


def replaying(network, n_steps):
    return Replayed(network) if worth_recording(network, n_steps) else network.features_and_logits


def release(forward):
    return isinstance(forward, Replayed) and forward.release()


class _Recordable(Captured):
    """Without the compiler, and with its autocast inside, so that the backward pass has none."""

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(batch.device, self.network.precision.training):
            return self.network.captured(batch)


def _graphs(network: Network, batch: Tensor) -> Forward:
    gc.collect()  # graphs of an earlier training would end up in this one's recording
    index, stream = batch.device.index, torch.cuda.current_stream(batch.device)
    pool = torch.cuda.graph_pool_handle()
    generator = _generator(batch.device)
    before = generator.clone_state()
    try:
        with autocast(batch.device, None):
            graphs = torch.cuda.make_graphed_callables(
                _Recordable(network), (batch.clone(),), allow_unused_input=True, pool=pool
            )
    except BaseException:
        # torch goes on as if it were still recording: on another stream, where dropout fails, and
        # memory that a second stream has used is never free again.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            with suppress(AttributeError, RuntimeError):
                getattr(torch._C, name)(index, pool)
        raise
    return cast(Forward, graphs)


def repeats_itself(network: Network, batch: Tensor) -> bool:
    """Whether a forward and a backward pass change nothing on the host.

    Random generators are left as they were; the network is a copy, for which it does not matter.
    """
    attributes, states = _host_state(network.module, batch.device), _random_states()
    try:
        outputs = [x for x in network.features_and_logits(batch.clone()) if x.requires_grad]
        _gradients([x.sum() for x in outputs], network)
    finally:
        drew = _random_states() != states
        if drew:
            _restore_random_states(states)
    after = _host_state(network.module, batch.device)
    same = attributes is not None and after is not None and after.written == attributes.written
    return same and not drew


def agree(network: Network, graphs: Forward, batch: Tensor, restore: Callable[[], None]) -> bool:
    """Whether graphs give what the network gives, for other rows and weights than the recorded.

    Parameters
    ----------
    network : Network
        The network, whose weights are left as they were.
    graphs : callable
        Features and logits of a batch.
    batch : Tensor
        Rows; others are made of them.
    restore : callable
        Takes back what passes change in the network beside its weights.

    Returns
    -------
    bool
        Whether features, logits and gradients are the same, but for rounding.
    """
    parameters = trainable(network.module)
    weights = [p.detach().clone() for p in parameters]
    others = batch.clone()  # in the same layout
    others.copy_(batch.roll(1, dims=0))
    generator = _generator(batch.device)

    def passes(forward: Forward) -> list[Tensor]:
        restore()
        generator.manual_seed(SEED)
        with autocast(batch.device, network.precision.training):
            outputs = forward(others.clone())
        # Not their plain sums, of which batch-norm would have no gradient.
        losses = [(x * _slope(x)).sum() for x in outputs if x.requires_grad]
        given = [g.detach().flatten().float() for g in _gradients(losses, network)]
        return [*(x.detach().float().clone() for x in outputs), torch.cat(given)]

    try:
        generator.manual_seed(SEED)
        with torch.no_grad():
            for p in parameters:
                p.add_(PERTURBATION * p.abs().mean() * torch.randn_like(p))
        pairs = zip(passes(network.captured), passes(graphs), strict=True)
        return all(
            x.shape == y.shape and bool((x - y).norm() <= TOLERANCE * x.norm()) for x, y in pairs
        )
    finally:
        with torch.no_grad():
            for p, weight in zip(parameters, weights, strict=True):
                p.copy_(weight)


def _slope(values: Tensor) -> Tensor:
    return torch.linspace(-1, 1, values.numel(), device=values.device).view_as(values)


def _gradients(losses: list[Tensor], network: Network) -> list[Tensor]:
    """Those that there are, of a backward pass without autocast, as that of a step."""
    with autocast(network.device, None):
        gradients = torch.autograd.grad(losses, trainable(network.module), allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def _generator(device: torch.device) -> torch.Generator:
    """The generator of a device's dropout."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index]


@dataclass
class _HostState:
    """What the host knows of a network, written down, and the things that it refers to."""

    written: bytes
    things: list[Any]

    @property
    def tensors(self) -> list[Tensor]:
        return list({id(x): x for x in self.things if isinstance(x, Tensor)}.values())


class _Writer(pickle.Pickler):
    """Writes attributes by value, and by identity what a pass may use and cannot change."""

    def __init__(self, file: io.BytesIO, module: nn.Module, device: torch.device) -> None:
        super().__init__(file)
        self.device = device
        self.parts = {id(part) for part in module.modules()}
        self.things: list[Any] = []  # while they are kept, no other has their identity

    def persistent_id(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            self.things.append(thing)
            # On the device of the network, kernels may change them: a graph does so too.
            values = None if thing.device == self.device else thing.detach().tolist()
            return id(thing), thing.data_ptr(), values
        if id(thing) in self.parts or isinstance(thing, LASTING) or _is_plain_builtin(thing):
            self.things.append(thing)
            return id(thing)
        return None


def _is_plain_builtin(thing: Any) -> bool:
    """Whether it is a function of C's, and not a method of an object that it may change."""
    if not isinstance(thing, types.BuiltinFunctionType):
        return False
    owner = thing.__self__
    return owner is None or isinstance(owner, type | types.ModuleType)


def _host_state(module: nn.Module, device: torch.device) -> _HostState | None:
    """The attributes of a network on a device, with all in them; None where they cannot be told."""
    file = io.BytesIO()
    writer = _Writer(file, module, device)
    try:
        writer.dump([vars(part) for part in module.modules()])
    except Exception:
        return None
    return _HostState(file.getvalue(), writer.things)


def _random_states() -> tuple[Any, ...]:
    """States of the generators that a forward may draw from on the host."""
    of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002, a pass must not change it
    return random.getstate(), pickle.dumps(of_numpy), torch.default_generator.get_state().tolist()


def _restore_random_states(states: tuple[Any, ...]) -> None:
    of_python, of_numpy, of_torch = states
    random.setstate(of_python)
    np.random.set_state(pickle.loads(of_numpy))  # noqa: NPY002
    torch.default_generator.set_state(torch.tensor(of_torch, dtype=torch.uint8))


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
