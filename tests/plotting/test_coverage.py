from __future__ import annotations

import numpy as np
import pytest
from pictures import legend
from scipy.stats import binomtest
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.metrics import aurc, risk_coverage_curve
from skood.plotting import ClassCoverageDisplay, RiskCoverageDisplay

CORRECT = [True, True, False, True]


def curves(display):
    return [line for line in display.ax_.lines if line.get_linestyle() != "None"]


def operating_points(display):
    drawn = [line for line in display.ax_.lines if line.get_linestyle() == "None"]
    return [tuple(np.ravel(line.get_data())) for line in drawn]


# Risk against coverage


def test_the_curve_gives_the_share_of_wrong_rows_among_those_kept():
    display = RiskCoverageDisplay.from_predictions([4, 3, 2, 1], CORRECT, threshold=2)
    (curve,) = curves(display)
    np.testing.assert_allclose(curve.get_xydata(), [[0.25, 0], [0.5, 0], [0.75, 1 / 3], [1, 0.25]])
    assert operating_points(display) == [(0.75, pytest.approx(1 / 3))]
    # (0 + 0 + 1/3 + 1/4) / 4
    assert legend(display) == ["detector: AURC 0.146\nkept: 75.0 %, of which 33.3 % are wrong"]


@pytest.mark.parametrize("threshold", [None, 5])
def test_there_is_no_point_without_a_threshold_or_rows_that_it_keeps(threshold):
    display = RiskCoverageDisplay.from_predictions([4, 3, 2, 1], CORRECT, threshold=threshold)
    assert operating_points(display) == []
    assert legend(display) == ["detector: AURC 0.146"]


def test_curves_of_many_rows_are_drawn_through_few_points_of_them():
    random = np.random.RandomState(0)
    scores, correct = random.normal(size=30_000), random.random_sample(30_000) < 0.9
    (curve,) = curves(RiskCoverageDisplay.from_predictions(scores, correct))
    coverage, risk = risk_coverage_curve(scores, correct)
    drawn = curve.get_xydata()
    assert len(drawn) <= 2000
    assert (drawn[-1] == (1, risk[-1])).all()
    assert set(map(tuple, drawn)) <= set(zip(coverage, risk, strict=True))


def test_several_detectors_differ_in_grey_and_keep_their_points():
    correct = {"a": CORRECT, "b": [True, False, False, True]}
    display = RiskCoverageDisplay.from_predictions(
        {"b": [1, 2, 3, 4], "a": [4, 3, 2, 1]}, correct, threshold=3
    )
    assert len({(line.get_marker(), line.get_linestyle()) for line in curves(display)}) == 2
    assert operating_points(display) == [(0.5, 0.5), (0.5, 0)]
    assert [text.partition(":")[0] for text in legend(display)] == ["b", "a"]


def test_from_a_detector_and_what_is_around_it(fitted, digits):
    y = np.where(digits.y_test == 0, -1, digits.y_test)  # outliers, for which no class is right
    display = RiskCoverageDisplay.from_estimator(fitted, digits.X_test, y)
    kept = fitted.predict(digits.X_test) == 1
    wrong = fitted.predict_class(digits.X_test) != y
    assert operating_points(display) == [(kept.mean(), pytest.approx(wrong[kept].mean()))]
    area = aurc(fitted.score_samples(digits.X_test), ~wrong)
    assert legend(display)[0].startswith(f"detector: AURC {area:.3g}\n")
    frozen = FrozenEstimator(fitted)
    around = {
        "pipeline": make_pipeline(FunctionTransformer(), frozen),
        "rejecting": RejectingClassifier(frozen).fit(digits.X, digits.y),
    }
    both = RiskCoverageDisplay.from_estimator(around, digits.X_test, y)
    assert operating_points(both) == 2 * operating_points(display)


def test_thresholds_of_classes_are_those_of_the_detector(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, tpr=0.8, random_state=0)
    detector.fit(digits.X, digits.y).calibrate(digits.X_fresh, per_class=True)
    display = RiskCoverageDisplay.from_estimator(detector, digits.X_test, digits.y_test)
    ((coverage, _),) = operating_points(display)
    assert coverage == np.mean(detector.predict(digits.X_test) == 1)
    by_class = ClassCoverageDisplay.from_estimator(detector, digits.X_test, digits.y_test)
    of_zeros = detector.predict(digits.X_test)[digits.y_test == 0] == 1
    assert by_class.shares[0] == of_zeros.mean()
    assert by_class.target == 0.8


