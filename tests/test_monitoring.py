from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.exceptions import SeenRowsWarning, ThresholdWarning
from skood.monitoring import DriftMonitor

X, Y = load_digits(return_X_y=True)
ORDER = np.random.RandomState(0).permutation(len(X))
X, Y = (X[ORDER] / 16).astype(np.float32), Y[ORDER]
KNOWN = Y < 8
TRAIN, FRESH, LATER = (X[KNOWN][rows] for rows in (slice(700), slice(700, 1000), slice(1000, None)))
NEW_CLASSES = X[~KNOWN]


def blurred(rows):
    images = rows.reshape(-1, 8, 8)
    return ((np.roll(images, 1, axis=2) + images) / 2).reshape(rows.shape)


CHANGES = {
    "blur": blurred(LATER),
    "darker": 0.6 * LATER,
    "new classes": NEW_CLASSES,
    "another scale": 3 * LATER,
}


@pytest.fixture(scope="module")
def detector():
    fitted = SparseEnergyOODDetector(random_state=0, max_epochs=2)
    return fitted.fit(TRAIN, Y[KNOWN][:700]).calibrate(FRESH)


@pytest.fixture
def own(detector):
    """A detector that a test may calibrate."""
    return copy.copy(detector)


def saved(monitor):
    return json.loads(json.dumps(monitor.get_state()))


# A stream


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_raises_an_alarm_and_rows_like_the_calibration_rows_none(detector, change):
    monitor = DriftMonitor(detector, random_state=0)
    assert not monitor.update(LATER[:200])
    assert not monitor.alarm
    assert monitor.update(CHANGES[change])
    report = monitor.report()
    assert 200 <= report.alarm_row < 400
    assert abs(report.change_row - 200) < 60
    assert report.change_row <= report.alarm_row
    assert report.martingale > report.alarm_line == 100
    assert "scores are lower" in report.window.verdict


def test_the_report_counts_what_is_rejected_since_the_change(detector):
    monitor = DriftMonitor(detector, random_state=0, window=100)
    rows = np.concatenate([LATER[:200], NEW_CLASSES])
    monitor.update(rows)
    report = monitor.report()
    rejected = detector.predict(rows) == -1
    assert report.share_since == pytest.approx(rejected[report.change_row :].mean())
    assert report.window == detector.check_batch(rows[-100:])
    assert report.n_rows == len(rows)
    assert f"ALARM at row {report.alarm_row}" in str(report)


def test_an_alarm_stays_and_a_new_monitor_has_none(detector):
    monitor = DriftMonitor(detector, random_state=0)
    monitor.update(NEW_CLASSES)
    row = monitor.report().alarm_row
    assert monitor.update(LATER)
    assert monitor.report().alarm_row == row
    assert not DriftMonitor(detector, random_state=0).alarm


def test_batches_and_single_rows_leave_the_same_state(detector):
    rows = np.concatenate([LATER[:70], CHANGES["darker"][:80]])
    whole, single = (DriftMonitor(detector, random_state=1, window=50) for _ in range(2))
    scores = detector.score_samples(rows)
    with pytest.MonkeyPatch.context() as patch:  # whose rounding depends on the batch
        patch.setattr(detector, "score_samples", lambda X: scores[X[:, 0].astype(int)])
        numbers = np.arange(len(rows))[:, None]
        whole.update(numbers)
        for row in numbers:
            single.update(row[None])
    assert saved(whole) == saved(single)
    assert len(whole.history) == 30


def test_a_monitor_goes_on_from_its_state_exactly(detector):
    monitor = DriftMonitor(detector, window=40, false_alarm=0.2)
    monitor.update(LATER[:99])
    state = saved(monitor)
    resumed = DriftMonitor.from_state(detector, state)
    travelled = pickle.loads(pickle.dumps(monitor))
    assert saved(resumed) == state
    for each in (monitor, resumed, travelled):
        each.update(CHANGES["darker"])
    assert saved(monitor) == saved(resumed) == saved(travelled)
    assert resumed.report() == monitor.report()
    assert resumed.false_alarm == 0.2


