"""Training and evaluation mode of a network, of which a part may be frozen."""

from __future__ import annotations

from torch import nn


def set_mode(module: nn.Module, training: bool) -> None:
    """Put a module in training or in evaluation mode; what is frozen keeps its statistics.

    A part is frozen if it has parameters, and none of them requires a gradient. One without
    parameters goes with the smallest part around it that has some.
    """
    module.train(training)  # which may return nothing, if it is the user's own
    if training:
        _keep_statistics(module, within_frozen=False)


def _keep_statistics(part: nn.Module, within_frozen: bool) -> None:
    """Put the frozen layers that have buffers, such as batch-norm's, in evaluation mode."""
    needs = [p.requires_grad for p in part.parameters()]
    frozen = not any(needs) if needs else within_frozen
    if frozen and any(buffer is not None for buffer in part._buffers.values()):
        part.training = False  # of the layer alone, as each part of it is asked itself
    for child in part.children():
        _keep_statistics(child, frozen)
