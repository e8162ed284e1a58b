"""What held-out rows say about a network, its labels and its scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from .exceptions import (
    AccuracyDropWarning,
    LabelOrderWarning,
    NearChanceWarning,
    ThresholdWarning,
    TiedScoresWarning,
)
from .notices import warn_user

__all__ = [
    "TOLERATED_DROP",
    "accurate_enough",
    "first_of_each_class",
    "warn_if_accuracy_dropped",
    "warn_if_labels_doubtful",
    "warn_if_seen_before",
    "warn_if_tied",
]

Indices = NDArray[np.int64]
Order = dict[int, int]
Sample = tuple[Indices, Indices]

NEAR_CHANCE = 0.1
"""Agreement beyond chance (Cohen's kappa) under which a trained classifier is hardly one."""

COMMON_CLASS = 0.97
"""Accuracy that a constant prediction reaches where nearly all rows are of one class."""

IMPLAUSIBLE_ACCURACY = 0.99
"""Accuracy at which rows are likelier to have been trained on than to be fresh."""

TOLERATED_DROP = 0.01
"""Accuracy that fine-tuning may cost, as a fraction, if nothing else is asked for."""

ROUNDING = 1e-9
"""A loss of accuracy that equals the tolerance may exceed it by the rounding of a mean."""

CHANCE_OF_A_FALSE_ALARM = 0.005
"""That another order makes right as many more rows, if it is only as good."""

LEAST_GAIN = 3
"""Rows that another order of the labels makes right for each that it makes wrong."""

LEAST_AGREEMENT = 0.3
"""Share that another order makes right, beyond chance and of the rows whose class it moves."""

BONUS_OF_STAYING = 0.6
"""Rows that a label counts as right if it keeps its place; a swap must gain more than one."""

NO_OUTPUT = -1

NAMED_PAIRS = 2
LONGEST_LABEL = 16


FEW_ROWS = 4
"""Rows that may score the same because they are the same."""


def accurate_enough(
    change: NDArray[np.float64], tolerance: float = TOLERATED_DROP
) -> NDArray[np.bool_]:
    """Whether changes of the accuracy lose no more than is tolerated; False for NaN."""
    return change >= -tolerance - ROUNDING


def warn_if_labels_doubtful(
    targets: Indices, predictions: Indices, classes: NDArray[Any], rows: Sample
) -> None:
    """Warn if the labels are in another order than the logits, or agree with them by chance.

    `targets` and `predictions` hold logit indices of held-out rows, `classes` has the label of each
    logit. `rows` gives the targets and predictions that decide on the order: alike many rows of
    each class, as `first_of_each_class` picks them.
    """
    order = _better_order(*rows)
    if order is None:
        warn_if_near_chance(targets, predictions)
    else:
        _warn_of_order(*rows, order, classes)


def first_of_each_class(targets: Indices, n_rows: int) -> NDArray[np.intp]:
    """Positions, sorted, of at most `n_rows` rows of each class.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.accuracy import first_of_each_class
    >>> first_of_each_class(np.array([7, 7, 1, 7, 1]), 2)
    array([0, 1, 2, 4])
    """
    return np.flatnonzero(_places_in_class(targets) < n_rows)


def _places_in_class(targets: Indices) -> NDArray[np.intp]:
    """How many earlier rows are of the class of each row."""
    by_class = np.argsort(targets, kind="stable")
    _, starts, counts = np.unique(targets[by_class], return_index=True, return_counts=True)
    places = np.empty(len(targets), dtype=np.intp)
    places[by_class] = np.arange(len(targets)) - np.repeat(starts, counts)
    return places


def _better_order(targets: Indices, predictions: Indices) -> Order | None:
    """Which prediction stands for which label, if that makes clearly more rows right.

    Of many orders, one is the best on any rows by chance. So each half of the rows judges the order
    that is the best on the other half.
    """
    expected = targets.copy()
    is_in_first = _places_in_class(targets) % 2 == 0
    if is_in_first.all():  # a row of each class: there is no other half
        return None
    for half in (is_in_first, ~is_in_first):
        order = _best_order(targets[half], predictions[half])
        expected[~half] = _in_order(targets[~half], order)
    moved = expected != targets
    gained = np.sum(moved & (predictions == expected))
    lost = np.sum(moved & (predictions == targets))
    n_classes = len(np.unique(targets))
    accuracy = np.mean(predictions == expected)
    if (
        gained < max(LEAST_GAIN * lost, LEAST_AGREEMENT * np.sum(moved), 1)
        or accuracy * n_classes - 1 < LEAST_AGREEMENT * (n_classes - 1)
        or betainc(gained, lost + 1, 0.5) > CHANCE_OF_A_FALSE_ALARM  # a sign test
    ):
        return None
    return _best_order(targets, predictions)


def _in_order(targets: Indices, order: Order) -> Indices:
    """What an order has a right network predict."""
    return np.array([order.get(target, target) for target in targets.tolist()], dtype=np.int64)


def _best_order(targets: Indices, predictions: Indices) -> Order:
    """The one-to-one matching of labels to predictions under which most rows are right.

    It holds the labels that are not matched to themselves. One whose place goes to another may be
    left without any.
    """
    # Imported here, as few need them.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    labels = np.unique(targets)
    outputs = np.union1d(labels, predictions)
    places = np.arange(len(labels))
    staying, nowhere = np.searchsorted(outputs, labels), len(outputs) + places
    rows = np.concatenate([np.searchsorted(labels, targets), places, places])
    columns = np.concatenate([np.searchsorted(outputs, predictions), staying, nowhere])
    # Nowhere at next to nothing, as 0 would be no edge.
    weights = np.repeat([1.0, BONUS_OF_STAYING, 1e-6], [len(targets), len(labels), len(labels)])
    # Older versions of scipy match with indices of 32 bits alone.
    graph = coo_array((weights, (rows.astype(np.int32), columns.astype(np.int32)))).tocsr()
    matched = min_weight_full_bipartite_matching(graph, maximize=True)[1]
    outputs = np.append(outputs, np.full(len(labels), NO_OUTPUT))[matched]
    pairs = zip(labels.tolist(), outputs.tolist(), strict=True)
    return {label: output for label, output in pairs if label != output}


def _warn_of_order(
    targets: Indices, predictions: Indices, order: Order, classes: NDArray[Any]
) -> None:
    matched = _in_order(targets, order)
    right = {label: np.sum(predictions[targets == label] == order[label]) for label in order}
    found = [label for label in order if order[label] != NO_OUTPUT]
    clearest = sorted(found, key=lambda label: -right[label])[:NAMED_PAIRS]
    pairs = [
        f"{_named(classes[order[label]])} where y says {_named(classes[label])}"
        for label in clearest
    ]
    rest = f" (and {len(order) - len(pairs)} more)" if len(order) > len(pairs) else ""
    warn_user(
        "The labels seem to be in another order than the module's logits: it predicts "
        f"{', '.join(pairs)}{rest}. It is right on {np.mean(targets == predictions):.0%} of "
        f"{len(targets)} rows; in its own order, on {np.mean(matched == predictions):.0%}. Pass "
        "the place of each label among the logits: y = [names.index(label) for label in y], with "
        "names in the order of the module's training.",
        LabelOrderWarning,
    )


def _named(label: Any) -> str:
    shown = repr(label.item())
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 3]}..."


