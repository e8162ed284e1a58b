from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skood.engine.batches import (
    Batcher,
    as_array,
    channels_first,
    check_finite,
    check_tensor,
    has_channels_last,
    moments,
    slices,
    transformed,
)

CPU = torch.device("cpu")


def batcher(dtype=torch.float32, preprocess=None):
    return Batcher(CPU, dtype, preprocess)


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


# Arrays and tensors


@pytest.mark.parametrize("preprocess", [None, lambda batch: batch.clone()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [slice(1, 4), np.array([4, 0, 4])])
@pytest.mark.parametrize("container", sorted(CONTAINERS))
def test_rows_arrive_whole_in_the_dtype_of_the_network(container, index, dtype, preprocess):
    if preprocess is not None and "int" in container:
        preprocess = torch.Tensor.double
    batch = batcher(dtype, preprocess)(CONTAINERS[container], index)
    assert batch.dtype == dtype
    assert batch.is_contiguous()
    assert not batch.requires_grad
    assert batch.tolist() == WHOLE[index].tolist()


def test_booleans_become_zeros_and_ones():
    X = np.array([[True, False], [False, True]])
    assert batcher()(X, slice(0, 2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_images_are_laid_out_channels_last():
    X = np.random.RandomState(0).rand(4, 3, 5, 6)
    batch = batcher(torch.float64)(X, slice(0, 4))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.numpy(), X)


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

    batcher(preprocess=preprocess)(X, slice(1, 4))
    assert seen == [(dtype, (3, 2), CPU)]


@pytest.mark.parametrize(
    ("result", "expected"),
    [(torch.float64, torch.float32), (torch.float16, torch.float32), (torch.int64, torch.int64)],
)
def test_floats_from_preprocess_are_cast_and_integers_kept(result, expected):
    batch = batcher(preprocess=lambda batch: batch.to(result))(WHOLE, slice(0, 3))
    assert batch.dtype == expected


def test_preprocess_may_change_the_shape_of_a_row():
    X = np.random.RandomState(0).randint(256, size=(5, 4, 6, 3), dtype=np.uint8)
    batch = batcher(preprocess=lambda b: b.permute(0, 3, 1, 2).float() / 255)(X, slice(0, 5))
    expected = np.moveaxis(X, -1, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(batch.numpy(), expected)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (lambda batch: batch[:2], r"\(2, 4\)"),
        (lambda batch: batch.reshape(-1, 2), r"\(6, 2\)"),
        (lambda batch: batch.sum(), r"\(\)"),
    ],
)
def test_a_transform_must_keep_the_number_of_rows(transform, shape):
    message = rf"^augment turned a batch of shape \(3, 4\) into {shape}; .*whole batches"
    with pytest.raises(ValueError, match=message):
        transformed(torch.zeros(3, 4), transform, "augment")


@pytest.mark.parametrize(("result", "kind"), [(np.zeros(3), "ndarray"), (None, "NoneType")])
def test_a_transform_must_return_a_tensor(result, kind):
    with pytest.raises(TypeError, match=rf"^preprocess returned a {kind} for .*\(3, 4\)"):
        batcher(preprocess=lambda batch: result)(WHOLE, slice(0, 3))


# NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize(("index", "row"), [(slice(2, 6), 4), (np.array([5, 4, 2, 3]), 5)])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_values_that_the_network_cannot_take_are_refused_with_their_row(make, index, row, value):
    X = WHOLE.astype(np.float64)
    X[4, 3] = X[5, 0] = value
    X = make(X.tolist(), dtype=np.float64 if make is np.array else torch.float64)
    with pytest.raises(ValueError, match=rf"too large for float32: first in row {row}\."):
        batcher()(X, index)


def test_overflow_depends_on_the_dtype_of_the_network():
    X = np.array([[1.0], [1e5], [1e39]])
    assert batcher(torch.float64)(X, slice(0, 3)).tolist() == X.tolist()
    with pytest.raises(ValueError, match=r"float32: first in row 2"):
        batcher(torch.float32)(X, slice(0, 3))
    with pytest.raises(ValueError, match=r"float16: first in row 1"):
        batcher(torch.float16)(X, slice(0, 3))


def test_preprocess_may_fill_in_what_is_missing():
    X = np.array([[1.0, math.nan]])
    batch = batcher(preprocess=torch.nan_to_num)(X, slice(0, 1))
    assert batch.tolist() == [[1.0, 0.0]]


def test_what_preprocess_breaks_is_refused():
    with pytest.raises(ValueError, match=r"first in row 3\."):
        batcher(preprocess=lambda batch: 1 / (batch - 12.0))(WHOLE, slice(2, 5))


def test_rows_are_checked_slice_by_slice():
    X = np.zeros((10_000, 2))
    check_finite(X)
    X[9_000, 1] = math.inf
    with pytest.raises(ValueError, match=r"for float64: first in row 9000\."):
        check_finite(X)
    check_finite(np.full((3, 2), 7))


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
        check_tensor(X)


def test_tensors_are_detached_and_not_copied():
    X = torch.zeros(3, 2, requires_grad=True)
    assert not check_tensor(X).requires_grad
    assert check_tensor(X).data_ptr() == X.data_ptr()


# Helpers


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [(0, []), (1, [(0, 1)]), (4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)])],
)
def test_slices_cover_all_rows_once(n_rows, expected):
    assert [(piece.start, piece.stop) for piece in slices(n_rows, 4)] == expected


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
    mean, std = moments(batcher(torch.float64), X, rows)
    assert tuple(mean.shape) == tuple(std.shape) == expected
    np.testing.assert_allclose(mean.ravel(), X[rows].mean(axis=axes).ravel(), rtol=1e-12)
    np.testing.assert_allclose(std.ravel(), X[rows].std(axis=axes).ravel(), rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 8, 8, 3), True),
        ((9, 8, 8, 1), True),
        ((9, 8, 8, 4), True),
        ((9, 3, 8, 8), False),
        ((9, 3, 8, 3), False),
        ((9, 8, 8, 2), False),
        ((9, 8, 3), False),
        ((9, 3), False),
    ],
)
def test_channels_last_is_told_by_the_number_of_channels(shape, expected):
    assert has_channels_last(shape) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.uint8, torch.float32), (torch.float64, torch.float64)]
)
def test_channels_first_moves_the_channels(dtype, expected):
    images = torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).to(dtype)
    moved = channels_first(images)
    assert moved.dtype == expected
    assert moved.shape == (2, 3, 4, 5)
    assert moved[1, 2, 3, 4] == images[1, 3, 4, 2]


