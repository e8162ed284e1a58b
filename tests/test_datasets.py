"""Photographs in folders: what is found, what it is like, and what cannot be read."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from skood import SparseEnergyOODDetector
from skood.datasets import LoadImages, find_images
from skood.exceptions import UnreadableImagesError, UnreadableImagesWarning

TRANSFORM = v2.Compose(
    [
        v2.Resize(8),
        v2.CenterCrop(8),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.25] * 3),
    ]
)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0)


NAMES = ["cat/1.png", "cat/2.JPG", "cat/old/3.bmp", "dog/1.jpeg", "dog/2.png", "dog/3.webp"]


@pytest.fixture
def folder(tmp_path):
    """Two classes of noise in several formats and modes, and what is no image."""
    random = np.random.RandomState(0)
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (12, 10) if name == "dog/2.png" else (12, 10, 3)  # one is grey
        Image.fromarray(random.randint(256, size=shape, dtype=np.uint8)).save(path)
    for name in ["cat/notes.txt", "cat/._1.png", ".checkpoints/1.png"]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image")
    (tmp_path / "photos" / "cat" / "like.png").mkdir()
    return tmp_path / "photos"


def damage(folder):
    """Three files that cannot be read, each for a reason of its own."""
    (folder / "dog" / "2.png").write_bytes((folder / "dog" / "2.png").read_bytes()[:60])
    (folder / "cat" / "2.JPG").write_text("not an image")
    (folder / "cat" / "0.png").touch()
    return [str(folder / name) for name in ("cat/0.png", "cat/2.JPG", "dog/2.png")]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_images_are_found_with_the_folder_as_their_class(folder, kind):
    files = find_images(kind(folder))
    assert files.paths.tolist() == [str(folder / name) for name in NAMES]
    assert files.labels.tolist() == ["cat"] * 3 + ["dog"] * 3
    assert files.unreadable == {}


def test_classes_are_in_the_order_of_torchvision(folder):
    (folder / ".checkpoints" / "1.png").unlink()
    (folder / ".checkpoints").rmdir()
    (folder / "cat" / "._1.png").unlink()
    known = ImageFolder(folder)
    files = find_images(folder)
    assert np.unique(files.labels).tolist() == known.classes
    assert files.paths.tolist() == [path for path, _ in known.samples]


def test_mean_and_standard_deviation_are_those_of_the_pixels(folder):
    files = find_images(folder)
    pixels = [np.array(Image.open(path).convert("RGB")) / 255 for path in files.paths]
    flat = np.concatenate([image.reshape(-1, 3) for image in pixels])  # of one size
    np.testing.assert_allclose(files.mean, flat.mean(axis=0))
    np.testing.assert_allclose(files.std, flat.std(axis=0))


def test_a_large_image_counts_as_much_as_a_small_one(tmp_path):
    Image.new("RGB", (2, 2), (0, 0, 255)).save(tmp_path / "small.png")
    Image.new("RGB", (90, 90), (0, 255, 255)).save(tmp_path / "large.png")
    files = find_images(tmp_path)
    assert files.mean.tolist() == [0, 0.5, 1]
    assert files.std.tolist() == [0, 0.5, 0]


def test_images_that_lie_in_no_folders_have_no_labels(folder):
    files = find_images(folder / "dog")
    assert len(files.paths) == 3
    assert files.labels is None


def test_what_cannot_be_read_is_named_all_at_once(folder):
    damaged = damage(folder)
    with pytest.raises(UnreadableImagesError, match=r"^3 of 7 images in folder=") as caught:
        find_images(folder)
    assert [line.split(": ")[0].strip() for line in str(caught.value).split("\n")[1:]] == damaged


def test_what_cannot_be_read_is_left_out_on_request(folder):
    damaged = damage(folder)
    with pytest.warns(UnreadableImagesWarning, match="^3 of 7 images") as caught:
        files = find_images(folder, on_error="skip")
    (warning,) = caught
    assert warning.filename == __file__
    for path in damaged:
        assert path in str(warning.message)
    assert list(files.unreadable) == damaged
    assert len(files.paths) == len(files.labels) == 4
    assert not set(files.paths) & set(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_images(folder / "cat" / "old", on_error="skip").paths) == 1


def test_each_folder_is_read_once_whatever_links_to_it(folder):
    apart = folder.parent / "more birds"
    (folder / "dog" / "old").mkdir()
    (folder / "cat" / "old" / "3.bmp").rename(folder / "dog" / "old" / "3.bmp")
    apart.mkdir()
    (folder / "dog" / "1.jpeg").rename(apart / "1.jpeg")
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "all dogs").symlink_to(folder / "dog")
    (folder / "bird").symlink_to(apart)
    (apart / "loop").symlink_to(apart)
    files = find_images(folder)
    assert [path.removeprefix(f"{folder}/") for path in files.paths] == [
        *("bird/1.jpeg", "cat/1.png", "cat/2.JPG"),
        *("dog/2.png", "dog/3.webp", "dog/old/3.bmp"),
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_pixels_are_refused(folder, dtype):
    path = folder / "cat" / "deep.tif"
    Image.fromarray(np.linspace(0, 60_000, 80, dtype=dtype).reshape(8, 10)).save(path)
    with pytest.raises(
        UnreadableImagesError, match=r"deep\.tif: its pixels are of more than 8 bit"
    ):
        find_images(folder)


def test_of_nothing_but_damaged_files_nothing_can_be_skipped(folder):
    for path in (folder / "dog").iterdir():
        path.write_text("damaged")
    with pytest.raises(UnreadableImagesError, match=r"3 of 3 .* Repair or remove them:"):
        find_images(folder / "dog", on_error="skip")


def test_lines_of_a_message_stay_short_whatever_the_names(tmp_path):
    folder = tmp_path / ("a" * 200) / ("b" * 200)
    folder.mkdir(parents=True)
    (folder / f"{'c' * 200}.png").touch()
    with pytest.raises(UnreadableImagesError) as caught:
        find_images(folder)
    assert max(map(len, str(caught.value).splitlines())) <= 400


def test_images_are_loaded_as_the_transform_gives_them(folder):
    paths = find_images(folder).paths
    batch = LoadImages(TRANSFORM)(paths)
    assert batch.shape == (6, 3, 8, 8)
    known = ImageFolder(folder.parent, transform=TRANSFORM, allow_empty=True).loader
    for image, path in zip(batch, paths, strict=True):
        assert torch.equal(image, TRANSFORM(known(path)))


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))]
)
def test_photographs_are_turned_upright(tmp_path, orientation, corner):
    """The corner is where a viewer shows the white pixel that the file holds first."""
    image = Image.new("RGB", (5, 3))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "1.png", exif=exif)
    (loaded,) = LoadImages(as_tensor)([tmp_path / "1.png"])
    assert loaded.shape == ((3, 3, 5) if orientation in (1, 3) else (3, 5, 3))
    assert loaded[(0, *corner)] == 255
    assert loaded.sum() == 3 * 255


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (Image.new("RGBA", (1, 1), (40, 40, 40, 0)), {}),
        (Image.new("LA", (1, 1), (40, 0)), {}),
        (Image.new("P", (1, 1)), {"transparency": 0}),
        (Image.new("L", (1, 1), 40), {"transparency": 40}),
        (Image.new("RGB", (1, 1), (40, 40, 40)), {"transparency": (40, 40, 40)}),
    ],
)
def test_transparent_pixels_are_white(tmp_path, pixels, options):
    pixels.save(tmp_path / "1.png", **options)
    assert LoadImages(as_tensor)([tmp_path / "1.png"]).tolist() == [[[[255]]] * 3]
    assert find_images(tmp_path).mean.tolist() == [1, 1, 1]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 255, 51)).save(tmp_path / "1.png")
    np.testing.assert_allclose(find_images(tmp_path).mean, [0.8, 0.8, 1])


def test_a_batch_names_what_it_cannot_read(folder):
    paths = find_images(folder).paths
    damaged = damage(folder)
    with pytest.raises(UnreadableImagesError, match="3 of 7 paths") as caught:
        LoadImages(TRANSFORM)([*paths, damaged[0]])
    assert "dog/2.png" in str(caught.value)
    with pytest.raises(UnreadableImagesError, match="No such file"):
        LoadImages(TRANSFORM)(["missing.png"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a network that is not trained
def test_a_detector_takes_photographs_by_their_paths(folder):
    files = find_images(folder)
    load = LoadImages(TRANSFORM)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    detector = SparseEnergyOODDetector(module, max_epochs=0, preprocess=load, random_state=0)
    in_memory = clone(detector).set_params(preprocess=None)
    detector.fit(files.paths, files.labels)
    images = load(files.paths).numpy()
    expected = in_memory.fit(images, files.labels).score_samples(images)
    np.testing.assert_array_equal(detector.score_samples(files.paths.tolist()), expected)
    assert detector.classes_.tolist() == ["cat", "dog"]


def test_without_pillow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'skood\[vision\]'"):
        find_images(folder)
