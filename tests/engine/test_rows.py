from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from data_sets import PATHS, TABLE, AtOnce, Listed, N, from_names, from_table
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from skood.engine.inference import forward_rows
from skood.engine.loading import workers_kept
from skood.engine.objective import fine_tuning_terms
from skood.engine.rows import (
    PIECE,
    InMemory,
    Loaded,
    Rows,
    as_array,
    as_tensor,
    check_finite,
    has_channels_last,
    rows_of_dataset,
    rows_of_tensor,
    slices,
    spaced,
)
from skood.engine.training import Recipe, Training, TrainingData
from skood.penalties import l1

CPU = torch.device("cpu")

PAIRS = Listed([(row, number) for number, row in enumerate(TABLE)])

FORMS = {
    "array": lambda: InMemory(TABLE),
    "tensor": lambda: InMemory(torch.from_numpy(TABLE)),
    "tensor with gradient": lambda: InMemory(torch.from_numpy(TABLE).requires_grad_()),
    "paths": lambda: Loaded(PATHS, from_names),
    "row numbers": lambda: Loaded(np.arange(N), from_table),
    "pairs of arrays": lambda: Loaded(PAIRS, None),
    "tensors": lambda: Loaded(Listed(list(torch.from_numpy(TABLE))), None),
    "lists at once": lambda: Loaded(AtOnce([(row, 0) for row in TABLE.tolist()]), None),
    "names at once": lambda: Loaded(AtOnce([f"{row}.png" for row in range(N)]), from_names),
    "named items": lambda: Loaded(Listed([(f"{row}.png", 0) for row in range(N)]), from_names),
}
IN_MEMORY = ("array", "tensor", "tensor with gradient")
READ_BY_PREPROCESS = ("paths", "row numbers", "names at once", "named items")


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


# What all forms have


@pytest.mark.parametrize(
    "index",
    [slice(0, N), slice(3, 40), slice(98, 100), [7, 3, 99], [5, 5, 4, 4, 4], [0]],
    ids=str,
)
def test_rows_are_read_by_slice_and_by_index(form, index):
    rows = FORMS[form]()
    index = np.array(index) if isinstance(index, list) else index
    assert len(rows) == N
    batch = rows.read(index)
    assert not batch.requires_grad
    np.testing.assert_array_equal(batch, TABLE[index])


def test_what_is_known_of_rows(form):
    rows = FORMS[form]()
    assert rows.index is None
    assert rows.preprocessed == (form in READ_BY_PREPROCESS)
    assert rows.shape == (() if form in READ_BY_PREPROCESS else (3,))
    if form in IN_MEMORY:
        assert rows.dtype == "float64"


@pytest.mark.parametrize(
    "picks",
    [np.array([4, 90, 4, 7, 11]), np.arange(N)[::-1], np.arange(5, 60, 7)],
    ids=["any", "backwards", "steps"],
)
def test_rows_may_be_picked_from_rows_that_were_picked(form, picks):
    rows = FORMS[form]()
    some = rows.pick(picks)
    few = some.pick(np.array([3, 0, 3]))
    assert type(some) is type(few) is type(rows)
    assert (len(rows), len(some), len(few)) == (N, len(picks), 3)
    assert (some.shape, some.dtype, some.preprocessed) == (
        rows.shape,
        rows.dtype,
        rows.preprocessed,
    )
    for found, expected in ((some, picks), (few, picks[[3, 0, 3]])):
        whole, half = slice(0, len(found)), slice(1, 3)
        np.testing.assert_array_equal(found.read(whole), TABLE[expected])
        np.testing.assert_array_equal(found.read(half), TABLE[expected[half]])
        np.testing.assert_array_equal(found.read(np.array([2, 0])), TABLE[expected[[2, 0]]])
        assert [found.number(place) for place in range(len(found))] == expected.tolist()
        assert found.labels(0) is None or list(found.labels(0)) == [
            list(rows.labels(0))[row] for row in expected
        ]
    np.testing.assert_array_equal(rows.read(slice(0, N)), TABLE)


