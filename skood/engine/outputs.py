"""What a classifier returned: where its logits are, and whether they can be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..exceptions import NonFiniteLogitsError
from ..notices import quoted

MOST_LISTED = 5
"""Parts of an output that a message lists."""

BEFORE_ROUNDING = (
    "Return the values before argmax or rounding; pass a quantized network as it was before that; "
    "end a complex one in a torch.nn.Linear on h.abs()."
)

TWO_LOGITS = (
    "If it has one output for two classes, give last, its last layer, a second one of zeros, and "
    "leave out a sigmoid or squeeze after it: for k, v in [*last.named_parameters()]: "
    "setattr(last, k, torch.nn.Parameter(torch.cat([0 * v, v]))); last.out_features = 2"
)

LONGEST_COMPANY = 50
"""Characters that are shown of what a module returns beside its logits."""


class Seen(NamedTuple):
    """What a score sees of rows: what a forward gave of them."""

    features: Tensor | None
    """Features (n, d); None if they are hidden or not wanted."""
    logits: Tensor
    """Logits (n, K)."""
    layers: Tensor | None = None
    """Moments (n, 2, c) of inner layers, if the score looks at these."""

    @classmethod
    def joined(cls, pieces: Iterable[Seen]) -> Seen:
        """What is seen of rows, of which there is one at least, from pieces of them."""
        fields = zip(*pieces, strict=True)
        return cls(*(None if parts[0] is None else torch.cat(parts) for parts in fields))  # type: ignore[arg-type]

    def each(self, function: Callable[[Tensor], Tensor]) -> Seen:
        """What a function makes of each of them."""
        return Seen(*(None if values is None else function(values) for values in self))  # type: ignore[arg-type]


def run(module: nn.Module, batch: Tensor) -> Tensor:
    """Logits (n, K) of a batch, one row for each of its rows."""
    return logits_of(module(batch), batch.shape[0])  # len() would fix it in an exported graph


def logits_of(output: Any, n_rows: int | None = None) -> Tensor:
    """Logits (n, K) in what a classifier returned.

    They are the tensor itself, the first element of a tuple or list, or what is called "logits". A
    TypeError or ValueError says what else was found, or that there is not one row of logits for
    each of `n_rows` rows (not compared if None).
    """
    found = output
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    elif hasattr(found, "logits"):
        found = found.logits
    elif is_plain_tuple(found):
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"The module returned {describe(output)}; expected logits: a tensor (n, K), a tuple "
            'whose first element is that tensor, or a dict with the key "logits". Wrap the '
            "module in one that returns its logits. If it has none for a whole row, as an object "
            "detector, put a torch.nn.Linear on its backbone, and train that with pretrain_epochs=."
        )
    shape = tuple(found.shape)
    if found.ndim != 2 or shape[1] < 2:
        alone = found is output
        among = "" if alone else f" (in {describe(output)[:LONGEST_COMPANY]})"
        raise ValueError(
            f"The module returned logits of shape {shape}{among}; expected (n, K) with K >= 2 "
            f"classes. {_remedy(found, alone)}"
        )
    if n_rows is not None and shape[0] != n_rows:
        raise ValueError(
            f"The module returned logits of shape {shape} for {n_rows} rows; expected one row of "
            "logits for each row. A network that averages or splits its rows cannot score them "
            "one by one."
        )
    return found


def valid_tensor(tensor: Tensor, name: str, axes: tuple[str, ...]) -> Tensor:
    """A tensor of floats, if it is one with the axes named, such as ``("n", "d")``.

    A TypeError or ValueError says what else was got.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.ndim == len(axes)
        and (len(axes) == 1 or tensor.shape[1] > 0)
    ):
        return tensor
    expected = f"a tensor of floats of shape ({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected {expected}.")
    error = ValueError if tensor.is_floating_point() else TypeError
    raise error(
        f"{name} is {tensor.dtype}, {tensor.layout}, of shape {tuple(tensor.shape)}; expected "
        f"{expected}."
    )


