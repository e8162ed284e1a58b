from __future__ import annotations

import sys
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.utils import check_random_state

from skood import metrics
from skood.metrics import (
    aupr,
    aurc,
    auroc,
    detection_error,
    detection_report,
    fpr_at_tpr,
    risk_coverage_curve,
)

METRICS = [fpr_at_tpr, auroc, aupr, detection_error]
POSITIVES = ["id", "ood"]


def tied_scores(seed):
    """Small integer scores, of 1 to 12 rows a class, most of them tied."""
    rng = np.random.RandomState(seed)
    n_id, n_ood = rng.randint(1, 13, size=2)
    return rng.randint(2, 7, size=n_id), rng.randint(0, 6, size=n_ood)


def operating_points(score_id, score_ood, positive):
    """(TPR, FPR, precision) as fractions at every observed score, the strictest first."""
    points = []
    for threshold in sorted({*score_id, *score_ood}, reverse=positive == "id"):
        if positive == "id":
            tp = sum(1 for score in score_id if score >= threshold)
            fp = sum(1 for score in score_ood if score >= threshold)
            n_positive, n_negative = len(score_id), len(score_ood)
        else:
            tp = sum(1 for score in score_ood if score <= threshold)
            fp = sum(1 for score in score_id if score <= threshold)
            n_positive, n_negative = len(score_ood), len(score_id)
        points.append((Fraction(tp, n_positive), Fraction(fp, n_negative), Fraction(tp, tp + fp)))
    return points


# Against brute force over all thresholds


@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("tpr", ["0.05", "0.5", "0.75", "0.8", "0.95", "1"])
def test_fpr_at_least_is_that_of_the_strictest_threshold_reaching_tpr(tpr, positive):
    for seed in range(100):
        scores = tied_scores(seed)
        points = operating_points(*scores, positive)
        expected = next(fpr for reached, fpr, _ in points if reached >= Fraction(tpr))
        assert fpr_at_tpr(*scores, float(tpr), positive=positive) == float(expected)


@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.75, 0.8, 0.95, 1.0])
def test_fpr_nearest_follows_its_definition(tpr, positive):
    for seed in range(100):
        scores = tied_scores(seed)
        candidates = []
        for reached, fpr, _ in operating_points(*scores, positive):
            candidates.append((float(reached), float(fpr)))
            if reached == 1:
                break
        best_distance, expected = np.inf, None
        for reached, fpr in reversed(candidates):
            if abs(reached - tpr) < best_distance:
                best_distance, expected = abs(reached - tpr), fpr
        assert fpr_at_tpr(*scores, tpr, positive=positive, method="nearest") == expected


@pytest.mark.parametrize("positive", POSITIVES)
def test_auroc_counts_pairs_and_half_of_the_ties(positive):
    for seed in range(100):
        score_id, score_ood = tied_scores(seed)
        won = sum(2 * (a > b) + (a == b) for a in score_id for b in score_ood)
        expected = won / (2 * len(score_id) * len(score_ood))
        assert auroc(score_id, score_ood, positive=positive) == expected


@pytest.mark.parametrize("positive", POSITIVES)
def test_aupr_sums_precision_over_gains_in_recall(positive):
    for seed in range(100):
        scores = tied_scores(seed)
        expected, recall_before = Fraction(0), Fraction(0)
        for recall, _, precision in operating_points(*scores, positive):
            expected += (recall - recall_before) * precision
            recall_before = recall
        assert aupr(*scores, positive=positive) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("positive", POSITIVES)
def test_detection_error_is_the_least_over_all_thresholds(positive):
    for seed in range(100):
        scores = tied_scores(seed)
        points = operating_points(*scores, positive)
        expected = min([Fraction(1, 2), *((1 - tpr + fpr) / 2 for tpr, fpr, _ in points)])
        assert detection_error(*scores, positive=positive) == float(expected)


# Against scikit-learn


@pytest.mark.parametrize("decimals", [0, 1, 15])
def test_auroc_and_aupr_agree_with_scikit_learn(decimals):
    rng = np.random.RandomState(0)
    score_id = rng.normal(1, 1, size=3000).round(decimals)
    score_ood = rng.normal(0, 2, size=1000).round(decimals)
    is_id = np.repeat([True, False], [3000, 1000])
    score = np.concatenate((score_id, score_ood))

    assert auroc(score_id, score_ood) == pytest.approx(roc_auc_score(is_id, score), rel=1e-12)
    expected = average_precision_score(is_id, score)
    assert aupr(score_id, score_ood) == pytest.approx(expected, rel=1e-12)
    expected = average_precision_score(~is_id, -score)
    assert aupr(score_id, score_ood, positive="ood") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 15])