def test_no_rows_may_be_picked(form):
    assert len(FORMS[form]().pick(np.arange(0))) == 0


@pytest.mark.parametrize(("n_rows", "expected"), [(3, [0, 49, 99]), (1, [0]), (500, range(N))])
def test_spaced_rows_are_taken_from_beginning_to_end(form, n_rows, expected):
    few = FORMS[form]().spaced(n_rows)
    assert [few.number(place) for place in range(len(few))] == list(expected)
    assert spaced(N, n_rows).tolist() == list(expected)


@pytest.mark.parametrize("workers", [0, 1, 2, None])
@pytest.mark.usefixtures("impatient")
def test_rows_arrive_in_order_whoever_loads_them(form, workers):
    indices = [slice(0, 40), np.array([7, 3, 99]), np.array([5, 5, 4, 4, 4]), slice(98, 100)]
    streamed = list(FORMS[form]().stream(iter(indices), workers))
    assert len(streamed) == len(indices)
    for index, (given, batch) in zip(indices, streamed, strict=True):
        assert given is index
        np.testing.assert_array_equal(batch, TABLE[index])


@pytest.mark.usefixtures("impatient")
def test_picked_rows_arrive_in_order(form):
    picks = np.random.RandomState(0).permutation(N)[:50]
    ((_, batch),) = FORMS[form]().pick(picks).stream([slice(0, 50)], 2)
    np.testing.assert_array_equal(batch, TABLE[picks])


def test_all_rows_in_memory_are_compared_between_processes_and_some_of_others(form):
    rows = FORMS[form]()
    compared = np.concatenate(list(rows.compared()))
    picks = np.arange(N) if form in IN_MEMORY else spaced(N, 16)
    np.testing.assert_array_equal(compared, TABLE[picks])


def test_of_a_large_array_some_rows_are_compared(monkeypatch):
    monkeypatch.setattr("skood.engine.rows.BYTES_TO_COMPARE", TABLE[:20].nbytes)
    (compared,) = FORMS[IN_MEMORY[0]]().compared()
    np.testing.assert_array_equal(compared, TABLE[spaced(N, 20)])


# Rows that stay on the device


def test_rows_stay_where_they_are_without_memory_for_them(form):
    rows = FORMS[form]()
    assert rows.on(CPU, torch.float32) is rows


@pytest.fixture
def memory(monkeypatch):
    """A function that makes the CPU a device apart, with so many bytes free."""

    def make(n_bytes):
        monkeypatch.setattr("skood.engine.rows.free_memory", lambda device: n_bytes)
        monkeypatch.setattr(InMemory, "_lies_on", lambda self, device: False)

    return make


@pytest.mark.parametrize(("free", "stays"), [(4 * N * 3 * 4, True), (4 * N * 3 * 4 - 1, False)])
def test_rows_stay_on_the_device_that_has_four_times_the_memory(memory, free, stays):
    memory(free)
    rows = InMemory(TABLE)
    there = rows.on(CPU, torch.float32)
    assert (there is not rows) == stays


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_rows_on_the_device_are_the_same_rows(memory, form, dtype):
    memory(10**9)
    rows = FORMS[form]().pick(np.arange(90, 0, -1))
    there = rows.on(CPU, dtype)
    if form not in IN_MEMORY:
        assert there is rows
        return
    assert there.dtype == str(dtype or torch.float64).removeprefix("torch.")
    assert torch.equal(there.read(slice(0, 90)), rows.read(slice(0, 90)).to(dtype))
    assert [there.number(place) for place in (0, 89)] == [90, 1]
    few = there.pick(np.array([5]))
    assert few.number(0) == 85
    assert torch.equal(few.read(slice(0, 1)), rows.read(slice(5, 6)).to(dtype))


# NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_values_that_are_no_numbers_are_refused_wherever_they_are(make, value):
    X = np.zeros((2 * PIECE + 10, 2))
    InMemory(make(X)).check_finite()
    X[PIECE + 3, 1] = X[PIECE + 8, 0] = value
    with pytest.raises(ValueError, match=rf"for float64: first in row {PIECE + 3}\."):
        InMemory(make(X)).check_finite()
    others = np.delete(np.arange(len(X)), [PIECE + 3, PIECE + 8])
    InMemory(make(X)).pick(others).check_finite()
    backwards = InMemory(make(X)).pick(np.arange(len(X))[::-1])
    with pytest.raises(ValueError, match=rf"first in row {PIECE + 8}\."):
        backwards.check_finite()


def test_integers_and_rows_that_must_be_loaded_are_not_checked():
    InMemory(np.full((3, 2), 7)).check_finite()
    Loaded(Listed(list(np.full((3, 2), np.nan))), None).check_finite()


@pytest.mark.parametrize(("index", "row"), [(slice(2, 4), 30), (np.array([0, 3]), 30)])
def test_the_row_that_is_refused_has_its_number_in_X(index, row):
    rows = InMemory(np.zeros((50, 2))).pick(np.arange(0, 50, 10))
    batch = torch.tensor([[0.0, 1.0], [math.nan, 0.0]])
    with pytest.raises(ValueError, match=rf"for float32: first in row {row}\. .*SimpleImputer"):
        check_finite(batch, rows, index)


# Rows that are loaded


def test_a_repeated_row_is_loaded_once():
    asked = []

    def count(rows):
        asked.append(rows.tolist())
        return from_table(rows)

    rows = Loaded(np.arange(N), count)
    np.testing.assert_array_equal(rows.read(np.array([8, 9, 9, 9])), TABLE[[8, 9, 9, 9]])
    rows.pick(np.array([4, 4, 4])).read(slice(0, 3))
    assert asked == [[8, 9], [4]]


def missing(rows):
    raise FileNotFoundError(f"no file {rows[0]}")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("impatient")
def test_errors_of_what_loads_keep_their_type(workers):
    stream = Loaded(np.arange(N), missing).stream([slice(3, 50)], workers)
    with pytest.raises(FileNotFoundError, match="no file 3"):
        list(stream)


@pytest.mark.parametrize(
    ("preprocess", "error", "message"),
    [
        (lambda rows: from_table(rows[:1]), ValueError, "number of rows must stay the same"),
        (lambda rows: TABLE[rows], TypeError, "must return a torch tensor"),
    ],
)
def test_preprocess_of_references_must_give_as_many_rows(preprocess, error, message):
    with pytest.raises(error, match=message):
        Loaded(np.arange(N), preprocess).read(slice(0, 3))


def test_a_data_set_of_no_numbers_needs_preprocess():
    with pytest.raises(TypeError, match=r"of type str.*preprocess="):
        Loaded(Listed(["a.png", "b.png"]), None).read(slice(0, 2))


def test_items_that_are_dicts_are_refused_with_a_function_that_takes_them():
    data = Listed([{"label": 0, "pixels": row} for row in TABLE])
    with pytest.raises(TypeError, match="of type dict") as caught:
        Loaded(data, None).read(slice(0, 2))
    assert "torch.stack([torch.as_tensor(row['pixels']) for row in rows])" in str(caught.value)

    def as_it_says(rows):
        return torch.stack([torch.as_tensor(row["pixels"]) for row in rows])

    np.testing.assert_array_equal(Loaded(data, as_it_says).read(slice(0, 2)), TABLE[:2])


def test_items_of_several_shapes_are_refused():
    rows = Loaded(Listed([torch.zeros(2), torch.zeros(3)]), None)
    with pytest.raises(ValueError, match=r"several shapes, such as \[\(2,\), \(3,\)\].*resize"):
        rows.read(slice(0, 2))


