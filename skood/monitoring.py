"""Are rows still like the calibration rows? One batch is checked, a stream is watched.

``detector.check_batch(X)`` answers for one batch with a `BatchCheck`. A `DriftMonitor` watches all
rows that come, and raises an alarm in at most a chosen share of streams in which nothing changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from .calibration import _has_threshold
from .detector import SparseEnergyOODDetector
from .exceptions import SeenRowsWarning
from .exchangeability import (
    ChangePoint,
    Martingale,
    OnlinePValues,
    chance_lower,
    expected_rejections,
    payoffs,
    proportion_interval,
    share_p_value,
    two_sample_p_value,
)
from .judging import fitted_detector
from .model_selection.steps import seen_by_last_step
from .notices import quoted, warn_user
from .randomness import random_generator
from .validation import Number

__all__ = ["BatchCheck", "DriftMonitor", "DriftReport"]

FloatArray = NDArray[np.float64]

POINTS = 200
"""Of the history that a monitor keeps, at most."""

SAME_ROWS = 20
"""Rows that may score exactly as calibration rows do by chance."""

VERSION = 1
"""Of the state of a monitor."""

CONSTRAINTS: dict[str, list[Any]] = {
    "false_alarm": [Number(Real, 0, 1, closed="neither")],
    "window": [Number(Integral, 2, None, closed="left")],
}


@dataclass(frozen=True, repr=False)
class BatchCheck:
    """Whether the rows of a batch are like the calibration rows; ``check_batch`` makes it.

    ``str(check)`` is a text. All shares are fractions, all intervals have a coverage of 95 %.

    Parameters
    ----------
    n_rows : int
        Rows of the batch.
    n_calibration : int
        Calibration rows.
    share_rejected : float
        Share of the rows that the detector rejects.
    interval : tuple of float
        Interval of Clopper and Pearson for the share rejected of all rows like these.
    expected_share : float
        Share rejected of rows like the calibration rows.
    expected_interval : tuple of float
        Where the share rejected of as many rows lies if they are like the calibration rows. Both
        are a sample, so it is beta-binomial.
    chance_lower : float
        Chance that a row of the batch scores lower than a calibration row; 0.5 if they are alike.
    scores_p_value : float
        P-value of the two-sample test of Cramer and von Mises between the scores.
    share_p_value : float
        P-value of the share rejected, two-sided.
    false_alarm : float
        Chance that rows like the calibration rows are called unlike them.
    """

    n_rows: int
    n_calibration: int
    share_rejected: float
    interval: tuple[float, float]
    expected_share: float
    expected_interval: tuple[float, float]
    chance_lower: float
    scores_p_value: float
    share_p_value: float
    false_alarm: float

    @property
    def p_value(self) -> float:
        """P-value of "these rows are like the calibration rows", of both tests together."""
        return min(1.0, 2 * min(self.scores_p_value, self.share_p_value))

    @property
    def differs(self) -> bool:
        """Whether the rows are unlike the calibration rows: `p_value` is at most `false_alarm`."""
        return self.p_value <= self.false_alarm

    @property
    def verdict(self) -> str:
        """The answer in words."""
        if not self.differs:
            return f"like the calibration rows, as far as {self.n_rows:,} rows tell"
        return f"unlike the calibration rows: {', '.join(self._differences())}"

    def _differences(self) -> list[str]:
        found = []
        level = self.false_alarm / 2
        if self.scores_p_value <= level:
            unit = np.sqrt((1 / self.n_rows + 1 / self.n_calibration) / 12)
            shift = (self.chance_lower - 0.5) / unit
            found.append(
                "scores are lower"
                if shift > 2
                else "scores are higher, as of rows seen in training"
                if shift < -2
                else "scores are spread differently"
            )
        if self.share_p_value <= level:
            more = self.share_rejected > self.expected_share
            found.append(f"{'more' if more else 'fewer'} rows are rejected than expected")
        return found

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.n_rows:,} rows against {self.n_calibration:,} calibration rows",
                f"rejected: {_percent(self.share_rejected)} {_between(self.interval)}; expected: "
                f"{_percent(self.expected_share)} {_between(self.expected_interval)}; "
                f"p = {self.share_p_value:.2g}",
                f"scores: {_percent(self.chance_lower)} of pairs lower than a calibration score; "
                f"expected: 50.0 %; p = {self.scores_p_value:.2g}",
                f"verdict: {self.verdict} (p = {self.p_value:.2g})",
            ]
        )

    __repr__ = __str__


def _check_batch(detector: SparseEnergyOODDetector, X: Any, false_alarm: float) -> BatchCheck:
    """What ``detector.check_batch`` gives."""
    validate_parameter_constraints(
        {"false_alarm": CONSTRAINTS["false_alarm"]},
        {"false_alarm": false_alarm},
        caller_name="check_batch",
    )
    scores, rejected = _judged(detector, X)
    detector._doubts.warn()
    return _check_new_scores(scores, rejected, detector, false_alarm)


def _check_new_scores(
    scores: FloatArray,
    rejected: NDArray[np.bool_],
    detector: SparseEnergyOODDetector,
    false_alarm: float,
) -> BatchCheck:
    """Compare scores with the calibration scores, which should be those of other rows."""
    calibration = np.sort(detector.calibration_scores_)
    _warn_if_seen(_count_same(scores, calibration), len(scores), calibration)
    return _check_scores(scores, rejected, detector, false_alarm)


def _judged(detector: SparseEnergyOODDetector, X: Any) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Scores of rows, and whether the detector rejects them."""
    scores, winners = detector._scores_and_classes(X)
    return scores, scores - detector._thresholds(winners) < 0


