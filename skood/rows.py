"""What users pass as X, made ready to be read row by row."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_array
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .engine.batches import Rows, check_tensor
from .engine.loading import as_references, check_dataset

__all__ = ["as_rows", "warn_if_unscaled"]


def as_rows(X: Any, *, with_preprocess: bool) -> Rows:
    """X as an array, a tensor or a data set, not copied where it is one already.

    Parameters
    ----------
    X : array-like, Tensor or Dataset
        What the user passed.
    with_preprocess : bool
        Whether a function of the user's turns batches into tensors: X may hold anything then.

    Returns
    -------
    ndarray, Tensor or Dataset
        Numbers in at least two dimensions, an array of references, or a map-style data set.

    Raises
    ------
    TypeError, ValueError
        If X is nothing of the kind; the message says what to pass.
    """
    if isinstance(X, Dataset):
        return check_dataset(X)
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
    references = as_references(X)
    if references is not None and with_preprocess and len(references) > 0:
        return references
    if references is not None and references.ndim == 1 and references.dtype.kind not in "biufc":
        raise ValueError(
            f"X holds {len(references)} values such as {references[:1].tolist()}, which are no "
            "rows of numbers. If they are paths or other references, pass preprocess=, a function "
            "that turns an array of them into a tensor with as many rows."
        )
    if isinstance(X, Tensor):
        return check_tensor(X)
    return _numbers(X)


def warn_if_unscaled(X: Rows) -> None:
    """Warn of images that no function scales before they reach the user's network.

    Parameters
    ----------
    X : ndarray, Tensor or Dataset
        From `as_rows`.

    Warns
    -----
    UserWarning
        If X holds images in uint8.
    """
    if not isinstance(X, Dataset) and X.dtype in (np.uint8, torch.uint8) and X.ndim == 4:
        warnings.warn(
            "X holds images in uint8, which reach the module as they are, in 0..255. If it was "
            "trained on scaled images, pass preprocess=NormalizeImages(mean, std) from "
            "skood.networks, with its mean and std; else preprocess=torch.Tensor.float silences "
            "this.",
            UserWarning,
            stacklevel=3,
        )


def _numbers(X: Any) -> NDArray[Any]:
    if type(X) in (np.ndarray, np.memmap) and X.dtype.kind in "biuf" and X.ndim > 1 and X.size > 0:
        return X  # scikit-learn would find nothing, and take longer than a small network
    rows = check_array(X, dtype="numeric", ensure_all_finite=False, allow_nd=True, input_name="X")
    if rows.size == 0:  # which scikit-learn sees in two dimensions only
        raise ValueError(
            f"X has shape {rows.shape}, so its rows are empty; expected at least one value in each."
        )
    return rows
