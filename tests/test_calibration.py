from __future__ import annotations

import warnings
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest

from skood.calibration import (
    calibration_rank,
    calibration_split,
    conformal_p_values,
    minimum_rows,
    outliers_at_fdr,
    place_class_thresholds,
    place_threshold,
    tpr_by_cost,
)
from skood.exceptions import FewCalibrationRowsWarning

TPRS = ["0.05", "0.1", "0.3", "0.5", "0.6", "0.7", "0.8", "0.85", "0.9", "0.95", "0.975", "0.99"]


def exact_rank(n_rows, tpr):
    share = 1 - Fraction(tpr)
    return share.numerator * (n_rows + 1) // share.denominator


# Ranks


@pytest.mark.parametrize("first", range(1, 100, 11))
def test_rank_is_exact_for_every_hundredth(first):
    for hundredth in range(first, min(first + 11, 100)):
        tpr = f"0.{hundredth:02d}"
        # Enough for a floor without tolerance to be wrong at 23 of the hundredths.
        rows = [*range(1, 200), *(n for end in range(200, 3001, 200) for n in (end - 2, end - 1))]
        wrong = [n for n in rows if calibration_rank(n, float(tpr)) != exact_rank(n, tpr)]
        assert not wrong, (tpr, wrong[:5])


@pytest.mark.parametrize(
    "tpr",
    [
        "0.001",
        "0.683",
        "0.9545",
        "0.975",
        "0.99865",
        "0.999",
        "0.9999",
        "0.9500000001",
        "0.9499999999",
    ],
)
def test_rank_is_exact_for_finer_shares_and_many_rows(tpr):
    rows = [*range(1, 1001), *range(9_990, 10_010), *range(99_990, 100_010), 999_999, 10**7 - 1]
    wrong = [n for n in rows if calibration_rank(n, float(tpr)) != exact_rank(n, tpr)]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("tpr", [*TPRS, "0.999"])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_minimum_rows_is_the_first_that_reaches_the_rank(rank, tpr):
    expected = next(n for n in range(1, 10_000) if exact_rank(n, tpr) >= rank)
    assert minimum_rows(rank, float(tpr)) == expected


def test_the_rank_is_at_most_the_number_of_rows():
    assert calibration_rank(5, 1e-17) == 5
    assert calibration_rank(0, 0.5) == 0


def test_ranks_that_more_rows_than_can_be_counted_would_reach_are_refused():
    with pytest.raises(ValueError, match=r"^rank=4611686018427387904 at tpr=0\.9 needs more than"):
        minimum_rows(2**62, 0.9)


# Thresholds


@pytest.mark.parametrize(
    ("scores", "expected"), [([2, 1, 3], 2.0), ([2**53 + 3, 2**53 + 1], 2**53 + 1)]
)
def test_the_threshold_is_a_float_unless_none_equals_it(scores, expected):
    found = place_threshold(scores, 0.5)
    assert found == expected
    assert type(found) is type(expected)
    assert place_class_thresholds(scores, [0] * len(scores), 1, 0.5).dtype == np.float64


@pytest.mark.parametrize("tpr", TPRS)
def test_threshold_is_the_score_of_the_rank(tpr):
    scores = np.random.RandomState(0).permutation(np.linspace(-3, 5, 219))
    expected = sorted(scores)[exact_rank(219, tpr) - 1]
    assert place_threshold(scores, float(tpr)) == expected


def test_too_few_rows_take_the_smallest_score_and_say_what_it_promises():
    promise = (
        r"^4 calibration rows are too few to keep 0\.95 .* at least 19.* keeps 0\.8 on average"
    )
    with pytest.warns(FewCalibrationRowsWarning, match=promise):
        assert place_threshold([3.0, 1.0, 2.0, 4.0], 0.95) == 1.0


def test_enough_rows_for_the_first_rank_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert place_threshold(np.arange(19.0), 0.95) == 0


@pytest.mark.parametrize(("n_calibration", "tpr"), [(39, 0.95), (59, 0.95), (99, 0.9), (30, 0.8)])
def test_kept_share_of_fresh_rows_keeps_its_promise_over_resplits(n_calibration, tpr):
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], 270)
    kept = []
    for _ in range(200):
        scores = random.standard_normal(540)
        fresh, calibration = calibration_split(labels, n_calibration, tpr, random)
        kept.append(np.mean(scores[fresh] >= place_threshold(scores[calibration], tpr)))
    expected = 1 - exact_rank(n_calibration, str(tpr)) / (n_calibration + 1)
    error = np.std(kept, ddof=1) / np.sqrt(200)
    assert abs(np.mean(kept) - expected) < 4 * error
    # The next rank, up or down, would be told apart.
    assert 1 / (n_calibration + 1) > 4 * error