def test_the_state_does_not_grow_with_the_stream(detector, monkeypatch):
    monkeypatch.setattr("skood.monitoring.POINTS", 20)
    monitor = DriftMonitor(detector, window=40, random_state=0)

    def numbers():
        return sum(np.size(value) for value in monitor.get_state().values())

    monitor.update(LATER)
    before = numbers()
    monitor.update(np.concatenate([LATER, LATER]))
    assert abs(numbers() - before) <= 4 * 10
    assert 9 <= len(monitor.history) < 20
    np.testing.assert_array_equal(np.diff(monitor.history[:, 0]), monitor.rows_a_point)


def test_a_seed_repeats_what_is_drawn(detector):
    states = []
    for seed in (0, 0, 1):
        monitor = DriftMonitor(detector, random_state=seed)
        monitor.update(LATER[:50])
        states.append(saved(monitor))
    assert states[0] == states[1] != states[2]


# Around a detector


def test_it_watches_what_is_built_around_a_detector(detector):
    double = FunctionTransformer(lambda rows: 2 * rows).fit(LATER)
    pipeline = make_pipeline(double, FrozenEstimator(detector)).fit(LATER)
    expected = DriftMonitor(detector, random_state=0)
    expected.update(LATER)
    classifier = RejectingClassifier(FrozenEstimator(detector)).fit(LATER, Y[KNOWN][1000:])
    for estimator, rows in (
        (FrozenEstimator(detector), LATER),
        (pipeline, LATER / 2),
        (classifier, LATER),
        (make_pipeline(double, FrozenEstimator(classifier)), LATER / 2),
    ):
        monitor = DriftMonitor(estimator, random_state=0)
        monitor.update(rows)
        assert saved(monitor) == saved(expected)


def test_what_holds_no_fitted_detector_is_refused(detector):
    for wrong in (IsolationForest().fit(LATER), make_pipeline(IsolationForest()), 3, None):
        with pytest.raises(TypeError, match="holds no detector"):
            DriftMonitor(wrong)
        with pytest.raises(TypeError, match="holds no detector"):
            DriftMonitor.from_state(wrong, DriftMonitor(detector).get_state())
    search = GridSearchCV(SparseEnergyOODDetector(), {"tpr": [0.9]})
    with pytest.raises(TypeError, match="fitted"):
        DriftMonitor(search)
    for unfitted in (
        SparseEnergyOODDetector(),
        make_pipeline(SparseEnergyOODDetector()),
        RejectingClassifier(SparseEnergyOODDetector()),
    ):
        with pytest.raises(NotFittedError):
            DriftMonitor(unfitted)


# Bad input


def test_rows_that_are_refused_leave_the_monitor_as_it_was(detector):
    monitor = DriftMonitor(detector, random_state=0)
    monitor.update(LATER[:30])
    before = saved(monitor)
    for wrong in (LATER[:0], LATER[:3, :5], np.full_like(LATER[:2], np.nan), LATER[0], "rows"):
        with pytest.raises((TypeError, ValueError)):
            monitor.update(wrong)
        assert saved(monitor) == before


def test_a_monitor_refuses_to_go_on_after_another_calibration(own):
    monitor = DriftMonitor(own, random_state=0)
    monitor.update(LATER[:30])
    state = saved(monitor)
    own.calibrate(FRESH)  # the same: nothing has changed
    monitor.update(LATER[30:40])
    for calibrate in (lambda: own.calibrate(LATER), lambda: own.calibrate(FRESH, tpr=0.9)):
        calibrate()
        for use in (monitor.report, lambda: monitor.update(LATER)):
            with pytest.raises(ValueError, match="fitted or calibrated after this monitor"):
                use()
        with pytest.raises(ValueError, match="another calibration"):
            DriftMonitor.from_state(own, state)
    assert monitor.n_rows == 40


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: state | {"version": 0},
        lambda state: state | {"more": 1},
        lambda state: state | {"window": "many"},
        lambda state: state | {"seed": "x"},
        lambda state: state | {"OnlinePValues.weights": [1.0]},
        lambda state: state | {"OnlinePValues.n_rows": 7},
        lambda state: state | {"Martingale.shares": [float("nan")] * 10},
        lambda state: state | {"ChangePoint.sums": ["a"] * 9},
        lambda state: state | {"DriftMonitor.stride": 0},
        lambda state: state | {"DriftMonitor.recent": {}},
        lambda state: state | {"DriftMonitor.recent": 1.0},
        lambda state: state | {"DriftMonitor.recent": []},
        lambda state: state | {"DriftMonitor.recent_rejected": True},
        lambda state: state | {"DriftMonitor.alarm": -1},
        lambda state: state | {"DriftMonitor.n_same": -1},
        lambda state: state | {"Martingale.log_capital": None},
        lambda state: state | {"Martingale.log_capital": float("inf")},
        lambda state: state | {"ChangePoint.n_rejected": -1},
        lambda state: list(state),
    ],
)
def test_what_is_no_state_is_refused(detector, damage):
    monitor = DriftMonitor(detector, random_state=0)
    monitor.update(LATER[:30])
    with pytest.raises(ValueError, match="no state of a DriftMonitor"):
        DriftMonitor.from_state(detector, damage(saved(monitor)))


