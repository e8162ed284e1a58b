"""Finding the head of a classifier: the layer that turns features into logits.

The features of a row are the numbers that the body of a network makes of it. The logits are what
the network returns, one number for each class. Between them is the head, most often the last
`torch.nn.Linear`.

The search goes by what a layer does, whatever its name or class. In one forward, the answer of a
layer is replaced by another one. If the network then returns that other answer, the layer gives the
logits. To compare values without replacing them proves nothing, because many heads are all zero
before they are trained.

Head rules propose which layers to try. To add one, write a function from a `Trial` to names, the
likeliest first, and name it in `HEAD_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..exceptions import HeadNotFoundError
from .missing_heads import why_no_submodule, why_none, why_not, why_unclear
from .outputs import logits_of
from .trials import Trial


def find_head(module: nn.Module, batch: Tensor, name: str | None = None) -> str:
    """Name of the head: the layer that turns features into logits.

    Parameters
    ----------
    module : nn.Module
        The classifier, in evaluation mode.
    batch : Tensor of shape (n, ...)
        A batch as the classifier takes it.
    name : str, optional
        Name of the head, which is then only checked. None searches for it.

    Returns
    -------
    str
        A name for ``module.get_submodule``.

    Raises
    ------
    HeadNotFoundError
        If no layer is the head, or not the one of that name, or if it is not clear which element
        of a returned tuple are the logits. The message says why, and what to do.
    TypeError, ValueError
        If the classifier returns no logits.
    """
    trial = Trial(module, batch)
    if name is not None:
        return _checked(trial, name)
    found = _search(trial)
    if found is None:
        raise HeadNotFoundError(why_none(trial))
    if unclear := why_unclear(trial, found):
        raise HeadNotFoundError(unclear)
    return found


def _checked(trial: Trial, name: str) -> str:
    """The name itself, if it is that of the head."""
    if not trial.has(name):
        raise HeadNotFoundError(why_no_submodule(trial, name))
    if not trial.gives(name, logits_of):
        raise HeadNotFoundError(why_not(trial, name, _search(trial)))
    return name


def _search(trial: Trial) -> str | None:
    """The first name that a rule proposes and that is of a layer that gives the logits."""
    proposed = (name for rule in HEAD_RULES for name in rule(trial))
    # The network as a whole counts if it is a linear layer itself.
    layers = (name for name in proposed if trial.has(name) or name in trial.calls)
    return next((name for name in layers if trial.gives(name, logits_of)), None)


def declared_heads(trial: Trial) -> Iterator[str]:
    """Layers that the network, or a part of it, returns from `get_classifier()`, as in timm."""
    declared = [_declared(part) for part in trial.parts.values()]
    for name, part in trial.parts.items():
        # An Identity is what timm puts there if the network returns features.
        is_declared = any(part is head for head in declared) and not isinstance(part, nn.Identity)
        if is_declared and not trial.is_everything(name):
            yield name


def linear_layers(trial: Trial) -> Iterator[str]:
    """Linear layers that turn one vector for each row into another, last called first."""
    return (name for name in reversed(trial.calls) if trial.maps_vectors(name))


HEAD_RULES: list[Callable[[Trial], Iterator[str]]] = [declared_heads, linear_layers]
"""Where to look for the head, in this order."""


def _declared(part: nn.Module) -> Any:
    """What `get_classifier()` of a module returns; None if it has no such method."""
    try:
        return part.get_classifier()  # type: ignore[operator]
    except Exception:  # the name may have another meaning
        return None
