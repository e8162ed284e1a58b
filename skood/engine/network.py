"""A classifier seen as features and logits: a module, its head, and how batches reach it."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..exceptions import HeadNotFoundError
from .batches import Batcher
from .compiling import compiled
from .copying import deepcopied, make_picklable, on_cpu
from .folding import Folded, Pair
from .hardware import Precision, available_device, rows_at_once
from .layers import moments_of
from .modes import set_mode
from .outputs import Seen, run
from .shapes import Shapes
from .trials import captured_calls
from .views import parts_with_a_mode, view_of

TRIAL_ROWS = 8
"""Rows on which a network is tried before anything else."""

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Features (n, d) and logits (n, K) of a batch."""


class Network:
    """A classifier ready to run: a copy of the user's module, its head, and how batches reach it.

    Parameters
    ----------
    module : nn.Module
        The classifier, on the device of `batcher`; owned by this object. The attribute `module` is
        a view of it, with one hook on the head, which is there for good: threads that score at the
        same time could not add and remove hooks of their own.
    head : str or None
        Name of the last layer, which turns features into logits. None if TorchScript hides it:
        there are only logits then.
    batcher : Batcher
        Turns rows into batches.
    precision : Precision
        Dtypes to train and to score in.
    n_logits : int
        Number K of logits.
    shapes : Shapes
        Numbers of rows that its forwards take.
    widest : int
        Values of a row where the network is widest.
    default_dtype : torch.dtype, default=torch.float32
        Dtype of what the network makes without naming one.
    compiled : bool, default=False
        Whether forwards run through torch.compile.
    replayed : bool, default=False
        Whether steps of its training were replayed as CUDA graphs.
    pairs : tuple of pairs of str, default=()
        Layers, and the batch-norms that are folded into them for scoring.
    layers : tuple of str, default=()
        Inner layers that the score sees.
    """

    def __init__(
        self,
        module: nn.Module,
        head: str | None,
        batcher: Batcher,
        precision: Precision,
        n_logits: int,
        shapes: Shapes,
        widest: int,
        default_dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        replayed: bool = False,
        pairs: tuple[Pair, ...] = (),
        layers: tuple[str, ...] = (),
    ) -> None:
        self.head = head
        self.batcher = batcher
        self.precision = precision
        self.n_logits = n_logits
        self.shapes = shapes
        self.widest = widest
        self.default_dtype = default_dtype
        self.compiled = compiled
        self.replayed = replayed
        self.pairs = pairs
        self.layers = layers
        self.adopt(module)

    def adopt(self, module: nn.Module) -> None:
        """Go on in evaluation mode with another module of the same make, as one trained before.

        What runs is a view of it with a hook on the head. The module itself is for users.
        """
        set_mode(module, training=False)  # copies and pickles of some come in training mode
        make_picklable(module)
        self._public = module
        self.module, _ = view_of(module)
        self._parts = tuple(parts_with_a_mode(self.module).values())
        self._seen = Inside()
        self._hook: RemovableHandle | None = None
        if self.head is not None:
            self._hook = self._seen.watch(self.module.get_submodule(self.head))
        self._folded: Folded | None = None
        self._forward = compiled(self._run, self.device) if self.compiled else self._run

    @property
    def public(self) -> nn.Module:
        """The module as users see it: on the same tensors, and without a hook of ours.

        What they do to it, beside changing its tensors, does not reach the one that runs.
        """
        if "_public" in vars(self):
            return self._public
        public = self._view()
        make_picklable(public)
        # The first that is made while the weights stay is kept, whichever thread makes it.
        return public if self.module.training else vars(self).setdefault("_public", public)

    @property
    def scorer(self) -> nn.Module:
        """The module that scores, without a hook of ours: `public`, or what it is folded to."""
        return Folded(self._view(), self.pairs).module if self.pairs else self.public

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.batcher.device

    @property
    def visible_head(self) -> str:
        """Name of the head, for what needs features; an error if TorchScript hides it."""
        if self.head is None:
            raise HeadNotFoundError(
                "The module is TorchScript, which hides its last layer, so there are no features. "
                "Training, features() and scores of features need them: pass the nn.Module from "
                "which it was made. To score it as it is, pass max_epochs=0 (and "
                "pretrain_epochs=0, if you set it) and a score of the logits alone: "
                '"energy", "gen", "msp", "max_logit" or "odin".'
            )
        return self.head

    @property
    def dtypes(self) -> dict[str, str]:
        """Names of the dtypes for "training" and "scoring"."""
        return self.precision.names(self.batcher.dtype)

    @property
    def execution(self) -> dict[str, Any]:
        """What was picked to run it fast, beside device and precision."""
        weights = [p for p in self.module.parameters() if p.ndim == 4]
        by_channel = any(
            w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
            for w in weights
        )
        return {
            "layout": "channels_last" if by_channel else "contiguous",
            "scoring_rows": self.shapes.all,
            "compiled": self.compiled,
            "cuda_graphs": self.replayed,
            "folded": len(self.pairs),
        }

    def describe(self) -> str:
        """What was found and chosen, for the user to read."""
        picked = self.execution
        dtypes = (f"{purpose} in {dtype}" for purpose, dtype in self.dtypes.items())
        return ", ".join(
            [
                "head hidden by TorchScript" if self.head is None else f"head {self.head!r}",
                f"{self.n_logits} logits",
                f"device {self.device}",
                *dtypes,
                f"layout {picked['layout']}",
                f"rows of a scoring forward {', '.join(map(str, picked['scoring_rows']))}",
                *(["compiled"] if self.compiled else []),
                *([f"batch-norms folded {picked['folded']}"] if self.pairs else []),
                *([f"inner layers {', '.join(map(repr, self.layers))}"] if self.layers else []),
            ]
        )

    def train(self, training: bool) -> None:
        """Put the network in training or in evaluation mode."""
        set_mode(self.module, training)
        # Training may give it other buffers and attributes, so that its views are made anew.
        vars(self).pop("_public", None)
        self._folded = None

    def evaluate(self) -> None:
        """Put the network in evaluation mode, if others with whom it shares a part ended that."""
        for part in self._parts:
            if part.training:
                set_mode(self.module, training=False)
                return

    def without_layers(self) -> None:
        """Go on with a score that does not look at inner layers."""
        self.layers, self._folded = (), None
        if self.compiled:  # as it scores from here on, for which smaller shapes were not tried
            self.unfold(Shapes(self.shapes.ladder[-1:]))

    def unfold(self, shapes: Shapes) -> None:
        """Go on scoring by the module itself, in shapes that suit it."""
        self.shapes, self.pairs, self._folded = shapes, (), None

    def without_shape(self, shape: int) -> None:
        """Go on without forwards of so many rows, for which there is no memory."""
        self.shapes = self.shapes.below(shape)

    def uncompiled_copy(self) -> Network:
        """A network of its own with the weights of this one; functions of the user's are shared."""
        twin = copy.deepcopy(self, {id(self.batcher): self.batcher})
        twin.compiled = False
        twin.adopt(twin.public)
        return twin

    def logits(self, batch: Tensor) -> Tensor:
        """Logits (n, K) of a batch that is scored."""
        return self._scored(batch, ())[1]

    def seen(self, batch: Tensor) -> Seen:
        """What a score sees of a batch, from one forward."""
        entered, logits, layers = self._scored(batch, self.layers)
        return Seen(*self._checked(entered, logits), layers)

    def trained(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch that is trained on."""
        return self._checked(*self._forward(batch))

    def captured(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch that is trained on, without the compiler."""
        return self._checked(*self._run(batch))

    def _scored(self, batch: Tensor, layers: Sequence[str]) -> tuple[Any, Tensor, Tensor | None]:
        """What enters the head, logits (n, K), and what scores see of inner layers."""
        if not self.pairs and not self.layers:
            return *self._forward(batch), None
        scorer = self._folded
        if scorer is None or not scorer.is_fresh():
            scorer = self._folded = self._fold()
        return self._seen.with_layers(scorer.module, batch, layers)

    def _fold(self) -> Folded:
        """A module for scoring alone, with hooks of its own."""
        folded = Folded(self._view(), self.pairs)
        if self.head is not None:
            self._seen.watch(folded.module.get_submodule(self.head))
        self._seen.watch_layers(folded.module, self.layers)
        return folded

    def _view(self) -> nn.Module:
        """The module again, on the same tensors and without a hook of ours."""
        view, hook = view_of(self.module, self._hook)
        if hook is not None:
            hook.remove()
        return view

    def _run(self, batch: Tensor) -> tuple[Any, Tensor]:
        """What enters the head, and logits (n, K)."""
        return self._seen.with_logits(self.module, batch)

    def _checked(self, entered: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        if entered is None:
            head = self.visible_head
            raise head_is_lost(head) if self.compiled else head_is_not_called(self.module, head)
        if logits.shape[1] != self.n_logits:
            raise ValueError(
                f"The module returns logits (n, {self.n_logits}) in evaluation mode, but "
                f"{tuple(logits.shape)} in training mode. Make its forward return the same in both."
            )
        return entered.flatten(1), logits

    def __getstate__(self) -> dict[str, Any]:
        # Weights travel on the CPU, so that what was trained on a GPU loads anywhere; compiled code
        # stays behind.
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        public = self.public
        return state | {"module": public if self.device.type == "cpu" else on_cpu(public)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = available_device(state["batcher"].device)
        if torch.is_inference_mode_enabled():  # no gradient could pass tensors made in it
            with torch.inference_mode(False):
                state = state | {"module": deepcopied(state["module"])}
        state["module"].to(device)
        moved = {
            "batcher": dataclasses.replace(state["batcher"], device=device),
        }
        if device.type != state["batcher"].device.type and state["shapes"].ladder != (1,):
            # Whether others give the same bits is not known there.
            rows = rows_at_once(state["widest"], device, state["precision"].scoring)
            moved |= {"shapes": Shapes((rows,))}
        Network.__init__(self, **(state | moved))


class Inside(threading.local):
    """What entered the head in the last forward of this thread, and inner layers, kept by hooks."""

    value: Any = None
    moments: dict[str, Tensor] | None = None

    def watch(self, head: nn.Module) -> RemovableHandle:
        """Hook the head."""
        # By a method: the compiler takes no object that is called.
        return head.register_forward_hook(self.keep, with_kwargs=True)

    def watch_layers(self, module: nn.Module, names: Sequence[str]) -> list[RemovableHandle]:
        """Hook inner layers."""
        layers = {name: module.get_submodule(name) for name in names}
        return [
            layer.register_forward_hook(partial(self._keep_layer, name))
            for name, layer in layers.items()
        ]

    def with_layers(
        self, module: nn.Module, batch: Tensor, names: Sequence[str]
    ) -> tuple[Any, Tensor, Tensor | None]:
        """As `with_logits`, and the moments (n, 2, c) of inner layers, if there are any."""
        moments: dict[str, Tensor] = {}
        self.moments = moments if names else None
        try:
            entered, logits = self.with_logits(module, batch)
        finally:
            self.moments = None
        for name in names:
            if name not in moments or moments[name].shape[0] != logits.shape[0]:
                raise layer_is_lost(name)
        return entered, logits, torch.cat([moments[n] for n in names], dim=2) if names else None

    def with_logits(self, module: nn.Module, batch: Tensor) -> tuple[Any, Tensor]:
        """What enters the head in a forward of a module, and logits (n, K)."""
        self.value = None
        logits = run(module, batch)
        entered, self.value = self.value, None
        return entered, logits

    def keep(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep what entered the head."""
        self.value = next(iter([*args, *kwargs.values()]), None)

    def _keep_layer(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        if self.moments is None:  # the forward is for something else, or of another thread
            return
        if name in self.moments or output.is_nested:
            raise layer_is_lost(name)
        self.moments[name] = moments_of(layer, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # What belongs to a thread can be neither copied nor pickled; copies begin with none.
        return Inside, ()


def features_and_logits(module: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, d), the input of a head, and logits (n, K) of a batch, on trial."""
    return seen_on_trial(module, head, (), batch)[:2]


def seen_on_trial(
    module: nn.Module, head: str, layers: Sequence[str], batch: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, and the moments (n, 2, c) of inner layers, if there are any."""
    inside = Inside()
    handles = inside.watch_layers(module, layers)
    try:
        with captured_calls({head: module.get_submodule(head)}) as calls:
            _, logits, moments = inside.with_layers(module, batch, layers)
    finally:
        for handle in handles:
            handle.remove()
    if head not in calls:
        raise head_is_not_called(module, head)
    return calls[head].features.flatten(1), logits, moments


def head_is_not_called(module: nn.Module, head: str) -> RuntimeError:
    """The error for a forward that passes over the head."""
    mode = "training" if module.training else "evaluation"
    return RuntimeError(
        f"In {mode} mode the module does not call its head, {head!r}, so there are no "
        "features. Make its forward call it in both modes, or pass another head=."
    )


class LostLayerError(RuntimeError):
    """An inner layer does otherwise in a forward than on trial."""


def layer_is_lost(layer: str) -> LostLayerError:
    """The error for a forward in which an inner layer does otherwise than on trial."""
    return LostLayerError(
        f"The score looks at the layer {layer!r}, and for these rows the module does not call it "
        "once for all rows, as it did on trial: it passes over it, calls it again, or in pieces. "
        'Pass score_function="two_views", which looks at the features alone.'
    )


def head_is_lost(head: str) -> RuntimeError:
    """The error for a forward that is compiled in pieces, which lose the hook's value."""
    return RuntimeError(
        f"torch.compile lost what enters the head, {head!r}, so there are no features: it could "
        "not compile the module's forward in one piece, as one that prints or asks for the value "
        "of a tensor. Pass compile=False."
    )


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in module.parameters() if p.requires_grad]


def reached(values: Tensor, parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Whether values depend on each parameter, and let its gradient through."""
    if not (parameters and values.requires_grad):
        return [False] * len(parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a gradient, which is what we ask
        # Re-entrant checkpoints refuse torch.autograd.grad.
        values.sum().backward(retain_graph=True)
    found = [parameter.grad is not None for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def names_before_the_last(network: Network, batch: Tensor, share: float) -> list[str]:
    """Trainable parameters before the last ones that hold a share of the weights.

    The head does not count, and is not among them: whatever its size, the features can be trained.
    Nor does what the features of a batch do not depend on, such as a decoder. Last is what the
    module registers last.
    """
    module, head = network.module, network.visible_head
    of_head = {id(p) for p in module.get_submodule(head).parameters()}
    names, parameters = zip(
        *((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True
    )
    with torch.enable_grad():
        features, _ = features_and_logits(module, head, batch)
        used = reached(features, parameters)
    if not any(used):  # as of a forward that cuts the gradient in evaluation mode
        used = [True] * len(parameters)
    body = [
        (name, p.numel() if is_used else 0)
        for name, p, is_used in zip(names, parameters, used, strict=True)
        if id(p) not in of_head
    ]
    missing = share * sum(size for _, size in body)
    while body and missing > 0:
        missing -= body.pop()[1]
    return [name for name, _ in body]


@contextmanager
def held_still(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, training does not change the parameters of these names."""
    parameters = [module.get_parameter(name).requires_grad_(False) for name in names]
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating parameter or buffer; float32 where there is none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
