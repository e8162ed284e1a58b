"""Outliers made from in-distribution rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.special import comb
from torch import Tensor
from torch.nn import functional

from ..engine.network import TRIAL_ROWS, Network
from ..engine.rows import Rows as InputRows
from ..engine.rows import image_axes, slices, spaced
from ..engine.trials import embedding_of
from ..labels import as_labels
from ..randomness import random_generator
from ..rows import as_numbers
from ..validation import valid_array, validated

__all__ = ["surrogate_outliers"]

Rows = NDArray[Any]
Maker = Callable[[Rows, Rows, np.random.RandomState], Rows]

GRID = 4
BLUR = 1 / 24
"""Standard deviation of the blur, as a share of the larger side."""

LEAST_BLUR = 1.0
"""Least standard deviation of the blur, in pixels. Less would not change small images."""

CONTRAST = 0.2
STROKES = 1 / 16
"""How smooth the field is whose zero lines are strokes, as a share of the larger side."""

CORNERS = (3, 4, 5, 6, 8, 32)
"""Corners that a shape may have; with the most it looks round."""

MOST_SHAPES = 3
"""Shapes one inside another, at most."""

KNOTS = 6
"""Control points of the curve that a glyph is."""

POINTS = 64
"""Points of that curve from which distances are taken."""

PEN = 1 / 16
"""Half the width of a glyph's line, and how soft its edge is, as a share of the smaller side."""

LEAST_WIDTH = 1 / 3
"""Width of a glyph, as a share of the smaller side, at least."""

SIZE = 2 / 3
"""Height of a glyph, and its width at most, as shares of the smaller side."""

LEAST_SIDE = 4
"""Pixels of the smaller side on which a glyph has room."""

NOISE = 0.3
TURN = 15.0
"""Degrees by which an image is turned to stand for a new one, at most."""

CHUNK_ROWS = 1024
TURNED_ROWS = 64
"""Images that are turned at a time."""

TRIED_ROWS = 32
"""Rows on which each kind is tried."""

LEAST_SHARE = 1 / 4
"""Share of the images that a kind makes of them that must be outliers."""

NEAR = 0.05
"""Share of an image's contrast within which another one counts as the same."""