@pytest.mark.parametrize("convert", [lambda x: x, np.asarray])
def test_complex_items_are_refused(convert):
    data = Listed([convert(row * 1j) for row in torch.from_numpy(TABLE)])
    with pytest.raises((TypeError, ValueError), match=r"Complex|preprocess="):
        Loaded(data, None).read(slice(0, 2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("impatient")
def test_items_with_gradients_are_detached(workers):
    weight = torch.ones(3, requires_grad=True)
    rows = Loaded(Listed([weight * row for row in torch.from_numpy(TABLE)]), None)
    ((_, batch),) = rows.stream([slice(0, N)], workers)
    assert not batch.requires_grad


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
    found = rows_of_dataset(X, None).labels(workers)
    assert (found if found is None else list(found)) == labels


class Halved(TensorDataset):
    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x / 2, 1 - y


def test_a_data_set_of_tensors_is_in_memory_unless_it_gives_other_items():
    tensor = torch.zeros(2, 3)
    rows = rows_of_dataset(TensorDataset(tensor, torch.zeros(2)), None)
    assert type(rows) is InMemory
    assert rows.read(slice(0, 2)).data_ptr() == tensor.data_ptr()
    halved = rows_of_dataset(Halved(torch.ones(2, 3), torch.tensor([1, 0])), None)
    assert type(halved) is Loaded
    assert halved.labels(0) == [0, 1]
    assert (halved.read(slice(0, 2)) == 0.5).all()


class Endless(IterableDataset):
    def __iter__(self):
        return iter([1.0])


class Sized(Endless):
    def __len__(self):
        return 1


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (Endless(), TypeError, "without __len__ .*map-style"),
        (Sized(), TypeError, r"X is a Sized .*list\(X\)"),
        (Listed([]), ValueError, "0 rows"),
        (Listed([(1.0, 2, 3)]), TypeError, r"tuples of 3 \(float, int, int\); expected x or \(x"),
        (TensorDataset(*[torch.zeros(1, 2)] * 3), TypeError, "tuples of 3"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused(X, error, message):
    with pytest.raises(error, match=message):
        rows_of_dataset(X, None)


# Rows in memory


@pytest.mark.parametrize(
    "X",
    [
        torch.zeros(3),
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.zeros(3, 2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
    ],
)
def test_tensors_that_are_no_rows_are_refused(X):
    with pytest.raises(ValueError, match=r"X is a tensor of shape .*X\.reshape\(-1, 1\)"):
        rows_of_tensor(X)


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_rows_in_memory_are_not_copied(make):
    X = make(TABLE)
    there = InMemory(X).read(slice(0, N)).data_ptr()
    assert there == torch.as_tensor(X).data_ptr()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.zeros((4, 2), dtype=np.uint8), torch.uint8),
        (np.zeros((4, 2), dtype=">f8"), torch.float64),
        (np.zeros((4, 2), dtype=">i2"), torch.int16),
        (np.zeros((4, 2), dtype=np.longdouble), torch.float64),
        (np.zeros((4, 2), dtype=bool), torch.bool),
        (np.zeros((4, 2), dtype=np.float16), torch.float16),
    ],
)
def test_arrays_of_any_dtype_become_tensors(values, dtype):
    assert as_tensor(values).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "uint8", ">f4"])
@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("n_columns", [1, 3])
def test_reversed_arrays_become_tensors(dtype, n_rows, n_columns):
    values = np.arange(12, dtype=dtype).reshape(4, 3)[::-1, ::-1][:n_rows, :n_columns]
    assert as_tensor(values).tolist() == values.tolist()


def test_nested_tensors_are_refused_with_what_to_pass():
    rows = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"X is a nested tensor.*X\.to_padded_tensor"):
        rows_of_tensor(rows)


# An input type of one's own


class Drawn(Rows):
    """Rows that are drawn when they are asked for."""

    dtype = "float64"

    def __init__(self, n_rows, width):
        self.n_rows = n_rows
        self.shape = (width,)

    def _n_rows(self):
        return self.n_rows

    def _read(self, index):
        numbers = torch.arange(self.n_rows, dtype=torch.float64)[index]
        return torch.sin(numbers[:, None] * torch.arange(1.0, self.shape[0] + 1))


