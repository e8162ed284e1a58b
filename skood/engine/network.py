"""A classifier seen as features and logits: finds the head and captures what enters it."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .batches import Batcher, Rows
from .hardware import Precision, available_device, resolve_precision

TRIAL_ROWS = 8
"""Rows on which a network is tried before anything else."""

FEW_ROWS = 16
"""Images up to this number are scored one by one on a CPU."""


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
    few_rows : int, default=0
        Requests of at most this many rows run one by one instead of in a padded batch.
    compiled : bool, default=False
        Whether forwards run through torch.compile.
    """

    def __init__(
        self,
        module: nn.Module,
        head: str,
        batcher: Batcher,
        precision: Precision,
        n_logits: int,
        few_rows: int = 0,
        compiled: bool = False,
    ) -> None:
        self.head = head
        self.batcher = batcher
        self.precision = precision
        self.n_logits = n_logits
        self.few_rows = few_rows
        self.compiled = compiled
        # While hooks are on the module, it must not be copied: the copies would keep them.
        self._idle = threading.Condition()
        self._captures = 0
        self.adopt(module)

    def adopt(self, module: nn.Module) -> None:
        """Go on with another module of the same make, such as one trained before."""
        self.module = module
        if self.compiled:
            self._view = _view(module)
            self._compiled_forward = _compiled_forward(self._view, self.head)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.batcher.device

    @property
    def dtypes(self) -> dict[str, str]:
        """Names of the dtypes for "training" and "scoring"."""
        return self.precision.names(self.batcher.dtype)

    def describe(self) -> str:
        """What was found and chosen, for the user to read."""
        return f"head {self.head!r}, {self.n_logits} logits, device {self.device}, " + ", ".join(
            f"{purpose} in {dtype}" for purpose, dtype in self.dtypes.items()
        )

    def train(self, training: bool) -> None:
        """Put the network in training or in evaluation mode."""
        self.module.train(training)
        if self.compiled:
            self._view.train(training)

    def logits(self, batch: Tensor) -> Tensor:
        """Logits (n, K) of a batch."""
        if self.compiled:
            return self._compiled_forward(batch)[1]
        return run(self.module, batch)

    def features_and_logits(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, d) and logits (n, K) of a batch, from one forward."""
        if self.compiled:
            return self._compiled_forward(batch)
        head = {self.head: self.module.get_submodule(self.head)}
        with self._capturing(), _captured_calls(head) as calls:
            logits = self.logits(batch)
        features, _ = calls[self.head]
        return features.flatten(1), logits

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
        Network.__init__(self, **(state | moved))


def open_network(
    module: nn.Module,
    X: Rows,
    rows: NDArray[np.intp],
    *,
    head: str | None,
    batcher: Batcher,
    precision: str,
    compiled: bool,
    single_rows: bool,
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
    single_rows : bool
        Whether a few images may be scored one by one instead of in a padded batch, which is
        faster on a CPU and agrees to 1e-5.

    Returns
    -------
    Network
        The network, in evaluation mode.

    Raises
    ------
    ValueError, TypeError
        If the module gives no logits or has no head; its own errors pass through, with a note.
    """
    module = module.to(batcher.device).eval()
    batch = batcher(X, rows[:TRIAL_ROWS])
    try:
        with torch.no_grad():
            n_logits = run(module, batch).shape[1]
            if batch.ndim == 4:  # after a first forward, which makes what is lazy
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except Exception as error:
        error.add_note(
            f"Raised by the module given, {type(module).__name__}, on a batch of shape "
            f"{tuple(batch.shape)} and dtype {batch.dtype}. If it expects another shape, dtype or "
            "layout, pass a function that makes it as preprocess=."
        )
        raise
    with torch.no_grad():
        _check_rows_alone(module, batcher, X, rows[:TRIAL_ROWS])
    return Network(
        module,
        find_head(module, batch, head),
        batcher,
        resolve_precision(precision, module, batcher.device),
        n_logits,
        few_rows=FEW_ROWS if single_rows and batch.ndim > 2 and batcher.device.type == "cpu" else 0,
        compiled=compiled,
    )