@pytest.mark.parametrize("positive", POSITIVES)
def test_fpr_and_detection_error_agree_with_the_curve_of_scikit_learn(positive, decimals):
    rng = np.random.RandomState(1)
    score_id = rng.normal(1, 1, size=800).round(decimals)
    score_ood = rng.normal(0, 2, size=500).round(decimals)
    is_positive = np.repeat([True, False] if positive == "id" else [False, True], [800, 500])
    score = np.concatenate((score_id, score_ood)) * (1 if positive == "id" else -1)
    fpr, tpr, _ = roc_curve(is_positive, score, drop_intermediate=False)

    assert fpr_at_tpr(score_id, score_ood, 0.95, positive=positive) == fpr[tpr >= 0.95][0]
    assert fpr_at_tpr(score_id, score_ood, 0.6, positive=positive) == fpr[tpr >= 0.6][0]
    expected = ((1 - tpr + fpr) / 2).min()
    assert detection_error(score_id, score_ood, positive=positive) == pytest.approx(expected)


# By hand


def test_metrics_by_hand():
    score_id, score_ood = [5, 4, 4, 2], [4, 3, 2, 1, 0]
    # At thresholds 5, 4, 3, 2, 1, 0: tp = 1 3 3 4 4 4 and fp = 0 1 2 3 4 5.
    assert fpr_at_tpr(score_id, score_ood, 0.75) == 1 / 5
    assert fpr_at_tpr(score_id, score_ood, 0.76) == 3 / 5
    # At thresholds 0, 1, 2, 3, 4, 5: tp = 1 2 3 4 5 5 and fp = 0 0 1 1 3 4.
    assert fpr_at_tpr(score_id, score_ood, 0.8, positive="ood") == 1 / 4
    assert fpr_at_tpr(score_id, score_ood, 0.95, positive="ood") == 3 / 4
    assert auroc(score_id, score_ood) == (5 + 4.5 + 4.5 + 2.5) / 20
    assert aupr(score_id, score_ood) == pytest.approx(1 / 4 + 2 / 4 * 3 / 4 + 1 / 4 * 4 / 7)
    expected = (1 + 1 + 3 / 4 + 4 / 5 + 5 / 8) / 5
    assert aupr(score_id, score_ood, positive="ood") == pytest.approx(expected)
    assert detection_error(score_id, score_ood) == (1 / 4 + 1 / 5) / 2


