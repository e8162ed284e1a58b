from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from skood.exchangeability import (
    BETS,
    BINS,
    ChangePoint,
    Martingale,
    OnlinePValues,
    chance_lower,
    expected_rejections,
    payoffs,
    proportion_interval,
    share_p_value,
    two_sample_p_value,
    urn_p_values,
)

DRAWS = {
    "continuous": lambda rng, size: rng.normal(size=size),
    "tied": lambda rng, size: np.minimum(rng.normal(size=size).round(1), 0.5),
}


def alarms(calibration, streams, level, p_values=None):
    """Whether each stream has an alarm."""
    if p_values is None:
        p_values = [
            OnlinePValues(c, seed).update(stream)
            for seed, (c, stream) in enumerate(zip(calibration, streams, strict=True))
        ]
    path = Martingale((len(streams),)).update(payoffs(np.transpose(p_values)))
    return (path >= -np.log(level)).any(axis=0)


# P-values of a stream


def test_p_values_are_those_against_the_calibration_rows_and_all_earlier_rows():
    rng = np.random.default_rng(0)
    calibration, stream = rng.normal(size=30), rng.normal(size=300)
    p_values = OnlinePValues(calibration, 0).update(stream)
    before = np.concatenate([calibration, stream])
    for row, (score, p_value) in enumerate(zip(stream, p_values, strict=True)):
        # The row lies in a gap between calibration scores; within it the p-value is drawn.
        low = calibration[calibration < score].max(initial=-np.inf)
        high = calibration[calibration > score].min(initial=np.inf)
        earlier = before[: 30 + row]
        # As many gaps lie below as calibration rows.
        least = np.count_nonzero(earlier <= low) / (31 + row)
        most = (np.count_nonzero(earlier < high) + 1) / (31 + row)
        assert least <= p_value <= most


def test_the_chances_of_the_bins_are_those_of_all_orders():
    """Of 2 calibration rows and 3 rows, all 120 orders are equally likely."""
    seen = {}
    for order in permutations(range(5)):
        calibration, stream = np.sort(order[:2]), np.array(order[2:])
        bins = tuple(np.searchsorted(calibration, stream))
        seen[bins] = seen.get(bins, 0) + 1
    for bins, count in seen.items():
        low, _ = urn_p_values(np.array(bins), np.ones(3), np.zeros(3))
        high, _ = urn_p_values(np.array(bins), np.ones(3), np.ones(3))
        assert np.prod(high - low) == pytest.approx(count / 120)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("m", [1, 39])