def test_bfloat16_becomes_a_float32_array():
    array = as_array(torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True))
    assert array.dtype == np.float32
    assert array.tolist() == [1.5]
    same = np.zeros(3)
    assert as_array(same) is same


# Rows that stay on the device


def seen_dtype(X):
    """Dtype in which preprocess sees rows."""
    seen = []
    batcher(preprocess=lambda batch: seen.append(batch.dtype) or batch.float())(X, slice(0, 1))
    return seen[0]


@pytest.mark.parametrize("preprocess", [None, lambda batch: batch.float() / 7])
@pytest.mark.parametrize("container", sorted(set(CONTAINERS) - {"tensor bfloat16"}))
def test_rows_that_stay_on_the_device_give_the_same_batches(monkeypatch, container, preprocess):
    X = CONTAINERS[container]
    monkeypatch.setattr("skood.engine.batches.free_memory", lambda device: 10**6)
    monkeypatch.setattr(Batcher, "_is_there", lambda self, X: False)
    own = batcher(preprocess=preprocess)
    rows = own.resident(X)
    assert isinstance(rows, torch.Tensor)
    assert np.array_equal(as_array(rows), as_array(X))
    assert rows.dtype == (torch.float32 if preprocess is None else seen_dtype(X))
    index = np.array([4, 0, 4])
    assert torch.equal(own(rows, index), own(X, index))


@pytest.mark.parametrize(("free", "stays"), [(4 * 6 * 4 * 4, True), (4 * 6 * 4 * 4 - 1, False)])
def test_rows_stay_on_the_device_that_has_four_times_the_memory(monkeypatch, free, stays):
    monkeypatch.setattr("skood.engine.batches.free_memory", lambda device: free)
    X = CONTAINERS["float64"]
    assert (batcher().resident(X) is not X) == stays


@pytest.mark.parametrize("X", [WHOLE, CONTAINERS["tensor"], np.array(["a", "b"])])
def test_rows_stay_where_they_are_without_memory_for_them(X):
    assert batcher().resident(X) is X


def test_unchecked_batches_may_hold_anything():
    X = np.array([[1.0, np.nan], [2.0, 3.0]])
    (batch,) = batcher().stream(X, [slice(0, 2)], 2, checked=False)
    assert batch.isnan().sum() == 1
    with pytest.raises(ValueError, match="first in row 0"):
        list(batcher().stream(X, [slice(0, 2)], 2))