# p-values


def test_p_values_count_the_scores_at_or_below():
    calibration = [2.0, 1.0, 2.0, 5.0]
    scores = [0.0, 1.0, 1.5, 2.0, 4.9, 5.0, 9.0]
    expected = [
        (1 + sum(value <= score for value in calibration)) / (1 + len(calibration))
        for score in scores
    ]
    assert conformal_p_values(scores, calibration, 0.5) == pytest.approx(expected, rel=1e-15)
    assert conformal_p_values(scores, calibration, 0.5).dtype == np.float64


def assert_rejects_exactly_below(calibration, tpr):
    scores = np.unique(np.concatenate([calibration, np.asarray(calibration) + 0.5, [-1.0]]))
    below = scores < place_threshold(calibration, tpr)
    rejected = conformal_p_values(scores, calibration, tpr) <= 1 - tpr
    assert (below == rejected).all(), (calibration, tpr)


@pytest.mark.parametrize("n_rows", range(1, 9))
def test_p_values_reject_exactly_below_the_threshold_for_all_tied_scores(n_rows):
    for calibration in combinations_with_replacement([0.0, 1.0, 2.0], n_rows):
        for tpr in [*TPRS, "1/3", "2/3"]:
            if exact_rank(n_rows, tpr) > 0:
                assert_rejects_exactly_below(calibration, float(Fraction(tpr)))


@pytest.mark.parametrize("tpr", TPRS)
def test_p_values_reject_exactly_below_the_threshold_where_the_rank_is_a_whole_number(tpr):
    random = np.random.RandomState(0)
    for n_rows in [19, 39, 79, 99, 199, 399, 999]:
        if exact_rank(n_rows, tpr) > 0:
            for n_values in [5, 1000]:
                calibration = random.randint(n_values, size=n_rows).astype(float)
                assert_rejects_exactly_below(calibration, float(tpr))


# Bad input


CALLS = {
    "threshold": (place_threshold, "calibration_scores"),
    "p-values": (lambda scores, tpr: conformal_p_values([1.0], scores, tpr), "calibration_scores"),
    "tested rows": (lambda scores, tpr: conformal_p_values(scores, [1.0], tpr), "scores"),
}


