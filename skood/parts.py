"""Which in-distribution rows of a fit train, and which are held out, for what."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .calibration import calibration_split
from .engine.objective import FINE_TUNING_TERMS
from .engine.rows import spaced
from .notices import quoted
from .parameters import Detector, chosen_parameters
from .scores.composed import Views
from .scores.protocol import ScoreFunction

__all__ = ["ROWS_APART", "Parts", "parted", "parted_outliers"]

ROWS_APART = 39
"""Rows held out for a score that wants some, or to judge, at least, as for the threshold."""

ROWS_OF_A_JUDGE = 1000
"""Rows held out to judge what may be chosen, at most."""

Positions = NDArray[np.intp]


class Parts(NamedTuple):
    """Positions of in-distribution rows, by what they are for."""

    training: Positions
    threshold: Positions
    """Those that place the threshold; those of training if none are held out for it."""

    scores: Positions
    """Those that scores see as rows held out; those of training if none are."""

    judging: Positions
    """Those that judge what may be chosen; none if nothing may."""

    also_judging: Positions
    """Those of `scores` that judge as well, if anything may be chosen."""


def parted(
    detector: Detector, scores: list[ScoreFunction], targets: NDArray[np.int64], seed: int
) -> Parts:
    """Part rows with these targets, for a detector that has these scores or may choose them."""
    training, threshold = calibration_split(
        targets, detector.calibration_size, detector.tpr, np.random.RandomState(seed)
    )
    held_out = detector.calibration_size is not None
    judging = training[:0]
    if chosen := chosen_parameters(detector):
        training, judging = _apart(
            detector, targets, training, seed, f'{chosen[0]}="auto"', "value", ROWS_OF_A_JUDGE
        )
    wanting = [score for score in scores if getattr(score, "uses_held_out", False)]
    apart, shared = training, training[:0]
    if wanting and held_out:  # not those of the threshold: it would keep fewer than promised
        what = f"score_function={quoted(detector.score_function)}"
        training, apart = _apart(detector, targets, training, seed, what, "score")
        # More rows tell more. What combines views takes from them only where values lie and how
        # far they spread; another score may remember them.
        if chosen and all(isinstance(score, Views) for score in wanting):
            shared = apart[spaced(len(apart), ROWS_OF_A_JUDGE)]
    return Parts(training, threshold if held_out else training, apart, judging, shared)


def parted_outliers(detector: Detector, outliers: Positions) -> tuple[Positions, Positions]:
    """Known outliers that judge, and those to train on: apart, if something is chosen."""
    if not chosen_parameters(detector):
        return outliers[:0], outliers
    terms = FINE_TUNING_TERMS.items()
    if not any(term.of_outliers and getattr(detector, name) > 0 for name, term in terms):
        return outliers, outliers[:0]
    return outliers[1::2], outliers[::2]


def _apart(
    detector: Detector,
    targets: NDArray[np.int64],
    training: Positions,
    seed: int,
    what: str,
    other: str,
    at_most: int | None = None,
) -> tuple[Positions, Positions]:
    """Rows to train on, and rows held out of training."""
    share = min(len(training) // 10, at_most or len(training))
    free = len(training) - len(np.unique(targets[training]))
    size = min(max(share, ROWS_APART), max(len(training) // 3, 2), free)
    if size < 2:
        raise ValueError(
            f"{what} holds rows out of training, at least 2, and of {len(training)} rows only "
            f"{max(size, 0)} are free. Pass more rows, or another {other}."
        )
    kept, apart = calibration_split(
        targets[training], size, detector.tpr, np.random.RandomState(seed)
    )
    return training[kept], training[apart]
