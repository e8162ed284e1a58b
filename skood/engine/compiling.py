"""Forwards through torch.compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .copying import deepcopied
from .modes import set_mode
from .outputs import run


class Compiled:
    """Features and logits of a module, by one compiled forward.

    It uses the tensors of the module, and none of its attributes.
    """

    def __init__(self, module: nn.Module, head: str, device: torch.device) -> None:
        # A second module on the same tensors, for hooks that must not show in the first.
        shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._view = deepcopied(module, shared)
        self._forward = _compiled_forward(self._view, head, device)

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch."""
        return self._forward(batch)

    def train(self, training: bool) -> None:
        """Put the compiled module in training or in evaluation mode."""
        set_mode(self._view, training)


def _compiled_forward(
    module: nn.Module, head: str, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # The compiler wants one lasting hook, where a hook per forward would make it compile again each
    # time.
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["features"] = [*args, *kwargs.values()][0]

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = run(module, batch)
        return kept["features"].flatten(1), logits

    module.get_submodule(head).register_forward_pre_hook(keep, with_kwargs=True)
    plain = torch.compile(forward, dynamic=False)
    if device.type != "cuda":
        return plain
    # On a GPU, the kernels of a forward are launched as one CUDA graph, as the shapes are fixed.
    graphed = torch.compile(forward, dynamic=False, mode="reduce-overhead")

    def replayed(batch: Tensor) -> tuple[Tensor, Tensor]:
        # Graphs belong to a thread, and those of training would hold its activations twice.
        if torch.is_grad_enabled() or threading.current_thread() is not threading.main_thread():
            return plain(batch)
        torch.compiler.cudagraph_mark_step_begin()
        features, logits = graphed(batch)
        # Copies, as the next replay writes into the same memory.
        return features.clone(), logits.clone()

    return replayed