@validated(kind=[str], random_state=["random_state"])
def surrogate_outliers(
    X: ArrayLike,
    y: ArrayLike | None = None,
    *,
    kind: str = "auto",
    random_state: int | np.random.RandomState | None = None,
) -> NDArray[Any]:
    """Make outliers from in-distribution rows, to judge a detector without outlier data.

    Parameters
    ----------
    X : array-like of shape (n, ...)
        In-distribution rows: a table (n, d) or images (n, h, w), (n, c, h, w) or (n, h, w, c).
    y : array-like of shape (n,), default=None
        Label of each row, for "mixture", which mixes rows of different labels. Without labels it
        mixes any two rows.
    kind : str, default="auto"
        What to do to the rows; see the notes. For images "patches", "blur", "contrast", "edges",
        "strokes", "silhouettes", "shapes", "glyphs", "frequencies", "noise", "colours" or
        "mixture"; for a table "columns", "mixture" or "scale". "auto" takes the first eight in turn
        for images, without those that would not change them, and "columns" for a table.
    random_state : int, RandomState or None, default=None
        Seed. Pass an int for the same outliers at every call.

    Returns
    -------
    ndarray of the shape and dtype of X
        The outliers. All but those of "scale" are within the range of X.

    Raises
    ------
    TypeError, ValueError
        If X has no surrogates of this kind because of its shape or because they would be like its
        rows, if it is empty, masked, NaN, infinite or holds no numbers, or if a parameter is of
        the wrong type.

    Notes
    -----
    Images:

    - "patches" cuts each image into a grid of at most 4 x 4 cells and permutes the cells;
    - "blur" removes details, with a Gaussian of a 24th of the larger side, at least one pixel;
    - "contrast" keeps a fifth of each image's difference from its mean colour;
    - "edges" shows how much neighbouring pixels differ, from none, the least value of X, to the
      largest difference in the image, the largest value of X;
    - "strokes" draws random curves in an image's brightest colour on its darkest, or the reverse;
    - "silhouettes" gives the brightest colour to what is brighter than the image's mean, and the
      darkest to the rest;
    - "shapes" draws one to three regular polygons, one inside another, each and the ground in a
      random colour within the range of each channel of X;
    - "glyphs" writes one thick, soft line, a random Bezier curve, across the middle, in the largest
      value of each channel on the least;
    - "frequencies" keeps the amplitudes of an image's Fourier transform and takes the phases of
      another image;
    - "noise" adds Gaussian noise of 0.3 times the range of X;
    - "colours" gives each channel the values of the next, and inverts images of one channel;
    - "mixture" is the mean of two images.

    Tables:

    - "columns" permutes each column on its own: it keeps the distribution of a column and breaks
      its relation to the others;
    - "mixture" is the mean of two rows;
    - "scale" moves each row away from the mean of X, to three times its distance.

    Some kinds do not change some rows: "silhouettes" of images of two colours are these images. If
    a kind makes images like those of X, or of one colour, of more than three quarters of a few
    images, it is refused, and "auto" goes without it; for a table, if it makes no new row of them.

    On CIFAR-10, "patches", "blur" and "contrast" choose detectors that are good on real scenes and
    textures, "edges", "strokes" and "silhouettes" such as are good on faces and garments. "shapes"
    stand for signs and symbols, "glyphs" for digits. "noise", "colours" and "mixture" are no kinds
    to choose by. `benchmarks/README.md` has the figures.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.model_selection import surrogate_outliers
    >>> X = np.arange(6).reshape(3, 2)
    >>> sorted(surrogate_outliers(X, random_state=0)[:, 1].tolist())
    [1, 3, 5]
    """
    if not isinstance(X, Tensor | list | tuple):  # which valid_array looks into
        _check_form(as_numbers(X))
    X = valid_array(X, "X", None)
    _check_form(X)
    makers = _makers(X)
    if kind != "auto" and kind not in makers:
        raise ValueError(
            f"kind={kind!r} is no surrogate for X of shape {X.shape}; pass one of "
            f"{', '.join(map(repr, ['auto', *makers]))}."
        )
    wanted = AUTO[X.ndim == 2] if kind == "auto" else (kind,)
    kinds = _usable(X, makers, wanted)
    if not kinds:
        raise ValueError(
            f"Outliers of the kind {' or '.join(map(repr, wanted))} would be rows like those of "
            f"X{', or of one colour' * (X.ndim > 2)}. {_instead_of(X, kind)}"
        )
    random = random_generator(random_state)
    partners = _partners(len(X), y if kind == "mixture" else None, random)
    return _made(X, [makers[name] for name in kinds], partners, random)


