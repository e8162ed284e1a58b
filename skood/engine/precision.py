"""Number formats of training: float32 weights for networks in 16 bits, and steps that are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..exceptions import PrecisionWarning
from ..notices import first_line, warn_user
from .copying import deepcopied, named_tensors
from .hardware import autocast
from .modes import set_mode
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
    module, batcher, precision = network.public, network.batcher, network.precision
    if not _has_16_bits(module):
        yield
        return
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(module).items()}
    dtype = torch.float32 if batcher.dtype in SIXTEEN_BITS else batcher.dtype
    network.batcher = dataclasses.replace(batcher, dtype=dtype)
    network.precision = dataclasses.replace(precision, scoring=precision.training)
    network.adopt(module._apply(widened))
    try:
        yield
    finally:
        module = network.public  # another, if it was trained
        own = {id(tensor): dtypes[name] for name, tensor in named_tensors(module).items()}
        network.adopt(module._apply(lambda tensor: tensor.to(own.get(id(tensor), tensor.dtype))))
        network.batcher, network.precision = batcher, precision


def check_scores_in(module: nn.Module, batch: Tensor, precision: torch.dtype | None) -> None:
    """Refuse a precision in which a network that works in its own cannot score."""
    if precision is None:
        return
    try:
        with autocast(batch.device, precision):
            run(module, batch.clone())
    except Exception as error:
        raise ValueError(_not_in(precision, error)) from error


def settle_precision(network: Network, batch: Tensor) -> None:
    """Let a network train in a precision in which a step works.

    Where "auto" chose bfloat16, float32 takes its place with a warning. A network in 16 bits whose
    forward asks for them has float32 weights, and computes in bfloat16. A ValueError says if the
    precision that the user asked for, or every one, fails.
    """
    precision, in_16_bits = network.precision, _has_16_bits(network.module)
    if precision.training is None and not in_16_bits:
        return
    error = failure_in_training(network.module, batch, precision.training)
    if error is None:
        return
    other = None if precision.training is not None else torch.bfloat16
    if failure_in_training(network.module, batch, other) is not None:
        if not in_16_bits:
            return  # its own error comes up in training
        raise ValueError(
            "The network has weights in 16 bits, of which small steps change few, and cannot be "
            f"trained with float32 weights instead ({_shown(error)}). Remove what fixes a "
            "dtype in forward, as x.half() does, or pass module.float(); or pass max_epochs=0 "
            "(and pretrain_epochs=0) to use it as it is."
        ) from error
    if precision.scoring is not None:
        raise ValueError(_not_in(precision.scoring, error)) from error
    network.precision = dataclasses.replace(precision, training=other)
    if other is None:
        warn_user(
            f"The network cannot be trained in bfloat16 ({_shown(error)}), so it is trained "
            'in float32, which takes longer. Pass precision="float32" to say so yourself.',
            PrecisionWarning,
        )


def failure_in_training(
    module: nn.Module, batch: Tensor, precision: torch.dtype | None
) -> Exception | None:
    """What one training step of a copy raises, in a precision; None if it works.

    No random generator of torch's moves.
    """
    gpus = [batch.device] if batch.is_cuda else []
    try:
        twin = deepcopied(module)._apply(widened)
        set_mode(twin, training=True)
        with torch.random.fork_rng(devices=gpus), torch.enable_grad():
            with autocast(batch.device, precision):
                logits = widened(run(twin, widened(batch.clone())))
            if logits.requires_grad:
                # Weighted, because a plain sum over the rows has no gradient through batch-norm.
                weights = torch.linspace(-1, 1, logits.numel()).to(logits)
                loss = (logits * weights.view_as(logits)).sum()
                # Into no parameter of the user's, should a forward reach one in training mode.
                torch.autograd.grad(loss, trainable(twin), allow_unused=True)
    except Exception as error:
        return error
    return None


def _not_in(precision: torch.dtype, error: Exception) -> str:
    name = str(precision).removeprefix("torch.")
    return (
        f'The network does not work with precision="{name}" ({_shown(error)}). Pass '
        'precision="float32" or "auto".'
    )


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:90]}"


def _has_16_bits(module: nn.Module) -> bool:
    return any(tensor.dtype in SIXTEEN_BITS for tensor in named_tensors(module).values())
