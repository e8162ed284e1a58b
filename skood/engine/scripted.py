"""TorchScript modules as parts of a network, to be scored by its logits: copied and pickled."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule

from ..notices import first_line


class Scripted(nn.Module):
    """A TorchScript module that can be pickled."""

    def __init__(self, script: ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the TorchScript module returns."""
        return self.script(*args, **kwargs)

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
    """For `copy.deepcopy`: what to put in the place of the TorchScript parts of a module."""
    try:
        return {id(script): Scripted(loaded(saved(script))) for script in _bare_scripts(module)}
    except RuntimeError as error:
        raise TypeError(
            f"torch.jit.save and load refuse it ({first_line(error)}), as after "
            "torch.jit.optimize_for_inference; pass the module as it was before that"
        ) from error


def portable(copied: nn.Module) -> Any:
    """Stand-in for a copy: pickled, it becomes the module with its bare TorchScript parts."""
    if isinstance(copied, Scripted):
        return _Portable(copied.script)
    for part in list(copied.modules()):
        for name, child in part._modules.items():
            if isinstance(child, Scripted):
                part._modules[name] = _Portable(child.script)  # type: ignore[assignment]
    return copied


def _bare_scripts(module: nn.Module) -> list[ScriptModule]:
    """The TorchScript parts of a module, without those inside others."""
    if isinstance(module, ScriptModule):
        return [module]
    if isinstance(module, Scripted):
        return []
    return [script for child in module.children() for script in _bare_scripts(child)]


def rounds_by_batch(module: nn.Module) -> bool:
    """Whether a TorchScript part has dynamically quantized layers, told by its code."""
    parts = scripted_parts(module).values()
    return any("_dynamic" in str(part.script.inlined_graph) for part in parts)


def scripted_parts(module: nn.Module) -> dict[str, Scripted]:
    """The parts of a copied module that hold TorchScript, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Scripted)}
