"""Streams that are watched, batches that are checked, outliers that are selected."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from sklearn.ensemble import IsolationForest

from skood import SparseEnergyOODDetector
from skood.calibration import conformal_p_values, outliers_at_fdr
from skood.monitoring import DriftMonitor
from skood.plotting import DriftDisplay
from skood.plotting.shared import new_axes
from skood.reporting import report

from .common import FRESH, OUTLIERS, Told, X, Y, case, fit, fitted, network, says

CALIBRATED = functools.cache(lambda: fit(network(), X, Y).calibrate(FRESH[:40]))
FEW = functools.cache(lambda: fit(network(), X, Y).calibrate(FRESH[:8], tpr=0.8))


def changed() -> DriftMonitor:
    """A monitor of a detector that is calibrated anew."""
    detector = fit(network(), X, Y).calibrate(FRESH)
    monitor = DriftMonitor(detector, random_state=0)
    detector.calibrate(FRESH[:40])
    return monitor


def number(told: Told, before: str) -> float:
    """A number that a message names after these words."""
    told.says(before)
    return float(told.message.partition(before)[2].split()[0].rstrip(".,"))


def calibrated_on_enough(told: Told) -> Any:
    told.says("Pass more rows to calibrate(X)")
    n_rows = int(number(told, "needs at least "))
    detector = fit(network(), X, Y).calibrate(FRESH[:n_rows], tpr=0.8)
    return detector.select_outliers(X)


def watched(n_rows: int) -> DriftMonitor:
    monitor = DriftMonitor(fitted(), window=20, random_state=0)
    if n_rows:
        monitor.update(X[:n_rows])
    return monitor


def draw(n_rows: int = 20, **options: Any) -> DriftDisplay:
    return DriftDisplay.from_monitor(watched(n_rows), **options)


def long_enough(told: Told) -> DriftDisplay:
    return draw(int(number(told, "pass it at least ")))


def resumed(detector: SparseEnergyOODDetector, state: Any) -> bool:
    return DriftMonitor.from_state(detector, state).update(X)


CASES = [
    case(
        "which are none of the classes",
        lambda: report(fitted(), X, Y + 1),
        says("Pass the true class of each row", lambda: report(fitted(), X, Y)),
        says("and outliers apart, as X_ood", lambda: report(fitted(), X, Y, X_ood=OUTLIERS)),
    ),
    case(
        "expected the name of a file that ends in",
        lambda: report(fitted(), X).save("report.pdf"),
        says("in .md or .html", lambda: report(fitted(), X).save("report.md")),
    ),
    case(
        "holds no detector",
        lambda: DriftMonitor(IsolationForest().fit(X)),
        says("a fitted SparseEnergyOODDetector", lambda: DriftMonitor(fitted())),
    ),
    case(
        "was fitted or calibrated after this monitor",
        lambda: changed().update(X),
        lambda told: told("DriftMonitor(detector)", DriftMonitor=DriftMonitor, detector=fitted()),
    ),
    case(
        "is no state of a DriftMonitor",
        lambda: DriftMonitor.from_state(fitted(), {"rows": 3}),
        says("what get_state() gave", lambda: resumed(fitted(), watched(9).get_state())),
    ),
    case(
        "belongs to a detector with another calibration",
        lambda: DriftMonitor.from_state(CALIBRATED(), watched(9).get_state()),
        says(
            "Pass the detector that the monitor watched",
            lambda: resumed(fitted(), watched(9).get_state()),
        ),
        lambda told: told("DriftMonitor(detector)", DriftMonitor=DriftMonitor, detector=fitted()),
    ),
    case(
        "rows score exactly as calibration rows do",
        lambda: fitted().check_batch(FRESH),
        says("Pass rows that came later", lambda: fitted().check_batch(X)),
    ),
    case(
        "are too few to select any outliers",
        lambda: FEW().select_outliers(X),
        calibrated_on_enough,
        says("a higher fdr", lambda: FEW().select_outliers(X, fdr=0.2)),
    ),
    case(
        "p_values range from",
        lambda: outliers_at_fdr([-0.5, 7.0], 0.1),
        says(
            "as conformal_p_values gives them",
            lambda: outliers_at_fdr(conformal_p_values([0.0], np.arange(20.0), 0.9), 0.1),
        ),
    ),
    case(
        "expected a DriftMonitor",
        lambda: DriftDisplay.from_monitor(fitted()),
        lambda told: draw(),
    ),
    case("too few to draw", lambda: draw(1), long_enough),
    case(
        "axes; expected 3",
        lambda: draw(ax=new_axes(2)),
        says("expected 3", lambda: draw(ax=new_axes(3))),
    ),
]
