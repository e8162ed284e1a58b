"""The regularisation path: sparsity weights one after another, each judged on rows held out.

As LassoCV does, it goes along the weights of a penalty with warm starts. Each rung of the ladder
trains a share of the epochs, from where the rung below ended. The network of the rung that detects
best is kept, which may be the network given.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .engine.inference import Both, forward_rows
from .engine.network import Network
from .engine.outputs import as_float64
from .engine.rows import Rows, as_array, spaced
from .engine.training import TrainingData
from .exceptions import DetectionDropWarning, DivergenceError, SkoodWarning
from .fitting import (
    KNOWN,
    ROWS_OF_A_CHECK,
    Fit,
    HeldOut,
    Passes,
    head_of,
    is_auto,
    outputs_of,
    winners_of,
)
from .metrics import auroc
from .notices import held_back, warn_user
from .penalties import Penalty, l1
from .scores import Head, Outputs, apply_score, fit_score, get_score
from .scores.protocol import ScoreFunction, uses_gradient

__all__ = ["Outcome", "fine_tuned"]

LADDER = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Weights of a penalty whose mean is 1 before fine-tuning."""

SHARE_OF_A_RUNG = 1 / 3
"""Share of the epochs that a rung trains."""

ROWS_OF_A_FIT = 1024
"""Training rows to which a score is fitted that is only judged, at least; else a fifth of them."""

REFERENCES = ("two_views", "energy")
"""Scores that another has to be better than, the first that can be had."""

ERRORS = 2
"""Standard errors that a difference has to exceed to be clear."""

TOLERATED_RISE = 0.1
"""Share of the outliers of a kind that fine-tuning may let in besides."""

KINDS_SHOWN = 3
"""Kinds that a warning names, at most."""

TOLERATED_FALL = 0.02
"""AUROC, on average over kinds, that fine-tuning may cost."""

INLIERS = "in-distribution"
"""Name of the in-distribution rows among the sets that judge."""

KIND = "auroc_"
"""What the names of the detection of each kind begin with, in a record."""

DIGITS = 3
"""Digits of a weight that is chosen."""

REFUSALS = (TypeError, ValueError)
"""What a score raises that cannot be had of a network."""

Record = dict[str, Any]
Scores = NDArray[np.float64]


class Outcome(NamedTuple):
    """What fine-tuning came to."""

    history: list[Record]
    weight: float | None
    """The sparsity weight; None if the network is untouched."""

    score: ScoreFunction
    path: list[Record]


def fine_tuned(run: Fit, network: Network, data: TrainingData) -> Outcome:
    """Fine-tune a network in place, by the weight and the score that are asked for or chosen."""
    asked = run.detector.sparsity_weight
    if is_auto(asked):
        return Path(run, network, data).outcome()
    weight, start = float(asked), time.perf_counter()
    judge = Judge(run, network, data) if run.outliers_to_judge else None
    history: list[Record] = []
    if run.detector.max_epochs > 0:
        if judge is not None:
            judge.before = judge.look(network)
        history = run.fine_tune(network, data, run.fitted_penalty(network, data), weight)
    score = run.detector.score_function
    if judge is not None and is_auto(score):
        records = judge(network, weight, start)
        # Whatever the weight asked for costs.
        best = max(robust(records), key=lambda record: record["auroc"])
        judge.warn_if_worse(best["score_function"])
        return outcome_of(run, best, records, history)
    if judge is not None:
        judge.after = judge.look(network)
        (name,) = run.scores
        judge.warn_if_worse(name)
    return Outcome(history, weight, get_score(score), [])


