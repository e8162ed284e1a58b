from __future__ import annotations

import warnings
from collections import UserDict
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import torch
from data_sets import Listed
from sklearn.base import BaseEstimator
from sklearn.model_selection import GridSearchCV, KFold
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skood import SparseEnergyOODDetector
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


class Unnamed:
    """A data set without torch's base class."""

    def __len__(self):
        return len(TABLE)

    def __getitem__(self, row):
        return TABLE[row], row


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
        (["a.png", "b.png"], ValueError, r"2 values such as 'a.png'.*preprocess="),
        (np.array([["a", "b"]]), ValueError, "could not convert|numeric"),
        (scipy.sparse.csr_matrix(TABLE), TypeError, "dense"),
        (TABLE + 1j, ValueError, "Complex data not supported"),
        ({"ids": TABLE, "mask": TABLE}, TypeError, r"keys \['ids', 'mask'\].*X\['ids'\]"),
        (UserDict(ids=TABLE), TypeError, r"X is a UserDict with the keys \['ids'\]"),
        ((TABLE, np.arange(6)), ValueError, r"tuple of rows, of shape \(6, 2\), .*fit\(X, y\)"),
        ([torch.from_numpy(TABLE), [0] * 6], ValueError, r"list of rows, .*fit\(X, y\)"),
        (zip(TABLE, range(6), strict=True), TypeError, r"X is a zip.*list\(X\)"),
        ((row for row in TABLE), TypeError, r"X is a generator.*list\(X\)"),
        ({1.0, 2.0}, TypeError, r"X is a set.*list\(X\)"),
        ("a" * 1000, ValueError, "scalar array instead: X is a str.*a data set"),
        (3.0, ValueError, "scalar array instead: X is a float"),
        (TensorDataset, ValueError, "scalar array instead: X is a type"),
        (np.zeros((2, 2), dtype="datetime64[s]"), ValueError, r"dates: \(X - X\.min\(\)\)"),
        (np.array([[10**400]]), ValueError, "more than 64 bits"),
        (np.array([[2**70 + 1]]), ValueError, r"more than 64 bits.*x % 2\*\*63"),
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
    if with_preprocess and isinstance(X, list) and isinstance((X or [0])[0], str):
        return  # references
    if (
        with_preprocess
        and isinstance(X, np.ndarray)
        and (X.dtype.kind in "UMO" or (X.ndim == 1 and len(X)))
    ):
        return
    with pytest.raises(error, match=message) as caught:
        as_rows(X, from_names if with_preprocess else None)
    assert len(str(caught.value)) <= 400


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


def fitted_on(X, preprocess=None):
    estimator = Estimator()
    rows_like_fit(estimator, X, preprocess, reset=True)
    return estimator


def known_of(estimator):
    return {name: value for name, value in vars(estimator).items() if name != "_kind"}


@pytest.mark.parametrize(
    "X", [TABLE, torch.from_numpy(TABLE), OneByOne(), TensorDataset(torch.from_numpy(TABLE))]
)
def test_a_table_has_a_number_of_columns(X):
    estimator = fitted_on(X)
    assert known_of(estimator) == {"n_features_in_": 2}
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
    assert known_of(estimator) == {"input_shape_": (1, 4, 4)}
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
    assert known_of(estimator) == {"input_shape_": ()}
    rows_like_fit(estimator, ["c"], from_names)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\), but"):
        rows_like_fit(estimator, TABLE, from_names)


RAGGED = [[1, 2], [3], [4, 5, 6]]


