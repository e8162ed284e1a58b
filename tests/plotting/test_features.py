from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from pictures import X_ID, X_OOD, detector, legend, rows
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood.plotting import FeatureActivityDisplay


def area(display):
    (patch,) = display.ax_.patches
    heights, edges, _ = patch.get_data()
    return heights, edges


def hoyer(features):
    """Hoyer (2004), equation 1 of section 3.1, over the rows of an array."""
    root = np.sqrt(features.shape[1])
    ratio = np.abs(features).sum(axis=1) / np.sqrt((features**2).sum(axis=1))
    return np.mean((root - ratio) / (root - 1))


def test_rows_are_ordered_each_on_its_own_and_averaged():
    # Three active features that differ from row to row: by single feature they would look even.
    features_id = [[3, 0, 0, -1], [0, -5, 1, 0]]
    display = FeatureActivityDisplay.from_predictions(
        features_id, {"even": [[1, -1, 1, 1]], "dead": np.zeros((2, 4))}
    )
    heights, edges = area(display)
    np.testing.assert_allclose(heights, [4, 1, 0, 0])
    np.testing.assert_allclose(edges, [0.5, 1.5, 2.5, 3.5, 4.5])
    even, dead = display.ax_.lines
    np.testing.assert_allclose(even.get_xydata(), [[1, 1], [2, 1], [3, 1], [4, 1]])
    np.testing.assert_allclose(dead.get_ydata(), 0)
    # Hoyer of (3, 1): 2 - 4 / sqrt(10) = 0.7351; of (5, 1): 2 - 6 / sqrt(26) = 0.8233.
    assert legend(display) == [
        "ID: mean L1 5, Hoyer 0.78",
        "even: mean L1 4, Hoyer 0.00",
        "dead: mean L1 0, Hoyer 1.00",
    ]
    assert display.ax_.get_ylim()[0] == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_area_is_the_mean_l1_norm(dtype):
    features_id, features_ood = (rows(scale, 70).astype(dtype) for scale in (3, 1))
    display = FeatureActivityDisplay.from_predictions(features_id, features_ood)
    heights, edges = area(display)
    (line,) = display.ax_.lines
    for features, drawn in ((features_id, heights @ np.diff(edges)), (features_ood, line)):
        exact = features.astype(np.float64)
        total = drawn if features is features_id else drawn.get_ydata().sum()
        assert total == pytest.approx(np.abs(exact).sum(axis=1).mean())
        name = "ID" if features is features_id else "OOD"
        expected = f"{name}: mean L1 {total:.4g}, Hoyer {hoyer(exact):.2f}"
        assert expected in legend(display)


def test_the_features_given_stay_as_they_are():
    features = np.array([[1.0, -3.0, 2.0]])
    features.flags.writeable = False
    display = FeatureActivityDisplay.from_predictions(features, torch.tensor([[1.0, -3.0, 2.0]]))
    assert features.tolist() == [[1, -3, 2]]
    assert area(display)[0].tolist() == display.ax_.lines[0].get_ydata().tolist() == [3, 2, 1]


@pytest.mark.parametrize("width", [1, 2, 2048])
def test_any_width_can_be_drawn(width):
    random = np.random.RandomState(0)
    display = FeatureActivityDisplay.from_predictions(
        random.normal(size=(3, width)), {f"set {i}": random.normal(size=(2, width)) for i in "ab"}
    )
    display.figure_.canvas.draw()
    assert len(area(display)[0]) == len(display.ax_.lines[1].get_ydata()) == width


def test_sets_differ_in_grey():
    sets = {f"set {i}": rows(i + 1) for i in range(6)}
    lines = FeatureActivityDisplay.from_predictions(rows(9), sets).ax_.lines
    in_grey = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}
    assert len({line.get_color() for line in lines}) == len(in_grey) == 6


def test_from_a_detector_a_pipeline_and_a_search():
    fitted = detector().fit(rows(3, 300))
    pipeline = make_pipeline(StandardScaler(), detector()).fit(rows(3, 300))
    search = GridSearchCV(pipeline, {"sparseenergyooddetector__tpr": [0.8]}, cv=2)
    search.fit(rows(3, 300))
    for estimator, features in (
        (fitted, fitted.features),
        (pipeline, lambda X: pipeline[-1].features(pipeline[:-1].transform(X))),
        (
            search,
            lambda X: search.best_estimator_[-1].features(search.best_estimator_[:-1].transform(X)),
        ),
    ):
        display = FeatureActivityDisplay.from_estimator(estimator, X_ID, {"small": X_OOD})
        for drawn, X in ((area(display)[0], X_ID), (display.ax_.lines[0].get_ydata(), X_OOD)):
            ordered = [sorted(np.abs(row), reverse=True) for row in features(X).astype(float)]
            np.testing.assert_allclose(drawn, np.mean(ordered, axis=0))
        assert legend(display)[1].startswith("small: mean L1 ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features_id": [[1, np.nan]]}, ValueError, "features_id has 1 NaN or infinite values in"),
        ({"features_id": [[np.inf, 1]]}, ValueError, "features_id has 1 NaN or infinite values in"),
        ({"features_id": [1, 2]}, ValueError, r"features_id has shape \(2,\); expected \(n, d\)"),
        ({"features_id": np.ones((0, 2))}, ValueError, r"empty, of shape \(0, 2\)"),
        ({"features_id": np.ones((2, 0))}, ValueError, r"empty, of shape \(2, 0\)"),
        ({"features_id": [["a", "b"]]}, TypeError, "features_id has dtype <U1; expected real"),
        ({"features_id": [[1], [1, 2]]}, ValueError, "features_id does not form an array"),
        (
            {"features_id": np.ma.masked_equal([[1, 2]], 2)},
            ValueError,
            "features_id has masked entries",
        ),
        ({"features_ood": {}}, ValueError, "features_ood is an empty dict"),
        (
            {"features_ood": {"far": [[1, 2, 3]]}},
            ValueError,
            r"features_ood\['far'\] has 3 features per row, features_id 2; expected features",
        ),
        ({"features_ood": [[1, np.nan]]}, ValueError, r"features_ood\['OOD'\] has 1 NaN"),
    ],
)
def test_refuses_features_that_cannot_be_drawn(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureActivityDisplay.from_predictions(
            **({"features_id": [[1, 2]], "features_ood": [[1, 2]]} | arguments)
        )
    assert plt.get_fignums() == []
