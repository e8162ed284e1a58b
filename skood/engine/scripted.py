"""TorchScript modules as parts of a network: copied, pickled, and with their head in sight.

No hook fires inside a TorchScript module. But with the identity as the weight of its last layer it
returns what enters that layer, the features, and a layer behind it can do the rest.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from .heads import Trial, close
from .outputs import describe, is_plain_tuple, logits_of


class Scripted(nn.Module):
    """A TorchScript module with, once it was found, its head behind it.

    Unlike a TorchScript module it can be pickled, and its deep copies have gradients of their own.

    Parameters
    ----------
    script : ScriptModule
        The module. Where there is a head it returns features (n, d) in the place of logits.
    """

    def __init__(self, script: ScriptModule) -> None:
        super().__init__()
        self.script = script
        self.head: nn.Linear | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the TorchScript module returns; logits (n, K) alone where there is a head."""
        output = self.script(*args, **kwargs)
        return output if self.head is None else self.head(logits_of(output))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "script" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["script"], name)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_modules": self._modules | {"script": saved(self.script)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state["_modules"]
        super().__setstate__(state | {"_modules": modules | {"script": loaded(modules["script"])}})


class _Portable:
    """Stands for a TorchScript module in what is pickled, and is one again when unpickled."""

    def __init__(self, script: ScriptModule) -> None:
        self.saved = saved(script)

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return loaded, (self.saved,)


def saved(script: ScriptModule) -> bytes:
    """A TorchScript module as bytes."""
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    return buffer.getvalue()


def loaded(script: bytes) -> ScriptModule:
    """A TorchScript module from its bytes."""
    return torch.jit.load(io.BytesIO(script))


def has_bare_scripts(module: nn.Module) -> bool:
    """Whether a module is or contains TorchScript that is not held by `Scripted`."""
    return bool(_bare_scripts(module))


def wrapped_scripts(module: nn.Module) -> dict[int, Scripted]:
    """For `copy.deepcopy`: what to put in the place of the TorchScript parts of a module.

    Their own copies would send their gradients to the parameters that they were copied from.
    """
    try:
        return {id(script): Scripted(loaded(saved(script))) for script in _bare_scripts(module)}
    except RuntimeError as error:
        raise TypeError(
            f"torch.jit.save and load refuse it ({str(error).splitlines()[0]}), as after "
            "torch.jit.optimize_for_inference; pass the module as it was before that"
        ) from error


def portable(module: nn.Module) -> Any:
    """Stand-in for a module with TorchScript parts: pickled, it becomes the module, on the CPU."""
    copied = copy.deepcopy(module, wrapped_scripts(module)).cpu()
    if isinstance(copied, Scripted):
        return _Portable(copied.script)
    for part in list(copied.modules()):
        for name, child in part._modules.items():
            if isinstance(child, Scripted) and child.head is None:
                part._modules[name] = _Portable(child.script)  # type: ignore[assignment]
    return copied


def _bare_scripts(module: nn.Module) -> list[ScriptModule]:
    """The TorchScript parts of a module, without those inside others."""
    if isinstance(module, ScriptModule):
        return [module]
    if isinstance(module, Scripted):
        return []
    return [script for child in module.children() for script in _bare_scripts(child)]


def scripted_parts(module: nn.Module) -> dict[str, Scripted]:
    """The parts of a copied module that hold TorchScript, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Scripted)}


def bring_out_head(module: nn.Module, batch: Tensor, name: str | None = None) -> str:
    """Put the head of a classifier behind the TorchScript part in which it is.

    Parameters
    ----------
    module : nn.Module
        The classifier, in evaluation mode. It is changed, and computes what it did.
    batch : Tensor of shape (n, ...)
        A batch as the classifier takes it.
    name : str, optional
        The head's name, where the user knows it.

    Returns
    -------
    str
        Name of the head in its new place.

    Raises
    ------
    ValueError
        If no linear layer in a TorchScript part gives the logits.
    """
    names = []
    for path, part in scripted_parts(module).items():
        for inner, layer in reversed(list(part.script.named_modules())):
            if getattr(getattr(layer, "weight", None), "ndim", 0) == 2:
                names.append(".".join(filter(None, (path, inner))))
                if name in (None, names[-1]) and _brought_out(module, path, part, layer, batch):
                    return f"{path}.head".removeprefix(".")
    raise ValueError(_why_inside(module, batch, name, names))


def _brought_out(
    module: nn.Module, path: str, part: Scripted, layer: ScriptModule, batch: Tensor
) -> bool:
    """Put a layer of a script behind the script, if that changes nothing: it is the head then."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    # Other weights in the place of the layer's own, which may be zero and then prove nothing.
    others = _ramp(weight), None if bias is None else _ramp(bias)
    identity = weight.new_ones(weight.shape[1]).diag()
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    try:
        with torch.no_grad():
            before = module(batch)
            _assign(layer, *others)
            expected = module(batch)
            _assign(layer, identity, None if bias is None else bias.new_zeros(len(identity)))
            _assign(head, *others)
            part.head = head
            if (
                close(logits_of(expected), logits_of(module(batch)), 1e-3)
                and Trial(module, batch).gives(f"{path}.head".removeprefix("."), logits_of)
                and not _feeds_other_elements(before, expected)
            ):
                _assign(head, weight, bias)
                return True
    except Exception:  # what follows the layer takes no features in the place of its logits
        pass
    _assign(layer, weight, bias)
    part.head = None
    return False


def _ramp(tensor: Tensor) -> Tensor:
    values = torch.linspace(-1, 1, tensor.numel(), device=tensor.device)
    return values.reshape(tensor.shape).to(tensor.dtype)


def _assign(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer other parameters, which need gradients if these do."""
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)


def _feeds_other_elements(before: Any, after: Any) -> bool:
    """Whether another element of a tuple of outputs changed too, and may be the logits."""
    return is_plain_tuple(before) and any(
        isinstance(one, Tensor) and one.ndim == 2 and not torch.equal(one, other)
        for one, other in zip(before[1:], after[1:], strict=True)
    )


def _why_inside(module: nn.Module, batch: Tensor, name: str | None, names: list[str]) -> str:
    asked = "" if name is None else f" for head={name!r}"
    if not names:
        reason = (
            "it has no linear layer with a weight to be seen, as after torch.jit.freeze, "
            "torch.jit.optimize_for_inference or quantization, which make weights constants. Pass "
            "the module as it was before that, or the nn.Module from which it was made."
        )
    elif name is not None:
        what = "gives something other than the logits" if name in names else "is not in it"
        reason = (
            f"a linear layer of that name {what}; its linear layers are {', '.join(names)}. Pass "
            "one of them, or head=None, which tries them all."
        )
    else:
        with torch.no_grad():
            output = describe(module(batch))
        reason = (
            f"it returns {output}, and of its linear layers, {', '.join(names)}, none gives the "
            "logits just as they are returned, and alone. Pass the nn.Module from which it was "
            "made, or script one that returns what a torch.nn.Linear gives, and nothing else."
        )
    return f"No classification head found{asked} in the TorchScript module: {reason}"
