"""What the displays share: looks, new axes, sets by name, scores and the threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics import _valid_scores, _valid_sets
from ..model_selection.scorers import _last_step

__all__ = [
    "COLOURS",
    "MARKERS",
    "STYLES",
    "Look",
    "looks",
    "markers_at",
    "new_axes",
    "scores_of",
    "sets_by_name",
    "valid_scores",
    "valid_threshold",
]

# Okabe & Ito's palette, which colour-blind readers tell apart; its yellow is too pale for a line.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# In grey, styles and markers remain. Seven markers, so that 42 sets pass before a pair recurs.
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
    """Where the i-th curve has markers, as ``markevery=`` takes it: seldom where others have them.

    Parameters
    ----------
    i : int
        Place of the curve among the curves.

    Returns
    -------
    tuple of two floats
        The first, and the distance of the others, in units of the diagonal of the axes.
    """
    return 0.03 + 0.02 * (i % len(COLOURS)), 0.14


def new_axes(n_panels: int = 1, *, size: tuple[float, float] | None = None) -> NDArray[Any]:
    """Axes of a new figure, one above the other over a common axis.

    Parameters
    ----------
    n_panels : int, default=1
        Number of axes.
    size : tuple of two floats, default=None
        Width and height of the figure in inches; None takes matplotlib's, higher for several axes.

    Returns
    -------
    ndarray of shape (n_panels,)
        The axes, from above.

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
    """Out-of-distribution (OOD) sets by name; one that comes alone is "OOD".

    Parameters
    ----------
    sets : array-like, or dict of str to array-like
        One set, or several.
    name : str
        What the user calls `sets`.

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


def valid_scores(
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
    sets = _valid_sets(sets_by_name(score_ood, "score_ood"))
    return _finite(_valid_scores(score_id, "score_id"), "score_id"), {
        name: _finite(scores, f"score_ood[{name!r}]") for name, scores in sets.items()
    }


def valid_threshold(threshold: Any) -> float | None:
    """The threshold, or None for none.

    Parameters
    ----------
    threshold : float or None
        What the user passed.

    Returns
    -------
    float or None
        A finite number, or None.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is not finite.
    """
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold={threshold!r}; expected a number on the scale of the scores.")
    if not np.isfinite(float(threshold)):
        raise ValueError(f"threshold={threshold!r}; expected a finite number, or None for none.")
    return float(threshold)


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
        The detector's ``offset_``; None where it has none.

    Raises
    ------
    TypeError
        If `estimator` has no ``score_samples``.
    ValueError
        If `X_ood` is an empty dict.
    """
    if not hasattr(estimator, "score_samples"):
        raise TypeError(
            f"estimator={estimator!r} has no score_samples; expected a fitted detector such "
            "as SparseEnergyOODDetector, or a pipeline that ends in one. Draw scores that "
            "you have with from_predictions."
        )
    sets = sets_by_name(X_ood, "X_ood")
    score = estimator.score_samples
    return (
        score(X_id),
        {name: score(rows) for name, rows in sets.items()},
        getattr(_last_step(estimator), "offset_", None),
    )


def _finite(scores: NDArray[Any], name: str) -> NDArray[np.float64]:
    n_infinite = np.count_nonzero(np.isinf(scores))
    if n_infinite:
        raise ValueError(
            f"{name} has {n_infinite} infinite values in {scores.size} scores; expected finite "
            "ones. Drop or clip the others."
        )
    return scores.astype(np.float64)
