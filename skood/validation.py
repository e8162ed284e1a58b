"""Checks of what users pass: parameters by scikit-learn's constraints, arrays by one function.

Functions declare their constraints with `validated`, estimators in ``_parameter_constraints``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import Interval, validate_params
from sklearn.utils.validation import _num_samples

__all__ = [
    "Number",
    "check_results",
    "comparable",
    "number_of_rows",
    "shortened",
    "valid_array",
    "valid_scores",
    "valid_truths",
    "validated",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class Number(Interval):
    """Numbers between two bounds, given as those of scikit-learn's ``Interval``.

    True and False are refused, although Python counts them as 1 and 0.
    """

    def __contains__(self, val: Real) -> bool:
        # NumPy, which looks for NaN in floats, knows no fractions.Fraction.
        try:
            number = val if self.type is Integral else float(val)
        except OverflowError:
            return False
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
    array: ArrayLike,
    name: str,
    axes: tuple[str, ...] | None,
    *,
    finite: bool = True,
    missing: bool = False,
) -> NDArray[Any]:
    """Real numbers as an array with the axes named, such as ``("n", "d")``; at least one number.

    Any axes will do if `axes` is None. Infinity is refused if `finite`, and NaN unless `missing`. A
    TypeError or ValueError says what was got.
    """
    shape = "numbers" if axes is None else f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    if np.ma.is_masked(array):
        raise ValueError(f"{name} has masked entries; expected none. Drop their rows.")
    try:
        values = _as_array(array)
    except Exception as error:  # a ragged list, a sparse tensor
        raise ValueError(
            f"{name} does not form an array ({shortened(error)}); expected the shape {shape}."
        ) from error
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} has dtype {values.dtype}; expected real numbers (float, int or bool). "
            "Convert them, or drop rows that lack one."
        )
    if axes is not None and values.ndim != len(axes):
        advice = " Take one column, or flatten it with .ravel()." if len(axes) == 1 else ""
        raise ValueError(f"{name} has shape {values.shape}; expected {shape}.{advice}")
    if not values.size:
        raise ValueError(f"{name} is empty, of shape {values.shape}; pass at least one row.")
    if values.dtype.kind == "f":
        _check_finite(values, name, finite, missing)
        _check_exact(values, array, name)
    return values


def valid_truths(values: ArrayLike, name: str, n_rows: int) -> NDArray[np.bool_]:
    """One truth value for each of `n_rows` rows; 0 and 1 will do.

    Examples
    --------
    >>> from skood.validation import valid_truths
    >>> valid_truths([1, 0], "correct", 2)
    array([ True, False])
    """
    truths = valid_array(values, name, ("n",))
    if len(truths) != n_rows:
        raise ValueError(f"{name} has {len(truths)} values for {n_rows} rows; pass one a row.")
    if not np.isin(truths, (0, 1)).all():
        raise ValueError(
            f"{name} holds values such as {truths[~np.isin(truths, (0, 1))][0]:g}; expected True "
            "or False for each row. Compare first, for instance y_pred == y_true."
        )
    return truths.astype(bool)


def number_of_rows(X: Any, name: str) -> int:
    """How many rows X has; a TypeError says if it has none to count."""
    try:
        return int(_num_samples(X))
    except Exception as error:
        raise TypeError(
            f"{name} is a {type(X).__name__} without rows ({shortened(error)}); expected an "
            "array, a data frame or another sequence of rows."
        ) from error


def check_results(cv_results: Any) -> None:
    """Refuse what is no ``cv_results_`` of a search, which may be in a data frame."""
    if not isinstance(cv_results, Mapping) and not hasattr(cv_results, "columns"):
        raise TypeError(
            f"cv_results is a {type(cv_results).__name__}; expected the cv_results_ of a search, "
            "a dict of columns."
        )


def comparable(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """Arrays of numbers in one dtype that holds each exactly, so that they compare as they are.

    float64 rounds integers beyond 2**53. If that would be the common dtype, they become objects.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.validation import comparable
    >>> integers, floats = comparable(np.array([2**53 + 1]), np.array([2.0**53]))
    >>> bool(integers > floats)
    True
    """
    dtype = np.result_type(*arrays)
    if dtype.kind == "f" and any(_is_beyond(each, dtype) for each in arrays):
        return [np.array(each.tolist(), dtype=object) for each in arrays]
    return [each.astype(dtype, copy=False) for each in arrays]


def shortened(thing: Any) -> str:
    """A text of at most 100 characters about a thing, for messages."""
    text = str(thing)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_beyond(values: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether integers are too large for a floating dtype."""
    if values.dtype.kind not in "iu":
        return False
    largest = 2 ** (np.finfo(dtype).nmant + 1)
    return int(values.max()) > largest or int(values.min()) < -largest


def _as_array(array: Any) -> NDArray[Any]:
    if hasattr(array, "detach"):  # a tensor of torch, which is not imported here
        array = array.detach().cpu()
        if array.is_floating_point() and array.dtype.itemsize < 4:  # numpy lacks bfloat16
            array = array.float()
    return np.asarray(array)


def _check_finite(values: NDArray[Any], name: str, finite: bool, missing: bool) -> None:
    if missing:
        return
    bad = ~np.isfinite(values) if finite else np.isnan(values)
    n_bad = np.count_nonzero(bad)
    if n_bad:
        kind = "NaN or infinite values" if finite else "NaN"
        expected = "finite numbers" if finite else "none, because NaN has no order"
        first = int(np.atleast_1d(bad).nonzero()[0][0])
        raise ValueError(
            f"{name} has {n_bad} {kind} in {values.size}, first in row {first}; expected "
            f"{expected}. Find out what made them (rows out of range, training that diverged), or "
            "drop their rows."
        )


def _check_exact(values: NDArray[Any], given: Any, name: str) -> None:
    """Refuse a list of which numpy has rounded integers, as it does beside floats."""
    if not isinstance(given, list | tuple) or np.abs(values).max() < 2**53:
        return
    rounded = np.array(given, dtype=object) != values.astype(object)
    if (rounded & ~np.isnan(values)).any():
        raise ValueError(
            f"{name} mixes integers beyond 2**53 with other numbers, and float64 rounds them. Pass "
            "an array of one dtype."
        )
