"""Why a classifier has no head that can be used, in words, and what to do about it.

`heads` asks when its search, or the check of a name, has failed. To explain one more case, write a
function from a `Trial` to the reason, or to None if it is not that, and name it in `REASONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..notices import quoted
from .outputs import TWO_LOGITS, describe, is_plain_tuple, logits_of
from .trials import Trial


def why_no_submodule(trial: Trial, name: str) -> str:
    """Why a name cannot be that of a head: it names nothing, or nothing in sight."""
    return (
        f"head={quoted(name)} names no submodule of {type(trial.module).__name__}; its linear "
        f"layers are {_listed(trial.linear)}. Pass the name of the layer that turns features into "
        "logits, as in module.named_modules()."
    )


def why_not(trial: Trial, name: str, found: str | None) -> str:
    """Why a submodule is not the head, and what to pass instead: what a search found, if it did."""
    problem = why_none(trial) if found is None else why_unclear(trial, found)
    what_it_does, is_changed = _what_it_does(trial, name)
    if problem is None:
        remedy = f'Pass head="{found}", or head=None, which finds it.'
    elif is_changed:
        remedy = "Let forward return what this layer gives."
    else:
        remedy = f"Linear layers: {_listed(trial.linear)}. {problem}"
    return f"head={name!r} is not the head: {what_it_does}. {remedy}"


def why_unclear(trial: Trial, found: str) -> str | None:
    """Why the first element of a tuple may not be the logits, though a layer gives it.

    If it enters a layer that gives another element, it may be the features.
    """
    for index, giver in _elements_given(trial):
        if giver != found and _reaches(trial, found, index):
            return (
                f"The module returns {describe(trial.output)}. Its first element, from {found!r}, "
                f"enters {giver!r}, whose output is element {index}, so either may be the logits. "
                f"Wrap the module in one that returns its logits alone, such as output[{index}]."
            )
    return None


def why_none(trial: Trial) -> str:
    """Why the search found nothing, and what to change."""
    reason = next(text for reason in REASONS if (text := reason(trial)))
    return f"No classification head found: {reason}"


def _made_without_classes(trial: Trial) -> str | None:
    try:
        declared = trial.module.get_classifier()  # type: ignore[operator]
    except Exception:  # no such method, or another meaning of the name
        return None
    if not isinstance(declared, nn.Identity):
        return None
    return (
        "get_classifier() of the network is an Identity, so it was made without classes and "
        "returns features. Make it with num_classes=K, or call reset_classifier(K)."
    )


def _called_more_than_once(trial: Trial) -> str | None:
    for name in _shaped_like_logits(trial):
        if (number := trial.calls[name].number) > 1:
            return (
                f"the linear layer {name!r} is called {number} times in one forward. Its last call "
                "does not give what the module returns, so a row has no single vector of features. "
                "Wrap the network in a module that calls its head once, or that calls it last for "
                "what it returns."
            )
    return None


def _another_element(trial: Trial) -> str | None:
    for index, giver in _elements_given(trial):
        return (
            f"the module returns {describe(trial.output)}. Not its first element but element "
            f"{index} comes from a linear layer, {giver!r}. Wrap the module in one that returns "
            f"output[{index}] alone."
        )
    return None


def _first_element_not_linear(trial: Trial) -> str | None:
    if next(_other_elements(trial), None) is None:
        return None
    return (
        f"the module returns {describe(trial.output)}. Its first element does not come from a "
        f"linear layer. Wrap the module in one that returns the logits alone."
    )


def _not_linear(trial: Trial) -> str | None:
    if not (givers := _other_givers(trial)):
        return None
    options = " or ".join(
        f'head="{name}" (its input, {tuple(features.shape)}, becomes features of width '
        f"{features.flatten(1).shape[1]})"
        for name, features in givers.items()
    )
    return f"no linear layer gives the logits. Pass {options}."


def _several_heads(trial: Trial) -> str | None:
    heads = _shaped_like_logits(trial)
    if len(heads) < 2:
        return None
    total = torch.stack([trial.calls[name].output.flatten(1) for name in heads]).sum(dim=0)
    for scale, kind in ((1, "sum"), (len(heads), "mean")):
        if trial.agrees(total / scale):
            return (
                f"the logits are the {kind} of what {_listed(heads)} give, so no one layer gives "
                "them. Wrap the network in a module that returns the output of one of them, or "
                "that concatenates their features and has one torch.nn.Linear on them."
            )
    return None


def _head_on_positions(trial: Trial) -> str | None:
    width = trial.logits.shape[1]
    for name, (features, output, _) in reversed(trial.calls.items()):
        over_positions = isinstance(output, Tensor) and output.ndim > 2
        if over_positions and output.shape[-1] == width and not trial.maps_vectors(name):
            return (
                f"the linear layer {name!r} is applied at every position, {tuple(features.shape)} "
                f"to {tuple(output.shape)}, so a row has no single vector of features. Wrap the "
                "network in a module that first picks or averages the positions and then applies "
                "the layer: head(hidden[:, -1]) for the last position, head(hidden.mean(dim=1)) "
                "for the mean."
            )
    return None


def _one_output(trial: Trial) -> str | None:
    """Two logits, such as (0, z), made of a single output z."""
    if trial.logits.shape[1] != 2 or _shaped_like_logits(trial):
        return None
    for name in reversed(trial.calls):
        if trial.maps_vectors(name) and trial.calls[name].output.shape[-1] == 1:
            return f"the two logits are made of the one output of {name!r}. {TWO_LOGITS}."
    return None


def _changed_after(trial: Trial) -> str | None:
    if not (called := _shaped_like_logits(trial) or list(trial.calls)):
        return None
    shape = tuple(trial.calls[called[-1]].output.shape)
    return (
        f"what the module returns, {tuple(trial.logits.shape)}, is not what its linear layer "
        f"{called[-1]!r} gives, {shape}. If something changes that afterwards, such as a softmax, "
        "a scale, a sum or a choice of columns, return what the layer gives. If forward computes "
        "the logits itself, by F.linear(h, weight) or h @ weight, make that a submodule, a "
        "torch.nn.Linear, and call it as layer(h)."
    )


def _no_linear_layer(trial: Trial) -> str:
    return (
        f"forward calls no torch.nn.Linear (registered are: {_listed(trial.linear)}). A layer that "
        "forward computes itself, as F.linear(h, weight) or h @ weight, or calls as "
        "layer.forward(h), is not seen: make it a submodule, a torch.nn.Linear, and call it as "
        "layer(h). A network of features alone needs one after them, trained by pretrain_epochs=."
    )


REASONS: list[Callable[[Trial], str | None]] = [
    _made_without_classes,
    _called_more_than_once,
    _another_element,
    _first_element_not_linear,
    _not_linear,
    _several_heads,
    _head_on_positions,
    _one_output,
    _changed_after,
    _no_linear_layer,
]
"""Why a search may find nothing. The first that applies is told; the last one always does."""


def _what_it_does(trial: Trial, name: str) -> tuple[str, bool]:
    """What a submodule that is not the head does instead, and whether its answer is changed."""
    _, calls = trial.run({name: trial.module.get_submodule(name)})
    if name not in calls:
        return "the forward pass never calls it", False
    output = calls[name].output
    got = tuple(output.shape) if isinstance(output, Tensor) else describe(output)
    reason = f"its output, {got}, is not the logits {tuple(trial.logits.shape)}"
    if not trial.has_shape_of_logits(output):
        return reason, False
    return f"{reason} that the module returns, because something after it changes them", True


def _other_elements(trial: Trial) -> Iterator[int]:
    """Elements of a returned tuple, but its first, that have the shape of logits."""
    if is_plain_tuple(trial.output):
        for index, element in enumerate(trial.output[1:], start=1):
            if isinstance(element, Tensor) and element.ndim == 2 and element.shape[1] >= 2:
                yield index


def _elements_given(trial: Trial) -> Iterator[tuple[int, str]]:
    """Those of them that come from a linear layer, and from which."""
    for index in _other_elements(trial):
        for name in reversed(trial.calls):
            if trial.maps_vectors(name) and trial.gives(name, itemgetter(index)):
                yield index, name


def _reaches(trial: Trial, name: str, index: int) -> bool:
    """Whether an element of the output depends on what a submodule gives."""
    given: list[Tensor] = []

    def watch(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        given[:] = [output.detach().clone().requires_grad_()]
        return given[0].clone()

    handle = trial.module.get_submodule(name).register_forward_hook(watch)
    try:
        with torch.enable_grad():
            element = trial.module(trial.batch)[index]
    finally:
        handle.remove()
    if not element.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(element.sum(), given, allow_unused=True)
    return gradient is not None


def _other_givers(trial: Trial) -> dict[str, Tensor]:
    """Submodules that give the logits without being linear, the innermost alone; what they got."""
    _, calls = trial.run(trial.parts)
    width = trial.logits.shape[1]
    givers: dict[str, Tensor] = {}
    for name, (features, output, _) in calls.items():  # the innermost ends first
        if (
            trial.has_shape_of_logits(output)
            and trial.has_rows(features)
            and features.flatten(1).shape[1] != width  # else it only changes logits
            and any(True for _ in trial.parts[name].parameters())
            and not trial.is_everything(name)
            and not any(inner.startswith(f"{name}.") for inner in givers)
            and trial.gives(name, logits_of)
        ):
            givers[name] = features
    return givers


def _shaped_like_logits(trial: Trial) -> list[str]:
    """Linear layers whose output has the shape of the logits, last called last."""
    return [name for name, call in trial.calls.items() if trial.has_shape_of_logits(call.output)]


def _listed(names: Iterable[str]) -> str:
    """Names in a row, the last five if there are more."""
    listed = [name for name in names if name]
    return ", ".join(listed if len(listed) <= 5 else ["...", *listed[-5:]]) or "none"
