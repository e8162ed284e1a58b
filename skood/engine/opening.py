"""Opening a network: a module is tried on real rows, and made ready to run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..exceptions import (
    HeadNotFoundError,
    PenaltyWithoutEffectWarning,
    SlowScoringWarning,
)
from ..notices import warn_user
from .advice import explained
from .batches import Batcher
from .copying import deepcopied
from .folding import Folded, Pair, foldable
from .hardware import autocast, resolve_precision, rows_at_once, rows_of_small_shape
from .heads import find_head
from .layers import inner_layers
from .layout import fastest_layout
from .modes import set_mode
from .network import (
    TRIAL_ROWS,
    LostLayerError,
    Network,
    features_and_logits,
    reached,
    seen_on_trial,
    trainable,
)
from .outputs import check_usable, describe, is_plain_tuple, logits_of, run
from .precision import check_scores_in, in_float32, settle_precision
from .rows import Rows, slices
from .rowwise import MOST_ROWS
from .scripted import rounds_by_batch, scripted_parts
from .shapes import Results, Shapes, same_bits
from .sharing import check_scoring, check_training
from .steadiness import check_steady, explained_size
from .trials import Trial, close
from .views import view_of

ROWS_OF_A_SHAPE = 64
"""Rows on which shapes of batches are compared, at most."""

SHARE_OF_A_TRIAL = 1 / 8
"""Share of the rows of the largest forward on which a network is tried in several companies."""

SAME = 1e-5
"""Relative difference that a faster forward may make, of few rows or with batch-norms folded."""


def open_network(
    module: nn.Module,
    rows: Rows,
    *,
    head: str | None,
    batcher: Batcher,
    precision: str,
    compiled: bool,
    small_shape: bool,
    fold_batch_norm: bool = True,
    layers: bool = False,
    given: nn.Module | None = None,
) -> Network:
    """Make a module ready to run, having tried it on real rows.

    Parameters
    ----------
    module : nn.Module
        The classifier; it is moved and put in evaluation mode.
    rows : Rows
        Rows to try the module on, of which a few are taken.
    head : str or None
        Name of the head, if the user knows it.
    batcher : Batcher
        Turns rows into batches.
    precision : {"auto", "float32", "bfloat16"}
        Precision asked for.
    compiled : bool
        Whether to run through torch.compile.
    small_shape : bool
        Whether requests of few images may run in a forward of their own size, which is faster and
        agrees with others to 1e-5.
    fold_batch_norm : bool, default=True
        Whether batch-norms may be folded into the layers before them for scoring, which is faster
        and agrees to 1e-5.
    layers : bool, default=False
        Whether the score looks at inner layers.
    given : nn.Module or None
        The user's module, if the classifier is a copy of it.

    Returns
    -------
    Network
        The network, in evaluation mode.

    Raises
    ------
    ValueError, TypeError
        If the module gives no logits or has no head; its own errors pass through, with a note.
    """
    _check_has_values(module)
    if compiled and scripted_parts(module):
        raise ValueError(
            "compile=True cannot compile a TorchScript module. Pass compile=False, or the "
            "nn.Module from which it was made."
        )
    module.to(batcher.device)
    set_mode(module, training=False)
    few = rows.spaced(TRIAL_ROWS)
    batch = dataclasses.replace(batcher, channels_last=False)(few)
    if given is not None:
        check_scoring(module, batch, given, explained(module, batch, rows, batcher))
    with torch.no_grad():
        with explained(module, batch, rows, batcher):
            output = module(batch)
        logits = logits_of(output, len(batch))
        check_usable(logits, batch, module)
        # After a first forward, which makes what is lazy.
        dtypes = resolve_precision(precision, module, batcher.device)
        check_scores_in(module, batch, dtypes.scoring)
        batcher = fastest_layout(module, batcher, few, dtypes.training)
        batch = batcher(few)
        alone = must_run_alone(module)
        if alone:
            warn_user(
                "The network has dynamically quantized layers, which round the rows of a batch on "
                "one scale: rows are scored one by one, so that a score depends on its row alone. "
                "The network before quantization scores much faster.",
                SlowScoringWarning,
            )
        widest, draws = _watched(module, batch)
        most = 1 if alone else rows_at_once(widest, batcher.device, dtypes.scoring)
        n_tried = 1 if alone else max(TRIAL_ROWS, min(int(SHARE_OF_A_TRIAL * most), MOST_ROWS))
        check_steady(module, batcher, rows.spaced(n_tried), draws=draws)
    head = _head_of(module, batch, output, head)
    if head is not None:
        _check_keeps_features(module, head, batch)
    watched = inner_layers(module, head, batch) if layers else ()
    shapes = Shapes((most,))
    pairs: tuple[Pair, ...] = ()
    # Each shape would be compiled on its own, which takes long. What sees layers is not compiled.
    if not compiled or watched:
        if fold_batch_norm:
            # What scores see of a layer must not be scaled, by next to nothing in some channels.
            pairs = tuple(pair for pair in foldable(module, batch) if pair[0] not in watched)
            pairs = pairs if _folds(module, head, batcher, few, pairs) else ()
        small = rows_of_small_shape(batcher.device) if small_shape and batch.ndim > 2 else 0
        scored = Folded(view_of(module)[0], pairs).module if pairs else module
        choose = functools.partial(_choose_shapes, scored, head)
        try:
            shapes = choose(watched, batcher, dtypes.scoring, rows, most, small)
        except LostLayerError:  # as of forwards that take many rows in pieces
            watched = ()
            shapes = choose(watched, batcher, dtypes.scoring, rows, most, small)
    return Network(
        module,
        head,
        batcher,
        dtypes,
        logits.shape[1],
        shapes,
        widest,
        default_dtype=torch.get_default_dtype(),
        compiled=compiled,
        pairs=pairs,
        layers=watched,
    )


def folds(network: Network, rows: Rows) -> bool:
    """Whether a network scores some rows folded as it does by itself, to a relative 1e-5."""
    few = rows.spaced(TRIAL_ROWS)
    return _folds(network.module, network.head, network.batcher, few, network.pairs)


def unfold(network: Network, rows: Rows) -> None:
    """Let a network score by itself, in shapes that give the same bits of that."""
    most, small = network.shapes.ladder[-1], network.shapes.small
    precision = network.precision.scoring
    parts = network.module, network.head, network.layers, network.batcher
    network.unfold(_choose_shapes(*parts, precision, rows, most, small))


def _folds(
    module: nn.Module, head: str | None, batcher: Batcher, rows: Rows, pairs: tuple[Pair, ...]
) -> bool:
    """The same; they are compared on the CPU, as a GPU may compute in TF32."""
    if not pairs:
        return True
    if batcher.device.type != "cpu":
        batcher = dataclasses.replace(batcher, device=torch.device("cpu"))
        module = deepcopied(module).cpu()
    try:
        both = (module, Folded(view_of(module)[0], pairs).module)
        values, others = (_results(each, head, (), batcher, None, rows)(len(rows)) for each in both)
    except Exception:  # what works on a GPU alone, say
        return False
    return all(close(x, y, SAME) for x, y in zip(values, others, strict=True))


class _Watch(TorchDispatchMode):
    """Notes the size of each tensor that an operation returns, and draws from own generators."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = output if isinstance(output, tuple | list) else [output]
        self.sizes += [x.numel() for x in outputs if isinstance(x, Tensor)]
        self.draws |= (kwargs or {}).get("generator") is not None
        return output


