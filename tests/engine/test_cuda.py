"""What only a GPU can show; left out where there is none."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine.batches import Batcher
from skood.networks import CifarResNet, NormalizeImages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(256, size=(600, 32, 32, 3)).astype(np.uint8)
LABELS = RANDOM.randint(10, size=600)


def fitted(**parameters):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CifarResNet(20)
    detector = SparseEnergyOODDetector(
        module,
        max_epochs=1,
        preprocess=NormalizeImages(0.5, 0.25),
        augment="flip",
        random_state=0,
        **parameters,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(IMAGES, LABELS)


def test_auto_takes_the_gpu_and_agrees_with_the_cpu():
    found, expected = fitted(precision="float32"), fitted(precision="float32", device="cpu")
    assert found.device_.type == "cuda"
    np.testing.assert_allclose(
        found.score_samples(IMAGES), expected.score_samples(IMAGES), rtol=0.05, atol=0.05
    )


def test_a_detector_of_a_gpu_pickles_and_clones():
    detector = fitted()
    twin = pickle.loads(pickle.dumps(detector))
    assert np.array_equal(twin.score_samples(IMAGES), detector.score_samples(IMAGES))


def test_training_is_in_bfloat16_and_scoring_in_float32():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bfloat16 is not native")
    assert fitted().precision_ == {"training": "bfloat16", "scoring": "float32"}


@pytest.mark.parametrize("kind", ["array", "memory map", "tensor"])
def test_batches_that_travel_ahead_are_those_asked_for(kind, tmp_path):
    X = RANDOM.randn(5000, 7).astype(np.float32)
    rows = X
    if kind == "memory map":
        rows = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=X.shape)
        rows[:] = X
    elif kind == "tensor":
        rows = torch.from_numpy(X)
    indices = [RANDOM.randint(5000, size=300) for _ in range(50)]
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    for index, batch in zip(indices, batcher.stream(rows, indices, 15_000), strict=True):
        # Work that is still under way when the next batch arrives.
        product = batch @ torch.ones(7, 2000, device="cuda")
        np.testing.assert_allclose(product[:, 0].cpu(), X[index].sum(axis=1), rtol=1e-4, atol=1e-4)


def test_rows_that_fit_stay_on_the_gpu():
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    there = batcher.resident(IMAGES)
    assert there.device.type == "cuda"
    assert np.array_equal(there.cpu().numpy(), IMAGES.astype(np.float32))
    assert batcher.resident(there) is there


def test_few_rows_and_many_agree():
    detector = fitted(precision="float32")
    whole = detector.score_samples(IMAGES)
    for n_rows in (1, 2, 17, 100):
        np.testing.assert_allclose(
            detector.score_samples(IMAGES[:n_rows]), whole[:n_rows], rtol=1e-4
        )


def test_scoring_goes_on_in_smaller_batches_where_memory_runs_out():
    detector = fitted()
    whole = detector.score_samples(IMAGES)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")
    many = np.concatenate([IMAGES] * 20)
    with pytest.warns(UserWarning, match="has no memory for a forward of"):
        scores = detector.score_samples(many)
    del ballast
    np.testing.assert_allclose(scores[:600], whole, rtol=1e-3)


def test_compiled_forwards_agree_with_others():
    plain, compiled = fitted(precision="float32"), fitted(precision="float32", compile=True)
    np.testing.assert_allclose(
        compiled.score_samples(IMAGES), plain.score_samples(IMAGES), rtol=0.05, atol=0.05
    )
    twin = copy.deepcopy(compiled)
    assert isinstance(twin.module_, nn.Module)
