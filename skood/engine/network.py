"""A classifier seen as features and logits: made ready, tried on rows, and captured at its head."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .batches import Batcher, Rows, has_channels_last, slices, spaced
from .hardware import (
    Precision,
    autocast,
    available_device,
    few_rows,
    resolve_precision,
    rows_at_once,
)
from .heads import Trial, captured_calls, close, find_head
from .outputs import as_float64, check_usable, logits_of, run
from .scripted import bring_out_head, has_bare_scripts, portable, scripted_parts, wrapped_scripts
from .shapes import Outputs, same_bits

TRIAL_ROWS = 8
"""Rows on which a network is tried before anything else."""

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Features (n, d) and logits (n, K) of a batch."""

COMPILED = "_orig_mod"
"""Name under which what torch.compile returns holds the module."""

PROBED_FEATURES = 256
"""Features of which the weights are read at a time."""

PROBE = 256
"""Size of a feature when its weights are read."""

ROWS_OF_A_SHAPE = 64
"""Rows on which shapes of batches are compared, at most."""

FEW_ROWS_TOLERANCE = 1e-5
"""Relative difference that a forward of few rows may make."""


class Network:
    """A classifier ready to run: a copy of the user's module, its head, and how batches reach it.

    Parameters
    ----------
    module : nn.Module
        The classifier, on the device of `batcher`; owned by this object.
    head : str
        Qualified name of the submodule that consumes the features and gives the logits.
    batcher : Batcher
        Turns rows of X into batches.
    precision : Precision
        Dtypes to train and to score in.
    n_logits : int
        Number K of logits.
    shapes : tuple of int
        Numbers of rows that its forwards take, ascending. Within each, and across all of them, the
        result for a row is bitwise the same in any company.
    widest : int
        Values of a row where the network is widest.
    few_rows : int, default=0
        Requests of at most so many rows run in a forward of this size, and agree with the others to
        1e-5.
    compiled : bool, default=False
        Whether forwards run through torch.compile.
    replayed : bool, default=False
        Whether steps of its training were replayed as CUDA graphs.
    """

    def __init__(
        self,
        module: nn.Module,
        head: str,
        batcher: Batcher,
        precision: Precision,
        n_logits: int,
        shapes: tuple[int, ...],
        widest: int,
        few_rows: int = 0,
        compiled: bool = False,
        replayed: bool = False,
    ) -> None:
        self.head = head
        self.batcher = batcher
        self.precision = precision
        self.n_logits = n_logits
        self.shapes = shapes
        self.widest = widest
        self.few_rows = few_rows
        self.compiled = compiled
        self.replayed = replayed
        # While hooks are on the module, it must not be copied: the copies would keep them.
        self._idle = threading.Condition()
        self._captures = 0
        self.adopt(module)

    def adopt(self, module: nn.Module) -> None:
        """Go on with another module of the same make, such as one trained before."""
        self.module = module
        if self.compiled:
            self._view = _view(module)
            self._compiled_forward = _compiled_forward(self._view, self.head, self.device)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.batcher.device

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
            "scoring_rows": ((self.few_rows,) if self.few_rows else ()) + self.shapes,
            "compiled": self.compiled,
            "cuda_graphs": self.replayed,
        }

    def describe(self) -> str:
        """What was found and chosen, for the user to read."""
        picked = self.execution
        dtypes = (f"{purpose} in {dtype}" for purpose, dtype in self.dtypes.items())
        return ", ".join(
            [
                f"head {self.head!r}",
                f"{self.n_logits} logits",
                f"device {self.device}",
                *dtypes,
                f"layout {picked['layout']}",
                f"rows of a scoring forward {', '.join(map(str, picked['scoring_rows']))}",
                *(["compiled"] if self.compiled else []),
            ]
        )

    def train(self, training: bool) -> None:
        """Put the network in training or in evaluation mode."""
        self.module.train(training)
        if self.compiled:
            self._view.train(training)

    def uncompiled_copy(self) -> Network:
        """A network of its own in the state of this one."""
        twin = copy.deepcopy(self)
        twin.compiled = False
        return twin

    def logits(self, batch: Tensor) -> Tensor:
        """Logits (n, K) of a batch."""
        if self.compiled:
            return self._compiled_forward(batch)[1]
        return run(self.module, batch)

    def features_and_logits(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch, from one forward."""
        return self._compiled_forward(batch) if self.compiled else self.captured(batch)

    def captured(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch, without the compiler."""
        with self._capturing():
            features, logits = features_and_logits(self.module, self.head, batch)
        if logits.shape[1] != self.n_logits:
            raise ValueError(
                f"The module returns logits (n, {self.n_logits}) in evaluation mode, but "
                f"{tuple(logits.shape)} in training mode. Make its forward return the same in both."
            )
        return features, logits

    def __getstate__(self) -> dict[str, Any]:
        # Weights travel on the CPU, so that what was trained on a GPU loads anywhere; compiled code
        # stays behind.
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        with self._idle:
            self._idle.wait_for(lambda: self._captures == 0)
            return state | {"module": copy.deepcopy(self.module).cpu()}

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        with self._idle:
            self._captures += 1
        try:
            yield
        finally:
            with self._idle:
                self._captures -= 1
                self._idle.notify_all()

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = available_device(state["batcher"].device)
        moved = {
            "module": state["module"].to(device),
            "batcher": dataclasses.replace(state["batcher"], device=device),
        }
        if device.type != state["batcher"].device.type and state["shapes"] != (1,):
            # Whether others give the same bits is not known there.
            moved |= {"shapes": (rows_at_once(state["widest"], device),), "few_rows": 0}
        Network.__init__(self, **(state | moved))


class Captured(nn.Module):
    """A network as a module that returns all that a loss depends on.

    It shows the parameters alone: DistributedDataParallel would send all buffers before each step.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.trained = nn.ParameterList(network.module.parameters())
        self.network = network

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch."""
        return self.network.features_and_logits(batch)


def open_network(
    module: nn.Module,
    X: Rows,
    rows: NDArray[np.intp],
    *,
    head: str | None,
    batcher: Batcher,
    precision: str,
    compiled: bool,
    few_rows_apart: bool,
) -> Network:
    """Make a module ready to run, having tried it on real rows.

    Parameters
    ----------
    module : nn.Module
        The classifier; it is moved and put in evaluation mode.
    X : array or tensor of shape (n, ...)
        Rows.
    rows : ndarray of int
        Rows of X to try the module on, a few of them.
    head : str or None
        Name of the head, where the user knows it.
    batcher : Batcher
        Turns rows of X into batches.
    precision : {"auto", "float32", "bfloat16"}
        Precision asked for.
    compiled : bool
        Whether to run through torch.compile.
    few_rows_apart : bool
        Whether requests of few images may run in a forward of their own size, which is faster and
        agrees with others to 1e-5.

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
    module = module.to(batcher.device).eval()
    all_rows, rows = rows, spaced(rows, TRIAL_ROWS)
    batch = batcher(X, rows)
    with torch.no_grad():
        with _explained(module, batch, X, batcher):
            output = module(batch)
        logits = logits_of(output, len(batch))
        check_usable(logits, batch, module)
        # After a first forward, which makes what is lazy.
        if batch.ndim == 4 and all(p.ndim < 5 for p in module.parameters()):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        alone = _must_run_alone(module)
        _check_rows_alone(module, batcher, X, rows[:1] if alone else rows)
    widest = _widest(module, batch)
    most = 1 if alone else rows_at_once(widest, batcher.device)
    network = Network(
        module,
        _head_of(module, batch, head),
        batcher,
        resolve_precision(precision, module, batcher.device),
        logits.shape[1],
        shapes=(most,),
        widest=widest,
        compiled=compiled,
    )
    if not compiled:  # each shape would be compiled on its own, which takes long
        rows = spaced(all_rows, min(most, ROWS_OF_A_SHAPE))
        few = few_rows(batcher.device) if few_rows_apart and batch.ndim > 2 else 0
        _choose_shapes(network, X, rows, few)
    return network


class _Sizes(TorchDispatchMode):
    """Notes the size of each tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = output if isinstance(output, tuple | list) else [output]
        self.noted += [x.numel() for x in outputs if isinstance(x, Tensor)]
        return output


def _widest(module: nn.Module, batch: Tensor) -> int:
    """Values of a row in the largest tensor of a forward that grows with its rows."""
    sizes = []
    for n_rows in (TRIAL_ROWS // 2, TRIAL_ROWS):
        rows = batch[torch.arange(n_rows, device=batch.device) % len(batch)]
        with torch.no_grad(), _Sizes() as seen:
            module(rows)
        sizes.append(seen.noted)
    growths = [many - few for few, many in zip(*sizes, strict=False)]
    return max([batch[0].numel(), *(growth // (TRIAL_ROWS // 2) for growth in growths)])


def _choose_shapes(network: Network, X: Rows, rows: NDArray[np.intp], few: int) -> None:
    """Let few rows run in smaller forwards, where these give the same bits, or nearly so."""
    (most,) = network.shapes

    @functools.cache
    def outputs(n_rows: int, tried: int = len(rows)) -> list[Tensor]:
        """Features and logits of the first rows, from forwards of so many."""
        pieces = []
        for piece in slices(tried, n_rows):
            batch = network.batcher(X, np.resize(rows[piece], n_rows))
            with (
                torch.inference_mode(),
                autocast(network.device, network.precision.scoring),
                _explained(network.module, batch, X, network.batcher),
            ):
                both = network.features_and_logits(batch)
                pieces.append([x[: len(rows[piece])].clone() for x in both])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    while not _has_memory(outputs, most):
        most //= 2
    network.shapes = same_bits(outputs, most)
    if 0 < few < network.shapes[0]:
        tried = min(TRIAL_ROWS, len(rows))
        pairs = zip(outputs(few, tried), outputs(most), strict=True)
        if all(close(own, others[:tried], FEW_ROWS_TOLERANCE) for own, others in pairs):
            network.few_rows = few


def _has_memory(outputs: Outputs, n_rows: int) -> bool:
    """Whether there is memory for a forward; one of a single row is taken to have it."""
    if n_rows == 1:
        return True
    try:
        outputs(n_rows)
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


def _must_run_alone(module: nn.Module) -> bool:
    """Whether the rounding of a row depends on its batch, as in dynamically quantized layers."""
    dynamic = "torch.ao.nn.quantized.dynamic"
    if not any(type(part).__module__.startswith(dynamic) for part in module.modules()):
        return False
    warnings.warn(
        "The network has dynamically quantized layers, which round the rows of a batch on one "
        "scale: rows are scored one by one, so that a score depends on its row alone. The network "
        "before quantization scores much faster.",
        UserWarning,
        stacklevel=3,
    )
    return True


def _head_of(module: nn.Module, batch: Tensor, name: str | None) -> str:
    """Name of the head, which is brought out of TorchScript if need be."""
    try:
        return find_head(module, batch, name)
    except ValueError as error:
        if not (parts := scripted_parts(module)):
            raise
        try:
            return bring_out_head(module, batch, name)
        except ValueError as inside:
            raise (inside if "" in parts else error) from None


@contextmanager
def _explained(module: nn.Module, batch: Tensor, X: Rows, batcher: Batcher) -> Iterator[None]:
    """Add to an error of the user's network what it was given, and what may help."""
    try:
        yield
    except Exception as error:
        hints = "".join(f" {hint}" for hint in _hints(module, batch, X, batcher, str(error)))
        error.add_note(
            f"Raised by the module given, {type(module).__name__}, on a batch of shape "
            f"{tuple(batch.shape)} and dtype {batch.dtype}.{hints} If it expects another shape, "
            "dtype or layout, pass a function that makes it as preprocess=."
        )
        raise


def _hints(
    module: nn.Module, batch: Tensor, X: Rows, batcher: Batcher, error: str
) -> Iterator[str]:
    parts = list(module.modules())
    integers = "int" in str(getattr(X, "dtype", "")) and batcher.preprocess is None
    if (integers and batch.ndim < 4) or any(isinstance(part, nn.Embedding) for part in parts):
        yield (
            "Without preprocess=, integers are cast to "
            f"{str(batcher.dtype).removeprefix('torch.')}; a network on token ids takes them with "
            "preprocess=torch.Tensor.long."
        )
    if has_channels_last(tuple(batch.shape)):
        yield (
            "The batch looks like images with channels last, (n, h, w, c), where networks take "
            "(n, c, h, w): preprocess=skood.networks.NormalizeImages(mean, std) puts them first."
        )
    elif batch.ndim < 4 and any(isinstance(part, nn.Conv2d) for part in parts):
        yield (
            "It has 2-D convolutions, which take images (n, c, h, w): X.reshape(n, c, h, w) makes "
            "them of flat rows, X[:, None] of gray images (n, h, w)."
        )
    if "inference" in error.lower():
        yield (
            "A part of forward runs under torch.inference_mode(), through which nothing can be "
            "trained: remove it, or pass max_epochs=0 to use the network as it is."
        )
    if "device" in error.lower() or "cuda" in error.lower():
        yield (
            f"Its parameters and buffers, and the batch, are on {batch.device}. Tensors kept as "
            "plain attributes stay where they were: use register_buffer. Remove .cuda() and "
            ".to(...) from forward, or pass device= the device that they name."
        )


def check_trainable(
    network: Network, X: Rows, rows: NDArray[np.intp], *, penalized: bool = True
) -> None:
    """Refuse to train what training would not change as it should.

    The logits must carry a gradient to the parameters, and be what the head gives in training mode
    too. No statistic and no random generator changes.

    Parameters
    ----------
    network : Network
        The network, in evaluation mode.
    X : array or tensor of shape (n, ...)
        Rows.
    rows : ndarray of int
        Rows of X to try it on; a few of them are taken.
    penalized : bool, default=True
        Whether a penalty on the features is part of the loss.

    Raises
    ------
    ValueError
        If the logits carry no gradient, or are something else in training mode.

    Warns
    -----
    UserWarning
        If the features carry none, so that the penalty can change nothing.
    """
    module = network.module
    batch = network.batcher(X, spaced(rows, TRIAL_ROWS))
    parameters = trainable(module)
    with torch.enable_grad(), _explained(module, batch, X, network.batcher):
        features, logits = features_and_logits(module, network.head, batch)
        trained, penalty_trained = (_has_gradient(z, parameters) for z in (logits, features))
    if not trained:
        raise ValueError(
            "The logits carry no gradient, so the network cannot be fine-tuned: its parameters all "
            "have requires_grad=False, or its forward cuts the gradient, as torch.no_grad, "
            "inference_mode, .detach() and quantized layers do. Unfreeze parameters and remove "
            "what cuts, or pass max_epochs=0 to use the network as it is."
        )
    if len(batch) > 1:
        # On a copy: in training mode a forward changes statistics, and draws for dropout.
        with torch.random.fork_rng(devices=[]), _explained(module, batch, X, network.batcher):
            trial = Trial(copy_module(module).train(), batch)
            same = trial.gives(network.head, logits_of)
        if not same:
            raise ValueError(
                f"In training mode the module does not return what its head, {network.head!r}, "
                "gives, as it does in evaluation mode: a softmax, another sign, another output. "
                "Training would follow that instead of the logits; make its forward return the "
                "same in both modes."
            )
    if penalized and not penalty_trained:
        warnings.warn(
            f"Only the head, {network.head!r}, can be trained: its features carry no gradient, so "
            "the sparsity penalty can change nothing. Unfreeze the body, or remove the "
            "torch.no_grad or .detach() before the head; or pass sparsity_weight=0.",
            UserWarning,
            stacklevel=3,
        )


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in module.parameters() if p.requires_grad]


def _has_gradient(values: Tensor, parameters: list[nn.Parameter]) -> bool:
    """Whether values depend on a parameter, and let its gradient through."""
    if not (parameters and values.requires_grad):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a gradient, which is what we ask
        gradients = torch.autograd.grad(
            values.sum(), parameters, retain_graph=True, allow_unused=True
        )
    return any(gradient is not None for gradient in gradients)


def features_and_logits(module: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, d), the input of a head, and logits (n, K) of a batch, from one forward."""
    with captured_calls({head: module.get_submodule(head)}) as calls:
        logits = run(module, batch)
    if head not in calls:
        mode = "training" if module.training else "evaluation"
        raise RuntimeError(
            f"In {mode} mode the module does not call its head, {head!r}, so there are no "
            "features. Make its forward call it in both modes, or pass another head=."
        )
    return calls[head].features.flatten(1), logits


def affine_head(network: Network, X: Rows, rows: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
    """Weight (K, d) and bias (K,) of a head, in float64, found by what it returns.

    Parameters
    ----------
    network : Network
        The network, in evaluation mode.
    X : array or tensor of shape (n, ...)
        Rows.
    rows : ndarray of int
        Rows of X on whose features the head is tried.

    Returns
    -------
    weight, bias : Tensor
        The head maps features h to ``h @ weight.T + bias``.

    Raises
    ------
    ValueError
        If the head is not affine.
    """
    head = network.module.get_submodule(network.head)
    batch = network.batcher(X, spaced(rows, TRIAL_ROWS))
    with _as_it_is(network), captured_calls({network.head: head}) as calls:
        run(network.module, batch)
    features = calls[network.head].features
    flat = features.flatten(1)

    def logits(values: Tensor) -> Tensor:
        with _as_it_is(network):
            output = head(values.to(flat).reshape(-1, *features.shape[1:]))
        # A convolution of size 1 gives (n, K, 1, 1).
        return as_float64(logits_of(output.flatten(1) if isinstance(output, Tensor) else output))

    bias = logits(torch.zeros_like(flat[:1]))
    units = torch.arange(flat.shape[1], device=flat.device).split(PROBED_FEATURES)
    # Large, as in half precision the sum with a bias would round the digits of a weight away.
    columns = [logits(PROBE * F.one_hot(some, flat.shape[1])) - bias for some in units]
    weight, bias = torch.cat(columns).T.contiguous() / PROBE, bias[0]
    tried = torch.cat([flat, -2 * flat])
    expected = tried.to(weight) @ weight.T + bias
    error = (logits(tried) - expected).abs().amax()
    # A bfloat16 head rounds each of its products.
    if error > max(1e-4, 8 * torch.finfo(flat.dtype).eps) * expected.abs().amax():
        raise ValueError(
            f"The head, {network.head!r} ({type(head).__name__}), is not affine in its features, "
            "as this score needs it to be. Pass head= the last linear layer, or another score."
        )
    return weight, bias


@contextmanager
def _as_it_is(network: Network) -> Iterator[None]:
    """Without gradients, in the network's own precision, whatever surrounds the call."""
    with torch.no_grad(), torch.autocast(network.device.type, enabled=False):
        yield


def _check_rows_alone(module: nn.Module, batcher: Batcher, X: Rows, rows: NDArray[np.intp]) -> None:
    """Refuse a network whose logits for a row change from call to call, or with its company."""
    kept = max(len(rows) // 2, 1)
    other_company = batcher(X, np.concatenate([rows[:kept], np.full(len(rows), rows[0])]))
    first, again = (run(module, batcher(X, rows))[:kept] for _ in range(2))
    if not close(first, again):
        raise ValueError(
            "The module, or preprocess, gives other logits for the same rows when called again in "
            "evaluation mode, so no score would mean anything. Make what is random depend on "
            "self.training, as in F.dropout(x, p, training=self.training), or pass it as augment=."
        )
    try:
        logits = run(module, other_company)[:kept]
    except Exception as error:
        error.add_note(
            f"The module given, {type(module).__name__}, took a batch of {len(rows)} rows, but not "
            f"one of {len(other_company)}. Let forward read the number of rows from its input, "
            "x.shape[0], and trace a module with that."
        )
        raise
    if not close(first, logits):
        raise ValueError(
            "The logits of a row depend on the other rows of its batch, in evaluation mode, so its "
            "score would too. Causes: batch-norm with track_running_stats=False, a preprocess= "
            "that normalises by the batch. Use statistics fixed at training time."
        )


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy of a classifier, without the wrappers that tie it to devices or to a compiler."""
    wrapper = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    while (name := wrapper.get(type(module), COMPILED)) in module._modules:
        module = module.get_submodule(name)
    # Tensors computed by an earlier forward and kept as attributes have a graph, which copies of
    # modules must not: they are copied by value.
    attributes = [value for part in module.modules() for value in vars(part).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    try:
        copied = copy.deepcopy(
            module,
            {id(value): value.detach().clone() for value in computed} | wrapped_scripts(module),
        )
    except Exception as error:
        raise TypeError(
            f"The module ({type(module).__name__}) cannot be copied: {error}. fit trains a copy "
            "and never touches the module given; remove what copy.deepcopy refuses, such as "
            "stored activations."
        ) from error
    for part in list(copied.modules()):
        for name, child in part.named_children():
            if COMPILED in child._modules:
                setattr(part, name, child._modules[COMPILED])
    for name, part in copied.named_modules():
        _check_shares_nothing(name or "the module", part)
    return copied


def _check_shares_nothing(name: str, part: nn.Module) -> None:
    """Refuse functions that reach, from a copy, into the module that it was made of."""
    for attribute, value in vars(part).items():
        values = value.values() if isinstance(value, Mapping) else [value]
        things = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])]
        functions = [x for x in things if isinstance(x, types.FunctionType) and x.__closure__]
        if attribute == "forward" and functions:
            raise TypeError(
                f"The forward of {name!r} was replaced by a function, as "
                "module.forward = torch.compile(module.forward) does. Copies share it, and with "
                "it the weights of the module given, which fit must not touch. Use "
                "module.compile() or torch.compile(module), or a subclass with another forward."
            )
        if any(_holds_weights(function) for function in functions):
            raise TypeError(
                f"{attribute!r} of {name!r} holds a function that reaches a module or a tensor "
                "from outside, such as a lambda that calls self.layer. Copies share it, and with "
                "it the weights of the module given, which fit must not touch. Make it a method, "
                "or an nn.Module that holds what it calls."
            )


def _holds_weights(function: types.FunctionType) -> bool:
    cells = function.__closure__ or ()
    contents = []
    for cell in cells:
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return any(isinstance(content, nn.Module | nn.Parameter) for content in contents)


def on_cpu(module: nn.Module) -> nn.Module:
    """The module itself where it lies on the CPU and pickles, else a copy that does."""
    if has_bare_scripts(module):
        return portable(module)
    if all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module).cpu()


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating parameter or buffer; float32 where there is none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _view(module: nn.Module) -> nn.Module:
    """A second module on the same tensors, for hooks that must not show in the first."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _compiled_forward(
    module: nn.Module, head: str, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # The compiler wants one lasting hook, where a hook per forward would make it compile again each
    # time.
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["features"] = [*args, *kwargs.values()][0]

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = run(module, batch)
        return kept["features"].flatten(1), logits

    module.get_submodule(head).register_forward_pre_hook(keep, with_kwargs=True)
    plain = torch.compile(forward, dynamic=False)
    if device.type != "cuda":
        return plain
    # On a GPU, the kernels of a forward are launched as one CUDA graph, as the shapes are fixed.
    graphed = torch.compile(forward, dynamic=False, mode="reduce-overhead")

    def replayed(batch: Tensor) -> tuple[Tensor, Tensor]:
        # Graphs belong to a thread, and those of training would hold its activations twice.
        if torch.is_grad_enabled() or threading.current_thread() is not threading.main_thread():
            return plain(batch)
        torch.compiler.cudagraph_mark_step_begin()
        features, logits = graphed(batch)
        # Copies, as the next replay writes into the same memory.
        return features.clone(), logits.clone()

    return replayed
