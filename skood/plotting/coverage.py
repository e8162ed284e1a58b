"""Which rows a classifier that rejects keeps: how often it errs on them, and of which classes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import validate_parameter_constraints

from ..judging import Share, fitted_detector, judged, known_labels, shares_by_class
from ..labels import as_labels, labels_named
from ..metrics import risk_coverage_curve
from ..notices import quoted
from ..validation import Number, number_of_rows, valid_scores, valid_truths
from .shared import COLOURS, Display, looks, markers_at, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassCoverageDisplay", "RiskCoverageDisplay"]

N_POINTS = 2000
"""Most points of a curve; a picture does not show that there are more."""

MOST_CLASSES = 40
"""That are drawn."""

CLASS_HEIGHT = 0.26  # inches


class RiskCoverageDisplay(Display):
    """Risk against coverage of a classifier that rejects, with the operating point.

    Make it with `from_estimator` or `from_predictions`. For each share of rows kept, the coverage,
    a curve gives the share of wrong ones among them, the risk [1]_ [2]_. Rows with the highest
    scores are kept first. A black marker on each curve is what the threshold keeps. The legend
    gives the area under each curve, `skood.metrics.aurc`.

    Parameters
    ----------
    scores : array-like of shape (n,), or dict of str to array-like
        Scores of rows by one detector, or by several by name; finite, higher is kept earlier.
    correct : array-like of shape (n,), or dict of str to array-like
        Whether the class is right on each row, for each detector. An outlier counts as wrong.
    threshold : float, default=None
        Rows with at least this score are kept. If each detector has a threshold of its own, pass
        scores minus threshold, and 0. None marks no point.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked, NaN or infinite, if `correct` does
        not hold one truth value a row, or if `threshold` is not a finite number.

    Notes
    -----
    At a coverage of 1 the risk is that of the classifier without rejection. If few rows are kept,
    single rows move the curve. Within rows of equal score it is the mean over their orders. A curve
    is drawn through at most 2000 points.

    References
    ----------
    .. [1] El-Yaniv, R. & Wiener, Y., "On the foundations of noise-free selective classification",
       JMLR 11, 2010.
    .. [2] Geifman, Y. & El-Yaniv, R., "Selective classification for deep neural networks", NeurIPS
       2017.

    Examples
    --------
    >>> from skood.plotting import RiskCoverageDisplay
    >>> display = RiskCoverageDisplay.from_predictions(
    ...     [4, 3, 2, 1], [True, True, False, True], threshold=2
    ... )
    >>> print(display.ax_.get_legend().get_texts()[0].get_text())
    detector: AURC 0.146
    kept: 75.0 %, of which 33.3 % are wrong
    """

    def __init__(
        self,
        *,
        scores: ArrayLike | Mapping[str, ArrayLike],
        correct: ArrayLike | Mapping[str, ArrayLike],
        threshold: float | None = None,
    ) -> None:
        validate_parameter_constraints(
            {"threshold": [Number(Real, None, None, closed="neither"), None]},
            {"threshold": threshold},
            caller_name=type(self).__name__,
        )
        self.threshold = None if threshold is None else float(threshold)
        of_scores, of_correct = _by_name(scores, "scores"), _by_name(correct, "correct")
        if set(of_scores) != set(of_correct):
            raise ValueError(
                f"scores has the names {quoted(list(of_scores))}, correct "
                f"{quoted(list(of_correct))}; expected the same detectors in both."
            )
        self.scores = {
            name: valid_scores(each, f"scores[{name!r}]", finite=True).astype(np.float64)
            for name, each in of_scores.items()
        }
        self.correct = {
            name: valid_truths(of_correct[name], f"correct[{name!r}]", len(each))
            for name, each in self.scores.items()
        }

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: ArrayLike,
        *,
        ax: Axes | None = None,
    ) -> Self:
        """Classify rows with one or several fitted detectors, and draw.

        Parameters
        ----------
        estimator : estimator, or dict of str to estimator
            A fitted `SparseEnergyOODDetector`, or a pipeline, a search or a `RejectingClassifier`
            around one; or several by name. The operating point is what each keeps.
        X : array-like of shape (n, ...)
            Rows that the detectors were not trained on.
        y : array-like of shape (n,)
            True classes. A row with another label is an outlier: if it is kept, that is an error.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        RiskCoverageDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If an estimator holds no detector.
        ValueError
            If there is no estimator, or no row of y is of a class.

        Warns
        -----
        ThresholdWarning
            If the threshold of ``fit`` is doubtful; ``calibrate`` clears that.
        """
        scores, correct = {}, {}
        for name, each in _by_name(estimator, "estimator").items():
            detector = fitted_detector(each, "estimator")
            labels = as_labels(y, number_of_rows(X, "X"))
            known_labels(labels, detector, "y", outliers=True)
            judgement = judged(each, X)
            scores[name], correct[name] = judgement.margins, judgement.classes == labels
        return cls.from_predictions(scores, correct, threshold=0, ax=ax)

    @classmethod
    def from_predictions(
        cls,
        scores: ArrayLike | Mapping[str, ArrayLike],
        correct: ArrayLike | Mapping[str, ArrayLike],
        *,
        threshold: float | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw scores and whether the classes are right.

        Parameters
        ----------
        scores : array-like of shape (n,), or dict of str to array-like
            Scores of rows by one detector, or by several by name.
        correct : array-like of shape (n,), or dict of str to array-like
            Whether the class is right on each row, for each detector.
        threshold : float, default=None
            Rows with at least this score are kept. None marks no point.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        RiskCoverageDisplay
            The display, drawn.
        """
        return cls(scores=scores, correct=correct, threshold=threshold).plot(ax)

    def _draw(self, ax: Axes) -> None:
        for i, (look, name) in enumerate(zip(looks(), self.scores, strict=False)):
            coverage, risk = risk_coverage_curve(self.scores[name], self.correct[name])
            drawn = np.unique(np.linspace(0, len(risk) - 1, N_POINTS).astype(int))
            label, point = (
                f"{wrapped(name, 1)}: AURC {risk.mean():.3g}",
                self._operating_point(name),
            )
            if point is not None:
                kept, wrong = point
                label += f"\nkept: {100 * kept:.1f} %, of which {100 * wrong:.1f} % are wrong"
                ax.plot(
                    *point,
                    color="black",
                    linestyle="none",
                    marker=look.marker,
                    markersize=9,
                    markeredgecolor="white",
                    zorder=3,
                )
            ax.plot(
                coverage[drawn],
                risk[drawn],
                **look.options,
                markevery=markers_at(i),
                label=label,
            )
        ax.set(
            xlabel="coverage: share of rows kept",
            ylabel="risk: share wrong of the rows kept",
            xlim=(0, 1.02),
        )
        ax.set_ylim(bottom=0)
        ax.legend(loc="upper left", handlelength=3.5, fontsize="small")

    def _operating_point(self, name: str) -> tuple[float, float] | None:
        """Coverage and risk at the threshold, if there is one that keeps any rows."""
        if self.threshold is None:
            return None
        kept = self.scores[name] >= self.threshold
        if not kept.any():
            return None
        return float(kept.mean()), float(np.mean(~self.correct[name][kept]))


