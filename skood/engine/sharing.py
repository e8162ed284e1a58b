"""Whether a copy of the user's module uses, or changes, what does not belong to it.

Functions, weak references, caches, globals and attributes of classes are not copied: through them,
a copy may reach the module that it was made of, or layers that belong to no module. Which ones it
does reach is asked of a forward: each operation is looked at before it runs.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .copying import deepcopied, memory_of, named_tensors, unwrapped
from .modes import set_mode

REGISTER = (
    "Register it: as an attribute of the module, set in __init__, or in an nn.ModuleList, "
    "nn.ModuleDict or nn.ParameterList."
)

NO_GRADIENT = "None of the inputs have requires_grad=True"
"""How torch begins to warn of a re-entrant checkpoint through which no gradient will come."""


def check_scoring(
    module: nn.Module, batch: Tensor, given: nn.Module, explained: AbstractContextManager[None]
) -> None:
    """Refuse a copy of a module if its scores would depend on what is not its own.

    In evaluation mode, its forward must neither use the tensors of the module given nor parameters
    that belong to no module. A TypeError says what it uses. The module given stays as it is.
    `explained` adds to errors of the forward itself.
    """
    tensors = [x for x in named_tensors(module).values() if not is_lazy(x)]
    _check(module, batch, given, {id(x): x for x in tensors}, explained, training=False)


def check_training(
    module: nn.Module, batch: Tensor, given: nn.Module, explained: AbstractContextManager[None]
) -> None:
    """Refuse a copy of a module if its training would use or change what is not its own.

    In training mode, its forward must keep to the rules of `check_scoring`, write into no tensor
    but its own, and use no parameters that training would leave as they are: they are not
    registered, or a re-entrant checkpoint cuts their gradient. The copy stays as it is, too.
    """
    _check(module, batch, given, {}, explained, training=True)


def _check(
    module: nn.Module,
    batch: Tensor,
    given: nn.Module,
    memo: dict[int, Any],
    explained: AbstractContextManager[None],
    training: bool,
) -> None:
    """Ask a forward of a second copy; `memo` holds the tensors that it shares with the first."""
    twin, batch, given = deepcopied(module, memo), batch.clone(), unwrapped(given)
    set_mode(twin, training)
    own = [batch, *named_tensors(twin).values()]
    own += [thing for thing in memo.values() if isinstance(thing, Tensor)]
    border = _Border(named_tensors(given), own, list(twin.parameters()) if training else own)
    with (
        torch.random.fork_rng(devices=[batch.device] if batch.is_cuda else []),
        torch.set_grad_enabled(training),
        warnings.catch_warnings(record=True) as caught,
        _attributes_kept(given),
    ):
        warnings.simplefilter("always")
        try:
            with explained, border:
                twin(batch)
        except _Crossing as crossing:
            raise TypeError(str(crossing)) from None
        finally:
            changed = border.restore()
    if changed and training:
        raise TypeError(
            f"In training mode, forward writes into a tensor of shape {changed[0]} that is no part "
            "of the module, such as the statistics of a batch-norm that is a global or an "
            f"attribute of a class. {REGISTER}"
        )
    cut = any(NO_GRADIENT in str(warning.message) for warning in caught)
    if training and cut and border.used_without_gradient:
        raise ValueError(
            "In training mode, a part of forward runs in torch.utils.checkpoint with "
            "use_reentrant=True on inputs that require no gradient, so its parameters would not be "
            "trained. Pass use_reentrant=False, which gives the same values."
        )


class _Crossing(BaseException):
    """Stops a forward; no Exception, which the forward could catch."""


class _Border(TorchDispatchMode):
    """Stops a forward before an operation uses what it must not.

    Parameters
    ----------
    given : dict of str to Tensor
        Tensors of the module given, by name, which it must not use.
    own : list of Tensor
        Tensors that are there before the forward and that it may use and write.
    registered : list of Tensor
        Those of them that may have a gradient.
    """

    def __init__(
        self, given: Mapping[str, Tensor], own: Sequence[Tensor], registered: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.used_without_gradient = False
        self._given = {memory_of(tensor): name for name, tensor in given.items()}
        self._own = {memory_of(tensor): tensor for tensor in own}
        self._registered = {memory_of(tensor) for tensor in registered}
        self._made: set[Any] = set()  # in the forward
        self._others: dict[Any, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors_in(args, kwargs):
            if (place := memory_of(tensor)) not in self._made:
                self._look_at(tensor, place)
        output = func(*args, **(kwargs or {}))
        self._made.update(map(memory_of, _tensors_in(output)))
        return output

    def _look_at(self, tensor: Tensor, place: Any) -> None:
        """Stop before the use of a tensor that the forward did not make, if it is not allowed."""
        if place in self._given:
            raise _Crossing(
                f"In a copy of the module, forward uses {self._given[place]!r} of the module "
                "given, which fit must not touch: it reaches it by a function, a weak reference, a "
                "cache or a forward that was replaced, all of which copies share. Call "
                "self.layer(x) in forward or another method; to compile, use module.compile()."
            )
        if place in self._own:
            if not (tensor.requires_grad and tensor.is_leaf):
                return
            if not torch.is_grad_enabled():
                self.used_without_gradient = True
            elif place not in self._registered:
                raise _Crossing(
                    f"The forward uses a parameter of shape {tuple(tensor.shape)} that training "
                    f"would not change: it is in a plain list, dict or object. {REGISTER}"
                )
        elif isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            raise _Crossing(
                f"The forward uses a parameter of shape {tuple(tensor.shape)} that is no part of "
                "the module: its layer is in a global, an attribute of a class, a function or a "
                f"cache. {REGISTER}"
            )
        elif isinstance(place, tuple) and place not in self._others:
            self._others[place] = weakref.ref(tensor), tensor.clone()

    def restore(self) -> list[tuple[int, ...]]:
        """Give other tensors that the forward has changed their values back; their shapes."""
        changed = []
        for reference, before in self._others.values():
            tensor = reference()  # None if it lived in the forward alone
            if tensor is not None and not torch.allclose(tensor, before, 0, 0, equal_nan=True):
                changed.append(tuple(tensor.shape))
                with torch.inference_mode():
                    tensor.copy_(before)
        return changed


def _tensors_in(*things: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(things) if isinstance(leaf, Tensor))


@contextmanager
def _attributes_kept(given: nn.Module) -> Iterator[None]:
    """Refuse what is inside if it sets attributes of the module given, and set them back."""
    before = [(vars(part), dict(vars(part))) for part in given.modules()]
    changed: list[str] = []
    try:
        yield
    finally:
        for now, kept in before:
            if differing := [key for key in now | kept if now.get(key) is not kept.get(key)]:
                changed += differing
                now.clear()
                now.update(kept)
    if changed:
        raise TypeError(
            f"In a copy of the module, forward sets {changed[0]!r} of the module given, which fit "
            "must not touch: it reaches it by a function or a weak reference, which copies share. "
            "Make that a method, which sets self."
        )
