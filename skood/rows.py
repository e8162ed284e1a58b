"""Where X enters: whatever a user passes becomes `Rows`, and is compared with the rows of fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils.validation import validate_data
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .engine.loading import Loader, objects
from .engine.rows import InMemory, Loaded, Rows, as_array, rows_of_dataset, rows_of_tensor
from .exceptions import UnscaledImagesWarning
from .notices import warn_user

__all__ = ["as_numbers", "as_rows", "in_frame", "rows_like_fit", "take", "warn_if_unscaled"]


def as_rows(X: Any, preprocess: Loader | None = None) -> Rows:
    """X as `Rows`, not copied if it is an array, a tensor or a data set.

    With `preprocess`, X may hold anything. A TypeError or ValueError says what to pass instead.
    """
    if isinstance(X, Dataset):
        return rows_of_dataset(X, preprocess)
    if np.ma.is_masked(X):
        raise ValueError(
            f"X is a masked array of shape {X.shape}, and the values behind its mask are no data. "
            "Fill them in, X.filled(value), or leave such rows out."
        )
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a DataLoader, which fixes the order of rows and the size of batches; pass its "
            "data set, X.dataset."
        )
    if isinstance(X, list | tuple) and X and all(isinstance(x, Tensor) for x in X):
        X = torch.stack(list(X)) if len({x.shape for x in X}) == 1 else X
    references = _references(X)
    if references is not None and preprocess is not None and len(references) > 0:
        return Loaded(references, preprocess)
    if references is not None and references.ndim == 1 and references.dtype.kind not in "biufc":
        raise ValueError(
            f"X holds {len(references)} values such as {references[:1].tolist()}, which are no "
            "rows of numbers. If they are paths or other references, pass preprocess=, a function "
            "that turns an array of them into a tensor with as many rows."
        )
    return rows_of_tensor(X) if isinstance(X, Tensor) else InMemory(_numbers(X))


def rows_like_fit(
    estimator: BaseEstimator, X: Any, preprocess: Loader | None, *, reset: bool = False
) -> Rows:
    """X as `Rows`, with the shape and the columns of the rows of fit.

    With `reset`, these are the rows of fit, and the estimator keeps their shape and columns:
    ``n_features_in_`` and ``feature_names_in_`` of a table, ``input_shape_`` otherwise.
    """
    rows = as_rows(X, preprocess)
    if reset:
        for name in {"n_features_in_", "feature_names_in_", "input_shape_"} & set(vars(estimator)):
            delattr(estimator, name)
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
            f"of shape {expected}. Pass an array of shape (n, {', '.join(map(str, expected))})."
        )
    return rows


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
    return Subset(X, index.tolist()) if isinstance(X, Dataset) else _safe_indexing(X, index)


def as_numbers(X: Any) -> NDArray[Any]:
    """X as one array, for what needs all of it at once; of dtype object if it holds no numbers."""
    if isinstance(X, Dataset):
        raise ValueError(
            f"X is a data set, {type(X).__name__}, of which no surrogate outliers are made. Pass "
            "its rows in an array; or judge by known outliers: make_ood_scorer(X_ood=...), or rows "
            "that y labels ood_label."
        )
    return as_array(X) if isinstance(X, Tensor) else np.asarray(X)


def in_frame(values: NDArray[Any], X: Any) -> Any:
    """Values (n, d) in a data frame like X, if X is one."""
    if not hasattr(X, "columns"):
        return values
    names = "columns" if hasattr(X, "iloc") else "schema"  # as pandas and polars have it
    return type(X)(values, **{names: list(X.columns)})


def _references(X: Any) -> NDArray[Any] | None:
    """X as an array of references; None if it holds numbers in two dimensions or more."""
    if isinstance(X, Tensor):
        return X.detach().cpu().numpy() if X.ndim == 1 else None
    try:
        array = np.asarray(X)
    except ValueError:  # objects of several shapes
        array = objects(X)
    is_reference = array.ndim == 1 or array.dtype.kind not in "biufc"
    return array if array.ndim > 0 and is_reference else None


def _numbers(X: Any) -> NDArray[Any]:
    if type(X) in (np.ndarray, np.memmap) and X.dtype.kind in "biuf" and X.ndim > 1 and X.size > 0:
        return X  # scikit-learn would find nothing, and take longer than a small network
    rows = check_array(X, dtype="numeric", ensure_all_finite=False, allow_nd=True, input_name="X")
    if rows.dtype.kind not in "biuf":  # such as dates
        raise ValueError(
            f"X has dtype {rows.dtype}, which holds no numbers. Convert it to numbers, or pass "
            "preprocess=, a function that turns an array of them into a tensor with as many rows."
        )
    if rows.size == 0:  # which scikit-learn sees in two dimensions only
        raise ValueError(
            f"X has shape {rows.shape}, so its rows are empty; expected at least one value in each."
        )
    return rows