def of_objects(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def widths(rows):
    return torch.tensor([[float(len(row)), float(row[0])] for row in rows])


@pytest.mark.parametrize(
    "X",
    [
        RAGGED,
        tuple(RAGGED),
        of_objects(RAGGED),
        pd.Series(RAGGED),
        [np.array(row) for row in RAGGED],
        [torch.tensor(row) for row in RAGGED],
        of_objects([[1, 2], [3, 4]]),
    ],
)
@pytest.mark.parametrize(
    "some",
    [
        [[7, 8]],
        [[7, 8], [9, 1]],
        np.array([[7, 8]]),
        torch.tensor([[7, 8]]),
        [np.array([7, 8])],
        [torch.tensor([7, 8]), torch.tensor([7])],
    ],
)
def test_rows_of_several_lengths_stay_such_where_a_few_have_one_length(X, some):
    estimator = fitted_on(X, widths)
    rows = rows_like_fit(estimator, some, widths)
    assert isinstance(rows, Loaded)
    assert rows.read(slice(0, len(some))).tolist() == [[len(x), float(x[0])] for x in some]


@pytest.mark.parametrize("row", [[1, 2, 3], np.array([1, 2, 3])])
def test_a_row_of_its_own_length_comes_in_a_list(row):
    with pytest.raises(ValueError, match=r"numbers in one dimension.*\[row\]"):
        rows_like_fit(fitted_on(RAGGED, widths), row, widths)


def test_rows_of_several_lengths_after_rows_of_one_are_refused_with_a_remedy():
    alike = [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="fit on an array of dtype object"):
        rows_like_fit(fitted_on(alike, widths), RAGGED, widths)
    assert len(rows_like_fit(fitted_on(of_objects(alike), widths), RAGGED, widths)) == 3


@pytest.mark.parametrize("numbers", [[0, 2], range(2), np.arange(2), torch.arange(2)])
def test_row_numbers_stay_integers(numbers):
    estimator = fitted_on(np.arange(6), from_numbers)
    rows = rows_like_fit(estimator, numbers, from_numbers)
    assert rows.read(slice(0, 2)).tolist() == TABLE[np.asarray(numbers)].tolist()


def from_numbers(index):
    assert index.dtype.kind == "i"
    return torch.from_numpy(TABLE[index])


def test_texts_are_not_given_the_width_of_the_longest():
    seen = []

    def lengths(texts):
        seen.append(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    for texts in (["a", "b" * 100_000], ("a", "b" * 100_000), [b"a\0\0", b"b" * 100_000]):
        rows = as_rows(texts, lengths)
        assert rows.read(slice(0, 2)).tolist() == [[len(text)] for text in texts]
        assert seen[-1].dtype == object
    assert as_rows([["b" * 100_000, 1.0]], lengths).dtype == "object"


@pytest.mark.parametrize(
    "X",
    [
        [(row, number) for number, row in enumerate(TABLE)],
        [(row, torch.tensor(number)) for number, row in enumerate(torch.from_numpy(TABLE))],
        tuple([row.tolist(), str(number)] for number, row in enumerate(TABLE)),
        Unnamed(),
    ],
    ids=["arrays", "tensors", "lists", "methods of a data set"],
)
@pytest.mark.parametrize("preprocess", [None, torch.Tensor.double])
def test_pairs_are_data_sets_whatever_their_class(X, preprocess):
    rows = as_rows(X, preprocess)
    assert isinstance(rows, Loaded)
    assert rows.read(slice(0, 6)).tolist() == TABLE.tolist()
    assert [int(label) for label in rows.labels(0)] == list(range(6))
    assert [int(y) for _, y in take(X, np.array([4, 0]))] == [4, 0]


def test_pairs_of_numbers_are_a_table():
    assert isinstance(as_rows([(1.0, 2.0), (3.0, 4.0)]), InMemory)


# Frames


COLUMNS = {
    "float": [0.5, 1.0, 2.0],
    "int": [1, 2, 3],
    "bool": [True, False, True],
    "Int64": pd.array([1, 2, 3], dtype="Int64"),
    "boolean": pd.array([True, False, True], dtype="boolean"),
    "Float64": pd.array([0.5, 1.0, 2.0], dtype="Float64"),
    "objects": pd.Series([1, 2.5, True], dtype=object),
    "decimals": [Decimal("0.5"), Decimal(1), Decimal(2)],
}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("preprocess", [None, torch.Tensor.float])
def test_frames_of_numbers_are_numbers(column, preprocess):
    frame = pd.DataFrame({"a": [0.5, 1.5, 2.5], "b": COLUMNS[column]})
    rows = as_rows(frame, preprocess)
    assert isinstance(rows, InMemory)
    expected = [[float(x) for x in row] for row in frame.to_numpy(dtype=object)]
    assert rows.read(slice(0, 3)).tolist() == expected


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_frames_of_booleans_and_numbers_are_numbers(frame):
    rows = as_rows(frame({"a": [0.5, 1.5], "b": [True, False], "c": [1, None]}), torch.Tensor.float)
    assert rows.read(slice(0, 1)).tolist() == [[0.5, 1.0, 1.0]]


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean"])
def test_a_missing_value_is_named_with_its_column(dtype):
    frame = pd.DataFrame({"a": [0.5, 1.5], "age": pd.array([1, None], dtype=dtype)})
    with pytest.raises(ValueError, match="first in row 1, column 'age'"):
        as_rows(frame).check_finite()


@pytest.mark.parametrize(
    "column",
    [
        ["red", "blue"],
        pd.Categorical(["red", "blue"]),
        pd.date_range("2020", periods=2),
        pd.to_timedelta([1, 2], "s"),
        ["1.5", "2.5"],
    ],
    ids=["text", "category", "dates", "spans", "text of digits"],
)
def test_a_column_that_holds_no_numbers_is_named(column):
    frame = pd.DataFrame({"a": [0.5, 1.5], "b": [0.5, 1.5]})
    other = frame.assign(b=column)
    with pytest.raises((ValueError, TypeError), match=r"columns 'b', such.*OneHotEnc"):
        as_rows(other)
    estimator = fitted_on(frame, torch.Tensor.float)
    with pytest.raises(ValueError, match=r"columns 'b', but .* fitted on numbers"):
        rows_like_fit(estimator, other, torch.Tensor.float)
    with pytest.raises(Exception, match="float") as caught:
        as_rows(other, torch.Tensor.float).read(slice(0, 2))
    assert "no numbers in the columns 'b'" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    "column",
    [
        pl.date_range(date(2020, 1, 1), date(2020, 1, 2), eager=True),
        pl.datetime_range(date(2020, 1, 1), date(2020, 1, 2), "1d", eager=True),
        pl.Series([timedelta(seconds=1), timedelta(seconds=2)]),
        pl.Series([time(1), time(2)]),
        pl.Series([{"x": 0.5}, {"x": 1.5}]),
        pl.Series(["red", "blue"], dtype=pl.Enum(["red", "blue"])),
    ],
    ids=["dates", "times of a date", "spans", "times", "structs", "enum"],
)
def test_a_column_of_polars_that_holds_no_numbers_is_named(column):
    frame = pl.DataFrame({"a": [0.5, 1.5], "b": [0.5, 1.5]})
    other = frame.with_columns(column.alias("b"))
    with pytest.raises((ValueError, TypeError), match=r"columns 'b', such"):
        as_rows(other)
    with pytest.raises((ValueError, TypeError), match=r"columns 'b', such"):
        rows_like_fit(fitted_on(frame), other, None)


@pytest.mark.parametrize("unit", ["ns", "s"])
@pytest.mark.parametrize("kind", ["datetime64", "timedelta64"])
def test_dates_alone_are_no_numbers_in_any_unit(kind, unit):
    dates = np.array([[0, 1], [2, 3]]).astype(f"{kind}[{unit}]")
    single = np.empty(dates.shape, dtype=object)
    for place in np.ndindex(dates.shape):
        single[place] = dates[place]
    for X in (dates, pd.DataFrame(dates), single):
        with pytest.raises((ValueError, TypeError), match="no numbers"):
            as_rows(X)


def test_columns_of_numbers_after_columns_of_objects_are_objects_too():
    def first(values):
        assert values.dtype == object
        return torch.tensor([[float(len(str(row[0])))] for row in values])

    estimator = fitted_on(pd.DataFrame({"a": ["x", "y"], "b": [1.0, 2.0]}), first)
    rows = rows_like_fit(estimator, pd.DataFrame({"a": [10], "b": [1.0]}), first)
    assert rows.read(slice(0, 1)).tolist() == [[4.0]]


def test_columns_without_names_keep_their_order():
    frame = pd.DataFrame(TABLE, columns=[3, 5])
    estimator = fitted_on(frame)
    for same in (frame, TABLE, pd.DataFrame(TABLE)):
        rows_like_fit(estimator, same, None)
    with pytest.raises(ValueError, match=r"columns \[5, 3\], in another order"):
        rows_like_fit(estimator, frame[[5, 3]], None)


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
    assert known_of(estimator) == known


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


def test_searches_split_a_data_set_by_its_items():
    X, y = np.random.RandomState(0).randn(30, 4).astype(np.float32), np.arange(30) % 2
    detector = SparseEnergyOODDetector(max_epochs=0, pretrain_epochs=1, random_state=0)
    search = GridSearchCV(
        detector,
        {"tpr": [0.8, 0.9]},
        cv=2,
        scoring=lambda fitted, rows, y=None: fitted.score_samples(rows).mean(),
        error_score="raise",
    )
    scores = []
    for rows, labels in (
        (Listed(list(zip(X, y.tolist(), strict=True))), None),
        (X, y),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folds = KFold(2).split(X)
            search.set_params(cv=list(folds)).fit(rows, labels)
        scores.append(search.cv_results_["mean_test_score"].tolist())
    assert scores[0] == scores[1]


def test_all_rows_as_one_array():
    assert as_numbers(TABLE) is TABLE
    for X in (torch.from_numpy(TABLE).requires_grad_(), TABLE.tolist(), pd.DataFrame(TABLE)):
        assert as_numbers(X).tolist() == TABLE.tolist()
    assert as_numbers(["a", "b"]).dtype.kind == "O"
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
