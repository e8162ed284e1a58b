"""What all displays promise alike."""

from __future__ import annotations

import importlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import X_ID, X_OOD
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import StandardScaler

import skood
from skood import SparseEnergyOODDetector, plotting
from skood.plotting import (
    DetectionRocDisplay,
    DetectionTableDisplay,
    FeatureActivityDisplay,
    ImageGridDisplay,
    RejectionConfusionDisplay,
    RiskCoverageDisplay,
    ScoreDistributionDisplay,
)

DRAW = {
    "distributions": lambda **options: ScoreDistributionDisplay.from_predictions(
        [1, 2], [0, 1], **options
    ),
    "roc": lambda **options: DetectionRocDisplay.from_predictions([1, 2], [0, 1], **options),
    "features": lambda **options: FeatureActivityDisplay.from_predictions(
        [[1, 2]], [[0, 1]], **options
    ),
    "table": lambda **options: DetectionTableDisplay.from_predictions(
        {"a": [1, 2]}, {"a": [0, 1]}, **options
    ),
}
displays = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
from_rows = pytest.mark.parametrize(
    "from_estimator",
    [
        ScoreDistributionDisplay.from_estimator,
        DetectionRocDisplay.from_estimator,
        FeatureActivityDisplay.from_estimator,
        lambda estimator, X_id, X_ood: DetectionTableDisplay.from_estimator(
            {"a": estimator}, X_id, X_ood
        ),
    ],
    ids=DRAW,
)


@displays
def test_draws_on_the_axes_given_or_on_new_ones(draw):
    figure = Figure()
    axes = figure.subplots(1, 2)
    for ax in axes:
        display = draw(ax=ax)
        assert display.ax_ is ax
        assert display.figure_ is figure
        assert display.plot(ax) is display
    assert plt.get_fignums() == []
    assert draw().figure_ is plt.figure(plt.get_fignums()[0])


@displays
def test_names_the_extra_where_matplotlib_is_missing(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'skood\[plot\]'"):
        draw()


def test_imports_without_matplotlib(monkeypatch):
    monkeypatch.setattr(skood, "plotting", plotting)  # which the import below replaces
    for name in [*sys.modules]:
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
        if name.startswith("skood.plotting"):
            monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("skood.plotting")
    assert module.ScoreDistributionDisplay.__init__ is not ScoreDistributionDisplay.__init__


@from_rows
def test_refuses_an_unfitted_detector_and_what_is_none(from_estimator):
    with pytest.raises(NotFittedError):
        from_estimator(SparseEnergyOODDetector(), X_ID, X_OOD)
    with pytest.raises(TypeError, match=r"StandardScaler\(\) has no .*; expected a fitted"):
        from_estimator(StandardScaler(), X_ID, X_OOD)


@from_rows
def test_refuses_an_empty_dict_before_anything_is_computed(from_estimator):
    class Detector:
        def score_samples(self, X):
            raise AssertionError("scored")

        features = score_samples

    with pytest.raises(ValueError, match="X_ood is an empty dict"):
        from_estimator(Detector(), [[0]], {})


def test_names_are_drawn_as_they_are():
    name = r"$\\nothing$ {"
    drawn = [
        ScoreDistributionDisplay.from_predictions([1, 2], {name: [0, 1]}),
        RejectionConfusionDisplay.from_predictions([name, "b"], ["b", "b"], reject_label="?"),
        ImageGridDisplay(images={name: [[[0.5]]]}, captions={name: [name]}).plot(),
    ]
    for display in drawn:
        display.figure_.canvas.draw()
    display = RiskCoverageDisplay.from_predictions({"_a": [1, 2]}, {"_a": [True, False]})
    assert "_a: AURC" in display.ax_.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize("display", [ScoreDistributionDisplay, DetectionRocDisplay])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score_id": [1, np.nan]}, ValueError, "score_id has 1 NaN"),
        (
            {"score_id": [1, np.inf, -np.inf]},
            ValueError,
            "score_id has 2 NaN or infinite values in 3",
        ),
        ({"score_id": ["a"]}, TypeError, "score_id has dtype"),
        ({"score_ood": {"far": [-np.inf]}}, ValueError, r"score_ood\['far'\] has 1 NaN or inf"),
        ({"score_ood": {"far": [[1]]}}, ValueError, r"score_ood\['far'\] has shape \(1, 1\)"),
        ({"score_ood": []}, ValueError, r"score_ood\['OOD'\] is empty"),
        ({"score_ood": {}}, ValueError, "score_ood is an empty dict"),
        ({"threshold": np.nan}, ValueError, "'threshold' parameter of .*Display .* Got nan"),
        ({"threshold": np.inf}, ValueError, "'threshold' .* float .* None. Got inf"),
        ({"threshold": -np.inf}, ValueError, "'threshold' .* float .* None. Got -inf"),
        ({"threshold": "0.95"}, TypeError, "'threshold' .* Got '0.95'"),
        ({"threshold": True}, TypeError, "'threshold' .* Got True"),
    ],
)
def test_refuses_scores_that_cannot_be_drawn(display, arguments, error, message):
    with pytest.raises(error, match=message):
        display.from_predictions(**({"score_id": [1, 2], "score_ood": [0, 1]} | arguments))
    assert plt.get_fignums() == []