def test_p_values_are_uniform_and_do_not_depend_on_earlier_ones(kind, m):
    rng = np.random.default_rng(m)
    draw = DRAWS[kind]
    pairs = np.array(
        [OnlinePValues(draw(rng, m), seed).update(draw(rng, 60))[[20, 59]] for seed in range(600)]
    )
    for p_values in (*pairs.T, pairs.sum(axis=1) % 1):
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    table = np.histogram2d(*pairs.T, bins=4, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-3


def test_batches_of_any_size_give_the_same_p_values():
    rng = np.random.default_rng(0)
    calibration, stream = DRAWS["tied"](rng, 40), DRAWS["tied"](rng, 700)
    whole = OnlinePValues(calibration, 3)
    rows = OnlinePValues(calibration, 3)
    p_values = whole.update(stream)
    np.testing.assert_array_equal(
        np.concatenate([rows.update(piece) for piece in np.split(stream, [1, 2, 300])]), p_values
    )
    np.testing.assert_array_equal(whole.weights, rows.weights)
    assert not np.array_equal(OnlinePValues(calibration, 4).update(stream), p_values)
    assert p_values.min() > 0


def test_what_is_remembered_does_not_grow():
    rng = np.random.default_rng(0)
    watched = OnlinePValues(rng.normal(size=5000), 0)
    assert len(watched.weights) == BINS
    assert watched.weights.sum() == 5001
    watched.update(rng.normal(size=1000))
    assert len(watched.weights) == BINS
    assert watched.weights.sum() == 6001


# The martingale


def test_a_bet_makes_no_money_on_average():
    edges = np.linspace(0, 1, 200_001)
    middle = (edges[1:] + edges[:-1]) / 2
    values = payoffs(np.concatenate([middle, edges[[0, -1]]]))
    assert (values > 0).all()
    assert np.isfinite(np.log(values)).all()
    np.testing.assert_allclose(values[:-2].mean(axis=0), 1, atol=2e-3)


def test_the_capital_is_that_of_all_ways_to_bet():
    """By hand: over two rows, before each of which a share of 1/2, then 1/3, is dealt out anew."""
    bets = payoffs(np.array([0.1, 0.9]))
    deal = np.array([0.5, *np.full(len(BETS), 0.5 / len(BETS))])
    after = deal * bets[0]
    second = (2 / 3 * after + after.sum() / 3 * deal) * bets[1]
    path = Martingale().update(bets)
    np.testing.assert_allclose(np.exp(path), [after.sum(), second.sum()])


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("m", [19, 100])
def test_streams_without_a_change_raise_an_alarm_at_most_as_often_as_chosen(kind, m):
    rng = np.random.default_rng(m)
    draw = DRAWS[kind]
    calibration, streams = draw(rng, (1000, m)), draw(rng, (1000, 150))
    found = alarms(calibration, streams, 0.1).sum()
    assert stats.binomtest(int(found), 1000, 0.1, alternative="greater").pvalue > 0.01


def test_p_values_against_the_calibration_rows_alone_would_raise_far_more_alarms():
    rng = np.random.default_rng(0)
    calibration, streams = np.sort(rng.random((50, 39))), rng.random((50, 600))
    counts = [np.searchsorted(c, s) for c, s in zip(calibration, streams, strict=True)]
    p_values = (np.array(counts) + rng.random((50, 600))) / 40
    assert alarms(calibration, streams, 0.01, p_values).mean() > 0.2


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda z, rng: z - 1, 75),
        (lambda z, rng: z + 1, 75),
        (lambda z, rng: 2 * z, 150),
        (lambda z, rng: z / 2, 150),
        (lambda z, rng: z - 9, 15),
        (lambda z, rng: np.where(rng.random(len(z)) < 0.2, z - 4, z), 150),
    ],
)
def test_a_change_raises_an_alarm_soon_after_many_rows_without_one(change, rows):
    rng = np.random.default_rng(0)
    calibration, streams = rng.normal(size=(20, 300)), rng.normal(size=(20, 700))
    streams[:, -rows:] = [change(stream, rng) for stream in streams[:, -rows:]]
    assert alarms(calibration, streams, 0.01).mean() >= 0.9


# When it began


def test_the_change_is_found_where_it_is():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(30):
        p_values = np.concatenate([rng.random(400), rng.beta(0.5, 1, 100)])
        rejected = np.arange(500) >= 450
        change = ChangePoint()
        for piece in np.split(np.arange(500), [1, 130, 131, 420]):
            change.update(payoffs(p_values[piece]), rejected[piece])
        row, before = change.estimate()
        assert before == max(0, row - 450)
        errors.append(abs(row - 400))
    assert np.median(errors) < 25


def test_a_change_from_the_first_row_on_begins_there():
    change = ChangePoint()
    change.update(payoffs(np.full(50, 0.01)), np.ones(50, dtype=bool))
    assert change.estimate() == (0, 0)