def as_float64(values: Tensor) -> Tensor:
    """Values in float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; taken to be so of a graph that is compiled or exported.

    Such a graph has no values yet.
    """
    if torch.compiler.is_compiling():
        return True
    # A sum tells in one pass, except where it overflows.
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def _remedy(found: Tensor, alone: bool) -> str:
    """What to return instead of a tensor that has no logits (n, K), alone or beside others."""
    if not found.is_floating_point():
        return BEFORE_ROUNDING
    if found.ndim == 0:
        return (
            "One number for all rows is no logits, but a loss: wrap the module in one that returns "
            "its logits alone."
        )
    if found.ndim < 3:
        return f"{TWO_LOGITS}." + " For regression, pass module=None." * alone
    axes = tuple(range(2, found.ndim))
    if found.shape[1] >= 2 and all(found.shape[axis] == 1 for axis in axes):
        return "Return them flat: output.flatten(1)."
    pooled = f"last(h.mean({axes}, keepdim=True)).flatten(1)"
    if found.ndim == 3:
        pooled = f"last(h.mean(dim=1)) for h (n, positions, d), else {pooled}"
    return (
        "Wrap the module in one that averages the positions before the last layer: it returns "
        f"{pooled}, where h is what enters last."
    )


def check_usable(logits: Tensor, batch: Tensor, module: nn.Module) -> None:
    """Refuse logits from which no energy, or no meaningful one, can be computed.

    They must be floating-point numbers on the device of the batch, finite, and no probabilities.
    """
    if not logits.is_floating_point():
        raise TypeError(
            f"The module returned logits of dtype {logits.dtype}; expected floating-point numbers. "
            f"{BEFORE_ROUNDING}"
        )
    if logits.device != batch.device:
        raise ValueError(
            f"The module returned logits on {logits.device} for a batch on {batch.device}: its "
            "forward moves data to a device of its own. Remove .to(...), .cuda() or .cpu() from "
            f"it, or pass device={str(logits.device)!r}."
        )
    bad = (~torch.isfinite(logits)).any(dim=1)
    if bad.any() and _is_masked(logits):
        raise NonFiniteLogitsError(
            f"The network gives logits of -inf for {int(bad.sum())} of {len(bad)} rows, as a mask "
            "of classes does: neither training nor all scores can take them. Return the logits "
            "without the mask. If some classes should never be predicted, make the head a "
            "torch.nn.Linear with the rows of weight and bias for the others alone."
        )
    if bad.any():
        broken = _first_nonfinite(module)
        remedy = (
            f"Its {broken!r} holds such values: train it anew, with a lower learning rate."
            if broken
            else "Check the scale of X and preprocess=; a network in float16 may overflow."
        )
        raise NonFiniteLogitsError(
            f"The network gives NaN or infinite logits for {int(bad.sum())} of {len(bad)} rows, "
            f"though X is finite. {remedy}"
        )
    # The energy of log-probabilities is 0 for every row, that of probabilities hardly varies.
    values = logits.double() if logits.device.type != "mps" else logits.float()
    rounding = max(1e-4, 8 * torch.finfo(logits.dtype).eps)
    if (values.logsumexp(dim=1).abs() <= rounding).all():
        kind, sign, layer = "log-probabilities", "the logsumexp of each row is 0", "log_softmax"
    elif (values >= 0).all() and ((values.sum(dim=1) - 1).abs() <= rounding).all():
        kind, sign, layer = "probabilities", "each row is non-negative and sums to 1", "softmax"
    else:
        return
    raise ValueError(
        f"The module returns {kind} ({sign}), whose energy tells nothing: it is (almost) the same "
        f"for every row. Return the logits themselves: leave out the last {layer} (or sigmoid), "
        "and where a loss needs it, apply it there."
    )


def _is_masked(logits: Tensor) -> bool:
    """Whether all that is not finite is -inf, beside finite logits in each row."""
    finite = logits.isfinite()
    return bool((finite | logits.isneginf()).all() and finite.any(dim=1).all())


def _first_nonfinite(module: nn.Module) -> str | None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def is_plain_tuple(output: Any) -> bool:
    """Whether an output is a tuple or list in which nothing but the order tells the logits."""
    return isinstance(output, tuple | list) and len(output) > 0 and not hasattr(output, "logits")


def describe(output: Any) -> str:
    """What an output is, in words."""
    if isinstance(output, Tensor):
        return f"a Tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a dict with the keys {quoted(list(output))}"
    if isinstance(output, tuple | list):
        kinds = _listed(
            f"Tensor {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            for item in output
        )
        return f"a {type(output).__name__} of {kinds or 'nothing'}"
    return "None (has its forward no return?)" if output is None else f"a {type(output).__name__}"


def _listed(words: Iterable[str]) -> str:
    """Words in a row, the first ones if there are more."""
    listed = list(words)
    return ", ".join(listed if len(listed) <= MOST_LISTED else [*listed[:MOST_LISTED], "..."])
