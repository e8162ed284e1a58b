"""What the accuracy on in-distribution rows says about a network, before and after fine-tuning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .exceptions import AccuracyDropWarning, NearChanceWarning, ThresholdWarning
from .notices import warn_user

__all__ = ["warn_if_accuracy_dropped", "warn_if_near_chance", "warn_if_seen_before"]

NEAR_CHANCE = 0.1
"""Agreement beyond chance (Cohen's kappa) under which a trained classifier is hardly one."""

COMMON_CLASS = 0.97
"""Accuracy that a constant prediction reaches where nearly all rows are of one class."""

IMPLAUSIBLE_ACCURACY = 0.99
"""Accuracy at which rows are likelier to have been trained on than to be fresh."""

TOLERATED_DROP = 0.01


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
