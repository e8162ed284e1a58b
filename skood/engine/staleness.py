"""Whether a network goes on, after training, with what it computed from its weights before.

A fresh copy of the module given gets the trained weights, and must give the same logits. What the
module given already keeps is emptied there, so that a forward computes it anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..exceptions import StaleValuesWarning
from ..notices import warn_user
from .copying import copy_module, named_tensors
from .generators import unmoved_generators
from .hardware import autocast
from .modes import set_mode
from .network import TRIAL_ROWS, Network
from .outputs import run
from .rows import Rows
from .rowwise import Rounding

REGISTRIES = {"_parameters", "_buffers", "_modules"}
"""Attributes in which torch keeps what belongs to a module."""

Place = tuple[str, str]
"""Name of a part of a network, and of an attribute or buffer of it."""

GONE = object()
"""In the place of a value: there is none, or that of the class."""


def warn_if_stale(network: Network, given: nn.Module, rows: Rows) -> None:
    """Warn if a trained network gives other logits than a fresh copy with the same weights.

    What cannot be copied or compared is not judged. No random generator moves.
    """
    try:
        batch = network.batcher(rows.spaced(TRIAL_ROWS))
        with (
            unmoved_generators(network.device),
            torch.no_grad(),
            autocast(network.device, network.precision.scoring),
        ):
            stale = _is_stale(network.module, given, batch)
    except Exception:
        return
    if stale:
        warn_user(
            "After training, the network does not give what its weights say: a fresh copy with the "
            "same weights gives other logits. It seems to keep what it computed from its weights "
            "before, such as a cache, a merged or a folded layer. Clear that in the train() of the "
            "module, which is called before and after training.",
            StaleValuesWarning,
        )


def _is_stale(trained: nn.Module, given: nn.Module, batch: Tensor) -> bool:
    expected = run(trained, batch)
    fresh = _evaluated_copy(given, batch)
    if not _load(fresh, trained):
        return False
    own, theirs = _kept(fresh), _kept(trained)
    changed = {
        place: value
        for place, value in theirs.items()
        if place in own and _is_changed(own[place], value)
    }
    _put(fresh, changed)
    if _agree(expected, _emptied_logits(fresh, batch, but=changed)):
        return False
    # A forward fills a cache. What it leaves empty is a setting, or came from training.
    now = _kept(fresh)
    left = {place: value for place, value in theirs.items() if place not in now}
    _put(fresh, left)
    if not _agree(expected, run(fresh, batch)):
        return True
    # Unless the module given does as well without it, as without a layer that was merged by hand.
    twin = _evaluated_copy(given, batch)
    with_them = run(twin, batch)
    left = {place: value for place, value in _kept(twin).items() if place in left}
    _put(twin, {place: _emptied(value) for place, value in left.items()})
    return bool(left) and _agree(with_them, run(twin, batch))


def _agree(expected: Tensor, logits: Tensor) -> bool:
    """Whether logits are alike but for the rounding of the precision in which they are computed."""
    device, rounding = expected.device.type, Rounding(expected)
    # A GPU may compute in TF32.
    coarse = device != "cpu" or torch.is_autocast_enabled(device) or expected.dtype.itemsize < 4
    return (rounding.may_explain if coarse else rounding.explains)(expected, logits)


def _evaluated_copy(given: nn.Module, batch: Tensor) -> nn.Module:
    module = copy_module(given).to(batch.device)
    set_mode(module, training=False)
    return module


def _load(fresh: nn.Module, trained: nn.Module) -> bool:
    """Give a copy the parameters and buffers of a trained module; False if they do not fit."""
    weights, passing = named_tensors(trained), _passing(fresh)
    for name, tensor in named_tensors(fresh).items():
        path, _, key = name.rpartition(".")
        if (path, key) not in passing:
            if name not in weights or weights[name].shape != tensor.shape:
                return False
            tensor.data.copy_(weights[name])
    return True


def _emptied_logits(fresh: nn.Module, batch: Tensor, but: Mapping[Place, Any]) -> Tensor:
    """Logits without the tensors that a module keeps in attributes, but for those it needs."""
    passing, kept = _passing(fresh), _kept(fresh)
    given = {
        place: value
        for place, value in kept.items()
        if place not in but
        and (place in passing or place[1] not in fresh.get_submodule(place[0])._buffers)
        and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    }
    everything = {place: _emptied(value) for place, value in given.items()}
    _put(fresh, everything)
    try:
        return run(fresh, batch)
    except Exception:
        _put(fresh, given)
    unneeded: list[dict[Place, Any]] = []
    for key in dict.fromkeys(key for _, key in given):
        places = [place for place in given if place[1] == key]
        for empty in ({place: everything[place] for place in places}, dict.fromkeys(places, GONE)):
            _put(fresh, empty)
            try:
                run(fresh, batch)
            except Exception:
                _put(fresh, {place: given[place] for place in places})
            else:
                unneeded.append(empty)
                break
    for empty in unneeded:
        _put(fresh, empty)
    return run(fresh, batch)


def _emptied(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return None
    empty = copy.copy(value)  # also of a kind of dict that needs arguments
    empty.clear()
    return empty


def _kept(module: nn.Module) -> dict[Place, Any]:
    """Buffers, and attributes that hold tensors or numbers, of all parts of a module."""
    own = {id(tensor) for tensor in module.parameters()}
    found = {}
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if key not in REGISTRIES}
        for key, value in (plain | part._buffers).items():
            leaves = tree_leaves(value)
            if any(map(_is_value, leaves)) and not any(id(leaf) in own for leaf in leaves):
                found[name, key] = value
    return found


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | float | int) and not isinstance(leaf, bool)


def _passing(module: nn.Module) -> set[Place]:
    """Buffers that no state_dict holds."""
    return {
        (name, key)
        for name, part in module.named_modules()
        for key in part._non_persistent_buffers_set
    }


def _put(module: nn.Module, values: Mapping[Place, Any]) -> None:
    """Set attributes and buffers of a module to copies of values."""
    for (name, key), value in values.items():
        part = module.get_submodule(name)
        place: dict[str, Any] = part._buffers if key in part._buffers else vars(part)
        if value is not GONE:
            place[key] = tree_map(_copied, value)
        elif place is part._buffers:
            place[key] = None
        else:
            place.pop(key, None)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _is_changed(before: Any, after: Any) -> bool:
    """Whether training has given what a module keeps other values of the same form."""
    (leaves, form), (others, other_form) = tree_flatten(before), tree_flatten(after)
    if form != other_form or any(
        type(a) is not type(b) for a, b in zip(leaves, others, strict=True)
    ):
        return False
    return any(map(_differs, leaves, others))


def _differs(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor):
        return _is_value(before) and before != after
    alike = before.shape == after.shape and before.dtype == after.dtype
    return alike and not torch.equal(before, after.to(before.device))
