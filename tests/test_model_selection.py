from __future__ import annotations

import numpy as np
import pytest

from skood.model_selection import surrogate_outliers


def numbered(*shape, dtype=np.int64):
    """Distinct values, so that every one can be followed."""
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def cells_of(image, size):
    """Cells of an image (h, w), as tuples of their values, row by row."""
    height, width = image.shape
    return [
        tuple(image[top : top + size, left : left + size].ravel().tolist())
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


# Tables


@pytest.mark.parametrize("kind", ["auto", "columns"])
def test_columns_keep_their_values_and_lose_their_relation(kind):
    X = numbered(200, 4, dtype=np.float32)
    outliers = surrogate_outliers(X, kind=kind, random_state=0)
    assert outliers.shape == X.shape
    assert outliers.dtype == X.dtype
    assert (np.sort(outliers, axis=0) == X).all()
    rows_of_origin = outliers.astype(int) // 4
    for i in range(4):
        assert (rows_of_origin[:, i] != np.arange(200)).mean() > 0.9
        for j in range(i):
            assert (rows_of_origin[:, i] == rows_of_origin[:, j]).mean() < 0.1


# Images


def test_patches_move_whole_within_their_image():
    X = numbered(20, 8, 8)
    outliers = surrogate_outliers(X, random_state=0)
    orders = []
    for image, outlier in zip(X, outliers, strict=True):
        cells = cells_of(image, 2)
        moved = cells_of(outlier, 2)
        assert sorted(moved) == sorted(cells)
        orders.append(tuple(cells.index(cell) for cell in moved))
    assert len(set(orders)) == len(orders)
    for position in range(16):
        assert len({order[position] for order in orders}) > 5


def test_layouts_of_the_same_images_agree():
    images = numbered(6, 3, 12, 8)
    first = surrogate_outliers(images, random_state=1)
    last = surrogate_outliers(np.moveaxis(images, 1, -1), random_state=1)
    assert (np.moveaxis(last, -1, 1) == first).all()
    for channel in range(3):
        alone = surrogate_outliers(images[:, channel], random_state=1)
        assert (alone == first[:, channel]).all()


def test_the_border_that_fits_no_patch_stays():
    X = numbered(5, 9, 9)
    outliers = surrogate_outliers(X, random_state=0)
    assert (outliers[:, 8] == X[:, 8]).all()
    assert (outliers[:, :, 8] == X[:, :, 8]).all()
    assert (outliers[:, :8, :8] != X[:, :8, :8]).any()


@pytest.mark.parametrize("shape", [(7, 7), (11, 11), (8, 32)])
def test_the_grid_has_at_most_four_by_four_patches(shape):
    X = numbered(30, *shape)
    outliers = surrogate_outliers(X, random_state=0)
    # Within a patch, neighbours stay neighbours.
    neighbours = outliers[:, :, 1:] - outliers[:, :, :-1] == 1
    broken_columns = (~neighbours).any(axis=(0, 1)).sum()
    neighbours = outliers[:, 1:] - outliers[:, :-1] == shape[1]
    broken_rows = (~neighbours).any(axis=(0, 2)).sum()
    # Three cuts between four cells, and one before the border.
    assert broken_columns <= 4
    assert broken_rows <= 4


def test_dtype_and_input_are_kept():
    X = np.random.RandomState(0).randint(256, size=(4, 8, 8, 3), dtype=np.uint8)
    before = X.copy()
    X.setflags(write=False)
    outliers = surrogate_outliers(X, random_state=0)
    assert outliers.dtype == np.uint8
    assert outliers.shape == X.shape
    assert np.array_equal(X, before)
    assert (outliers != X).any()


@pytest.mark.parametrize("shape", [(50, 4), (10, 8, 8)])
def test_the_seed_decides_and_the_global_generator_does_not(shape, generator_states):
    X = numbered(*shape)
    before = generator_states()
    first, second, other = (surrogate_outliers(X, random_state=seed) for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != other).any()
    assert generator_states() == before


# Errors


@pytest.mark.parametrize("shape", [(10, 1), (1, 10)])
def test_a_table_without_a_relation_to_break_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 rows and 2 columns"):
        surrogate_outliers(np.zeros(shape))


def test_images_of_one_pixel_are_refused():
    with pytest.raises(ValueError, match="too small to permute patches"):
        surrogate_outliers(np.zeros((5, 1, 1)))


@pytest.mark.parametrize("shape", [(10,), (2, 3, 4, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="neither a table nor a set of images"):
        surrogate_outliers(np.zeros(shape))


def test_columns_of_images_are_refused():
    with pytest.raises(ValueError, match="no columns to permute"):
        surrogate_outliers(np.zeros((5, 4, 4)), kind="columns")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='rows' is unknown; pass \"auto\""):
        surrogate_outliers(np.zeros((5, 4)), kind="rows")
