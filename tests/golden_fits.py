"""Small fits of every kind, and what they gave when the values beside this file were written.

    python tests/golden_fits.py          # compare with the values kept, bit by bit
    python tests/golden_fits.py --write  # keep new ones; the commit says why they changed

Float32, on the CPU. Another thread count or processor rounds otherwise, and training makes more of
it; the test allows for that.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import shuffle
from torch import nn
from torch.utils.data import Dataset

from skood import SparseEnergyOODDetector
from skood.fitting import HOW

VALUES = Path(__file__).with_suffix(".json")

N_SHOWN = 12
"""Rows whose scores are kept."""


def digits(n_rows=400):
    """Digits in an order of their own, writers mixed."""
    X, y = load_digits(return_X_y=True)
    X, y = shuffle(X / 16, y, random_state=1)
    return X[: n_rows + 100], y[: n_rows + 100]


def seeded(make):
    """A network whose weights do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def perceptron(n_logits=10, dtype=torch.float32):
    """With batch-norm and dropout, which behave otherwise in training."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(32, 24),
            nn.ReLU(),
            nn.Linear(24, n_logits),
        ).to(dtype)
    )


def convolutions():
    """A small convolutional network on one channel."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    )


class Pairs(Dataset):
    """Digits as a data set of pairs."""

    def __init__(self):
        self.X, self.y = digits()

    def __len__(self):
        return 400

    def __getitem__(self, row):
        return torch.from_numpy(self.X[row]).float(), int(self.y[row])


class Loader:
    """Loads digits by their numbers."""

    def __call__(self, numbers):
        return torch.from_numpy(digits()[0][np.asarray(numbers, dtype=int)]).float()


def half_square(features):
    """A penalty that skood does not have."""
    return (features**2).sum(dim=1) / 2


def fitted(module, X, y=None, **parameters):
    """What a fit leaves, in plain numbers."""
    parameters = {
        "sparsity_weight": 0.02,
        "penalty": "l1",
        "max_epochs": 2,
        "learning_rate": 0.02,
        "batch_size": 64,
        "random_state": 0,
        "precision": "float32",
        "device": "cpu",
    } | parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = SparseEnergyOODDetector(module, **parameters).fit(X, y)
    few = [X[row][0] for row in range(N_SHOWN)] if isinstance(X, Dataset) else X[:N_SHOWN]
    few = torch.stack(few) if isinstance(X, Dataset) else few
    return {
        "scores": detector.score_samples(few).tolist(),
        "offset": float(detector.offset_),
        "calibration": [len(detector.calibration_scores_), *detector.calibration_scores_[:4]],
        "mean_l1": float(np.abs(detector.features(few)).sum(axis=1).mean()),
        "accuracy": [detector.id_accuracy_["before"], detector.id_accuracy_["after"]],
        "classes": [str(label) for label in detector.classes_],
        "history": [
            {
                name: value
                for name, value in record.items()
                if name not in ("seconds", "phase", "epoch", *HOW)
            }
            for record in detector.history_
        ],
    }


def table(**parameters):
    X, y = digits()
    return fitted(perceptron(), X[:400], y[:400], **parameters)


def images(**parameters):
    X, y = digits()
    return fitted(convolutions(), X[:400].reshape(-1, 1, 8, 8), y[:400], **parameters)


def with_outliers(**parameters):
    X, y = digits()
    X = np.concatenate([X[:400], np.random.RandomState(0).uniform(0, 1, size=(70, 64))])
    y = np.concatenate([y[:400], np.full(70, -1)])
    return fitted(perceptron(), X, y, ood_label=-1, **parameters)


def string_labels():
    X, y = digits()
    return fitted(perceptron(), X[:400], np.array([f"digit {label}" for label in y[:400]]))


def from_scratch(**parameters):
    X, y = digits()
    return fitted(None, X[:400], y[:400], pretrain_epochs=2, **parameters)


def images_from_scratch():
    X, y = digits()
    X = (16 * X[:200]).astype(np.uint8).reshape(-1, 8, 8, 1)
    return fitted(None, X, y[:200], pretrain_epochs=1, augment="flip-crop", max_epochs=1)


def without_labels():
    X, _ = digits()
    return fitted(None, X[:400], pretrain_epochs=2)


def labelled_by_the_network():
    X, _ = digits()
    return fitted(perceptron(), X[:400].astype(np.float32))


def references():
    _, y = digits()
    rows = np.array([str(row) for row in range(400)])
    return fitted(perceptron(), rows, y[:400], preprocess=Loader(), num_workers=0)


def tensor_in_float64():
    X, y = digits()
    return fitted(perceptron(dtype=torch.float64), torch.from_numpy(X[:400]), y[:400], max_epochs=1)


def share_of_two():
    """A fit that two processes can share: no batch-norm, and a last step of odd size."""
    X, y = digits()
    module = seeded(lambda: nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double())
    return fitted(module, X[:301], y[:301], batch_size=33)


FITS = {
    "table": table,
    "images": lambda: images(augment="flip"),
    "images, shifted": lambda: images(augment="flip-crop", max_epochs=1),
    "images from scratch": images_from_scratch,
    "table from scratch": from_scratch,
    "without labels": without_labels,
    "labelled by the network": labelled_by_the_network,
    "data set": lambda: fitted(perceptron(), Pairs(), num_workers=0),
    "references": references,
    "string labels": string_labels,
    "tensor in float64": tensor_in_float64,
    "known outliers": with_outliers,
    "outliers in the loss": lambda: with_outliers(outlier_weight=0.5),
    "distillation": lambda: table(distillation_weight=1.0, sparsity_weight=0.1),
    "outliers and distillation": lambda: with_outliers(
        outlier_weight=0.5, distillation_weight=0.5, batch_size=32
    ),
    "no weight": lambda: table(sparsity_weight=0.0),
    "l1_over_l2": lambda: table(penalty="l1_over_l2", sparsity_weight=0.3),
    "relative_l1": lambda: table(penalty="relative_l1", sparsity_weight=1.0),
    "penalty of the user's": lambda: table(penalty=half_square),
    "calibrated on the training rows": lambda: table(calibration_size=None),
    "calibrated on some rows": lambda: table(calibration_size=77, tpr=0.9),
    "untouched": lambda: table(max_epochs=0),
    "other recipe": lambda: table(momentum=0.0, weight_decay=0.01, batch_size=50, max_epochs=3),
    "two ranks": share_of_two,
    **{
        score: lambda score=score: table(score_function=score, max_epochs=1)
        for score in (
            "msp",
            "max_logit",
            "odin",
            "dice",
            "react",
            "scale",
            "knn",
            "mahalanobis",
            "vim",
        )
    },
}


def values():
    """What all fits give now."""
    return {name: fit() for name, fit in FITS.items()}


def differences(kept, now, path=""):
    """Places where two values are not the same, with the values."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for name in kept.keys() | now.keys():
            yield from differences(kept.get(name), now.get(name), f"{path} / {name}")
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for place, (one, other) in enumerate(zip(kept, now, strict=True)):
            yield from differences(one, other, f"{path}[{place}]")
    elif kept != now:
        yield path, kept, now


if __name__ == "__main__":
    torch.set_num_threads(1)
    now = json.loads(json.dumps(values()))
    if "--write" in sys.argv:
        VALUES.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    else:
        found = list(differences(json.loads(VALUES.read_text(encoding="utf-8")), now))
        for place, kept, got in found:
            print(f"{place}: {kept} became {got}")
        print(f"{len(found)} differences")
        sys.exit(bool(found))