def _margins_by_threshold(detector: SparseEnergyOODDetector) -> list[FloatArray]:
    """How far the calibration rows of each threshold score above it.

    Classes without a threshold of their own share one.
    """
    classes = detector._calibration_classes
    margins = detector.calibration_scores_ - detector._thresholds(classes)
    if classes is None:
        return [margins]
    has_own = _has_threshold(classes, len(detector.classes_), detector.tpr_)
    of_classes = [margins[classes == one] for one in np.flatnonzero(has_own)]
    return of_classes if has_own.all() else [*of_classes, margins[~has_own[classes]]]


def _check_scores(
    scores: FloatArray,
    rejected: NDArray[np.bool_],
    detector: SparseEnergyOODDetector,
    false_alarm: float,
) -> BatchCheck:
    """Compare scores of a batch with the calibration scores."""
    calibration = detector.calibration_scores_
    margins = _margins_by_threshold(detector)
    n_rows, n_rejected = len(scores), int(np.count_nonzero(rejected))
    expected_share, expected_interval = expected_rejections(n_rows, margins)
    return BatchCheck(
        n_rows=n_rows,
        n_calibration=len(calibration),
        share_rejected=n_rejected / n_rows,
        interval=proportion_interval(n_rejected, n_rows),
        expected_share=expected_share,
        expected_interval=expected_interval,
        chance_lower=chance_lower(scores, calibration),
        scores_p_value=two_sample_p_value(scores, calibration),
        share_p_value=share_p_value(n_rejected, n_rows, margins),
        false_alarm=false_alarm,
    )


@dataclass(frozen=True, repr=False)
class DriftReport:
    """What a `DriftMonitor` has seen; ``monitor.report()`` makes it.

    ``str(report)`` is a text. Rows are counted from 0, in the order in which they came.

    Parameters
    ----------
    n_rows : int
        Rows seen.
    alarm_row : int or None
        Row at which the alarm was raised; None if there was none.
    change_row : int or None
        First row of the change, as estimated at the alarm.
    share_since : float or None
        Share of the rows rejected since then.
    martingale : float
        Capital of the martingale now.
    alarm_line : float
        Capital at which the alarm is raised, ``1 / false_alarm``.
    window : BatchCheck or None
        Check of the most recent rows; None if there are no rows. Its `false_alarm` is that of a
        single look.
    """

    n_rows: int
    alarm_row: int | None
    change_row: int | None
    share_since: float | None
    martingale: float
    alarm_line: float
    window: BatchCheck | None

    @property
    def alarm(self) -> bool:
        """Whether the alarm was raised."""
        return self.alarm_row is not None

    def __str__(self) -> str:
        lines = [
            f"{self.n_rows:,} rows seen, martingale {self.martingale:.3g} (alarm at "
            f"{self.alarm_line:.3g})"
        ]
        if self.share_since is not None:
            lines.append(
                f"ALARM at row {self.alarm_row:,}; changed since about row {self.change_row:,}, "
                f"{_percent(self.share_since)} rejected since then"
            )
        if self.window is not None:
            lines += ["", "the most recent rows:", str(self.window)]
        return "\n".join(lines)

    __repr__ = __str__


