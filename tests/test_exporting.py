"""A detector as one module or one file says what the detector says."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from modules import trained_mlp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import NotFittedError
from torch import nn

from skood import SparseEnergyOODDetector
from skood.calibration import conformal_p_values
from skood.engine.rows import spaced
from skood.exceptions import ExportError, ThresholdWarning
from skood.exporting import checks, files
from skood.exporting.module import _Judge
from skood.networks import CifarDenseNet, CifarResNet, NormalizeImages, WideResNet
from skood.scores import list_scores

EXPORTABLE = sorted(set(list_scores()) - {"odin"})

X = np.random.RandomState(0).randn(200, 6).astype(np.float32)
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)
FRESH = np.concatenate([np.random.RandomState(1).randn(100, 6), 9 * np.eye(6)]).astype(np.float32)
IMAGES = np.random.RandomState(0).randint(256, size=(60, 3, 8, 8)).astype(np.uint8)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
        )


@pytest.fixture(scope="module")
def made():
    """A function that fits a small network; of each kind once."""
    kept = {}

    def fit(score="energy", module=None, rows=X, **options):
        key = (score if isinstance(score, str) else None) if not options and rows is X else None
        if key is None or module is not None or key not in kept:
            detector = SparseEnergyOODDetector(
                network() if module is None else module,
                score_function=score,
                **({"max_epochs": 0, "random_state": 0, "tpr": 0.9} | options),
            ).fit(rows)
            if key is None or module is not None:
                return detector
            kept[key] = detector
        return copy.deepcopy(kept[key])

    return fit


@pytest.fixture
def read(tmp_path):
    """A function that gives what a file says of rows."""
    return lambda name, rows: files._opened_pt2(tmp_path / name)(torch.from_numpy(rows))


def assert_says_the_same(got, detector, rows, tolerance=1e-5):
    got = {name: np.asarray(values) for name, values in got.items()}
    assert_allclose(got["score"], detector.score_samples(rows), rtol=tolerance, atol=tolerance)
    assert_array_equal(got["decision"], detector.predict(rows))
    assert_allclose(got["p_value"], detector.p_values(rows))
    odds = np.exp(got["logits"].astype(np.float64))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    assert_allclose(probabilities, detector.predict_class_proba(rows), atol=1e-5)
    assert {k: v.dtype.name for k, v in got.items()} == {
        "logits": "float32",
        "score": "float64",
        "decision": "int64",
        "p_value": "float64",
    }


# Modules


@pytest.mark.parametrize("score", EXPORTABLE)
def test_a_module_says_what_the_detector_says(made, score):
    detector = made(score)
    assert_says_the_same(detector.as_module()(torch.from_numpy(FRESH)), detector, FRESH)


@pytest.mark.parametrize(
    "score",
    [
        pytest.param(name, marks=[] if name == "two_views" else pytest.mark.slow)
        for name in EXPORTABLE
    ],
)
def test_a_graph_says_what_the_detector_says(made, score, tmp_path, read):
    detector = made(score)
    detector.export(tmp_path / "detector.pt2")
    for rows in (FRESH, FRESH[:1], FRESH[:2]):
        assert_says_the_same(read("detector.pt2", rows), detector, rows)


@pytest.mark.slow
def test_a_custom_score_of_torch_operations_is_exported(made, tmp_path, read):
    detector = made(lambda features, logits: features.sum(dim=1) + logits.amax(dim=1))
    detector.export(tmp_path / "detector.pt2", X)
    assert_says_the_same(read("detector.pt2", FRESH), detector, FRESH)


@pytest.mark.parametrize(
    ("module", "rows", "options"),
    [
        (None, IMAGES.transpose(0, 2, 3, 1), {"pretrain_epochs": 1}),
        (CifarResNet(8, 3), IMAGES, {"preprocess": NormalizeImages([0.5] * 3, [0.2] * 3)}),
        (CifarResNet(8, 3), IMAGES / np.float32(255), {"preprocess": NormalizeImages(0.5, 0.2)}),
        (CifarResNet(8, 3), IMAGES, {"preprocess": lambda x: x / 255}),
        (CifarDenseNet(10, n_classes=3), IMAGES / np.float32(255), {}),
    ],
    ids=["default network", "bytes normalized", "floats normalized", "function", "densenet"],
)
def test_images_enter_raw(made, module, rows, options):
    if module is None:
        options = options | {"max_epochs": 0, "random_state": 0}
        detector = SparseEnergyOODDetector(score_function="two_views", **options)
        detector.fit(rows, Y[: len(rows)])
    else:
        detector = made("two_views", module, rows, **options)
    raw = torch.from_numpy(rows)
    assert_says_the_same(detector.as_module()(raw), detector, rows, tolerance=1e-3)


@pytest.mark.parametrize(
    "module",
    [
        CifarResNet(8, 3),
        pytest.param(CifarDenseNet(10, n_classes=3), marks=pytest.mark.slow),
        pytest.param(WideResNet(10, 1, n_classes=3), marks=pytest.mark.slow),
    ],
    ids=lambda module: type(module).__name__,
)
def test_graphs_of_images_enter_raw(made, module):
    detector = made("two_views", module, IMAGES, preprocess=NormalizeImages([0.5] * 3, [0.2] * 3))
    raw = torch.from_numpy(IMAGES)
    program = files._program_of(detector.as_module(), raw[:3], checks.Reference(detector, True))
    assert_says_the_same(program.module()(raw), detector, IMAGES, tolerance=1e-3)


def test_columns_far_from_zero_are_centred_inside():
    far = (X[:, :2] + 1e6).astype(np.float64)
    detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=0, random_state=0)
    assert_says_the_same(detector.fit(far).as_module()(torch.from_numpy(far)), detector, far)


def test_a_module_shares_nothing_that_changes(made):
    detector = made("mahalanobis")
    module = detector.as_module()
    rows = torch.from_numpy(FRESH)
    before = {name: values.clone() for name, values in module(rows).items()}
    detector.calibrate(FRESH, tpr=0.5)
    detector.score_function_.means_ += 1
    with torch.no_grad():
        for tensor in detector.module_.parameters():
            tensor.zero_()
    for name, values in module(rows).items():
        assert_array_equal(values, before[name])
    theirs = {id(tensor) for tensor in detector.module_.parameters()}
    assert theirs.isdisjoint(map(id, module.parameters()))


def test_a_doubtful_threshold_is_told():
    detector = SparseEnergyOODDetector(
        network(), max_epochs=0, random_state=0, calibration_size=None
    ).fit(X)
    with pytest.warns(ThresholdWarning, match="placed on the training rows"):
        detector.as_module()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_module_stand_alone(made, copied):
    detector = made("two_views")
    twin = copied(detector.as_module())
    assert_says_the_same(twin(torch.from_numpy(FRESH)), detector, FRESH)


@pytest.mark.parametrize("preprocess", [None, lambda rows: rows / 2])
def test_gradients_reach_the_rows(made, preprocess):
    rows = torch.from_numpy(FRESH).requires_grad_()
    module = made("energy", network(), preprocess=preprocess).as_module()
    module(rows)["score"].sum().backward()
    assert rows.grad.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in module.parameters())
    assert not module.training


def test_threads_do_not_see_the_features_of_others(made):
    module, wrong = made("knn").as_module(), []
    rows = [torch.from_numpy(FRESH[start::4].copy()) for start in range(4)]
    expected = [module(some)["score"] for some in rows]

    def score(number):
        for _ in range(50):
            if not torch.equal(module(rows[number])["score"], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=score, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("tpr", [0.5, 0.9, 0.95])
def test_p_values_are_those_of_the_rule_at_ties_too(n_rows, tpr):
    random = np.random.RandomState(n_rows)
    calibration = random.randint(0, 12, n_rows) / 4
    scores = np.concatenate([np.arange(-4, 16) / 4, random.randn(50), [-np.inf, np.inf]])
    threshold = float(np.sort(calibration)[n_rows // 3])
    judge, winners = (
        _Judge(threshold, calibration, tpr),
        torch.zeros(len(scores), dtype=torch.int64),
    )
    decisions, p_values = judge(torch.from_numpy(scores), winners)
    assert_array_equal(p_values, conformal_p_values(scores, calibration, tpr))
    assert_array_equal(decisions, np.where(scores >= threshold, 1, -1))


@pytest.mark.parametrize("tpr", [0.5, 0.9])
def test_thresholds_of_classes_are_inside(made, tmp_path, read, tpr):
    random = np.random.RandomState(3)
    fresh, rows = random.randn(2, 300, 6).astype(np.float32)
    detector = made("energy", trained_mlp(X, Y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted for too few
        detector.calibrate(fresh, tpr=tpr, per_class=True)
    assert len(np.unique(detector.class_offsets_)) > 1
    said = detector.as_module()(torch.from_numpy(rows))
    assert_array_equal(said["decision"], detector.predict(rows))
    expected = conformal_p_values(
        said["score"],
        detector.calibration_scores_,
        tpr,
        said["logits"].argmax(dim=1),
        detector._calibration_classes,
    )
    assert_array_equal(said["p_value"], expected)
    assert_allclose(expected, detector.p_values(rows), atol=0.02)
    detector.export(tmp_path / "detector.pt2")
    assert_says_the_same(read("detector.pt2", rows), detector, rows)


def test_rows_that_the_detector_refuses_are_rejected(made):
    rows = torch.from_numpy(FRESH[:4].copy())
    rows[1, 2], rows[2, 0] = torch.nan, torch.inf
    got = made().as_module()(rows)
    assert got["score"].isnan().tolist() == [False, True, True, False]
    assert got["decision"][1:3].tolist() == [-1, -1]
    assert (got["p_value"][1:3] <= 0.05).all()


# Files


def test_a_file_carries_what_made_it_and_no_rows_or_folders(made, tmp_path):
    detector = made("two_views")
    report = detector.export(tmp_path / "detector.pt2", X)
    assert report["kept"] > 0
    assert report["rejected"] > 0
    assert report["largest_difference"] < 1e-4
    extra = {files.METADATA: ""}
    program = torch.export.load(tmp_path / "detector.pt2", extra_files=extra)
    about = json.loads(extra[files.METADATA])
    assert about["classes"] == [0, 1, 2]
    assert about["threshold"] == detector.offset_
    assert about["tpr"] == 0.9
    assert about["score"] == "TwoViews()"
    assert about["input_dtype"] == "float32"
    assert about["input_shape"] == ["batch", 6]
    assert about["n_calibration_rows"] == len(detector.calibration_scores_)
    assert not program.example_inputs[0][0].any()
    content = (tmp_path / "detector.pt2").read_bytes()
    for folder in (files.__file__, torch.__file__):
        assert folder.rpartition("/")[0].encode() not in content


@pytest.mark.slow
def test_the_dtype_of_rows_passed_is_that_of_the_graph(made, tmp_path, read):
    detector = made()
    detector.export(tmp_path / "detector.pt2", X.astype(np.float64))
    rows = FRESH.astype(np.float64)
    assert_says_the_same(read("detector.pt2", rows), detector, rows)


def test_without_preprocess_a_graph_takes_what_that_returns(tmp_path):
    paths = np.array([f"row {number}" for number in range(len(X))])

    def load(some):
        return torch.from_numpy(np.stack([X[int(path.split()[1])] for path in some]))

    detector = SparseEnergyOODDetector(
        network(), preprocess=load, max_epochs=0, random_state=0
    ).fit(paths)
    for refused in (detector.as_module, lambda: detector.export(tmp_path / "a.pt2", paths)):
        with pytest.raises(ExportError, match="preprocess=False"):
            refused()
    with pytest.raises(ExportError, match=r"export\(path, X\)"):
        detector.export(tmp_path / "detector.pt2", preprocess=False)
    assert_array_equal(checks.example_batch(detector, paths, preprocess=False), X[spaced(200, 64)])
    got = detector.as_module(preprocess=False)(torch.from_numpy(X))
    assert_array_equal(got["decision"], detector.predict(paths))
    assert_allclose(got["score"], detector.score_samples(paths), rtol=1e-5)


def test_rows_of_a_data_set_are_taken():
    items = [(torch.from_numpy(row), 0) for row in X]
    detector = SparseEnergyOODDetector(network(), max_epochs=0, random_state=0).fit(items)
    batch = checks.example_batch(detector, items, preprocess=True)
    assert_says_the_same(detector.as_module()(batch), detector, batch.numpy())


SCRIPT = """
import json, sys
import numpy as np
sys.modules["torch"] = sys.modules["skood"] = None
import onnxruntime
session = onnxruntime.InferenceSession("detector.onnx")
rows = np.load("rows.npy")
logits, score, decision, p_value = session.run(None, {"rows": rows})
one = session.run(["decision"], {"rows": rows[:1]})[0]
assert one.tolist() == decision[:1].tolist()
assert [x.name for x in session.get_outputs()] == ["logits", "score", "decision", "p_value"]
assert session.get_inputs()[0].shape == ["batch", 6]
assert json.loads(session.get_modelmeta().custom_metadata_map["skood"])["classes"] == [0, 1, 2]
np.savez("said.npz", logits=logits, score=score, decision=decision, p_value=p_value)
"""


def test_onnx_decides_alike_where_there_is_no_torch(made, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    detector = made("two_views")
    detector.export("detector.onnx")
    random = np.random.RandomState(2)
    rows = random.randn(10_000, 6) * random.choice([0.1, 1, 3, 1e3], (10_000, 1))
    rows = rows.astype(np.float32)
    reference = checks.Reference(detector, True)
    clear = reference.sides(*reference.outputs(torch.from_numpy(rows))) != 0
    assert clear.mean() > 0.99
    rows = rows[clear]
    rows[0, 0] = np.nan
    np.save("rows.npy", rows)
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
    said = dict(np.load("said.npz"))
    assert np.isnan(said["score"][0])
    assert said["decision"][0] == -1
    said = {name: values[1:] for name, values in said.items()}
    assert_array_equal(said["decision"], detector.predict(rows[1:]))
    assert_allclose(said["score"], detector.score_samples(rows[1:]), rtol=1e-4, atol=1e-4)
    p_values = conformal_p_values(said["score"], detector.calibration_scores_, detector.tpr_)
    assert_array_equal(said["p_value"], p_values)
    assert b"site-packages" not in (tmp_path / "detector.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("score", EXPORTABLE)
def test_every_score_is_exported_to_onnx(made, score, tmp_path):
    pytest.importorskip("onnxruntime")
    report = made(score).export(tmp_path / "detector.onnx", X)
    assert report["largest_difference"] < 1e-4


# What is refused


def test_a_detector_must_be_fitted():
    for ask in (lambda d: d.as_module(), lambda d: d.export("detector.onnx")):
        with pytest.raises(NotFittedError):
            ask(SparseEnergyOODDetector())


def test_scores_with_a_gradient_are_refused(made):
    with pytest.raises(ExportError, match="gradient"):
        made("odin").as_module()


def test_torchscript_is_refused(made):
    scripted = torch.jit.trace(network(), torch.zeros(2, 6))
    with pytest.raises(ExportError, match="TorchScript"):
        made("energy", scripted, calibration_size=0.5).as_module()


class Numpy(nn.Module):
    """A network that leaves torch on its way."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(torch.from_numpy(np.tanh(x.detach().numpy())))


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("preprocess", {"preprocess": lambda x: torch.from_numpy(np.tanh(x.numpy()))}),
        ("the network", {"module": Numpy()}),
        ("the score", {"score": lambda _, z: torch.from_numpy(np.asarray(z.tolist())).amax(1)}),
    ],
)
def test_the_part_that_cannot_be_traced_is_named(made, part, options, tmp_path):
    detector = made(**({"score": "energy"} | options))
    with pytest.raises(ExportError, match=f"cannot trace {part} "):
        detector.export(tmp_path / "detector.pt2", X)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_says_something_else_is_not_written(made, tmp_path):
    def differs(features, logits):
        shift = 0.1 if torch.compiler.is_compiling() else 0.0
        return logits.logsumexp(dim=1) + shift

    (tmp_path / "detector.pt2").write_bytes(b"before")
    with pytest.raises(ExportError, match=r"a score in it differs by 0\.1 "):
        made(differs).export(tmp_path / "detector.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["detector.pt2"]
    assert (tmp_path / "detector.pt2").read_bytes() == b"before"


@pytest.mark.parametrize("output", ["decision", "p_value", "logits"])
def test_every_output_is_compared(made, output):
    detector = made()
    module, reference = detector.as_module(), checks.Reference(detector, True)

    def run(batch):
        said = {name: values.numpy() for name, values in module(batch).items()}
        return said | {output: -said[output]}

    with pytest.raises(ExportError, match="The file was not written: a "):
        checks.check_outputs(run, torch.from_numpy(FRESH), reference)


def test_rows_are_sought_on_both_sides(made):
    reference = checks.Reference(made(), True)
    rows = torch.from_numpy(FRESH)
    sides = reference.sides(*reference.outputs(rows))
    for side in (1, -1):
        batch = checks.on_both_sides(rows[torch.from_numpy(sides == side)], reference)
        assert {1, -1} <= set(reference.sides(*reference.outputs(batch)))


def test_where_no_row_is_on_the_other_side_some_are_asked_for(made, tmp_path):
    detector = made()
    detector.offset_ = 1e9
    with pytest.raises(ExportError, match=r"clearly kept.*export\(path, X\)"):
        detector.export(tmp_path / "detector.pt2")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("detector.pkl", ValueError),
        ("detector", ValueError),
        ("nowhere/detector.pt2", FileNotFoundError),
        ("folder.pt2", IsADirectoryError),
    ],
)
def test_names_of_no_file_are_refused_first(made, path, error, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error):
        made().export(tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_rows_that_cannot_be_drawn_are_asked_for(made, tmp_path):
    def narrow(rows):
        if not torch.compiler.is_compiling() and (rows.abs() < 3).sum() < rows.numel() / 2:
            raise ValueError("values beyond 3")
        return rows

    wide = X * 4
    detector = made("energy", network(), wide, preprocess=lambda rows: narrow(rows / 4))
    detector._watch.scale = dataclasses.replace(detector._watch.scale, dtype="int32")
    with pytest.raises(ExportError, match=r"values beyond 3.*export\(path, X\)"):
        detector.export(tmp_path / "detector.pt2")
    assert len(checks.on_both_sides(torch.from_numpy(wide), checks.Reference(detector, True)))


def test_a_graph_that_does_not_run_is_refused(made):
    def run(batch):
        raise RuntimeError("no kernel")

    with pytest.raises(ExportError, match="cannot run on 106 rows \\(no kernel"):
        checks.check_outputs(run, torch.from_numpy(FRESH), checks.Reference(made(), True))


@pytest.mark.slow
def test_what_onnx_cannot_do_is_a_file_of_torch(made, tmp_path):
    pytest.importorskip("onnxruntime")
    detector = made(lambda _, logits: torch.special.i0e(logits).amax(dim=1))
    with pytest.raises(ExportError, match=r"i0e.*pt2"):
        detector.export(tmp_path / "detector.onnx", X)
    detector.export(tmp_path / "detector.pt2", X)


@pytest.mark.slow
def test_what_onnxruntime_cannot_run_runs_in_float32(made, tmp_path):
    pytest.importorskip("onnxruntime")
    detector = made("energy", network().bfloat16())
    with pytest.raises(ExportError, match="precision="):
        detector.export(tmp_path / "detector.onnx", X)
    detector.export(tmp_path / "detector.pt2", X)
    again = made("energy", network().bfloat16().float(), precision="float32")
    again.export(tmp_path / "detector.onnx", X)


def test_a_file_that_would_need_another_beside_it_is_refused(made, tmp_path, monkeypatch):
    def write(program, path, about):
        path.write_bytes(b"")
        path.with_suffix(".data").write_bytes(b"")

    monkeypatch.setitem(files.FORMATS, ".onnx", files.Format((), write, None))
    with pytest.raises(ExportError, match=r"A file \"\.pt2\" holds any"):
        made().export(tmp_path / "detector.onnx", X)
    assert not list(tmp_path.iterdir())


def test_rows_of_another_shape_are_named(made):
    for rows in (torch.zeros(3, 5), torch.zeros(6), FRESH):
        with pytest.raises(ValueError, match=r"expected a tensor of shape \(n, 6\)"):
            made().as_module()(rows)


def test_what_onnx_needs_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'skood\[export\]'"):
        made().export(tmp_path / "detector.onnx")
