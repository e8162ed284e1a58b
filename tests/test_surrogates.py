from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from skood.model_selection import surrogate_outliers, surrogates
from skood.model_selection.surrogates import auto_kinds, surrogates_by_kind


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


# Surrogates of tables


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


# Surrogates of images


def test_patches_move_whole_within_their_image():
    X = numbered(20, 8, 8)
    outliers = surrogate_outliers(X, kind="patches", random_state=0)
    orders = []
    for image, outlier in zip(X, outliers, strict=True):
        cells = cells_of(image, 2)
        moved = cells_of(outlier, 2)
        assert sorted(moved) == sorted(cells)
        orders.append(tuple(cells.index(cell) for cell in moved))
    assert len(set(orders)) == len(orders)
    for position in range(16):
        assert len({order[position] for order in orders}) > 5


@pytest.mark.parametrize("shape", [(3, 12, 8), (6, 10, 10)], ids=str)
def test_layouts_of_the_same_images_agree(shape):
    images = np.random.RandomState(0).permutation(6 * np.prod(shape)).reshape(6, *shape)
    kinds = ["auto", "patches", "blur", "contrast", "edges", "strokes", "silhouettes"]
    for kind in [*kinds, "shapes", "glyphs", "frequencies", "colours", "mixture"]:
        first = surrogate_outliers(images, kind=kind, random_state=1)
        last = surrogate_outliers(np.moveaxis(images, 1, -1), kind=kind, random_state=1)
        assert (np.moveaxis(last, -1, 1) == first).all()
        for channel in range(3 if kind in ("patches", "contrast", "mixture") else 0):
            grey = surrogate_outliers(images[:, channel], kind=kind, random_state=1)
            assert (grey == first[:, channel]).all()


def test_the_border_that_fits_no_patch_stays():
    X = numbered(5, 9, 9)
    outliers = surrogate_outliers(X, kind="patches", random_state=0)
    assert (outliers[:, 8] == X[:, 8]).all()
    assert (outliers[:, :, 8] == X[:, :, 8]).all()
    assert (outliers[:, :8, :8] != X[:, :8, :8]).any()


@pytest.mark.parametrize("shape", [(7, 7), (11, 11), (8, 32)])
def test_the_grid_has_at_most_four_by_four_patches(shape):
    X = numbered(30, *shape)
    outliers = surrogate_outliers(X, kind="patches", random_state=0)
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


# Rows without surrogates


@pytest.mark.parametrize("shape", [(10, 1), (1, 10)])
def test_a_table_without_a_relation_to_break_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 rows and 2 columns"):
        surrogate_outliers(np.zeros(shape))


def test_images_of_one_pixel_are_refused():
    with pytest.raises(ValueError, match="too small to permute patches"):
        surrogate_outliers(np.zeros((5, 1, 1)))


