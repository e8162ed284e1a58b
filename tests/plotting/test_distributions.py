from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pictures import X_ID, X_OOD, detector, legend, normal, rows
from sklearn.ensemble import IsolationForest
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood.plotting import ScoreDistributionDisplay
from skood.scores import Energy, MaxLogit

# Okabe & Ito (2008), red, green and blue in 0..255.
OKABE_ITO = {
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 0),
}


def curves(display):
    """The lines of the OOD sets, without that of the threshold."""
    return [line for line in display.ax_.lines if line.get_xdata()[0] != line.get_xdata()[-1]]


def threshold_of(display):
    (line,) = [line for line in display.ax_.lines if line not in curves(display)]
    return line.get_xdata()[0]


# What is drawn


def test_legend_gives_the_share_of_each_set_at_or_above_the_threshold():
    display = ScoreDistributionDisplay.from_predictions(
        [4, 3, 2, 1], {"near": [3.0, 2.0, 0.0], "far": np.zeros(5)}, threshold=2
    )
    assert legend(display) == [
        "ID: 75.0 % kept",
        "near: 66.7 % kept",
        "far: 0.0 % kept",
        "threshold 2",
    ]
    assert threshold_of(display) == 2


def test_without_a_threshold_there_is_no_share_and_no_line():
    display = ScoreDistributionDisplay.from_predictions([1, 2], [0, 1])
    assert legend(display) == ["ID", "OOD"]
    assert display.ax_.lines[:] == curves(display)
    assert display.threshold is None


def test_areas_are_densities_over_common_bins():
    ood = {"few": normal(-3, 50, 1), "many": normal(2, 4000, 2)}
    score_id = normal(4, 1000, 0)
    display = ScoreDistributionDisplay.from_predictions(score_id, ood)
    heights, edges, _ = display.ax_.patches[0].get_data()
    everything = np.concatenate([score_id, *ood.values()])
    assert edges[0] == everything.min()
    assert edges[-1] == everything.max()
    np.testing.assert_allclose(heights @ np.diff(edges), 1)
    for line, scores in zip(curves(display), ood.values(), strict=True):
        x, y = line.get_data()
        np.testing.assert_allclose(y.sum() * (x[1] - x[0]), 1)
        assert y[0] == y[-1] == 0
        # Each point counts the scores within half a bin of it.
        half = (edges[1] - edges[0]) / 2
        counts = [np.sum((scores >= at - half) & (scores < at + half)) for at in x]
        counts[-2] += np.sum(scores == edges[-1])
        np.testing.assert_allclose(y * len(scores) * 2 * half, counts, atol=1e-9)


def test_heights_do_not_depend_on_the_number_of_rows():
    scores = normal(0, 100, 0)
    display = ScoreDistributionDisplay.from_predictions(
        scores + 1, {"once": scores, "tenfold": np.tile(scores, 10)}
    )
    once, tenfold = curves(display)
    np.testing.assert_allclose(once.get_data(), tenfold.get_data())


def test_sets_differ_in_grey_and_in_colours_made_for_the_colour_blind():
    ood = {f"set {i}": normal(i, 50, i) for i in range(30)}
    display = ScoreDistributionDisplay.from_predictions(normal(9, 50, 0), ood)
    palette = {to_hex(np.divide(colour, 255)) for colour in OKABE_ITO}
    lines = curves(display)
    assert {to_hex(line.get_color()) for line in lines} <= palette
    assert len({to_hex(line.get_color()) for line in lines[:6]}) == 6
    # The dashes: matplotlib tells them by no public name.
    in_grey = [(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines]
    assert len({dashes for dashes, _ in in_grey[:6]}) == 6
    assert len({marker for _, marker in in_grey[:6]}) == 6
    assert len(set(in_grey)) == 30
    (area,) = display.ax_.patches
    assert area.get_fill()
    assert len(set(area.get_facecolor()[:3])) == 1


def test_constant_scores_can_be_drawn():
    display = ScoreDistributionDisplay.from_predictions(np.full(5, 3.0), np.full(5, 3.0))
    display.figure_.canvas.draw()
    x, y = curves(display)[0].get_data()
    assert x[np.argmax(y)] == pytest.approx(3, abs=0.05)


def test_draws_on_the_axes_given_and_opens_no_figure():
    figure = Figure()
    _, ax = figure.subplots(1, 2)
    display = ScoreDistributionDisplay(score_id=[1, 2], score_ood=[0, 1], score_name="log-odds")
    assert not hasattr(display, "ax_")
    assert display.plot(ax) is display
    assert display.ax_ is ax
    assert display.figure_ is figure
    assert ax.get_xlabel() == "log-odds"
    assert ax.get_ylabel() == "density"
    assert plt.get_fignums() == []
    assert ScoreDistributionDisplay.from_predictions([1], [0], ax=ax).ax_ is ax


# From an estimator


def test_from_a_detector():
    fitted = detector().fit(rows(3, 300))
    sets = {"small": X_OOD, "in": rows(3, 60)}
    display = ScoreDistributionDisplay.from_estimator(fitted, X_ID, sets)
    kept = [100 * np.mean(fitted.predict(X) == 1) for X in (X_ID, *sets.values())]
    assert legend(display) == [
        *[f"{name}: {k:.1f} % kept" for name, k in zip(["ID", *sets], kept, strict=True)],
        f"threshold {fitted.offset_:.4g}",
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
    assert legend(display) == ["ID", "OOD"]
