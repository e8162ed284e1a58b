"""A detector as one `torch.nn.Module`, which is what gets exported."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calibration import _has_threshold, conformal_p_values
from ..engine.copying import deepcopied
from ..engine.hardware import autocast
from ..engine.modes import set_mode
from ..engine.network import Inside, Network, head_is_not_called
from ..engine.opening import must_run_alone
from ..engine.outputs import Seen, as_float64
from ..engine.scripted import scripted_parts
from ..exceptions import ExportError
from ..notices import quoted
from ..scores.protocol import ScoreFunction, seen_by, uses_gradient

__all__ = ["DetectorModule", "detector_module", "shape_of_rows", "without_preprocess"]


class DetectorModule(nn.Module):
    """A fitted detector from raw rows to logits, scores, decisions and p-values.

    It has copies of the network, of the score and of ``preprocess`` if these have a state.
    """

    def __init__(
        self,
        network: Network,
        score: ScoreFunction,
        judge: _Judge | _ClassJudge,
        shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.classifier = deepcopied(network.scorer).requires_grad_(False)
        set_mode(self.classifier, training=False)
        self.preprocess = _own(network.batcher.preprocess)
        self.score = _own(score)
        self.judge = judge
        self._batcher = dataclasses.replace(network.batcher, preprocess=self.preprocess)
        self._precision = network.precision.scoring
        self._head = network.visible_head
        self._layers = network.layers
        self._inside = Inside()
        self._inside.watch(self.classifier.get_submodule(self._head))
        self._inside.watch_layers(self.classifier, self._layers)
        self._shape = shape
        self.training = False

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Logits, scores, decisions and p-values of raw rows."""
        return self._judged(*self._classified(self._prepared(rows)))

    def _prepared(self, rows: Tensor) -> Tensor:
        """Raw rows as the network takes them."""
        if not isinstance(rows, Tensor) or self._shape not in (None, tuple(rows.shape[1:])):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            shape = ", ".join(map(str, self._shape or ("...",)))
            raise ValueError(f"rows is {got}; expected a tensor of shape (n, {shape}).")
        return self._batcher.prepared(rows)

    def _classified(self, batch: Tensor) -> tuple[Seen, Tensor]:
        """What is seen of rows, and whether the detector takes a row: all its values are finite."""
        with autocast(batch.device, self._precision):
            entered, logits, layers = self._inside.with_layers(self.classifier, batch, self._layers)
        if entered is None:
            raise head_is_not_called(self.classifier, self._head)
        usable = logits.isfinite().all(dim=1)
        if batch.is_floating_point():
            usable = usable & batch.flatten(1).isfinite().all(dim=1)
        return Seen(entered.flatten(1), logits, layers), usable

    def _judged(self, seen: Seen, usable: Tensor) -> dict[str, Tensor]:
        """What is said of rows."""
        logits = seen.logits
        wanted = seen if getattr(self.score, "uses_features", True) else Seen(None, logits)
        values = as_float64(self.score(*seen_by(self.score, *wanted.each(as_float64))))
        scores = torch.where(usable & values.isfinite(), values, torch.nan)
        decisions, p_values = self.judge(scores, logits.argmax(dim=1))
        plain = logits.float() if logits.dtype.itemsize < 4 else logits
        return {"logits": plain, "score": scores, "decision": decisions, "p_value": p_values}


