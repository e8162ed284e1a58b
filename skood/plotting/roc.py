"""Receiver operating characteristics, with the operating point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve

from ..metrics import auroc
from .shared import ScoresDisplay, looks, markers_at, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DetectionRocDisplay"]

N_POINTS = 2000
"""Most points of a curve; a picture does not show that there are more."""


class DetectionRocDisplay(ScoresDisplay):
    """ROC of in-distribution rows against out-of-distribution rows, with the operating point.

    Make it with `from_estimator` or `from_predictions`. For each out-of-distribution (OOD) set, a
    curve gives the share of in-distribution (ID) rows that are kept over the share of OOD rows that
    are kept, as the threshold falls [1]_. ID is the positive class. The operating point is a line
    at the share of ID rows that the threshold keeps, with a black marker on each curve. The legend
    gives the area under each curve.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows, finite, higher is more in-distribution.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of one OOD set, or of several by name.
    threshold : float, default=None
        Rows with at least this score are kept. None draws no operating point.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If scores are not real numbers, empty, not 1-D, masked, NaN or infinite, or `threshold` is
        not a finite number.

    Notes
    -----
    Rows of equal score cross the threshold together, so a curve is straight there. A curve is drawn
    through at most 2000 of its points, which moves it by at most 0.001. The colours suit
    colour-blind readers [2]_; in grey, styles and markers tell the sets apart.

    References
    ----------
    .. [1] Fawcett, T., "An introduction to ROC analysis", Pattern Recognition Letters 27(8), 2006.
    .. [2] Okabe & Ito, "Color universal design: how to make figures and presentations that are
       friendly to colorblind people", 2008.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.plotting import DetectionRocDisplay
    >>> rng = np.random.RandomState(0)
    >>> display = DetectionRocDisplay.from_predictions(
    ...     rng.normal(2, 1, size=500), {"far": rng.normal(0, 1, size=300)}, threshold=0.5
    ... )
    >>> [text.get_text() for text in display.ax_.get_legend().get_texts()]
    ['far: AUROC 0.937', 'threshold 0.5', 'chance']
    """

    def __init__(
        self,
        *,
        score_id: ArrayLike,
        score_ood: ArrayLike | Mapping[str, ArrayLike],
        threshold: float | None = None,
    ) -> None:
        super().__init__(score_id=score_id, score_ood=score_ood, threshold=threshold)

    def _draw(self, ax: Axes) -> None:
        for i, (look, (name, scores)) in enumerate(
            zip(looks(), self.score_ood.items(), strict=False)
        ):
            ax.plot(
                *_roc(self.score_id, scores),
                **look.options,
                markevery=markers_at(i),
                label=f"{wrapped(name, 1)}: AUROC {auroc(self.score_id, scores):.3f}",
            )
            if self.threshold is not None:
                ax.plot(
                    np.mean(scores >= self.threshold),
                    np.mean(self.score_id >= self.threshold),
                    color="black",
                    linestyle="none",
                    marker=look.marker,
                    markersize=9,
                    markeredgecolor="white",
                    zorder=3,
                )
        if self.threshold is not None:
            ax.axhline(
                float(np.mean(self.score_id >= self.threshold)),
                color="black",
                linewidth=1,
                label=f"threshold {self.threshold:.4g}",
            )
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1, label="chance")
        ax.set(
            xlabel="share of OOD rows kept (FPR)",
            ylabel="share of ID rows kept (TPR)",
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
            aspect="equal",
        )
        # Beside the axes, as it would cover the curves of several sets.
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=3.5, fontsize="small")

    def _size(self) -> tuple[float, float]:
        return 7.6, 4.8


def _roc(
    score_id: NDArray[np.float64], score_ood: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of OOD and of ID rows kept, from the threshold that keeps none to that of all."""
    is_id = np.repeat([1, 0], [len(score_id), len(score_ood)])
    scores = np.concatenate([score_id, score_ood])
    fpr, tpr, _ = roc_curve(is_id, scores, drop_intermediate=False)
    if len(tpr) > N_POINTS:
        # Evenly along the curve: the sum of the two grows from 0 to 2.
        drawn = np.unique(np.searchsorted(tpr + fpr, np.linspace(0, 2, N_POINTS)))
        tpr, fpr = tpr[drawn], fpr[drawn]
    return fpr, tpr
