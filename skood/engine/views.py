"""Views: second modules on the tensors of a first."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .scripted import Scripted, scripted_parts

T = TypeVar("T")


def view_of(module: nn.Module, beside: T = None) -> tuple[nn.Module, T]:  # type: ignore[assignment]
    """A copy of a module on the same tensors, in the same mode, and one of what belongs to it.

    Parts in TorchScript are the same, as copies of them would have tensors of their own.
    """
    same = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    scripts = {id(part): Scripted(part.script) for part in scripted_parts(module).values()}
    with _SharedTensors():
        view, copied = copy.deepcopy((module, beside), same | scripts)
    modes = {name: part.training for name, part in parts_with_a_mode(module).items()}
    for name, part in parts_with_a_mode(view).items():
        part.training = modes.get(name, part.training)  # some copies come in training mode
    return view, copied


def parts_with_a_mode(module: nn.Module) -> dict[str, nn.Module]:
    """A module and its submodules by name, but for frozen TorchScript."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "training")}


class _SharedTensors(TorchFunctionMode):
    """Inside, copies hold the tensors of the original; those with a graph, without it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0] if args[0].is_leaf else args[0].detach()
        return func(*args, **(kwargs or {}))