@pytest.mark.parametrize("n_rows", [1, 3, 10, 20, 100, 1000])
def test_at_least_detects_the_number_of_rows_the_decimal_says(n_rows):
    scores = np.arange(n_rows)  # as both classes: FPR is the share of ID rows detected
    for percent in range(1, 101):
        needed = -(-percent * n_rows // 100)
        assert fpr_at_tpr(scores, scores, percent / 100) == needed / n_rows
        assert fpr_at_tpr(scores, scores, 1 - (100 - percent) / 100) == needed / n_rows


def test_at_least_detects_one_row_however_low_tpr():
    assert fpr_at_tpr([1], [3, 2, 0], 1e-300) == 2 / 3


def test_at_least_never_falls_below_tpr_and_nearest_may():
    scores = np.arange(30)  # as both classes: FPR is TPR
    assert fpr_at_tpr(scores, scores, 0.94) == 29 / 30
    assert fpr_at_tpr(scores, scores, 0.94, method="nearest") == 28 / 30


def test_nearest_takes_the_higher_of_two_rates_at_equal_distance():
    assert fpr_at_tpr([4, 3, 2, 1], [3, 1], 0.625, method="nearest") == 1 / 2
    assert fpr_at_tpr([4, 2], [3, 1], 0.75, method="nearest") == 1 / 2


def test_nearest_takes_the_most_lenient_of_thresholds_with_one_rate_below_full():
    # TPR is 1/2 at the thresholds 5, 4 and 3, and 1 from the threshold 2 on.
    assert fpr_at_tpr([5, 2], [4, 3, 1, 0], 0.5, method="nearest") == 2 / 4
    assert fpr_at_tpr([5, 2], [4, 3, 1, 0], 0.5) == 0
    assert fpr_at_tpr([5, 2], [4, 3, 1, 0], 0.99, method="nearest") == 2 / 4


# Invariances and extremes


@pytest.mark.parametrize("metric", METRICS)
def test_swapping_and_negating_the_classes_swaps_the_positive_class(metric):
    for seed in range(50):
        score_id, score_ood = tied_scores(seed)
        as_id = metric(score_id, score_ood, positive="id")
        assert metric(-score_ood, -score_id, positive="ood") == as_id


@pytest.mark.parametrize("metric", [auroc, detection_error])
def test_positive_does_not_change_symmetric_metrics(metric):
    for seed in range(50):
        scores = tied_scores(seed)
        assert metric(*scores, positive="id") == metric(*scores, positive="ood")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("positive", POSITIVES)
def test_only_the_order_of_scores_matters(metric, positive):
    for seed in range(20):
        score_id, score_ood = tied_scores(seed)
        expected = metric(score_id, score_ood, positive=positive)
        shuffled = np.random.RandomState(seed).permutation(score_id)
        assert metric(shuffled, score_ood, positive=positive) == expected
        assert metric(np.exp(score_id), np.exp(score_ood), positive=positive) == expected
        ends = {min(*score_id, *score_ood): -np.inf, max(*score_id, *score_ood): np.inf}
        stretched = [[ends.get(score, score) for score in row] for row in (score_id, score_ood)]
        if len(ends) == 2:
            assert metric(*stretched, positive=positive) == expected


@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("method", ["at_least", "nearest"])
def test_extremes(positive, method):
    def values(score_id, score_ood):
        fpr = fpr_at_tpr(score_id, score_ood, positive=positive, method=method)
        return [fpr, *(metric(score_id, score_ood, positive=positive) for metric in METRICS[1:])]

    share = 3 / 5 if positive == "id" else 2 / 5
    assert values([5, 6, 7], [1, 2]) == [0, 1, 1, 0]
    assert values([1, 1, 1], [1, 1]) == [1, 0.5, share, 0.5]
    assert values([np.inf] * 3, [-np.inf] * 2) == [0, 1, 1, 0]
    assert values([np.inf] * 3, [np.inf] * 2) == [1, 0.5, share, 0.5]
    fpr, area, _, error = values([1, 2, 3], [5, 6])
    assert (fpr, area, error) == (1, 0, 0.5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint8, np.int64, list])
def test_any_real_dtype(metric, dtype):
    score_id, score_ood = [5, 4, 4, 2], [4, 3, 2, 1, 0]
    expected = metric(np.array(score_id, float), np.array(score_ood, float), positive="ood")
    cast = (lambda s: s) if dtype is list else (lambda s: np.array(s, dtype=dtype))
    assert metric(cast(score_id), cast(score_ood), positive="ood") == expected
    assert type(metric(cast(score_id), cast(score_ood), positive="ood")) is float


def test_boolean_scores():
    assert auroc([True, True, False], [False]) == (1 + 1 + 0.5) / 3


def test_counts_beyond_32_bits():
    high, low = np.ones(70_000), np.zeros(70_000)  # 4.9e9 pairs
    assert auroc(high, low) == 1
    assert auroc(low, high) == 0
    assert detection_error(high, low) == 0
    assert detection_error(low, high) == 0.5


def test_numbers_of_numpy_and_fractions_are_numbers():
    expected = fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], 0.75)
    for tpr in (np.float32(0.75), np.float64(0.75), Fraction(3, 4)):
        assert fpr_at_tpr([4, 3, 2, 1], [3, 1, 0, 0], tpr) == expected


def test_inputs_are_left_alone():
    score_id, score_ood = np.array([2.0, 1.0]), np.array([1.0, 0.0])
    for scores in (score_id, score_ood):
        scores.flags.writeable = False
    detection_report(score_id, {"a": score_ood}, n_bootstrap=2, random_state=0)
    assert score_id.tolist() == [2, 1]


# Risk and coverage


def test_risk_by_hand():
    coverage, risk = risk_coverage_curve([1, 4, 2, 3], [True, True, False, True])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 0, 1 / 3, 1 / 4])
    assert aurc([1, 4, 2, 3], [True, True, False, True]) == pytest.approx(7 / 48)
    assert aurc([1, 4, 2, 3], [0, 0, 0, 0]) == 1
    assert aurc([np.inf, -np.inf], [1, 0]) == 0.25


