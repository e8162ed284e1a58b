"""Copies of the user's module, which share nothing with it."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping

from torch import Tensor, nn

from .scripted import has_bare_scripts, portable, wrapped_scripts

COMPILED = "_orig_mod"
"""Name under which what torch.compile returns holds the module."""


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy of a classifier, without the wrappers that tie it to devices or to a compiler."""
    wrapper = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    while (name := wrapper.get(type(module), COMPILED)) in module._modules:
        module = module.get_submodule(name)
    # Tensors computed by an earlier forward and kept as attributes have a graph, which copies of
    # modules must not: they are copied by value.
    attributes = [value for part in module.modules() for value in vars(part).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    try:
        copied = copy.deepcopy(
            module,
            {id(value): value.detach().clone() for value in computed} | wrapped_scripts(module),
        )
    except Exception as error:
        raise TypeError(
            f"The module ({type(module).__name__}) cannot be copied: {error}. fit trains a copy "
            "and never touches the module given; remove what copy.deepcopy refuses, such as "
            "stored activations."
        ) from error
    for part in list(copied.modules()):
        for name, child in part.named_children():
            if COMPILED in child._modules:
                setattr(part, name, child._modules[COMPILED])
    for name, part in copied.named_modules():
        _check_shares_nothing(name or "the module", part)
    return copied


def _check_shares_nothing(name: str, part: nn.Module) -> None:
    """Refuse functions that reach, from a copy, into the module that it was made of."""
    for attribute, value in vars(part).items():
        values = value.values() if isinstance(value, Mapping) else [value]
        things = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])]
        functions = [x for x in things if isinstance(x, types.FunctionType) and x.__closure__]
        if attribute == "forward" and functions:
            raise TypeError(
                f"The forward of {name!r} was replaced by a function, as "
                "module.forward = torch.compile(module.forward) does. Copies share it, and with "
                "it the weights of the module given, which fit must not touch. Use "
                "module.compile() or torch.compile(module), or a subclass with another forward."
            )
        if any(_holds_weights(function) for function in functions):
            raise TypeError(
                f"{attribute!r} of {name!r} holds a function that reaches a module or a tensor "
                "from outside, such as a lambda that calls self.layer. Copies share it, and with "
                "it the weights of the module given, which fit must not touch. Make it a method, "
                "or an nn.Module that holds what it calls."
            )


def _holds_weights(function: types.FunctionType) -> bool:
    cells = function.__closure__ or ()
    contents = []
    for cell in cells:
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return any(isinstance(content, nn.Module | nn.Parameter) for content in contents)


def on_cpu(module: nn.Module) -> nn.Module:
    """The module itself where it lies on the CPU and pickles, else a copy that does."""
    if has_bare_scripts(module):
        return portable(module)
    if all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module).cpu()
