"""Whether a network gives a row the same logits, whatever comes with it and whatever came before.

If not, the message says whether the data set, preprocess or the network is to blame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..exceptions import RandomScoresWarning
from ..notices import warn_user
from .batches import Batcher
from .copying import deepcopied
from .modes import set_mode
from .network import TRIAL_ROWS
from .outputs import all_finite, run
from .rows import InMemory, Rows
from .rowwise import Dependence, Finding, Rounding, dependence

READS = 8
"""Times that rows are read, to see whether it is they that change."""

CALLS_AHEAD = 1000
"""Calls by which a counter is put forward, to see whether the logits follow it."""

OTHER_SCALE = 1000.0
"""Factor between rows and those that are put beside them."""

MIXED_BY_PREPROCESS = (
    "preprocess gives a row other values if other rows are in its batch, so the logits depend on "
    "the other rows of a batch, and scores would too. Use statistics, scales and lengths fixed at "
    "training time instead of those of the batch: x / 255, not x / x.max() nor a test of x.max()."
)

MIXED_BY_NETWORK = (
    "The logits of a row depend on the other rows of its batch, in evaluation mode, so its score "
    "would too. Causes: an nn.LSTM, nn.GRU or attention without batch_first=True, sums, means or "
    "ranks over dim=0, a test of x.max(), batch-norm with track_running_stats=False. Keep the rows "
    "of a batch apart, and use statistics fixed at training time."
)

OTHER_CALLS = 4
"""Forwards of other rows, to see whether the logits follow what a network keeps of them."""


def check_steady(module: nn.Module, batcher: Batcher, rows: Rows, *, draws: bool) -> None:
    """Refuse a network whose logits for a row change from call to call, or with its company.

    `draws` says if forward draws random numbers from generators of its own.
    """
    _check_forgets(module, batcher(rows))
    found = dependence(_logits(module, batcher, rows), len(rows), batcher.device, draws=draws)
    if not found.certain:
        found = _found_in_double(module, batcher, rows)
    if found.dependence is Dependence.CALL:
        raise ValueError(_why_changing(module, batcher, rows))
    if found.dependence is Dependence.COMPANY:
        raise ValueError(_why_mixed(batcher, rows, found.arrangement))
    if len(rows) > 1:  # one row at a time has no company
        _check_beside_other_scales(module, batcher, rows.spaced(TRIAL_ROWS))
    if found.dependence is Dependence.DRAWS:
        warn_user(
            "The module, preprocess or the data set draws random numbers in evaluation mode. They "
            "did not change the logits of the rows tried, but may change those of others from call "
            "to call. Let the module draw only if self.training is set, and the others never.",
            RandomScoresWarning,
        )


@contextmanager
def explained_size(module: nn.Module, n_rows: int) -> Iterator[None]:
    """Add a note to an error of a network on another number of rows than it took before."""
    try:
        yield
    except Exception as error:
        if n_rows != TRIAL_ROWS:
            error.add_note(
                f"The module given, {type(module).__name__}, took a batch of {TRIAL_ROWS} rows, "
                f"but not one of {n_rows}. Let forward read the number of rows from its input, "
                "x.shape[0], and trace a module with that."
            )
        raise


def _logits(
    module: nn.Module, batcher: Batcher, rows: Rows, dtype: torch.dtype | None = None
) -> Callable[[NDArray[np.intp]], Tensor]:
    """Logits of the rows at some positions, in one batch, whose floats are cast to a dtype."""

    def logits(picks: NDArray[np.intp]) -> Tensor:
        batch = batcher(rows, picks)
        with explained_size(module, len(picks)):
            return run(module, batch.to(dtype if batch.is_floating_point() else None))

    return logits


def _found_in_double(module: nn.Module, batcher: Batcher, rows: Rows) -> Finding:
    """What the logits depend on in float64, where differences that are rounding vanish."""
    with suppress(Exception):  # it takes no float64, so that what was found may be rounding
        twin = _evaluated_copy(module)
        twin.double()
        return dependence(_logits(twin, batcher, rows, torch.float64), len(rows), batcher.device)
    return Finding(Dependence.NOTHING, True, np.arange(len(rows)))


def _why_changing(module: nn.Module, batcher: Batcher, rows: Rows) -> str:
    """Why logits of the same rows change from call to call: the first of those that read them."""
    if _changes(lambda: rows.read(slice(0, len(rows)))):
        return rows.why_changing
    if _changes(lambda: batcher(rows)):
        return (
            "preprocess gives other values for the same rows when called again, so no score would "
            "mean anything. Leave out of it what is random; random changes of training batches "
            "are passed as augment=."
        )
    batch = batcher(rows)
    blamed = "module" if _changes(lambda: run(module, batch.clone())) else "module, or preprocess,"
    return (
        f"The {blamed} gives other logits for the same rows when called again in evaluation mode, "
        "so no score would mean anything. Make what is random depend on self.training, as in "
        "F.dropout(x, p, training=self.training), or pass it as augment=."
    )


def _changes(read: Callable[[], Tensor]) -> bool:
    first = read().clone()
    return any(not torch.equal(first, read()) for _ in range(READS))


def _why_mixed(batcher: Batcher, rows: Rows, arrangement: NDArray[np.intp]) -> str:
    """Why the logits of a row depend on its company: preprocess, or the network after it."""
    apart, together = batcher(rows)[arrangement], batcher(rows, arrangement)
    if apart.shape != together.shape or not Rounding(apart.double()).explains(apart, together):
        return MIXED_BY_PREPROCESS
    return MIXED_BY_NETWORK


def _check_beside_other_scales(module: nn.Module, batcher: Batcher, rows: Rows) -> None:
    """Refuse what treats rows otherwise beside rows on another scale, which outliers may have."""
    twin, cpu = _evaluated_copy(module), torch.device("cpu")
    twin.to(cpu)  # on a GPU, an index out of range would end all further work
    batcher = dataclasses.replace(batcher, device=cpu)
    if rows.preprocessed:
        values = batcher(rows).contiguous()
        if _mixes_scales(lambda batch: run(twin, batcher.laid_out(batch)), values):
            raise ValueError(MIXED_BY_NETWORK)
        return
    values = rows.read(slice(0, len(rows))).to(cpu)
    if _mixes_scales(lambda batch: run(twin, batcher(InMemory(batch))), values):
        by_preprocess = _mixes_scales(lambda batch: batcher(InMemory(batch)), values)
        raise ValueError(MIXED_BY_PREPROCESS if by_preprocess else MIXED_BY_NETWORK)


def _mixes_scales(function: Callable[[Tensor], Tensor], values: Tensor) -> bool:
    """Whether a function of a batch gives rows other values beside rows of larger numbers."""
    if values.is_floating_point():
        pairs = [(values, values * OTHER_SCALE), (values / OTHER_SCALE, values)]
    else:
        pairs = [(values // 128, values)] if values.dtype is not torch.bool else []
    for few, company in pairs:
        with suppress(Exception):  # it may not take such numbers
            alone, together = function(few.clone()), function(torch.cat([few, company]))[: len(few)]
            if all_finite(alone) and not Rounding(alone).may_explain(alone, together):
                return True
    return False


def _check_forgets(module: nn.Module, batch: Tensor) -> None:
    """Refuse a network whose logits follow what it writes into itself in evaluation mode."""
    before = dict(_memory(module))
    run(module, batch.clone())
    after = dict(_memory(module))
    written = [name for name in before if name in after and before[name] != after[name]]
    observed = _has_observers(module)  # which write past the versions of tensors
    if not (written or observed):
        return
    twin = _evaluated_copy(module)
    first = run(twin, batch.clone())
    with suppress(Exception):  # it may take neither such rows nor such numbers
        for _ in range(OTHER_CALLS):
            run(twin, (batch * 3 + 1 if batch.is_floating_point() else batch).roll(1, dims=0))
        for part_name, part in twin.named_modules():
            for name, value in _numbers(part):
                ahead = value + CALLS_AHEAD * (value - before.get((part_name, name), value))
                if name in part._buffers:
                    part.get_buffer(name).fill_(ahead)
                else:
                    setattr(part, name, ahead)
    if Rounding(first).explains(first, run(twin, batch.clone())):
        return
    if observed:
        raise ValueError(
            "The network is in quantization-aware training: its observers move in evaluation mode "
            "too, so that a score would depend on the rows scored before. Switch them off: "
            "module.apply(torch.ao.quantization.disable_observer)."
        )
    name = ".".join(filter(None, written[0]))
    raise ValueError(
        f"The module writes into its {name!r} in evaluation mode, and its logits follow, so that a "
        "score would depend on the rows scored before. Let it write only if self.training is set."
    )


def _evaluated_copy(module: nn.Module) -> nn.Module:
    twin = deepcopied(module)
    set_mode(twin, training=False)
    return twin


def _has_observers(module: nn.Module) -> bool:
    """Whether ranges of quantization-aware training move with each forward."""
    switches = (getattr(part, "observer_enabled", None) for part in module.modules())
    return any(isinstance(switch, Tensor) and bool(switch.any()) for switch in switches)


def _memory(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """What a network remembers: versions of its tensors, and the numbers that it keeps."""
    for part_name, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and not tensor.is_inference():
                yield (part_name, name), (id(tensor), tensor._version)
        for name, value in _numbers(part):
            yield (part_name, name), value


def _numbers(part: nn.Module) -> list[tuple[str, int | float]]:
    """Numbers among the attributes of a part, and its buffers of one."""
    buffers = ((name, x) for name, x in part._buffers.items() if x is not None and x.numel() == 1)
    return [
        *((name, x) for name, x in vars(part).items() if type(x) in (int, float)),
        *((name, x.item()) for name, x in buffers),
    ]
