"""Images in rows, such as those that a detector finds the least and the most usual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..engine.rows import USUAL_CHANNELS, Rows, as_array, has_channels_last
from ..model_selection.steps import last_step, seen_by_last_step
from ..notices import quoted
from ..rows import as_rows, take
from ..validation import Number, valid_scores
from .shared import Display, plain, scorer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ImageGridDisplay"]

GREY: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
N_IMAGES = [Number(Integral, 1, None, closed="left")]
LOWEST, HIGHEST = "lowest scores", "highest scores"
GAP, LINE = 0.06, 0.22
"""Space between images, and height of a line of text, in widths of an image."""


class ImageGridDisplay(Display):
    """Rows of images with captions, such as the most and the least unusual ones.

    Make it with `from_estimator` or `from_predictions`, which show the images with the lowest and
    those with the highest scores, each beginning with the extreme one; or with rows of your own.

    Parameters
    ----------
    images : dict of str to array-like
        Images by the title of their row, of shape (n, h, w), (n, h, w, c) or (n, c, h, w), with c
        1, 3 or 4 channels. Bytes, or numbers from 0 to 1; other numbers are stretched to that.
    captions : dict of str to sequence of str, default=None
        What stands below the images, by the same titles.

    Attributes
    ----------
    images : dict of str to ndarray of shape (n, h, w, c), float
        The images as they are drawn, from 0 to 1.
    captions : dict of str to list of str
        The captions.
    ax_ : matplotlib.axes.Axes
        Axes with the picture, once drawn.
    figure_ : matplotlib.figure.Figure
        Figure with the axes, once drawn.

    Raises
    ------
    TypeError, ValueError
        If something is no image, there is none, or captions and images do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from skood.plotting import ImageGridDisplay
    >>> images = np.random.default_rng(0).uniform(size=(20, 8, 8))
    >>> display = ImageGridDisplay.from_predictions(np.arange(20), images, n_images=3)
    >>> display.captions
    {'lowest scores': ['0', '1', '2'], 'highest scores': ['19', '18', '17']}
    """

    def __init__(
        self,
        *,
        images: Mapping[str, ArrayLike],
        captions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(images, Mapping):
            raise TypeError(
                f"images is of type {type(images).__name__}; expected a dict from the title of a "
                "row to its images."
            )
        self.images = {title: _valid_images(of_row, title) for title, of_row in images.items()}
        if not any(map(len, self.images.values())):
            raise ValueError("images holds no image; pass at least one.")
        expected = {title: len(of_row) for title, of_row in self.images.items()}
        self.captions = {} if captions is None else _valid_captions(captions, expected)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, n_images: int = 8, ax: Axes | None = None
    ) -> Self:
        """Score images with a fitted detector, and show those with the lowest and highest scores.

        The captions are the classes that the detector takes them for, if it knows classes.

        Parameters
        ----------
        estimator : estimator
            A fitted detector with ``score_samples``, or a pipeline or a search around one.
        X : array-like or Tensor of shape (n, ...), or Dataset
            Images, or what the detector loads them from.
        n_images : int, default=8
            Images of each row, at least 1.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ImageGridDisplay
            The display, drawn.

        Raises
        ------
        TypeError
            If `estimator` has no ``score_samples``.
        ValueError
            If X holds no images.
        """
        scores = scorer_of(estimator)(X)
        shown = _extremes(scores, n_images)
        detector = last_step(estimator)
        if hasattr(detector, "predict_class"):
            captions = {
                title: detector.predict_class(seen_by_last_step(estimator, take(X, numbers)))
                for title, numbers in shown.items()
            }
        else:
            captions = _as_numbers(scores, shown)
        images = _read(as_rows(X, getattr(detector, "preprocess", None)), shown)
        return cls(images=images, captions=captions).plot(ax)

    @classmethod
    def from_predictions(
        cls, score: ArrayLike, X: Any, *, n_images: int = 8, ax: Axes | None = None
    ) -> Self:
        """Show the images with the lowest scores and those with the highest; captions are scores.

        Parameters
        ----------
        score : array-like of shape (n,)
            Scores, finite, higher is more in-distribution.
        X : array-like or Tensor of shape (n, h, w), (n, h, w, c) or (n, c, h, w), or Dataset
            The images.
        n_images : int, default=8
            Images of each row, at least 1.
        ax : matplotlib.axes.Axes, default=None
            Axes to draw on; None makes a figure.

        Returns
        -------
        ImageGridDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there is not one score an image, or X holds no images.
        """
        scores, rows = valid_scores(score, "score", finite=True), as_rows(X)
        if len(scores) != len(rows):
            raise ValueError(
                f"score has {len(scores)} values and X {len(rows)} images; pass one value an image."
            )
        shown = _extremes(scores, n_images)
        captions = _as_numbers(scores, shown)
        return cls(images=_read(rows, shown), captions=captions).plot(ax)

    def _size(self) -> tuple[float, float]:
        columns, lines = self._extent()
        return columns, lines

    def _extent(self) -> tuple[float, float]:
        """Width and height of the picture, in widths of an image."""
        heights = [self._height(title) for title in self.images]
        return max(map(len, self.images.values())) * (1 + GAP), sum(heights)

    def _height(self, title: str) -> float:
        """Height of a row with its title and its captions."""
        return _ratio(self.images[title]) + LINE * (2 + (title in self.captions))

    def _draw(self, ax: Axes) -> None:
        width, height = self._extent()
        top = 0.0
        for title, images in self.images.items():
            below = top + 1.5 * LINE + _ratio(images)
            ax.text(0, top + 1.3 * LINE, plain(title), va="bottom", weight="bold")
            for i, image in enumerate(images):
                left = i * (1 + GAP)
                extent = (left, left + 1, below, below - _ratio(images))
                ax.imshow(
                    image.squeeze(-1) if image.shape[-1] == 1 else image, extent=extent, **GREY
                )
                if title in self.captions:
                    caption = plain(self.captions[title][i])
                    ax.text(left + 0.5, below + 0.1 * LINE, caption, va="top", ha="center", size=8)
            top += self._height(title)
        ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
        ax.set_axis_off()


def _extremes(scores: NDArray[np.float64], n_images: int) -> dict[str, NDArray[np.intp]]:
    """Numbers of the images with the lowest and the highest scores, by the title of their row."""
    validate_parameter_constraints(
        {"n_images": N_IMAGES}, {"n_images": n_images}, caller_name="ImageGridDisplay"
    )
    order = np.argsort(scores, kind="stable")
    return {LOWEST: order[:n_images], HIGHEST: order[: -n_images - 1 : -1].copy()}


def _as_numbers(
    scores: NDArray[np.float64], shown: dict[str, NDArray[np.intp]]
) -> dict[str, list[str]]:
    return {title: [f"{x:.3g}" for x in scores[numbers]] for title, numbers in shown.items()}


def _read(rows: Rows, shown: dict[str, NDArray[np.intp]]) -> dict[str, NDArray[Any]]:
    return {title: as_array(rows.read(numbers)) for title, numbers in shown.items()}


def _valid_captions(captions: Any, expected: dict[str, int]) -> dict[str, list[str]]:
    """Captions by title, one for each of the images that are expected."""
    if not isinstance(captions, Mapping):
        raise TypeError(
            f"captions is of type {type(captions).__name__}; expected a dict from the title of a "
            "row to the captions of its images."
        )
    valid = {title: [str(each) for each in of_row] for title, of_row in captions.items()}
    for title, of_row in valid.items():
        if len(of_row) != expected.get(title, 0):
            raise ValueError(
                f"captions[{quoted(title)}] has {len(of_row)} captions for "
                f"{expected.get(title, 0)} images; pass one an image, by the titles of images."
            )
    return valid


def _valid_images(images: Any, title: str) -> NDArray[np.float64]:
    """Images of shape (n, h, w, c), from 0 to 1."""
    values = as_array(images) if hasattr(images, "cpu") else np.asarray(images)
    shape = values.shape
    if values.ndim == 3:
        values = values[..., None]
    elif values.ndim == 4 and not has_channels_last(shape):
        values = np.moveaxis(values, 1, -1)
    if (
        values.ndim != 4
        or values.shape[-1] not in USUAL_CHANNELS
        or values.dtype.kind not in "buif"
    ):
        raise ValueError(
            f"images[{quoted(title)}] has shape {shape} and dtype {values.dtype}; expected images, "
            "numbers of shape (n, h, w), (n, h, w, c) or (n, c, h, w) with c 1, 3 or 4."
        )
    if values.dtype == np.uint8:
        return values / 255
    values = values.astype(np.float64)
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if not np.isfinite([low, high]).all():
        raise ValueError(f"images[{quoted(title)}] holds NaN or infinity; pass finite numbers.")
    return values if low >= 0 and high <= 1 else (values - low) / max(high - low, 1e-300)


def _ratio(images: NDArray[np.float64]) -> float:
    """Height of images by their width."""
    return images.shape[1] / images.shape[2]
