"""How well a network detects outliers, known or made, judged on rows held out.

Training does not see these rows. If none are held out (``calibration_size=None``), a check of
fine-tuning looks at training rows.
"""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .calibration import calibration_rank
from .engine.network import Network
from .engine.outputs import Seen
from .engine.rows import Rows, as_array, spaced
from .engine.training import TrainingData
from .exceptions import (
    DetectionDropWarning,
    FewTrainingRowsWarning,
    NonFiniteLogitsError,
    SelectionWarning,
)
from .fitting import Fit
from .metrics import auroc
from .notices import first_line, held_back, warn_user
from .parameters import n_workers, recipe_of
from .parts import ROWS_APART
from .penalties import l1
from .scores import Head, LayeredOutputs, Outputs, apply_score, fit_score, get_score
from .scores.protocol import uses_gradient
from .scoring import LabelledRows, Passes, Scores, head_of, outputs_of, seen_of_all, winners_of

__all__ = [
    "ERRORS",
    "KIND",
    "KNOWN",
    "REFUSALS",
    "Detection",
    "Evidence",
    "Judge",
    "Pieces",
    "Record",
    "error_of_auroc",
    "gathered",
    "standard_error",
]

KNOWN = "outliers"
"""Kind of the outliers that the user knows."""

INLIERS = "in-distribution"
"""Name of the in-distribution rows among the sets that judge."""

KIND = "auroc_"
"""What the names of the detection of each kind begin with, in a record."""

OUTLIERS_OF_A_JUDGE = 2
"""Surrogate outliers of all kinds together, for each row that is held out to judge alone."""

FEWEST_KNOWN = 20
"""Known outliers that judge, if no warning says that they are few."""

ROWS_TURNED = 64
"""Images by which it is told if a network takes turned ones for what they were, at most."""

LEAST_SAME = 2 / 3
"""Share of the turned images that a network takes for what they were, if they are pictures."""

ROWS_OF_A_CHECK, MOST_ROWS_OF_A_CHECK = 100, 256
"""Rows held out by which fine-tuning is checked, at least and at most."""

TRAINED_FOR_A_CHECK = 32
"""Rows that fine-tuning takes for each of these, so that the check takes little of its time."""

ROWS_OF_A_FIT = 1024
"""Training rows to which a score is fitted that is only judged, at least; else a fifth of them."""

ERRORS = 2
"""Standard errors that a difference has to exceed to be clear."""

TOLERATED_RISE = 0.1
"""Share of the outliers of a kind that fine-tuning may let in besides."""

TOLERATED_FALL = 0.02
"""AUROC, on average over kinds, that fine-tuning may cost."""

KINDS_SHOWN = 3
"""Kinds that a warning names, at most."""

REFUSALS = (TypeError, ValueError)
"""What a score raises that cannot be had of a network."""

Record = dict[str, Any]


class Evidence(NamedTuple):
    """Rows by which detection is judged."""

    inliers: Rows
    outliers: dict[str, Rows]
    """Of each kind, known or made."""


def gathered(run: Fit, network: Network) -> Evidence | None:
    """Rows by which what may be chosen is judged; or, if nothing may, what fine-tuning does."""
    if run.chosen:
        return _to_choose(run, network)
    return _to_check(run, network)


def _to_choose(run: Fit, network: Network) -> Evidence:
    inliers = run.judging.rows
    if len(run.outliers_to_judge) > 0:
        _warn_if_few_are_known(run)
        return Evidence(inliers, {KNOWN: run.outliers_to_judge})
    return _with_surrogates(run, network, inliers, len(run.parts.judging))


def _warn_if_few_are_known(run: Fit) -> None:
    """Warn if few known outliers judge, and there is something to choose."""
    n_known, several = len(run.outliers_to_judge), len(run.scores) > 1
    if n_known >= FEWEST_KNOWN or not (several or run.detector.max_epochs > 0):
        return
    if run.ranks.first:
        wanted = FEWEST_KNOWN * (2 if len(run.trained_outliers) > 0 else 1)
        warn_user(
            f'{run.chosen[0]}="auto" judges by {n_known} known outlier(s) of y, too few to tell '
            f"much. Label at least {wanted}; or leave them out of X and y, so that outliers that "
            "fit makes judge.",
            SelectionWarning,
        )


