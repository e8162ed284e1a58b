from __future__ import annotations

import pytest
import torch

from skood.engine.shapes import same_bits, split


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
    pieces = list(split(n_rows, shapes))
    assert [shape for _, shape in pieces] == expected
    assert [row for piece, _ in pieces for row in range(n_rows)[piece]] == list(range(n_rows))
    assert all(piece.stop - piece.start <= shape for piece, shape in pieces)


@pytest.mark.parametrize("n_rows", range(1, 700, 37))
def test_padding_is_at_most_as_many_rows_as_there_are(n_rows):
    shapes = (4, 16, 64, 256)
    assert sum(shape for _, shape in split(n_rows, shapes)) <= max(2 * n_rows, 4)


def test_a_request_may_be_split_from_a_row_on():
    assert list(split(10, (4,), start=3)) == [(slice(3, 7), 4), (slice(7, 10), 4)]


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
