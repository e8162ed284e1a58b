"""From the labels of y to logit indices, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import column_or_1d

from .notices import first_line, quoted
from .validation import shortened

__all__ = ["as_labels", "cluster_labels", "encode_labels", "is_outlier", "labels_named"]

CLUSTERS = 8
CLUSTERING_ROWS = 10_000

Labels = NDArray[Any]


def as_labels(y: ArrayLike, n_rows: int) -> Labels:
    """One label a row, as a 1-D array of integers, strings or booleans.

    Any labels are taken that sort: floats that hold whole numbers become integers. A ValueError
    says if y has another length or shape, or holds missing or fractional values.

    Examples
    --------
    >>> from skood.labels import as_labels
    >>> as_labels(["cat", "dog"], 2)
    array(['cat', 'dog'], dtype='<U3')
    """
    if isinstance(y, list | tuple) and {str, type(None)} & {type(label) for label in y}:
        y = _from_objects(y)  # which refuses what numpy alone would turn into strings
    try:
        array = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    except Exception as error:  # a ragged list, a sparse tensor
        raise ValueError(
            f"y does not form an array ({shortened(error)}); pass one label a row."
        ) from error
    if array.ndim == 2 and array.shape[1] > 1:
        raise ValueError(
            f"y has shape {array.shape}; expected one label a row, (n,). Turn one-hot or "
            "multi-label rows into one label each, for instance with y.argmax(axis=1)."
        )
    if np.ma.is_masked(y):
        raise ValueError(
            "y is a masked array; labels are missing behind its mask. Leave those rows out of X "
            "and y, or pass y.filled(label)."
        )
    if array.dtype.kind == "c":
        raise ValueError(
            f"Complex data not supported: y has dtype {array.dtype}; labels are integers, strings "
            "or booleans. Pass the class of each row."
        )
    labels = column_or_1d(array)
    if len(labels) != n_rows:
        raise ValueError(
            f"y has {len(labels)} labels for {n_rows} rows of X; pass one label a row."
        )
    if labels.dtype.kind == "O":
        labels = _from_objects(labels.tolist())
    if labels.dtype.kind == "f":
        labels = _whole_numbers(labels)
    if labels.dtype.kind not in "iubU":
        raise ValueError(
            f"y has dtype {labels.dtype}; labels are integers, strings or booleans. Encode them "
            "first, for instance with sklearn.preprocessing.LabelEncoder."
        )
    return labels


def labels_named(y: ArrayLike, name: str, n_rows: int) -> Labels:
    """One label a row, as `as_labels` gives them; an error calls them as the user does."""
    try:
        return as_labels(y, n_rows)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} does not hold labels: {first_line(error)}") from error


def is_outlier(labels: Labels, ood_label: Any) -> NDArray[np.bool_]:
    """Which rows carry the label of known outliers; none does if `ood_label` is None.

    A ValueError says if `ood_label` is of another kind than the labels, so that no row could carry
    it.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.labels import is_outlier
    >>> is_outlier(np.array([0, 1, -1]), -1)
    array([False, False,  True])
    """
    if ood_label is None:
        return np.zeros(len(labels), dtype=bool)
    kind = np.asarray(ood_label).dtype.kind
    if labels.dtype.kind not in ("iu" if kind in "iu" else kind):
        raise ValueError(
            f"ood_label={quoted(ood_label)} is a {type(ood_label).__name__} while y has dtype "
            f"{labels.dtype}, so no row can carry it; pass a label of the kind of y."
        )
    return np.asarray(labels == ood_label)


def encode_labels(labels: Labels, n_logits: int) -> tuple[Labels, NDArray[np.int64]]:
    """Class of each of K logits, and the logit index of each row.

    Integers within 0..K-1 are logit indices, whichever of them occur. Any other labels need exactly
    K distinct values, which are taken in sorted order. A ValueError says if the labels fit neither
    rule.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.labels import encode_labels
    >>> encode_labels(np.array([2, 0]), 3)
    (array([0, 1, 2]), array([2, 0]))
    >>> encode_labels(np.array(["dog", "cat"]), 2)
    (array(['cat', 'dog'], dtype='<U3'), array([1, 0]))
    """
    if labels.dtype.kind == "b" and n_logits == 2:
        return np.array([False, True]), labels.astype(np.int64)
    if labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < n_logits:
        return np.arange(n_logits), labels.astype(np.int64)
    distinct, indices = np.unique(labels, return_inverse=True)
    if len(distinct) == n_logits:
        return distinct, indices.astype(np.int64)
    raise ValueError(
        f"The module gives {n_logits} logits, but y holds {len(distinct)} distinct labels: "
        f"{quoted(distinct.tolist())}. Labels are either integers within 0..{n_logits - 1}, which "
        f"are logit indices, or exactly {n_logits} distinct values, matched to the logits in "
        "sorted order. Map y to logit indices, or name the label of known outliers with "
        "ood_label=. In a search, cv=InDistributionKFold() keeps every class in every fold."
    )


def cluster_labels(
    read: Callable[[NDArray[np.intp]], NDArray[np.float64]], n_rows: int, random_state: int
) -> NDArray[np.int64]:
    """k-means pseudo-classes, for rows without labels and without a network that could give some.

    `read` maps positions (m,) to rows (m, d), whose columns are standardised first. There are at
    most 8 clusters; a ValueError says if the rows are all alike. Cohen, Abutbul & Hoshen,
    "Out-of-distribution detection without class labels", 2021.
    """
    # Imported here, as they take long, and few need them.
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import StandardScaler

    sample = np.random.RandomState(random_state).permutation(n_rows)[:CLUSTERING_ROWS]
    scaler = StandardScaler().fit(read(sample))
    rows = scaler.transform(read(sample))
    n_clusters = min(CLUSTERS, max(2, n_rows // 20), len(np.unique(rows, axis=0)))
    if n_clusters < 2:
        raise ValueError(
            f"The {n_rows} rows of X are all alike (n_samples = {n_rows}), so there is nothing to "
            "learn from. Pass rows that differ."
        )
    clustering = KMeans(n_clusters, n_init=4, random_state=random_state).fit(rows)
    pieces = np.array_split(np.arange(n_rows), -(-n_rows // CLUSTERING_ROWS))
    return np.concatenate(
        [clustering.predict(scaler.transform(read(piece))) for piece in pieces]
    ).astype(np.int64)


def _from_objects(values: Sequence[Any]) -> Labels:
    for kind in (str, bool | np.bool_, int | float | np.number):
        if all(isinstance(value, kind) for value in values):
            return np.array(values)
    kinds = sorted({type(value).__name__ for value in values})
    raise ValueError(
        f"y mixes labels of the types {kinds}; pass labels of one kind, without missing values, "
        "or None for all rows if there are no labels."
    )


def _whole_numbers(labels: Labels) -> Labels:
    if not np.isfinite(labels).all():
        raise ValueError(
            "y contains NaN or infinity; remove the rows without a label, or pass y=None."
        )
    labels = labels.astype(np.float64)
    strange = labels[(np.rint(labels) != labels) | (np.abs(labels) >= 2**53)]
    if len(strange):
        raise ValueError(
            f"y holds fractional or huge values such as {strange[0]:g}; labels are "
            "integers, strings or booleans. Unknown label type: continuous. Cut numbers into "
            "classes, np.digitize(y, edges), or pass y=None."
        )
    return labels.astype(np.int64)