def _watched(module: nn.Module, batch: Tensor) -> tuple[int, bool]:
    """Values of a row where a forward is widest, and whether it draws from generators of its own.

    Tensors count that grow with the rows.
    """
    sizes, draws = [], False
    for n_rows in (TRIAL_ROWS // 2, TRIAL_ROWS):
        rows = batch[torch.arange(n_rows, device=batch.device) % len(batch)]
        with torch.no_grad(), explained_size(module, n_rows), _Watch() as seen:
            module(rows)
        sizes.append(seen.sizes)
        draws |= seen.draws
    growths = [many - few for few, many in zip(*sizes, strict=False)]
    return max([batch[0].numel(), *(growth // (TRIAL_ROWS // 2) for growth in growths)]), draws


def _results(
    module: nn.Module,
    head: str | None,
    layers: Sequence[str],
    batcher: Batcher,
    precision: torch.dtype | None,
    rows: Rows,
) -> Callable[..., list[Tensor]]:
    """Features, logits and moments of layers of the first rows, from forwards of any size."""

    @functools.cache
    def results(n_rows: int, tried: int = len(rows)) -> list[Tensor]:
        pieces = []
        for piece in slices(min(tried, len(rows)), n_rows):
            index = np.arange(piece.start, piece.stop)
            batch = batcher(rows, np.resize(index, n_rows))
            with (
                torch.no_grad(),
                autocast(batcher.device, precision),
                explained(module, batch, rows, batcher),
            ):
                found = (
                    (run(module, batch),)
                    if head is None
                    else seen_on_trial(module, head, layers, batch)
                )
                pieces.append([x[: len(index)].clone() for x in found if x is not None])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    return results


def _choose_shapes(
    module: nn.Module,
    head: str | None,
    layers: Sequence[str],
    batcher: Batcher,
    precision: torch.dtype | None,
    rows: Rows,
    most: int,
    small: int,
) -> Shapes:
    """Let few rows run in smaller forwards, if these give the same bits, or nearly so."""
    some = rows.spaced(min(most, ROWS_OF_A_SHAPE))
    results = _results(module, head, layers, batcher, precision, some)
    while not _has_memory(results, most):
        most //= 2
    ladder = same_bits(results, most)
    if 0 < small < ladder[0] and _agrees(results, small, most):
        return Shapes(ladder, small)
    return Shapes(ladder)


def _agrees(results: Callable[..., list[Tensor]], small: int, most: int) -> bool:
    """Whether forwards of few rows give nearly the same; a network may take none of one row."""
    try:
        pairs = zip(results(small, TRIAL_ROWS), results(most), strict=True)
        return all(close(own, others[: len(own)], SAME) for own, others in pairs)
    except Exception:
        return False


def _has_memory(results: Results, n_rows: int) -> bool:
    """Whether there is memory for a forward; one of a single row is taken to have it."""
    if n_rows == 1:
        return True
    try:
        results(n_rows)
    except torch.OutOfMemoryError:
        return False
    return True


def _check_has_values(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"The module's {name!r} is on the meta device, where tensors have no values. Load "
                'them first: module.to_empty(device="cpu"), then module.load_state_dict(...).'
            )


def must_run_alone(module: nn.Module) -> bool:
    """Whether the rounding of a row depends on its batch, as in dynamically quantized layers."""
    dynamic = "torch.ao.nn.quantized.dynamic"
    quantized = any(type(part).__module__.startswith(dynamic) for part in module.modules())
    return quantized or rounds_by_batch(module)


def _head_of(module: nn.Module, batch: Tensor, output: Any, name: str | None) -> str | None:
    """Name of the head; None if TorchScript hides it."""
    try:
        return find_head(module, batch, name)
    except HeadNotFoundError as error:
        if not scripted_parts(module):
            raise
        if name is not None:
            if _head_of(module, batch, output, None) is not None:
                raise
            raise HeadNotFoundError(
                f"head={name!r} cannot be found: TorchScript hides its layers. Pass the nn.Module "
                "from which it was made; or pass head=None and max_epochs=0 to score it by its "
                "logits alone."
            ) from error
    if is_plain_tuple(output) and len(output) > 1:
        raise HeadNotFoundError(
            f"The module returns {describe(output)}. As TorchScript hides its last layer, which of "
            "them are the logits cannot be told. Wrap the module in one that returns its logits "
            "alone, or pass the nn.Module from which it was made."
        )
    return None


def _check_keeps_features(module: nn.Module, head: str, batch: Tensor) -> None:
    """Refuse a module that changes in place what enters its head: features would be others."""
    entered: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next(iter([*args, *kwargs.values()]), None)
        if isinstance(value, Tensor):
            entered.append((value, value.clone()))

    handle = module.get_submodule(head).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            module(batch)
    finally:
        handle.remove()
    if not all(((now == before) | before.isnan()).all() for now, before in entered):
        raise ValueError(
            f"The module changes in place what enters its head, {head!r}, so that its features "
            "would be told wrongly. Let it change a copy, features.clone(); or pass inplace=False "
            "to the activation that does it."
        )


def check_trainable(
    network: Network, rows: Rows, *, given: nn.Module | None = None, penalized: bool = True
) -> None:
    """Refuse to train what training would not change as it should.

    The logits must carry a gradient to the parameters, and be what the head gives in training mode
    too. If the features carry none, a warning says that the penalty can change nothing. No
    statistic and no random generator changes. A few of the rows are taken. If a step fails in the
    precision of training, another takes its place (see `settle_precision`).
    """
    module, head = network.module, network.visible_head
    if scripted := scripted_parts(module):
        raise HeadNotFoundError(
            f"A part of the network, {next(iter(scripted))!r}, is TorchScript, which cannot be "
            "trained. Pass the nn.Module from which it was made; or max_epochs=0 (and "
            "pretrain_epochs=0, if you set it) to use the network as it is."
        )
    batch = network.batcher(rows.spaced(TRIAL_ROWS))
    if given is not None and len(batch) > 1:
        check_training(module, batch, given, explained(module, batch, rows, network.batcher))
    settle_precision(network, batch)
    with in_float32(network), autocast(network.device, network.precision.scoring):
        _check_learns(network, head, rows, penalized=penalized)


def _check_learns(network: Network, head: str, rows: Rows, *, penalized: bool) -> None:
    """Refuse logits without a gradient, or that are others in training mode; warn of features."""
    module = network.module
    batch = network.batcher(rows.spaced(TRIAL_ROWS))
    parameters = trainable(module)
    with torch.enable_grad(), explained(module, batch, rows, network.batcher):
        features, logits = features_and_logits(module, head, batch)
        trained, penalty_trained = (any(reached(z, parameters)) for z in (logits, features))
    if not trained:
        raise ValueError(
            "The logits carry no gradient, so the network cannot be fine-tuned: its parameters all "
            "have requires_grad=False, or its forward cuts the gradient, as torch.no_grad, "
            "inference_mode, .detach() and quantized layers do. Unfreeze parameters and remove "
            "what cuts, or pass max_epochs=0 (and pretrain_epochs=0, if you set it) to use the "
            "network as it is."
        )
    if len(batch) > 1:
        # On a copy: in training mode a forward changes statistics, and draws for dropout.
        with torch.random.fork_rng(devices=[]), explained(module, batch, rows, network.batcher):
            twin = deepcopied(module)
            set_mode(twin, training=True)
            same = Trial(twin, batch).gives(head, logits_of)
        if not same:
            raise ValueError(
                f"In training mode the module does not return what its head, {head!r}, "
                "gives, as it does in evaluation mode: a softmax, another sign, another output. "
                "Training would follow that instead of the logits; make its forward return the "
                "same in both modes."
            )
    if penalized and not penalty_trained:
        warn_user(
            f"Only the head, {head!r}, can be trained: its features carry no gradient, so "
            "the sparsity penalty can change nothing. Unfreeze the body, or remove the "
            "torch.no_grad or .detach() before the head; or pass sparsity_weight=0.",
            PenaltyWithoutEffectWarning,
        )
