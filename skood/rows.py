"""Where X enters: whatever a user passes becomes `Rows`, and is compared with the rows of fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from types import NoneType
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import validate_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .engine.loading import Loader, is_array, is_pair, objects
from .engine.rows import InMemory, Loaded, Rows, as_array, rows_of_dataset, rows_of_tensor
from .exceptions import UnscaledImagesWarning
from .notices import quoted, warn_user

__all__ = ["Kind", "as_numbers", "as_rows", "in_frame", "rows_like_fit", "take", "warn_if_unscaled"]


@dataclass(frozen=True)
class Kind:
    """What the rows of fit were, beside what scikit-learn keeps of a table.

    Parameters
    ----------
    form : {"numbers", "row numbers", "arrays", "objects"}
        Numbers in rows, or references for preprocess: numbers of rows, arrays or lists of several
        lengths, any other objects.
    names : tuple or None
        Names of the columns of a frame that are no strings.
    """

    form: Literal["numbers", "row numbers", "arrays", "objects"]
    names: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, rows: Rows, X: Any) -> Kind:
        """The kind of rows that were made of X."""
        if not isinstance(rows, Loaded) or not rows.preprocessed:
            names = _names(X)
            return cls("numbers", None if all(isinstance(n, str) for n in names) else tuple(names))
        if rows.dtype.startswith(("int", "uint", "float", "bool")):
            return cls("row numbers")
        return cls("arrays" if is_array(rows.sample) and not rows.shape else "objects")


def as_rows(X: Any, preprocess: Loader | None = None, like: Kind | None = None) -> Rows:
    """X as `Rows`, not copied if it is an array, a tensor or a data set.

    With `preprocess`, X may hold anything; `like` says what the rows of fit were. A TypeError or
    ValueError says what to pass instead.
    """
    if _are_plain(X) and (like is None or like.form == "numbers"):
        return InMemory(X)  # what follows would find nothing, and takes as long as a small network
    if is_data_set(X):
        return rows_of_dataset(X, preprocess)
    _refuse_other_forms(X)
    values = _values(X, like)
    if preprocess is not None and _are_references(values):
        references = Loaded(as_array(values), preprocess)
        if values.ndim == 2:
            bad = [number for number, x in enumerate(as_array(values)[0]) if _reason(x)]
            references.without_numbers = _named(bad, X)
        return references
    rows = rows_of_tensor(values) if isinstance(values, Tensor) else InMemory(_numbers(values, X))
    rows.columns = [str(name) for name in _names(X)] or None
    return rows


def rows_like_fit(
    estimator: BaseEstimator, X: Any, preprocess: Loader | None, *, reset: bool = False
) -> Rows:
    """X as `Rows`, of the kind, the shape and the columns of the rows of fit.

    With `reset`, these are the rows of fit, and the estimator keeps what they are: their `Kind`,
    and ``n_features_in_`` and ``feature_names_in_`` of a table, ``input_shape_`` otherwise.
    """
    if isinstance(X, Rows):  # such as skood has made of rows of this estimator
        return X
    if reset:
        kept = {"n_features_in_", "feature_names_in_", "input_shape_", "_kind"}
        for name in kept & set(vars(estimator)):
            delattr(estimator, name)
        rows = as_rows(X, preprocess)
        estimator._kind = Kind.of(rows, X)
    else:
        rows = as_rows(X, preprocess, estimator._kind)
        rows.watch = getattr(estimator, "_watch", None)
        _check_kind(rows, X, estimator)
    expected = getattr(estimator, "input_shape_", None)
    if len(rows.shape) == 1 and expected is None:
        named = hasattr(estimator, "feature_names_in_")
        nameless = isinstance(X, np.ndarray | Tensor) and not named
        # validate_data would find nothing, in half the time of a small network.
        if reset or not nameless or rows.shape != (estimator.n_features_in_,):
            table = X if hasattr(X, "shape") else np.empty((1, *rows.shape))
            validate_data(estimator, table, reset=reset, skip_check_array=True)
        return rows
    if reset:
        estimator.input_shape_ = rows.shape
        return rows
    expected = (estimator.n_features_in_,) if expected is None else expected
    if rows.shape != expected:
        raise ValueError(
            f"X has rows of shape {rows.shape}, but {type(estimator).__name__} was fitted on rows "
            f"of shape {expected}. {_pass_instead(rows, expected)}"
        )
    return rows


def is_data_set(X: Any) -> bool:
    """Whether X is a data set: torch's, what has its methods, or a list of pairs (x, y)."""
    if isinstance(X, Dataset):
        return True
    if isinstance(X, Sequence):
        return len(X) > 0 and is_pair(X[0])
    if isinstance(X, Mapping | type) or scipy.sparse.issparse(X):
        return False
    has_items = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    return has_items and not hasattr(X, "__array__") and not hasattr(X, "__array_interface__")