@pytest.mark.parametrize("shape", [(10,), (2, 3, 4, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="neither a table of numbers nor a set of images"):
        surrogate_outliers(np.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "kind", "known"),
    [((5, 4, 4), "columns", "'patches', 'blur'"), ((5, 4), "patches", "'columns', 'mixture'")],
)
def test_a_kind_for_other_rows_is_refused_with_those_that_there_are(shape, kind, known):
    with pytest.raises(ValueError, match=f"kind='{kind}' is no surrogate .*'auto', {known}"):
        surrogate_outliers(np.zeros(shape), kind=kind)


def test_words_are_refused():
    with pytest.raises(ValueError, match="neither a table of numbers nor a set of images"):
        surrogate_outliers(np.full((5, 4), "a"))


# Kinds that would not change the rows

DIGITS = load_digits().images[:200]
BINARY = DIGITS > 7
SMOOTH = ndimage.gaussian_filter(np.random.RandomState(0).rand(60, 24, 24), (0, 6, 6))
KINDS = ("patches", "blur", "contrast", "edges", "strokes", "silhouettes", "shapes", "glyphs")
DRAWN = ("patches", "strokes", "shapes", "glyphs")
COLOURED = ("shapes", "glyphs")  # of colours that no image need have


@pytest.mark.parametrize(
    ("X", "left_out"),
    [
        (DIGITS, set()),
        (BINARY * 255.0, {"silhouettes"}),
        (BINARY.astype(np.uint8), {"silhouettes", "contrast"}),  # which integers round to one
        (SMOOTH, {"blur"}),
        (DIGITS[:, 2:4, 2:4], {"strokes", "glyphs"}),  # which have no room
        (DIGITS.reshape(-1, 2, 32), {"glyphs"}),
        (DIGITS[:1], set()),
    ],
    ids=["grey", "two colours", "0 and 1", "blurred", "2 by 2", "2 by 32", "one image"],
)
def test_kinds_that_do_not_change_images_are_left_out_and_refused_by_name(X, left_out):
    kinds = tuple(kind for kind in KINDS if kind not in left_out)
    assert auto_kinds(X) == kinds
    outliers = surrogate_outliers(X, random_state=0)
    for place, kind in enumerate(kinds if kinds != KINDS else ()):
        if kind not in DRAWN:
            made = surrogate_outliers(X, kind=kind, random_state=0)[place :: len(kinds)]
            assert np.array_equal(outliers[place :: len(kinds)], made)
    for kind in left_out:
        message = f"kind '{kind}' would be rows like those of X, or of one colour. Pass kind='auto'"
        with pytest.raises(ValueError, match=message):
            surrogate_outliers(X, kind=kind)


def test_a_kind_that_is_usable_on_all_rows_is_made_of_whichever_are_drawn():
    """Of natural images and of images in two colours, which silhouettes leave as they are."""
    random = np.random.RandomState(0)
    natural, flat = random.rand(40, 8, 8), random.rand(60, 8, 8) > 0.5
    X = random.permutation(np.concatenate([natural, flat]).astype(np.float32))
    for seed in range(30):
        made = surrogates_by_kind(X, 40, np.random.RandomState(seed))
        assert "silhouettes" in made
        assert {rows.shape for rows in made.values()} == {(5, 8, 8)}


def test_a_kind_that_changes_all_but_a_few_rows_is_taken():
    X = DIGITS.copy()
    X[::3] = 16 * BINARY[::3]
    assert auto_kinds(X) == KINDS
    X = 16.0 * BINARY
    X[::6] = DIGITS[::6]
    assert "silhouettes" not in auto_kinds(X)


@pytest.mark.parametrize("shape", [(50, 1, 1), (50, 1, 1, 3), (50, 3, 1, 1)])
@pytest.mark.parametrize("kind", ["patches", "mixture", "colours"])
def test_images_of_one_colour_have_few_surrogates(shape, kind):
    X = np.random.RandomState(0).rand(*shape)
    X = X.repeat(8, axis=-2 if shape[-1] == 3 else -1).repeat(8, axis=-3 if shape[-1] == 3 else -2)
    with pytest.raises(ValueError, match="Pass kind='auto', which takes 'shapes', 'glyphs' here"):
        surrogate_outliers(X, kind=kind)
    assert auto_kinds(X) == COLOURED
    assert surrogate_outliers(X, kind="noise").shape == X.shape


@pytest.mark.parametrize("shape", [(50, 8, 8), (50, 8, 8, 3)])
@pytest.mark.parametrize("kind", ["auto", "shapes", "glyphs", "patches"])
def test_images_that_are_all_the_same_colour_have_no_surrogates(shape, kind):
    with pytest.raises(ValueError, match=r"or of one colour. Use known outliers instead"):
        surrogate_outliers(np.full(shape, 3.0), kind=kind)


@pytest.mark.parametrize("n_rows", [2, 3, 4, 50])
@pytest.mark.parametrize("n_columns", [2, 3, 10])
def test_chance_does_not_decide_whether_few_rows_have_surrogates(n_rows, n_columns):
    assert auto_kinds(numbered(n_rows, n_columns)) == ("columns",)


@pytest.mark.parametrize(
    "X",
    [
        np.column_stack([np.ones(50), np.arange(50)]),
        np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 9),
    ],
    ids=["one column varies", "all combinations occur"],
)
def test_columns_without_a_relation_to_break_are_refused(X):
    with pytest.raises(ValueError, match=r"kind 'columns' would be rows like those of X. Use"):
        surrogate_outliers(X)


