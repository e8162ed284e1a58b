"""Are scores drawn like the calibration scores? Exact tests, of a stream and of a batch.

All of them ask whether rows are exchangeable with the calibration rows. No one knows how the scores
of these are distributed, so a share that is right on average is right for no calibration set: what
is computed here counts that in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "BETS",
    "ChangePoint",
    "Martingale",
    "OnlinePValues",
    "chance_lower",
    "expected_rejections",
    "payoffs",
    "proportion_interval",
    "share_p_value",
    "two_sample_p_value",
    "urn_p_values",
]

FloatArray = NDArray[np.float64]

BINS = 200
"""In which rows of a stream are counted, at most."""

PIECE = 256
"""Rows that are counted at once."""

COVERAGE = 0.95
"""Of all intervals."""


# A stream


def urn_p_values(
    bins: NDArray[np.intp], weights: FloatArray, uniforms: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Smoothed p-values of rows that fall in bins of these weights, and the weights after them.

    Polya's urn: each row adds 1 to the weight of its bin, after its p-value.
    """
    fallen = np.zeros((len(bins), len(weights)))
    here = np.arange(len(bins))
    fallen[here, bins] = 1
    before = weights + np.cumsum(fallen, axis=0) - fallen
    reached = np.cumsum(before, axis=1)
    own = before[here, bins]
    p_values = (reached[here, bins] - own + uniforms * own) / reached[:, -1]
    return p_values, weights + fallen.sum(axis=0)


class OnlinePValues:
    """Conformal p-values of each row against the calibration rows and all rows before it.

    P-values against the calibration rows alone are not independent, as they share these rows. Those
    against all earlier rows are, and uniform, if the rows are exchangeable (Vovk, Gammerman &
    Shafer, 2005, chapter 2). To remember the counts of at most `BINS` bins costs none of it: the
    calibration scores cut the line into m + 1 gaps, whose chances are Dirichlet(1, ..., 1) whatever
    the distribution, so the next row falls in a bin with chance (gaps + earlier rows in it) / (m +
    1 + earlier rows). Equal scores are put in an order by lot.
    """

    def __init__(self, calibration: FloatArray, seed: int) -> None:
        lots = np.random.default_rng([seed, 1]).random(len(calibration))
        order = np.lexsort((lots, calibration))
        n_gaps = len(calibration) + 1
        cuts = np.linspace(0, n_gaps, min(BINS, n_gaps) + 1).round().astype(int)
        edges = order[cuts[1:-1] - 1]
        self._scores, places = np.unique(calibration[edges], return_inverse=True)
        # Whole parts tell the scores apart, and fractions put equal ones in their order.
        self._edges = places + lots[edges]
        self._seed = seed
        self.weights = np.diff(cuts).astype(np.float64)
        self.n_rows = 0

    def update(self, scores: FloatArray) -> FloatArray:
        """P-values of the next rows, in (0, 1]; low if few rows before scored as low."""
        # Two numbers a row, from its place in the stream on: batches of any size draw the same.
        generator = np.random.Generator(np.random.PCG64(self._seed).advance(2 * self.n_rows))
        lots, uniforms = generator.random((len(scores), 2)).T
        bins = self._bins(scores, lots)
        p_values = np.empty(len(scores))
        for start in range(0, len(scores), PIECE):
            piece = slice(start, start + PIECE)
            p_values[piece], self.weights = urn_p_values(
                bins[piece], self.weights, 1 - uniforms[piece]
            )
        self.n_rows += len(scores)
        return p_values

    def _bins(self, scores: FloatArray, lots: FloatArray) -> NDArray[np.intp]:
        places = np.searchsorted(self._scores, scores)
        last = len(self._scores) - 1
        tied = self._scores[np.minimum(places, last)] == scores
        return np.searchsorted(self._edges, places + np.where(tied, lots, 0))


def _line(slope: float) -> Callable[[FloatArray], FloatArray]:
    return lambda p: 1 + slope * (p - 0.5)


def _curve(height: float) -> Callable[[FloatArray], FloatArray]:
    return lambda p: 1 + height * (6 * p**2 - 6 * p + 1)


