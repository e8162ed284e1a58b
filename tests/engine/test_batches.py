from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from data_sets import TABLE, Listed, N

from skood.engine.batches import Batcher, channels_first, moments
from skood.rows import as_rows

CPU = torch.device("cpu")


def batcher(dtype=torch.float32, preprocess=None, workers=None):
    return Batcher(CPU, dtype, preprocess, workers)


def read_only(X):
    X.setflags(write=False)
    return X


WHOLE = np.arange(24).reshape(6, 4)

CONTAINERS = {
    "float64": WHOLE.astype(np.float64),
    "float32": WHOLE.astype(np.float32),
    "float16": WHOLE.astype(np.float16),
    "uint8": WHOLE.astype(np.uint8),
    "uint16": WHOLE.astype(np.uint16),
    "int64": WHOLE.astype(np.int64),
    "big-endian": WHOLE.astype(">f8"),
    "big-endian int": WHOLE.astype(">i2"),
    "Fortran order": np.asfortranarray(WHOLE.astype(np.float64)),
    "negative strides": WHOLE.astype(np.float32)[::-1, ::-1].copy()[::-1, ::-1],
    "every other row": np.repeat(WHOLE.astype(np.float32), 2, axis=0)[::2],
    "read-only": read_only(WHOLE.astype(np.float32)),
    "read-only float64": read_only(WHOLE.astype(np.float64)),
    "broadcast columns": np.broadcast_to(WHOLE.astype(np.float32), (2, 6, 4))[1],
    "tensor": torch.tensor(WHOLE, dtype=torch.float32),
    "tensor float64": torch.tensor(WHOLE, dtype=torch.float64),
    "tensor bfloat16": torch.tensor(WHOLE, dtype=torch.bfloat16),
    "tensor int": torch.tensor(WHOLE),
    "tensor transposed": torch.tensor(WHOLE.T, dtype=torch.float32).T,
    "tensor with gradient": torch.tensor(WHOLE, dtype=torch.float32, requires_grad=True),
}


# Rows in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("container", sorted(CONTAINERS))
def test_rows_arrive_whole_in_the_dtype_of_the_network(container, dtype):
    changed = torch.Tensor.double if "int" in container else torch.clone
    rows = as_rows(CONTAINERS[container])
    for preprocess in (None, changed):
        for index in (slice(1, 4), np.array([4, 0, 4])):
            batch = batcher(dtype, preprocess)(rows, index)
            assert batch.dtype == dtype
            assert batch.is_contiguous()
            assert not batch.requires_grad
            assert batch.tolist() == WHOLE[index].tolist()


def test_without_an_index_all_rows_make_a_batch():
    rows = as_rows(CONTAINERS["float64"])
    assert batcher()(rows).tolist() == WHOLE.tolist()
    assert batcher()(rows.pick(np.array([4, 1]))).tolist() == WHOLE[[4, 1]].tolist()


def test_booleans_become_zeros_and_ones():
    X = np.array([[True, False], [False, True]])
    assert batcher()(as_rows(X)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_images_are_laid_out_channels_last():
    X = np.random.RandomState(0).rand(4, 3, 5, 6)
    batch = batcher(torch.float64)(as_rows(X))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.numpy(), X)


@pytest.mark.parametrize("container", ["float32", "tensor"])
@pytest.mark.parametrize("index", [slice(0, 3), np.array([0, 1, 2])])
def test_a_batch_is_a_copy_of_its_own(container, index):
    rows = as_rows(CONTAINERS[container])
    (streamed,) = batcher().stream(rows, [index])
    for batch in (batcher()(rows, index), streamed):
        batch.zero_()
    assert batcher()(rows).tolist() == WHOLE.tolist()


# preprocess


@pytest.mark.parametrize(
    ("X", "dtype"),
    [
        (np.zeros((4, 2), dtype=np.uint8), torch.uint8),
        (np.zeros((4, 2), dtype=">f8"), torch.float64),
        (np.zeros((4, 2), dtype=np.float16), torch.float16),
        (torch.zeros(4, 2, dtype=torch.int32), torch.int32),
    ],
)
def test_preprocess_sees_the_dtype_of_the_rows(X, dtype):
    seen = []

    def preprocess(batch):
        seen.append((batch.dtype, tuple(batch.shape), batch.device))
        return batch.float()

    batcher(preprocess=preprocess)(as_rows(X), slice(1, 4))
    assert seen == [(dtype, (3, 2), CPU)]


@pytest.mark.parametrize(
    ("result", "expected"),
    [(torch.float64, torch.float32), (torch.float16, torch.float32), (torch.int64, torch.int64)],
)
def test_floats_from_preprocess_are_cast_and_integers_kept(result, expected):
    batch = batcher(preprocess=lambda batch: batch.to(result))(as_rows(WHOLE), slice(0, 3))
    assert batch.dtype == expected


@pytest.mark.parametrize(("result", "kind"), [(np.zeros(3), "ndarray"), (None, "NoneType")])
def test_a_transform_must_return_a_tensor(result, kind):
    with pytest.raises(TypeError, match=rf"^preprocess returned a {kind} for .*\(3, 4\)"):
        batcher(preprocess=lambda batch: result)(as_rows(WHOLE), slice(0, 3))


def test_what_preprocess_breaks_is_refused():
    with pytest.raises(ValueError, match=r"first in row 3\."):
        batcher(preprocess=lambda batch: 1 / (batch - 12.0))(as_rows(WHOLE), slice(2, 5))