def test_columns_of_any_size_are_permuted():
    X = np.random.RandomState(0).rand(40, 2) * [1e300, 1e-300]
    assert auto_kinds(X) == ("columns",)


# What the other kinds make


RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.rand(30, 3, 16, 16)


def test_auto_takes_eight_kinds_in_turn():
    outliers = surrogate_outliers(IMAGES, random_state=0)
    for place, kind in enumerate(KINDS):
        made, images = outliers[place::8], IMAGES[place::8]
        some = surrogate_outliers(images, kind=kind, random_state=0)
        if kind == "shapes":
            assert all(len(np.unique(image)) <= 4 * 3 for image in made)
        elif kind == "glyphs":
            for ends in (np.min, np.max):
                assert np.isin(ends(made, axis=(2, 3)), ends(IMAGES, axis=(0, 2, 3))).all()
        elif kind in DRAWN:  # from a generator that has drawn before
            assert all(np.isin(one, other).all() for one, other in zip(made, some, strict=True))
            assert (made != images).any(axis=(1, 2, 3)).all()
        else:
            np.testing.assert_allclose(made, some, atol=0.02)  # X has another range than its part


def test_blur_keeps_the_mean_and_takes_the_details():
    outliers = surrogate_outliers(IMAGES, kind="blur", random_state=0)
    np.testing.assert_allclose(outliers.mean(axis=(2, 3)), IMAGES.mean(axis=(2, 3)), atol=0.02)
    assert np.diff(outliers).std() < 0.6 * np.diff(IMAGES).std()
    # Channels do not run into each other.
    one = IMAGES * np.eye(3)[0, :, None, None]
    assert (surrogate_outliers(one, kind="blur", random_state=0)[:, 1:] == 0).all()


def test_contrast_keeps_the_mean_and_a_fifth_of_the_differences():
    outliers = surrogate_outliers(IMAGES, kind="contrast", random_state=0)
    mean = IMAGES.mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(outliers - mean, 0.2 * (IMAGES - mean), atol=1e-12)


def test_edges_are_bright_where_neighbours_differ():
    X = np.full((2, 8, 8), 10.0)
    X[0, :, 4:] = 50
    X[1] = numbered(8, 8) / 8  # as steep everywhere within, but for the border
    outliers = surrogate_outliers(X, kind="edges", random_state=0)
    expected = np.full((8, 8), X.min())
    expected[:, 3:5] = X.max()
    np.testing.assert_allclose(outliers[0], expected)
    np.testing.assert_allclose(outliers[1, 1:-1, 1:-1], X.max())
    assert (outliers[1, 0] < X.max()).all()


def test_an_image_of_one_value_has_no_edges():
    X = np.stack([np.full((8, 8), 3.0), numbered(8, 8)])
    outliers = surrogate_outliers(X, kind="edges", random_state=0)
    assert (outliers[0] == X.min()).all()


@pytest.mark.parametrize("kind", ["strokes", "silhouettes"])
def test_of_an_image_two_colours_remain(kind):
    outliers = surrogate_outliers(IMAGES, kind=kind, random_state=0)
    brightness = IMAGES.mean(axis=1)
    for image, outlier, bright in zip(IMAGES, outliers, brightness, strict=True):
        ends = [np.unravel_index(find(bright), bright.shape) for find in (np.argmin, np.argmax)]
        colours = {tuple(image[:, row, column]) for row, column in ends}
        assert {tuple(pixel) for pixel in outlier.reshape(3, -1).T} == colours


