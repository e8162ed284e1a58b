from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from skood.engine.batches import Batcher
from skood.engine.loading import (
    FEW_ROWS,
    as_references,
    check_dataset,
    is_loadable,
    load,
    load_batch,
    read_labels,
    row_count,
    row_shape,
    transformed,
)

N = 100
TABLE = np.random.RandomState(0).randn(N, 3)


class Listed(Dataset):
    """A map-style data set over a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class AtOnce(Listed):
    """A data set that gives several items at once, in torch's protocol."""

    def __getitem__(self, row):
        raise AssertionError("items are asked for at once")

    def __getitems__(self, rows):
        return [self.items[row] for row in rows]


class Endless(IterableDataset):
    def __iter__(self):
        return iter([1.0])


def from_table(rows):
    return torch.from_numpy(TABLE[rows.astype(int)])


def from_names(names):
    return from_table(np.array([int(Path(name).stem) for name in names]))


PATHS = np.array([Path(f"{row}.png") for row in range(N)])


@pytest.mark.parametrize(
    ("X", "expected"),
    [
        (np.arange(3), True),
        (np.array(["a.png", "b.png"]), True),
        (PATHS, True),
        (np.array([["a", 1]], dtype=object), True),
        (Listed([1.0]), True),
        (TABLE, False),
        (TABLE > 0, False),
        (torch.arange(3), False),
    ],
)
def test_what_must_be_loaded(X, expected):
    assert is_loadable(X) is expected


@pytest.mark.parametrize(
    ("X", "shape", "kind"),
    [
        (["a.png", "b.png"], (2,), "U"),
        ([Path("a.png"), Path("b.png")], (2,), "O"),
        (np.arange(4), (4,), "i"),
        (torch.arange(4), (4,), "i"),
        (range(4), (4,), "i"),
        ([{"a": 1}, {"a": 2}], (2,), "O"),
        ([np.zeros((2, 2)), np.zeros((3, 2))], (2,), "O"),
        (np.array([["a", 1]], dtype=object), (1, 2), "O"),
    ],
)
def test_references(X, shape, kind):
    references = as_references(X)
    assert references.shape == shape
    assert references.dtype.kind == kind


@pytest.mark.parametrize("X", [TABLE, TABLE.tolist(), torch.zeros(3, 2), np.zeros((2, 2, 2))])
def test_numbers_are_no_references(X):
    assert as_references(X) is None


@pytest.mark.parametrize("workers", [0, 1, 2, None])
@pytest.mark.parametrize(
    ("X", "preprocess", "preprocessed"),
    [
        (np.arange(N), from_table, True),
        (PATHS, from_names, True),
        (Listed(list(torch.from_numpy(TABLE))), None, False),
        (Listed([(row, 0) for row in TABLE]), None, False),
        (AtOnce([(row, 0) for row in TABLE.tolist()]), None, False),
        (Listed([(f"{row}.png", 0) for row in range(N)]), from_names, True),
    ],
    ids=["row numbers", "paths", "tensors", "pairs of arrays", "lists at once", "named items"],
)
def test_rows_arrive_in_order_whoever_loads_them(X, preprocess, preprocessed, workers):
    indices = [slice(0, 40), np.array([7, 3, 99]), np.array([5, 5, 4, 4, 4]), slice(98, 100)]
    fetch = partial(load_batch, X, preprocess)
    loaded = list(load(fetch, iter(indices), N, workers))
    assert len(loaded) == len(indices)
    for index, (given, (batch, done)) in zip(indices, loaded, strict=True):
        assert given is index
        assert done is preprocessed
        np.testing.assert_array_equal(batch, TABLE[index])


def test_a_repeated_row_is_loaded_once():
    asked = []

    def count(rows):
        asked.append(rows.tolist())
        return from_table(rows)

    load_batch(np.arange(N), count, np.array([8, 9, 9, 9]))
    assert asked == [[8, 9]]


def process_of(_):
    return os.getpid()


@pytest.mark.parametrize(
    ("n_rows", "workers", "here"),
    [(FEW_ROWS, 2, True), (FEW_ROWS + 1, 2, False), (FEW_ROWS + 1, 0, True)],
)
def test_workers_load_unless_there_is_little_to_load(n_rows, workers, here):
    indices = [np.arange(n_rows)]
    (_, process), *_ = load(process_of, indices, n_rows, workers)
    assert (process == os.getpid()) is here


def test_an_endless_stream_is_read_as_far_as_it_is_asked_for():
    def endless():
        while True:
            yield np.arange(3)

    stream = load(partial(load_batch, np.arange(N), from_table), endless(), N, 1)
    for _ in range(5):
        assert len(next(stream)[1][0]) == 3
    stream.close()


def test_loading_leaves_the_generators_alone(generator_states):
    before = generator_states()
    list(load(partial(load_batch, np.arange(N), from_table), [slice(0, N)], N, 1))
    assert generator_states() == before


