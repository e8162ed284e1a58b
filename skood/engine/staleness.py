"""Whether a network goes on, after training, with what it computed from its weights before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..exceptions import StaleValuesWarning
from ..notices import warn_user
from .copying import copy_module, named_tensors
from .modes import set_mode
from .network import TRIAL_ROWS, Network
from .outputs import run
from .rows import Rows
from .rowwise import Rounding

REGISTRIES = {"_parameters", "_buffers", "_modules"}
"""Attributes in which torch keeps what belongs to a module."""


def warn_if_stale(network: Network, given: nn.Module, rows: Rows) -> None:
    """Warn if a trained network gives other logits than a fresh copy with the same weights.

    The copy is made of the module given. It keeps nothing that a forward left there, unless its
    forward fails without. What cannot be copied or compared is not judged.
    """
    try:
        batch = network.batcher(rows.spaced(TRIAL_ROWS))
        with torch.no_grad():
            logits = run(network.module, batch)
            others = _fresh_logits(network, given, batch)
    except Exception:
        return
    if others is not None and not Rounding(logits).may_explain(others, logits):
        warn_user(
            "After training, the network does not give what its weights say: a fresh copy with the "
            "same weights gives other logits. It seems to keep what it computed from its weights "
            "before, such as a cache, a merged or a folded layer. Clear that in the train() of the "
            "module, which is called before and after training.",
            StaleValuesWarning,
        )


def _fresh_logits(network: Network, given: nn.Module, batch: Tensor) -> Tensor | None:
    """Logits of a fresh copy of a module with the weights of a network; None if they do not fit."""
    for forgetful in (True, False):
        fresh = copy_module(given).to(network.device)
        weights = named_tensors(network.module)
        for name, tensor in named_tensors(fresh).items():
            if name not in weights or weights[name].shape != tensor.shape:
                return None
            tensor.data.copy_(weights[name])
        _take_attributes(fresh, network.module)
        if forgetful:
            _forget(fresh, network.module)
        set_mode(fresh, training=False)
        try:
            return run(fresh, batch)
        except Exception:
            if not forgetful:
                raise
    return None


def _take_attributes(fresh: nn.Module, trained: nn.Module) -> None:
    """Give a copy the tensors that training has changed in attributes, such as a moving average."""
    for part, other in _pairs(fresh, trained):
        for key, value in list(vars(part).items()):
            theirs = vars(other).get(key)
            if not isinstance(value, Tensor) or not isinstance(theirs, Tensor):
                continue
            alike = value.shape == theirs.shape and value.dtype == theirs.dtype
            if alike and not torch.equal(value, theirs.to(value.device)):
                setattr(part, key, theirs)


def _forget(fresh: nn.Module, trained: nn.Module) -> None:
    """Empty attributes of a copy that hold tensors, and buffers that no state_dict holds.

    What training has changed stays.
    """
    for part, other in _pairs(fresh, trained):
        part._buffers.update(dict.fromkeys(part._non_persistent_buffers_set))
        for key, value in list(vars(part).items()):
            if key in REGISTRIES or value is vars(other).get(key):
                continue
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                vars(part)[key] = type(value)() if isinstance(value, dict | list) else None


def _pairs(fresh: nn.Module, trained: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    others = dict(trained.named_modules())
    return [(part, others[name]) for name, part in fresh.named_modules() if name in others]
