"""One forward of a classifier, and what its layers do in it, told by hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .outputs import logits_of

TOLERANCE = 4 * torch.finfo(torch.float32).eps
"""Relative difference up to which values came back as they were given."""


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
"""Layers that take indices."""


class Call(NamedTuple):
    """The last call of a module in a forward: its first argument, what it returned, its number."""

    features: Any
    output: Any
    number: int


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


def embedding_of(module: nn.Module, batch: Tensor) -> str | None:
    """Name of an embedding that gets other indices for other rows, as not those of positions do."""
    embeddings = {n: p for n, p in module.named_modules() if isinstance(p, EMBEDDINGS)}
    if not embeddings:
        return None
    calls: list[dict[str, Call]] = []
    for rows in (batch, batch.flip(0)):
        with torch.no_grad(), captured_calls(embeddings) as called:
            module(rows)
        calls.append(called)
    first, second = calls
    return next((n for n in first if not _alike(first[n], second.get(n))), None)


def _alike(call: Call, other: Call | None) -> bool:
    """Whether a module got the same indices in two calls."""
    return other is not None and torch.equal(call.features, other.features)


class Trial:
    """One forward of a classifier, and the questions to ask about it.

    `output` is what the classifier returned, and `logits` (n, K) what was found in it. `parts` are
    the classifier and its submodules by name, but for those in TorchScript, which take no hooks,
    and `linear` those of them that look like linear layers. `calls` has the last call of each
    linear layer that forward called, last called last.
    """

    def __init__(self, module: nn.Module, batch: Tensor) -> None:
        self.module = module
        self.batch = batch
        self.parts = {n: p for n, p in module.named_modules() if _takes_hooks(p)}
        self.linear = {n: p for n, p in self.parts.items() if _looks_linear(p)}
        self.output, calls = self.run(self.linear)
        self.logits = logits_of(self.output, len(batch))
        self.calls = {n: c for n, c in calls.items() if _is_linear(self.parts[n], c.features)}

    def run(self, watched: Mapping[str, nn.Module]) -> tuple[Any, dict[str, Call]]:
        """One forward: what it returned, and the last call of each watched module."""
        with torch.no_grad(), captured_calls(watched) as calls:
            return self.module(self.batch), calls

    def has(self, name: str) -> bool:
        """Whether there is a submodule of that name that takes hooks."""
        try:
            part = self.module.get_submodule(name)
        except AttributeError:
            return False
        return part is not self.module and _takes_hooks(part)

    def gives(self, name: str, pick: Callable[[Any], Tensor]) -> bool:
        """Whether the last answer of a submodule is what `pick` finds in the output.

        The submodule answers with other values, made from what it got. These must come back.
        """
        part = self.module.get_submodule(name)
        try:
            with torch.no_grad(), _other_answers(part) as last:
                returned = pick(self.module(self.batch))
        except Exception:  # the network takes no other values there: it does not just return them
            return False
        if not last:
            return False
        expected = last[0].flatten(1)
        return expected.shape == returned.shape and close(
            returned.float(), expected.to(returned.device).float(), TOLERANCE
        )

    def maps_vectors(self, name: str) -> bool:
        """Whether a linear layer turned one vector for each row into another."""
        features = self.calls[name].features
        return self.has_rows(features) and features[0].numel() == features.shape[-1]

    def has_rows(self, values: Any) -> bool:
        """Whether values are a tensor with as many rows as the batch."""
        return _has_rows(values) and len(values) == len(self.batch)

    def has_shape_of_logits(self, values: Any) -> bool:
        """Whether values are a tensor with as many rows and columns as the logits, once flat."""
        return _has_rows(values) and values.flatten(1).shape == self.logits.shape

    def is_everything(self, name: str) -> bool:
        """Whether a submodule leaves no parameter to a body before it."""
        own = {id(p) for p in self.module.get_submodule(name).parameters()}
        return name == "" or own >= {id(p) for p in self.module.parameters()} != set()

    def agrees(self, logits: Tensor) -> bool:
        """Whether values are the logits, but for rounding."""
        return close(self.logits, logits.to(self.logits), 1e-3)


def close(values: Tensor, others: Tensor, tolerance: float = 1e-2) -> bool:
    """Whether values are finite and agree, relative to the largest of them."""
    scale = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny)
    return bool(((values - others).abs().amax() <= tolerance * scale) & torch.isfinite(scale))


def _takes_hooks(part: nn.Module) -> bool:
    return not isinstance(part, torch.jit.ScriptModule)


def _looks_linear(part: nn.Module) -> bool:
    """Whether a module has the sizes of a linear layer, as quantized ones and adapters do."""
    sizes = (getattr(part, "in_features", None), getattr(part, "out_features", None))
    return isinstance(part, nn.Linear) or all(type(size) is int for size in sizes)


def _is_linear(part: nn.Module, features: Any) -> bool:
    """Whether -8 times the features move the output -8 times as far, but for 8-bit rounding.

    Sizes alone do not tell, because whole networks call theirs in_features, too.
    """
    if isinstance(part, nn.Linear):
        return True
    own = {p.dtype for p in part.parameters() if p.is_floating_point()}
    # Under an autocast of forward, a layer gets features of another dtype than its own.
    return any(_moves_along(part, features.to(dtype)) for dtype in (features.dtype, *own))


def _moves_along(part: nn.Module, features: Tensor) -> bool:
    try:
        with torch.no_grad():
            at_zero, at_one, afar = (part(factor * features) for factor in (0, 1, -8))
        return close(afar - at_zero, -8 * (at_one - at_zero), 0.1)
    except Exception:  # it wants more than features
        return False


def _has_rows(values: Any) -> bool:
    return isinstance(values, Tensor) and values.ndim >= 2


@contextmanager
def _other_answers(part: nn.Module) -> Iterator[list[Tensor]]:
    """Let a module answer with other values; the list holds those of its last answer."""
    last: list[Tensor] = []

    def give(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        inputs = [*args, *kwargs.values()]
        if not (inputs and _has_rows(inputs[0]) and _has_rows(output)):
            return None
        answer = _another_answer(inputs[0], output)
        last[:] = [answer.clone()]  # as the network may write into what it gets
        return answer

    handle = part.register_forward_hook(give, with_kwargs=True)
    try:
        yield last
    finally:
        handle.remove()


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
    answer = places + told.to(output.device).reshape(-1, *[1] * (output.ndim - 1))
    # No float rounds such values: they come back as they are from an autocast or a cast.
    return answer.bfloat16().to(output.dtype)
