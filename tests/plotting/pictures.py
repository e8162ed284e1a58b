"""What the tests of the displays share: rows, a detector, and the texts of a picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from skood import SparseEnergyOODDetector


def normal(mean, n_rows, seed):
    return np.random.RandomState(seed).normal(mean, 1, size=n_rows)


def legend(display, panel=None):
    ax = display.ax_ if panel is None else display.axes_[panel]
    return [text.get_text() for text in ax.get_legend().get_texts()]


def rows(scale, n_rows=100):
    return scale * np.random.RandomState(n_rows).normal(size=(n_rows, 6)).astype(np.float32)


X_ID, X_OOD = rows(3), rows(1, 80)


def detector(score_function="energy"):
    """Around an untrained network, whose energies grow with the scale of the rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return SparseEnergyOODDetector(
        module, score_function=score_function, max_epochs=0, random_state=0
    )