class _Judge(nn.Module):
    """From scores to decisions and p-values."""

    def __init__(
        self, threshold: float, calibration_scores: NDArray[np.float64], tpr: float
    ) -> None:
        super().__init__()
        n_rows = len(calibration_scores)
        width = math.isqrt(n_rows - 1) + 1
        lines = np.full(-(-n_rows // width) * width, np.nan)  # which no score reaches
        lines[:n_rows] = np.sort(calibration_scores)
        self.threshold = nn.Buffer(torch.tensor(threshold, dtype=torch.float64))
        self.lines = nn.Buffer(torch.from_numpy(lines.reshape(-1, width)))
        self.p_values = nn.Buffer(torch.from_numpy(_p_values_by_rank(n_rows, tpr)))

    def forward(self, scores: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
        # Sorted scores in lines, as in a book: first which line, then where in it. ONNX has no
        # binary search, and to compare with all of them takes memory for rows times scores.
        values = scores[:, None]
        line = ((self.lines[:, 0] <= values).sum(dim=1) - 1).clamp_min(0)
        reached = line * self.lines.shape[1] + (self.lines[line] <= values).sum(dim=1)
        kept = scores - self.threshold >= 0
        return torch.where(kept, 1, -1), self.p_values[reached]


class _ClassJudge(nn.Module):
    """From scores and predicted classes to decisions and p-values, of thresholds by class."""

    def __init__(
        self,
        thresholds: NDArray[np.float64],
        calibration_scores: NDArray[np.float64],
        classes: NDArray[np.int64],
        tpr: float,
    ) -> None:
        super().__init__()
        compared = [
            np.sort(calibration_scores[classes == one] if is_own else calibration_scores)
            for one, is_own in enumerate(_has_threshold(classes, len(thresholds), tpr))
        ]
        width = max(map(len, compared))
        lines = np.full((len(thresholds), width), np.nan)  # which no score reaches
        p_values = np.full((len(thresholds), width + 1), np.nan)
        for one, scores in enumerate(compared):
            lines[one, : len(scores)] = scores
            p_values[one, : len(scores) + 1] = _p_values_by_rank(len(scores), tpr)
        self.thresholds = nn.Buffer(torch.from_numpy(thresholds.copy()))
        self.lines = nn.Buffer(torch.from_numpy(lines))
        self.p_values = nn.Buffer(torch.from_numpy(p_values))

    def forward(self, scores: Tensor, winners: Tensor) -> tuple[Tensor, Tensor]:
        reached = (self.lines[winners] <= scores[:, None]).sum(dim=1)
        kept = scores - self.thresholds[winners] >= 0
        return torch.where(kept, 1, -1), self.p_values[winners, reached]


def _p_values_by_rank(n_rows: int, tpr: float) -> NDArray[np.float64]:
    """One p-value for each number of calibration scores that a score reaches, from 0 on."""
    reached = np.arange(n_rows + 1)
    return conformal_p_values(reached - 0.5, reached[:-1], tpr)


def _judge(detector: Any) -> _Judge | _ClassJudge:
    scores, tpr = detector.calibration_scores_, detector.tpr_
    if detector.class_offsets_ is None:
        return _Judge(detector.offset_, scores, tpr)
    return _ClassJudge(detector.class_offsets_, scores, detector._calibration_classes, tpr)


def detector_module(detector: Any, preprocess: bool) -> DetectorModule:
    """A fitted detector as a module, with its ``preprocess`` or without."""
    network, score = detector._network, detector.score_function_
    if scripts := scripted_parts(network.module):
        name = next(iter(scripts)) or "all of it"
        raise ExportError(
            f"A part of the network, {name!r}, is TorchScript, whose features and operations no "
            "graph can take. Fit a detector on the nn.Module from which it was made."
        )
    if must_run_alone(network.module):
        raise ExportError(
            "The network has dynamically quantized layers, which round the rows of a batch on one "
            "scale. The detector scores rows one by one, and a graph would not. Fit a detector on "
            "the network before quantization."
        )
    if uses_gradient(score):
        raise ExportError(
            f"score_function={quoted(score)} needs the gradient of the network, which is not in a "
            'graph. Fit a detector with another score, such as "energy".'
        )
    if preprocess and detector._kind.form != "numbers":
        raise ExportError(
            "preprocess loads rows by references (paths, row numbers or objects), which no graph "
            "can take. Pass preprocess=False: the graph then takes what preprocess returns."
        )
    shape: tuple[int, ...] | None = shape_of_rows(detector)
    if not preprocess and detector.preprocess is not None:
        network, shape = without_preprocess(detector), None
    detector._doubts.warn()
    return DetectorModule(network, score, _judge(detector), shape)


def shape_of_rows(detector: Any) -> tuple[int, ...]:
    """The shape of a row of fit."""
    if hasattr(detector, "input_shape_"):
        shape: tuple[int, ...] = detector.input_shape_
        return shape
    return (detector.n_features_in_,)


def without_preprocess(detector: Any) -> Network:
    """The detector's network, on batches as its ``preprocess`` returns them."""
    if detector.preprocess is None:
        return detector._network
    network = detector._network.uncompiled_copy()
    network.batcher = dataclasses.replace(network.batcher, preprocess=_as_it_is)
    return network


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def _own(thing: Any) -> Any:
    """A copy of what has a state; functions are shared."""
    if isinstance(thing, nn.Module):
        return deepcopied(thing)
    return copy.deepcopy(thing)