def test_silhouettes_are_bright_where_the_image_is_brighter_than_its_mean():
    X = numbered(1, 8, 8, dtype=np.uint8)
    X[0, 2:6, 2:6] = 200
    X[0, 3, 3] = 210
    (outlier,) = surrogate_outliers(X, kind="silhouettes", random_state=0)
    np.testing.assert_array_equal(outlier, np.where(X[0] > 100, 210, 0))


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, 0], np.moveaxis(IMAGES, 1, 3)])
def test_shapes_are_polygons_one_inside_another(images):
    outliers = surrogate_outliers(images, kind="shapes", random_state=0)
    if outliers.ndim == 4 and outliers.shape[1] == 3:
        outliers = np.moveaxis(outliers, 1, 3)
    colours = [np.unique(image.reshape(16 * 16, -1), axis=0) for image in outliers]
    assert {len(each) for each in colours} == {2, 3, 4}
    assert images.min() <= outliers.min() < 0.1 < 0.9 < outliers.max() <= images.max()
    for image in outliers:
        ground = (image == image[0, 0]).reshape(16, 16, -1).all(axis=2)
        assert 0.15 < ground.mean() < 0.95
        # Every line through a shape enters and leaves it once.
        for line in (*~ground, *~ground.T):
            assert (np.diff(line.astype(int)) == 1).sum() + line[0] <= 1


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (32, 48, 3), (3, 48, 32)])
def test_glyphs_are_one_thick_soft_line_across_the_middle(shape):
    X = RANDOM.uniform(20, 220, (100, *shape)).round()
    outliers = surrogate_outliers(X, kind="glyphs", random_state=0)
    if len(shape) == 3:
        outliers = np.moveaxis(outliers, 1, 3) if shape[0] == 3 else outliers
        assert (outliers == outliers[..., :1]).all()
        outliers = outliers[..., 0]
    least, largest = X.min(), X.max()
    assert outliers.min() == least
    np.testing.assert_allclose(outliers.max(axis=(1, 2)), largest)
    height, width = outliers.shape[1:]
    side = min(height, width)
    on_line = outliers > (least + largest) / 2
    widths, middles = [], []
    for line in on_line:
        assert ndimage.label(line, np.ones((3, 3)))[1] == 1
        rows, columns = (np.flatnonzero(line.any(axis=axis)) for axis in (1, 0))
        np.testing.assert_allclose(np.ptp(rows) + 1, (2 / 3 + 1 / 8) * side, atol=2)
        middles.append((np.mean(rows) - (height - 1) / 2, np.mean(columns) - (width - 1) / 2))
        np.testing.assert_allclose(middles[-1], [0, 0], atol=1)
        widths.append(np.ptp(columns) + 1)
        # From the middle of the line to its edge.
        assert ndimage.distance_transform_edt(line).max() >= side / 16
    np.testing.assert_allclose([min(widths), max(widths)], np.array([11, 19]) / 24 * side, atol=3)
    np.testing.assert_allclose(np.mean(middles, axis=0), [0, 0], atol=0.2)
    soft = (least < outliers) & (outliers < largest)
    assert 0.6 < soft.sum() / on_line.sum() < 1.2
    assert 0.1 < on_line.mean() * height * width / side**2 < 0.25


def test_lines_of_glyphs_are_even(monkeypatch):
    X = RANDOM.rand(100, 64, 64)
    outliers = surrogate_outliers(X, kind="glyphs", random_state=0)
    monkeypatch.setattr(surrogates, "POINTS", 1000)
    exact = surrogate_outliers(X, kind="glyphs", random_state=0)
    assert np.abs(outliers - exact).max() < 0.25
    assert np.abs(outliers - exact).mean() < 0.003


@pytest.mark.parametrize("kind", ["shapes", "glyphs"])
def test_what_is_drawn_has_the_range_of_each_channel(kind):
    scales = np.array([1, 100, 10000])
    X = RANDOM.uniform(-1, 1, (100, 16, 16, 3)) * scales
    outliers = surrogate_outliers(X, kind=kind, random_state=0)
    for ends in (np.min, np.max):
        drawn, of_rows = (ends(each, axis=(0, 1, 2)) / scales for each in (outliers, X))
        np.testing.assert_allclose(drawn, of_rows, atol=0.05)
        assert (np.abs(drawn) <= np.abs(of_rows)).all()


def test_glyphs_differ():
    outliers = surrogate_outliers(RANDOM.rand(100, 32, 32), kind="glyphs", random_state=0)
    on_line = (outliers > 0.5).reshape(100, -1).astype(float)
    shared = on_line @ on_line.T / np.maximum(on_line.sum(axis=1), on_line.sum(axis=1)[:, None])
    assert np.sort(shared, axis=1)[:, -2].max() < 0.95  # but for itself
    # Lines end on all sides, and bend both ways.
    for turned in (on_line.reshape(100, 32, 32)[:, ::-1], on_line.reshape(100, 32, 32)[:, :, ::-1]):
        assert np.abs(turned.mean(axis=0) - on_line.mean(axis=0).reshape(32, 32)).max() < 0.35