def test_a_doubtful_threshold_is_told(detector):
    doubted = SparseEnergyOODDetector(
        random_state=0, pretrain_epochs=1, max_epochs=0, calibration_size=None
    )
    doubted.fit(TRAIN, Y[KNOWN][:700])
    with pytest.warns(ThresholdWarning, match="training rows"):
        DriftMonitor(copy.deepcopy(doubted))
    with pytest.warns(ThresholdWarning, match="training rows"):
        doubted.check_batch(LATER)


def test_the_calibration_rows_themselves_are_told(detector):
    with pytest.warns(SeenRowsWarning, match="300 of 300 rows score exactly"):
        check = detector.check_batch(FRESH)
    assert not check.differs
    monitor = DriftMonitor(detector, random_state=0)
    with pytest.warns(SeenRowsWarning):
        monitor.update(FRESH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.update(FRESH)
        detector.check_batch(LATER)
        # Half of the scores are the same: they tell nothing about rows.
        constant = SparseEnergyOODDetector(
            score_function=lambda h, z: z.max(dim=1).values.clip(max=1) * 0 + (z[:, 0] > 0),
            pretrain_epochs=1,
            max_epochs=0,
            random_state=0,
        )
    constant.fit(TRAIN, Y[KNOWN][:700])
    with pytest.warns(ThresholdWarning) as caught:
        constant.check_batch(LATER)
    assert SeenRowsWarning not in [w.category for w in caught]


@pytest.mark.parametrize(
    "parameters",
    [{"false_alarm": 0}, {"false_alarm": 1}, {"window": 1}, {"window": 2.5}, {"random_state": "x"}],
)
def test_parameters_out_of_range_are_refused(detector, parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        DriftMonitor(detector, **parameters)


# A batch


def test_a_batch_like_the_calibration_rows_is_called_so(detector):
    check = detector.check_batch(LATER)
    assert not check.differs
    assert check.share_rejected == np.mean(detector.predict(LATER) == -1)
    assert check.interval[0] <= check.share_rejected <= check.interval[1]
    assert check.expected_share == pytest.approx(15 / 301)
    assert check.expected_interval[0] < 0.05 < check.expected_interval[1]
    assert check.verdict == f"like the calibration rows, as far as {len(LATER)} rows tell"
    assert check.p_value == min(1, 2 * min(check.scores_p_value, check.share_p_value))


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_that_has_changed_is_called_so(detector, change):
    check = detector.check_batch(CHANGES[change])
    assert check.differs
    assert check.p_value < 1e-4
    assert "scores are lower" in check.verdict


def test_rows_seen_in_training_are_called_so(detector):
    check = detector.check_batch(TRAIN)
    assert check.differs
    assert "scores are higher, as of rows seen in training" in check.verdict


def test_a_change_that_the_share_rejected_does_not_show_is_seen(own):
    own.calibrate(FRESH, tpr=0.99)
    check = own.check_batch(CHANGES["darker"])
    assert check.share_p_value > 0.01
    assert check.scores_p_value < 1e-4


def test_scores_that_are_only_spread_differently_or_too_often_low_are_named(detector):
    check = detector.check_batch(LATER)
    spread = dataclasses.replace(check, chance_lower=0.5, scores_p_value=1e-9, share_p_value=0.5)
    assert spread.verdict == "unlike the calibration rows: scores are spread differently"
    more = dataclasses.replace(check, share_rejected=0.2, scores_p_value=0.5, share_p_value=1e-9)
    assert more.verdict == "unlike the calibration rows: more rows are rejected than expected"
    fewer = dataclasses.replace(more, share_rejected=0.0)
    assert fewer.verdict == "unlike the calibration rows: fewer rows are rejected than expected"


def test_a_check_reads_as_a_text(detector):
    lines = str(detector.check_batch(LATER[:100])).splitlines()
    assert lines[0] == "100 rows against 300 calibration rows"
    assert lines[-1].startswith("verdict: like the calibration rows, as far as 100 rows tell (p = ")
    assert max(map(len, lines)) <= 120
    assert repr(detector.check_batch(LATER[:1])).startswith("1 rows against")


def test_a_batch_is_checked_like_rows_that_are_scored(detector):
    with pytest.raises(ValueError, match="false_alarm"):
        detector.check_batch(LATER, false_alarm=2)
    for wrong in (LATER[:0], LATER[:, :3], np.full_like(LATER, np.nan)):
        with pytest.raises(ValueError, match=r"sample|features|NaN"):
            detector.check_batch(wrong)
    with pytest.raises(NotFittedError):
        SparseEnergyOODDetector().check_batch(LATER)


# Outliers of a batch


def test_selected_outliers_are_those_of_benjamini_and_hochberg(detector):
    rows = np.concatenate([LATER, NEW_CLASSES])
    p_values = np.sort(detector.p_values(rows))
    passed = np.flatnonzero(p_values <= 0.2 * np.arange(1, len(rows) + 1) / len(rows))
    selected = detector.select_outliers(rows, fdr=0.2)
    assert passed.size
    np.testing.assert_array_equal(selected, detector.p_values(rows) <= p_values[passed[-1]])
    assert np.mean(selected[len(LATER) :]) > np.mean(selected[: len(LATER)])


def test_the_share_of_false_selections_is_at_most_the_chosen(own):
    """New draws of calibration and test rows, and of outliers, at each repetition."""
    rng = np.random.RandomState(0)
    inliers = own.score_samples(np.concatenate([FRESH, LATER]))
    outliers = own.score_samples(np.zeros((1, 64), dtype=np.float32)) - 50 + rng.rand(40)
    shares, found = [], []
    for _ in range(200):
        drawn = rng.permutation(inliers)
        own.calibration_scores_ = drawn[:250]
        batch = np.concatenate([drawn[250:350], outliers[:20]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own, "score_samples", lambda X, batch=batch: batch)
            selected = own.select_outliers(None, fdr=0.2)
        shares.append(selected[:100].sum() / max(selected.sum(), 1))
        found.append(selected[100:].mean())
    assert np.mean(found) == 1
    # Benjamini and Hochberg lose the share of inliers: 0.2 * 100 / 120.
    assert np.mean(shares) < 0.2
    assert np.mean(shares) == pytest.approx(0.2 * 100 / 120, abs=3 * np.std(shares) / 200**0.5)


def test_rejections_are_those_of_the_thresholds_of_classes(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, tpr=0.8, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y)
    detector.calibrate(digits.X_fresh, per_class=True)
    rejected = detector.predict(digits.X_test) == -1
    check = detector.check_batch(digits.X_test)
    assert check.share_rejected == rejected.mean()
    assert abs(check.expected_share - 0.2) < 0.03
    assert not check.differs
    monitor = DriftMonitor(detector, random_state=0)
    monitor.update(digits.X_test)
    assert monitor.report().window.share_rejected == rejected.mean()
    again = DriftMonitor.from_state(detector, json.loads(json.dumps(monitor.get_state())))
    assert again.report() == monitor.report()
    detector.calibrate(digits.X_fresh)
    with pytest.raises(ValueError, match="fitted or calibrated after this monitor"):
        monitor.update(digits.X_test)