@pytest.mark.parametrize(("call", "name"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([], ValueError, r"is empty, of shape \(0,\)"),
        (np.ones((39, 1)), ValueError, r"has shape \(39, 1\); expected \(n,\)"),
        (1.0, ValueError, r"has shape \(\)"),
        ([1.0, np.nan], ValueError, "has 1 NaN in 2"),
        (np.ma.masked_equal([1, 2], 2), ValueError, "has masked entries"),
        (["1"], TypeError, "has dtype <U1"),
    ],
)
def test_scores_that_have_no_ranks_are_refused(call, name, scores, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        call(scores, 0.95)


@pytest.mark.parametrize(("call", "name"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("tpr", [0, 1, -0.5, 95, np.nan, np.inf, True, "0.95", None])
def test_shares_out_of_range_are_refused(call, name, tpr):
    message = rf"'tpr' parameter of \w+ must be .* \(0\.0, 1\.0\)\. Got {tpr!r} instead"
    with pytest.raises(ValueError, match=message) as raised:
        call(np.arange(39), tpr)
    assert isinstance(raised.value, TypeError)


RIGHT = {
    calibration_rank: {"n_rows": 19, "tpr": 0.9},
    minimum_rows: {"rank": 1, "tpr": 0.9},
    place_threshold: {"calibration_scores": range(19), "tpr": 0.9},
    place_class_thresholds: {
        "calibration_scores": range(19),
        "classes": [0] * 19,
        "n_classes": 1,
        "tpr": 0.9,
    },
    tpr_by_cost: {"score_id": [1.0, 2.0], "score_ood": [0.0]},
    conformal_p_values: {"scores": [1.0], "calibration_scores": range(19), "tpr": 0.9},
    outliers_at_fdr: {"p_values": [0.5], "fdr": 0.1},
    calibration_split: {
        "labels": np.arange(9) % 3,
        "size": 2,
        "tpr": 0.9,
        "random_state": np.random.RandomState(0),
    },
}


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        *((function, "tpr", 1.0) for function in RIGHT if "tpr" in RIGHT[function]),
        (calibration_rank, "n_rows", -1),
        (calibration_rank, "n_rows", 2**62 + 1),
        (minimum_rows, "rank", 0),
        (place_class_thresholds, "n_classes", 2**24 + 1),
        (outliers_at_fdr, "fdr", 0),
        (calibration_split, "size", 0),
        (calibration_split, "size", "third"),
        (calibration_split, "random_state", 0),
        (tpr_by_cost, "cost_of_rejecting", 0),
        (tpr_by_cost, "cost_of_keeping", -1.0),
        (tpr_by_cost, "ood_share", 1.0),
    ],
)
def test_a_parameter_out_of_range_is_named_with_its_function(function, name, value):
    message = f"^The '{name}' parameter of {function.__name__} must be"
    with pytest.raises(ValueError, match=message):
        function(**(RIGHT[function] | {name: value}))


def test_infinite_scores_have_ranks():
    scores = [-np.inf, *range(37), np.inf]
    assert place_threshold(scores, 0.95) == 0
    assert conformal_p_values([-np.inf, 40], scores, 0.95) == pytest.approx([2 / 40, 39 / 40])


# Splits


@pytest.mark.parametrize(
    ("n_rows", "tpr", "expected"),
    [
        (9, 0.95, 3),  # a third
        (116, 0.95, 38),
        (117, 0.95, 39),  # rank 2
        (390, 0.95, 39),
        (391, 0.95, 40),  # a tenth, rounded up
        (5000, 0.95, 500),
        (57, 0.9, 19),
        (1000, 0.99, 199),
    ],
)
def test_auto_is_a_tenth_at_least_rank_two_at_most_a_third(n_rows, tpr, expected):
    labels = np.arange(n_rows) % 2
    training, calibration = calibration_split(labels, "auto", tpr, np.random.RandomState(0))
    assert (len(training), len(calibration)) == (n_rows - expected, expected)


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (25, 25), (0.2, 20), (0.333, 33)])
def test_size_is_a_number_or_a_share(size, expected):
    training, calibration = calibration_split(
        np.arange(100) % 3, size, 0.95, np.random.RandomState(0)
    )
    assert (len(training), len(calibration)) == (100 - expected, expected)


@pytest.mark.parametrize("share", [np.float64(0.2), np.float32(0.2)])
def test_size_may_be_a_share_of_any_floating_type(share):
    _, calibration = calibration_split(np.arange(100) % 3, share, 0.95, np.random.RandomState(0))
    assert len(calibration) == 20


@pytest.mark.parametrize("size", ["auto", 12, 0.5])
def test_split_is_a_partition_that_leaves_every_class_a_training_row(size):
    labels = np.array([0] * 30 + [1] * 3 + [7] + [9] * 2)
    for seed in range(100):
        training, calibration = calibration_split(labels, size, 0.95, np.random.RandomState(seed))
        assert sorted([*training, *calibration]) == list(range(len(labels)))
        assert set(labels[training]) == set(labels)
        assert (np.diff(training) > 0).all()
        assert (np.diff(calibration) > 0).all()


def test_auto_shrinks_where_classes_need_their_rows():
    training, calibration = calibration_split(
        np.array([0, 1, 2, 3, 4, 5, 6, 6]), "auto", 0.95, np.random.RandomState(0)
    )
    assert (len(training), len(calibration)) == (7, 1)


def test_every_row_is_as_likely_as_any_other_of_its_class_to_calibrate():
    labels = np.array([0] * 15 + [1] * 5)
    counts = np.zeros(20)
    random = np.random.RandomState(0)
    for _ in range(1000):
        counts[calibration_split(labels, 6, 0.9, random)[1]] += 1
    for label in (0, 1):
        shares = counts[labels == label] / 1000
        error = np.sqrt(shares.mean() * (1 - shares.mean()) / 1000)
        assert (abs(shares - shares.mean()) < 4.5 * error).all()


def test_two_rows_are_split_in_halves():
    training, calibration = calibration_split([0, 0], "auto", 0.95, np.random.RandomState(0))
    assert (len(training), len(calibration)) == (1, 1)
    training, calibration = calibration_split([0] * 4, "auto", 0.95, np.random.RandomState(0))
    assert (len(training), len(calibration)) == (3, 1)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"^labels has shape \(2, 2\); expected \(n,\)"):
        calibration_split(np.zeros((2, 2)), 1, 0.95, np.random.RandomState(0))