class ClassCoverageDisplay(Display):
    """Share of the rows of each class that is kept, with intervals and the target.

    Make it with `from_estimator` or `from_predictions`. One threshold for all rows keeps fewer of
    some classes. Classes stand in the order of their share, the lowest at the top, with intervals
    of Clopper and Pearson [1]_ of 95 %. The target is a vertical line. If the whole interval of a
    class is below it, its marker is filled.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        True classes.
    kept : array-like of shape (n,), bool
        Whether each row is kept.
    target : float, default=0.95
        Share of the rows of each class that should be kept, between 0 and 1.

    Attributes
    ----------
    shares : dict of label to float
        Share of the rows of each class that is kept, in the order of the labels.
    intervals : dict of label to tuple of float
        The intervals.
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If `y_true` holds no labels, `kept` does not hold one truth value a row, or `target` is not
        between 0 and 1.

    Notes
    -----
    Of more than 40 classes, the 40 with the lowest shares are drawn. Of 20 classes that are all
    kept as they should be, one is expected to have an interval beside the target.
    ``calibrate(X, per_class=True)`` keeps the same share of each predicted class.

    References
    ----------
    .. [1] Clopper, C. & Pearson, E. S., "The use of confidence or fiducial limits illustrated in
       the case of the binomial", Biometrika 26, 1934.

    Examples
    --------
    >>> from skood.plotting import ClassCoverageDisplay
    >>> display = ClassCoverageDisplay.from_predictions(
    ...     ["cat", "cat", "dog", "dog"], [True, True, True, False]
    ... )
    >>> display.shares
    {'cat': 1.0, 'dog': 0.5}
    """

    def __init__(self, *, y_true: ArrayLike, kept: ArrayLike, target: float = 0.95) -> None:
        validate_parameter_constraints(
            {"target": [Number(Real, 0, 1, closed="neither")]},
            {"target": target},
            caller_name=type(self).__name__,
        )
        labels = labels_named(y_true, "y_true", number_of_rows(y_true, "y_true"))
        self.target = float(target)
        self._shares = shares_by_class(labels, valid_truths(kept, "kept", len(labels)))
        self.shares = {label: share.value for label, share in self._shares.items()}
        self.intervals = {label: share.interval for label, share in self._shares.items()}

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: ArrayLike, *, ax: Axes | None = None
    ) -> Self:
        """Judge rows with a fitted detector, and draw.

        Parameters
        ----------
        estimator : estimator
            A fitted `SparseEnergyOODDetector`, or a pipeline, a search or a `RejectingClassifier`
            around one. The target is its ``tpr_``.
        X : array-like of shape (n, ...)
            Rows that the detector was neither trained nor calibrated on.
        y : array-like of shape (n,)
            True classes. Rows with other labels are left out.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ClassCoverageDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` holds no detector.
        ValueError
            If no row of y is of a class.

        Warns
        -----
        ThresholdWarning
            If the threshold of ``fit`` is doubtful; ``calibrate`` clears that.
        """
        detector = fitted_detector(estimator, "estimator")
        labels = as_labels(y, number_of_rows(X, "X"))
        known = known_labels(labels, detector, "y", outliers=True)
        kept = judged(estimator, X).kept
        return cls.from_predictions(labels[known], kept[known], target=detector.tpr_, ax=ax)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        kept: ArrayLike,
        *,
        target: float = 0.95,
        ax: Axes | None = None,
    ) -> Self:
        """Draw which rows are kept.

        Parameters
        ----------
        y_true : array-like of shape (n,)
            True classes.
        kept : array-like of shape (n,), bool
            Whether each row is kept.
        target : float, default=0.95
            Share of the rows of each class that should be kept, between 0 and 1.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ClassCoverageDisplay
            The display, drawn.
        """
        return cls(y_true=y_true, kept=kept, target=target).plot(ax)

    def _drawn(self) -> list[tuple[Any, Share]]:
        """Classes and shares, the lowest first."""
        by_share = sorted(self._shares.items(), key=lambda item: item[1].value)
        return by_share[:MOST_CLASSES]

    def _draw(self, ax: Axes) -> None:
        drawn = self._drawn()
        values = np.array([share.value for _, share in drawn])
        ends = np.array([share.interval for _, share in drawn])
        is_below = ends[:, 1] < self.target
        for those, colour, face, label in (
            (is_below, COLOURS[0], COLOURS[0], "95 % interval below it"),
            (~is_below, COLOURS[1], "white", None),
        ):
            if those.any():
                ax.errorbar(
                    values[those],
                    np.flatnonzero(those),
                    xerr=np.abs(ends[those].T - values[those]),
                    fmt="o",
                    color=colour,
                    markerfacecolor=face,
                    label=label,
                )
        label = f"target {100 * self.target:g} %"
        ax.axvline(self.target, color="black", linewidth=1, zorder=1, label=label)
        names = [f"{wrapped(label, 1)} ({share.n_rows:,})" for label, share in drawn]
        ax.set_yticks(range(len(drawn)), names)
        few = f", {len(drawn)} of {len(self._shares):,}" if len(drawn) < len(self._shares) else ""
        ax.set(
            xlabel="share of rows kept",
            ylabel=f"true class (rows){few}",
            ylim=(len(drawn) - 0.5, -0.5),
        )
        ax.legend(loc="lower left", fontsize="small")

    def _size(self) -> tuple[float, float]:
        return 6.4, 1.2 + CLASS_HEIGHT * max(len(self._drawn()), 4)


def _by_name(values: Any, name: str) -> dict[str, Any]:
    """Values by the names of detectors; a single one is named "detector"."""
    if not isinstance(values, Mapping):
        return {"detector": values}
    if not values:
        raise ValueError(f"{name} is an empty dict; expected at least one detector.")
    return dict(values)