def missing(rows):
    raise FileNotFoundError(f"no file {rows[0]}")


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_what_loads_keep_their_type(workers):
    stream = load(partial(load_batch, np.arange(N), missing), [slice(3, 50)], N, workers)
    with pytest.raises(FileNotFoundError, match="no file 3"):
        list(stream)


def test_an_error_of_preprocess_gains_a_note():
    with pytest.raises(FileNotFoundError) as caught:
        transformed(np.arange(2), missing, "preprocess")
    assert "Raised by preprocess, on a batch of shape (2,) and dtype int64" in str(
        caught.value.__notes__
    )


def test_preprocess_of_references_must_give_as_many_rows():
    with pytest.raises(ValueError, match="number of rows must stay the same"):
        load_batch(np.arange(N), lambda rows: from_table(rows[:1]), slice(0, 3))
    with pytest.raises(TypeError, match="must return a torch tensor"):
        load_batch(np.arange(N), lambda rows: TABLE[rows], slice(0, 3))


def test_a_data_set_of_no_numbers_needs_preprocess():
    with pytest.raises(TypeError, match=r"of type str.*preprocess="):
        load_batch(Listed(["a.png", "b.png"]), None, slice(0, 2))


def test_items_of_several_shapes_are_refused():
    with pytest.raises(ValueError, match=r"several shapes, such as \[\(2,\), \(3,\)\].*resize"):
        load_batch(Listed([torch.zeros(2), torch.zeros(3)]), None, slice(0, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("X", "labels"),
    [
        (Listed([(row, 3) for row in TABLE]), [3] * N),
        (Listed([(row, torch.tensor(3)) for row in TABLE]), [3] * N),
        (Listed([(row, "cat") for row in TABLE]), ["cat"] * N),
        (TensorDataset(torch.zeros(2, 3), torch.tensor([1, 0])), [1, 0]),
        (Listed(list(TABLE)), None),
        (Listed([(row,) for row in TABLE]), None),
        (TensorDataset(torch.zeros(2, 3)), None),
    ],
)
def test_labels_of_a_data_set(X, labels, workers):
    found = read_labels(X, workers)
    assert (found if found is None else list(found)) == labels


class Halved(TensorDataset):
    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x / 2, 1 - y


def test_a_data_set_of_tensors_that_gives_other_items_is_not_unwrapped():
    data = Halved(torch.ones(2, 3), torch.tensor([1, 0]))
    assert check_dataset(data) is data
    assert read_labels(data, 0) == [0, 1]
    batch, _ = load_batch(data, None, slice(0, 2))
    assert (batch == 0.5).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_items_with_gradients_are_detached(workers):
    weight = torch.ones(3, requires_grad=True)
    X = Listed([weight * row for row in torch.from_numpy(TABLE)])
    ((_, (batch, _)),) = load(partial(load_batch, X, None), [slice(0, N)], N, workers)
    assert not batch.requires_grad


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray])
def test_complex_items_are_refused(convert):
    X = Listed([convert(row * 1j) for row in torch.from_numpy(TABLE)])
    with pytest.raises((TypeError, ValueError), match=r"Complex|preprocess="):
        load_batch(X, None, slice(0, 2))


def test_a_data_set_of_tensors_is_unwrapped():
    tensor = torch.zeros(2, 3)
    assert check_dataset(TensorDataset(tensor, torch.zeros(2))) is tensor


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (Endless(), TypeError, "without __len__ .*map-style"),
        (Listed([]), ValueError, "0 rows"),
        (Listed([(1.0, 2, 3)]), TypeError, r"tuples of 3 \(float, int, int\); expected x or \(x"),
        (TensorDataset(*[torch.zeros(1, 2)] * 3), TypeError, "tuples of 3"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused(X, error, message):
    with pytest.raises(error, match=message):
        check_dataset(X)


def test_count_and_shape_of_rows():
    for X, shape in [
        (TABLE, (3,)),
        (np.zeros((N, 4, 5)), (4, 5)),
        (Listed([(row, 0) for row in TABLE]), (3,)),
        (Listed(["a"] * N), ()),
        (PATHS, ()),
    ]:
        assert row_count(X) == N
        assert row_shape(X) == shape


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_of_a_data_set_reach_preprocess_as_a_tensor(workers):
    def double(batch):
        assert isinstance(batch, torch.Tensor)
        return batch * 2

    batcher = Batcher(torch.device("cpu"), torch.float32, double, workers)
    X = Listed([(row, 0) for row in TABLE])
    (batch,) = batcher.stream(X, [slice(0, N)], N)
    np.testing.assert_array_equal(batch, (2 * TABLE).astype(np.float32))


def test_values_that_are_no_numbers_are_refused_by_row():
    X = TABLE.copy()
    X[61, 1] = np.nan
    batcher = Batcher(torch.device("cpu"), torch.float32, None, 1)
    with pytest.raises(ValueError, match="first in row 61"):
        list(batcher.stream(Listed(list(X)), [slice(0, 50), slice(50, N)], N))