def warn_if_near_chance(targets: NDArray[np.int64], predictions: NDArray[np.int64]) -> None:
    """Warn if a given network does hardly better than chance on the labels.

    That is: if Cohen's kappa is below 0.1 and the accuracy below 0.97. Both arrays hold logit
    indices.
    """
    # Imported here, as it takes long, and `import skood` needs nothing of it.
    from sklearn.metrics import cohen_kappa_score

    # One class, or next to no other, leaves nothing to compare with.
    if len(np.unique(targets)) == 1 or np.mean(targets == predictions) >= COMMON_CLASS:
        return
    kappa = cohen_kappa_score(targets, predictions)
    if kappa < NEAR_CHANCE:
        warn_user(
            f"The module given classifies {np.mean(targets == predictions):.1%} of {len(targets)} "
            f"held-out rows as y labels them, hardly better than chance (kappa {kappa:.2f}). "
            "Either the labels are in another order than the logits, or X needs the "
            "preprocessing that the network was trained with (preprocess=), or the network is "
            "not trained (pretrain_epochs=).",
            NearChanceWarning,
        )


def warn_if_seen_before(targets: NDArray[np.int64], predictions: NDArray[np.int64]) -> None:
    """Warn if a given network is implausibly accurate on its calibration rows.

    If it is right on 99 %, it was probably trained on them, and the threshold breaks its promise.
    """
    correct = targets == predictions
    if correct.mean() >= IMPLAUSIBLE_ACCURACY:
        warn_user(
            f"The module given classifies {correct.mean():.1%} of its {len(correct)} calibration "
            "rows correctly, so it was probably trained on them. The threshold then keeps fewer "
            "fresh rows than tpr promises. Call the detector's calibrate(X_fresh) after fit, with "
            "rows that the network has never seen (detector_.calibrate of a RejectingClassifier).",
            ThresholdWarning,
        )


def warn_if_accuracy_dropped(
    targets: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    sparsity_weight: float,
) -> None:
    """Warn if fine-tuning costs accuracy: more than a point, and than twice its standard error.

    The arrays hold logit indices of the calibration rows: their labels, and the predictions before
    and after.
    """
    was, now = before == targets, after == targets
    changes = was.astype(float) - now
    drop = changes.mean()
    error = changes.std(ddof=1) / np.sqrt(len(changes)) if len(changes) > 1 else np.inf
    if drop > max(TOLERATED_DROP, 2 * error):
        warn_user(
            f"Fine-tuning took the accuracy on {len(changes)} held-out rows from {was.mean():.1%} "
            f"to {now.mean():.1%} (a drop of {100 * drop:.1f} points, standard error "
            f"{100 * error:.1f}). Lower sparsity_weight (now {sparsity_weight:g}), learning_rate "
            "or max_epochs.",
            AccuracyDropWarning,
        )


def warn_if_tied(scores: NDArray[np.float64], threshold: float) -> None:
    """Warn if so many calibration scores are the same that the threshold tells little apart.

    That is: all, or more than half, or more than a tenth at the threshold.
    """
    values, counts = np.unique(scores, return_counts=True)
    n_tied, at_threshold = counts.max(), np.count_nonzero(scores == threshold)
    if n_tied == scores.size > 1 or (
        n_tied > FEW_ROWS and (n_tied > scores.size / 2 or at_threshold > scores.size / 10)
    ):
        warn_user(
            f"{n_tied} of {scores.size} calibration scores are the same, "
            f"{values[counts.argmax()]:.6g}, and the threshold keeps "
            f"{np.mean(scores >= threshold):.0%}: rows of one score cannot be told apart. Where "
            'probabilities round to 1 (score_function="msp"), pass "energy" or "max_logit". If '
            "these tie, too, the network gives the same logits for different rows: check its "
            "weights, and the scale of X (preprocess=).",
            TiedScoresWarning,
        )
