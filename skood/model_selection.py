"""Choosing a detector from in-distribution data alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .engine.batches import has_channels_last
from .randomness import random_generator

__all__ = ["surrogate_outliers"]

GRID = 4


def surrogate_outliers(
    X: ArrayLike,
    *,
    kind: str = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> NDArray[Any]:
    """Outliers made from in-distribution rows, for judging a detector without outlier data.

    Parameters
    ----------
    X : array-like of shape (n, ...)
        In-distribution rows: a table (n, d) or images (n, h, w), (n, c, h, w) or (n, h, w, c).
    kind : {"auto", "columns", "patches"}, default="auto"
        "columns" permutes each column of a table on its own, which keeps its distribution and
        breaks its relation to the others. "patches" cuts each image into a grid of at most 4 x 4
        cells and permutes the cells. "auto" is "columns" for a table and "patches" for images.
    random_state : int, RandomState or None, default=None
        Source of the permutations; pass an int for the same outliers at every call.

    Returns
    -------
    ndarray of the shape and dtype of X
        The outliers.

    Raises
    ------
    ValueError
        If X has no surrogates of this kind.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.model_selection import surrogate_outliers
    >>> X = np.arange(6).reshape(3, 2)
    >>> sorted(surrogate_outliers(X, random_state=0)[:, 1].tolist())
    [1, 3, 5]
    """
    X = np.asarray(X)
    random = random_generator(random_state)
    makers = {"columns": _permuted_columns, "patches": _permuted_patches}
    if kind == "auto":
        kind = "columns" if X.ndim == 2 else "patches"
    if kind not in makers:
        raise ValueError(f'kind={kind!r} is unknown; pass "auto", "columns" or "patches".')
    return makers[kind](X, random)


def _permuted_columns(X: NDArray[Any], random: np.random.RandomState) -> NDArray[Any]:
    if X.ndim != 2 or X.shape[1] < 2 or len(X) < 2:
        raise ValueError(
            f"X of shape {X.shape} has no columns to permute against each other; surrogate "
            "outliers need at least 2 rows and 2 columns. Judge the detector on known outliers "
            "instead: rows of X that y labels ood_label."
        )
    return np.column_stack([column[random.permutation(len(X))] for column in X.T])


def _permuted_patches(X: NDArray[Any], random: np.random.RandomState) -> NDArray[Any]:
    height, width = _spatial_axes(X.shape)
    rows, columns = min(GRID, X.shape[height]), min(GRID, X.shape[width])
    size = X.shape[height] // rows, X.shape[width] // columns
    if rows * columns < 2:
        raise ValueError(
            f"images of shape {X.shape[1:]} are too small to permute patches. Judge the detector "
            "on known outliers instead: rows of X that y labels ood_label."
        )
    outliers = X.copy()
    # Views with the spatial axes behind the rows: cells are moved whole, the border that fits no
    # cell stays.
    source, target = (np.moveaxis(images, (height, width), (1, 2)) for images in (X, outliers))
    order = np.argsort(random.random_sample((len(X), rows * columns)), axis=1)
    images = np.arange(len(X))
    for cell in range(rows * columns):
        to_row, to_column = divmod(cell, columns)
        from_row, from_column = np.divmod(order[:, cell], columns)
        for i, j in np.ndindex(size):
            target[:, to_row * size[0] + i, to_column * size[1] + j] = source[
                images, from_row * size[0] + i, from_column * size[1] + j
            ]
    return outliers


def _spatial_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) not in (3, 4):
        raise ValueError(
            f"X of shape {shape} is neither a table nor a set of images, so it has no surrogate "
            "outliers. Judge the detector on known outliers instead: rows of X that y labels "
            "ood_label."
        )
    return (1, 2) if len(shape) == 3 or has_channels_last(shape) else (2, 3)
