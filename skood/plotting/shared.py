"""What the displays share: looks, new axes, sets by name, scores and thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..model_selection.steps import last_step
from ..validation import Number, valid_scores

__all__ = [
    "COLOURS",
    "MARKERS",
    "STYLES",
    "Look",
    "looks",
    "markers_at",
    "new_axes",
    "scores_of",
    "scores_to_draw",
    "sets_by_name",
    "threshold_to_draw",
]

# Okabe & Ito's palette for colour-blind readers, without its yellow, which is too pale for a line.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# In grey, styles and markers remain. With seven markers, 42 sets pass before a pair recurs.
STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Look(NamedTuple):
    """How a line is drawn, as matplotlib takes it."""

    colour: str
    style: Any
    marker: str


def looks() -> Iterator[Look]:
    """Looks of lines, without end.

    Returns
    -------
    iterator of Look
        The first six differ in colour, style and marker.
    """
    return map(Look, cycle(COLOURS), cycle(STYLES), cycle(MARKERS))


def markers_at(i: int) -> tuple[float, float]:
    """Where the i-th curve has markers, as ``markevery=``: rarely where other curves have them.

    Parameters
    ----------
    i : int
        Number of the curve, from 0.

    Returns
    -------
    tuple of two floats
        Place of the first marker and distance between markers, in diagonals of the axes.
    """
    return 0.03 + 0.02 * (i % len(COLOURS)), 0.14


def new_axes(n_panels: int = 1, *, size: tuple[float, float] | None = None) -> NDArray[Any]:
    """Axes of a new figure, one above the other over a common axis.

    Parameters
    ----------
    n_panels : int, default=1
        Number of axes.
    size : tuple of two floats, default=None
        Width and height of the figure in inches. None takes matplotlib's, higher for several axes.

    Returns
    -------
    ndarray of shape (n_panels,)
        The axes, from top to bottom.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: run `pip install 'skood[plot]'`."
        ) from error
    width, height = plt.rcParams["figure.figsize"]
    if n_panels > 1:
        height *= (1 + n_panels) / 3
    _, axes = plt.subplots(
        n_panels,
        sharex=True,
        squeeze=False,
        layout="constrained",
        figsize=(width, height) if size is None else size,
    )
    return axes[:, 0]


def sets_by_name(sets: Any, name: str) -> dict[str, Any]:
    """Out-of-distribution (OOD) sets by name; a single set is named "OOD".

    Parameters
    ----------
    sets : array-like, or dict of str to array-like
        One set, or several.
    name : str
        What the user calls them.

    Returns
    -------
    dict of str to array-like
        At least one set.

    Raises
    ------
    ValueError
        If `sets` is an empty dict.
    """
    if not isinstance(sets, Mapping):
        return {"OOD": sets}
    if not sets:
        raise ValueError(f"{name} is an empty dict; expected at least one set of OOD rows.")
    return dict(sets)


def scores_to_draw(
    score_id: ArrayLike, score_ood: ArrayLike | Mapping[str, ArrayLike]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Scores as arrays.

    Parameters
    ----------
    score_id : array-like of shape (n_id,)
        Scores of ID rows.
    score_ood : array-like of shape (n_ood,), or dict of str to array-like
        Scores of one OOD set, or of several by name.

    Returns
    -------
    score_id : ndarray of shape (n_id,), float64
        Scores of ID rows.
    score_ood : dict of str to ndarray of float64
        Scores of OOD sets.

    Raises
    ------
    TypeError
        If scores are not real numbers.
    ValueError
        If scores are empty, not 1-D, masked, NaN or infinite.
    """
    sets = sets_by_name(score_ood, "score_ood")
    return valid_scores(score_id, "score_id", finite=True).astype(np.float64), {
        name: valid_scores(scores, f"score_ood[{name!r}]", finite=True).astype(np.float64)
        for name, scores in sets.items()
    }


def threshold_to_draw(threshold: Any, caller: str) -> float | None:
    """The threshold, or None for none.

    Parameters
    ----------
    threshold : float or None
        What the user passed.
    caller : str
        The display that it was passed to.

    Returns
    -------
    float or None
        A finite number, or None.

    Raises
    ------
    InvalidParameterError
        If it is neither.
    """
    validate_parameter_constraints(
        {"threshold": [Number(Real, None, None, closed="neither"), None]},
        {"threshold": threshold},
        caller_name=caller,
    )
    return None if threshold is None else float(threshold)


def scores_of(
    estimator: Any, X_id: Any, X_ood: Any
) -> tuple[NDArray[Any], dict[str, NDArray[Any]], float | None]:
    """Scores that a fitted detector gives rows, and its threshold.

    Parameters
    ----------
    estimator : estimator
        Fitted, with ``score_samples``: a detector, or a pipeline or a search around one.
    X_id : array-like of shape (n_id, ...)
        ID rows.
    X_ood : array-like of shape (n_ood, ...), or dict of str to array-like
        OOD rows of one set, or of several by name.

    Returns
    -------
    score_id : ndarray of shape (n_id,)
        Scores of ID rows.
    score_ood : dict of str to ndarray
        Scores of each OOD set.
    threshold : float or None
        The detector's ``offset_``, or None if it has none.

    Raises
    ------
    TypeError
        If `estimator` has no ``score_samples``.
    ValueError
        If `X_ood` is an empty dict.
    """
    if not hasattr(estimator, "score_samples"):
        raise TypeError(
            f"estimator={estimator!r} has no score_samples; expected a fitted detector such as "
            "SparseEnergyOODDetector, or a pipeline that ends in one. If you have scores, draw "
            "them with from_predictions."
        )
    sets = sets_by_name(X_ood, "X_ood")
    score = estimator.score_samples
    return (
        score(X_id),
        {name: score(rows) for name, rows in sets.items()},
        getattr(last_step(estimator), "offset_", None),
    )
