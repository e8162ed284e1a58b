"""What only a GPU can show; left out where there is none."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import graphs
from skood.engine.batches import Batcher
from skood.exceptions import SlowScoringWarning
from skood.networks import CifarResNet, NormalizeImages
from skood.rows import as_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(256, size=(600, 32, 32, 3)).astype(np.uint8)
LABELS = RANDOM.randint(10, size=600)


def fitted(**parameters):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CifarResNet(20)
    settings = {"max_epochs": 1, "augment": "flip", "random_state": 0} | parameters
    detector = SparseEnergyOODDetector(module, preprocess=NormalizeImages(0.5, 0.25), **settings)
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


@pytest.mark.parametrize("where", ["in memory", "on the GPU"])
@pytest.mark.parametrize("kind", ["array", "memory map", "tensor"])
def test_batches_that_travel_ahead_are_those_asked_for(kind, where, tmp_path):
    X = RANDOM.randn(5000, 7).astype(np.float32)
    rows = X
    if kind == "memory map":
        rows = np.memmap(tmp_path / "rows", dtype=np.float32, mode="w+", shape=X.shape)
        rows[:] = X
    elif kind == "tensor":
        rows = torch.from_numpy(X)
    indices = [RANDOM.randint(5000, size=300) for _ in range(50)]
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    rows = as_rows(rows)
    if where == "on the GPU":
        rows = batcher.resident(rows)
    for index, batch in zip(indices, batcher.stream(rows, indices), strict=True):
        # Work that is still under way when the next batch arrives.
        product = batch @ torch.ones(7, 2000, device="cuda")
        np.testing.assert_allclose(product[:, 0].cpu(), X[index].sum(axis=1), rtol=1e-4, atol=1e-4)


def test_rows_that_fit_stay_on_the_gpu():
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    there = batcher.resident(as_rows(IMAGES))
    found = there.read(slice(0, len(IMAGES)))
    assert found.device.type == "cuda"
    assert np.array_equal(found.cpu().numpy(), IMAGES.astype(np.float32))
    assert batcher.resident(there) is there


def test_rows_on_the_gpu_are_gathered_before_they_are_used():
    # The kernel that gathers waits behind long work, and must be waited for.
    rows = as_rows(torch.arange(4000.0)[:, None].expand(4000, 64).contiguous())
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    there = batcher.resident(rows)
    matrix = torch.randn(4000, 4000, device="cuda")
    indices = [RANDOM.randint(4000, size=256) for _ in range(30)]

    def busy():
        for index in indices:
            for _ in range(10):
                matrix @ matrix
            yield index

    for index, batch in zip(indices, batcher.stream(there, busy()), strict=True):
        assert np.array_equal(batch[:, 0].cpu().numpy(), index)


def test_what_is_done_to_a_batch_does_not_reach_rows_on_the_gpu():
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    there = batcher.resident(as_rows(IMAGES))
    for batch in (batcher(there), *batcher.stream(there)):
        batch.zero_()
    assert there.read(slice(0, len(IMAGES))).sum().item() > 0


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
    with pytest.warns(SlowScoringWarning, match="has no memory for a forward of"):
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


class Dropped(nn.Module):
    """A classifier with batch-norm and dropout, of kernels alone but for what `host` does."""

    def __init__(self, host=lambda x: x):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(64, 4)
        self.host = host

    def forward(self, x):
        return self.head(self.host(self.body(x)))


def read_a_value(features):
    return features * float(features.sum() > -1)


def select_by_value(features):
    return features * (features.flatten()[features.flatten() > 0].sum() > -1)


def draw_on_the_host(features):
    return features if random.random() < 0.5 else 1.01 * features


def wait_for_the_gpu(features):
    event = torch.cuda.current_stream().record_event()
    event.synchronize()  # which the mode that notes waits does not see
    return features


def trained(host=None):
    """A detector that was trained for more than fifty steps, the last of each epoch smaller."""
    rows = np.random.RandomState(1).randn(1100, 20).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Dropped() if host is None else Dropped(host)
    detector = SparseEnergyOODDetector(module, max_epochs=8, calibration_size=100, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(rows, (rows[:, 0] > 0) + 2 * (rows[:, 1] > 0))


def test_graphs_train_as_steps_without_them_do(monkeypatch):
    by_graphs = trained()
    monkeypatch.setattr(graphs, "_recorded", lambda network, batch: None)
    step_by_step = trained()
    assert by_graphs.execution_["cuda_graphs"]
    assert not step_by_step.execution_["cuda_graphs"]
    for found, expected in zip(by_graphs.history_, step_by_step.history_, strict=True):
        for name in ("loss", "penalty", "accuracy", "id_energy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3)
    for found, expected in zip(
        by_graphs.module_.buffers(), step_by_step.module_.buffers(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_each_replay_draws_its_own_dropout():
    detector = trained()
    network = detector._network
    network.train(True)
    batch = torch.randn(32, 20, device="cuda")
    forward = graphs._recorded(network, batch)
    first, second = (forward(batch)[0].clone() for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "host",
    [read_a_value, select_by_value, draw_on_the_host, wait_for_the_gpu],
)
def test_what_the_host_does_is_not_recorded(host):
    detector = trained(host)
    assert not detector.execution_["cuda_graphs"]
    assert detector.history_[-1]["loss"] < detector.history_[0]["loss"]
    # And a failure leaves nothing behind that would trouble the next training.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert trained().execution_["cuda_graphs"]


class Renormalised(Dropped):
    def forward(self, x):
        self.head.weight.data = torch.renorm(self.head.weight.data, 2, 0, 0.5)
        return super().forward(x)


def test_weights_that_move_are_not_recorded(monkeypatch):
    monkeypatch.setitem(globals(), "Dropped", Renormalised)
    assert not trained().execution_["cuda_graphs"]


def test_graphs_hold_no_memory_after_fit():
    before = torch.cuda.memory_reserved()
    detector = fitted(max_epochs=12)
    assert detector.execution_["cuda_graphs"]
    assert all(p.grad is None for p in detector.module_.parameters())
    torch.cuda.empty_cache()
    # The workspace of cuBLAS stays; activations of a batch would take five times as much.
    assert torch.cuda.memory_reserved() - before < 2**26


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch goes on as if it were recording")
def test_memory_comes_back_after_a_recording_that_failed():
    trained(wait_for_the_gpu)
    batcher = Batcher(torch.device("cuda"), torch.float32, None)
    rows = as_rows(np.zeros((64 * 100, 2**16), dtype=np.float32))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for batch in batcher.stream(rows, (np.arange(64) + 64 * i for i in range(100))):
        batch.sum()
    assert torch.cuda.max_memory_reserved() - before < 20 * batch.nbytes


def test_distillation_and_outliers_train_by_graphs_too():
    rows = np.random.RandomState(1).randn(1100, 20).astype(np.float32)
    labels = (rows[:, 0] > 0).astype(int)
    labels[:100] = -1
    module = Dropped()
    module.head = nn.Linear(64, 2)
    detector = SparseEnergyOODDetector(
        module,
        max_epochs=8,
        ood_label=-1,
        outlier_weight=0.5,
        distillation_weight=1.0,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(rows, labels)
    assert detector.execution_["cuda_graphs"]