def test_a_form_of_rows_needs_two_methods_to_be_fitted_and_scored(opened):
    rows = Drawn(50, 4)
    table = rows.read(slice(0, 50)).numpy()
    labels = np.arange(50) % 3
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    outcomes = []
    for some in (rows, InMemory(table)):
        network = opened(module, some)
        training = TrainingData(
            some.pick(np.arange(40)),
            labels[:40],
            network.batcher.resident(some).pick(np.arange(40, 50)),
        )
        terms = fine_tuning_terms(
            l1, {"sparsity_weight": 0.1, "outlier_weight": 0.5, "distillation_weight": 1.0}
        )
        recipe = Recipe(2, 16, 0.1, 0.9, 0.0)
        (*_, record) = Training(network, training, terms, recipe, seed=0).run()
        logits = torch.cat([z for _, (_, z, _) in forward_rows(network, some)])
        outcomes.append((record["loss"], logits))
    assert outcomes[0][0] == outcomes[1][0]
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert rows.labels(0) is None
    rows.check_finite()


# Helpers


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [(0, []), (1, [(0, 1)]), (4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)])],
)
def test_slices_cover_all_rows_once(n_rows, expected):
    assert [(piece.start, piece.stop) for piece in slices(n_rows, 4)] == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 8, 8, 3), True),
        ((9, 8, 8, 1), True),
        ((9, 8, 8, 4), True),
        ((9, 3, 8, 8), False),
        ((9, 3, 8, 3), False),
        ((9, 3, 3, 8), False),
        ((9, 8, 8, 13), True),
        ((9, 8, 8, 2), True),
        ((9, 13, 8, 8), False),
        ((9, 8, 8, 8), False),
        ((9, 8, 6, 13), False),
        ((9, 13, 8, 6), False),
        ((9, 8, 3), False),
        ((9, 3), False),
    ],
)
def test_channels_last_are_told_by_their_number_or_by_squares(shape, expected):
    assert has_channels_last(shape) == expected


def test_bfloat16_becomes_a_float32_array():
    array = as_array(torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True))
    assert array.dtype == np.float32
    assert array.tolist() == [1.5]
    same = np.zeros(3)
    assert as_array(same) is same


# Data sets that change


class Changing(Dataset):
    def __init__(self, change):
        self.change = change

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return torch.full((3,), float(index)) * self.change()


OWN = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("change", "workers"),
    [
        (lambda: float(torch.rand(()) > 0.05), 0),
        (lambda: float(np.random.rand() > 0.05), 0),
        (lambda: float(random.random() > 0.05), 0),
        (OWN.random, 0),
        (OWN.random, 1),
    ],
    ids=["torch", "numpy", "python", "its own", "in a worker"],
)
@pytest.mark.usefixtures("impatient")
def test_a_data_set_that_changes_is_refused_wherever_it_is_read(change, workers):
    rows = rows_of_dataset(Changing(change), None)
    indices = (np.arange(start, start + 100) for start in (0, 100))
    with pytest.raises(ValueError, match=r"the data set, Changing, gives other values.*augment="):
        list(rows.stream(indices, workers))


@pytest.mark.usefixtures("impatient")
def test_workers_load_for_none_that_reads_the_same_references_otherwise():
    references = np.array([f"{i}" for i in range(4)], dtype=object)
    signs = (1.0, -1.0)
    with workers_kept():
        for sign in signs:
            rows = Loaded(references, lambda some, sign=sign: sign * torch.ones(len(some), 2))
            for picked in (rows, rows.pick(np.arange(2))):
                assert all((batch == sign).all() for _, batch in picked.stream([slice(0, 2)], 1))


def test_a_data_set_that_draws_without_effect_or_holds_nan_is_read():
    rows = rows_of_dataset(Changing(lambda: 1 + 0 * torch.rand(())), None)
    assert torch.equal(rows.read(slice(0, 3))[:, 0], torch.arange(3.0))
    assert rows_of_dataset(Changing(lambda: float("nan")), None).read(slice(0, 70)).isnan().all()
