"""What a weight does at three widths: "l1" beside "relative_l1", whose weight is free of them.

Trains perceptrons with 64, 512 and 2048 features on scikit-learn's digits 0 to 7, fine-tunes each
with both penalties at several weights, and prints, over three seeds, the L1 norm of the features in
percent of that before, the accuracy on test rows, and the AUROC against the digits 8 and 9.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from environment import machine, versions
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skood import SparseEnergyOODDetector
from skood.metrics import auroc

WIDTHS = (64, 512, 2048)
WEIGHTS = {"l1": (0.002, 0.02, 0.2), "relative_l1": (0.1, 0.5, 2.0)}
CLASSES = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=100, help="of pre-training (default: 100)")
    options = parser.parse_args(argv)
    X, y = load_digits(return_X_y=True)
    print(f"- versions: {versions()}\n- machine: {machine()}\n")
    print("| penalty | weight | " + " | ".join(f"{width} features" for width in WIDTHS) + " |")
    print("|---|---|---|---|---|")
    measured = {
        (width, seed): measure(X / 16, y, width, seed, options.epochs)
        for width in WIDTHS
        for seed in options.seeds
    }
    for penalty, weights in {"none": (0.0,), **WEIGHTS}.items():
        for weight in weights:
            cells = []
            for width in WIDTHS:
                runs = [measured[width, seed][penalty, weight] for seed in options.seeds]
                if any(run is None for run in runs):
                    cells.append("collapses")
                    continue
                size, accuracy, area = 100 * np.mean(runs, axis=0)
                cells.append(f"{size:.0f} / {accuracy:.1f} / {area:.1f}")
            print(f"| {penalty} | {weight:g} | " + " | ".join(cells) + " |")
    print("\nL1 norm of the features in percent of that before / accuracy / AUROC.")


def measure(
    X: np.ndarray, y: np.ndarray, width: int, seed: int, epochs: int
) -> dict[tuple[str, float], tuple[float, float, float] | None]:
    X_id, y_id = X[y < CLASSES], y[y < CLASSES]
    X_train, X_test, y_train, y_test = train_test_split(
        X_id, y_id, test_size=0.3, stratify=y_id, random_state=seed
    )
    network = trained(X_train, y_train, width, seed, epochs)
    before = fine_tuned(network, "l1", 0.0, 0, seed, X_train, y_train)
    size = np.abs(before.features(X_test)).sum(axis=1).mean()
    results: dict[tuple[str, float], tuple[float, float, float] | None] = {}
    for penalty, weights in {"none": (0.0,), **WEIGHTS}.items():
        for weight in weights:
            name = "l1" if penalty == "none" else penalty
            try:
                detector = fine_tuned(network, name, weight, 10, seed, X_train, y_train)
            except RuntimeError:  # the scores collapse to a constant
                results[penalty, weight] = None
                continue
            results[penalty, weight] = (
                np.abs(detector.features(X_test)).sum(axis=1).mean() / size,
                np.mean(detector.predict_class(X_test) == y_test),
                auroc(detector.score_samples(X_test), detector.score_samples(X[y >= CLASSES])),
            )
    return results


def fine_tuned(
    network: nn.Module,
    penalty: str,
    weight: float,
    epochs: int,
    seed: int,
    X: np.ndarray,
    y: np.ndarray,
) -> SparseEnergyOODDetector:
    detector = SparseEnergyOODDetector(
        network, penalty=penalty, sparsity_weight=weight, max_epochs=epochs, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that the network has seen
        return detector.fit(X, y)


def trained(X: np.ndarray, y: np.ndarray, width: int, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rows, labels = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y)
    for _ in range(epochs):
        for picks in torch.randperm(len(rows)).split(128):
            loss = nn.functional.cross_entropy(network(rows[picks]), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


if __name__ == "__main__":
    main()
