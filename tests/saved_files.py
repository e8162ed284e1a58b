"""Small files of detectors, one of each format that `load` reads, and what they score.

python tests/saved_files.py --write  # if the format has a new version; older files stay
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.scores import TwoViews
from skood.storage import FORMAT

FOLDER = Path(__file__).with_name("saved")

X = np.random.RandomState(0).randn(120, 4)
LABELS = np.array(["ant", "bee", "cow"])[np.argmax(X[:, :3], axis=1)]


def network() -> nn.Module:
    """What the files need to be passed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def answers(detector: SparseEnergyOODDetector) -> dict[str, list]:
    """What a detector says of a few rows."""
    return {
        "scores": detector.score_samples(X[:5]).tolist(),
        "p_values": detector.p_values(X[:5]).tolist(),
        "classes": detector.predict_class(X[:5], reject_label="none").tolist(),
    }


def write() -> None:
    """Write a file of this version."""
    detector = SparseEnergyOODDetector(
        network(), pretrain_epochs=4, max_epochs=2, score_function=TwoViews(), random_state=0
    )
    detector.fit(X, LABELS)
    path = FOLDER / f"format_{FORMAT}.safetensors"
    detector.save(path)
    path.with_suffix(".json").write_text(json.dumps(answers(detector), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
