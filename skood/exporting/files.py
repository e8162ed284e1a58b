"""A detector in a file of another runtime, by the suffix: ``.onnx`` or ``.pt2``."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from ..engine.rows import as_array
from ..engine.surroundings import undisturbed
from ..exceptions import ExportError
from ..notices import first_line
from ..storage import place_of_file
from .checks import Reference, check_outputs, example_batch, on_both_sides
from .module import DetectorModule, detector_module

__all__ = ["export"]

OUTPUTS = ("logits", "score", "decision", "p_value")

INPUT, BATCH = "rows", "batch"
"""Names of what a graph takes, and of its first axis."""

METADATA = "skood"
"""Name under which a file has what made it, as JSON."""

TRACED_ROWS = 3

Outputs = dict[str, NDArray[Any]]


class Format(NamedTuple):
    """How a graph becomes a file, and what runs the file."""

    needs: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    opened: Callable[[Path], Callable[[Tensor], Outputs]]


def export(
    detector: Any, path: str | os.PathLike[str], X: Any = None, *, preprocess: bool = True
) -> dict[str, Any]:
    """Write a detector to a file, whole or not at all; see `SparseEnergyOODDetector.export`."""
    chosen = _format_of(Path(path))
    path = place_of_file(Path(path))
    module = detector_module(detector, preprocess).cpu()
    reference = Reference(detector, preprocess)
    batch = on_both_sides(example_batch(detector, X, preprocess), reference)
    # Zeros: a file may show what it was traced with.
    traced = torch.zeros_like(batch[:1]).repeat(TRACED_ROWS, *[1] * (batch.ndim - 1))
    program = _program_of(module, traced, reference)
    about = json.dumps(_about(detector, batch, preprocess))
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with _torch_quiet():
            chosen.write(program, unfinished, about)
        if len(os.listdir(folder)) > 1:  # onnx writes what is too large for it beside it
            raise ExportError(
                f'The graph takes more than a file "{path.suffix}" holds. A file ".pt2" holds any.'
            )
        report = check_outputs(chosen.opened(unfinished), batch, reference)
        os.replace(unfinished, path)
    return report


def _format_of(path: Path) -> Format:
    """The format that a suffix names; an error says if the file cannot be written here."""
    chosen = FORMATS.get(path.suffix)
    if chosen is None:
        raise ValueError(
            f"path ends in {path.suffix!r}; expected one of {list(FORMATS)}. Name the file, for "
            'instance, "detector.onnx".'
        )
    for name in chosen.needs:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{path.suffix} needs {name}, which is not installed: run "
                "`pip install 'skood[export]'`."
            ) from error
    return chosen


def _about(detector: Any, batch: Tensor, preprocess: bool) -> dict[str, Any]:
    """What made a file."""
    from .. import __version__  # which is not there yet while skood is imported

    score, offsets = detector.score_function_, detector.class_offsets_
    name = getattr(score, "__name__", type(score).__name__)
    inside = preprocess and detector.preprocess is not None
    return {
        "skood_version": __version__,
        "torch_version": torch.__version__,
        "score": " ".join(repr(score).split()) if isinstance(score, BaseEstimator) else name,
        "threshold": detector.offset_,
        "class_thresholds": None if offsets is None else offsets.tolist(),
        "tpr": detector.tpr_,
        "n_calibration_rows": len(detector.calibration_scores_),
        "classes": detector.classes_.tolist(),
        "input_dtype": str(batch.dtype).removeprefix("torch."),
        "input_shape": [BATCH, *batch.shape[1:]],
        "preprocess": "inside" if inside else "none" if preprocess else "outside",
    }


def _program_of(module: DetectorModule, batch: Tensor, reference: Reference) -> ExportedProgram:
    """The graph of a detector, for any number of rows."""
    try:
        return _traced(module, (batch,), reference)
    except Exception as error:
        raise ExportError(_why_not(module, batch, reference, error)) from error


def _traced(module: nn.Module, inputs: tuple[Any, ...], reference: Reference) -> ExportedProgram:
    """The graph of a module; the first axis of all tensors is the batch."""
    size = Dim(BATCH)

    def trace() -> list[ExportedProgram]:
        with _torch_quiet():
            shapes = tree_map(lambda _: {0: size}, inputs)
            return [torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)]

    network = reference.network
    (program,) = undisturbed(trace, torch.device("cpu"), network.default_dtype)
    # Where lines of code lay on this machine is nobody's business.
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


@contextmanager
def _torch_quiet() -> Iterator[None]:
    """Without what torch and onnxscript tell their own developers."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


