from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import pytest
import torch
from data_sets import TABLE, AtOnce, Listed, N, from_table

from skood.engine.loading import (
    PATIENCE,
    collated,
    input_of,
    items,
    label_of,
    load,
    objects,
    transformed,
    workers_kept,
)

# Worker processes


def process_of(_):
    return os.getpid()


def slowly(index):
    time.sleep(PATIENCE / 3)
    return os.getpid()


def rows_of(n_passes, source, n_batches=20):
    """The processes that load, pass by pass."""
    passes = (load(process_of, [np.arange(3)] * n_batches, 2, source) for _ in range(n_passes))
    return [set(processes) for processes in passes]


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_load_what_takes_long(workers):
    assert set(load(process_of, [np.arange(3)] * 20, workers)) == {os.getpid()}
    processes = list(load(slowly, [np.arange(3)] * 6, workers))
    assert set(processes[:3]) == {os.getpid()}
    assert (processes[-1] == os.getpid()) is (workers == 0)


@pytest.mark.parametrize("workers", [0, 1, 2, None])
@pytest.mark.usefixtures("impatient")
def test_what_is_fetched_comes_in_the_order_of_its_indices(workers):
    indices = [slice(0, 40), np.array([7, 3, 99]), slice(98, 100)]
    found = list(load(TABLE.__getitem__, iter(indices), workers))
    for index, fetched in zip(indices, found, strict=True):
        np.testing.assert_array_equal(fetched, TABLE[index])


@pytest.mark.usefixtures("impatient")
def test_an_endless_stream_is_read_as_far_as_it_is_asked_for():
    def endless():
        while True:
            yield np.arange(3)

    stream = load(from_table, endless(), 1)
    for _ in range(5):
        assert len(next(stream)) == 3
    stream.close()


@pytest.mark.usefixtures("impatient")
def test_workers_wait_for_the_next_pass_over_their_source():
    source, other = object(), object()
    first, second = rows_of(2, source)
    assert not first & second
    with workers_kept():
        first, second = rows_of(2, source)
        (third,) = rows_of(1, other)
        (fourth,) = rows_of(1, None)
        (fifth,) = rows_of(1, source)
        assert first == second == fifth
        assert len(first) == 2
        assert not first & (third | fourth)
    (after,) = rows_of(1, source)
    assert not first & after
    assert not any(alive(process) for process in first)


def alive(process):
    with contextlib.suppress(OSError):
        return os.waitpid(process, os.WNOHANG) == (0, 0)
    return False


@pytest.mark.usefixtures("impatient")
def test_two_passes_at_once_have_their_own_workers():
    source = object()
    with workers_kept():
        for _ in range(2):
            one = load(TABLE.__getitem__, [slice(i, i + 2) for i in range(9)], 1, source)
            two = load(TABLE.__getitem__, [slice(i, i + 3) for i in range(9)], 1, source)
            for i, (x, z) in enumerate(zip(one, two, strict=True)):
                np.testing.assert_array_equal(x, TABLE[i : i + 2])
                np.testing.assert_array_equal(z, TABLE[i : i + 3])


@pytest.mark.usefixtures("impatient")
def test_workers_of_a_pass_that_was_left_are_not_used_again():
    source = object()
    indices = [slice(i, i + 2) for i in range(20)]
    with workers_kept():
        left = load(TABLE.__getitem__, indices, 1, source)
        next(left)
        left.close()
        with pytest.raises(IndexError):
            list(load(TABLE.__getitem__, [np.array([N])], 1, source))
        for index, fetched in zip(
            indices, load(TABLE.__getitem__, indices, 1, source), strict=True
        ):
            np.testing.assert_array_equal(fetched, TABLE[index])


@pytest.mark.usefixtures("impatient")
def test_loading_leaves_the_generators_alone(generator_states):
    before = generator_states()
    list(load(from_table, [np.arange(N)], 1))
    assert generator_states() == before


# Functions of the user


def missing(rows):
    raise FileNotFoundError(f"no file {rows[0]}")


def test_an_error_of_preprocess_gains_a_note():
    with pytest.raises(FileNotFoundError) as caught:
        transformed(np.arange(2), missing, "preprocess")
    assert "Raised by preprocess, on a batch of shape (2,) and dtype int64" in str(
        caught.value.__notes__
    )


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


def test_a_transform_must_return_a_tensor():
    with pytest.raises(TypeError, match=r"^augment returned a ndarray for .*\(3, 4\)"):
        transformed(torch.zeros(3, 4), np.asarray, "augment")


# Items of data sets


@pytest.mark.parametrize("kind", [Listed, AtOnce])
def test_items_are_asked_for_one_by_one_or_at_once(kind):
    assert items(kind(list("abcd")), np.array([2, 0, 2])) == ["c", "a", "c"]


@pytest.mark.parametrize(
    ("item", "x", "y"),
    [
        (1.0, 1.0, None),
        ((1.0,), 1.0, None),
        ((1.0, "cat"), 1.0, "cat"),
        ([1.0, 2.0], [1.0, 2.0], None),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], None),
        ([[1.0, 2.0], 3], [1.0, 2.0], 3),
        ([[1.0, 2.0], "cat"], [1.0, 2.0], "cat"),
    ],
)
def test_an_item_is_x_or_a_pair(item, x, y):
    assert (input_of(item), label_of(item)) == (x, y)


def test_an_item_that_default_collate_has_made_a_list_is_a_pair():
    x, y = torch.zeros(3), torch.tensor(1)
    assert input_of([x, y]) is x
    assert label_of([x, y]) is y
    assert label_of([x, x]) is None
    with pytest.raises(TypeError, match=r"tuples of 3 \(Tensor, Tensor, str\); expected x or"):
        input_of([x, y, "meta"])


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [
        ([torch.zeros(2), torch.ones(2)], torch.float32),
        ([np.zeros(2), np.ones(2)], torch.float64),
        ([[0, 0], [1, 1]], torch.int64),
        ([0.0, 1.0], torch.float64),
        ([torch.zeros(2), np.ones(2, dtype=np.float32)], torch.float32),
    ],
)
def test_numbers_are_collated_into_a_tensor(inputs, dtype):
    batch = collated(inputs)
    assert batch.dtype == dtype
    assert batch[1].unique().tolist() == [1]


@pytest.mark.parametrize(
    "inputs", [["a.png", "b.png"], [{"a": 1}, {"a": 2}], [[1], [1, [2, 3]]], [None, 1]], ids=str
)
def test_anything_else_is_collated_into_objects(inputs):
    batch = collated(inputs)
    assert batch.dtype == object
    assert batch.tolist() == inputs


def test_things_of_any_shape_become_an_array_of_one_dimension():
    array = objects([np.zeros((2, 2)), np.zeros((3, 2)), "a"])
    assert array.shape == (3,)
    assert array[1].shape == (3, 2)