# A batch


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("n", "m"), [(1, 39), (2, 39), (60, 39), (5, 300)])
def test_p_values_of_batches_are_valid(kind, n, m):
    rng = np.random.default_rng(n)
    draw = DRAWS[kind]
    p_values = np.array([two_sample_p_value(draw(rng, n), draw(rng, m)) for _ in range(300)])
    for level in (0.05, 0.2):
        found = int((p_values <= level).sum())
        assert stats.binomtest(found, 300, level, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("change", [lambda z: z - 0.5, lambda z: z + 0.5, lambda z: 2 * z])
def test_a_batch_that_differs_is_seen_and_in_any_order(change):
    rng = np.random.default_rng(0)
    scores, calibration = change(rng.normal(size=200)), rng.normal(size=500)
    p_value = two_sample_p_value(scores, calibration)
    assert p_value < 1e-3
    assert two_sample_p_value(np.sort(scores), calibration) == pytest.approx(p_value)


def test_the_chance_to_be_lower_is_the_area_under_the_curve():
    assert chance_lower(np.array([0.0, 1.0]), np.array([1.0, 2.0, -1.0])) == pytest.approx(3.5 / 6)
    assert chance_lower(np.array([5.0]), np.array([1.0, 2.0])) == 0


def test_the_share_rejected_is_that_of_all_calibration_sets():
    rng = np.random.default_rng(0)
    shares, p_values = [], []
    for _ in range(1000):
        calibration = rng.random(39)
        offset = np.sort(calibration)[1]
        n_rejected = int((rng.random(100) < offset).sum())
        shares.append(n_rejected / 100)
        p_values.append(share_p_value(n_rejected, 100, [calibration - offset]))
    mean, (low, high) = expected_rejections(100, [calibration - offset])
    assert mean == 0.05
    assert np.mean(shares) == pytest.approx(mean, abs=0.004)
    inside = (np.array(shares) >= low) & (np.array(shares) <= high)
    assert 0.95 <= inside.mean() < 0.985
    for level in (0.01, 0.1):
        assert np.mean(np.array(p_values) <= level) <= 1.3 * level


@pytest.mark.parametrize("n_calibration", [200, 600])
def test_the_share_rejected_by_thresholds_of_classes_is_that_of_all_calibration_sets(n_calibration):
    """Of classes of several sizes, each with a rank of its own; small ones share a threshold."""
    rng = np.random.default_rng(0)
    classes, weights = np.arange(6), np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    shares, means, p_values, inside = [], [], [], []
    for _ in range(600):
        calibration, of = rng.random(n_calibration), rng.choice(classes, n_calibration, p=weights)
        ranks = [(of == one).sum() // 10 for one in classes]
        offsets = np.full(6, np.sort(calibration)[n_calibration // 10 - 1])
        for one in np.flatnonzero(ranks):
            offsets[one] = np.sort(calibration[of == one])[ranks[one] - 1]
        own = np.array(ranks) > 0
        margins = calibration - offsets[of]
        groups = [margins[of == one] for one in classes[own]]
        groups += [] if own.all() else [margins[~own[of]]]
        rows, of_rows = rng.random(300), rng.choice(classes, 300, p=weights)
        n_rejected = int((rows < offsets[of_rows]).sum())
        mean, (low, high) = expected_rejections(300, groups)
        shares.append(n_rejected / 300)
        means.append(mean)
        inside.append(low <= shares[-1] <= high)
        p_values.append(share_p_value(n_rejected, 300, groups))
    assert np.mean(shares) == pytest.approx(np.mean(means), abs=0.003)
    assert 0.93 <= np.mean(inside) <= 0.985
    assert np.mean(np.array(p_values) <= 0.1) <= 0.13


def test_a_share_rejected_of_none_is_no_news_if_no_score_is_below_the_threshold():
    calibration = np.repeat([1.0, 2.0], [10, 29])
    assert share_p_value(0, 100_000, [calibration - 1.0]) == 1
    assert expected_rejections(1000, [calibration - 1.0])[1][0] == 0
    assert share_p_value(90_000, 100_000, [calibration - 1.0]) < 1e-3


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10)])
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(proportion_interval(k, n), (expected.low, expected.high), atol=1e-6)
