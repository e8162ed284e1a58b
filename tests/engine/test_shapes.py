from __future__ import annotations

import pytest
import torch

from skood.engine.shapes import Shapes, same_bits


@pytest.mark.parametrize(
    ("n_rows", "shapes", "expected"),
    [
        (1, (64,), [64]),
        (64, (64,), [64]),
        (65, (64,), [64, 64]),
        (1, (4, 16, 64), [4]),
        (5, (4, 16, 64), [4, 4]),
        (7, (4, 16, 64), [4, 4]),
        (8, (4, 16, 64), [16]),  # half of it padding, in one forward
        (17, (1, 4, 16, 64), [16, 1]),
        (31, (4, 16, 64), [16, 16]),
        (32, (4, 16, 64), [64]),
        (200, (4, 16, 64), [64, 64, 64, 16]),
        (0, (4, 16), []),
    ],
)
def test_rows_are_split_over_shapes(n_rows, shapes, expected):
    pieces = list(Shapes(shapes).split(n_rows))
    assert [shape for _, shape in pieces] == expected
    assert [row for piece, _ in pieces for row in range(n_rows)[piece]] == list(range(n_rows))
    assert all(piece.stop - piece.start <= shape for piece, shape in pieces)


@pytest.mark.parametrize("n_rows", range(1, 700, 37))
def test_padding_is_at_most_as_many_rows_as_there_are(n_rows):
    shapes = Shapes((4, 16, 64, 256))
    assert sum(shape for _, shape in shapes.split(n_rows)) <= max(2 * n_rows, 4)


def test_a_request_may_be_split_from_a_row_on():
    assert list(Shapes((4,)).split(10, start=3)) == [(slice(3, 7), 4), (slice(7, 10), 4)]


@pytest.mark.parametrize(("n_rows", "expected"), [(1, [2]), (2, [2]), (3, [4]), (5, [4, 4])])
def test_only_a_request_of_few_rows_runs_in_the_small_shape(n_rows, expected):
    assert [shape for _, shape in Shapes((4, 16), small=2).split(n_rows)] == expected


def test_the_rest_of_a_request_runs_in_the_shapes_of_the_whole():
    assert [shape for _, shape in Shapes((4, 16), small=2).split(6, start=4)] == [4]


@pytest.mark.parametrize(
    ("shapes", "shape", "expected"),
    [
        (Shapes((4, 16, 64)), 64, Shapes((4, 16))),
        (Shapes((4, 16, 64)), 16, Shapes((4,))),
        (Shapes((64,)), 64, Shapes((32,))),
        (Shapes((16, 64), small=1), 16, Shapes((8,), small=1)),
        (Shapes((16, 64), small=8), 8, Shapes((4,))),
        (Shapes((1,)), 1, Shapes((1,))),
    ],
)
def test_shapes_below_one_without_memory(shapes, shape, expected):
    assert shapes.below(shape) == expected


def test_all_shapes_are_in_ascending_order():
    assert Shapes((4, 16)).all == (4, 16)
    assert Shapes((4, 16), small=1).all == (1, 4, 16)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ({}, (4, 16, 64)),
        ({4}, (16, 64)),
        ({16}, (4, 64)),
        ({4, 16}, (64,)),
        ({64}, (64,)),
    ],
)
def test_shapes_that_round_otherwise_are_left_out(rounding, expected):
    values = torch.arange(8.0)

    def outputs(shape):
        rounded = values.clone()
        rounded[-1] += 1e-6 * (shape in rounding)
        return values, rounded

    assert same_bits(outputs, 64) == expected
