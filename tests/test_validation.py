from __future__ import annotations

from fractions import Fraction
from numbers import Integral, Real

import numpy as np
import pytest
from sklearn.utils._param_validation import InvalidParameterError

from skood.validation import Number, valid_array, valid_scores, validated


@validated(
    share=[Number(Real, 0, 1, closed="right"), None], count=[Number(Integral, 1, 3, closed="both")]
)
def function(share=0.5, *, count=1):
    """A docstring."""
    return share, count


@pytest.mark.parametrize("share", [1, 0.5, None, np.float32(0.5), np.int8(1), Fraction(1, 3)])
def test_what_the_constraints_name_is_taken_as_it_is(share):
    assert function(share) == (share, 1)
    assert function.__doc__ == "A docstring."
    assert function.__name__ == "function"


@pytest.mark.parametrize("share", [0, 1.5, -1, np.nan, np.inf, -np.inf, True, False, "0.5", [0.5]])
def test_what_they_do_not_name_is_refused(share):
    with pytest.raises(InvalidParameterError) as raised:
        function(share)
    message = str(raised.value)
    assert message.startswith("The 'share' parameter of function must be a float in the range (0.0")
    assert message.endswith(f" or None. Got {share!r} instead.")
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("count", [0, 4, 1.0, True, None])
def test_integers_are_integers(count):
    with pytest.raises(InvalidParameterError, match=r"'count' .* an int in the range \[1, 3\]"):
        function(count=count)


def test_numbers_have_no_bounds_without_bounds():
    number = Number(Real, None, None, closed="neither")
    taken = [number.is_satisfied_by(value) for value in (-1e300, 0, np.nan, np.inf, -np.inf, True)]
    assert taken == [True, True, False, False, False, False]
    assert Number(Real, 0, None, closed="both").is_satisfied_by(np.inf)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float16, np.float64])
def test_arrays_keep_their_dtype(dtype):
    array = np.ones((2, 3), dtype=dtype)
    assert valid_array(array, "rows", ("n", "d")) is array
    assert valid_scores(array[0], "scores").dtype == dtype


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.ones(3), ValueError, r"rows has shape \(3,\); expected \(n, d\)\.$"),
        (np.ones((0, 3)), ValueError, r"rows is empty, of shape \(0, 3\)"),
        ([[1, 2], [3]], ValueError, r"rows does not form an array .*\(n, d\)"),
        (np.ma.masked_equal([[1, 2]], 2), ValueError, "rows has masked entries"),
        ([["a"]], TypeError, "rows has dtype <U1"),
        ([[1j]], TypeError, "rows has dtype complex128"),
        ([[1, np.nan], [np.inf, 0]], ValueError, "rows has 2 NaN or infinite values in 4"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_by_name(array, error, message):
    with pytest.raises(error, match=message):
        valid_array(array, "rows", ("n", "d"))


def test_infinite_scores_are_refused_on_request():
    assert valid_scores([np.inf, 1], "scores").tolist() == [np.inf, 1]
    with pytest.raises(ValueError, match="scores has 1 NaN or infinite values in 2"):
        valid_scores([np.inf, 1], "scores", finite=True)
    with pytest.raises(ValueError, match=r"shape \(1, 2\); expected \(n,\)\. Take one column"):
        valid_scores([[1, 2]], "scores")