def _check_rows_alone(module: nn.Module, batcher: Batcher, X: Rows, rows: NDArray[np.intp]) -> None:
    """Refuse a network whose logits for a row change from call to call, or with its company."""
    kept = max(len(rows) // 2, 1)
    other_company = np.concatenate([rows[:kept], np.full(len(rows) - kept, rows[0])])
    first, again = (run(module, batcher(X, rows))[:kept] for _ in range(2))
    if not _close(first, again):
        raise ValueError(
            "The module, or preprocess, gives other logits for the same rows when called again in "
            "evaluation mode, so no score would mean anything. Make what is random depend on "
            "self.training, as in F.dropout(x, p, training=self.training), or pass it as augment=."
        )
    if not _close(first, run(module, batcher(X, other_company))[:kept]):
        raise ValueError(
            "The logits of a row depend on the other rows of its batch, in evaluation mode, so its "
            "score would too. Causes: batch-norm with track_running_stats=False, a preprocess= "
            "that normalises by the batch. Use statistics fixed at training time."
        )


def _close(logits: Tensor, others: Tensor) -> bool:
    scale = logits.abs().amax().clamp_min(torch.finfo(logits.dtype).tiny)
    return bool(((logits - others).abs().amax() <= 1e-2 * scale) | ~torch.isfinite(scale))


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy of a classifier, without the wrappers that tie it to devices or to a compiler."""
    wrapper = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    while (name := wrapper.get(type(module), "_orig_mod")) in module._modules:
        module = module.get_submodule(name)
    # Tensors computed by an earlier forward and kept as attributes have a graph, which copies of
    # modules must not: they are copied by value.
    attributes = [value for part in module.modules() for value in vars(part).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    try:
        return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise TypeError(
            f"The module ({type(module).__name__}) cannot be copied: {error}. fit trains a copy "
            "and never touches the module given; remove what copy.deepcopy refuses, such as "
            "stored activations."
        ) from error


def on_cpu(module: nn.Module) -> nn.Module:
    """The module itself where it lies on the CPU, else a copy that does."""
    if all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers())):
        return module
    return copy.deepcopy(module).cpu()


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating parameter or buffer; float32 where there is none."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def run(module: nn.Module, batch: Tensor) -> Tensor:
    """Logits (n, K) of a batch, one row for each of its rows."""
    logits = logits_of(module(batch))
    if len(logits) != len(batch):
        raise ValueError(
            f"The module returned logits of shape {tuple(logits.shape)} for {len(batch)} rows; "
            "expected one row of logits for each row. A network that averages or splits its rows "
            "cannot score them one by one."
        )
    return logits


def logits_of(output: Any) -> Tensor:
    """Logits (n, K) in what a classifier returned: a tensor, or a tuple, dict or object."""
    found = output
    if isinstance(found, Mapping):
        found = found.get("logits", found)
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"The module returned {_describe(output)}; expected logits: a tensor (n, K), a tuple "
            'whose first element is that tensor, or a dict with the key "logits". Wrap the '
            "module in one that returns its logits."
        )
    if found.ndim != 2 or found.shape[1] < 2:
        raise ValueError(
            f"The module returned logits of shape {tuple(found.shape)}; expected (n, K), one "
            "column for each of K >= 2 classes. A network with one output for two classes needs "
            "a second column: logits z become (0, z)."
        )
    return found


def _view(module: nn.Module) -> nn.Module:
    """A second module on the same tensors, for hooks that must not show in the first."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def _compiled_forward(module: nn.Module, head: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # The compiler wants one lasting hook, where a hook per forward would make it compile again each
    # time.
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["features"] = [*args, *kwargs.values()][0]

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = run(module, batch)
        return kept["features"].flatten(1), logits

    module.get_submodule(head).register_forward_pre_hook(keep, with_kwargs=True)
    return torch.compile(forward, dynamic=False)


def find_head(module: nn.Module, batch: Tensor, name: str | None = None) -> str:
    """Name of the head: the submodule whose input are the features and whose output the logits.

    The claim is checked on a real batch: the module runs once in evaluation mode, and the head's
    output must equal the logits.

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
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    if name is not None:
        candidates = {name: _submodule(module, name, linear)}
    else:
        candidates = _declared_head(module) | linear
    with torch.no_grad(), _captured_calls(candidates) as calls:
        logits = run(module, batch)
    for candidate in reversed(calls):
        features, _ = calls[candidate]
        # Called anew: the output of the first call may have been changed in place since.
        with torch.no_grad():
            output = candidates[candidate](features)
        if _gives_logits(output, logits) and (name is not None or features.ndim == 2):
            return candidate
    raise ValueError(_no_head(name, calls, logits, linear))


def _submodule(module: nn.Module, name: str, linear: Mapping[str, nn.Module]) -> nn.Module:
    submodules = dict(module.named_modules())
    if not name or name not in submodules:
        raise ValueError(
            f"head={name!r} names no submodule of {type(module).__name__}; its linear layers are "
            f"{_names(linear)}. Pass the name of the module whose input are the features, as in "
            "module.named_modules()."
        )
    return submodules[name]


def _declared_head(module: nn.Module) -> dict[str, nn.Module]:
    """The head that the network itself names, in timm's vocabulary."""
    if not callable(getattr(module, "get_classifier", None)):
        return {}
    declared = module.get_classifier()  # type: ignore[operator]
    return {n: m for n, m in module.named_modules() if m is declared and n}


@contextmanager
def _captured_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of the last call of each module, for forwards run by this thread."""
    thread = threading.get_ident()
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [*args, *kwargs.values()]
            # Another thread may be inside the same module: its calls are not ours.
            if threading.get_ident() == thread and inputs:
                calls.pop(name, None)
                calls[name] = (inputs[0], output)

        return keep

    handles = [
        m.register_forward_hook(keeper(name), with_kwargs=True) for name, m in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _gives_logits(output: Any, logits: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.flatten(1).shape == logits.shape
        and torch.allclose(output.flatten(1), logits.to(output.dtype), rtol=1e-5, atol=1e-6)
    )


def _no_head(
    name: str | None,
    calls: Mapping[str, tuple[Tensor, Tensor]],
    logits: Tensor,
    linear: Mapping[str, nn.Module],
) -> str:
    shape = tuple(logits.shape)
    remedy = (
        'Pass head="NAME", the module whose input are the features and whose output are the '
        "logits, or a module that ends in a torch.nn.Linear."
    )
    if name is not None:
        got = (
            f"its output, {_shape(calls[name][1])}, is not the logits {shape}"
            if name in calls
            else "the forward pass never calls it"
        )
        return f"head={name!r} is not the head: {got}. Linear layers: {_names(linear)}. {remedy}"
    if not calls:
        return (
            "No classification head found: the forward pass calls no torch.nn.Linear "
            f"(linear layers registered: {_names(linear)}). {remedy}"
        )
    outputs = ", ".join(f"{n} gives {_shape(out)}" for n, (_, out) in list(calls.items())[-3:])
    return (
        f"No classification head found: the output, of shape {shape}, is not the output of a "
        f"linear layer on features (n, d) ({outputs}). A softmax or a sum after the last layer "
        f"does that: return the logits themselves. {remedy}"
    )


def _names(linear: Mapping[str, nn.Module]) -> str:
    names = list(linear)
    return "none" if not names else ", ".join(names if len(names) <= 5 else ["...", *names[-5:]])


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else _describe(output)


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with the keys {list(output)}"
    if isinstance(output, tuple | list):
        kinds = ", ".join(type(item).__name__ for item in output)
        return f"a {type(output).__name__} of {kinds or 'nothing'}"
    return f"a {type(output).__name__}"
