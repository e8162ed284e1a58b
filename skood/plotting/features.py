"""How active the penultimate features are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..model_selection.steps import last_step, seen_by_last_step
from ..notices import quoted
from ..penalties import hoyer_index
from ..validation import valid_array
from .shared import Display, looks, markers_at, sets_by_name, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FeatureActivityDisplay"]


class FeatureActivityDisplay(Display):
    """Activity of the features of in-distribution rows against that of out-of-distribution rows.

    Make it with `from_estimator` or `from_predictions`. The absolute features of each row are
    ordered, from the largest to the smallest, and averaged over the rows, place by place. The
    sparser rows are, the steeper the curve falls; the area under it is their mean L1 norm.
    In-distribution (ID) rows are a filled area, those of each out-of-distribution (OOD) set a line.
    The legend gives the mean L1 norm and the mean Hoyer index [1]_ of each set.

    Parameters
    ----------
    features_id : array-like of shape (n_id, d)
        Penultimate features of ID rows, finite.
    features_ood : array-like of shape (n_ood, d), or dict of str to array-like
        Features of one OOD set, or of several by name.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError
        If features are not real numbers.
    ValueError
        If features are empty, not 2-D, masked, NaN or infinite, or sets differ in width.

    Notes
    -----
    Each row has an order of its own, because each class activates other features: means of single
    features would be even although every row is sparse. Which features are active is not shown. The
    colours suit colour-blind readers [2]_; in grey, styles and markers tell the sets apart.

    References
    ----------
    .. [1] Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 5, 2004.
    .. [2] Okabe & Ito, "Color universal design: how to make figures and presentations that are
       friendly to colorblind people", 2008.

    Examples
    --------
    >>> from skood.plotting import FeatureActivityDisplay
    >>> display = FeatureActivityDisplay.from_predictions(
    ...     [[4, 0, 0, 0], [0, 0, 2, 0]], {"even": [[1, 1, -1, 1]]}
    ... )
    >>> [text.get_text() for text in display.ax_.get_legend().get_texts()]
    ['ID: mean L1 3, Hoyer 1.00', 'even: mean L1 4, Hoyer 0.00']
    """

    def __init__(
        self, *, features_id: ArrayLike, features_ood: ArrayLike | Mapping[str, ArrayLike]
    ) -> None:
        valid_id = valid_array(features_id, "features_id", ("n", "d"))
        self.activity_id = _activity(valid_id)
        self.activity_ood = {}
        for name, features in sets_by_name(features_ood, "features_ood").items():
            valid = valid_array(features, f"features_ood[{name!r}]", ("n", "d"))
            if valid.shape[1] != valid_id.shape[1]:
                raise ValueError(
                    f"features_ood[{name!r}] has {valid.shape[1]} features per row, features_id "
                    f"{valid_id.shape[1]}; expected features of one network."
                )
            self.activity_ood[name] = _activity(valid)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X_id: Any, X_ood: Any, *, ax: Axes | None = None
    ) -> Self:
        """Compute the features of rows with a fitted detector, and draw.

        Parameters
        ----------
        estimator : estimator
            A fitted `SparseEnergyOODDetector`, or a pipeline or a search around one.
        X_id : array-like of shape (n_id, ...)
            ID rows that the detector was not trained on.
        X_ood : array-like of shape (n_ood, ...), or dict of str to array-like
            OOD rows of one set, or of several by name.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        FeatureActivityDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` has no ``features``.
        ValueError
            If `X_ood` is an empty dict, or the features cannot be drawn.
        """
        detector = last_step(estimator)
        if not hasattr(detector, "features"):
            raise TypeError(
                f"estimator={quoted(estimator)} has no features; expected a fitted "
                "SparseEnergyOODDetector, or a pipeline that ends in one. If you have features, "
                "draw them with from_predictions."
            )
        sets = sets_by_name(X_ood, "X_ood")
        return cls.from_predictions(
            detector.features(seen_by_last_step(estimator, X_id)),
            {
                name: detector.features(seen_by_last_step(estimator, rows))
                for name, rows in sets.items()
            },
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        features_id: ArrayLike,
        features_ood: ArrayLike | Mapping[str, ArrayLike],
        *,
        ax: Axes | None = None,
    ) -> Self:
        """Draw features.

        Parameters
        ----------
        features_id : array-like of shape (n_id, d)
            Penultimate features of ID rows, finite.
        features_ood : array-like of shape (n_ood, d), or dict of str to array-like
            Features of one OOD set, or of several by name.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        FeatureActivityDisplay
            The display, drawn.
        """
        return cls(features_id=features_id, features_ood=features_ood).plot(ax)

    def _draw(self, ax: Axes) -> None:
        places = np.arange(1, len(self.activity_id.ranked) + 1)
        ax.stairs(
            self.activity_id.ranked,
            np.append(places, places[-1] + 1) - 0.5,
            fill=True,
            facecolor="0.85",
            edgecolor="black",
            linewidth=1,
            label=_label("ID", self.activity_id),
        )
        for i, (look, (name, activity)) in enumerate(
            zip(looks(), self.activity_ood.items(), strict=False)
        ):
            ax.plot(
                places,
                activity.ranked,
                **look.options,
                markevery=markers_at(i),
                label=_label(name, activity),
            )
        ax.set(xlabel="features of a row, the most active first", ylabel="mean |h|")
        ax.set_ylim(bottom=0)
        ax.legend(handlelength=3.5, fontsize="small")


class _Activity(NamedTuple):
    """Means over the rows of a set."""

    ranked: NDArray[np.float64]
    """The largest absolute value of a row, the second largest and so on, of shape (d,)."""
    hoyer: float

    @property
    def l1(self) -> float:
        return float(self.ranked.sum())


def _activity(features: NDArray[Any]) -> _Activity:
    floating = features.astype(np.result_type(features.dtype, np.float32), copy=False)
    ranked = np.sort(np.abs(floating), axis=1)
    hoyer = hoyer_index(torch.from_numpy(ranked))
    return _Activity(ranked[:, ::-1].mean(axis=0, dtype=np.float64), float(hoyer.mean()))


def _label(name: str, activity: _Activity) -> str:
    return f"{wrapped(name, 1)}: mean L1 {activity.l1:.4g}, Hoyer {activity.hoyer:.2f}"