class DriftMonitor:
    """Watch a stream of rows, and raise an alarm once they are unlike the calibration rows.

    If the calibration rows and all rows of the stream are exchangeable, which means that nothing
    changes, the chance of an alarm at any time is at most `false_alarm`, for streams of any length
    and any number of calibration rows.

    A conformal test martingale bets on the p-values of the rows. Each is taken against the
    calibration rows and all earlier rows, so that p-values are independent: those against the
    calibration rows alone share their luck, and would raise an alarm sooner or later. The price: a
    change is learnt as it goes on. It must be seen before it has as many rows as there were before
    it, so few calibration rows show strong changes only.

    Parameters
    ----------
    detector : SparseEnergyOODDetector
        A fitted detector, calibrated on fresh rows; or a pipeline, a search, a `FrozenEstimator` or
        a `RejectingClassifier` around one.
    false_alarm : float, default=0.01
        Chance of an alarm in a stream in which nothing changes, between 0 and 1.
    window : int, default=500
        Number of most recent rows that the report compares with the calibration rows, at least 2.
    random_state : int, RandomState or None, default=None
        Seed of the lots that p-values need in a finite sample, and that put equal scores in an
        order. The state holds it.

    Attributes
    ----------
    n_rows : int
        Rows seen.
    history : ndarray of shape (k, 4)
        At most 200 points in time: rows seen; log10 of the martingale; share rejected of the
        window; p-value of the window.

    Raises
    ------
    TypeError
        If `detector` holds no fitted `SparseEnergyOODDetector`.
    NotFittedError
        If it is not fitted.
    ValueError
        If another parameter is out of range.

    Warns
    -----
    ThresholdWarning
        If the threshold of ``fit`` is doubtful: then so are the calibration scores.

    References
    ----------
    Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", Springer 2005 (martingales).
    Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection",
    COPA 2021 (bets). Ville, "Etude critique de la notion de collectif", 1939 (the alarm line).
    Page, "Continuous inspection schemes", Biometrika 41, 1954 (when it began).

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skood import SparseEnergyOODDetector
    >>> from skood.monitoring import DriftMonitor
    >>> X, y = load_digits(return_X_y=True)
    >>> detector = SparseEnergyOODDetector(random_state=0).fit(X[:1000], y[:1000])
    >>> monitor = DriftMonitor(detector.calibrate(X[1000:1400]), random_state=0)
    >>> monitor.update(16 - X[1400:1500])
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = CONSTRAINTS | {
        "random_state": ["random_state"]
    }

    def __init__(
        self,
        detector: Any,
        *,
        false_alarm: float = 0.01,
        window: int = 500,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        validate_parameter_constraints(
            self._parameter_constraints,
            {"false_alarm": false_alarm, "window": window, "random_state": random_state},
            caller_name="DriftMonitor",
        )
        self.detector = detector
        self.false_alarm, self.window = float(false_alarm), int(window)
        self._begin(int(random_generator(random_state).randint(2**31)))

    def _begin(self, seed: int) -> None:
        detector = fitted_detector(self.detector, "detector")
        detector._doubts.warn()
        self._seed, self._calibrated = seed, _digest(detector)
        self._scores_then, self._offset_then = detector.calibration_scores_, detector.offset_
        self._class_offsets_then = detector.class_offsets_
        self._calibration = np.sort(self._scores_then)
        self._p_values = OnlinePValues(detector.calibration_scores_, seed)
        self._martingale, self._change = Martingale(), ChangePoint()
        self._recent, self._recent_rejected = np.empty(0), np.empty(0, dtype=bool)
        self._n_same = 0
        self._alarm = np.empty(0, dtype=np.int64)  # or its row, that of the change, rejected before
        self._stride, self._points = max(1, self.window // 10), np.empty((0, 4))
        self._has_warned = False

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return self._p_values.n_rows

    @property
    def alarm(self) -> bool:
        """Whether the alarm was raised. Once raised, it stays on."""
        return len(self._alarm) > 0

    @property
    def rows_a_point(self) -> int:
        """Rows between two points of the history; it grows with the stream."""
        return self._stride

    @property
    def history(self) -> FloatArray:
        """Points in time: rows seen, log10 of the martingale, share rejected, window p-value."""
        return self._points.copy()

    def update(self, X: Any) -> bool:
        """Add rows in the order in which they came; a single row is a batch of one.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of ``fit``.

        Returns
        -------
        bool
            Whether the alarm was raised, now or before.

        Raises
        ------
        ValueError
            If X does not look like the rows of ``fit``, or if the detector was calibrated or fitted
            since the monitor was made. The monitor stays as it was.

        Warns
        -----
        SeenRowsWarning
            If most rows score exactly as calibration rows do.
        """
        detector = self._current()
        scores, rejected = _judged(detector, seen_by_last_step(self.detector, X))
        while len(scores):
            n_rows = self._stride - self.n_rows % self._stride
            self._add(scores[:n_rows], rejected[:n_rows], detector)
            scores, rejected = scores[n_rows:], rejected[n_rows:]
        if not self._has_warned:
            self._has_warned = _warn_if_seen(self._n_same, self.n_rows, self._calibration)
        return self.alarm

    def report(self) -> DriftReport:
        """Report what was seen.

        Returns
        -------
        DriftReport
            Whether and when the alarm was raised, since when rows have changed, and how much.
        """
        detector = self._current()
        alarm_row, change_row, since = None, None, None
        if self.alarm:
            alarm_row, change_row, rejected_before = self._alarm.tolist()
            since = (self._change.n_rejected - rejected_before) / (self.n_rows - change_row)
        return DriftReport(
            n_rows=self.n_rows,
            alarm_row=alarm_row,
            change_row=change_row,
            share_since=since,
            martingale=float(np.exp(np.minimum(self._martingale.log_capital, 700))),
            alarm_line=1 / self.false_alarm,
            window=self._window(detector) if self.n_rows else None,
        )

    def get_state(self) -> dict[str, Any]:
        """Everything that the monitor knows, as a dict that JSON can hold.

        Returns
        -------
        dict
            Some 2,000 numbers at most, however many rows were seen, if `window` is 500.
        """
        return {
            "version": VERSION,
            "calibrated": self._calibrated,
            "false_alarm": self.false_alarm,
            "window": self.window,
            "seed": self._seed,
            **{
                _key(owner, name): np.asarray(getattr(owner, name)).tolist()
                for owner, name in self._kept()
            },
        }

    @classmethod
    def from_state(cls, detector: Any, state: Mapping[str, Any]) -> Self:
        """Continue where another monitor stopped.

        Parameters
        ----------
        detector : SparseEnergyOODDetector
            The detector of that monitor, or the same one loaded from a file.
        state : dict
            What `get_state` gave.

        Returns
        -------
        DriftMonitor
            It gives what the other would have given.

        Raises
        ------
        ValueError
            If `state` is none, or is that of a detector with another calibration.
        """
        fitted_detector(detector, "detector")
        try:
            version, seed = state["version"], int(state["seed"])
            monitor = cls(detector, false_alarm=state["false_alarm"], window=state["window"])
            if version != VERSION or len(state) != len(monitor.get_state()):
                raise KeyError("version")
            if state["calibrated"] == monitor._calibrated:
                monitor._begin(seed)
                monitor._restore(state)
                return monitor
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"state={quoted(state)} is no state of a DriftMonitor of this version of skood; "
                "expected what get_state() gave."
            ) from error
        raise ValueError(
            "state belongs to a detector with another calibration. Pass the detector that the "
            "monitor watched, or make a new monitor: DriftMonitor(detector)."
        )

    def _kept(self) -> list[tuple[Any, str]]:
        """What the state holds: attributes, and whose they are."""
        return [
            (self._p_values, "weights"),
            (self._p_values, "n_rows"),
            *((self._martingale, name) for name in ("shares", "log_capital", "n_rows")),
            *((self._change, name) for name in ("sums", "lowest", "rows", "rejected")),
            *((self._change, name) for name in ("n_rows", "n_rejected")),
            *((self, name) for name in ("_recent", "_recent_rejected", "_n_same")),
            *((self, name) for name in ("_alarm", "_stride", "_points")),
        ]

    def _restore(self, state: Mapping[str, Any]) -> None:
        for owner, name in self._kept():
            now = np.asarray(getattr(owner, name))
            value = np.array(state[_key(owner, name)], dtype=now.dtype)
            if now.size:
                value = value.reshape(now.shape)
            elif now.ndim > 1 or not value.size:
                value = value.reshape(-1, *now.shape[1:])
            is_finite = value.dtype.kind != "f" or np.isfinite(value).all()
            if value.ndim != now.ndim or not is_finite:
                raise ValueError(name)
            setattr(owner, name, value if now.ndim else value.item())
        rows = {owner.n_rows for owner in (self._p_values, self._martingale, self._change)}
        total = self._p_values.weights.sum() - len(self._calibration) - 1
        counts = self._n_same, self._change.n_rejected
        same = len(self._recent) == len(self._recent_rejected)
        if rows != {total} or self._stride < 1 or min(counts) < 0 or not same:
            raise ValueError("rows")

    def _current(self) -> SparseEnergyOODDetector:
        detector = fitted_detector(self.detector, "detector")
        # At every call of a single row: the digest only if the array is another.
        is_same = (
            detector.calibration_scores_ is self._scores_then
            and detector.class_offsets_ is self._class_offsets_then
        )
        if not (is_same and detector.offset_ == self._offset_then) and (
            _digest(detector) != self._calibrated
        ):
            raise ValueError(
                "The detector was fitted or calibrated after this monitor was made, so what the "
                "monitor has counted no longer fits. Make a new one: DriftMonitor(detector)."
            )
        return detector

    def _window(self, detector: SparseEnergyOODDetector) -> BatchCheck:
        """Check of the most recent rows."""
        return _check_scores(self._recent, self._recent_rejected, detector, self.false_alarm)

    def _add(
        self, scores: FloatArray, rejected: NDArray[np.bool_], detector: SparseEnergyOODDetector
    ) -> None:
        """Add rows up to the next point of the history."""
        first = self.n_rows
        self._recent = np.concatenate([self._recent, scores])[-self.window :]
        self._recent_rejected = np.concatenate([self._recent_rejected, rejected])[-self.window :]
        bets = payoffs(self._p_values.update(scores))
        capital = self._martingale.update(bets)
        above = np.flatnonzero(capital >= -np.log(self.false_alarm))
        if len(above) and not self.alarm:
            until = int(above[0]) + 1
            self._change.update(bets[:until], rejected[:until])
            self._alarm = np.array([first + above[0], *self._change.estimate()])
            bets, rejected = bets[until:], rejected[until:]
        self._change.update(bets, rejected)
        self._n_same += _count_same(scores, self._calibration)
        if self.n_rows % self._stride == 0:
            self._remember(detector)

    def _remember(self, detector: SparseEnergyOODDetector) -> None:
        """Add a point to the history; if there are many, keep every other one."""
        check = self._window(detector)
        capital = float(self._martingale.log_capital) / np.log(10)
        point = [self.n_rows, capital, check.share_rejected, check.p_value]
        self._points = np.vstack([self._points, point])
        if len(self._points) == POINTS:
            self._points, self._stride = self._points[1::2], 2 * self._stride


def _key(owner: Any, name: str) -> str:
    return f"{type(owner).__name__}.{name.lstrip('_')}"


def _digest(detector: SparseEnergyOODDetector) -> str:
    """What tells one calibration from another."""
    offsets = detector.class_offsets_
    thresholds = detector.offset_ if offsets is None else offsets
    scores = np.append(detector.calibration_scores_, thresholds)
    return hashlib.sha256(scores.tobytes()).hexdigest()


def _count_same(scores: FloatArray, calibration: FloatArray) -> int:
    """How many scores are exactly one of the calibration scores, which are sorted."""
    places = np.searchsorted(calibration, scores)
    return int(np.count_nonzero(calibration[np.minimum(places, len(calibration) - 1)] == scores))


def _warn_if_seen(n_same: int, n_rows: int, calibration: FloatArray) -> bool:
    """Warn if most rows score exactly as calibration rows, unless many of these score the same."""
    is_likely = n_same > max(SAME_ROWS, n_rows / 2)
    if is_likely and len(np.unique(calibration)) > 0.9 * len(calibration):
        warn_user(
            f"{n_same} of {n_rows} rows score exactly as calibration rows do, so they are probably "
            "these rows, and tell nothing about others. Pass rows that came later.",
            SeenRowsWarning,
        )
        return True
    return False


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _between(interval: tuple[float, float]) -> str:
    return f"({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
