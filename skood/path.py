"""The regularisation path: sparsity weights one after another, each judged on rows held out.

As LassoCV does, it goes along the weights of a penalty with warm starts. Each rung of this ladder
trains the last layers for a share of the epochs, from where the rung below ended. The network of
the rung that detects best is kept, which may be the network given.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np

from .accuracy import accurate_enough
from .engine.network import Network
from .engine.training import TrainingData
from .evidence import (
    ERRORS,
    KIND,
    KNOWN,
    REFUSALS,
    Evidence,
    Judge,
    Record,
    error_of_auroc,
    standard_error,
)
from .exceptions import DivergenceError, DivergenceWarning, NonFiniteLogitsError
from .fitting import Fit
from .notices import first_line, warn_user
from .parameters import is_auto, recipe_of
from .penalties import Penalty, Relative
from .scores import get_score
from .scores.protocol import ScoreFunction
from .scoring import Scores

__all__ = ["Outcome", "fine_tuned"]


LADDER = (0.0, 0.3, 1.0, 3.0)
"""Weights of a penalty whose mean is 1 before fine-tuning."""

LAYERS = "last"
"""Layers that are trained: the first ones see what later ones drop."""

SHARE_OF_A_RUNG = 1 / 3
"""Share of the epochs that a weight of the ladder trains."""

REFERENCES = ("three_views", "two_views", "energy")
"""Scores that another has to be better than, the first that can be had."""

DIGITS = 3
"""Digits of a weight that is chosen."""


class Outcome(NamedTuple):
    """What fine-tuning came to."""

    history: list[Record]
    weight: float | None
    """The sparsity weight; None if the network is untouched."""

    score: ScoreFunction
    path: list[Record]


def fine_tuned(
    run: Fit, evidence: Evidence | None, network: Network, data: TrainingData
) -> Outcome:
    """Fine-tune a network in place, by the weight and the score that are asked for or chosen."""
    asked = run.detector.sparsity_weight
    if is_auto(asked):
        return Path(run, cast(Evidence, evidence), network, data).outcome()
    start, recipe = time.perf_counter(), recipe_of(run.detector)
    judge = None if evidence is None else Judge(run, evidence, data)
    weight, history = None, list[Record]()
    if recipe.epochs > 0:
        if judge is not None and is_auto(run.detector.score_function):
            judge(network, None, start)
        elif judge is not None:
            judge.before = judge.look(network)
        weight, penalty = float(asked), run.fitted_penalty(network, data)
        history = run.fine_tune(network, data, penalty, weight, recipe, run.seeds.fine_tuning)
    score = run.detector.score_function
    if judge is not None and is_auto(score):
        records = judge(network, weight, start)
        # Whatever the weight asked for costs.
        best = max(robust(records, n_fewer_of(run)), key=lambda record: record["auroc"])
        judge.warn_if_worse(best["score_function"])
        return outcome_of(run, best, records, history)
    if judge is not None:
        judge.after = judge.look(network)
        (name,) = run.scores
        judge.warn_if_worse(name)
    return Outcome(history, weight, get_score(score), [])


class Path:
    """The ladder of a fit, from the network as it is."""

    def __init__(self, run: Fit, evidence: Evidence, network: Network, data: TrainingData) -> None:
        self.run = run
        self.network = network
        self.data = data
        self.start = time.perf_counter()
        self.judge = Judge(run, evidence, data)

    def outcome(self) -> Outcome:
        """Go up the ladder, and put the network on the rung that detects best."""
        network, kept_history = self.network, list[Record]()
        path = self.judge(network, None, self.start)
        n_fewer = n_fewer_of(self.run)
        best, kept = best_of(path, n_fewer), network.uncompiled_copy()
        for found, history in self._rungs():
            path = path + found
            best = best_of(path, n_fewer)
            if any(best is record for record in found):
                kept, kept_history = network.uncompiled_copy(), history
        network.adopt(kept.public)  # what it has come to since is worse
        return outcome_of(self.run, best, path, kept_history)

    def _rungs(self) -> Iterator[tuple[list[Record], list[Record]]]:
        """What each rung comes to, and the epochs up to it.

        The ladder ends at a rung that fails, which is an error if it is the first.
        """
        run, network = self.run, self.network
        if run.detector.max_epochs == 0:
            return
        penalty, given = run.fitted_penalty(network, self.data), network.uncompiled_copy()
        unit, history = self._unit(penalty), list[Record]()
        for number, relative in enumerate(LADDER):
            weight = float(f"{relative / unit:.{DIGITS}g}")
            try:
                found, trained = self._tried(number, weight, penalty, given)
            except DivergenceError as error:
                if number == 0:
                    raise
                if number == 1:
                    self._warn_of_no_weight(error)
                return
            begun = len(history) + 1
            history = history + [r | {"epoch": i} for i, r in enumerate(trained, begun)]
            yield found, history

    def _tried(
        self, number: int, weight: float, penalty: Penalty, given: Network
    ) -> tuple[list[Record], list[Record]]:
        """What a rung comes to, and its epochs; a DivergenceError if it comes to nothing."""
        run, network, start = self.run, self.network, time.perf_counter()
        full = recipe_of(run.detector)
        epochs = full.epochs * SHARE_OF_A_RUNG
        recipe = dataclasses.replace(full, epochs=max(1, round(epochs)), layers=LAYERS)
        seed, some = self._drawn(number, min(1.0, epochs / recipe.epochs))
        trained = run.fine_tune(network, some, penalty, weight, recipe, seed, given)
        try:
            return self.judge(network, weight, start), trained
        except NonFiniteLogitsError as error:
            raise DivergenceError(
                "The logits are NaN or infinite after fine-tuning. Lower learning_rate (now "
                f"{full.learning_rate:g})."
            ) from error
        except REFUSALS as error:  # of what the network has become: the one given was judged
            raise DivergenceError(
                f"The score refuses the network after fine-tuning ({cause_of(error)}). Lower "
                f"learning_rate (now {full.learning_rate:g}), or pass another score_function."
            ) from error

    def _warn_of_no_weight(self, error: DivergenceError) -> None:
        """Tell that weight 0 can be trained, but none above it."""
        if self.run.ranks.first:
            warn_user(
                f'sparsity_weight="auto" can try no weight above 0: {cause_of(error)}. Lower '
                f"learning_rate (now {float(self.run.detector.learning_rate):g}), or pass another "
                "penalty or score_function.",
                DivergenceWarning,
            )

    def _unit(self, penalty: Penalty) -> float:
        """Mean of the penalty before fine-tuning."""
        if isinstance(penalty, Relative):
            return 1.0  # by which it was fitted
        unit = self.run.mean_penalty(self.network, self.data, penalty)
        if not (math.isfinite(unit) and unit > 0):
            raise ValueError(
                f'sparsity_weight="auto" tries weights in units of the penalty\'s mean before '
                f"fine-tuning, which is {unit:g}. Pass a number as sparsity_weight, or a penalty "
                "that is positive."
            )
        return unit

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


def cause_of(error: Exception) -> str:
    """What an error says went wrong, without what to do about it, or a full stop."""
    return first_line(error).partition(". ")[0].removesuffix(".")


def n_fewer_of(run: Fit) -> int:
    """Known outliers that judge, or inliers if these are fewer; 0 if made outliers judge."""
    return min(len(run.outliers_to_judge), len(run.judging.rows))


def robust(records: list[Record], n_fewer: int = 0) -> list[Record]:
    """Those whose score is the reference, or with the first network is clearly better than it.

    A score that finds some kinds of outliers easily can have the best mean and be blind to others.
    And what a few known outliers show may be chance.
    """
    first = [r for r in records if r["sparsity_weight"] == records[0]["sparsity_weight"]]
    scored = {record["score_function"]: record for record in first}
    reference = next((scored[name] for name in REFERENCES if name in scored), first[0])
    names = {
        name for name, r in scored.items() if r is reference or _is_better(r, reference, n_fewer)
    }
    return [record for record in records if record["score_function"] in names]


def _is_better(record: Record, reference: Record, n_fewer: int) -> bool:
    """Whether no kind is detected worse, and the mean gain is beyond what chance may bring."""
    kinds = kinds_of(record)
    gains = _gains(record, reference)
    if kinds == [KNOWN]:
        error = error_of_auroc(record["auroc"], reference["auroc"], n_fewer)
        return bool(gains[0] > ERRORS * error)
    if len(kinds) == 1:
        return False  # one kind that was made shows little
    return bool(gains.min() >= 0 and gains.mean() > ERRORS * standard_error(gains))


def _gains(record: Record, other: Record) -> Scores:
    """What is gained of each kind against another record."""
    return np.array([record[f"{KIND}{kind}"] - other[f"{KIND}{kind}"] for kind in kinds_of(record)])


def best_of(records: list[Record], n_fewer: int = 0) -> Record:
    """What detects best among what is robust and accurate enough, and on no kind clearly worse.

    Of equals, it is the first.
    """
    allowed = [r for r in robust(records, n_fewer) if not r["worse"] and is_accurate(r)]
    return max(allowed, key=lambda record: record["auroc"])


def outcome_of(run: Fit, best: Record, path: list[Record], history: list[Record]) -> Outcome:
    """What comes of the record that is chosen, which is told if the user wants to be."""
    best["chosen"] = True
    if len(path) > 1 and run.detector.verbose and run.ranks.first:
        print(f"{type(run.detector).__name__}: {told(best, path, n_fewer_of(run))}")
    score = get_score(run.scores[best["score_function"]])
    return Outcome(history, best["sparsity_weight"], score, path)


def told(best: Record, path: list[Record], n_fewer: int = 0) -> str:
    """What was chosen, and why, in a line."""
    trained = best["sparsity_weight"] is not None
    others = [r for r in robust(path, n_fewer) if (r["sparsity_weight"] is not None) != trained]
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
    return bool(accurate_enough(np.array(accuracy_change(record))))


def accuracy_change(record: Record) -> float:
    """Accuracy that fine-tuning has brought."""
    return float(record["accuracy_after"] - record["accuracy_before"])


def kinds_of(record: Record) -> list[str]:
    """Kinds of outliers that judged."""
    return [name.removeprefix(KIND) for name in record if name.startswith(KIND)]
