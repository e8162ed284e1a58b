from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import torch
from data_sets import Listed
from sklearn.base import BaseEstimator
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skood.engine.rows import InMemory, Loaded
from skood.exceptions import UnscaledImagesWarning
from skood.rows import as_numbers, as_rows, in_frame, rows_like_fit, take, warn_if_unscaled

TABLE = np.arange(12.0).reshape(6, 2)


class OneByOne(Dataset):
    """A data set that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return len(TABLE)

    def __getitem__(self, row):
        self.asked.append(row)
        return TABLE[row]


def from_names(names):
    return torch.zeros(len(names), 1)


@pytest.mark.parametrize("with_preprocess", [False, True])
@pytest.mark.parametrize(
    "X",
    [
        TABLE,
        TABLE.tolist(),
        TABLE.astype(np.int16),
        pd.DataFrame(TABLE),
        pl.DataFrame(TABLE),
        torch.from_numpy(TABLE),
        list(torch.from_numpy(TABLE)),
        list(TABLE),
        TensorDataset(torch.from_numpy(TABLE)),
    ],
    ids=lambda X: type(X).__name__,
)
def test_numbers(X, with_preprocess):
    rows = as_rows(X, from_names if with_preprocess else None)
    assert isinstance(rows, InMemory)
    assert rows.shape == (2,)
    np.testing.assert_array_equal(rows.read(slice(0, 6)), TABLE)


@pytest.mark.parametrize("X", [TABLE, torch.from_numpy(TABLE)], ids=["array", "tensor"])
def test_arrays_and_tensors_are_not_copied(X):
    there = as_rows(X).read(slice(0, 6)).data_ptr()
    assert there == torch.as_tensor(X).data_ptr()
    assert as_rows(TensorDataset(torch.as_tensor(X))).read(slice(0, 6)).data_ptr() == there


def test_a_memory_map_is_not_read(tmp_path):
    X = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=(10, 2))
    assert as_rows(X).read(slice(0, 10)).data_ptr() == X.ctypes.data


def test_data_sets_are_loaded_item_by_item():
    data = OneByOne()
    rows = as_rows(data)
    assert isinstance(rows, Loaded)
    np.testing.assert_array_equal(rows.read(np.array([4, 1])), TABLE[[4, 1]])
    assert data.asked == [0, 4, 1]  # the first one for the shape of a row


@pytest.mark.parametrize(
    "X",
    [
        np.arange(3),
        range(3),
        ["a", "b", "c"],
        pd.Series(["a", "b", "c"]),
        torch.arange(3),
        [Path("a"), Path("b"), Path("c")],
        [{"a": 1}, {"a": 2}, {"a": 3}],
        [np.zeros((2, 2)), np.zeros((3, 2)), np.zeros((1, 2))],
    ],
    ids=lambda X: type(X).__name__,
)
def test_references_need_preprocess(X):
    rows = as_rows(X, from_names)
    assert isinstance(rows, Loaded)
    assert (len(rows), rows.shape, rows.preprocessed) == (3, (), True)
    assert rows.read(np.array([0, 2])).tolist() == [[0], [0]]
    with pytest.raises(ValueError, match=r"preprocess=|Reshape your data"):
        as_rows(X)


def test_a_frame_of_several_kinds_goes_to_preprocess_as_objects():
    seen = []

    def preprocess(values):
        seen.append(values.tolist())
        return torch.zeros(len(values), 1)

    frame = pd.DataFrame({"path": ["a", "b"], "scale": [1.0, 2.0]})
    rows = as_rows(frame, preprocess)
    rows.read(slice(0, 2))
    assert seen == [[["a", 1.0], ["b", 2.0]]]
    assert rows.shape == (2,)


def test_items_that_are_no_numbers_go_to_preprocess():
    rows = as_rows(Listed([("a", 0), ("b", 1)]), from_names)
    assert (rows.shape, rows.preprocessed) == ((), True)
    assert rows.read(slice(0, 2)).tolist() == [[0], [0]]
    assert rows.labels(0) == [0, 1]


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (DataLoader(OneByOne()), TypeError, r"DataLoader.*pass its data set, X\.dataset"),
        (["a.png", "b.png"], ValueError, r"2 values such as \['a.png'\].*preprocess="),
        (np.array([["a", "b"]]), ValueError, "could not convert|numeric"),
        (scipy.sparse.csr_matrix(TABLE), TypeError, "dense"),
        (TABLE + 1j, ValueError, "Complex data not supported"),
        (np.zeros((0, 3)), ValueError, r"0 sample\(s\)"),
        (np.zeros((3, 0)), ValueError, r"0 feature\(s\)"),
        (torch.zeros(0, 3), ValueError, "Reshape your data"),
        (np.zeros(3), ValueError, "Reshape your data"),
        (np.ma.masked_less(TABLE, 3), ValueError, r"masked array .*X\.filled\(value\)"),
        (None, ValueError, "Expected 2D array, got scalar array"),
        ([], ValueError, "Expected 2D array"),
    ],
)
@pytest.mark.parametrize("with_preprocess", [False, True])
def test_what_cannot_be_rows_is_refused(X, error, message, with_preprocess):
    if with_preprocess and isinstance(X, list | np.ndarray) and np.ndim(X) == 1 and len(X):
        return  # references
    if with_preprocess and np.asarray(X).dtype.kind == "U":
        return
    with pytest.raises(error, match=message):
        as_rows(X, from_names if with_preprocess else None)


def test_tensors_of_several_shapes_are_refused():
    with pytest.raises(ValueError, match=r"2 values such as .*preprocess="):
        as_rows([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_images_of_bytes_warn(make, recwarn):
    dtype = {np.zeros: np.uint8, torch.zeros: torch.uint8}[make]
    warn_if_unscaled(as_rows(make((2, 3, 8, 8))))
    warn_if_unscaled(as_rows(make((2, 8), dtype=dtype)))
    warn_if_unscaled(as_rows(OneByOne()))
    assert not recwarn
    with pytest.warns(UnscaledImagesWarning, match=r"preprocess=NormalizeImages\(mean, std\)"):
        warn_if_unscaled(as_rows(make((2, 3, 8, 8), dtype=dtype)))


# Compared with the rows of fit


class Estimator(BaseEstimator):
    """What `rows_like_fit` needs to know of an estimator."""


def fitted_on(X):
    estimator = Estimator()
    rows_like_fit(estimator, X, None, reset=True)
    return estimator


@pytest.mark.parametrize(
    "X", [TABLE, torch.from_numpy(TABLE), OneByOne(), TensorDataset(torch.from_numpy(TABLE))]
)
def test_a_table_has_a_number_of_columns(X):
    estimator = fitted_on(X)
    assert vars(estimator) == {"n_features_in_": 2}
    for same in (TABLE, torch.from_numpy(TABLE), TABLE.tolist(), OneByOne()):
        assert len(rows_like_fit(estimator, same, None)) == 6
    for wide in (np.zeros((3, 4)), torch.zeros(3, 4), Listed([np.zeros(4)])):
        with pytest.raises(ValueError, match="X has 4 features, but Estimator is expecting 2"):
            rows_like_fit(estimator, wide, None)
    with pytest.raises(ValueError, match=r"X has rows of shape \(2, 2\), but .* of shape \(2,\)"):
        rows_like_fit(estimator, np.zeros((3, 2, 2)), None)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_the_columns_of_a_frame_have_names(frame):
    estimator = fitted_on(frame({"a": [1.0, 2.0], "b": [3.0, 4.0]}))
    assert estimator.feature_names_in_.tolist() == ["a", "b"]
    rows_like_fit(estimator, frame({"a": [1.0], "b": [3.0]}), None)
    with pytest.raises(ValueError, match="feature names should match"):
        rows_like_fit(estimator, frame({"b": [1.0], "a": [3.0]}), None)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        rows_like_fit(estimator, TABLE, None)


def test_other_rows_have_a_shape():
    images = np.zeros((3, 1, 4, 4))
    estimator = fitted_on(images)
    assert vars(estimator) == {"input_shape_": (1, 4, 4)}
    for same in (images, torch.from_numpy(images), Listed(list(images))):
        rows_like_fit(estimator, same, None)
    message = (
        r"rows of shape {}, but Estimator was fitted on rows of shape \(1, 4, 4\)\. .*\(n, 1, 4"
    )
    for other, shape in ((np.zeros((3, 1, 5, 4)), r"\(1, 5, 4\)"), (TABLE, r"\(2,\)")):
        with pytest.raises(ValueError, match=message.format(shape)):
            rows_like_fit(estimator, other, None)


def test_references_have_no_shape():
    estimator = Estimator()
    rows_like_fit(estimator, ["a", "b"], from_names, reset=True)
    assert vars(estimator) == {"input_shape_": ()}
    rows_like_fit(estimator, ["c"], from_names)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\), but"):
        rows_like_fit(estimator, TABLE, from_names)


@pytest.mark.parametrize(
    ("first", "then", "known"),
    [
        (pd.DataFrame({"a": [1.0]}), TABLE, {"n_features_in_": 2}),
        (TABLE, np.zeros((2, 3, 4)), {"input_shape_": (3, 4)}),
        (np.zeros((2, 3, 4)), TABLE, {"n_features_in_": 2}),
    ],
)
def test_another_fit_forgets_the_rows_of_the_first(first, then, known):
    estimator = fitted_on(first)
    rows_like_fit(estimator, then, None, reset=True)
    assert vars(estimator) == known


# Rows in the form that X has


def test_some_rows_of_anything():
    index = np.array([4, 0])
    assert take(TABLE, index).tolist() == TABLE[index].tolist()
    assert take(torch.from_numpy(TABLE), index).tolist() == TABLE[index].tolist()
    assert take(TABLE.tolist(), index) == TABLE[index].tolist()
    assert take(pd.DataFrame(TABLE), index).to_numpy().tolist() == TABLE[index].tolist()
    assert take(list("abcde"), index) == ["e", "a"]
    data = take(OneByOne(), index)
    assert [row.tolist() for row in data] == TABLE[index].tolist()


def test_all_rows_as_one_array():
    assert as_numbers(TABLE) is TABLE
    for X in (torch.from_numpy(TABLE).requires_grad_(), TABLE.tolist(), pd.DataFrame(TABLE)):
        assert as_numbers(X).tolist() == TABLE.tolist()
    assert as_numbers(["a", "b"]).dtype.kind == "U"
    with pytest.raises(ValueError, match="is a data set, OneByOne, of which no surrogate"):
        as_numbers(OneByOne())


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_values_are_given_in_a_frame_like_X(frame):
    X = frame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    found = in_frame(TABLE, X)
    assert type(found) is frame
    assert list(found.columns) == ["a", "b"]
    assert found.to_numpy().tolist() == TABLE.tolist()
    assert in_frame(TABLE, TABLE) is TABLE
