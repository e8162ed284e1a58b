from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood.engine.batches import Batcher
from skood.engine.watch import ROWS_TO_TELL, Scale, Watch
from skood.exceptions import AnotherScaleWarning, RoundedValuesWarning
from skood.rows import as_rows

FLOAT = torch.float32
RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.rand(40, 1, 6, 6).astype(np.float32)
BYTES = (IMAGES * 255).astype(np.uint8)
NORMALIZED = (IMAGES - 0.5) / 0.3
TABLE = RANDOM.randn(40, 5)
RAW = TABLE * 100 + 1000
NOISE = RANDOM.rand(40, 1, 6, 6).astype(np.float32)


def batcher(preprocess=None, dtype=FLOAT):
    return Batcher(torch.device("cpu"), dtype, preprocess, 0)


def watching(X, own=None, *, exact=True):
    own, rows = own or batcher(), as_rows(X)
    return Watch(Scale.of(own.stream(rows), rows.dtype), exact)


def see(watch, X, own=None):
    """The warnings on seeing rows."""
    own, rows = own or batcher(), as_rows(X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.see(own(rows), rows, own)
    return [w.category for w in caught]


SAME = {
    "the same": (IMAGES, IMAGES[:1]),
    "noise": (IMAGES, NOISE),
    "in float64": (IMAGES, IMAGES.astype(np.float64)),
    "black": (IMAGES, np.zeros((9, 1, 6, 6))),
    "one black": (BYTES, np.zeros((1, 1, 6, 6), np.float32)),
    "constant": (NORMALIZED, np.ones((9, 1, 6, 6))),
    "masks after floats": (IMAGES, IMAGES > 0.5),
    "floats after bytes": (BYTES, BYTES.astype(np.float32)),
    "long integers after bytes": (BYTES, BYTES.astype(np.int64)),
    "noise of both signs": (NORMALIZED, RANDOM.randn(40, 1, 6, 6)),
    "one far": (IMAGES, IMAGES[:1] * 255),
    "one far in a table": (TABLE, TABLE[:1] * 1e6),
    "some far in a table": (TABLE, np.concatenate([TABLE, TABLE[:30] * 1e6])),
    "some far first": (TABLE, np.concatenate([TABLE[:30] * 1e6, TABLE])),
    "5 times as far": (TABLE, TABLE * 5),
    "integers in a table": (TABLE, np.arange(-5, 5).reshape(2, 5)),
    "noise on counts": (abs(TABLE), 3 * RANDOM.randn(40, 5) - 3),
    "one-hot": (np.eye(6), np.ones((9, 6))),
    "heavy tails": (np.exp(3 * TABLE), np.exp(3.5 * TABLE)),
}
OTHER = {
    "0..255": (IMAGES, IMAGES * 255),
    "0..255 in long integers": (IMAGES, BYTES.astype(np.int64)),
    "0..16": (IMAGES, IMAGES * 16),
    "0..1 after 0..255": (IMAGES * 255, IMAGES),
    "0..255 after normalised": (NORMALIZED, IMAGES * 255),
    "0..1 after normalised": (NORMALIZED, IMAGES),
    "normalised after 0..1": (IMAGES, NORMALIZED),
    "-1..1 after 0..1": (IMAGES, 2 * IMAGES - 1),
    "raw table": (TABLE, RAW),
    "standardised table": (RAW, TABLE),
    "flat bytes": (IMAGES.reshape(40, -1), BYTES.reshape(40, -1)),
}
FILES = {
    "bytes": (IMAGES, BYTES, "X / 255"),
    "a single image": (IMAGES, BYTES[:1], "X / 255"),
    "a tensor": (IMAGES, torch.from_numpy(BYTES), "X / 255"),
    "16 bits": (IMAGES, BYTES.astype(np.uint16) * 257, "X / 65535"),
    "16 bits after 8": (BYTES, BYTES.astype(np.uint16) * 257, "as in fit"),
    "floats after bytes": (BYTES, IMAGES, r"X \* 255"),
    "sound": (NORMALIZED[:, 0] / 10, (NORMALIZED[:, 0] * 3000).astype(np.int16), "as in fit"),
    "bytes after normalised": (NORMALIZED, BYTES, "as in fit"),
}


@pytest.mark.parametrize("case", SAME)
def test_rows_on_the_scale_of_fit_and_outliers_pass(case):
    first, then = SAME[case]
    assert see(watching(first), then) == []


@pytest.mark.parametrize("case", OTHER)
def test_rows_on_another_scale_warn_once(case):
    first, then = OTHER[case]
    watch = watching(first)
    assert see(watch, then) == [AnotherScaleWarning]
    assert see(watch, then) == []


@pytest.mark.parametrize("case", FILES)
def test_values_of_files_on_another_scale_are_refused(case):
    first, then, remedy = FILES[case]
    watch = watching(first)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"scale X as in fit.*|{remedy}") as caught:
            see(watch, then)
        assert remedy.replace("\\", "") in str(caught.value)
        assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("first", "then", "remedy"),
    [
        (IMAGES, BYTES, lambda X: X / 255),
        (IMAGES, BYTES.astype(np.uint16) * 257, lambda X: X / 65535),
        (BYTES, IMAGES, lambda X: X * 255),
    ],
)
def test_the_remedy_brings_rows_to_the_scale_of_fit(first, then, remedy):
    assert see(watching(first), remedy(then)) == []


