"""Small fits of which something is chosen, and by what rows."""

from __future__ import annotations

import warnings

import numpy as np
from modules import trained_mlp

from skood import SparseEnergyOODDetector
from skood.evidence import gathered


def correlated_table():
    """Two classes of a table whose columns depend on each other, and a network that knows them."""
    random = np.random.RandomState(0)
    y = random.randint(2, size=600)
    x = random.randn(600, 1) + 4 * y[:, None]
    X = (x + 0.3 * random.randn(600, 5)).astype(np.float32)
    return X, y, trained_mlp(X, y)


def fit(data, **parameters):
    X, y, module = data
    settings = {"max_epochs": 3, "random_state": 0, "sparsity_weight": "auto"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparseEnergyOODDetector(module, **(settings | parameters)).fit(X, y)


def judged_fit(data, monkeypatch, **parameters):
    """The fit, and the rows by which its score is chosen."""
    seen = []

    def seeing(run, network):
        evidence = gathered(run, network)
        seen.append((run, evidence))
        return evidence

    settings = {"score_function": "auto", "sparsity_weight": 0.3, "max_epochs": 1}
    with monkeypatch.context() as patches:
        patches.setattr("skood.detector.gathered", seeing)
        fit(data, **(settings | parameters))
    return seen[0]
