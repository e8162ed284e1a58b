"""Finding the head of a classifier: the submodule that turns features into the logits returned.

What counts is what a submodule does. In one forward its answer is replaced by another one: if the
classifier then returns that other answer, whatever it is, the submodule gives the logits. Equal
values alone would prove nothing: a head is often all zero before it is trained.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..exceptions import HeadNotFoundError
from .outputs import describe, is_plain_tuple, logits_of

GENERAL_REMEDY = (
    'Pass head="NAME", the module whose input are the features and whose output are the logits, or '
    "a module that ends in a torch.nn.Linear."
)


class Call(NamedTuple):
    """The last call of a module in a forward: its first argument, what it returned, its number."""

    features: Any
    output: Any
    number: int


def find_head(module: nn.Module, batch: Tensor, name: str | None = None) -> str:
    """Name of the head: the submodule whose input are the features and whose output the logits.

    Without a name, the module that `get_classifier()` names comes first, as in timm, then the
    linear layers, last called first.

    Parameters
    ----------
    module : nn.Module
        The classifier, in evaluation mode.
    batch : Tensor of shape (n, ...)
        A batch as the classifier takes it.
    name : str, optional
        The head's name, where the user knows it; found otherwise.

    Returns
    -------
    str
        A name for ``module.get_submodule``.

    Raises
    ------
    ValueError
        If there is no such submodule; the message says what to pass.
    """
    trial = Trial(module, batch)
    if name is not None:
        trial.check_name(name)
        if trial.gives(name, logits_of):
            return name
        raise HeadNotFoundError(trial.why_not(name))
    for candidate in trial.candidates():
        if trial.gives(candidate, logits_of):
            trial.check_not_features(candidate)
            return candidate
    raise HeadNotFoundError(f"No classification head found: {trial.why_none()}")


@contextmanager
def captured_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Last call of each module, for forwards run by this thread, in order of their ends."""
    thread = threading.get_ident()
    calls: dict[str, Call] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [*args, *kwargs.values()]
            # Another thread may be inside the same module: its calls are not ours.
            if threading.get_ident() == thread and inputs:
                before = calls.pop(name, None)
                calls[name] = Call(inputs[0], output, before.number + 1 if before else 1)

        return keep

    handles = [
        m.register_forward_hook(keeper(name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Trial:
    """One forward of a classifier, and the questions to ask about it."""

    def __init__(self, module: nn.Module, batch: Tensor) -> None:
        self.module = module
        self.batch = batch
        # TorchScript modules take no hooks.
        self.parts = {
            name: part
            for name, part in module.named_modules()
            if not isinstance(part, torch.jit.ScriptModule)
        }
        self.linear = {name: part for name, part in self.parts.items() if _looks_linear(part)}
        with torch.no_grad(), captured_calls(self.linear) as calls:
            self.output = module(batch)
        self.logits = logits_of(self.output, len(batch))
        self.calls = {name: call for name, call in calls.items() if self._is_linear(name, call)}

    def candidates(self) -> Iterator[str]:
        """Names of what may be the head, the likeliest first."""
        # An Identity is what timm puts there for networks that return features.
        declared = [part for part in _declared(self.parts) if not isinstance(part, nn.Identity)]
        for name, part in self.parts.items():
            if any(part is head for head in declared) and not self._is_everything(name):
                yield name
        for name in reversed(self.calls):
            if self._maps_vectors(name):
                yield name

    def gives(self, name: str, pick: Callable[[Any], Tensor]) -> bool:
        """Whether the last answer of a submodule is what `pick` finds in the output.

        The submodule answers with values made from its input, and these must come back, for the
        input that it got last.
        """
        last: list[Tensor] = []

        def answer(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            inputs = [*args, *kwargs.values()]
            if not (inputs and _has_rows(inputs[0]) and _has_rows(output)):
                return None
            last[:] = inputs[0], output
            return _another_answer(inputs[0], output)

        handle = self.parts[name].register_forward_hook(answer, with_kwargs=True)
        try:
            with torch.no_grad():
                returned = pick(self.module(self.batch))
        except Exception:  # the network takes no other values there: it does not just return them
            return False
        finally:
            handle.remove()
        if not last:
            return False
        expected = _another_answer(*last).flatten(1)
        return expected.shape == returned.shape and close(
            returned, expected.to(returned), 4 * torch.finfo(returned.dtype).eps
        )

    def check_name(self, name: str) -> None:
        """Refuse a name that no submodule has."""
        try:
            part = self.module.get_submodule(name)
        except AttributeError:
            part = self.module
        if part is self.module or isinstance(part, torch.jit.ScriptModule):
            raise HeadNotFoundError(
                f"head={name!r} names no submodule of {type(self.module).__name__}; its linear "
                f"layers are {_names(self.linear)}. Pass the name of the module whose input are "
                "the features, as in module.named_modules()."
            )
        self.parts[name] = part  # it may have another name as well

    def check_not_features(self, name: str) -> None:
        """Refuse a tuple whose first element enters the layer that gives another one."""
        for index, giver in self._elements_given():
            if giver != name and self._reaches(name, index):
                raise HeadNotFoundError(
                    f"The module returns {describe(self.output)}. Its first element, from "
                    f"{name!r}, enters {giver!r}, whose output is element {index}, so which of "
                    "them are the logits is not clear. Wrap the module in one that returns its "
                    f"logits alone, such as output[{index}]."
                )

    def why_not(self, name: str) -> str:
        """Why a submodule is not the head, and what to pass instead."""
        with torch.no_grad(), captured_calls({name: self.parts[name]}) as calls:
            self.module(self.batch)
        if name not in calls:
            reason = "the forward pass never calls it"
        else:
            shape = tuple(self.logits.shape)
            output = calls[name].output
            got = str(tuple(output.shape)) if isinstance(output, Tensor) else describe(output)
            reason = f"its output, {got}, is not the logits {shape}"
            if self._has_shape_of_logits(output):
                reason += " that the module returns: something after it changes them"
        try:
            found = find_head(self.module, self.batch)
            remedy = f'Pass head="{found}", or head=None, which finds it.'
        except ValueError as error:
            remedy = f"Linear layers: {_names(self.linear)}. {error}"
        return f"head={name!r} is not the head: {reason}. {remedy}"

    def why_none(self) -> str:
        """Why the search found nothing, and what to change."""
        reasons = (
            self._no_classes,
            self._called_more_than_once,
            self._another_element,
            self._other_givers,
            self._several_heads,
            self._head_on_positions,
            self._changed_after,
        )
        return next(
            (text for reason in reasons if (text := reason())),
            f"forward calls no torch.nn.Linear (registered are: {_names(self.linear)}). A layer "
            "computed inside forward, such as F.linear(h, weight) or h @ weight, is out of sight, "
            "and so is layer.forward(h): make it a submodule, torch.nn.Linear, and call it, "
            f"layer(h). {GENERAL_REMEDY}",
        )

    def _no_classes(self) -> str | None:
        if not any(isinstance(head, nn.Identity) for head in _declared({"": self.module})):
            return None
        return (
            "get_classifier() of the network is an Identity, so it was made without classes and "
            "returns features. Make it with num_classes=K, or call reset_classifier(K)."
        )

    def _another_element(self) -> str | None:
        returned = f"the module returns {describe(self.output)}"
        for index, giver in self._elements_given():
            return (
                f"{returned}, of which not the first element but element {index} comes from a "
                f"linear layer, {giver!r}. Wrap the module in one that returns output[{index}] "
                "alone."
            )
        if not any(True for _ in self._other_elements()):
            return None
        return (
            f"{returned}, and its first element does not come from a linear layer. Wrap the module "
            f"in one that returns the logits alone. {GENERAL_REMEDY}"
        )

    def _several_heads(self) -> str | None:
        heads = [n for n, call in self.calls.items() if self._has_shape_of_logits(call.output)]
        if len(heads) < 2:
            return None
        total = torch.stack([self.calls[name].output.flatten(1) for name in heads]).sum(dim=0)
        for scale, kind in ((1, "sum"), (len(heads), "mean")):
            if close(self.logits, (total / scale).to(self.logits), 1e-3):
                return (
                    f"the logits are the {kind} of what {_names(heads)} give, so no one layer "
                    "gives them. Wrap the network in a module that returns the output of one of "
                    "them, or that has one torch.nn.Linear on the features of all, concatenated."
                )
        return None

    def _head_on_positions(self) -> str | None:
        for name, (features, output, _) in reversed(self.calls.items()):
            if (
                isinstance(output, Tensor)
                and output.ndim > 2
                and output.shape[-1] == self.logits.shape[1]
                and not self._maps_vectors(name)
            ):
                return (
                    f"the linear layer {name!r} is applied at every position, "
                    f"{tuple(features.shape)} to {tuple(output.shape)}, so a row has no single "
                    "vector of features. Wrap the network in a module that first picks or averages "
                    "the positions and then applies the layer: head(hidden[:, -1]) for the last "
                    "position, head(hidden.mean(dim=1)) for the mean."
                )
        return None

    def _other_givers(self) -> str | None:
        with torch.no_grad(), captured_calls(self.parts) as calls:
            self.module(self.batch)
        width = self.logits.shape[1]
        givers: dict[str, Tensor] = {}
        for name, (features, output, _) in calls.items():  # the innermost end first
            if (
                self._has_shape_of_logits(output)
                and _has_rows(features)
                and len(features) == len(self.batch)
                and features.flatten(1).shape[1] != width  # else it only changes logits
                and any(True for _ in self.parts[name].parameters())
                and not self._is_everything(name)
                and not any(inner.startswith(f"{name}.") for inner in givers)
                and self.gives(name, logits_of)
            ):
                givers[name] = features
        if not givers:
            return None
        options = " or ".join(
            f'head="{name}" (its input, {tuple(features.shape)}, becomes features of width '
            f"{features.flatten(1).shape[1]})"
            for name, features in givers.items()
        )
        return f"no linear layer gives the logits. Pass {options}."

    def _called_more_than_once(self) -> str | None:
        for name, (_, output, number) in self.calls.items():
            if number > 1 and self._has_shape_of_logits(output):
                return (
                    f"the linear layer {name!r} is called {number} times in one forward, and what "
                    "the module returns is not what its last call gives, so a row has no single "
                    "vector of features. Wrap the network in a module that calls its head once, or "
                    "that calls it last for what it returns."
                )
        return None

    def _changed_after(self) -> str | None:
        alike = [n for n, call in self.calls.items() if self._has_shape_of_logits(call.output)]
        if not (called := alike or list(self.calls)):
            return None
        shape = tuple(self.calls[called[-1]].output.shape)
        return (
            f"what the module returns, {tuple(self.logits.shape)}, is not what its linear layer "
            f"{called[-1]!r} gives, {shape}. If something changes that afterwards, such as a "
            "softmax, a scale, a sum or a choice of columns, return what the layer gives. If "
            "forward computes the logits itself, by F.linear(h, weight) or h @ weight, make that a "
            f"submodule, torch.nn.Linear, and call it. {GENERAL_REMEDY}"
        )

    def _other_elements(self) -> Iterator[int]:
        """Elements of a plain tuple, but its first, that have the shape of logits."""
        if is_plain_tuple(self.output):
            for index, element in enumerate(self.output[1:], start=1):
                if isinstance(element, Tensor) and element.ndim == 2 and element.shape[1] >= 2:
                    yield index

    def _elements_given(self) -> Iterator[tuple[int, str]]:
        """Those that come from a linear layer, and from which."""
        for index in self._other_elements():
            for name in reversed(self.calls):
                if self._maps_vectors(name) and self.gives(name, itemgetter(index)):
                    yield index, name

    def _reaches(self, name: str, index: int) -> bool:
        """Whether an element of the output depends on what a submodule gives."""
        given: list[Tensor] = []

        def watch(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            given[:] = [output.detach().clone().requires_grad_()]
            return given[0].clone()

        handle = self.parts[name].register_forward_hook(watch)
        try:
            with torch.enable_grad():
                element = self.module(self.batch)[index]
        finally:
            handle.remove()
        if not element.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(element.sum(), given, allow_unused=True)
        return gradient is not None

    def _maps_vectors(self, name: str) -> bool:
        """Whether a linear layer turned one vector a row into another."""
        features = self.calls[name].features
        return (
            _has_rows(features)
            and len(features) == len(self.batch)
            and features.numel() == len(features) * features.shape[-1]
        )

    def _is_linear(self, name: str, call: Call) -> bool:
        """Whether a layer is linear: whole networks, too, call their sizes in_features."""
        part = self.parts[name]
        return isinstance(part, nn.Linear) or _is_affine(part, call.features)

    def _has_shape_of_logits(self, output: Any) -> bool:
        return _has_rows(output) and output.flatten(1).shape == self.logits.shape

    def _is_everything(self, name: str) -> bool:
        """Whether a submodule leaves no parameter to a body before it."""
        own = {id(p) for p in self.parts[name].parameters()}
        return name == "" or own >= {id(p) for p in self.module.parameters()} != set()


def close(values: Tensor, others: Tensor, tolerance: float = 1e-2) -> bool:
    """Whether values are finite and agree, relative to the largest of them."""
    scale = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
    return bool(((values - others).abs().amax() <= tolerance * scale) & torch.isfinite(scale))


def _declared(parts: Mapping[str, nn.Module]) -> list[Any]:
    """Heads that the network, or a part of it, names itself, in timm's vocabulary."""
    declared = []
    for part in parts.values():
        if callable(getattr(part, "get_classifier", None)):
            try:
                declared.append(part.get_classifier())  # type: ignore[operator]
            except Exception:  # another meaning of the name
                continue
    return declared


def _looks_linear(part: nn.Module) -> bool:
    """Whether a module is a linear layer, a quantized one or an adapter around one."""
    sizes = (getattr(part, "in_features", None), getattr(part, "out_features", None))
    return isinstance(part, nn.Linear) or all(type(size) is int for size in sizes)


def _is_affine(part: nn.Module, features: Tensor) -> bool:
    """Whether -8 times the features move the output -8 times as far, but for 8-bit rounding."""
    try:
        with torch.no_grad():
            at_zero, at_one, afar = (part(factor * features) for factor in (0, 1, -8))
        return close(afar - at_zero, -8 * (at_one - at_zero), 0.1)
    except Exception:  # it wants more than features
        return False


def _has_rows(values: Any) -> bool:
    return isinstance(values, Tensor) and values.ndim >= 2


def _another_answer(features: Tensor, output: Tensor) -> Tensor:
    """Values in the shape of an output, other ones for other features."""
    rows = features.flatten(1).float()  # the default dtype may be another
    # In no order and over a wide range: sorted or clipped values are not what the head gave.
    numbers = torch.arange(output.numel(), dtype=rows.dtype, device=output.device)
    places = 50 * torch.sin(7 * numbers * (numbers + 1))
    told = torch.sin(
        rows @ torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    )
    places = places.reshape(output.shape)
    return (places + told.to(output.device).reshape(-1, *[1] * (output.ndim - 1))).to(output.dtype)


def _names(names: Mapping[str, Any] | list[str]) -> str:
    listed = [name for name in names if name]
    return (
        "none" if not listed else ", ".join(listed if len(listed) <= 5 else ["...", *listed[-5:]])
    )
