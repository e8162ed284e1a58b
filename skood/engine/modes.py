"""Training and evaluation mode of a network, of which a part may be frozen."""

from __future__ import annotations

from torch import nn

from ..notices import first_line


def set_mode(module: nn.Module, training: bool) -> None:
    """Put a module in training or in evaluation mode; what is frozen keeps its statistics.

    A part is frozen if it has parameters, and none of them requires a gradient. One without
    parameters goes with what comes before it in the same part. If nothing does, it goes with the
    first parameter that comes after it there, else with the part around it.
    """
    try:
        module.train(training)  # which may return nothing, if it is the user's own
    except Exception as error:
        raise TypeError(
            f"The network's own train(mode) fails at train({training}): {first_line(error)[:90]}. "
            "It must switch the mode of all parts, as torch's does: let it be "
            "train(self, mode=True) and call super().train(mode). Give a method that does other "
            "things, such as the training itself, another name."
        ) from error
    if training:
        _keep_statistics(module, beside_is_frozen=False)


def _keep_statistics(part: nn.Module, beside_is_frozen: bool) -> bool:
    """Put frozen layers with buffers in evaluation mode; whether the part as a whole is frozen."""
    needs = [p.requires_grad for p in part.parameters()]
    frozen = not any(needs) if needs else beside_is_frozen
    if frozen and any(buffer is not None for buffer in part._buffers.values()):
        part.training = False  # of the layer alone, as its parts are asked themselves
    first = next(part.parameters(), None)
    beside_is_frozen = frozen if first is None else not first.requires_grad
    for child in part.children():
        beside_is_frozen = _keep_statistics(child, beside_is_frozen)
    return frozen
