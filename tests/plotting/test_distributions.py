from __future__ import annotations

from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from pictures import X_ID, X_OOD, detector, normal, rows
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood.plotting import ScoreDistributionDisplay
from skood.scores import Energy, MaxLogit


def labels(display):
    """The texts beside the panels, from top to bottom, each as its lines."""
    return [label.get_text().splitlines() for label in display.ax_.get_yticklabels()]


def areas(display):
    """Heights over their base line, edges and base line of each histogram, in order of drawing."""
    found = [patch.get_data() for patch in display.ax_.patches]
    return [(heights - bottom, edges, bottom) for heights, edges, bottom in found]


def threshold_of(display):
    (line,) = display.ax_.lines
    return line.get_xdata()[0]


# What is drawn


def test_labels_give_the_share_of_each_set_at_or_above_the_threshold():
    display = ScoreDistributionDisplay.from_predictions(
        [4, 3, 2, 1], {"near": [3.0, 2.0, 0.0], "far": np.zeros(5)}, threshold=2
    )
    assert labels(display) == [
        ["ID", "75.0 % kept"],
        ["near", "66.7 % kept"],
        ["far", "0.0 % kept"],
    ]
    assert threshold_of(display) == 2
    assert [text.get_text() for text in display.ax_.texts] == ["threshold 2"]


def test_without_a_threshold_there_is_no_share_and_no_line():
    display = ScoreDistributionDisplay.from_predictions([1, 2], [0, 1])
    assert labels(display) == [["ID"], ["OOD"]]
    assert not display.ax_.lines
    assert not display.ax_.texts
    assert display.threshold is None


def test_each_set_has_a_panel_against_id_over_common_bins():
    ood = {"few": normal(-3, 50, 1), "many": normal(2, 4000, 2)}
    score_id = normal(4, 1000, 0)
    display = ScoreDistributionDisplay.from_predictions(score_id, ood)
    drawn = areas(display)
    everything = np.concatenate([score_id, *ood.values()])
    assert [bottom for _, _, bottom in drawn] == [0, -1, -1, -2, -2]
    sets = [score_id, score_id, ood["few"], score_id, ood["many"]]
    for (heights, edges, _), scores in zip(drawn, sets, strict=True):
        assert (edges[0], edges[-1]) == (everything.min(), everything.max())
        counts = [
            np.sum(
                (scores >= low) & ((scores < high) | (scores == edges[-1]) & (high == edges[-1]))
            )
            for low, high in pairwise(edges)
        ]
        np.testing.assert_allclose(heights / heights.max(), counts / np.max(counts), atol=1e-9)
        assert heights.max() == pytest.approx(0.85)  # so panels do not touch
    _, low, _ = display.ax_.get_yticks()
    assert -1 < low < 0  # within its panel


def test_heights_do_not_depend_on_the_number_of_rows():
    scores = normal(0, 100, 0)
    display = ScoreDistributionDisplay.from_predictions(
        scores + 1, {"once": scores, "tenfold": np.tile(scores, 10)}
    )
    _, _, (once, _, _), _, (tenfold, _, _) = areas(display)
    np.testing.assert_allclose(once, tenfold)


@pytest.mark.parametrize("n_sets", [1, 2, 5, 11])
def test_labels_of_any_number_of_sets_do_not_touch(n_sets):
    long = "a set with a long name that says how it was made, and from what"
    ood = {f"{i} {long}": normal(i, 50, i) for i in range(n_sets)}
    display = ScoreDistributionDisplay.from_predictions(normal(9, 50, 0), ood, threshold=7)
    display.figure_.canvas.draw()
    boxes = [label.get_window_extent() for label in display.ax_.get_yticklabels()]
    assert not any(box.overlaps(other) for box, other in combinations(boxes, 2))
    assert min(box.x0 for box in boxes) >= 0
    width = display.figure_.bbox.width
    assert display.ax_.get_window_extent().width > 0.6 * width
    assert labels(display)[1][1].endswith("...")


@pytest.mark.parametrize("threshold", [0.1, 9.9])
def test_the_text_of_the_threshold_is_on_the_side_that_has_room(threshold):
    display = ScoreDistributionDisplay.from_predictions([0, 10], [5], threshold=threshold)
    display.figure_.canvas.draw()
    box, whole = display.ax_.texts[0].get_window_extent(), display.figure_.bbox
    assert whole.x0 < box.x0 < box.x1 < whole.x1


def test_constant_scores_can_be_drawn():
    display = ScoreDistributionDisplay.from_predictions(np.full(5, 3.0), np.full(5, 3.0))
    display.figure_.canvas.draw()
    heights, edges, _ = areas(display)[-1]
    assert edges[np.argmax(heights)] == pytest.approx(3, abs=0.05)


def test_draws_on_the_axes_given_and_opens_no_figure():
    figure = Figure()
    _, ax = figure.subplots(1, 2)
    display = ScoreDistributionDisplay(score_id=[1, 2], score_ood=[0, 1], score_name="log-odds")
    assert not hasattr(display, "ax_")
    assert display.plot(ax) is display
    assert display.ax_ is ax
    assert display.figure_ is figure
    assert ax.get_xlabel() == "log-odds"
    assert plt.get_fignums() == []
    assert ScoreDistributionDisplay.from_predictions([1], [0], ax=ax).ax_ is ax


# From an estimator


def test_from_a_detector():
    fitted = detector().fit(rows(3, 300))
    sets = {"small": X_OOD, "in": rows(3, 60)}
    display = ScoreDistributionDisplay.from_estimator(fitted, X_ID, sets)
    kept = [100 * np.mean(fitted.predict(X) == 1) for X in (X_ID, *sets.values())]
    assert labels(display) == [
        [name, f"{k:.1f} % kept"] for name, k in zip(["ID", *sets], kept, strict=True)
    ]
    assert threshold_of(display) == fitted.offset_
    assert display.ax_.get_xlabel() == "negative energy"
    assert np.array_equal(display.score_id, fitted.score_samples(X_ID))


@pytest.mark.parametrize(
    ("score_function", "label"),
    [(Energy(temperature=2), "negative energy"), ("msp", "score (msp)"), (MaxLogit(), "score")],
)
def test_axis_names_the_score(score_function, label):
    fitted = detector(score_function).fit(rows(3, 300))
    display = ScoreDistributionDisplay.from_estimator(fitted, X_ID, X_OOD)
    assert display.ax_.get_xlabel() == label


def test_from_a_pipeline_and_a_search():
    pipeline = make_pipeline(StandardScaler(), detector()).fit(rows(3, 300))
    search = GridSearchCV(pipeline, {"sparseenergyooddetector__tpr": [0.8]}, cv=2)
    search.fit(rows(3, 300))
    for estimator, best in ((pipeline, pipeline), (search, search.best_estimator_)):
        display = ScoreDistributionDisplay.from_estimator(estimator, X_ID, X_OOD)
        assert np.array_equal(display.score_ood["OOD"], best.score_samples(X_OOD))
        assert threshold_of(display) == best[-1].offset_
        assert display.ax_.get_xlabel() == "negative energy"


def test_from_estimators_of_scikit_learn():
    forest = IsolationForest(n_estimators=5, contamination=0.1, random_state=0).fit(X_ID)
    display = ScoreDistributionDisplay.from_estimator(forest, X_ID, X_OOD)
    assert threshold_of(display) == forest.offset_
    assert display.ax_.get_xlabel() == "score"
    display = ScoreDistributionDisplay.from_estimator(KernelDensity().fit(X_ID), X_ID, X_OOD)
    assert labels(display) == [["ID"], ["OOD"]]