def test_risk_within_ties_is_the_mean_over_their_orders():
    scores, correct = np.array([2, 2, 1, 1, 1]), np.array([True, False, True, False, True])
    risks = []
    for order in permutations(range(5)):
        if (np.diff(scores[list(order)]) <= 0).all():
            risks.append(np.cumsum(~correct[list(order)]) / np.arange(1, 6))
    np.testing.assert_allclose(risk_coverage_curve(scores, correct)[1], np.mean(risks, axis=0))
    assert aurc(scores, correct) == pytest.approx(np.mean(risks))


def test_risk_needs_an_answer_for_each_score():
    with pytest.raises(ValueError, match=r"correct has 1 values for 2 rows"):
        aurc([1, 2], [True])
    with pytest.raises(
        ValueError, match=r"correct holds values such as -1; expected True or False"
    ):
        aurc([1, 2], [1, -1])
    with pytest.raises(ValueError, match=r"scores has 1 NaN"):
        aurc([1, np.nan], [1, 0])


# Report


@pytest.fixture
def example():
    rng = np.random.RandomState(0)
    score_id = rng.normal(2, 1, size=300)
    sets = {"near": rng.normal(1, 1, size=100).round(1), "far": rng.normal(-1, 1, size=50)}
    return score_id, sets


@pytest.mark.parametrize("positive", POSITIVES)
def test_report_holds_each_metric_and_the_mean_over_sets(example, positive):
    score_id, sets = example
    report = detection_report(score_id, sets, tpr=0.9, positive=positive)
    expected = {
        name: {
            "fpr90": fpr_at_tpr(score_id, scores, 0.9, positive=positive),
            "auroc": auroc(score_id, scores, positive=positive),
            "aupr": aupr(score_id, scores, positive=positive),
            "detection_error": detection_error(score_id, scores, positive=positive),
        }
        for name, scores in sets.items()
    }
    rows = report.to_dict()
    assert list(rows) == ["near", "far", "mean"]
    mean = rows.pop("mean")
    assert rows == expected
    for metric, value in mean.items():
        assert value == pytest.approx((expected["near"][metric] + expected["far"][metric]) / 2)


def test_report_of_one_array_has_one_row(example):
    score_id, sets = example
    report = detection_report(score_id, sets["near"])
    assert list(report.to_dict()) == ["ood"]
    assert report.to_dict()["ood"]["fpr95"] == fpr_at_tpr(score_id, sets["near"])
    assert list(detection_report(score_id, {"near": sets["near"]}).to_dict()) == ["near", "mean"]


def test_report_prints_an_aligned_table():
    report = detection_report([4, 3, 2, 1], {"a": [0.5, 0], "a longer name": [5] * 3})
    assert str(report).splitlines() == [
        "4 ID rows against OOD rows; values in percent",
        "positive class: ID, score >= threshold",
        "fpr95: FPR where TPR is at least 95 %",
        "",
        "               rows   fpr95   auroc    aupr  detection_error",
        "a                 2    0.00  100.00  100.00             0.00",
        "a longer name     3  100.00    0.00   43.04            50.00",
        "mean                  50.00   50.00   71.52            25.00",
    ]


def test_report_prints_intervals_and_the_positive_class():
    report = detection_report([3, 2], [1], positive="ood", tpr=0.995, n_bootstrap=3, random_state=0)
    assert str(report).splitlines() == [
        "2 ID rows against OOD rows; values in percent",
        "positive class: OOD, score <= threshold",
        "fpr99.5: FPR where TPR is at least 99.5 %",
        "[low, high]: 95 % percentile intervals, 3 bootstrap replicates",
        "",
        "     rows            fpr99.5                    auroc                     aupr"
        "    detection_error",
        "ood     1  0.00 [0.00, 0.00]  100.00 [100.00, 100.00]  100.00 [100.00, 100.00]"
        "  0.00 [0.00, 0.00]",
    ]


def test_to_dict_is_a_copy(example):
    report = detection_report(*example)
    report.to_dict()["near"]["auroc"] = -1
    assert report.to_dict()["near"]["auroc"] != -1


def test_to_frame(example):
    report = detection_report(*example, n_bootstrap=5, random_state=0)
    frame = report.to_frame()
    assert list(frame.index) == ["near", "far", "mean"]
    assert list(frame.columns[:4]) == ["fpr95", "fpr95_low", "fpr95_high", "auroc"]
    assert frame.to_dict(orient="index") == report.to_dict()