def warn_if_unscaled(rows: Rows) -> None:
    """Warn of images in uint8 that no function scales before they reach the user's network."""
    if rows.dtype == "uint8" and len(rows.shape) == 3:
        warn_user(
            "X holds images in uint8, which reach the module as they are, in 0..255. If it was "
            "trained on scaled images, pass preprocess=NormalizeImages(mean, std) from "
            "skood.networks, with its mean and std; else preprocess=torch.Tensor.float silences "
            "this.",
            UnscaledImagesWarning,
        )


def take(X: Any, index: NDArray[np.intp]) -> Any:
    """Some rows of X, in the form that X has."""
    if is_data_set(X) and not isinstance(X, Sequence):
        return Subset(X, index.tolist())
    return _safe_indexing(X, index)


def as_numbers(X: Any) -> NDArray[Any]:
    """X as one array, for what needs all of it at once; of dtype object if it holds no numbers."""
    if is_data_set(X):
        raise ValueError(
            f"X is a data set, {type(X).__name__}, of which no surrogate outliers are made. Pass "
            "its rows in an array; or judge by known outliers: make_ood_scorer(X_ood=...), or rows "
            "that y labels ood_label."
        )
    return as_array(_values(X))


def in_frame(values: NDArray[Any], X: Any) -> Any:
    """Values (n, d) in a data frame like X, if X is one."""
    if not hasattr(X, "columns"):
        return values
    names = "columns" if hasattr(X, "iloc") else "schema"  # as pandas and polars have it
    return type(X)(values, **{names: list(X.columns)})


def _refuse_other_forms(X: Any) -> None:
    """Refuse what holds rows in a form that they are not read from, with the form to pass."""
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a DataLoader, which fixes the order of rows and the size of batches; pass its "
            "data set, X.dataset."
        )
    if np.ma.is_masked(X):
        raise ValueError(
            f"X is a masked array of shape {X.shape}, and the values behind its mask are no data. "
            "Fill them in, X.filled(value), or leave such rows out."
        )
    if scipy.sparse.issparse(X):
        check_array(X)  # which refuses it
    if isinstance(X, Mapping):
        keys = list(X)
        raise TypeError(
            f"X is a {type(X).__name__} with the keys {quoted(keys)}; expected rows. Pass the "
            f"values of one key, X[{quoted(keys[0]) if keys else '...'}]. If the network needs "
            "several, pass rows that hold them all, np.stack(list(X.values()), axis=1), or if "
            "shapes differ np.hstack([x.reshape(len(x), -1) for x in X.values()]), and a module "
            "that takes each batch apart."
        )
    if isinstance(X, tuple | list) and len(X) == 2 and _rows_and_labels(*X):
        raise ValueError(
            f"X is a {type(X).__name__} of rows, of shape {tuple(X[0].shape)}, and their labels. "
            "Pass them apart: fit(X, y) to learn, score_samples(X) to score."
        )
    if hasattr(X, "__next__") or isinstance(X, set | frozenset):
        raise TypeError(
            f"X is a {type(X).__name__}, whose rows cannot be read in any order. Pass them in a "
            "list or an array: list(X)."
        )


def _rows_and_labels(rows: Any, labels: Any) -> bool:
    shapes = [tuple(getattr(part, "shape", ())) for part in (rows, labels)]
    if isinstance(labels, list | tuple):
        shapes[1] = (len(labels),)
    return len(shapes[0]) > 1 and len(shapes[1]) == 1 and shapes[0][0] == shapes[1][0]


def _values(X: Any, like: Kind | None = None) -> NDArray[Any] | Tensor:
    """X as an array or a tensor; of dtype object where it does not hold numbers alone."""
    form = None if like is None else like.form
    is_list = isinstance(X, list | tuple)
    if form == "arrays" and (is_list or getattr(X, "ndim", 1) > 1):
        return objects(list(X if is_list or isinstance(X, Tensor) else np.asarray(X)))
    if form == "objects" and is_list and not any(isinstance(x, list | tuple) for x in X):
        return objects(list(X))
    if isinstance(X, Tensor):
        return X
    if is_list and len(X) > 0:
        values = _of_list(X)
    else:
        values = _of_frame(X) if hasattr(X, "columns") else np.asarray(X)
    return as_array(values).astype(object) if form == "objects" and values.ndim == 2 else values


