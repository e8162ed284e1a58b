"""What a monitor has seen of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..notices import quoted
from ..validation import Number, valid_array
from .shared import COLOURS, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["DriftDisplay"]

ROW = [Number(Integral, 0, None, closed="left"), None]
LOWEST = 1e-16
"""P-value that is drawn for lower ones, 0 among them."""


class DriftDisplay:
    """The martingale, the share rejected and the p-value of the window, over the rows of a stream.

    Make it with `from_monitor`. The alarm line is that of the martingale, on a logarithmic scale.
    Once it is crossed, vertical lines show the alarm and the estimated change.

    Parameters
    ----------
    history : array-like of shape (k, 4)
        Points in time: rows seen; log10 of the martingale; share rejected of the window; p-value of
        the window.
    false_alarm : float
        Chance of an alarm if nothing changes; the alarm line is ``1 / false_alarm``.
    expected : array-like of shape (2,), default=None
        Where the share rejected of a window lies if nothing has changed; a grey band.
    alarm_row : int, default=None
        Row at which the alarm was raised.
    change_row : int, default=None
        First row of the estimated change.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes
        The three panels, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If `history` is not finite numbers of that shape, or another argument is of the wrong type
        or out of range.

    References
    ----------
    Okabe & Ito, "Color universal design: how to make figures and presentations that are friendly to
    colorblind people", 2008 (colours).

    Examples
    --------
    >>> from skood.plotting import DriftDisplay
    >>> history = [[50, -0.2, 0.04, 0.6], [100, 0.9, 0.10, 1e-3], [150, 4.1, 0.19, 1e-7]]
    >>> display = DriftDisplay(history=history, false_alarm=0.01, alarm_row=117).plot()
    >>> [ax.get_ylabel() for ax in display.axes_]
    ['martingale', 'share rejected', 'p-value']
    """

    def __init__(
        self,
        *,
        history: ArrayLike,
        false_alarm: float,
        expected: ArrayLike | None = None,
        alarm_row: int | None = None,
        change_row: int | None = None,
    ) -> None:
        validate_parameter_constraints(
            {
                "false_alarm": [Number(Real, 0, 1, closed="neither")],
                "alarm_row": ROW,
                "change_row": ROW,
            },
            {"false_alarm": false_alarm, "alarm_row": alarm_row, "change_row": change_row},
            caller_name=type(self).__name__,
        )
        self.history = _with_columns(history, "history", ("k", "4"))
        self.false_alarm = float(false_alarm)
        self.expected = None if expected is None else _with_columns(expected, "expected", ("2",))
        self.alarm_row, self.change_row = alarm_row, change_row

    @classmethod
    def from_monitor(cls, monitor: Any, *, ax: Sequence[Axes] | None = None) -> Self:
        """Draw what a monitor has seen.

        Parameters
        ----------
        monitor : skood.monitoring.DriftMonitor
            A monitor that has seen some rows.
        ax : array-like of matplotlib.axes.Axes, default=None
            Axes to draw on, one for each of the three panels; None makes a figure.

        Returns
        -------
        DriftDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `monitor` is no `DriftMonitor`.
        ValueError
            If it has seen too few rows for a point of its history.
        """
        if not hasattr(monitor, "history") or not hasattr(monitor, "report"):
            raise TypeError(f"monitor={quoted(monitor)} is none; expected a DriftMonitor.")
        history = monitor.history
        if not len(history):
            raise ValueError(
                f"monitor has seen {monitor.n_rows} rows, too few to draw; pass it at least "
                f"{monitor.rows_a_point} by update(X)."
            )
        report = monitor.report()
        return cls(
            history=history,
            false_alarm=monitor.false_alarm,
            expected=report.window.expected_interval,
            alarm_row=report.alarm_row,
            change_row=report.change_row,
        ).plot(ax)

    def plot(self, ax: Sequence[Axes] | None = None) -> Self:
        """Draw the panels.

        Parameters
        ----------
        ax : array-like of matplotlib.axes.Axes, default=None
            Axes to draw on, one for each of the three panels; None makes a figure.

        Returns
        -------
        DriftDisplay
            The display itself.

        Raises
        ------
        ValueError
            If there is not one axes for each panel.
        """
        axes = panels(ax, 3, "for martingale, share rejected and p-value")
        rows, capital, share, p_values = self.history.T
        lines = (10.0 ** np.minimum(capital, 100), share, np.maximum(p_values, LOWEST))
        labels = ("martingale", "share rejected", "p-value")
        for panel, values, label, colour in zip(axes, lines, labels, COLOURS, strict=False):
            panel.plot(rows, values, color=colour)
            panel.set_ylabel(label)
            self._mark(panel)
        axes[0].set_yscale("log")
        axes[0].axhline(
            1 / self.false_alarm,
            color="black",
            linestyle="--",
            label=f"alarm at {1 / self.false_alarm:g}",
        )
        if self.expected is not None:
            axes[1].axhspan(*self.expected, color="0.85", label="expected", zorder=0)
            axes[1].legend(fontsize="small")
        axes[1].set_ylim(bottom=0)
        axes[2].set_yscale("log")
        axes[2].set_xlabel("rows seen")
        axes[0].legend(fontsize="small")
        self.axes_: NDArray[Any] = axes
        self.figure_: Figure | SubFigure = axes[0].figure
        return self

    def _mark(self, panel: Axes) -> None:
        marks = ((self.change_row, ":", "change, estimated"), (self.alarm_row, "-", "alarm"))
        for row, style, name in marks:
            if row is not None:
                label = f"{name}: row {row:,}"
                panel.axvline(row, color="black", linestyle=style, linewidth=1, label=label)


def _with_columns(values: ArrayLike, name: str, axes: tuple[str, ...]) -> NDArray[np.float64]:
    """Numbers of which the last axis is as long as its name says."""
    array = valid_array(values, name, axes).astype(np.float64)
    if array.shape[-1] != int(axes[-1]):
        raise ValueError(f"{name} has shape {array.shape}; expected ({', '.join(axes)}).")
    return array
