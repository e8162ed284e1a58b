from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.utils.data import TensorDataset

from skood import SparseEnergyOODDetector
from skood.plotting import ImageGridDisplay

IMAGES = np.random.RandomState(0).uniform(size=(10, 5, 6))
SCORES = np.array([3.0, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 8])


def texts(display):
    return [text.get_text() for text in display.ax_.texts]


def test_shows_the_lowest_and_the_highest_scores():
    display = ImageGridDisplay.from_predictions(SCORES, IMAGES, n_images=2)
    assert texts(display) == ["lowest scores", "1", "1.5", "highest scores", "9", "8"]
    drawn = [image.get_array() for image in display.ax_.images]
    for image, number in zip(drawn, [1, 3, 4, 9], strict=True):
        np.testing.assert_array_equal(image, IMAGES[number])


def test_images_keep_their_shape_and_do_not_overlap():
    display = ImageGridDisplay.from_predictions(SCORES, IMAGES, n_images=3)
    boxes = [image.get_extent() for image in display.ax_.images]
    for left, right, below, above in boxes:
        assert right - left == pytest.approx(1)
        assert below - above == pytest.approx(5 / 6)
    assert all(a[1] < b[0] for a, b in pairwise(boxes[:3]))
    assert max(box[2] for box in boxes[:3]) < min(box[3] for box in boxes[3:])


@pytest.mark.parametrize(
    "images",
    [
        (255 * IMAGES).astype(np.uint8),
        IMAGES[:, None],
        IMAGES[..., None],
        torch.as_tensor(IMAGES),
        np.repeat(IMAGES[:, None], 3, axis=1),
        np.repeat(IMAGES[..., None], 3, axis=3),
        np.round(7 * IMAGES - 3, 9),
    ],
    ids=["bytes", "n1hw", "nhw1", "tensor", "n3hw", "nhw3", "another range"],
)
def test_images_of_all_forms_are_drawn_alike(images):
    display = ImageGridDisplay(images={"a": images}).plot()
    expected = IMAGES[..., None]
    if not isinstance(images, torch.Tensor) and images.min() < 0:
        expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(
        display.images["a"], np.broadcast_to(expected, display.images["a"].shape), atol=1 / 254
    )
    assert len(display.ax_.images) == 10


@pytest.mark.filterwarnings("ignore")
def test_draws_a_detector_with_its_classes():
    X = IMAGES.astype(np.float32)
    labels = np.array(["cat", "dog"])[np.arange(10) % 2]
    module = nn.Sequential(nn.Flatten(), nn.Linear(30, 2))
    detector = SparseEnergyOODDetector(module, max_epochs=0, calibration_size=None)
    detector.fit(X, labels)
    scores = detector.score_samples(X)
    for given in (X, torch.as_tensor(X), TensorDataset(torch.as_tensor(X))):
        display = ImageGridDisplay.from_estimator(detector, given, n_images=1)
        numbers = [np.argmin(scores), np.argmax(scores)]
        for of_row, number in zip(display.images.values(), numbers, strict=True):
            np.testing.assert_allclose(of_row[0, ..., 0], X[number])
        names = [of_row[0] for of_row in display.captions.values()]
        assert names == detector.predict_class(X[numbers]).tolist()
    piped = make_pipeline(FunctionTransformer(), detector)
    assert ImageGridDisplay.from_estimator(piped, X, n_images=1).captions == display.captions


@pytest.mark.filterwarnings("ignore")
def test_references_are_loaded():
    files = np.array([f"{number}.png" for number in range(10)])

    def load(names):
        numbers = [int(name.removesuffix(".png")) for name in names]
        return torch.as_tensor(IMAGES[numbers], dtype=torch.float32)

    module = nn.Sequential(nn.Flatten(), nn.Linear(30, 2))
    detector = SparseEnergyOODDetector(module, max_epochs=0, calibration_size=None, preprocess=load)
    detector.fit(files)
    display = ImageGridDisplay.from_estimator(detector, files, n_images=2)
    lowest = np.argsort(detector.score_samples(files), kind="stable")[:2]
    np.testing.assert_allclose(display.images["lowest scores"][..., 0], IMAGES[lowest], atol=1e-7)


def test_rows_of_ones_own_may_have_no_captions():
    display = ImageGridDisplay(images={"a": IMAGES[:2], "b": IMAGES[:0]}, captions={"a": ["x", 1]})
    assert texts(display.plot()) == ["a", "x", "1", "b"]