def test_to_frame_says_what_to_install(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        detection_report(*example).to_frame()


# Bootstrap


@pytest.mark.parametrize("positive", POSITIVES)
def test_intervals_are_percentiles_of_metrics_on_resampled_rows(example, positive):
    score_id, sets = example
    report = detection_report(
        score_id, sets, positive=positive, n_bootstrap=30, confidence=0.8, random_state=3
    )
    rng = np.random.RandomState(3)
    replicates = []
    for _ in range(30):
        drawn_id = score_id[rng.randint(300, size=300)]  # one draw for both sets
        rows = []
        for scores in sets.values():
            drawn_ood = scores[rng.randint(len(scores), size=len(scores))]
            rows.append([metric(drawn_id, drawn_ood, positive=positive) for metric in METRICS])
        replicates.append([*rows, np.mean(rows, axis=0)])
    expected = np.percentile(replicates, [10, 90], axis=0)
    for i, row in enumerate(report.to_dict().values()):
        for j, metric in enumerate(["fpr95", "auroc", "aupr", "detection_error"]):
            interval = [row[metric + "_low"], row[metric + "_high"]]
            np.testing.assert_allclose(interval, expected[:, i, j], rtol=1e-12)


def test_intervals_contain_the_estimate_and_shrink_with_more_rows():
    widths = []
    for n_rows in (100, 2500):
        rng = np.random.RandomState(0)
        sets = {name: rng.normal(size=n_rows) for name in "ab"}
        report = detection_report(
            rng.normal(1.5, 1, size=n_rows), sets, n_bootstrap=200, random_state=0
        )
        for row in report.to_dict().values():
            for metric in ("fpr95", "auroc", "aupr", "detection_error"):
                assert row[metric + "_low"] < row[metric] < row[metric + "_high"]
        widths.append(row["auroc_high"] - row["auroc_low"])
    # Five times narrower in theory.
    assert 3 < widths[0] / widths[1] < 8


def test_bootstrap_leaves_the_estimates_alone(example):
    plain = detection_report(*example).to_dict()
    rows = detection_report(*example, n_bootstrap=5, random_state=0).to_dict()
    for name, row in plain.items():
        assert {metric: rows[name][metric] for metric in row} == row


def test_random_state(example):
    def report(random_state):
        return detection_report(*example, n_bootstrap=5, random_state=random_state).to_dict()

    assert report(1) == report(1) == report(np.random.RandomState(1)) == report(np.int64(1))
    assert report(1) != report(2)
    generator = np.random.RandomState(1)
    assert report(generator) != report(generator)


def test_global_generator_is_neither_read_nor_advanced(example):
    global_generator = check_random_state(None)
    saved = global_generator.get_state()
    try:
        results = []
        for random_state in (None, None, 0):
            global_generator.seed(0)
            before = global_generator.get_state()
            report = detection_report(*example, n_bootstrap=5, random_state=random_state)
            results.append(report.to_dict())
            after = global_generator.get_state()
            assert before[2:] == after[2:]
            assert (before[1] == after[1]).all()
        assert results[0] != results[1]
    finally:
        global_generator.set_state(saved)


# Bad input


@pytest.mark.parametrize("metric", [*METRICS, detection_report])
@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], ValueError, "empty"),
        (np.empty(0), ValueError, "empty"),
        (1.0, ValueError, r"shape \(\)"),
        (np.ones((3, 1)), ValueError, r"shape \(3, 1\).*ravel"),
        ([[1, 2], [3]], ValueError, "array"),
        ([1.0, np.nan, np.nan], ValueError, "2 NaN in 3"),
        (np.ma.array([1.0, 2.0], mask=[True, False]), ValueError, "masked"),
        (["a", "b"], TypeError, "<U1"),
        ([1.0, None], TypeError, "object"),
        ([1.0, 1j], TypeError, "complex128"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), TypeError, "datetime64"),
    ],
)
def test_bad_scores(metric, scores, error, message):
    with pytest.raises(error, match=f"score_id.*{message}"):
        metric(scores, [1.0])
    with pytest.raises(error, match=f"score_ood.*{message}"):
        metric([1.0], scores)


@pytest.mark.parametrize("metric", [*METRICS, detection_report])
@pytest.mark.parametrize("positive", ["ID", 1, None])
def test_unknown_positive(metric, positive):
    with pytest.raises(ValueError, match=rf"'positive' .*'id'.*Got {positive!r} instead"):
        metric([1.0], [0.0], positive=positive)