def test_strokes_are_thin_curves_light_on_dark_or_dark_on_light():
    X = RANDOM.rand(200, 32, 32)
    X[:, 0, 0], X[:, 0, 1] = 0, 1
    outliers = surrogate_outliers(X, kind="strokes", random_state=0)
    light = outliers.mean(axis=(1, 2))
    dark_ground = light < 0.5
    assert 0.4 < dark_ground.mean() < 0.6
    on_stroke = np.where(dark_ground[:, None, None], outliers, 1 - outliers) == 1
    assert 0.1 < on_stroke.mean() < 0.4
    # Most of a stroke goes on beside its pixels, and none is wide.
    padded = np.pad(on_stroke, ((0, 0), (1, 1), (1, 1)))
    shifts = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    around = sum(np.roll(padded, shift, axis=(1, 2)) for shift in shifts)[:, 1:-1, 1:-1]
    assert (around[on_stroke] >= 2).mean() > 0.95
    assert (around[on_stroke] == 8).mean() < 0.1
    assert len({outlier.tobytes() for outlier in outliers}) == 200


def test_frequencies_keep_the_amplitudes_within_the_range():
    X = 0.5 + 1e-3 * (IMAGES - 0.5)
    X[0, 0, 0, :2] = 0, 1  # a wide range, so that nothing is cut off elsewhere
    outliers = surrogate_outliers(X, kind="frequencies", random_state=0)
    np.testing.assert_allclose(
        np.abs(np.fft.fft2(outliers[1:])), np.abs(np.fft.fft2(X[1:])), atol=1e-6
    )
    assert (np.abs(outliers - X).max(axis=(1, 2, 3)) > 1e-4).mean() > 0.9


def test_noise_has_a_third_of_the_range():
    outliers = surrogate_outliers(np.clip(IMAGES, 0.499, 0.501), kind="noise", random_state=0)
    assert outliers.min() >= 0.499
    assert outliers.max() <= 0.501
    grey = np.full((50, 16, 16), 128.0)
    grey[0, 0, :2] = 0, 255
    noise = surrogate_outliers(grey, kind="noise", random_state=0)[1:] - 128
    # Mean of |N(0, 76.5)| cut off at 128.
    assert np.abs(noise).mean() == pytest.approx(58.0, rel=0.03)


def test_colours_move_on_and_greys_are_inverted():
    outliers = surrogate_outliers(IMAGES, kind="colours", random_state=0)
    np.testing.assert_array_equal(outliers, IMAGES[:, [2, 0, 1]])
    grey = IMAGES[:, 0]
    inverted = surrogate_outliers(grey, kind="colours", random_state=0)
    np.testing.assert_allclose(inverted, grey.max() + grey.min() - grey)


@pytest.mark.parametrize("X", [IMAGES, RANDOM.rand(30, 5)], ids=["images", "table"])
def test_a_mixture_is_the_mean_with_a_row_of_another_label(X):
    y = np.arange(30) % 2
    outliers = surrogate_outliers(X, y, kind="mixture", random_state=0)
    for row, outlier in enumerate(outliers):
        other = 2 * outlier - X[row]
        (partner,) = np.flatnonzero([np.allclose(other, x) for x in X])
        assert y[partner] != y[row]