class _Stage(nn.Module):
    """One of the steps of a detector, to be traced alone."""

    def __init__(self, detector: DetectorModule, step: str) -> None:
        super().__init__()
        self.detector = detector
        self.step = step

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        return getattr(self.detector, self.step)(*inputs)


STAGES = {
    "_prepared": (
        "preprocess",
        "Let it use torch operations on the whole batch alone, or pass preprocess=False: the graph "
        "then takes what preprocess returns",
    ),
    "_classified": (
        "the network",
        "Its forward must not look at values, and must take any number of rows",
    ),
    "_judged": (
        "the score",
        "Let it use torch operations on the whole batch alone, or fit with another score",
    ),
}


def _why_not(module: DetectorModule, batch: Tensor, reference: Reference, error: Exception) -> str:
    """Which part of a detector cannot be traced, and what to do."""
    inputs: tuple[Tensor, ...] = (batch,)
    for step, (name, remedy) in STAGES.items():
        try:
            if name != "preprocess" or module.preprocess is not None:
                _traced(_Stage(module, step), (inputs,), reference)
            outputs = getattr(module, step)(*inputs)
        except Exception as cause:
            reason = first_line(cause)[:150]
            return f"torch.export cannot trace {name} ({reason}). {remedy}."
        inputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return f"torch.export cannot trace the detector ({first_line(error)[:150]})."


def _write_pt2(program: ExportedProgram, path: Path, about: str) -> None:
    torch.export.save(program, path, extra_files={METADATA: about})


def _opened_pt2(path: Path) -> Callable[[Tensor], Outputs]:
    module = torch.export.load(path).module()

    def outputs(batch: Tensor) -> Outputs:
        with torch.no_grad():
            return {name: as_array(values) for name, values in module(batch).items()}

    return outputs


def _write_onnx(program: ExportedProgram, path: Path, about: str) -> None:
    try:
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: BATCH},),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            custom_translation_table=TRANSLATIONS,
        )
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot translate the graph ({first_line(error.__cause__ or error)[:150]})."
            ' A file ".pt2" takes any operation of torch.'
        ) from error
    assert onnx is not None
    for node in onnx.model.graph.all_nodes():
        node.metadata_props.clear()  # with lines of code, and where they lay on this machine
    onnx.model.metadata_props[METADATA] = about
    onnx.save(path)


def _opened_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).rpartition(str(path))[2].lstrip(" :")
        raise ExportError(
            f"onnxruntime cannot run the graph ({reason[:150]}). If the network computes in 16 "
            'bits, fit module.float() with precision="float32". A file ".pt2" takes any operation '
            "of torch."
        ) from error

    def outputs(batch: Tensor) -> Outputs:
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {INPUT: batch.numpy()}), strict=True))

    return outputs


def _cdist(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances between the rows of two matrices, in operations of ONNX."""
    from onnxscript import opset18 as op

    # Products lose half of the digits of small distances, of which float64 has enough.
    if p != 2:
        raise NotImplementedError(f"torch.cdist with p={p:g}")
    columns: Any = op.Constant(value_ints=[1])
    squares = op.Add(
        op.ReduceSumSquare(x1, columns, keepdims=1),
        op.Transpose(op.ReduceSumSquare(x2, columns, keepdims=1), perm=[1, 0]),
    )
    products = op.MatMul(x1, op.Transpose(x2, perm=[1, 0]))
    difference = op.Sub(squares, op.Add(products, products))
    return op.Sqrt(op.Relu(difference))


def _log_sigmoid(x: Any) -> Any:
    """Logarithm of the sigmoid, also where that is rounded to 0."""
    from onnxscript import opset18 as op

    return op.Sub(op.Log(op.Sigmoid(op.Abs(x))), op.Relu(op.Neg(x)))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._cdist_forward.default: _cdist,
    torch.ops.aten.log_sigmoid.default: _log_sigmoid,
}
"""Operations that torch.onnx does not know, or translates so that large numbers overflow."""

FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), _write_onnx, _opened_onnx),
    ".pt2": Format((), _write_pt2, _opened_pt2),
}
