"""Forwards through torch.compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor], tuple[Any, Tensor]]
"""What enters the head, and logits, of a batch."""


def compiled(forward: Forward, device: torch.device) -> Forward:
    """A forward, compiled."""
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