def surrogates_by_kind(
    X: NDArray[Any], n_outliers: int, random: np.random.RandomState
) -> dict[str, NDArray[Any]]:
    """Outliers of each kind that "auto" takes, made of rows of X.

    Parameters
    ----------
    X : ndarray of shape (n, ...)
        In-distribution rows, as `surrogate_outliers` takes them.
    n_outliers : int
        Outliers of all kinds together, in equal shares; of one kind at most n.
    random : RandomState
        Draws the rows, and what is done to them.

    Returns
    -------
    dict of str to ndarray
        The outliers of each kind.
    """
    _check_form(X)
    X = finite_rows(X)
    if len(X) == 0:
        raise ValueError(f"Every row of X has NaN or infinity. {INSTEAD}")
    kinds = auto_kinds(X)
    if not kinds:
        surrogate_outliers(X)  # which says why
    size = min(len(X), max(n_outliers // len(kinds), 2))
    outliers = {}
    for kind in kinds:
        some = X[random.permutation(len(X))[:size]]
        outliers[kind] = _made(some, [_makers(some)[kind]], _partners(size, None, random), random)
    return outliers


def refuse_indices(network: Network, rows: InputRows) -> None:
    """Refuse rows of indices for an embedding, of which outliers would be made as of images.

    In a table, an index stays in its column, and so is one that the embedding has.

    Parameters
    ----------
    network : Network
        The network that will take the outliers.
    rows : Rows
        In-distribution rows, of which some are tried.

    Raises
    ------
    ValueError
        If an embedding gets other indices for other rows.
    """
    few = rows.spaced(TRIAL_ROWS)
    values = few.in_memory(None)
    if values.ndim <= 2 or values.dtype.kind not in "biuf":  # a table, or no numbers
        return
    name = embedding_of(network.module, network.batcher(few))
    if name is not None:
        raise ValueError(
            f"X holds indices for the embedding {name!r} of the network, so no surrogate outliers "
            f"can be made of it. {INSTEAD}"
        )


def finite_rows(X: NDArray[Any]) -> NDArray[Any]:
    """Rows of X without NaN and infinity.

    Parameters
    ----------
    X : ndarray of shape (n, ...)
        Numbers.

    Returns
    -------
    ndarray of shape (m, ...)
        These rows, in their order.
    """
    return X[np.isfinite(X).reshape(len(X), -1).all(axis=1)]


def as_new(X: NDArray[Any], random: np.random.RandomState) -> NDArray[Any]:
    """Images that a classifier takes as it takes new ones, made of some that it may be trained on.

    A classifier is surer of the images that it was trained on than of others. Turned a little, they
    are like others to it.

    Parameters
    ----------
    X : ndarray of shape (n, h, w), (n, c, h, w) or (n, h, w, c)
        Images, as `surrogate_outliers` takes them.
    random : RandomState
        Draws the angles.

    Returns
    -------
    ndarray of the shape and dtype of X
        Each image turned about its centre, by up to 15 degrees.
    """
    turn = _in_dtype(X.dtype, _within((X.min(), X.max()), _on_images(_turned, image_axes(X.shape))))
    turned = np.empty_like(X)
    for some in slices(len(X), TURNED_ROWS):
        turned[some] = turn(X[some], X[some], random)
    return turned


def auto_kinds(X: NDArray[Any]) -> tuple[str, ...]:
    """Kinds that "auto" takes in turn for rows X.

    Parameters
    ----------
    X : ndarray of shape (n, ...)
        In-distribution rows, as `surrogate_outliers` takes them.

    Returns
    -------
    tuple of str
        The names; none if all outliers would be like the rows.
    """
    return _usable(X, _makers(X), AUTO[X.ndim == 2])


def _check_form(X: NDArray[Any]) -> None:
    """Refuse what is neither a table nor images."""
    if X.ndim not in (2, 3, 4) or X.dtype.kind not in "biuf":
        raise ValueError(
            f"X of shape {X.shape} and dtype {X.dtype} is neither a table of numbers nor a set of "
            f"images; no surrogate outliers can be made. {INSTEAD}"
        )


def _makers(X: Rows) -> dict[str, Maker]:
    """What can be made of a table, or of images."""
    if X.ndim == 2:
        bounds = X.min(), X.max()
        if X.shape[1] < 2 or len(X) < 2:
            raise ValueError(
                f"X has {len(X)} rows and n_features = {X.shape[1]}; surrogate outliers need at "
                f"least 2 rows and 2 columns. "
                f"{INSTEAD}"
            )
        return {
            "columns": _in_dtype(X.dtype, _within(bounds, _columns)),
            "mixture": _in_dtype(X.dtype, _within(bounds, _mixture)),
            "scale": _in_dtype(X.dtype, _scale(X)),
        }
    axes = image_axes(X.shape)
    if max(X.shape[axis] for axis in axes) < 2:
        raise ValueError(
            f"images of shape {X.shape[1:]} are too small to permute patches. {INSTEAD}"
        )
    least, largest = X.min(axis=(0, *axes)), X.max(axis=(0, *axes))
    bounds = least.min(), largest.max()
    of_channels = least.astype(float), largest.astype(float)
    return {
        name: _in_dtype(X.dtype, _within(bounds, _on_images(maker, axes)))
        for name, maker in {
            "patches": _patches,
            "blur": _blur,
            "contrast": _contrast,
            "edges": _edges(*map(float, bounds)),
            "strokes": _strokes,
            "silhouettes": _silhouettes,
            "shapes": _shapes(*of_channels),
            "glyphs": _glyphs(*of_channels),
            "frequencies": _frequencies,
            "noise": _noise(float(bounds[1]) - float(bounds[0])),
            "colours": _colours(float(bounds[1]) + float(bounds[0])),
            "mixture": _mixture,
        }.items()
    }


def _usable(X: Rows, makers: dict[str, Maker], kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Those kinds that make outliers of most rows, tried on some."""
    # Few rows are taken again and again, so that chance does not decide.
    rows = X[np.resize(spaced(len(X), TRIED_ROWS), TRIED_ROWS)]
    others = np.roll(rows, 1, axis=0)

    def share(kind: str) -> float:
        made = makers[kind](rows, others, np.random.RandomState(0))
        return float(np.mean(_are_outliers(made.astype(float), rows.astype(float))))

    # Columns of few values often make a row that there is, which tells less and misleads nobody.
    least = 1 / TRIED_ROWS if X.ndim == 2 else LEAST_SHARE
    return tuple(kind for kind in kinds if share(kind) >= least)


def _are_outliers(made: Rows, rows: Rows) -> NDArray[np.bool_]:
    """Which of what was made are like none of the rows, and no images of one colour."""
    flat, flat_made = (each.reshape(len(each), -1) for each in (rows, made))
    distances = cdist(flat_made, flat, "cityblock")
    if rows.ndim == 2:
        return (distances > 0).all(axis=1)
    rounding = np.finfo(np.float32).eps * np.abs(flat).sum(axis=1)
    is_another = distances > np.maximum(NEAR * _contrasts(rows), rounding)
    return is_another.all(axis=1) & (_contrasts(made) > rounding)


def _contrasts(images: Rows) -> Rows:
    """How far the pixels of each image lie from its mean colour, in all."""
    differences = images - images.mean(axis=image_axes(images.shape), keepdims=True)
    return np.abs(differences).reshape(len(images), -1).sum(axis=1)


AUTO = {
    True: ("columns",),
    False: ("patches", "blur", "contrast", "edges", "strokes", "silhouettes", "shapes", "glyphs"),
}
"""Kinds that "auto" takes in turn, for a table and for images."""

INSTEAD = (
    "Use known outliers instead: make_ood_scorer(X_ood=...) or make_ood_scorer(ood_label=...)."
)


def _instead_of(X: Rows, kind: str) -> str:
    """What to use where a kind makes no outliers of X."""
    others = () if kind == "auto" else auto_kinds(X)
    return (
        f"Pass kind='auto', which takes {', '.join(map(repr, others))} here." if others else INSTEAD
    )


def _made(
    X: Rows, makers: list[Maker], partners: NDArray[np.intp], random: np.random.RandomState
) -> Rows:
    """What makers, which take the rows in turn, make of each row and its partner."""
    outliers = np.empty_like(X)
    for place, maker in enumerate(makers):
        rows = np.arange(place, len(X), len(makers))
        # A table goes at once, as what is permuted are its columns.
        for piece in slices(len(rows), len(rows) if X.ndim == 2 else CHUNK_ROWS):
            some = rows[piece]
            outliers[some] = maker(X[some], X[partners[some]], random)
    return outliers


def _partners(n_rows: int, y: ArrayLike | None, random: np.random.RandomState) -> NDArray[np.intp]:
    """Another row for each row, of another label if there is one."""
    partners = random.permutation(n_rows)
    if y is None:
        return partners
    labels = as_labels(y, n_rows)
    if len(np.unique(labels)) < 2:
        return partners
    for row in np.flatnonzero(labels == labels[partners]):
        partners[row] = random.choice(np.flatnonzero(labels != labels[row]))
    return partners


def _within(bounds: tuple[Any, Any], maker: Maker) -> Maker:
    return lambda *given: maker(*given).clip(*bounds)


def _in_dtype(dtype: np.dtype[Any], maker: Maker) -> Maker:
    """Give a maker rows in floating point, and take what it makes in the dtype of the rows."""
    floating = np.result_type(dtype, np.float32)

    def make(rows: Rows, others: Rows, random: np.random.RandomState) -> Rows:
        made = maker(rows.astype(floating), others.astype(floating), random)
        return (np.rint(made) if dtype.kind in "iub" else made).astype(dtype)

    return make


def _on_images(maker: Maker, axes: tuple[int, int]) -> Maker:
    """Apply a maker of images (n, h, w, c) to images whose height and width are other axes."""

    def make(images: Rows, others: Rows, random: np.random.RandomState) -> Rows:
        images, others = (np.moveaxis(each, axes, (1, 2)) for each in (images, others))
        return np.moveaxis(maker(images, others, random), (1, 2), axes)

    return make


def _columns(rows: Rows, _: Rows, random: np.random.RandomState) -> Rows:
    return np.column_stack([column[random.permutation(len(rows))] for column in rows.T])


def _mixture(rows: Rows, others: Rows, _: np.random.RandomState) -> Rows:
    return (rows + others) / 2


def _scale(X: Rows) -> Maker:
    return lambda rows, _, __: X.mean(axis=0) + 3 * (rows - X.mean(axis=0))


def _patches(images: Rows, _: Rows, random: np.random.RandomState) -> Rows:
    n_images, height, width = images.shape[:3]
    rows, columns = min(GRID, height), min(GRID, width)
    high, wide = height // rows, width // columns
    permuted = images.copy()  # the border that fits no cell stays
    cells = permuted[:, : rows * high, : columns * wide]
    shape = (n_images, rows, high, columns, wide, *images.shape[3:])
    grid = cells.reshape(shape).swapaxes(2, 3)
    grid = grid.reshape(n_images, rows * columns, *grid.shape[3:])
    order = np.argsort(random.random_sample((n_images, rows * columns)), axis=1)
    grid = grid[np.arange(n_images)[:, None], order]
    grid = grid.reshape(n_images, rows, columns, *grid.shape[2:]).swapaxes(2, 3)
    cells[...] = grid.reshape(cells.shape)
    return permuted


def _blur(images: Rows, _: Rows, __: np.random.RandomState) -> Rows:
    sigma = max(BLUR * max(images.shape[1:3]), LEAST_BLUR)
    others = (0,) * (images.ndim - 3)
    return ndimage.gaussian_filter(images, (0, sigma, sigma, *others))


def _contrast(images: Rows, _: Rows, __: np.random.RandomState) -> Rows:
    mean = images.mean(axis=(1, 2), keepdims=True)
    return mean + CONTRAST * (images - mean)


def _edges(least: float, largest: float) -> Maker:
    def make(images: Rows, _: Rows, __: np.random.RandomState) -> Rows:
        steepness = _steepness(images)
        steepest = steepness.max(axis=tuple(range(1, images.ndim)), keepdims=True)
        return least + (largest - least) * steepness / np.where(steepest > 0, steepest, 1)

    return make


def _strokes(images: Rows, _: Rows, random: np.random.RandomState) -> Rows:
    sigma = max(STROKES * max(images.shape[1:3]), LEAST_BLUR)
    field = random.standard_normal(images.shape[:3])
    field = ndimage.gaussian_filter(field, (0, sigma, sigma), mode="wrap")
    on_stroke = np.abs(field) < _steepness(field)  # within a pixel of where the field is 0
    return _in_two_colours(images, on_stroke ^ (random.random_sample((len(images), 1, 1)) < 0.5))


def _silhouettes(images: Rows, _: Rows, __: np.random.RandomState) -> Rows:
    brightness = _brightness(images)
    return _in_two_colours(images, brightness > brightness.mean(axis=(1, 2), keepdims=True))


def _shapes(least: Rows, largest: Rows) -> Maker:
    def make(images: Rows, _: Rows, random: np.random.RandomState) -> Rows:
        return np.stack([_nested(image, least, largest, random) for image in images])

    return make


def _nested(image: Rows, least: Rows, largest: Rows, random: np.random.RandomState) -> Rows:
    """An image of polygons, one inside another."""
    height, width = image.shape[:2]
    y, x = np.ogrid[0.5:height, 0.5:width]
    x, y = x / width - random.uniform(0.4, 0.6), y / height - random.uniform(0.4, 0.6)
    drawn = np.empty_like(image)
    drawn[:] = random.uniform(least, largest, image.shape[2:])
    radius = random.uniform(0.3, 0.5)
    for _ in range(random.randint(1, MOST_SHAPES + 1)):
        corners = random.choice(CORNERS)
        turned = 2 * np.pi * (random.random_sample() + np.arange(corners)) / corners
        # How far a pixel lies towards the side that it is nearest to.
        towards = np.max([np.cos(angle) * x + np.sin(angle) * y for angle in turned], axis=0)
        radius *= np.cos(np.pi / corners)  # of the circle in it
        drawn[towards < radius] = random.uniform(least, largest, image.shape[2:])
        radius *= random.uniform(0.3, 0.9)  # of the circle around the next
    return drawn


def _glyphs(least: Rows, largest: Rows) -> Maker:
    def make(images: Rows, _: Rows, random: np.random.RandomState) -> Rows:
        ink = _for_channels(_written(images.shape[:3], random), images)
        return np.broadcast_to(least + (largest - least) * ink, images.shape)

    return make


def _written(shape: tuple[int, ...], random: np.random.RandomState) -> Rows:
    """How much of each pixel a line covers, in images (n, height, width) with a line each."""
    n_images, *size = shape
    if min(size) < LEAST_SIDE:
        return np.zeros(shape)  # and what is of one colour is refused
    y, x = (each / min(size) for each in _from_centre(*size))
    nearest = np.full(shape, np.inf)  # squared distance to the nearest point of the curve
    for point in np.moveaxis(_curves(n_images, random), 1, 0):
        down, across = point.T[:, :, None, None]
        np.minimum(nearest, (y - down) ** 2 + (x - across) ** 2, out=nearest)
    return (1.5 - np.sqrt(nearest) / PEN).clip(0, 1)


def _curves(n_curves: int, random: np.random.RandomState) -> Rows:
    """Points (n, points, 2) of Bezier curves about 0, each stretched to the size of a glyph."""
    along = (1 - np.cos(np.linspace(0, np.pi, POINTS)[:, None])) / 2  # closer at the fast ends
    knots = np.arange(KNOTS)
    bernstein = comb(KNOTS - 1, knots) * along**knots * (1 - along) ** (KNOTS - 1 - knots)
    curves = bernstein @ random.random_sample((n_curves, KNOTS, 2))
    least, largest = curves.min(axis=1, keepdims=True), curves.max(axis=1, keepdims=True)
    sizes = np.full((n_curves, 1, 2), SIZE)
    sizes[..., 1] = random.uniform(LEAST_WIDTH, SIZE, (n_curves, 1))
    return ((curves - least) / (largest - least) - 0.5) * sizes


def _turned(images: Rows, _: Rows, random: np.random.RandomState) -> Rows:
    n_images, height, width = images.shape[:3]
    angles = np.deg2rad(random.uniform(-TURN, TURN, (n_images, 1, 1)))
    y, x = _from_centre(height, width)
    across = np.cos(angles) * x - np.sin(angles) * y
    down = np.sin(angles) * x + np.cos(angles) * y
    places = np.stack([2 * across / width, 2 * down / height], axis=3)  # from -1 to 1
    planes = np.moveaxis(images.reshape(n_images, height, width, -1), 3, 1)
    turned = functional.grid_sample(
        torch.from_numpy(planes),
        torch.from_numpy(places.astype(images.dtype)),
        padding_mode="reflection",
        align_corners=False,
    )
    return np.moveaxis(turned.numpy(), 1, 3).reshape(images.shape)


def _from_centre(height: int, width: int) -> tuple[Rows, Rows]:
    """Places of the pixels of an image: of its rows (height, 1) and of its columns (1, width)."""
    y, x = np.ogrid[0.5:height, 0.5:width]
    return y - height / 2, x - width / 2


def _for_channels(of_pixels: NDArray[Any], images: Rows) -> NDArray[Any]:
    """Values of pixels (n, height, width) with an axis more if the images have channels."""
    return of_pixels.reshape(*of_pixels.shape, *(1,) * (images.ndim - 3))


def _steepness(images: Rows) -> Rows:
    """Length of the gradient, by central differences."""
    return np.hypot(*(ndimage.correlate1d(images, [-0.5, 0, 0.5], axis) for axis in (1, 2)))


def _brightness(images: Rows) -> Rows:
    return images.mean(axis=tuple(range(3, images.ndim)))


def _in_two_colours(images: Rows, is_bright: NDArray[np.bool_]) -> Rows:
    """Images of the darkest and the brightest pixel of each."""
    rows, pixels = np.arange(len(images)), images.reshape(len(images), -1, *images.shape[3:])
    brightness = _brightness(images).reshape(len(images), -1)
    darkest, brightest = (
        pixels[rows, place][:, None, None]
        for place in (brightness.argmin(axis=1), brightness.argmax(axis=1))
    )
    return np.where(_for_channels(is_bright, images), brightest, darkest)


def _frequencies(images: Rows, others: Rows, _: np.random.RandomState) -> Rows:
    amplitudes = np.abs(np.fft.fft2(images, axes=(1, 2)))
    phases = np.angle(np.fft.fft2(others, axes=(1, 2)))
    return np.fft.ifft2(amplitudes * np.exp(1j * phases), axes=(1, 2)).real


def _noise(value_range: float) -> Maker:
    return lambda images, _, random: (
        images + NOISE * value_range * random.standard_normal(images.shape)
    )


def _colours(extremes: float) -> Maker:
    return lambda images, _, __: (
        np.roll(images, 1, axis=3)
        if images.ndim == 4 and images.shape[3] > 1
        else extremes - images
    )