def _to_check(run: Fit, network: Network) -> Evidence | None:
    """Images that place the threshold of a user's classifier, to see if fine-tuning harms it.

    None of tables, if they are too few, if training is short, or if no outliers can be made.
    """
    held_out = run.parts.threshold
    trained = len(run.parts.training) * recipe_of(run.detector).epochs
    size = min(trained // TRAINED_FOR_A_CHECK, MOST_ROWS_OF_A_CHECK, len(held_out))
    if not run.comes_trained or size < ROWS_OF_A_CHECK:
        return None
    inliers = run.inliers.pick(held_out[spaced(len(held_out), size)])
    try:
        if not _are_images(run, inliers.pick(np.arange(1))):
            return None
        return _with_surrogates(run, network, inliers, size)
    except Exception:  # of a network or preprocess that takes no other rows than the user's
        return None


def _are_images(run: Fit, rows: Rows) -> bool:
    """Whether rows have the shape of images, and values that may be others: not indices."""
    values = rows.in_memory(n_workers(run.detector))
    is_raw = run.detector.preprocess is not None and not rows.preprocessed
    return values.ndim > 2 and (values.dtype.kind == "f" or is_raw)


def _with_surrogates(run: Fit, network: Network, inliers: Rows, n_judging: int) -> Evidence:
    """In-distribution rows, and outliers of each kind that are made of them."""
    # Imported here, as few fits need it, and it takes long.
    from .model_selection.surrogates import (
        INSTEAD,
        finite_rows,
        refuse_indices,
        surrogates_by_kind,
    )

    workers, random = n_workers(run.detector), np.random.RandomState(run.seeds.judging)
    values = originals = inliers.in_memory(workers)
    if n_judging < ROWS_APART:  # of a handful of rows, none of some kinds can be made
        originals = run.inliers.in_memory(workers)
    try:
        refuse_indices(network, inliers)
        made = surrogates_by_kind(originals, OUTLIERS_OF_A_JUDGE * n_judging, random)
    except ValueError as error:
        if not run.chosen:
            raise
        raise _no_outliers(run, first_line(error).removesuffix(INSTEAD)) from error
    return Evidence(
        _as_new(run, network, inliers.like(finite_rows(values)), random),
        {kind: inliers.like(values) for kind, values in made.items()},
    )


def _no_outliers(run: Fit, reason: str) -> ValueError:
    """The error for rows of which no outliers can be made that judge what is to be chosen."""
    name = run.chosen[0]
    return ValueError(
        f'{name}="auto" judges by outliers that it makes of X, and cannot: {reason}Label known '
        f"outliers in y, with ood_label=; or pass {name} yourself."
    )


def _as_new(run: Fit, network: Network, rows: Rows, random: np.random.RandomState) -> Rows:
    """Rows of which a network is no surer than of new ones, if these can be made like that.

    A network that is not trained here may be trained on them. Then images are turned a little,
    unless it takes many of them for others: these are no pictures.
    """
    # Imported here, as few fits need it, and it takes long.
    from .model_selection.surrogates import as_new

    values = rows.in_memory(None)
    if not run.comes_trained or values.ndim == 2:
        return rows
    turned = rows.like(as_new(values, random))
    few = (each.spaced(ROWS_TURNED) for each in (rows, turned))
    same = np.mean(np.equal(*(winners_of(network, each) for each in few)))
    return turned if run.ranks.from_first(bool(same >= LEAST_SAME)) else rows


class Detection(NamedTuple):
    """What a score detects of the outliers of each kind."""

    auroc: dict[str, float]
    kept: dict[str, NDArray[np.bool_]]
    """Which of them are kept, at the threshold that keeps `tpr` of the rows that judge."""

    @classmethod
    def of(cls, scores: dict[str, Scores], tpr: float) -> Detection:
        """What scores of in-distribution rows and of outliers come to."""
        inliers = scores[INLIERS]
        outliers = {kind: values for kind, values in scores.items() if kind != INLIERS}
        rank = max(calibration_rank(len(inliers), tpr), 1)
        threshold = np.sort(inliers)[rank - 1]
        return cls(
            {kind: auroc(inliers, values) for kind, values in outliers.items()},
            {kind: values >= threshold for kind, values in outliers.items()},
        )

    @property
    def mean_auroc(self) -> float:
        """Mean over kinds."""
        return float(np.mean(list(self.auroc.values())))

    def worse_than(self, before: Detection) -> list[str]:
        """Kinds of which clearly more are kept than before, in their order."""
        return [kind for kind in self.kept if is_clearly_worse(before.kept[kind], self.kept[kind])]

    def told_if_worse_than(self, before: Detection, tpr: float) -> str:
        """In what it is clearly worse than before; empty if in nothing."""
        if worse := self.worse_than(before):
            shares = ", ".join(
                f"{self.kept[kind].mean():.0%} of {kind} ({before.kept[kind].mean():.0%} before)"
                for kind in worse[:KINDS_SHOWN]
            )
            more = ", and more of other kinds" if len(worse) > KINDS_SHOWN else ""
            return f"a threshold that keeps {tpr:.0%} of in-distribution rows keeps {shares}{more}"
        gains = np.array([self.auroc[kind] - before.auroc[kind] for kind in self.auroc])
        if len(gains) > 1 and gains.mean() < -max(TOLERATED_FALL, ERRORS * standard_error(gains)):
            over = f"the mean AUROC over {len(gains)} kinds"
            return f"{over} is {self.mean_auroc:.3f}, {before.mean_auroc:.3f} before"
        return ""


class Judge:
    """How well a network detects, on rows held out.

    What is chosen by them must not place the threshold. Where nothing is chosen, these rows do.
    What a network comes to is compared with the network before training, which comes first.
    """

    def __init__(self, run: Fit, evidence: Evidence, data: TrainingData) -> None:
        self.run = run
        self.rows = {INLIERS: evidence.inliers, **evidence.outliers}
        picks = spaced(len(data.rows), max(len(data.rows) // 5, ROWS_OF_A_FIT))
        self.few = LabelledRows(data.rows.pick(picks), data.labels[picks])
        self.accuracy_before = math.nan
        self.before: dict[str, Detection] = {}
        self.after: dict[str, Detection] = {}

    def __call__(self, network: Network, weight: float | None, start: float) -> list[Record]:
        """What a network comes to that was trained with a weight since `start`, for each score.

        Without a weight it is the network before.
        """
        seen = seen_of_all(network, self.run.judging.rows)
        accuracy = self._accuracy(as_array(seen.logits.argmax(dim=1)))
        self.after = self.detections(network)
        if weight is None:
            self.before, self.accuracy_before = self.after, accuracy
        network_record = {
            "sparsity_weight": weight,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": accuracy,
            "mean_l1": math.nan if seen.features is None else float(l1(seen.features).mean()),
        }
        records = [
            {
                **network_record,
                "score_function": name,
                "auroc": found.mean_auroc,
                **{f"{KIND}{kind}": value for kind, value in found.auroc.items()},
                "worse": ", ".join(found.worse_than(self.before.get(name, found))),
            }
            for name, found in self.after.items()
        ]
        seconds = time.perf_counter() - start
        timed = [{**record, "seconds": seconds, "chosen": False} for record in records]
        return self.run.ranks.from_first(timed)  # as ranks may round differently

    def detections(self, network: Network) -> dict[str, Detection]:
        """What each score detects that can be had of a network."""
        seen = {of: self._seen(network, of) for of in self.rows}
        pieces = Pieces(self.run, network, self.few)
        found, refused = {}, []
        for name, asked in self.run.scores.items():
            score = get_score(asked)
            try:
                with held_back(FewTrainingRowsWarning):  # as it will be fitted to more
                    outputs_to_fit = pieces.training if hasattr(score, "fit") else []
                    fit_score(score, outputs_to_fit, pieces.head, lambda: pieces.held_out)
                if uses_gradient(score):
                    values = {
                        of: outputs_of(network, some, score)[0] for of, some in self.rows.items()
                    }
                else:
                    values = {of: as_array(apply_score(score, *z)) for of, z in seen.items()}
            except REFUSALS as error:
                refused.append(error)
            else:
                found[name] = Detection.of(values, self.run.detector.tpr)
        if not found:
            raise refused[0]
        return found

    def _seen(self, network: Network, of: str) -> Seen:
        """What the network gives of some rows; a ValueError if it takes no others than the user's.

        That is not so of what it has become by training, nor if memory is short.
        """
        try:
            return seen_of_all(network, self.rows[of])
        except (NonFiniteLogitsError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if of in (INLIERS, KNOWN) or not self.run.chosen:
                raise
            told = first_line(error)[:100].removesuffix(".")
            reason = f"the network does not take what is made of the kind {of!r} ({told}). "
            raise _no_outliers(self.run, reason) from error

    def look(self, network: Network) -> dict[str, Detection]:
        """The same; nothing if it cannot be told, as nothing but a warning depends on it."""
        try:
            return self.detections(network)
        except Exception:  # of a network or score that takes no other rows than the user's
            return {}

    def warn_if_worse(self, score: str) -> None:
        """Warn if outliers are detected clearly worse by a score than before fine-tuning."""
        if not self.run.ranks.first or len(self.rows[INLIERS]) < ROWS_OF_A_CHECK:
            return
        if score not in self.before or score not in self.after:
            return
        outliers = "known outliers" if KNOWN in self.rows else "outliers made of X"
        told = self.after[score].told_if_worse_than(self.before[score], self.run.detector.tpr)
        if told:
            warn_user(
                f"Fine-tuning detects {outliers} worse than the network did before: {told}. Pass "
                'sparsity_weight="auto", which takes no weight that does so; or max_epochs=0, '
                "which leaves the network as it is.",
                DetectionDropWarning,
            )

    def _accuracy(self, winners: NDArray[np.int64]) -> float:
        """Share of the rows that judge which are classified rightly; NaN if only outliers count."""
        return float(np.mean(winners == self.run.judging.targets)) if len(winners) else math.nan


class Pieces:
    """What scores are fitted to that are only judged; each part is computed once, if asked for."""

    def __init__(self, run: Fit, network: Network, few: LabelledRows) -> None:
        self.run = run
        self.network = network
        self.few = few

    @cached_property
    def training(self) -> list[Outputs | LayeredOutputs]:
        """Outputs of some training rows."""
        return list(Passes(self.network, self.few))

    @cached_property
    def held_out(self) -> list[Outputs | LayeredOutputs]:
        """Outputs of rows that the network was not trained on."""
        return list(Passes(self.network, self.run.apart))

    def head(self) -> Head:
        """The head of the network."""
        return self._head

    @cached_property
    def _head(self) -> Head:
        return head_of(self.network, self.few.rows)


def error_of_auroc(auroc: float, other: float, n_fewer: int) -> float:
    """Standard error of the difference of two AUROC, at most, of so many outliers or inliers.

    Birnbaum & Klose, "Bounds for the variance of the Mann-Whitney statistic", Ann. Math. Stat. 28,
    1957, for scores that are not negatively correlated.
    """
    mean = (auroc + other) / 2
    return math.sqrt(2 * mean * (1 - mean) / n_fewer)


def standard_error(gains: Scores) -> float:
    """Standard error of a mean over kinds; 0 of one kind."""
    return float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0


def is_clearly_worse(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> bool:
    """Whether clearly more outliers are kept than before, given which ones are.

    McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12, 1947.
    """
    let_in, shut_out = int((after & ~before).sum()), int((before & ~after).sum())
    rise = let_in - shut_out
    return rise > TOLERATED_RISE * len(after) and rise > ERRORS * math.sqrt(let_in + shut_out)
