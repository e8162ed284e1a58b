"""Number formats of training: float32 weights for networks in 16 bits, and steps that are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .copying import copy_module
from .hardware import autocast
from .network import Network, trainable
from .outputs import run

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def widened(values: Tensor) -> Tensor:
    """Values in float32 if they have 16 bits, else themselves."""
    return values.float() if values.dtype in SIXTEEN_BITS else values


@contextmanager
def in_float32(network: Network) -> Iterator[None]:
    """Inside, what a network has in 16 bits is in float32; small steps would be rounded away.

    At the end, each tensor is rounded to the dtype that it had.
    """
    module, batcher = network.module, network.batcher
    dtypes = {name: tensor.dtype for name, tensor in _state(module).items()}
    if not any(dtype in SIXTEEN_BITS for dtype in dtypes.values()):
        yield
        return
    dtype = torch.float32 if batcher.dtype in SIXTEEN_BITS else batcher.dtype
    network.batcher = dataclasses.replace(batcher, dtype=dtype)
    network.adopt(module._apply(widened))
    try:
        yield
    finally:
        module = network.module  # another, if a training was resumed
        own = {id(tensor): dtypes[name] for name, tensor in _state(module).items()}
        network.adopt(module._apply(lambda tensor: tensor.to(own.get(id(tensor), tensor.dtype))))
        network.batcher = batcher


def failure_in_training(
    module: nn.Module, batch: Tensor, precision: torch.dtype | None
) -> Exception | None:
    """What one training step of a copy raises, in a precision; None if it works.

    No random generator of torch's moves.
    """
    gpus = [batch.device] if batch.is_cuda else []
    try:
        twin = copy_module(module)._apply(widened).train()
        with torch.random.fork_rng(devices=gpus), torch.enable_grad():
            with autocast(batch.device, precision):
                logits = widened(run(twin, widened(batch.clone())))
            if logits.requires_grad:
                # Weighted, because a plain sum over the rows has no gradient through batch-norm.
                weights = torch.linspace(-1, 1, logits.numel()).to(logits)
                loss = (logits * weights.view_as(logits)).sum()
                torch.autograd.grad(loss, trainable(twin), allow_unused=True)
    except Exception as error:
        return error
    return None


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
