from __future__ import annotations

import numpy as np
import pytest
from pictures import X_ID, X_OOD, detector, legend, normal, rows
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood.plotting import DetectionRocDisplay


def curves(display):
    return [line for line in display.ax_.lines if ": AUROC" in line.get_label()]


def operating_points(display):
    """Markers apart from the curves, as (x, y)."""
    drawn = [line for line in display.ax_.lines if line.get_linestyle() == "None"]
    return [tuple(np.ravel(line.get_data())) for line in drawn]


def kept_line(display):
    (line,) = [line for line in display.ax_.lines if line.get_label().startswith("threshold")]
    return line.get_ydata()[0]


def test_curves_give_the_share_kept_of_id_over_that_of_ood_with_ties_together():
    # By hand: as the threshold falls to 4, 3, 2, 1 and 0, ID keeps 1, 2, 3, 4 and 4 of 4 rows,
    # the set 0, 1, 1, 2 and 4 of 4.
    display = DetectionRocDisplay.from_predictions(
        [4, 3, 2, 1], {"near": [3, 1, 0, 0], "tied": [2, 2]}, threshold=2
    )
    near, tied = curves(display)
    np.testing.assert_allclose(
        near.get_xydata(), [[0, 0], [0, 0.25], [0.25, 0.5], [0.25, 0.75], [0.5, 1], [1, 1]]
    )
    np.testing.assert_allclose(tied.get_xydata(), [[0, 0], [0, 0.25], [0, 0.5], [1, 0.75], [1, 1]])
    assert operating_points(display) == [(0.25, 0.75), (1, 0.75)]
    assert kept_line(display) == 0.75
    # Pairs in order, a tie counting one half: 13 of 16, 5 of 8.
    assert legend(display) == [
        "near: AUROC 0.812",
        "tied: AUROC 0.625",
        "threshold 2",
        "chance",
    ]
    assert display.ax_.get_xlabel() == "share of OOD rows kept (FPR)"
    assert display.ax_.get_ylabel() == "share of ID rows kept (TPR)"


def test_without_a_threshold_there_is_no_operating_point():
    display = DetectionRocDisplay.from_predictions([1, 2], [0, 1])
    assert legend(display) == ["OOD: AUROC 0.875", "chance"]
    assert operating_points(display) == []
    assert display.threshold is None


@pytest.mark.parametrize(("threshold", "point"), [(9, (0, 0)), (-9, (1, 1)), (2.5, (0, 0.5))])
def test_a_threshold_between_or_beyond_the_scores_is_on_the_curve(threshold, point):
    display = DetectionRocDisplay.from_predictions([4, 3, 2, 1], [1.5, 0], threshold=threshold)
    assert operating_points(display) == [point]
    (curve,) = curves(display)
    assert point in map(tuple, curve.get_xydata())


def test_curves_are_those_of_scikit_learn():
    score_id, score_ood = normal(1, 300, 0).round(1), normal(0, 200, 1).round(1)
    (curve,) = curves(DetectionRocDisplay.from_predictions(score_id, score_ood))
    is_id = np.repeat([1, 0], [300, 200])
    scores = np.concatenate([score_id, score_ood])
    fpr, tpr, _ = roc_curve(is_id, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.get_data(), [fpr, tpr])
    assert curve.get_label() == f"OOD: AUROC {roc_auc_score(is_id, scores):.3f}"


def test_curves_of_many_rows_are_drawn_through_few_points_of_them():
    score_id, score_ood = normal(2, 30_000, 0), normal(0, 20_000, 1)
    (curve,) = curves(DetectionRocDisplay.from_predictions(score_id, score_ood))
    fpr, tpr = curve.get_data()
    assert len(fpr) <= 2000
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.diff(fpr + tpr).max() < 0.0011
    every_fpr, every_tpr, _ = roc_curve(
        np.repeat([1, 0], [30_000, 20_000]),
        np.concatenate([score_id, score_ood]),
        drop_intermediate=False,
    )
    assert set(zip(fpr, tpr, strict=True)) <= set(zip(every_fpr, every_tpr, strict=True))


def test_sets_and_their_operating_points_differ_in_grey():
    ood = {f"set {i}": normal(i / 3, 50, i) for i in range(6)}
    display = DetectionRocDisplay.from_predictions(normal(2, 50, 9), ood, threshold=1)
    lines = curves(display)
    in_grey = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}
    assert len({line.get_color() for line in lines}) == len(in_grey) == 6
    marked = [line for line in display.ax_.lines if line.get_linestyle() == "None"]
    assert [point.get_marker() for point in marked] == [line.get_marker() for line in lines]
    assert {point.get_markerfacecolor() for point in marked} == {"black"}
    assert {line.get_markerfacecolor() for line in lines} == {"white"}
    display.figure_.canvas.draw()


def test_from_a_detector_a_pipeline_and_a_search():
    fitted = detector().fit(rows(3, 300))
    pipeline = make_pipeline(StandardScaler(), detector()).fit(rows(3, 300))
    search = GridSearchCV(pipeline, {"sparseenergyooddetector__tpr": [0.8]}, cv=2)
    search.fit(rows(3, 300))
    for estimator, offset in (
        (fitted, fitted.offset_),
        (pipeline, pipeline[-1].offset_),
        (search, search.best_estimator_[-1].offset_),
    ):
        display = DetectionRocDisplay.from_estimator(estimator, X_ID, {"small": X_OOD})
        kept = [np.mean(estimator.predict(X) == 1) for X in (X_OOD, X_ID)]
        assert operating_points(display) == [pytest.approx(kept)]
        assert kept_line(display) == kept[1]
        assert display.threshold == offset
        auroc = roc_auc_score(
            np.repeat([1, 0], [len(X_ID), len(X_OOD)]),
            estimator.score_samples(np.concatenate([X_ID, X_OOD])),
        )
        assert legend(display)[0] == f"small: AUROC {auroc:.3f}"


def test_from_estimators_of_scikit_learn():
    forest = IsolationForest(n_estimators=5, contamination=0.1, random_state=0).fit(X_ID)
    assert DetectionRocDisplay.from_estimator(forest, X_ID, X_OOD).threshold == forest.offset_
    density = DetectionRocDisplay.from_estimator(KernelDensity().fit(X_ID), X_ID, X_OOD)
    assert density.threshold is None