# Share kept of each class


def test_shares_of_classes_have_exact_intervals_and_the_lowest_is_at_the_top():
    y = np.repeat(["cat", "dog", "eel"], [10, 20, 40])
    kept = np.concatenate([np.arange(10) < 9, np.arange(20) < 9, np.arange(40) < 40])
    display = ClassCoverageDisplay.from_predictions(y, kept, target=0.9)
    assert display.shares == {"cat": 0.9, "dog": 0.45, "eel": 1.0}
    for label, (hits, n_rows) in {"cat": (9, 10), "dog": (9, 20), "eel": (40, 40)}.items():
        expected = binomtest(hits, n_rows).proportion_ci(method="exact")
        assert display.intervals[label] == pytest.approx(tuple(expected))
    ax = display.ax_
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "dog (20)",
        "cat (10)",
        "eel (40)",
    ]
    assert ax.get_ylim() == (2.5, -0.5)
    below, others = ax.containers
    assert below.lines[0].get_xydata().tolist() == [[0.45, 0]]
    assert others.lines[0].get_xydata().tolist() == [[0.9, 1], [1.0, 2]]
    assert others.lines[0].get_markerfacecolor() == "white"
    of_cat = others.lines[2][0].get_segments()[0]
    assert tuple(of_cat[:, 0]) == pytest.approx(display.intervals["cat"])
    assert legend(display) == ["target 90 %", "95 % interval below it"]
    assert ax.lines[-1].get_xdata() == [0.9, 0.9]


def test_of_many_classes_the_lowest_are_drawn():
    y = np.repeat(np.arange(100), 4)
    kept = np.tile([True, True, True, False], 100)
    kept[y == 77] = False
    display = ClassCoverageDisplay.from_predictions(y, kept)
    labels = [text.get_text() for text in display.ax_.get_yticklabels()]
    assert len(labels) == 40
    assert labels[0] == "77 (4)"
    assert display.ax_.get_ylabel() == "true class (rows), 40 of 100"
    assert len(display.shares) == 100


def test_rows_of_no_class_are_left_out(fitted, digits):
    y = np.where(digits.y_test == 0, -1, digits.y_test)
    display = ClassCoverageDisplay.from_estimator(fitted, digits.X_test, y)
    assert list(display.shares) == list(range(1, 10))
    assert display.target == 0.95


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [True]), ValueError, r"correct\['detector'\] has 1 values for 2 rows; pass one"),
        (([1, 2], [0.5, 1]), ValueError, r"correct\['detector'\] holds values such as 0.5"),
        (([np.inf, 2], [0, 1]), ValueError, r"scores\['detector'\] has 1 NaN or infinite"),
        (({}, {}), ValueError, "scores is an empty dict; expected at least one detector"),
        (
            ({"a": [1]}, [True]),
            ValueError,
            r"names \['a'\], correct \['detector'\]; expected the s",
        ),
    ],
)
def test_refuses_scores_without_their_answers(arguments, error, message):
    with pytest.raises(error, match=message):
        RiskCoverageDisplay.from_predictions(*arguments)


@pytest.mark.parametrize("display", [RiskCoverageDisplay, ClassCoverageDisplay])
def test_refuses_labels_of_no_class_before_anything_is_computed(display, fitted, digits):
    with pytest.raises(ValueError, match=r"y holds the labels .*'a'.*, which are none of"):
        display.from_estimator(fitted, digits.X_test, np.full(len(digits.X_test), "a"))
    with pytest.raises(TypeError, match=r"estimator=FunctionTransformer.* holds no detector"):
        display.from_estimator(FunctionTransformer(), digits.X_test, digits.y_test)


def test_refuses_what_is_no_label():
    with pytest.raises(ValueError, match="y_true does not hold labels"):
        ClassCoverageDisplay.from_predictions([0.5, 1], [True, True])