def test_rows_that_come_one_by_one_are_counted():
    watch = watching(IMAGES)
    found = [see(watch, IMAGES[row : row + 1] * 255) for row in range(ROWS_TO_TELL)]
    assert found == [[]] * (ROWS_TO_TELL - 1) + [[AnotherScaleWarning]]


def test_a_row_of_the_scale_of_fit_starts_the_count_anew():
    watch = watching(IMAGES)
    for row in range(3 * ROWS_TO_TELL):
        factor = 1 if row % ROWS_TO_TELL == 0 else 255
        assert see(watch, IMAGES[row : row + 1] * factor) == []


def test_what_preprocess_gives_is_compared():
    def scaled(X):
        return X / 255 if X.dtype == torch.uint8 else X

    own = batcher(scaled)
    watch = watching(IMAGES, own)
    assert see(watch, BYTES, own) == []
    assert see(watch, IMAGES * 255, own) == [AnotherScaleWarning]


def test_integers_that_a_network_looks_up_have_no_scale():
    own = batcher(torch.Tensor.long)
    ids = RANDOM.randint(50, size=(40, 3))
    watch = watching(ids, own)
    assert watch.scale is None
    assert see(watch, ids * 10_000, own) == []


def test_nothing_is_compared_with_zeros():
    assert watching(np.zeros((4, 3))).scale is None


def test_integers_that_are_rounded_warn_once():
    ids = RANDOM.randint(2**25, 2**26, size=(9, 3))
    watch = watching(ids)
    assert see(watch, ids) == [RoundedValuesWarning]
    assert see(watch, ids.astype(np.float64)) == []
    assert see(watching(ids), ids.astype(np.float64)) == [RoundedValuesWarning]
    assert see(watching(ids, exact=False), ids) == []
    assert see(Watch(watching(ids).scale, exact=True, warned=True), ids) == []


def test_a_copy_in_another_process_warns_anew_and_bytes_do_not_change():
    watch = watching(IMAGES)
    before = pickle.dumps(watch)
    assert see(watch, IMAGES * 255) == [AnotherScaleWarning]
    assert pickle.dumps(watch) == before
    assert see(pickle.loads(before), IMAGES * 255) == [AnotherScaleWarning]


def test_a_network_of_16_bits_has_a_scale():
    own = batcher(dtype=torch.bfloat16)
    watch = watching(IMAGES, own)
    assert see(watch, IMAGES, own) == []
    assert see(watch, IMAGES * 255, own) == [AnotherScaleWarning]


# In a detector


@pytest.fixture(scope="module")
def detector():
    from skood import SparseEnergyOODDetector

    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparseEnergyOODDetector(module, max_epochs=0, random_state=0).fit(IMAGES)


@pytest.mark.parametrize(
    "method",
    [
        "score_samples",
        "decision_function",
        "predict",
        "p_values",
        "predict_class",
        "predict_class_proba",
        "features",
        "calibrate",
    ],
)
def test_every_method_compares(detector, method):
    with pytest.raises(ValueError, match="dtype uint8, gives the network values"):
        getattr(detector, method)(BYTES)
    with pytest.warns(AnotherScaleWarning):
        getattr(pickle.loads(pickle.dumps(detector)), method)(255 * np.repeat(IMAGES, 2, axis=0))
