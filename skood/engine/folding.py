"""Batch-norms folded into the layers before them, for scoring.

In evaluation mode a batch-norm is an affine function of each channel, as is the convolution or
linear layer whose output it takes: one layer can do the work of both, with other weights. Which
batch-norm takes whose output is told by a forward, in which each operation is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can do the work of a batch-norm after them."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Pair = tuple[str, str]
"""Names of a layer, and of the batch-norm that alone takes its output."""


def foldable(module: nn.Module, batch: Tensor) -> tuple[Pair, ...]:
    """The pairs of a module in evaluation mode, found in one forward.

    A layer and a batch-norm are a pair if each is called once, and nothing else uses what the layer
    returns. Those of other kinds than torch's own, with hooks or without statistics are left out.
    """
    parts = dict(module.named_modules())
    layers = {n: part for n, part in parts.items() if type(part) in LAYERS and _is_plain(part)}
    norms = {n: part for n, part in parts.items() if type(part) in NORMS and _is_plain(part)}
    if not (layers and norms):
        return ()
    with torch.no_grad(), _watched(layers, norms) as flow:
        module(batch.clone())
    return flow.pairs()


def are_in(module: nn.Module, pairs: Sequence[Pair]) -> bool:
    """Whether a module has layers and batch-norms by the names of pairs; they may be lazy."""
    parts = dict(module.named_modules())
    return all(
        isinstance(parts.get(layer), LAYERS) and isinstance(parts.get(norm), _BatchNorm)
        for layer, norm in pairs
    )


class Folded:
    """A view of a module in which one layer does the work of each pair.

    Its tensors are those of the module, but for the layers that are folded.
    """

    @torch.no_grad()
    def __init__(self, view: nn.Module, pairs: Sequence[Pair]) -> None:
        self.module = view
        self._weights: list[Tensor] = []
        self._counted: list[Tensor] = []
        for names in pairs:
            layer, norm = (view.get_submodule(name) for name in names)
            self._weights.append(layer.get_parameter("weight"))
            tensors = [*layer.parameters(), *norm.parameters(), *norm.buffers()]
            self._counted += [tensor.detach() for tensor in tensors]  # faster to ask, as plain ones
            _fold(layer, norm)
        self._made_from = self._state()

    def is_fresh(self) -> bool:
        """Whether the tensors that were folded have stayed as they were."""
        return self._state() == self._made_from

    def _state(self) -> tuple[list[int], list[int]]:
        """Changes of tensors as torch counts them, and where weights lie."""
        changes, place = attrgetter("_version"), Tensor.data_ptr
        return list(map(changes, self._counted)), list(map(place, self._weights))


def _fold(layer: Any, norm: Any) -> None:
    """Let a layer do the work of a batch-norm too.

    Both stay in their places, as the module may hold them by other names, or in lists.
    """
    layer.weight, layer.bias = fuse_conv_bn_weights(
        *(layer.weight, layer.bias),
        *(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias),
    )
    norm.forward = _unchanged


def _unchanged(input: Tensor) -> Tensor:
    return input


def _is_plain(part: nn.Module) -> bool:
    """Whether a layer does what its class does, by tensors that it holds in evaluation mode."""
    changed = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
    return not changed and getattr(part, "running_var", part) is not None


class _Flow(TorchDispatchMode):
    """Notes what takes the outputs of layers: a batch-norm by name, or another operation."""

    def __init__(self) -> None:
        super().__init__()
        self._norm: str | None = None
        self._calls: list[str] = []
        self._made = WeakTensorKeyDictionary()  # outputs that are still there: names of layers
        self._takers: dict[str, set[str | None]] = {}

    def made(self, layer: str, output: Tensor) -> None:
        """Note the output of a layer."""
        self._calls.append(layer)
        self._made[output] = layer

    def enter(self, norm: str) -> None:
        """Note that a batch-norm runs."""
        self._calls.append(norm)
        self._norm = norm

    def leave(self) -> None:
        """Note that it has run."""
        self._norm = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf in self._made:
                self._takers.setdefault(self._made[leaf], set()).add(self._norm)
        return func(*args, **(kwargs or {}))

    def pairs(self) -> tuple[Pair, ...]:
        """Layers whose output one batch-norm took alone, in order of their calls."""
        calls = Counter(self._calls)
        return tuple(
            (layer, norm)
            for layer, takers in self._takers.items()
            for norm in takers
            if norm is not None and len(takers) == calls[layer] == calls[norm] == 1
        )


@contextmanager
def _watched(layers: dict[str, nn.Module], norms: dict[str, nn.Module]) -> Iterator[_Flow]:
    """A flow, to which layers and batch-norms tell what they do."""
    flow = _Flow()

    def hooks() -> Iterator[Any]:
        for name, layer in layers.items():
            yield layer.register_forward_hook(lambda _, args, output, n=name: flow.made(n, output))
        for name, norm in norms.items():
            yield norm.register_forward_pre_hook(lambda _, args, n=name: flow.enter(n))
            yield norm.register_forward_hook(lambda *_: flow.leave())

    handles = list(hooks())
    try:
        with flow:
            yield flow
    finally:
        for handle in handles:
            handle.remove()
