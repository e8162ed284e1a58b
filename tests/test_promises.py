"""The promises of the detector: what it leaves alone, and what its results depend on."""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from contexts import default_dtype
from sklearn.base import clone
from torch import nn

import skood
from skood import SparseEnergyOODDetector
from skood.engine.rows import InMemory
from skood.exceptions import DivergenceError, SkoodWarning
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
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
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


@contextmanager
def strict():
    """Warnings but skood's own are errors, and so is what numpy warns of."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", SkoodWarning)
        yield


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "strict": strict,
}


class MakesTensors(nn.Module):
    """Makes tensors in its forward, without naming dtype and device."""

    def __init__(self):
        super().__init__()
        self.body, self.cell = nn.Linear(64, 16), nn.GRU(16, 16, batch_first=True)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10)

    def forward(self, x):
        hidden = self.norm(self.body(x)) * (1 + torch.arange(16) / 16)
        hidden, _ = self.cell(hidden[:, None], torch.zeros(1, len(x), 16))
        return self.head(self.dropout(hidden[:, -1] + torch.linspace(0, 1, 16)))


def everything_told(detector, digits):
    X, y = digits.X[:200], digits.y[:200]
    detector.fit(X, y)
    return [
        detector.score_samples(X),
        detector.score_samples(X[:1]),
        detector.features(X),
        detector.predict_class_proba(X),
        detector.predict_class(X, reject_label=-1),
        detector.p_values(X),
        detector.score(X),
        list(detector.id_accuracy(X, y).values()),
        detector.calibrate(digits.X_fresh[:50]).offset_,
    ]


def convolutions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
        )


DETECTORS = {
    "built": {"pretrain_epochs": 1},
    "distillation": {"module": MakesTensors(), "distillation_weight": 1.0},
    "odin": {"module": MakesTensors(), "score_function": "odin"},
    "vim": {"module": MakesTensors(), "score_function": "vim", "penalty": "relative_l1"},
    "images": {
        "module": convolutions(),
        "preprocess": lambda batch: (batch / 16).reshape(-1, 1, 8, 8),
        "augment": "flip-crop",
    },
}


@pytest.fixture(scope="module", params=DETECTORS)
def outside(request, digits):
    """A detector, and all that it tells if nothing surrounds it."""
    detector = SparseEnergyOODDetector(max_epochs=1, random_state=0, **DETECTORS[request.param])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector, everything_told(clone(detector), digits)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_of_the_caller_changes_nothing(outside, digits, context):
    detector, expected = outside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with CONTEXTS[context]():
            before = global_state()
            found = everything_told(detector, digits)
            after = global_state()
    for own, other in zip(found, expected, strict=True):
        assert np.array_equal(own, other)
    assert same(before, after)


def test_the_default_dtype_of_a_network_is_that_of_its_fit(digits):
    class Starts(nn.Module):  # a network for users whose default is float64
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRU(64, 8, batch_first=True), nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.cell(x[:, None], torch.zeros(1, len(x), 8))[0][:, -1])

    with default_dtype(torch.float64):
        detector = SparseEnergyOODDetector(Starts(), max_epochs=1, random_state=0)
        quiet_fit(detector, digits.X[:100], digits.y[:100])
        expected = detector.score_samples(digits.X_test)
    assert np.array_equal(detector.score_samples(digits.X_test), expected)


# What a network keeps while it scores


class Remembers(nn.Module):
    """Makes what it needs in the first forward of a size, and keeps it."""

    def __init__(self):
        super().__init__()
        self.body, self.cell = nn.Linear(64, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 10)
        self.state, self.scales = None, {}
        self.register_buffer("shift", None, persistent=False)

    @functools.cache  # noqa: B019
    def table(self, n):
        return torch.linspace(0, 1, 8).expand(n, 8).clone()

    def forward(self, x):
        n = len(x)
        if self.state is None or self.state.shape[1] != n:
            self.state = torch.zeros(1, n, 8)
            self.register_buffer("shift", torch.ones(n, 8), persistent=False)
        scale = self.scales.setdefault(n, torch.full((n, 8), 0.5))
        hidden = self.cell((self.body(x) * scale)[:, None], self.state)[0][:, -1]
        return self.head(hidden * self.table(n) + self.shift)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"pretrain_epochs": 1, "distillation_weight": 1.0}, {"score_function": "odin"}],
)
def test_what_a_network_keeps_in_scoring_can_be_trained_on(digits, parameters):
    detector = SparseEnergyOODDetector(Remembers(), max_epochs=1, random_state=0, **parameters)
    quiet_fit(detector, digits.X[:200], digits.y[:200])
    expected = detector.score_samples(digits.X_test)
    with torch.inference_mode():
        assert np.array_equal(detector.score_samples(digits.X_test), expected)
    detector.module_(torch.ones(3, 64)).sum().backward()
    refitted = SparseEnergyOODDetector(detector.module_, max_epochs=1)
    quiet_fit(refitted, digits.X[:200], digits.y[:200])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_gradients_pass_a_detector_that_was_copied_in_inference_mode(digits, copied):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, score_function="odin")
    quiet_fit(detector, digits.X[:200], digits.y[:200])
    with torch.inference_mode():
        twin = copied(detector)
    assert np.array_equal(
        twin.score_samples(digits.X_test[:9]), detector.score_samples(digits.X_test[:9])
    )
    twin.module_(torch.ones(3, 64)).sum().backward()


# What is interrupted


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast", "float64"])
@pytest.mark.parametrize("parameters", [{"score_function": "react"}, {"precision": "bfloat16"}])
def test_an_interrupted_call_leaves_nothing_behind(digits, monkeypatch, context, parameters):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0, **parameters)
    quiet_fit(detector, digits.X, digits.y)
    expected, kept = detector.score_samples(digits.X_test), pickle.dumps(detector)

    def interrupt(*_):
        raise KeyboardInterrupt

    outside = signal.signal(signal.SIGALRM, interrupt)
    try:
        with CONTEXTS[context]():
            before = global_state()
            for delay in np.random.RandomState(0).uniform(1e-5, 4e-4, size=100):
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    detector.score_samples(digits.X_test[:1])
                    time.sleep(0.01)
                except KeyboardInterrupt:  # caught, so that its frames live on
                    assert same(global_state(), before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outside)
    assert pickle.dumps(detector) == kept
    assert np.array_equal(detector.score_samples(digits.X_test), expected)


@pytest.mark.parametrize("place", ["forward", "preprocess", "score"])
def test_an_interrupt_in_code_of_the_users_leaves_nothing_behind(digits, place):
    class Interrupts:
        now = None

        def __call__(self, found):
            if self.now == place:
                raise KeyboardInterrupt
            return found

    interrupts = Interrupts()

    class Module(nn.Sequential):
        def forward(self, x):
            return interrupts(super().forward(x))

    detector = SparseEnergyOODDetector(
        Module(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)),
        preprocess=lambda batch: interrupts(batch.float()),
        score_function=lambda features, logits: interrupts(logits.amax(dim=1)),
        max_epochs=0,
    )
    quiet_fit(detector, digits.X, digits.y)
    expected, before = detector.score_samples(digits.X_test), global_state()
    interrupts.now = place
    try:
        detector.score_samples(digits.X_test)
    except KeyboardInterrupt:
        assert same(global_state(), before)
    interrupts.now = None
    assert np.array_equal(detector.score_samples(digits.X_test), expected)


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
