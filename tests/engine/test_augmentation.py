from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from skood.engine.augmentation import AUGMENTATIONS, flip, flip_crop, get_augment

SHAPES = [(400, 3, 6, 7), (400, 6, 7), (400, 1, 9, 5)]


def distinct_images(shape):
    """Distinct positive values, so that every pixel can be followed."""
    return torch.arange(1, np.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shifts_of(image):
    """All windows of an image in a zero border of 4 pixels, by their shift."""
    height, width = image.shape[-2:]
    padded = torch.zeros(*image.shape[:-2], height + 8, width + 8, dtype=image.dtype)
    padded[..., 4 : 4 + height, 4 : 4 + width] = image
    return {
        (top, left): padded[..., top : top + height, left : left + width]
        for top in range(9)
        for left in range(9)
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_mirrors_about_half_of_the_images_each_drawn_on_its_own(shape):
    batch = distinct_images(shape)
    flipped, said = flip(batch, seeded())
    images = list(zip(flipped.numpy(), batch.numpy(), strict=True))
    mirrored = [np.array_equal(new, image[..., ::-1]) for new, image in images]
    kept = [np.array_equal(new, image) for new, image in images]
    assert said.tolist() == mirrored
    assert np.array_equal(np.add(mirrored, kept, dtype=int), np.ones(400))
    # Four standard deviations of a fair coin, for heads and for changes of side.
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / np.sqrt(400)
    assert abs(np.mean(np.diff(mirrored)) - 0.5) < 4 * 0.5 / np.sqrt(399)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(60, 3, 6, 7), (60, 5, 8, 8)])
def test_channels_last_are_augmented_as_channels_first(name, shape):
    batch = distinct_images(shape)
    first, mirrored = AUGMENTATIONS[name](batch, seeded())
    last, mirrored_last = AUGMENTATIONS[name](batch.movedim(1, 3), seeded())
    assert torch.equal(last.movedim(3, 1), first)
    if mirrored is not None:
        assert torch.equal(mirrored, mirrored_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_crop_gives_shifted_windows_of_the_padded_image_or_its_mirror(shape):
    batch = distinct_images(shape)
    cropped, said = flip_crop(batch, seeded())
    assert said is None
    assert cropped.shape == batch.shape
    assert cropped.dtype == batch.dtype
    drawn = []
    for new, image in zip(cropped, batch, strict=True):
        plain = [s for s, window in shifts_of(image).items() if torch.equal(new, window)]
        mirror = [s for s, window in shifts_of(image.flip(-1)).items() if torch.equal(new, window)]
        assert len(plain + mirror) == 1
        drawn.append((bool(mirror), *(plain + mirror)[0]))
    mirrored, top, left = np.array(drawn).T
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    for shift in (top, left):
        counts = np.bincount(shift, minlength=9)
        assert len(counts) == 9
        assert (abs(counts / 400 - 1 / 9) < 4.5 * np.sqrt(8 / 81 / 400)).all()
    assert abs(np.corrcoef(top, left)[0, 1]) < 4 / np.sqrt(400)


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=list(AUGMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_layout_in_memory_does_not_matter(augment, dtype):
    batch = torch.arange(40 * 3 * 8 * 8).reshape(40, 3, 8, 8).to(dtype)
    last = batch.contiguous(memory_format=torch.channels_last)
    augmented, _ = augment(last, seeded())
    assert torch.equal(augment(batch, seeded()).batch, augmented)
    assert augmented.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=list(AUGMENTATIONS))
def test_draws_come_from_the_generator_alone(augment, generator_states):
    batch = distinct_images((50, 3, 8, 8))
    kept = batch.clone()
    before = generator_states()
    generator = seeded()
    first, next_one = (augment(batch, generator).batch for _ in range(2))
    assert generator_states() == before
    assert torch.equal(first, augment(batch, seeded()).batch)
    assert not torch.equal(first, next_one)
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=list(AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(5, 7), (5, 1, 2, 3, 4)])
def test_batches_that_are_no_images_are_refused(augment, shape):
    with pytest.raises(ValueError, match=rf"need batches of images.*{re.escape(str(shape))}"):
        augment(torch.zeros(shape), seeded())


def test_augmentations_are_found_by_name():
    assert get_augment(None) is None
    assert get_augment("flip") is flip
    assert get_augment("flip-crop") is flip_crop


def test_a_callable_is_applied_to_the_batch():
    augment = get_augment(lambda batch: batch + 1)
    batch, mirrored = augment(torch.zeros(2, 3), seeded())
    assert batch.tolist() == [[1] * 3] * 2
    assert mirrored is None


def test_a_callable_must_keep_the_rows():
    with pytest.raises(ValueError, match="augment turned a batch"):
        get_augment(lambda batch: batch[:1])(torch.zeros(2, 3), seeded())
    with pytest.raises(TypeError, match="augment returned a list"):
        get_augment(lambda batch: [batch])(torch.zeros(2, 3), seeded())


def test_no_gradient_reaches_what_an_augmentation_holds():
    weight = torch.ones(4, requires_grad=True)
    augment = get_augment(lambda batch: batch * weight)
    assert not augment(torch.zeros(3, 4), seeded()).batch.requires_grad
