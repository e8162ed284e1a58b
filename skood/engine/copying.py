"""Copies of the user's module, which share nothing with it, and pickle."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ..exceptions import HeadNotFoundError
from ..fingerprints import bytes_of
from .scripted import has_bare_scripts, portable, wrapped_scripts

COMPILED = "_orig_mod"
"""Name under which what torch.compile returns holds the module."""

LOCAL_HOOKS = ("weight_norm.<locals>._weight_norm_compat_hook", ".<locals>.output_capturing_hook")
"""Hooks that cannot be pickled, and that no copy needs.

The first reads older state dicts; torch leaves it in a module that once had a weight_norm. The
others are added by networks of transformers in their first forward.
"""


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy of a classifier, without the wrappers that tie it to devices or to a compiler."""
    module = unwrapped(module)
    _check_has_layers(module)
    try:
        copied = deepcopied(module)
    except Exception as error:
        raise TypeError(
            f"The module ({type(module).__name__}) cannot be copied: {error}. fit trains a copy "
            "and never touches the module given; remove what copy.deepcopy refuses."
        ) from error
    for part in list(copied.modules()):
        for name, child in part.named_children():
            if COMPILED in child._modules:
                setattr(part, name, child._modules[COMPILED])
    _check_is_other(copied, module)
    return copied


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without wrappers around it."""
    wrapper = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    while (name := wrapper.get(type(module), COMPILED)) in module._modules:
        module = module.get_submodule(name)
    return module


def deepcopied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that pickles, also of a module that torch neither copies nor pickles.

    Tensors that an earlier forward computed and left anywhere in the module have a graph, which
    copies must not: they are copied by value. `memo` is that of `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    memo.update(wrapped_scripts(module))
    with _ByValue():
        copied: nn.Module = copy.deepcopy(module, memo)
    make_picklable(copied)
    return copied


def make_picklable(copied: nn.Module) -> None:
    """Mend the parts of a copy that cannot be pickled, but could.

    torch keeps parametrized tensors in properties of a class, which all copies share. Each gets its
    own: it could lose them as soon as they are removed from the module given.
    """
    for part in copied.modules():
        if parametrize.is_parametrized(part):
            part.__class__ = parametrize.type_before_parametrizations(part)
            _add_class(part)
            _add_properties(part)
        all_hooks: tuple[dict[int, Any], ...] = part._load_state_dict_pre_hooks, part._forward_hooks
        for hooks in all_hooks:
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__qualname__", "").endswith(LOCAL_HOOKS):
                    del hooks[key]
        if "_output_capturing_hooks_installed" in vars(part):
            del vars(part)["_output_capturing_hooks_installed"]  # the next forward adds them


def on_cpu(module: nn.Module) -> Any:
    """What to pickle in the place of a module: it comes back as the module, on the CPU."""
    tensors = (*module.parameters(), *module.buffers())
    here = all(tensor.device.type == "cpu" for tensor in tensors)
    # What a forward left in a buffer has a graph, which copies of the copy must not have.
    kept = {id(tensor): tensor for tensor in tensors if here and tensor.is_leaf}
    copied = deepcopied(module, kept)
    if not here:
        copied.cpu()
    return portable(copied) if has_bare_scripts(module) else copied


def memory_of(tensor: Tensor) -> Any:
    """What two tensors have in common if they are, or look at, the same values in memory."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except Exception:  # it has none of its own, such as a sparse tensor, or none yet
        address = 0
    return (tensor.device, address) if address else id(tensor)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, by their names without those of wrappers."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name.replace(f"{COMPILED}.", ""): tensor for name, tensor in tensors}


class _ByValue(TorchFunctionMode):
    """Inside, `copy.deepcopy` takes the values of tensors that it would refuse."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        lazy = is_lazy(tensor)
        if not lazy and tensor.is_leaf and not tensor.is_inference():
            return func(tensor, memo)
        if id(tensor) not in memo:
            # torch copies no buffers that are lazy.
            memo[id(tensor)] = (
                type(tensor)(tensor.requires_grad, tensor.device, tensor.dtype)
                if lazy
                else tensor.detach().clone()
            )
        return memo[id(tensor)]


def _check_is_other(copied: nn.Module, module: nn.Module) -> None:
    """Refuse a copy with tensors of the module that it was made of."""
    given = {memory_of(tensor) for tensor in named_tensors(module).values()}
    for name, tensor in named_tensors(copied).items():
        if memory_of(tensor) in given:
            raise TypeError(
                f"The module ({type(module).__name__}) cannot be copied: {name!r} of the copy is "
                "that of the module given, because a __deepcopy__ returns what it should copy. fit "
                "trains a copy and never touches the module given; remove that method."
            )


def _check_has_layers(module: nn.Module) -> None:
    """Refuse exported programs, which have operations in the place of layers."""
    for name, part in module.named_modules():
        graph = vars(part).get("_graph", vars(part).get("graph"))
        nodes = graph.nodes if isinstance(graph, torch.fx.Graph) else ()
        if any(getattr(node.target, "namespace", None) == "aten" for node in nodes):
            raise HeadNotFoundError(
                f"The module{f', in its {name!r},' if name else ''} is an exported program: its "
                "layers are gone, the last one too, and it stays in the mode in which it was "
                "exported. Pass the nn.Module from which it was exported."
            )


def _add_class(part: nn.Module) -> None:
    parametrize._inject_new_class(part)
    kind: Any = type(part)
    del kind.__getstate__  # an error
    kind.__reduce_ex__, kind.__setstate__ = _reduced, _restore


def _add_properties(part: nn.Module) -> None:
    for name in part.get_submodule("parametrizations")._modules:
        parametrize._inject_property(part, name)


def _reduced(part: nn.Module, protocol: int) -> tuple[Any, ...]:
    before: Any = parametrize.type_before_parametrizations(part)
    return _parametrized, (before,), before.__getstate__(part)


def _parametrized(kind: type[nn.Module]) -> nn.Module:
    """A parametrized module without its state."""
    part = kind.__new__(kind)
    _add_class(part)
    return part


def _restore(part: nn.Module, state: dict[str, Any]) -> None:
    kind: Any = type(part).__base__
    kind.__setstate__(part, state)
    _add_properties(part)


def weights_digest(module: nn.Module) -> str:
    """By which it is told whether the weights and buffers of a module have changed.

    It says nothing of versions and of layout in memory, which may change.
    """
    hashed = hashlib.sha256()
    for name, value in unwrapped(module).state_dict().items():
        if isinstance(value, Tensor) and value.layout is torch.strided and not is_lazy(value):
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if not value.is_quantized:
                hashed.update(bytes_of(value))
    return hashed.hexdigest()