def _power(exponent: float) -> Callable[[FloatArray], FloatArray]:
    # Where p is next to 0, less than the power: the mean stays at most 1, the value finite.
    return lambda p: exponent * np.maximum(p, 1e-12) ** (exponent - 1)


def _mirrored(bet: Callable[[FloatArray], FloatArray]) -> Callable[[FloatArray], FloatArray]:
    return lambda p: bet(1 - p)


BETS: tuple[Callable[[FloatArray], FloatArray], ...] = (
    _line(0.7),
    _line(-0.7),
    _line(1.8),
    _line(-1.8),
    _power(0.5),
    _power(0.8),
    _mirrored(_power(0.5)),
    _curve(0.9),
    _curve(-0.9),
)
"""Bets on a p-value: that it is high or low, a little or much; very low or high; far out; central.

Each has a mean of at most 1 over [0, 1].
"""


class Martingale:
    """Capital that grows as p-values are not uniform: a conformal test martingale.

    It is the Simple Jumper of Vovk, Petej, Nouretdinov, Ahlberg, Carlsson & Gammerman (2021) with
    more bets and with jumps that become rarer: before row t, a share 1 / (t + 1) of the capital is
    dealt out anew, half of it to no bet. So the capital falls no faster than a power of t while
    nothing happens. `shape` holds many streams at once.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._deal = np.array([0.5, *np.full(len(BETS), 0.5 / len(BETS))])
        self.shares = np.broadcast_to(self._deal, (*shape, len(self._deal))).copy()
        self.log_capital = np.zeros(shape)
        self.n_rows = 0

    def update(self, bets: FloatArray) -> FloatArray:
        """Log of the capital after each of the next rows; `bets` as `payoffs` gives them."""
        path = np.empty(bets.shape[:-1])
        for row, payoff in enumerate(bets):
            jump = 1 / (self.n_rows + 2)
            won = ((1 - jump) * self.shares + jump * self._deal) * payoff
            gain = won.sum(axis=-1)
            self.shares = won / gain[..., None]
            self.log_capital = self.log_capital + np.log(gain)
            self.n_rows += 1
            path[row] = self.log_capital
        return path


def payoffs(p_values: FloatArray) -> FloatArray:
    """What no bet and each of `BETS` make of a capital of 1, in a last axis."""
    return np.stack([np.ones_like(p_values), *(bet(p_values) for bet in BETS)], axis=-1)


class ChangePoint:
    """When rows began to change: where the CUSUM of the bet that wins most began (Page, 1954)."""

    def __init__(self) -> None:
        self.sums = np.zeros(len(BETS))
        self.lowest = np.zeros(len(BETS))
        self.rows = np.zeros(len(BETS), dtype=np.int64)
        self.rejected = np.zeros(len(BETS), dtype=np.int64)
        self.n_rows = self.n_rejected = 0

    def update(self, bets: FloatArray, rejected: NDArray[np.bool_]) -> None:
        """Add rows, of which some are rejected; `bets` as `payoffs` gives them."""
        if not len(bets):
            return
        sums = np.cumsum([self.sums, *np.log(bets[:, 1:])], axis=0)[1:]
        # Of equal sums the last, as the argmin of the reversed sums is.
        last = len(sums) - 1 - np.argmin(sums[::-1], axis=0)
        lowest = sums[last, np.arange(len(BETS))]
        found = lowest <= self.lowest
        self.lowest = np.where(found, lowest, self.lowest)
        self.rows = np.where(found, self.n_rows + last + 1, self.rows)
        n_rejected = self.n_rejected + np.cumsum(rejected)
        self.rejected = np.where(found, n_rejected[last], self.rejected)
        self.sums, self.n_rows = sums[-1], self.n_rows + len(sums)
        self.n_rejected = int(n_rejected[-1])

    def estimate(self) -> tuple[int, int]:
        """Number of rows before the change, and of those rejected among them."""
        best = int(np.argmax(self.sums - self.lowest))
        return int(self.rows[best]), int(self.rejected[best])


# A batch


def two_sample_p_value(scores: FloatArray, calibration: FloatArray) -> float:
    """P-value of "these scores are drawn like the calibration scores"; against any difference.

    The test of Cramer and von Mises for two samples. Equal scores are put in an order by lot, as it
    needs; the lots are the same at every call.
    """
    both = np.concatenate([scores, calibration])
    lots = np.random.default_rng(0).random(len(both))
    ranks = np.empty(len(both))
    ranks[np.lexsort((lots, both))] = np.arange(1, len(both) + 1)
    if min(len(scores), len(calibration)) == 1:
        rank = ranks[0] if len(scores) == 1 else ranks[-1]
        return float(min(1, 2 * min(rank, len(both) + 1 - rank) / len(both)))
    return float(stats.cramervonmises_2samp(ranks[: len(scores)], ranks[len(scores) :]).pvalue)


def chance_lower(scores: FloatArray, calibration: FloatArray) -> float:
    """Chance that one of the scores is lower than a calibration score; ties count one half."""
    ordered = np.sort(calibration)
    lower = np.searchsorted(ordered, scores, "right") + np.searchsorted(ordered, scores, "left")
    return float(1 - lower.mean() / (2 * len(ordered)))


def _ranks_of(margins: Sequence[FloatArray]) -> tuple[int, int]:
    """Between which ranks of the calibration rows of each threshold it lies, summed.

    Without ties both are the same.
    """
    low = high = 0
    for of_threshold in margins:
        below, tied = np.count_nonzero(of_threshold < 0), np.count_nonzero(of_threshold == 0)
        low += int(below + (tied == 1))
        high += min(int(below + 1), len(of_threshold))
    return low, high


def _rejected_at_most(n_rows: int, rank: int, margins: Sequence[FloatArray]) -> FloatArray:
    """Chances of at most 0, ..., n rejected rows, over calibration sets, if nothing has changed.

    The share of rows that fall below a rank of n others is Beta-distributed, and so is the sum over
    thresholds, if shares of classes are as uncertain as so many rows leave them: together they are
    of a Dirichlet distribution.
    """
    if rank == 0:
        return np.ones(n_rows + 1)
    pmf = stats.betabinom.pmf(np.arange(n_rows + 1), n_rows, rank, _places(margins) - rank)
    return np.minimum(np.cumsum(pmf), 1)


def _places(margins: Sequence[FloatArray]) -> int:
    """Places that a new row can take among the calibration rows of its threshold."""
    return sum(len(of_threshold) + 1 for of_threshold in margins)


def expected_rejections(
    n_rows: int, margins: Sequence[FloatArray]
) -> tuple[float, tuple[float, float]]:
    """Share of rows rejected if nothing has changed: its mean, and an interval that holds it.

    `margins` has, for each threshold, how far its calibration rows score above it. Beta-binomial:
    both the calibration rows and the rows are a sample.
    """
    low, high = _ranks_of(margins)
    tail = (1 - COVERAGE) / 2
    fewest = int(np.searchsorted(_rejected_at_most(n_rows, low, margins), tail))
    most = int(np.searchsorted(_rejected_at_most(n_rows, high, margins), 1 - tail))
    mean = high / _places(margins)
    return float(mean), (fewest / n_rows, min(most, n_rows) / n_rows)


def share_p_value(n_rejected: int, n_rows: int, margins: Sequence[FloatArray]) -> float:
    """P-value of "as many rows are rejected as if nothing had changed", two-sided."""
    low, high = _ranks_of(margins)
    as_few = _rejected_at_most(n_rows, low, margins)[n_rejected]
    fewer = _rejected_at_most(n_rows, high, margins)[n_rejected - 1] if n_rejected else 0.0
    return float(min(1, 2 * min(as_few, 1 - fewer)))


def proportion_interval(n_rejected: int, n_rows: int) -> tuple[float, float]:
    """Interval of Clopper and Pearson for the share that is rejected of all such rows."""
    tail = (1 - COVERAGE) / 2
    low = stats.beta.ppf(tail, n_rejected, n_rows - n_rejected + 1) if n_rejected else 0.0
    high = 1.0
    if n_rejected < n_rows:
        high = stats.beta.ppf(1 - tail, n_rejected + 1, n_rows - n_rejected)
    return float(low), float(high)