def _of_list(X: Sequence[Any]) -> NDArray[Any] | Tensor:
    if all(isinstance(x, Tensor) for x in X):
        return torch.stack(list(X)) if len({x.shape for x in X}) == 1 else objects(list(X))
    # numpy would give each text the width of the longest, and cut bytes at the end.
    if any(isinstance(x, str | bytes) for x in X):
        return objects(list(X))
    first = X[0] if isinstance(X[0], list | tuple) else ()
    has_text = any(isinstance(value, str | bytes) for value in first)
    try:
        return np.array(X, dtype=object) if has_text else np.asarray(X)
    except ValueError:  # objects of several shapes
        return objects(list(X))


def _of_frame(X: Any) -> NDArray[Any]:
    """A frame as numbers, if all columns are; else as objects."""
    if hasattr(X, "get_columns") and not all(map(_holds_numbers, X.dtypes)):
        # polars itself makes numbers of dates that stand beside numbers.
        return np.column_stack([objects(each.to_list()) for each in X.get_columns()])
    values = np.asarray(X)
    if values.ndim != 2 or values.dtype.kind in "biufmM":
        return values
    if hasattr(X, "iloc"):
        series = [X.iloc[:, number] for number in range(values.shape[1])]
    else:
        series = list(X.get_columns()) if hasattr(X, "get_columns") else list(values.T)
    columns = [_numeric(np.asarray(each)) for each in series]
    numbers = [column for column in columns if column is not None]
    return np.column_stack(numbers) if 0 < len(numbers) == len(columns) else values.astype(object)


def _holds_numbers(dtype: Any) -> bool:
    """Whether a dtype of polars is one of numbers, which may be missing."""
    return bool(dtype.is_numeric()) or str(dtype) in ("Boolean", "Null")


def _numeric(values: NDArray[Any]) -> NDArray[Any] | None:
    """Values as numbers, of dtype object or not; None if they are no numbers."""
    if values.dtype.kind in "biuf":
        return values
    if values.dtype.kind != "O":
        return None
    # pandas' NA has no public class of its own.
    flat = [
        np.nan if x is None or type(x).__name__ == "NAType" else x for x in values.ravel().tolist()
    ]
    if any(_reason(x) for x in flat):
        return None
    numbers = np.array(flat)
    if numbers.dtype.kind not in "biuf":
        long = [x for x in flat if type(x) is int and x.bit_length() > 64]
        if long:
            raise ValueError(
                f"X holds integers of more than 64 bits, such as {quoted(long[0])}, which no "
                "tensor holds. Map them to fewer, for instance by x % 2**63."
            )
        numbers = np.array([float(x) for x in flat])
    return numbers.reshape(values.shape)


def _numbers_of_objects(values: NDArray[Any], X: Any) -> NDArray[Any]:
    """Objects (n, ...) as numbers; an error names the columns that hold none."""
    columns = list(values.T) if values.ndim == 2 else [values]
    numbers = [_numeric(column) for column in columns]
    bad = [number for number, column in enumerate(numbers) if column is None]
    if not bad:
        return np.stack([x for x in numbers if x is not None], axis=-1).reshape(values.shape)
    value = next(x for x in columns[bad[0]].ravel().tolist() if _reason(x))
    error = TypeError if _reason(value).startswith("float()") else ValueError
    where = f" in the columns {_named(bad, X)}" if values.ndim == 2 else ""
    raise error(
        f"X holds no numbers{where}, such as {quoted(value)}: {_reason(value)}. Convert text and "
        "categories, for instance with OneHotEncoder in a ColumnTransformer, the step before in a "
        "Pipeline, and dates into numbers; or drop them."
    )


def _named(numbers: list[int], X: Any) -> str:
    """Some columns by their names, if they have any."""
    names = _names(X)
    some = ", ".join(quoted(names[number] if names else number) for number in numbers[:4])
    return some + ", ..." * (len(numbers) > 4)


def _reason(value: Any) -> str:
    """Why an object is no number; empty if it is one."""
    if isinstance(value, int | float | NoneType):
        return ""
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0) > 0:
        return f"could not convert {'string' if isinstance(value, str) else 'it'} to float"
    if isinstance(value, np.datetime64 | np.timedelta64):  # float() takes those in nanoseconds
        return f"float() argument must be a number, not '{value.dtype}'"
    try:
        float(value)
    except (TypeError, ValueError, OverflowError) as error:
        return str(error) if len(str(error)) < 90 else type(error).__name__
    return ""