def test_scaled_rows_lie_three_times_as_far_from_the_mean():
    X = RANDOM.rand(30, 5)
    outliers = surrogate_outliers(X, kind="scale", random_state=0)
    np.testing.assert_allclose(outliers - X.mean(axis=0), 3 * (X - X.mean(axis=0)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize(
    "kind",
    [
        "auto",
        "blur",
        "contrast",
        "edges",
        "strokes",
        "silhouettes",
        "shapes",
        "glyphs",
        "frequencies",
        "noise",
        "colours",
    ],
)
def test_every_kind_keeps_dtype_shape_and_range(kind, dtype):
    X = (200 * IMAGES + 20).astype(dtype)
    outliers = surrogate_outliers(X, kind=kind, random_state=0)
    assert outliers.dtype == dtype
    assert outliers.shape == X.shape
    assert outliers.min() >= X.min()
    assert outliers.max() <= X.max()
    assert (outliers != X).any(axis=(1, 2, 3)).all()


def test_columns_of_few_values_are_permuted_if_that_makes_any_new_row():
    X = np.array([[3, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 1], [0, 3], [1, 0], [2, 0], [4, 4]])
    outliers = surrogate_outliers(X, random_state=0)
    assert np.array_equal(np.sort(outliers, axis=0), np.sort(X, axis=0))
    assert not {*map(tuple, outliers.tolist())} <= {*map(tuple, X.tolist())}


def test_of_images_of_one_colour_only_shapes_and_glyphs_can_be_made():
    X = np.ones((4, 8, 8)) * np.arange(4)[:, None, None]
    assert auto_kinds(X) == COLOURED
    assert (np.ptp(surrogate_outliers(X, random_state=0), axis=(1, 2)) > 0).all()
    for kind in ("patches", "blur", "contrast", "edges", "silhouettes"):
        with pytest.raises(ValueError, match="X"):
            surrogate_outliers(X, kind=kind, random_state=0)


def test_an_image_that_stands_for_a_new_one_is_turned_by_at_most_15_degrees():
    y, x = np.mgrid[:16, :16] - 7.5
    plane = 40 + 2 * x + 0.5 * y
    images = np.repeat(plane[None], 50, axis=0)
    turned = surrogates.as_new(images, np.random.RandomState(0))
    middle = np.s_[:, 5:11, 5:11]  # where no border is near
    angles = np.random.RandomState(0).uniform(-15, 15, 50)
    assert np.ptp(angles) > 25
    for image, angle in zip(turned[middle], np.deg2rad(angles), strict=True):
        # A plane turned is a plane, whose steepness has turned.
        along_x = (2 * np.cos(angle), 0.5 * np.cos(angle))
        across = (0.5 * np.sin(angle), 2 * np.sin(angle))
        steep_y, steep_x = (np.diff(image, axis=axis).mean() for axis in (0, 1))
        assert abs(steep_x - along_x[0]) == pytest.approx(abs(across[0]), abs=1e-9)
        assert abs(steep_y - along_x[1]) == pytest.approx(abs(across[1]), abs=1e-9)
        assert np.hypot(steep_x, steep_y) == pytest.approx(np.hypot(2, 0.5))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8), (1, 8, 8)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_stands_for_new_images_is_like_them(shape, dtype):
    values = np.random.RandomState(0).randint(256, size=(6, *shape))
    images = values.astype(dtype)
    turned = surrogates.as_new(images, np.random.RandomState(0))
    assert turned.shape == images.shape
    assert turned.dtype == images.dtype
    assert turned.min() >= images.min()
    assert turned.max() <= images.max()
    assert (turned != images).reshape(6, -1).any(axis=1).all()
    assert (images == values).all()


def test_channels_are_turned_alike():
    image = np.random.RandomState(0).rand(5, 9, 9)
    both = surrogates.as_new(np.stack([image] * 3, axis=3), np.random.RandomState(1))
    np.testing.assert_array_equal(both[..., 0], surrogates.as_new(image, np.random.RandomState(1)))
    first = surrogates.as_new(np.stack([image] * 3, axis=1), np.random.RandomState(1))
    np.testing.assert_array_equal(first, np.moveaxis(both, 3, 1))


def test_images_are_turned_as_scipy_turns_them():
    images = np.random.RandomState(0).rand(100, 9, 14)
    angles = np.random.RandomState(1).uniform(-15, 15, 100)
    expected = [
        ndimage.rotate(image, angle, reshape=False, order=1, mode="reflect")
        for image, angle in zip(images, angles, strict=True)
    ]
    turned = surrogates.as_new(images, np.random.RandomState(1))
    np.testing.assert_allclose(turned, expected, atol=1e-12)