def test_preprocess_may_change_the_shape_of_a_row():
    X = np.random.RandomState(0).randint(256, size=(5, 4, 6, 3), dtype=np.uint8)
    batch = batcher(preprocess=lambda b: b.permute(0, 3, 1, 2).float() / 255)(as_rows(X))
    expected = np.moveaxis(X, -1, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(batch.numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_of_a_data_set_reach_preprocess_as_a_tensor(workers):
    def double(batch):
        assert isinstance(batch, torch.Tensor)
        return batch * 2

    rows = as_rows(Listed([(row, 0) for row in TABLE]), double)
    (batch,) = batcher(preprocess=double, workers=workers).stream(rows)
    np.testing.assert_array_equal(batch, (2 * TABLE).astype(np.float32))


def test_what_preprocess_loads_is_not_preprocessed_again():
    rows = as_rows(np.arange(4), lambda numbers: torch.from_numpy(numbers[:, None] + 1))
    assert batcher(preprocess=lambda batch: batch + 100)(rows).tolist() == [[1], [2], [3], [4]]


# NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize(("index", "row"), [(slice(2, 6), 4), (np.array([5, 4, 2, 3]), 5)])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_values_that_the_network_cannot_take_are_refused_with_their_row(make, index, row, value):
    X = WHOLE.astype(np.float64)
    X[4, 3] = X[5, 0] = value
    X = make(X.tolist(), dtype=np.float64 if make is np.array else torch.float64)
    with pytest.raises(ValueError, match=rf"too large for float32: first in row {row}\."):
        batcher()(as_rows(X), index)


def test_overflow_depends_on_the_dtype_of_the_network():
    X = as_rows(np.array([[1.0], [1e5], [1e39]]))
    assert batcher(torch.float64)(X).tolist() == [[1.0], [1e5], [1e39]]
    with pytest.raises(ValueError, match=r"float32: first in row 2"):
        batcher(torch.float32)(X)
    with pytest.raises(ValueError, match=r"float16: first in row 1"):
        batcher(torch.float16)(X)


def test_preprocess_may_fill_in_what_is_missing():
    X = np.array([[1.0, math.nan]])
    batch = batcher(preprocess=torch.nan_to_num)(as_rows(X))
    assert batch.tolist() == [[1.0, 0.0]]


def test_unchecked_batches_may_hold_anything():
    rows = as_rows(np.array([[1.0, np.nan], [2.0, 3.0]]))
    (batch,) = batcher().stream(rows, checked=False)
    assert batch.isnan().sum() == 1
    with pytest.raises(ValueError, match="first in row 0"):
        list(batcher().stream(rows))


def test_values_that_are_no_numbers_are_refused_by_row():
    X = TABLE.copy()
    X[61, 1] = np.nan
    with pytest.raises(ValueError, match="first in row 61"):
        list(batcher(workers=1).stream(as_rows(Listed(list(X))), [slice(0, 50), slice(50, N)]))


# Streams


@pytest.mark.parametrize("n_rows", [1, 256, 257, 600])
def test_a_stream_without_indices_gives_all_rows_in_order(n_rows):
    X = np.random.RandomState(0).randn(n_rows, 3)
    batches = list(batcher(torch.float64).stream(as_rows(X)))
    assert max(map(len, batches)) <= 256
    assert torch.cat(batches).tolist() == X.tolist()


# Helpers


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((5000, 3), (0,), (3,)),
        ((50, 1), (0,), (1,)),
        ((30, 2, 4, 5), (0, 2, 3), (2,)),
        ((30, 1, 4, 5), (0, 2, 3), (1,)),
        ((30, 4, 5), (0, 1, 2), (1,)),
    ],
)
def test_moments_are_those_of_the_rows_asked_for(shape, axes, expected):
    X = np.random.RandomState(0).randn(*shape) * 3 + 100
    rows = np.arange(0, len(X), 2)
    mean, std = moments(batcher(torch.float64), as_rows(X).pick(rows))
    assert tuple(mean.shape) == tuple(std.shape) == expected
    np.testing.assert_allclose(mean.ravel(), X[rows].mean(axis=axes).ravel(), rtol=1e-12)
    np.testing.assert_allclose(std.ravel(), X[rows].std(axis=axes).ravel(), rtol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.uint8, torch.float32), (torch.float64, torch.float64)]
)
def test_channels_first_moves_the_channels(dtype, expected):
    images = torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).to(dtype)
    moved = channels_first(images)
    assert moved.dtype == expected
    assert moved.shape == (2, 3, 4, 5)
    assert moved[1, 2, 3, 4] == images[1, 3, 4, 2]


# Rows that stay on the device


@pytest.mark.parametrize("preprocess", [None, lambda batch: batch.double() / 7])
@pytest.mark.parametrize("container", sorted(set(CONTAINERS) - {"tensor bfloat16"}))
def test_rows_that_stay_on_the_device_give_the_same_batches(monkeypatch, container, preprocess):
    monkeypatch.setattr("skood.engine.rows.free_memory", lambda device: 10**6)
    monkeypatch.setattr("skood.engine.rows.InMemory._lies_on", lambda self, device: False)
    own, rows = batcher(preprocess=preprocess), as_rows(CONTAINERS[container])
    there = own.resident(rows)
    assert there is not rows
    assert there.read(slice(0, 6)).tolist() == WHOLE.tolist()
    # They travel once, in the dtype in which batches want them.
    seen = rows.read(slice(0, 1)).dtype
    assert there.read(slice(0, 1)).dtype == (torch.float32 if preprocess is None else seen)
    index = np.array([4, 0, 4])
    assert torch.equal(own(there, index), own(rows, index))


def test_no_gradient_reaches_what_preprocess_holds():
    weight = torch.ones(4, requires_grad=True)
    made = batcher(preprocess=lambda x: x.float() * weight)
    assert not made(as_rows(WHOLE), np.arange(3)).requires_grad
    # What is exported lets gradients through, to the rows.
    rows = torch.ones(2, 4, requires_grad=True)
    assert made.prepared(rows).requires_grad
