from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from data_sets import Listed

from skood.engine.batches import Batcher
from skood.engine.rounding import (
    blur_message,
    far_from_zero,
    rounded_integer,
    rounded_number,
    rounding_message,
)
from skood.engine.rows import PIECE
from skood.rows import as_rows

CPU = torch.device("cpu")
RANDOM = np.random.RandomState(0)
NORMAL = RANDOM.randn(100, 3)


def batcher(dtype=torch.float32, **options):
    return Batcher(CPU, dtype, options.pop("preprocess", None), 0, **options)


# Whole numbers


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint32, torch.int64, torch.uint64, torch.float64]
)
def test_the_first_whole_number_that_is_rounded_is_found(dtype):
    exact = torch.tensor([[1, 2**24], [3, 2**24 + 2]]).to(dtype)
    assert rounded_integer(exact, torch.float32) is None
    rounded = torch.tensor([[1, 2**24], [2**24 + 1, 2**24 + 3]]).to(dtype)
    assert rounded_integer(rounded, torch.float32) == (2**24 + 1, 2**24)
    assert rounded_integer(rounded, torch.float64) is None


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.bfloat16, 2**8), (torch.float16, 2**11), (torch.float64, 2**53)]
)
def test_networks_of_other_dtypes_hold_other_integers(dtype, largest):
    assert rounded_integer(torch.tensor([[largest]]), dtype) is None
    assert rounded_integer(torch.tensor([[largest + 1]]), dtype) is not None


def test_columns_of_fractions_hold_no_integers():
    values = torch.tensor([[2.0**24 + 1, 0.5], [2.0**30 + 1, 0.25]], dtype=torch.float64)
    assert rounded_integer(values, torch.float32) == (2**24 + 1, 2**24)
    assert rounded_integer(values + 0.25, torch.float32) is None
    assert rounded_integer(torch.zeros(0, 2, dtype=torch.int64), torch.float32) is None


@pytest.mark.parametrize("place", [0, PIECE + 7])
def test_all_integers_in_memory_are_looked_at(place):
    ids = np.ones((PIECE + 10, 2), dtype=np.int64)
    assert rounded_number(as_rows(ids), batcher()) is None
    ids[place, 1] = 2**24 + 1
    assert rounded_number(as_rows(ids), batcher()) == (2**24 + 1, 2**24)
    assert rounded_number(as_rows(Listed(list(ids[place : place + 1]))), batcher()) is not None


def test_the_message_says_what_becomes_of_a_number():
    message = rounding_message((2**24 + 1, 2**24), torch.float32)
    assert "gets 16777217 of X as 16777216" in message
    assert "preprocess=torch.Tensor.long" in message


# Columns far from 0


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_detail_that_a_cast_keeps_needs_no_center(offset):
    assert far_from_zero(batcher(), as_rows(NORMAL * 30 + offset)) is None


@pytest.mark.parametrize("constant", [0.1, 0.1 + 1e-16 * NORMAL[:, 0], 1e9 + 0.1])
def test_constant_columns_have_no_detail(constant):
    X = NORMAL.copy()
    X[:, 1] = constant
    assert far_from_zero(batcher(), as_rows(X)) is None


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, lambda X: Listed(list(X))])
def test_columns_far_from_0_have_a_center(make):
    X = NORMAL + np.array([0, 1.7e9, 0])
    center = far_from_zero(batcher(), as_rows(make(X)))
    assert center.dtype == torch.float64
    assert center[[0, 2]].tolist() == [0, 0]
    assert abs(center[1].item() - 1.7e9) < 1
    assert far_from_zero(batcher(torch.float64), as_rows(make(X))) is None


def test_the_center_is_subtracted_before_the_cast():
    X = NORMAL + np.array([0, 1.7e9, 0])
    rows = as_rows(X)
    center = far_from_zero(batcher(), rows)
    batch = batcher(center=center)(rows)
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch, X - center.numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(batch[:, 0], NORMAL[:, 0].astype(np.float32))
    twice = dataclasses.replace(batcher(center=center), preprocess=lambda b: b * 1)
    assert torch.equal(twice(rows), batch)


@pytest.mark.parametrize("shape", [(100, 2, 4, 4), (100, 4, 4)])
def test_images_have_a_center_for_each_channel(shape):
    X = RANDOM.randn(*shape) + 1e9
    rows = as_rows(X)
    center = far_from_zero(batcher(), rows)
    assert len(center) == (2 if len(shape) == 4 else 1)
    np.testing.assert_allclose(batcher(center=center)(rows), X - center[0].item(), atol=1)


def test_the_message_names_the_columns():
    X = as_rows(NORMAL)
    X.columns = ["a", "when", "c"]
    center = torch.tensor([0.0, 1e9, 0.0])
    assert "columns that lie far from 0, ['when']" in blur_message(center, X, torch.float32)
    X.columns = None
    assert "far from 0, [1]" in blur_message(center, X, torch.float32)
