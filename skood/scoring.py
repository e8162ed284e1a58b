"""Features, scores and predictions that a network gives for rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .engine.affine import affine_head
from .engine.inference import forward_rows, score_rows
from .engine.network import TRIAL_ROWS, Network
from .engine.objective import Penalized
from .engine.outputs import Seen, as_float64
from .engine.precision import widened
from .engine.rows import Rows, as_array
from .engine.rowwise import check_row_by_row
from .notices import quoted
from .penalties import Penalty
from .scores import Head, LayeredOutputs, Outputs, apply_score
from .scores.protocol import ScoreFunction, labelled, uses_gradient

__all__ = [
    "LabelledRows",
    "Passes",
    "Scores",
    "Winners",
    "check_penalty",
    "check_score",
    "features_of",
    "head_of",
    "outputs_of",
    "scored",
    "seen_of_all",
    "winners_of",
]

Scores = NDArray[np.float64]
Winners = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledRows:
    """In-distribution rows, and the logit indices of their labels."""

    rows: Rows
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Passes:
    """Outputs of rows, piece by piece; each iteration is a pass through the network."""

    network: Network
    labelled: LabelledRows

    def __iter__(self) -> Iterator[Outputs | LayeredOutputs]:
        labels = torch.from_numpy(self.labelled.targets)
        for piece, seen in forward_rows(self.network, self.labelled.rows, features=True):
            features, logits, layers = seen.each(as_float64)
            if features is None:
                continue
            yield labelled(features, logits, labels[piece].to(logits.device), layers)


def scored(
    network: Network, rows: Rows, score: ScoreFunction
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Positions, scores and logits of rows, piece by piece; the score says what it needs."""
    gradient = uses_gradient(score)
    if gradient and not hasattr(score, "perturbation"):
        raise TypeError(
            f"score_function={quoted(score)} sets uses_gradient, but has no method "
            "perturbation(logits, batch) that gives what to add to the batch."
        )
    return score_rows(
        network,
        rows,
        partial(apply_score, score),
        features=getattr(score, "uses_features", True),
        perturbation=cast(Any, score).perturbation if gradient else None,
    )


def check_score(network: Network, rows: Rows, score: ScoreFunction) -> None:
    """Refuse a score that mixes rows or draws at random, tried on some rows."""
    some, what = rows.spaced(TRIAL_ROWS), f"score_function={quoted(score)}"
    if uses_gradient(score):  # which is taken from a forward

        def values(picks: NDArray[np.intp]) -> Tensor:
            return torch.cat([got for _, got, _ in scored(network, some.pick(picks), score)])
    else:
        uses_features = getattr(score, "uses_features", True)
        pieces = [seen for _, seen in forward_rows(network, some, features=uses_features)]
        # Halfway between rows, as a row that a score was fitted to may be at no distance from it.
        seen = Seen.joined(pieces).each(as_float64).each(_halfway)

        def values(picks: NDArray[np.intp]) -> Tensor:
            index = torch.from_numpy(picks).to(seen.logits.device)
            return apply_score(score, *seen.each(lambda them: them[index]))

    check_row_by_row(what, values, len(some), network.device)


def _halfway(values: Tensor) -> Tensor:
    return (values + values.roll(1, dims=0)) / 2


def head_of(network: Network, rows: Rows) -> Head:
    """The head as an affine layer, for scores that need it; an error if it is none."""
    return Head(*affine_head(network, rows))


def features_of(network: Network, rows: Rows) -> Tensor:
    """Features (n, d) of rows, as training sees them."""
    pieces = forward_rows(network, rows, features=True)
    return torch.cat([widened(seen.features) for _, seen in pieces if seen.features is not None])


def check_penalty(network: Network, rows: Rows, penalty: Penalty) -> None:
    """Refuse a penalty that mixes rows or draws at random, tried on some rows."""
    features = features_of(network, rows.spaced(TRIAL_ROWS))
    term = Penalized(penalty, 0.0)
    check_row_by_row(
        f"penalty={quoted(penalty)}",
        lambda picks: term.values(features[torch.from_numpy(picks).to(features.device)]),
        len(features),
        network.device,
    )


def outputs_of(network: Network, rows: Rows, score: ScoreFunction) -> tuple[Scores, Winners]:
    """Score and most likely logit of each row."""
    scores, winners = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
    for piece, some, logits in scored(network, rows, score):
        scores[piece], winners[piece] = as_array(some), as_array(logits.argmax(dim=1))
    return scores, winners


def seen_of_all(network: Network, rows: Rows) -> Seen:
    """What is seen of rows, in float64; of features and inner layers nothing if they are hidden."""
    visible = network.head is not None
    pieces = [seen for _, seen in forward_rows(network, rows, features=visible)]
    return Seen.joined(pieces).each(as_float64)


def winners_of(network: Network, rows: Rows) -> Winners:
    """Most likely logit of each row."""
    winners = np.empty(len(rows), dtype=np.int64)
    for piece, seen in forward_rows(network, rows):
        winners[piece] = as_array(seen.logits.argmax(dim=1))
    return winners