def test_none_calibrates_on_the_training_rows():
    training, calibration = calibration_split(np.arange(5), None, 0.95, np.random.RandomState(0))
    assert training.tolist() == calibration.tolist() == [0, 1, 2, 3, 4]


def test_equal_generators_give_equal_splits():
    labels = np.arange(200) % 5
    first, second, other = (
        calibration_split(labels, "auto", 0.95, np.random.RandomState(seed))[1].tolist()
        for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    ("labels", "size"),
    [([0, 0, 1, 1], 3), ([0, 1, 2], "auto"), ([0, 0, 0, 0], 0.01), ([0, 0, 1, 1], 100)],
)
def test_a_split_without_rows_on_either_side_is_refused(labels, size):
    with pytest.raises(ValueError, match=rf"calibration_size={size!r} asks for .* n_samples = "):
        calibration_split(np.array(labels), size, 0.95, np.random.RandomState(0))


def test_each_class_has_the_threshold_of_its_rows():
    random = np.random.RandomState(0)
    classes = random.randint(3, size=300)
    scores = random.standard_normal(300) + 5 * classes
    thresholds = place_class_thresholds(scores, classes, 3, 0.9)
    assert thresholds.tolist() == [place_threshold(scores[classes == c], 0.9) for c in range(3)]


def test_a_class_of_few_rows_has_the_threshold_of_all():
    scores, classes = np.arange(60.0), np.repeat([0, 2], [50, 10])
    with pytest.warns(FewCalibrationRowsWarning, match="2 of 3 classes, such as number 1, are"):
        thresholds = place_class_thresholds(scores, classes, 3, 0.95)
    common = place_threshold(scores, 0.95)
    assert thresholds.tolist() == [place_threshold(scores[:50], 0.95), common, common]


def test_as_many_rows_as_the_first_rank_needs_give_a_class_its_threshold():
    scores, classes = np.arange(38.0), np.repeat([0, 1], 19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert place_class_thresholds(scores, classes, 2, 0.95).tolist() == [0, 19]
    with pytest.warns(FewCalibrationRowsWarning, match="1 of 3 classes, such as number 2"):
        assert place_class_thresholds(scores, classes, 3, 0.95).tolist() == [0, 19, 0]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (place_class_thresholds, "calibration_scores"),
        (tpr_by_cost, "score_id"),
        (tpr_by_cost, "score_ood"),
        (outliers_at_fdr, "p_values"),
    ],
)
def test_scores_are_refused_by_the_name_of_their_argument(function, name):
    with pytest.raises(ValueError, match=f"^{name} is empty"):
        function(**(RIGHT[function] | {name: []}))


def test_scores_of_new_rows_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^score_new is empty"):
        tpr_by_cost([1.0], score_new=[], ood_share=0.5)


@pytest.mark.parametrize("tpr", [0.7, 0.9, 0.95])
def test_p_values_of_classes_reject_what_their_thresholds_reject(tpr):
    random = np.random.RandomState(1)
    own = np.repeat([0, 1, 3], [120, 60, 5])
    scores = np.round(random.standard_normal(185) + own, 1)
    classes = random.randint(4, size=500)
    tested = np.round(random.standard_normal(500) + classes, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thresholds = place_class_thresholds(scores, own, 4, tpr)
    p_values = conformal_p_values(tested, scores, tpr, classes, own)
    assert np.array_equal(p_values <= 1 - tpr, tested < thresholds[classes])
    of_one = classes == 1
    expected = [(1 + np.sum(scores[own == 1] <= score)) / 61 for score in tested[of_one]]
    kept = p_values[of_one] > 1 - tpr
    assert p_values[of_one][kept] == pytest.approx(np.array(expected)[kept])


def test_p_values_of_classes_by_hand():
    calibration, own = [1.0, 2.0, 3.0, 4.0, 0.5], [0, 0, 0, 0, 1]
    # Class 0 has four rows of its own; class 1 has one, and class 2 none, too few at 0.75.
    found = conformal_p_values([2.5, 2.5, 2.5], calibration, 0.75, [0, 1, 2], own)
    assert found == pytest.approx([3 / 5, 4 / 6, 4 / 6])
    # Classes of one side alone say nothing.
    for classes in ({"classes": [0]}, {"calibration_classes": own}):
        assert conformal_p_values([2.5], calibration, 0.75, **classes) == pytest.approx([4 / 6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [0, 1]}, r"^classes has shape \(2,\) .* for each of 1 scores"),
        ({"classes": [-1]}, r"^classes is from -1 to -1; .* from 0\.$"),
        ({"calibration_classes": [0, 1]}, r"^calibration_classes has shape \(2,\) .* of 3 scores"),
        ({"calibration_classes": [[0, 0, 1]]}, r"^calibration_classes has shape \(1, 3\)"),
        ({"calibration_classes": [0, 0, -1]}, r"^calibration_classes is from -1 to 0"),
    ],
)
def test_classes_that_do_not_fit_are_refused_by_name(arguments, message):
    right = {"classes": [0], "calibration_classes": [0, 0, 1]}
    with pytest.raises(ValueError, match=message):
        conformal_p_values([1.0], [1.0, 2.0, 3.0], 0.5, **(right | arguments))