class Path:
    """The ladder of weights of a fit, from the network as it is."""

    def __init__(self, run: Fit, network: Network, data: TrainingData) -> None:
        self.run = run
        self.network = network
        self.data = data

    def outcome(self) -> Outcome:
        """Go up the ladder, and put the network on the rung that detects best."""
        run, network = self.run, self.network
        path: list[Record] = []
        history: list[Record] = []
        for found, trained in self._rungs():
            path, history = path + found, history + trained
            best = best_of(path)
            if any(best is record for record in found):
                kept, kept_history = network.uncompiled_copy(), history
        network.adopt(kept.public)  # what it has come to since is worse, or has diverged
        return outcome_of(run, best, path, kept_history)

    def _rungs(self) -> Iterator[tuple[list[Record], list[Record]]]:
        """What each rung comes to, and its epochs, up to the first that diverges.

        The lowest is the network untouched.
        """
        run, network, start = self.run, self.network, time.perf_counter()
        judge = Judge(run, network, self.data)
        yield judge(network, None, start), []
        if run.detector.max_epochs == 0:
            return
        penalty = run.fitted_penalty(network, self.data)
        epochs = run.detector.max_epochs * SHARE_OF_A_RUNG
        recipe = dataclasses.replace(run.recipe(), epochs=max(1, round(epochs)))
        share = min(1.0, epochs / recipe.epochs)
        given = network.uncompiled_copy()
        for number, weight in enumerate(self._weights(penalty)):
            start = time.perf_counter()
            seed, some = self._drawn(number, share)
            try:
                trained = run.fine_tune(
                    network, some, penalty, weight, recipe=recipe, seed=seed, before=given
                )
            except DivergenceError:
                if number == 0:  # of the cross-entropy alone, whatever weight is chosen
                    raise
                return
            for record in trained:
                record["epoch"] += number * recipe.epochs
                record["sparsity_weight"] = weight
            try:
                found = judge(network, weight, start)
            except REFUSALS:  # of what the network has become: the one given was judged
                return
            yield found, trained

    def _weights(self, penalty: Penalty) -> list[float]:
        """The ladder, in weights of the penalty."""
        unit = self.run.mean_penalty(self.network, self.data, penalty)
        if not (math.isfinite(unit) and unit > 0):
            raise ValueError(
                f'sparsity_weight="auto" tries weights in units of the penalty\'s mean before '
                f"fine-tuning, which is {unit:g}. Pass a number as sparsity_weight, or a penalty "
                "that is positive."
            )
        return [float(f"{weight / unit:.{DIGITS}g}") for weight in LADDER]

    def _drawn(self, number: int, share: float) -> tuple[int, TrainingData]:
        """Seed of a rung, and what it trains on: a share of the rows, and a batch at least."""
        data, n_rows = self.data, len(self.data.rows)
        least = min(n_rows, self.run.detector.batch_size)
        entropy = np.random.SeedSequence([self.run.seeds.judging, number])
        seed, order = entropy.generate_state(2).tolist()
        picks = np.random.RandomState(order).permutation(n_rows)
        picks = np.sort(picks[: max(math.ceil(share * n_rows), least)])
        some = dataclasses.replace(data, rows=data.rows.pick(picks), labels=data.labels[picks])
        return seed, some


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
        threshold = np.quantile(inliers, 1 - tpr, method="lower")
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
    """How well a network detects, on rows that training does not see.

    What is chosen by them must not place the threshold. Where nothing is chosen, these rows do.
    """

    def __init__(self, run: Fit, network: Network, data: TrainingData) -> None:
        self.run = run
        self.rows = {INLIERS: run.inliers_to_judge, **run.outliers_to_judge}
        picks = spaced(len(data.rows), max(len(data.rows) // 5, ROWS_OF_A_FIT))
        self.few = HeldOut(data.rows.pick(picks), data.labels[picks])
        self.accuracy_before = self._accuracy(winners_of(network, run.judging.rows))
        self.before: dict[str, Detection] = {}
        self.after: dict[str, Detection] = {}

    def __call__(self, network: Network, weight: float | None, start: float) -> list[Record]:
        """What a network comes to whose training began at a time, a record for each score."""
        features, logits = outputs_of_all(network, self.run.judging.rows)
        network_record = {
            "sparsity_weight": weight,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self._accuracy(as_array(logits.argmax(dim=1))),
            "mean_l1": math.nan if features is None else float(l1(features).mean()),
        }
        self.after = self.detections(network)
        if weight is None:
            self.before = self.after
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
        outputs = {of: outputs_of_all(network, some) for of, some in self.rows.items()}
        pieces = Pieces(self.run, network, self.few)
        found, refused = {}, []
        for name, asked in self.run.scores.items():
            score = get_score(asked)
            try:
                with held_back(SkoodWarning):  # of rows too few, which it will be fitted to anew
                    outputs_to_fit = pieces.training if hasattr(score, "fit") else []
                    fit_score(score, outputs_to_fit, pieces.head, lambda: pieces.held_out)
                if uses_gradient(score):
                    values = {
                        of: outputs_of(network, some, score)[0] for of, some in self.rows.items()
                    }
                else:
                    values = {of: as_array(apply_score(score, *z)) for of, z in outputs.items()}
            except REFUSALS as error:
                refused.append(error)
            else:
                found[name] = Detection.of(values, self.run.detector.tpr)
        if not found:
            raise refused[0]
        return found

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

    def __init__(self, run: Fit, network: Network, few: HeldOut) -> None:
        self.run = run
        self.network = network
        self.few = few

    @cached_property
    def training(self) -> list[Outputs]:
        """Outputs of some training rows."""
        return list(Passes(self.network, self.few.rows, self.few.targets))

    @cached_property
    def held_out(self) -> list[Outputs]:
        """Outputs of rows that the network was not trained on."""
        scale = self.run.scale
        return list(Passes(self.network, scale.rows, scale.targets))

    def head(self) -> Head:
        """The head of the network."""
        return head_of(self.network, self.few.rows)


def outputs_of_all(network: Network, rows: Rows) -> Both:
    """Features, None if they are hidden, and logits of rows."""
    visible = network.head is not None
    _, features, logits = zip(*forward_rows(network, rows, features=visible), strict=True)
    return as_float64(torch.cat(features)) if visible else None, torch.cat(logits)


def robust(records: list[Record]) -> list[Record]:
    """Those whose score is the reference, or with the first network is clearly better than it.

    A score that finds some kinds of outliers easily can have the best mean and be blind to others.
    """
    first = [r for r in records if r["sparsity_weight"] == records[0]["sparsity_weight"]]
    scored = {record["score_function"]: record for record in first}
    reference = next((scored[name] for name in REFERENCES if name in scored), first[0])
    names = {name for name, r in scored.items() if r is reference or _is_better(r, reference)}
    return [record for record in records if record["score_function"] in names]


def _is_better(record: Record, reference: Record) -> bool:
    """Whether no kind is detected worse, and the mean gain is beyond what one kind may bring."""
    kinds = kinds_of(record)
    if len(kinds) == 1 and kinds != [KNOWN]:
        return False  # one kind that was made shows little
    gains = _gains(record, reference)
    return bool(gains.min() >= 0 and gains.mean() > ERRORS * standard_error(gains))


def _gains(record: Record, other: Record) -> Scores:
    """What is gained of each kind against another record."""
    return np.array([record[f"{KIND}{kind}"] - other[f"{KIND}{kind}"] for kind in kinds_of(record)])


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


def best_of(records: list[Record]) -> Record:
    """What detects best among what is robust and accurate enough, and on no kind clearly worse.

    Of the weights, it is the smallest that is as good within a standard error (Breiman, Friedman,
    Olshen & Stone, "Classification and regression trees", 1984, section 3.4.3).
    """
    # Imported here, as few fits need it, and it takes long.
    from .model_selection import AccuracyGuard

    records = [record for record in robust(records) if not record["worse"]]
    results = {
        "mean_test_auroc": [record["auroc"] for record in records],
        "mean_test_accuracy_change": [accuracy_change(record) for record in records],
    }
    best = records[AccuracyGuard("auroc")(results)]
    if best["sparsity_weight"] is None:
        return best
    untouched = max(
        (r["auroc"] for r in records if r["sparsity_weight"] is None), default=-math.inf
    )
    as_good = (r for r in records if r["auroc"] >= untouched and _is_as_good(r, best))
    return next(as_good)


def _is_as_good(record: Record, best: Record) -> bool:
    """Whether a weight is as good as the best one, with the same score."""
    if record["sparsity_weight"] is None or record["score_function"] != best["score_function"]:
        return False
    gains = _gains(best, record)
    return is_accurate(record) and bool(gains.mean() <= standard_error(gains))


def outcome_of(run: Fit, best: Record, path: list[Record], history: list[Record]) -> Outcome:
    """What comes of the record that is chosen, which is told if the user wants to be."""
    best["chosen"] = True
    if len(path) > 1 and run.detector.verbose and run.ranks.first:
        print(f"{type(run.detector).__name__}: {told(best, path)}")
    score = get_score(run.scores[best["score_function"]])
    return Outcome(history, best["sparsity_weight"], score, path)


def told(best: Record, path: list[Record]) -> str:
    """What was chosen, and why, in a line."""
    trained = best["sparsity_weight"] is not None
    others = [r for r in robust(path) if (r["sparsity_weight"] is not None) != trained]
    next_best = max(others, key=lambda record: record["auroc"], default=None)
    compared = "" if next_best is None else f" ({_told_of(next_best)})"
    return (
        f"{_named(best)} is chosen of {len(path)}, with an AUROC of {best['auroc']:.3f}"
        f"{compared} on {', '.join(kinds_of(best))}; accuracy {best['accuracy_after']:.3f}, "
        f"{best['accuracy_before']:.3f} before"
    )


def _told_of(record: Record) -> str:
    """What a record that is not chosen comes to, and what speaks against it beside that."""
    faults = [f"worse on {record['worse']}"] if record["worse"] else []
    faults += [] if is_accurate(record) else [f"accuracy {record['accuracy_after']:.3f}"]
    return f"{_named(record)}: {record['auroc']:.3f}" + "".join(f", but {f}" for f in faults)


def _named(record: Record) -> str:
    weight = record["sparsity_weight"]
    network = "the network untouched" if weight is None else f"sparsity_weight={weight:g}"
    return f"{network} with {record['score_function']}"


def is_accurate(record: Record) -> bool:
    """Whether fine-tuning has cost no more accuracy than is tolerated."""
    # Imported here, as few fits need it, and it takes long.
    from .model_selection import AccuracyGuard
    from .model_selection.guard import accurate_enough

    change = np.array([accuracy_change(record)])
    return bool(accurate_enough(change, AccuracyGuard().tolerance)[0])


def accuracy_change(record: Record) -> float:
    """Accuracy that fine-tuning has brought."""
    return float(record["accuracy_after"] - record["accuracy_before"])


def kinds_of(record: Record) -> list[str]:
    """Kinds of outliers that judged."""
    return [name.removeprefix(KIND) for name in record if name.startswith(KIND)]
