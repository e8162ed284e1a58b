"""A warning of slow scoring points at the line of the user's, whichever method leads to it."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.exceptions import SlowScoringWarning

X = np.random.RandomState(0).randn(120, 6)
Y = np.arange(120) % 4


class Crowded(nn.Module):
    """Has memory for a number of rows at a time."""

    most = 10**6

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        if len(x) > Crowded.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize(
    "method", ["score_samples", "predict", "decision_function", "p_values", "features"]
)
def test_scoring_warns_at_the_line_that_asks_for_scores(monkeypatch, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = SparseEnergyOODDetector(Crowded(), max_epochs=0, random_state=0).fit(X, Y)
    monkeypatch.setattr(Crowded, "most", 10)

    def user():
        return getattr(detector, method)(X)

    with pytest.warns(SlowScoringWarning) as caught:
        user()
    places = {(w.filename, w.lineno) for w in caught if w.category is SlowScoringWarning}
    assert places == {(__file__, inspect.getsourcelines(user)[1] + 1)}