@pytest.mark.parametrize("metric", [fpr_at_tpr, detection_report])
@pytest.mark.parametrize(
    ("tpr", "error"),
    [
        *((value, ValueError) for value in (0, 95, np.nan, np.inf)),
        *((value, TypeError) for value in ("95", True, None)),
    ],
)
def test_bad_tpr(metric, tpr, error):
    with pytest.raises(error, match=rf"'tpr' .* \(0\.0, 1\.0\]\. Got {tpr!r} instead"):
        metric([1.0], [0.0], tpr=tpr)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"'method' .*'nearest'.* Got 'exact' instead"):
        fpr_at_tpr([1.0], [0.0], method="exact")


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ({}, ValueError, "empty dict"),
        ({"mean": [1.0]}, ValueError, "'mean'"),
        ({"a": [1.0], "svhn": [np.nan]}, ValueError, r"score_ood\['svhn'\] has 1 NaN"),
        ({"a": [1.0], "svhn": ["x"]}, TypeError, r"score_ood\['svhn'\] has dtype"),
        ({"a": [1.0], "svhn": None}, TypeError, r"score_ood\['svhn'\] has dtype"),
    ],
)
def test_bad_sets(sets, error, message):
    with pytest.raises(error, match=message):
        detection_report([1.0], sets)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n_bootstrap": -1}, ValueError, "int .* Got -1"),
        ({"n_bootstrap": 2.5}, TypeError, "int .* Got 2.5"),
        ({"n_bootstrap": True}, TypeError, "int .* Got True"),
        ({"confidence": 95}, ValueError, "float .* Got 95"),
        ({"confidence": "95"}, TypeError, "float .* Got '95'"),
        ({"random_state": "0"}, TypeError, "RandomState.* Got '0'"),
        ({"random_state": np.random}, TypeError, "RandomState.* Got <module"),
    ],
)
def test_bad_bootstrap_parameters(parameters, error, message):
    (name,) = parameters
    with pytest.raises(error, match=f"'{name}' parameter of detection_report .*{message}"):
        detection_report([1.0], [0.0], **parameters)


# The list of metrics


def test_a_metric_on_the_list_is_in_reports(monkeypatch):
    def accuracy(score_id, score_ood, *, positive="id"):
        return 0.25

    added = metrics.METRICS[1]._replace(
        name="acc{}", function=accuracy, of_counts=lambda tp, fp, tpr: tp[-1] * tpr
    )
    assert added.name_in_searches == "accuracy"
    assert added._replace(is_error=True).name_in_searches == "neg_accuracy"
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, added))
    row = detection_report([1, 2, 3], [0], tpr=0.5).to_dict()["ood"]
    assert list(row) == ["fpr50", "auroc", "aupr", "detection_error", "acc50"]
    assert row["acc50"] == 1.5


@pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.title)
def test_functions_on_the_list_give_what_reports_hold(metric):
    scores = [5, 4, 4, 2], [4, 3, 2, 1, 0]
    row = detection_report(*scores, positive="ood").to_dict()["ood"]
    assert row[metric.name_at(0.95)] == metric.function(*scores, positive="ood")
    assert metric.function in METRICS


def test_a_metric_is_found_by_any_of_its_names():
    fpr, area, *_ = metrics.METRICS
    for name in ("fpr_at_tpr", "neg_fpr_at_tpr", "fpr95", "FPR95"):
        assert fpr.is_named(name)
        assert not area.is_named(name)
    for name in ("auroc", "AUROC"):
        assert area.is_named(name)
        assert not fpr.is_named(name)
    assert metrics.METRICS[-1].is_named("Detection error")
    assert not fpr.is_named("fpr90")


@pytest.mark.parametrize("metric", [*METRICS, detection_report])
@pytest.mark.parametrize(("name", "place"), [("score_id", 0), ("score_ood", 1)])
def test_scores_are_refused_by_the_name_of_their_argument(metric, name, place):
    scores = [[1.0], [0.0]]
    scores[place] = []
    with pytest.raises(ValueError, match=f"^{name} is empty"):
        metric(*scores)
    with pytest.raises(ValueError, match=r"^score_ood is an empty dict"):
        detection_report([1.0], {})


# The module


def test_public_names_are_documented():
    assert sorted(metrics.__all__) == metrics.__all__
    for name in metrics.__all__:
        assert getattr(metrics, name).__doc__
