"""Checks of what users pass: parameters by scikit-learn's constraints, arrays by one function.

Functions declare their constraints with `validated`, estimators in ``_parameter_constraints``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import Interval, validate_params

__all__ = ["Number", "shown", "valid_array", "valid_scores", "validated"]

SHOWN = 60
"""Characters of a value that a message shows, at most."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Number(Interval):
    """Numbers between two bounds, given as those of scikit-learn's ``Interval``.

    True and False are refused, although Python counts them as 1 and 0.
    """

    def __contains__(self, val: Real) -> bool:
        # NumPy, which looks for NaN in floats, knows no fractions.Fraction.
        number = val if isinstance(val, Integral) else float(val)
        return not isinstance(val, bool) and super().__contains__(number)


def validated(**constraints: list[Any]) -> Callable[[Function], Function]:
    """Make a function refuse wrong arguments by scikit-learn's constraints.

    It raises InvalidParameterError, which is a ValueError and a TypeError.

    Examples
    --------
    >>> from numbers import Real
    >>> from skood.validation import Number, validated
    >>> @validated(share=[Number(Real, 0, 1, closed="both")])
    ... def percent(share):
    ...     return f"{100 * share} %"
    >>> percent(95)
    Traceback (most recent call last):
    ...
    sklearn.utils._param_validation.InvalidParameterError: The 'share' parameter of percent must \
    be a float in the range [0.0, 1.0]. Got 95 instead.
    """
    return validate_params(constraints, prefer_skip_nested_validation=True)


def shown(value: object) -> str:
    """A value in a few characters, for messages.

    Examples
    --------
    >>> from skood.validation import shown
    >>> shown(list(range(1000)))
    '[0, 1, 2, 3, 4, 5, ...]'
    """
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def valid_scores(scores: ArrayLike, name: str, *, finite: bool = False) -> NDArray[Any]:
    """One score a row, as an array; `name` is what the user calls them.

    Examples
    --------
    >>> from skood.validation import valid_scores
    >>> valid_scores([0.5, 2], "score_id")
    array([0.5, 2. ])
    """
    return valid_array(scores, name, ("n",), finite=finite)


def valid_array(
    array: ArrayLike, name: str, axes: tuple[str, ...], *, finite: bool = True
) -> NDArray[Any]:
    """Real numbers as an array with the axes named, such as ``("n", "d")``; at least one.

    NaN is always refused, infinity if `finite`. A TypeError or ValueError says what was got.
    """
    shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    if np.ma.is_masked(array):
        raise ValueError(f"{name} has masked entries; expected none. Drop their rows.")
    try:
        values = np.asarray(array)
    except ValueError as error:  # a ragged list
        raise ValueError(
            f"{name} does not form an array ({error}); expected the shape {shape}."
        ) from error
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} has dtype {values.dtype}; expected real numbers (float, int or bool). "
            "Convert them, or drop rows that lack one."
        )
    if values.ndim != len(axes):
        advice = " Take one column, or flatten it with .ravel()." if len(axes) == 1 else ""
        raise ValueError(f"{name} has shape {values.shape}; expected {shape}.{advice}")
    if not values.size:
        raise ValueError(f"{name} is empty, of shape {values.shape}; pass at least one row.")
    _check_finite(values, name, finite)
    return values


def _check_finite(values: NDArray[Any], name: str, finite: bool) -> None:
    bad = ~np.isfinite(values) if finite else np.isnan(values)
    n_bad = np.count_nonzero(bad)
    if n_bad:
        kind = "NaN or infinite values" if finite else "NaN"
        expected = "finite numbers" if finite else "none, because NaN has no order"
        raise ValueError(
            f"{name} has {n_bad} {kind} in {values.size}; expected {expected}. Find out what made "
            "them (rows out of range, training that diverged), or drop their rows."
        )