def _names(X: Any) -> list[Any]:
    """Names of the columns of a frame; none if X is no frame."""
    return list(getattr(X, "column_names", getattr(X, "columns", ())))  # as pyarrow has them


def _check_kind(rows: Rows, X: Any, estimator: Any) -> None:
    """Refuse rows of another kind than those of fit, where their shape does not tell."""
    kind, name = estimator._kind, type(estimator).__name__
    if not isinstance(rows, Loaded) or not rows.preprocessed:
        if kind.names is not None and rows.columns is not None:
            _check_order(_names(X), kind.names)
        return
    if kind.form == "arrays" and isinstance(rows.sample, Number):
        raise ValueError(
            f"X holds numbers in one dimension, of dtype {rows.dtype}, but {name} was fitted on "
            "rows that are lists or arrays. Pass a list of rows, [row] for a single one."
        )
    if kind.form == "numbers" and rows.shape:
        where = f" in the columns {rows.without_numbers}" if rows.without_numbers else ""
        raise ValueError(
            f"X holds no numbers{where}, but {name} was fitted on numbers. Convert text, "
            "categories and dates as for fit."
        )


def _check_order(names: list[Any], of_fit: tuple[Any, ...]) -> None:
    """Refuse columns in another order; scikit-learn compares names that are strings only."""
    if names != list(of_fit) and set(names) == set(of_fit):
        raise ValueError(
            f"X has the columns {quoted(names)}, in another order than in fit, "
            f"{quoted(list(of_fit))}. Pass X[columns_of_fit]."
        )


def _pass_instead(rows: Rows, expected: tuple[int, ...]) -> str:
    if not expected:
        return "Pass references like those of fit, in one dimension."
    advice = f"Pass an array of shape (n, {', '.join(map(str, expected))})."
    if rows.preprocessed and not rows.shape:
        advice += (
            " If rows have several lengths, fit on an array of dtype object that holds one in each "
            "place."
        )
    return advice


def _are_references(values: NDArray[Any] | Tensor) -> bool:
    """Whether preprocess loads rows by them; else they are numbers, in two dimensions or more."""
    if isinstance(values, Tensor):
        return values.ndim == 1 and len(values) > 0
    return (
        values.ndim > 0
        and len(values) > 0
        and (values.ndim == 1 or values.dtype.kind not in "biufc")
    )


def _are_plain(values: Any) -> bool:
    """Whether values are an array of rows of numbers, in which there is nothing to look for."""
    if type(values) not in (np.ndarray, np.memmap):
        return False
    return values.dtype.kind in "biuf" and values.ndim > 1 and values.size > 0


def _numbers(values: NDArray[Any], X: Any) -> NDArray[Any]:
    """Rows of numbers in two dimensions or more; an error says what else they are."""
    if _are_plain(values):
        return values
    if values.ndim == 1 and values.dtype.kind not in "biufc" and len(values) > 0:
        raise ValueError(
            f"X holds {len(values)} values such as {quoted(values[0])}, which are no rows of "
            "numbers. If they are paths, rows of several lengths or other references, pass "
            "preprocess=, a function that turns an array of them into a tensor with as many rows."
        )
    if values.ndim < 2:
        got = f"{'scalar' if values.ndim == 0 else '1D'} array instead: X is a {type(X).__name__}"
        advice = "Pass an array, a list, a frame, a tensor or a data set."
        if values.ndim == 1:
            advice = (
                "Reshape your data: X.reshape(-1, 1) if it is one column, X.reshape(1, -1) if it "
                "is one row."
            )
        raise ValueError(f"Expected 2D array, got {got}, {quoted(X)}. {advice}")
    if values.dtype.kind == "c":
        raise ValueError(
            f"Complex data not supported: X has dtype {values.dtype}. Pass real numbers, for "
            "instance real and imaginary parts side by side."
        )
    if values.dtype.kind in "OSU":
        values = _numbers_of_objects(values.astype(object), X)
    if values.dtype.kind not in "biuf":
        dates = " (dates: (X - X.min()) / np.timedelta64(1, 's'))" * (values.dtype.kind == "M")
        raise ValueError(
            f"X has dtype {values.dtype}, which holds no numbers. Convert it to numbers{dates}, or "
            "pass preprocess=, a function that turns an array of them into a tensor with as many "
            "rows."
        )
    values = check_array(
        values, dtype="numeric", ensure_all_finite=False, allow_nd=True, input_name="X"
    )
    if values.size == 0:  # which scikit-learn sees in two dimensions only
        raise ValueError(
            f"X has shape {values.shape}, so its rows are empty; expected at least one value in "
            "each."
        )
    return values