def test_the_promise_holds_in_every_class():
    random = np.random.RandomState(2)
    kept = np.zeros((400, 2))
    for trial in range(400):
        classes = random.randint(2, size=(2, 120))
        scores = random.standard_normal((2, 120)) * (1 + 3 * classes)
        thresholds = place_class_thresholds(scores[0], classes[0], 2, 0.9)
        is_kept = scores[1] >= thresholds[classes[1]]
        kept[trial] = [is_kept[classes[1] == one].mean() for one in range(2)]
    error = kept.std(axis=0) / 20
    assert (kept.mean(axis=0) >= 0.9 - 3 * error).all()
    assert (kept.mean(axis=0) <= 0.93).all()


@pytest.mark.parametrize("ood_share", [None, 0.02, 0.5])
@pytest.mark.parametrize("cost_of_keeping", [0.2, 1.0, 20.0])
def test_no_other_threshold_costs_less(ood_share, cost_of_keeping):
    random = np.random.RandomState(3)
    score_id, score_ood = random.standard_normal(90) + 1, np.round(random.standard_normal(60), 1)
    score_id[:30] = np.round(score_id[:30], 1)
    tpr = tpr_by_cost(score_id, score_ood, cost_of_keeping=cost_of_keeping, ood_share=ood_share)
    share = 60 / 150 if ood_share is None else ood_share

    def cost(threshold):
        rejected, kept = np.mean(score_id < threshold), np.mean(score_ood >= threshold)
        return (1 - share) * rejected + share * cost_of_keeping * kept

    placed = place_threshold(score_id, tpr)
    assert cost(placed) == pytest.approx(min(map(cost, score_id)), abs=1e-12)


def test_the_share_to_keep_by_hand():
    score_id, score_ood = [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 2.5]
    # At thresholds 1, 2, 3, 4: 0, 1, 2, 3 of 4 rejected, and 3, 2, 0, 0 of 4 outliers kept.
    # Half of the rows are outliers, and both costs are 1: 3, 3, 2, 3 mistakes.
    assert tpr_by_cost(score_id, score_ood) == pytest.approx(1 - 3 / 5)
    # Costs 3, 4, 4, 6 and 6, 5, 2, 3: the cheapest is the first or the third.
    assert tpr_by_cost(score_id, score_ood, cost_of_rejecting=2) == pytest.approx(1 - 1 / 5)
    assert tpr_by_cost(score_id, score_ood, cost_of_keeping=2) == pytest.approx(1 - 3 / 5)
    # 0.9 * (0, 1, 2, 3) + 0.1 * (3, 2, 0, 0)
    assert tpr_by_cost(score_id, score_ood, ood_share=0.1) == pytest.approx(1 - 1 / 5)
    # 0.1 * (0, 1, 2, 3) + 0.9 * (3, 2, 0, 0)
    assert tpr_by_cost(score_id, score_ood, ood_share=0.9) == pytest.approx(1 - 3 / 5)


