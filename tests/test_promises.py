"""The promises of the detector: what it leaves alone, and what its results depend on."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone

import skood
from skood import SparseEnergyOODDetector
from skood.engine.rows import InMemory
from skood.exceptions import DivergenceError
from skood.networks import CifarResNet
from skood.rows import as_rows

PACKAGE = Path(skood.__file__).parent


def quiet_fit(detector, X, y=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


@pytest.fixture(scope="module")
def images():
    """Images of bytes, and a small residual network for them."""
    X = np.random.RandomState(0).randint(256, size=(600, 3, 16, 16)).astype(np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return X, CifarResNet(8)


def as_floats(batch):
    return batch.float() / 255 - 0.5


# The module is never changed


def state_of(module):
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "addresses": [tensor.data_ptr() for tensor in module.state_dict().values()],
        "modes": [part.training for part in module.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in module.parameters()],
        "devices": [p.device for p in module.parameters()],
        "strides": [p.stride() for p in module.parameters()],
        "hooks": [
            (list(part._forward_hooks), list(part._forward_pre_hooks), list(part._backward_hooks))
            for part in module.modules()
        ],
        "attributes": [sorted(vars(part)) for part in module.modules()],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_fit_and_scoring_leave_the_module_as_it_was(digits):
    module = copy.deepcopy(digits.module)
    module[1].eval()  # partly in evaluation mode, partly frozen, hooked
    module[4].train()
    module[0].weight.requires_grad_(False)
    handle = module[2].register_forward_hook(lambda *args: None)
    before = state_of(module)
    detector = SparseEnergyOODDetector(module, max_epochs=2, random_state=0)
    quiet_fit(detector, digits.X, digits.y)
    detector.calibrate(digits.X_fresh).predict(digits.X_test)
    detector.features(digits.X_test)
    after = state_of(module)
    for name in before:
        assert same(before[name], after[name]), name
    assert detector.module_ is not module
    assert not detector.module_.training
    handle.remove()


def test_a_failed_fit_leaves_the_module_as_it_was(digits):
    before = state_of(digits.module)
    detector = SparseEnergyOODDetector(digits.module, learning_rate=1e9, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DivergenceError):
            detector.fit(digits.X, digits.y)
    after = state_of(digits.module)
    assert all(same(before[name], after[name]) for name in before)


def test_two_detectors_on_one_module_never_meet(digits):
    first = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(first, digits.X, digits.y)
    scores = first.score_samples(digits.X_test)
    second = SparseEnergyOODDetector(digits.module, sparsity_weight=0.2, random_state=1)
    quiet_fit(second, digits.X, digits.y)
    assert np.array_equal(first.score_samples(digits.X_test), scores)
    assert not np.array_equal(second.score_samples(digits.X_test), scores)


@pytest.mark.parametrize("given", [True, False])
def test_fit_is_idempotent(digits, given):
    module = digits.module if given else None
    detector = SparseEnergyOODDetector(module, pretrain_epochs=2, max_epochs=2, random_state=3)
    first = quiet_fit(detector, digits.X, digits.y).score_samples(digits.X_test)
    second = quiet_fit(detector, digits.X, digits.y).score_samples(digits.X_test)
    third = quiet_fit(clone(detector), digits.X, digits.y).score_samples(digits.X_test)
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_seeds_matter_and_none_is_fresh_entropy(digits):
    scores = [
        quiet_fit(
            SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=seed),
            digits.X,
            digits.y,
        ).score_samples(digits.X_test)
        for seed in (0, 1, None, None)
    ]
    for i in range(4):
        for j in range(i):
            assert not np.array_equal(scores[i], scores[j])


# No global state is touched


def global_state():
    return {
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flags": (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.mkldnn.enabled,
            torch.get_float32_matmul_precision(),
        ),
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("seed", [0, None])
def test_global_state_is_neither_changed_nor_read(digits, seed):
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = global_state()
        detector.fit(digits.X, digits.y).score(digits.X_test)
        after = global_state()
    for name in before:
        assert same(before[name], after[name]), name


def test_results_do_not_depend_on_the_global_generators(digits):
    scores = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = np.random.get_state()
            np.random.seed(seed)
            try:
                detector = SparseEnergyOODDetector(
                    pretrain_epochs=1, max_epochs=1, random_state=0
                ).fit(digits.X, digits.y)
            finally:
                np.random.set_state(state)
        scores.append(detector.score_samples(digits.X_test))
    assert np.array_equal(*scores)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_mode_of_the_caller_changes_nothing(digits, fitted, context):
    expected = SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=0)
    quiet_fit(expected, digits.X, digits.y)
    detector = clone(expected)
    with context():
        quiet_fit(detector, digits.X, digits.y)
        scores = detector.score_samples(digits.X_test)
    assert np.array_equal(scores, expected.score_samples(digits.X_test))


# A row's score depends on that row alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::skood.exceptions.AnotherScaleWarning")
def test_scores_do_not_depend_on_neighbours_order_or_position(digits, dtype):
    module = copy.deepcopy(digits.module).to(dtype)
    detector = SparseEnergyOODDetector(module, max_epochs=0, random_state=0)
    quiet_fit(detector, digits.X, digits.y)
    X = np.concatenate([digits.X, digits.X_test])  # 1397 rows: several forwards and a remainder
    scores = detector.score_samples(X)
    order = np.random.RandomState(0).permutation(len(X))
    assert np.array_equal(detector.score_samples(X[order]), scores[order])
    for rows in ([0], [5, 5, 5], range(3, 260), range(1200, 1397)):
        assert np.array_equal(detector.score_samples(X[list(rows)]), scores[list(rows)])
    rest = np.where(np.arange(len(X))[:, None] == 7, X, 1e3)
    assert detector.score_samples(rest)[7] == scores[7]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_too_and_one_alone_to_1e_5(images, precision):
    X, module = images
    detector = SparseEnergyOODDetector(
        module, max_epochs=0, preprocess=as_floats, random_state=0, precision=precision
    )
    quiet_fit(detector, X)
    scores = detector.score_samples(X)
    order = np.random.RandomState(0).permutation(len(X))
    assert np.array_equal(detector.score_samples(X[order]), scores[order])
    assert np.array_equal(detector.score_samples(X[100:400]), scores[100:400])
    assert np.array_equal(detector.score_samples(X[:3]), scores[:3])
    if precision == "float32":
        np.testing.assert_allclose(detector.score_samples(X[:1]), scores[:1], rtol=1e-5)


def test_eight_threads_score_like_one(images):
    X, module = images
    detector = SparseEnergyOODDetector(
        module, max_epochs=0, preprocess=as_floats, precision="float32", random_state=0
    )
    quiet_fit(detector, X)
    scores, features = detector.score_samples(X), detector.features(X)
    results = [None] * 8

    def work(i):
        results[i] = (
            detector.score_samples(X[i * 20 :]),
            detector.features(X[i * 20 :]),
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (score, feature) in enumerate(results):
        assert np.array_equal(score, scores[i * 20 :])
        assert np.array_equal(feature, features[i * 20 :])


def test_fits_in_threads_are_correct(digits):
    def detector(seed):
        return SparseEnergyOODDetector(digits.module, max_epochs=1, random_state=seed)

    expected = [
        quiet_fit(detector(i), digits.X, digits.y).score_samples(digits.X_test) for i in range(4)
    ]
    fitted = [detector(i) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=d.fit, args=(digits.X, digits.y)) for d in fitted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, scores in zip(fitted, expected, strict=True):
        assert np.array_equal(got.score_samples(digits.X_test), scores)


# Memory, and a last batch of one row


class Sliced(np.ndarray):
    """An array that notes how many rows are taken from it at a time."""

    taken: list[int]

    def __getitem__(self, index):
        rows = super().__getitem__(index)
        if isinstance(rows, np.ndarray) and rows.ndim == self.ndim:
            Sliced.taken.append(len(rows))
        return rows.view(np.ndarray)


def test_scoring_reads_a_memmap_slice_by_slice(fitted, tmp_path, monkeypatch):
    path = tmp_path / "rows.npy"
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(20_000, 64))
    rows[:] = 0.5
    rows.flush()
    X = np.load(path, mmap_mode="r")
    assert not X.flags.writeable
    watched = X.view(Sliced)
    Sliced.taken = []
    monkeypatch.setattr("skood.detector.rows_like_fit", lambda *_: InMemory(watched))
    assert len(fitted.score_samples(X)) == 20_000
    assert max(Sliced.taken) <= fitted.execution_["scoring_rows"][-1] < 20_000
    tracemalloc.start()
    try:
        as_rows(X)  # validated, and neither copied nor cast
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < X.nbytes / 50


@pytest.mark.parametrize(("n_rows", "batch_size"), [(129, 64), (40, 1000), (66, 13)])
def test_a_last_batch_of_one_row_trains_batch_norm(digits, n_rows, batch_size):
    detector = SparseEnergyOODDetector(
        digits.module, batch_size=batch_size, calibration_size=1, max_epochs=1, random_state=0
    )
    X, y = digits.X[: n_rows + 1], digits.y[: n_rows + 1]
    assert np.isfinite(quiet_fit(detector, X, y).score_samples(digits.X_test)).all()


def test_single_rows_cannot_train_batch_norm_and_the_error_says_so(digits):
    detector = SparseEnergyOODDetector(digits.module, batch_size=1, max_epochs=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"batch_size=1 .* batch-norm"):
            detector.fit(digits.X, digits.y)


# The direction of the imports


def imports_of(path):
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").split(".")[0])
    return found


def test_the_engine_knows_nothing_of_scikit_learn_or_the_estimator():
    for path in (PACKAGE / "engine").glob("*.py"):
        found = imports_of(path)
        assert "sklearn" not in found, path
        above = {"..detector", "..fitting", "..model_selection", "..scores", "..labels", "..rows"}
        assert not found & above, path


def test_metrics_and_calibration_import_no_torch():
    for name in ("metrics.py", "calibration.py", "accuracy.py", "labels.py", "randomness.py"):
        assert "torch" not in imports_of(PACKAGE / name)


def test_import_needs_no_extra():
    extras = ["matplotlib", "torchvision", "pandas", "timm", "polars"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); import skood, skood.metrics"
    subprocess.run([sys.executable, "-c", code], check=True)
