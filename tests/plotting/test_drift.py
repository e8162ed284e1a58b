from __future__ import annotations

import numpy as np
import pytest
from pictures import detector, rows

from skood.monitoring import DriftMonitor
from skood.plotting import DriftDisplay

HISTORY = [[50, -0.2, 0.04, 0.6], [100, 0.9, 0.10, 1e-3], [150, 4.1, 0.19, 0.0]]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_panels_show_the_history_and_the_alarm_line():
    display = DriftDisplay(
        history=HISTORY, false_alarm=0.01, expected=(0.02, 0.09), alarm_row=117, change_row=88
    ).plot()
    martingale, share, p_value = display.axes_
    np.testing.assert_allclose(martingale.lines[0].get_ydata(), [10**-0.2, 10**0.9, 10**4.1])
    np.testing.assert_allclose(share.lines[0].get_ydata(), [0.04, 0.10, 0.19])
    np.testing.assert_allclose(p_value.lines[0].get_ydata(), [0.6, 1e-3, 1e-16])
    for panel in display.axes_:
        np.testing.assert_allclose(panel.lines[0].get_xdata(), [50, 100, 150])
    assert (martingale.get_yscale(), p_value.get_yscale()) == ("log", "log")
    assert legend(martingale) == ["change, estimated: row 88", "alarm: row 117", "alarm at 100"]
    assert martingale.lines[-1].get_ydata() == [100, 100]
    assert "expected" in legend(share)
    assert p_value.get_xlabel() == "rows seen"
    display.figure_.canvas.draw()


def test_a_capital_beyond_all_numbers_is_drawn():
    history = [[50, 1.0, 0.5, 0.1], [100, 4000.0, 0.5, 0.0]]
    display = DriftDisplay(history=history, false_alarm=0.01).plot()
    display.figure_.canvas.draw()
    assert np.isfinite(display.axes_[0].lines[0].get_ydata()).all()


def test_from_a_monitor():
    fitted = detector().fit(rows(3, 300))
    monitor = DriftMonitor(fitted.calibrate(rows(3, 200)), window=50, random_state=0)
    with pytest.raises(ValueError, match="monitor has seen 0 rows, too few to draw"):
        DriftDisplay.from_monitor(monitor)
    monitor.update(rows(3, 100))
    assert DriftDisplay.from_monitor(monitor).alarm_row is None
    monitor.update(rows(1, 150))
    display = DriftDisplay.from_monitor(monitor)
    report = monitor.report()
    assert report.alarm
    assert (display.alarm_row, display.change_row) == (report.alarm_row, report.change_row)
    np.testing.assert_array_equal(display.history, monitor.history)
    assert tuple(display.expected) == report.window.expected_interval


def test_what_is_no_history_is_refused():
    with pytest.raises(ValueError, match=r"history has shape \(1, 3\); expected \(k, 4\)"):
        DriftDisplay(history=[[1, 2, 3]], false_alarm=0.01)