def test_the_share_to_keep_of_rows_as_they_come_by_hand():
    score_id, score_new = [1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 2.0, 4.0]
    # At thresholds 1, 2, 3, 4 a share of 2/4, 2/4, 1/4, 1/4 is kept, of ID rows 1, 3/4, 2/4, 1/4.
    # With half of the rows outliers, of these 0, 1/4, 0, 1/4 are kept: costs 0, 2, 2, 4 eighths.
    assert tpr_by_cost(score_id, score_new=score_new, ood_share=0.5) == pytest.approx(1 - 1 / 5)
    # With a share of 0.8: (kept - 0.2 of ID rows kept) / 0.8 is 3/8, 7/16, 3/16, 1/4, so that costs
    # are 0.3, 0.4, 0.25, 0.35.
    assert tpr_by_cost(score_id, score_new=score_new, ood_share=0.8) == pytest.approx(1 - 3 / 5)
    # Fewer kept than ID rows alone would be: no outlier is, and nothing is gained by rejecting.
    found = tpr_by_cost(score_id, score_new=[0, 0, 0, 1], ood_share=0.5, cost_of_keeping=4)
    assert found == pytest.approx(1 - 1 / 5)


def test_of_equal_scores_none_is_split():
    # Thresholds 1 and 2 reject 0 and 1/4 of the ID rows, and keep 3/4 and none of the outliers.
    assert tpr_by_cost([2, 1, 2, 2], [0, 1, 1, 1]) == pytest.approx(1 - 2 / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [0, 1]}, r"classes has shape \(2,\).*expected the number of a class"),
        ({"classes": [0.0, 1.0, 1.0]}, "dtype float64; expected the number of a class"),
        (
            {"classes": [0, 1, 2]},
            "classes is from 0 to 2; expected numbers .*from 0 to 1",
        ),
        ({"classes": [-1, 1, 1]}, "classes is from -1 to 1"),
        ({"n_classes": 0}, "n_classes"),
    ],
)
def test_refuses_what_are_no_classes(arguments, message):
    right = {"calibration_scores": np.arange(3.0), "classes": [0, 1, 1], "n_classes": 2, "tpr": 0.5}
    with pytest.raises(ValueError, match=message):
        place_class_thresholds(**(right | arguments))


# Outliers of a batch


def test_outliers_are_those_up_to_the_last_p_value_below_its_line():
    # Lines at 0.05, 0.1, 0.15, 0.2: the second p-value is above its own, the third is not.
    selected = outliers_at_fdr([0.9, 0.05, 0.15, 0.11], 0.2)
    assert selected.tolist() == [False, True, True, True]
    assert not outliers_at_fdr([0.9, 0.06, 0.151, 0.11], 0.2).any()
    assert outliers_at_fdr([0.0, 1.0], 0.2).tolist() == [True, False]


@pytest.mark.parametrize("m", [9, 19, 29, 39, 99, 299])
@pytest.mark.parametrize("n", [1, 3, 7, 10, 100])
def test_p_values_on_the_line_are_selected_in_spite_of_rounding(m, n):
    for k in range(1, n + 1):
        fdr = n / (k * (m + 1))
        if fdr < 1:
            p_values = np.r_[np.full(k, 1 / (m + 1)), np.ones(n - k)]
            assert outliers_at_fdr(p_values, fdr).sum() == k


@pytest.mark.parametrize("p_values", [[-0.1, 0.5], [0.5, 1.1], [np.nan], [], [[0.5]]])
def test_what_are_no_p_values_is_refused(p_values):
    with pytest.raises(ValueError, match="p_values"):
        outliers_at_fdr(p_values, 0.1)


def test_an_assumed_share_stands_in_for_known_outliers():
    random = np.random.RandomState(4)
    score_id, score_ood = random.standard_normal(4000), random.standard_normal(2000) - 2
    score_new = np.concatenate([random.standard_normal(6000), score_ood])
    known = tpr_by_cost(score_id, score_ood, cost_of_keeping=3, ood_share=0.25)
    assumed = tpr_by_cost(score_id, score_new=score_new, cost_of_keeping=3, ood_share=0.25)
    assert assumed == pytest.approx(known, abs=0.02)
    # Where no outliers are, none are kept: the largest share costs least.
    fresh = random.standard_normal(4000)
    assert tpr_by_cost(score_id, score_new=fresh - 1e-3, ood_share=1e-6) > 0.99


@pytest.mark.parametrize(
    "arguments",
    [{}, {"score_ood": [0.0], "score_new": [0.0], "ood_share": 0.1}, {"score_new": [0.0]}],
)
def test_a_threshold_by_cost_needs_outliers(arguments):
    with pytest.raises(ValueError, match=r"needs outliers: pass score_ood.*or score_new"):
        tpr_by_cost([1.0, 2.0], **arguments)
