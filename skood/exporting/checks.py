"""Whether a file says what its detector says, on rows on both sides of the threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration import conformal_p_values
from ..engine.loading import transformed
from ..engine.rows import InMemory, as_array, spaced
from ..engine.watch import Scale
from ..exceptions import ExportError
from ..notices import first_line
from ..rows import rows_like_fit
from ..scoring import scored
from .module import shape_of_rows, without_preprocess

__all__ = ["Reference", "check_outputs", "example_batch", "on_both_sides"]

CHECKED_ROWS = 64
"""Rows on which a file is compared with its detector."""

ROUNDS = 40
"""How often rows are changed in search of the other side of the threshold, at most."""

PARENTS = 8

SPREAD_TOLERANCE = 1e-3
"""Share of the spread of calibration scores by which a score may differ."""

ROUNDING = 1e-5
"""Share of itself by which a score may differ, and of the largest by which a logit may."""

UNITS = 4
"""Units in the last place, of a network in 16 bits, to which that is raised."""

Outputs = dict[str, NDArray[Any]]


class Reference:
    """What a detector says of batches that its graph takes."""

    def __init__(self, detector: Any, preprocess: bool) -> None:
        self.network = detector._network if preprocess else without_preprocess(detector)
        self._score = detector.score_function_
        offsets = detector.class_offsets_
        self.thresholds = (
            np.full(len(detector.classes_), detector.offset_) if offsets is None else offsets
        )
        self.calibration_scores = detector.calibration_scores_
        self._calibration_classes = detector._calibration_classes
        self.tpr = detector.tpr_
        dtype = self.network.precision.scoring or self.network.batcher.dtype
        self.rounding = max(ROUNDING, UNITS * torch.finfo(dtype).eps)

    def outputs(self, batch: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores and logits of a batch."""
        pieces = [
            (as_array(scores), as_array(logits))
            for _, scores, logits in scored(self.network, InMemory(batch), self._score)
        ]
        scores, logits = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return scores.astype(np.float64), logits

    def tolerance(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much each score may differ."""
        spread = np.std(self.calibration_scores)
        return SPREAD_TOLERANCE * spread + self.rounding * np.abs(scores)

    def margins(
        self, scores: NDArray[np.float64], logits: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Scores minus the threshold of each row."""
        return scores - self.thresholds[logits.argmax(axis=1)]

    def p_values(
        self, scores: NDArray[np.float64], logits: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """P-values that belong to scores."""
        classes = self._calibration_classes
        winners = logits.argmax(axis=1)
        return conformal_p_values(scores, self.calibration_scores, self.tpr, winners, classes)

    def sides(self, scores: NDArray[np.float64], logits: NDArray[np.float64]) -> NDArray[np.int64]:
        """1 for rows that are clearly kept, -1 for rows clearly rejected, 0 for others."""
        margins = self.margins(scores, logits)
        clear = np.abs(margins) > 2 * self.tolerance(scores)
        return np.where(clear, np.sign(margins), 0).astype(np.int64)


def example_batch(detector: Any, X: Any, preprocess: bool) -> Tensor:
    """Some rows as the graph takes them: of X, or drawn at random on the scale of fit."""
    if X is None:
        return _drawn_rows(detector, preprocess)
    rows = rows_like_fit(detector, X, detector.preprocess)
    rows.watch = None
    batch = rows.read(spaced(len(rows), CHECKED_ROWS)).cpu()
    if preprocess or rows.preprocessed or detector.preprocess is None:
        return batch
    return transformed(batch, detector.preprocess, "preprocess").detach().cpu()


def _drawn_rows(detector: Any, preprocess: bool) -> Tensor:
    """Random rows of the shape, dtype and range of those of fit."""
    scale = detector._watch.scale
    dtype = None if scale is None else getattr(torch, scale.dtype, None)
    if dtype is None or (not preprocess and detector.preprocess is not None):
        raise ExportError(
            "What the graph takes is not known: the dtype or the shape of its rows. Pass some rows "
            "like those of fit: export(path, X)."
        )
    shape = shape_of_rows(detector)
    low, high = _range_of_rows(dtype, scale, detector.preprocess is not None)
    random = np.random.RandomState(0)
    ones = (1,) * len(shape)
    centres, widths = random.uniform(low, high, (2, CHECKED_ROWS, *ones))
    noise = random.uniform(-0.5, 0.5, (CHECKED_ROWS, *shape))
    rows = (centres + np.abs(widths) * noise).clip(low, high)
    return _as_dtype(rows, dtype)


def _range_of_rows(dtype: torch.dtype, scale: Scale, preprocessed: bool) -> tuple[float, float]:
    """Between which values rows of fit were; `scale` is that after preprocess."""
    if dtype == torch.bool:
        return 0, 1
    if not dtype.is_floating_point and (preprocessed or dtype.itemsize == 1):
        return torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if preprocessed:
        return 0, 1
    return 0 if scale.below_zero is False else -scale.most, scale.most


def _as_dtype(rows: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        rows = rows.round()
    return torch.from_numpy(rows).to(dtype)


def on_both_sides(batch: Tensor, reference: Reference) -> Tensor:
    """The rows, and changed ones if on one side of the threshold none clearly lies."""
    try:
        scores, logits = reference.outputs(batch)
    except Exception as error:
        raise ExportError(
            "The detector cannot score the rows that the file would be checked on "
            f"({first_line(error)[:150]}). Pass some rows like those of fit: export(path, X)."
        ) from error
    missing = {1, -1} - set(reference.sides(scores, logits).tolist())
    changed = [_rows_on(side, batch, scores, reference) for side in missing]
    return torch.cat([batch, *changed])


def _rows_on(side: int, batch: Tensor, scores: NDArray[np.float64], reference: Reference) -> Tensor:
    """Rows on one side of the threshold, found by differential evolution from other rows."""
    random = np.random.RandomState(0)
    values = as_array(batch.double())
    size, low, high = (CHECKED_ROWS, *[1] * (values.ndim - 1)), values.min(), values.max()
    for _ in range(ROUNDS):
        best = np.argsort(-side * scores)
        parents = values[best[random.randint(min(PARENTS, len(best)), size=CHECKED_ROWS)]]
        ones, others = values[random.randint(len(values), size=(2, CHECKED_ROWS))]
        moved = random.uniform(size=parents.shape) < random.uniform(size=size)
        children = parents + moved * random.uniform(0, 1.5, size) * (ones - others)
        rows = _as_dtype(children.clip(low, high), batch.dtype)
        of_rows, logits = reference.outputs(rows)
        reached = reference.sides(of_rows, logits) == side
        if reached.any():
            return rows[torch.from_numpy(reached)]
        values = np.concatenate([values[best[:CHECKED_ROWS]], as_array(rows.double())])
        scores = np.concatenate([scores[best[:CHECKED_ROWS]], of_rows])
    missing = "kept" if side > 0 else "rejected"
    raise ExportError(
        f"No row was found that is clearly {missing}, so the file cannot be checked on both sides "
        "of the threshold. Pass some rows like those of fit, and some "
        "unlike them: export(path, X)."
    )


def check_outputs(
    run: Callable[[Tensor], Outputs], batch: Tensor, reference: Reference
) -> dict[str, Any]:
    """Refuse a file whose outputs are not those of the detector; what was compared."""
    scores, logits = reference.outputs(batch)
    sides = reference.sides(scores, logits)
    largest = 0.0
    for size in (len(batch), 1):
        try:
            got = run(batch[:size])
        except Exception as error:
            raise ExportError(
                f"The file was not written: its graph cannot run on {size} rows "
                f"({first_line(error)[:150]})."
            ) from error
        difference = np.abs(got["score"] - scores[:size])
        largest = max(largest, float(difference.max()))
        if not (difference <= reference.tolerance(scores[:size])).all():
            raise _other("a score", difference.max(), "of the detector")
        gap = np.abs(got["logits"] - logits[:size]).max()
        if not gap <= reference.rounding * np.abs(logits).max():
            raise _other("a logit", gap, "of the detector")
        expected = reference.p_values(got["score"], got["logits"])
        if not (got["p_value"] == expected).all():
            raise _other("a p-value", np.abs(got["p_value"] - expected).max(), "of its score")
        decided = np.where(reference.margins(got["score"], got["logits"]) >= 0, 1, -1)
        clear = sides[:size] != 0
        if (got["decision"] != decided).any() or (decided != sides[:size])[clear].any():
            raise _other("a decision", 2, "of the detector")
    return {
        "rows": len(batch),
        "kept": int((sides > 0).sum()),
        "rejected": int((sides < 0).sum()),
        "largest_difference": largest,
    }


def _other(what: str, difference: float, whose: str) -> ExportError:
    return ExportError(
        f"The file was not written: {what} in it differs by {difference:.3g} from that {whose}. "
        "The graph does not do what the network, preprocess or the score does: look for what "
        "depends on values, on time or on random numbers."
    )
