"""Detectors in files without code: what comes back, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import saved_files
import torch
from modules import mlp
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from skood import RejectingClassifier, SparseEnergyOODDetector, storage
from skood.exceptions import (
    AnotherScaleWarning,
    DeviceWarning,
    SavedFileError,
    SavedFileWarning,
    ThresholdWarning,
)
from skood.networks import (
    CifarDenseNet,
    CifarResNet,
    NormalizeImages,
    WideResNet,
    default_network,
)
from skood.penalties import Relative, l1_over_l2
from skood.scores import Gen, Knn, TwoViews, list_scores

load = SparseEnergyOODDetector.load

N = 90
RANDOM = np.random.RandomState(0)
X = RANDOM.randn(N, 6)
Y = np.argmax(X[:, :4], axis=1)
IMAGES = RANDOM.randint(256, size=(N, 3, 8, 8)).astype(np.uint8)


def seeded(make, *arguments, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments, **options)


def fitted(module=None, X=X, y=Y, **parameters):
    settings = {"max_epochs": 1, "pretrain_epochs": 0 if module else 1, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparseEnergyOODDetector(module, **settings | parameters).fit(X, y)


@functools.cache
def fitted_once():
    return fitted()


def usual():
    """A detector with the network that fit builds."""
    return copy.deepcopy(fitted_once())


def refitted(detector, X=X, y=Y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "detector.safetensors"


@pytest.fixture
def again(path):
    """A function that saves a detector and loads it."""

    def travel(detector, **given):
        detector.save(path)
        return load(path, **given)

    return travel


def assert_same(loaded, detector, X=X):
    """All that a detector answers is the same to the last bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        for method in ("score_samples", "predict", "p_values", "predict_class_proba"):
            for n_rows in (1, 3, len(X)):
                rows = X[:n_rows]
                one, other = getattr(loaded, method)(rows), getattr(detector, method)(rows)
                assert one.dtype == other.dtype
                assert np.array_equal(one, other), method
        one, other = (d.predict_class(X, reject_label=None) for d in (loaded, detector))
    assert one.dtype == other.dtype
    assert np.array_equal(one, other)
    assert vars(loaded).keys() == vars(detector).keys()
    for name in ("precision_", "execution_", "id_accuracy_", "head_", "offset_"):
        assert getattr(loaded, name) == getattr(detector, name), name
    histories = [[r | {"seconds": 0} for r in d.history_] for d in (loaded, detector)]
    assert histories[0] == histories[1]


# What comes back by itself


@pytest.mark.parametrize("score", list_scores())
def test_every_score_comes_back(again, score):
    detector = fitted(score_function=score, X=np.tile(X, (2, 1)), y=np.tile(Y, 2))
    assert_same(again(detector), detector)


def test_scores_in_scores_come_back(again):
    score = TwoViews(Gen(gamma=0.2), TwoViews("msp", Knn(5)))
    detector = fitted(score_function=score)
    loaded = again(detector)
    assert_same(loaded, detector)
    assert repr(loaded.score_function) == repr(score)
    assert torch.equal(
        loaded.score_function_.of_features_.of_features_.bank_,
        detector.score_function_.of_features_.of_features_.bank_,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: CifarResNet(8, n_classes=4),
        lambda: WideResNet(10, 1, n_classes=4),
        lambda: CifarDenseNet(10, growth=4, n_classes=4),
        lambda: default_network((3, 8, 8), 4),
    ],
    ids=["CifarResNet", "WideResNet", "CifarDenseNet", "default"],
)
def test_the_networks_of_skood_come_back(again, make):
    X, y = IMAGES[:20], Y[:20]
    detector = fitted(seeded(make), X, y, preprocess=NormalizeImages([0.4, 0.5, 0.6]))
    loaded = again(detector)
    assert_same(loaded, detector, X)
    assert loaded.execution_["layout"] == "channels_last"
    assert type(loaded.module_) is type(detector.module)
    assert loaded.id_accuracy(X, y) == detector.id_accuracy(X, y)


@pytest.mark.parametrize(
    "rows",
    [X, X + 1e6, IMAGES[:, 0] / 255, IMAGES / 255, IMAGES.transpose(0, 2, 3, 1) / 255],
    ids=["table", "far from 0", "grey", "channels first", "channels last"],
)
def test_the_network_that_fit_builds_comes_back(again, rows):
    detector = fitted(X=rows)
    loaded = again(detector)
    assert_same(loaded, detector, rows)
    assert loaded.id_accuracy(rows, Y) == detector.id_accuracy(rows, Y)


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["ant", "bee", "cow", "a very long name"])[Y],
        np.array(["ant", "bee", "cow", "dog"], dtype=object)[Y],
        Y > 1,
        Y.astype(np.uint8),
        Y.astype(float),
    ],
    ids=["str", "object", "bool", "uint8", "float"],
)
def test_labels_come_back(again, labels):
    detector = fitted(y=labels)
    loaded = again(detector)
    assert_same(loaded, detector)
    assert loaded.classes_.dtype == detector.classes_.dtype


@pytest.mark.parametrize("names", [list("abcdef"), range(6)], ids=["text", "numbers"])
def test_frames_come_back(again, names):
    frame = pd.DataFrame(X, columns=names)
    detector = fitted(X=frame)
    loaded = again(detector)
    assert_same(loaded, detector, frame)
    with pytest.raises(ValueError, match="order"):
        loaded.predict(frame[frame.columns[::-1]])


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, "auto"),
        (torch.float16, "auto"),
        (torch.float64, "auto"),
        (torch.float32, "bfloat16"),
    ],
)
def test_number_formats_come_back(again, dtype, precision):
    detector = fitted(seeded(mlp, dtype=dtype), precision=precision)
    loaded = again(detector, module=mlp())
    assert_same(loaded, detector)
    assert {p.dtype for p in loaded.module.parameters()} == {dtype}


def test_parameters_come_back(again):
    parameters = {
        "ood_label": np.int64(3),
        "outlier_weight": 0.5,
        "penalty": Relative(l1_over_l2),
        "tpr": np.float32(0.9),
        "random_state": np.random.RandomState(3),
        "device": torch.device("cpu"),
    }
    detector = fitted(**parameters, memory=None)
    loaded = again(detector)
    for name, value in detector.get_params(deep=False).items():
        if name != "random_state":
            assert getattr(loaded, name) == value
            assert type(getattr(loaded, name)) is type(value)
    assert loaded.random_state.randint(1000) == detector.random_state.randint(1000)
    assert_same(loaded, detector)


def test_the_folder_of_memory_is_not_kept(again, tmp_path):
    assert again(fitted(memory=tmp_path / "kept")).memory is None


def test_attributes_that_come_later_are_kept_by_what_they_are(again):
    detector = usual()
    detector.path_ = [{"weight": 0.5, "name": "auto", "none": None, "more": {"a": (1, [2.5])}}]
    detector.sparsity_weight_ = None
    detector.numbers_ = {1: np.float32(0.1), "inf": np.inf, (2, "b"): np.arange(3, dtype=np.uint16)}
    detector.tensor_ = torch.ones(2, 3).T
    channels_last = torch.ones(4, 1, 3, 3).to(memory_format=torch.channels_last)
    detector.images_ = channels_last
    loaded = again(detector)
    assert loaded.path_ == detector.path_
    assert loaded.sparsity_weight_ is None
    assert loaded.numbers_.keys() == detector.numbers_.keys()
    assert loaded.numbers_["inf"] == np.inf
    assert loaded.numbers_[1] == np.float32(0.1)
    assert loaded.numbers_[2, "b"].dtype == np.uint16
    assert loaded.tensor_.stride() == (1, 3)
    assert loaded.images_.stride() == channels_last.stride()


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), np.array(["2026-01-01"], dtype="M8[D]"), print, b"bytes", 1j, Path("a")],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_kept_is_named(path, value):
    detector = usual()
    detector.strange_ = {"inside": [value]}
    with pytest.raises(SavedFileError, match=r"strange_\.inside\.0 is") as caught:
        detector.save(path)
    assert len(str(caught.value)) < 400
    assert not list(path.parent.iterdir())


# What is passed


class Own(nn.Module):
    """A network of the user's, with values that are neither parameters nor in its state_dict."""

    def __init__(self, factor=1.0, shift=1.0, activation=torch.relu):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.factor, self.activation = factor, activation
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.body.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.activation(self.norm(self.body(x * self.factor + self.shift))))


def doubled(x):
    return x.float() * 2


def margin(features, logits):
    largest = logits.topk(2, dim=1).values
    return largest[:, 0] - largest[:, 1]


class Centre(BaseEstimator):
    """A score with statistics."""

    def __init__(self, power=1.0):
        self.power = power

    def fit(self, outputs, head):
        features = torch.cat([each.features for each in outputs])
        self.centre_ = features.mean(dim=0)
        return self

    def __call__(self, features, logits):
        return -(torch.linalg.vector_norm(features - self.centre_, dim=1) ** self.power)


def test_a_module_that_is_passed_gets_all_that_was_kept(again):
    detector = fitted(seeded(Own, factor=1.5, shift=2.0))
    module = Own().requires_grad_(True)
    before = copy.deepcopy(module.state_dict())
    loaded = again(detector, module=module)
    assert_same(loaded, detector)
    assert loaded.id_accuracy(X, Y) == detector.id_accuracy(X, Y)
    assert loaded.module.factor == 1.5
    assert not loaded.module.body.weight.requires_grad
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def without_values():
    with torch.device("meta"):
        return mlp(dtype=torch.float32)


def tied():
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    module[2].weight = module[0].weight
    return module


@pytest.mark.parametrize(
    ("make", "given", "options"),
    [
        (mlp, lambda: nn.DataParallel(mlp()), {}),
        (lambda: mlp(dtype=torch.float32), without_values, {}),
        (tied, tied, {}),
        (
            lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)),
            lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)),
            {},
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 4)),
            lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 4)),
            {},
        ),
        (
            lambda: torch.jit.script(mlp(dtype=torch.float32).eval()),
            lambda: torch.jit.script(mlp(dtype=torch.float32).eval()),
            {"max_epochs": 0},
        ),
    ],
    ids=["wrapped", "on meta", "tied", "parametrized", "lazy", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_all_kinds_may_be_passed(again, make, given, options):
    detector = fitted(seeded(make), **options)
    loaded = again(detector, module=given())
    assert_same(loaded, detector)
    if not options:
        assert_same(refitted(clone(loaded)), detector)


@pytest.mark.parametrize(
    "score",
    [margin, Centre(0.5), TwoViews(margin, Centre()), TwoViews("energy", Centre())],
    ids=["function", "object", "both views", "one view"],
)
def test_preprocess_and_scores_of_the_users_are_passed(again, score):
    detector = fitted(seeded(mlp, dtype=torch.float32), preprocess=doubled, score_function=score)
    given = {"preprocess": doubled, "score_function": copy.deepcopy(score)}
    loaded = again(detector, module=mlp(dtype=torch.float32), **given)
    assert_same(loaded, detector)
    assert loaded.preprocess is doubled
    assert repr(loaded.score_function) == repr(score)


def test_what_only_training_needs_is_asked_for_before_it(again):
    detector = fitted(penalty=lambda h: h.abs().sum(dim=1), augment=lambda batch: batch)
    loaded = pickle.loads(pickle.dumps(again(again(detector))))
    assert_same(loaded, detector)
    for name in ("augment", "penalty"):
        with pytest.raises(SavedFileError, match=rf"set_params\({name}={name}\)"):
            clone(loaded).fit(X, Y)
        loaded.set_params(**{name: getattr(detector, name)})
    assert_same(refitted(loaded), detector)


def test_all_that_is_missing_is_named(path):
    fitted(Own(), preprocess=doubled, score_function=margin).save(path)
    with pytest.raises(SavedFileError) as caught:
        load(path)
    for words in ("module= ('a Own')", "preprocess= ('doubled')", "score_function= ('margin')"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: nn.Sequential(*mlp()[:4], nn.Linear(9, 4)), r"4\.weight \(4, 9\) instead of"),
        (lambda: mlp(bias=False), r"it lacks: 4\.bias"),
        (lambda: nn.Sequential(*mlp(), nn.Linear(4, 4)), r"it has more: 5\.weight, 5\.bias"),
        (lambda: mlp, "no nn.Module"),
        (lambda: nn.Linear, "no nn.Module"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_by_name(path, module, words):
    fitted(mlp()).save(path)
    with pytest.raises(SavedFileError, match=words):
        load(path, module=module())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preprocess": doubled}, "it takes no preprocess="),
        ({"score_function": margin}, "it takes no score_function="),
        ({"module": CifarResNet(8)}, "the module does not fit"),
    ],
)
def test_what_has_no_use_is_refused(path, given, words):
    usual().save(path)
    with pytest.raises(SavedFileError, match=words):
        load(path, **given)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("module", lambda: Own(activation=torch.tanh)),
        ("preprocess", lambda: lambda x: x.float() * 3),
        ("score_function", lambda: lambda features, logits: -margin(features, logits)),
    ],
)
def test_other_code_of_the_same_form_is_told(path, name, other):
    right = {"module": Own(), "preprocess": doubled, "score_function": margin}
    fitted(**right).save(path)
    with pytest.warns(SavedFileWarning, match=f"{name}= does not do what fit had"):
        load(path, **right | {name: other()})


class Listing(Own):
    """Keeps in a list what it has seen in training."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
        return super().forward(x)


def test_what_training_has_changed_and_no_file_keeps_is_told(path):
    with pytest.warns(SavedFileWarning, match="in more than its tensors and numbers"):
        fitted(Listing()).save(path)


def test_only_files_are_replaced_and_they_keep_their_mode(path):
    detector = fitted()
    with pytest.raises(IsADirectoryError, match="is a folder; pass the name of a file"):
        detector.save(path.parent)
    with pytest.raises(FileNotFoundError, match="is not there: make it first"):
        detector.save(path.parent / "none" / "detector")
    pipe = path.parent / "pipe"
    os.mkfifo(pipe)
    for write in (detector.save, detector.export):
        target = pipe if write == detector.save else pipe.with_suffix(".pt2")
        if target != pipe:
            os.mkfifo(target)
        with pytest.raises(FileExistsError, match="is a device or a pipe"):
            write(target)
        assert target.is_fifo()
    detector.save(path)
    path.chmod(0o600)
    link = path.parent / "latest"
    link.symlink_to(path.name)
    before = path.read_bytes()
    fitted(random_state=1).save(link)
    assert link.is_symlink()
    assert path.read_bytes() != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


class Recurrent(nn.Module):
    """Has layers of torch that list their parameters."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.inner, self.head = kind(2, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.inner(x.unflatten(1, (3, 2)))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_lists_of_parameters_are_no_change(path, kind):
    detector = fitted(Recurrent(kind).float(), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SavedFileWarning)
        detector.save(path)
    assert_same(load(path, module=Recurrent(kind).float()), detector)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_networks_are_refused(path):
    module = mlp(dtype=torch.float32).eval()
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    with pytest.raises(SavedFileError, match="as quantized layers do"):
        fitted(quantized, max_epochs=0).save(path)


def test_a_network_of_skood_with_another_layer_is_one_of_the_users(again, path):
    module = seeded(default_network, (6,), 4)
    module[1].body[2] = nn.GELU()
    detector = fitted(module)
    detector.save(path)
    with pytest.raises(SavedFileError, match="module="):
        load(path)
    assert_same(load(path, module=copy.deepcopy(module)), detector)


# What a loaded detector does


def test_a_loaded_detector_is_one_like_any(again, path):
    detector = usual()
    loaded = again(detector)
    assert_same(pickle.loads(pickle.dumps(loaded)), detector)
    assert_same(again(loaded), detector)
    assert_same(refitted(clone(loaded)), detector)
    assert_same(loaded.fit(X, Y), detector)
    fresh = np.random.RandomState(1).randn(60, 6)
    assert_same(
        again(detector).calibrate(fresh, tpr=0.8), copy.copy(detector).calibrate(fresh, 0.8)
    )
    classifier = RejectingClassifier(FrozenEstimator(loaded), reject_label=9).fit(X, Y)
    assert np.array_equal(classifier.predict(X), detector.predict_class(X, reject_label=9))


def test_doubts_and_the_watch_come_back(again):
    loaded = again(fitted(calibration_size=None))
    with pytest.warns(ThresholdWarning, match="placed on the training rows"):
        loaded.predict(X)
    with pytest.warns(AnotherScaleWarning):
        loaded.score_samples(1000 * np.abs(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again(loaded.calibrate(X)).predict(X)


def test_a_device_that_is_not_here_is_left_for_the_cpu(path):
    detector = usual()
    detector.save(path)
    content, tensors = storage.from_bytes("detector", path.read_bytes())
    content["fitted"]["_network"]["fields"]["batcher"]["fields"]["device"] = {"$device": "cuda:7"}
    path.write_bytes(storage.to_bytes("detector", content, tensors))
    with pytest.warns(DeviceWarning):
        loaded = load(path)
    assert loaded.device_ == torch.device("cpu")
    assert loaded.predict(X).shape == (N,)


def test_no_mode_or_generator_of_the_caller_matters(again, generator_states):
    detector = fitted(seeded(default_network, (6,), 4))
    before = generator_states()
    with torch.inference_mode():
        loaded = again(detector)
    assert generator_states() == before
    assert_same(refitted(loaded), detector)


@pytest.mark.slow
def test_another_process_scores_the_same(path):
    detector = usual()
    detector.save(path)
    program = (
        "import sys, numpy as np, torch; torch.set_num_threads(int(sys.argv[2]));"
        "from skood import SparseEnergyOODDetector as D;"
        "X = np.random.RandomState(0).randn(90, 6);"
        "print(D.load(sys.argv[1]).score_samples(X).tobytes().hex())"
    )
    arguments = [sys.executable, "-c", program, str(path), str(torch.get_num_threads())]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert bytes.fromhex(printed) == detector.score_samples(X).tobytes()


# Files


def test_an_unfitted_detector_is_refused(path):
    with pytest.raises(NotFittedError):
        SparseEnergyOODDetector().save(path)


def test_a_file_appears_whole_or_not_at_all(path, monkeypatch):
    detector = usual()
    path.write_text("before")

    def fail(*_):
        raise KeyboardInterrupt

    for place in ("skood.storage.os.fsync", "skood.storage.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(KeyboardInterrupt):
                detector.save(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        assert path.read_text() == "before"
    detector.save(str(path))
    assert_same(load(path), detector)


def test_where_no_file_can_be_the_system_says_so(tmp_path):
    detector = usual()
    with pytest.raises(FileNotFoundError):
        detector.save(tmp_path / "none" / "detector")
    with pytest.raises(OSError, match=tmp_path.name):
        detector.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_those_of_a_file_of_tensors(path):
    from safetensors.torch import load_file

    detector = fitted(seeded(mlp))
    detector.save(path)
    tensors = load_file(path)
    for name, values in detector.module_.state_dict().items():
        assert torch.equal(tensors[f"_network.module.{name}"], values)


class Ran(Exception):
    """Raised by code in a file."""


class Hostile:
    def __reduce__(self):
        return exec, ("from test_saving import Ran; raise Ran",)


def torch_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def with_header(text, length=None):
    header = text.encode()
    return (length or len(header)).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"x", "no file of tensors"),
        (b"a text of some words, such as a README", "no file of tensors"),
        (pickle.dumps(Hostile()), "perhaps a pickle"),
        (torch_file(Hostile()), "torch.save"),
        (with_header("{}", 2**62), "no file of tensors"),
        (with_header("{}", 10**6), "its end is missing"),
        (with_header("{}"), "no detector of skood's"),
        (with_header('{"a":' + 50_000 * "["), "no header"),
        (with_header('{"__metadata__": 3}'), "no header"),
        (storage.to_bytes("training", {}, {}), "no detector of skood's"),
        (storage.to_bytes("detector", {}, {}), "damaged"),
        (storage.to_bytes("detector", [], {}), "damaged"),
    ],
    ids=range(13),
)
def test_other_files_are_refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(SavedFileError, match=words) as caught:
        load(path)
    assert len(str(caught.value)) < 400
    assert str(path)[-40:] in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SavedFileError, match=r"it is no file|it is a folder"):
            load(place)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file, as bytes."""
    path = tmp_path_factory.mktemp("written") / "detector"
    fitted(seeded(mlp, dtype=torch.float32), score_function="react").save(path)
    return path.read_bytes()


def test_damaged_files_are_refused(path, written):
    places = np.random.RandomState(0).randint(len(written), size=40).tolist()
    damaged = [written[:place] for place in places]
    damaged += [
        written[:place] + bytes([written[place] ^ 1 << place % 8]) + written[place + 1 :]
        for place in [*range(12), *places]
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(SavedFileError):
            load(path, module=mlp())


def changed(content, place, value):
    """The content of a file with another value in a place."""
    content = copy.deepcopy(content)
    *way, last = place
    where = content
    for key in way:
        where = where[key]
    where[last] = value
    return content


NETWORK = ("fitted", "_network", "fields")
SCORE = ("fitted", "score_function_")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fitted", "offset_"), {"$float": "nan"}),
        (("fitted", "offset_"), "high"),
        (("fitted", "tpr_"), 2),
        (("fitted", "history_"), 3),
        (("fitted", "predict"), 3),
        (("fitted", "module_"), 3),
        (("fitted", "not a name_"), 3),
        (("fitted", "classes_"), {"$objects": ["one"]}),
        (("fitted", "n_features_in_"), "six"),
        (("fitted", "calibration_scores_"), {"$objects": [1.0]}),
        (("parameters", "tpr"), "much"),
        (("parameters", "strange"), 1),
        (("parameters", "penalty"), None),
        (("parameters", "memory"), {"$path": "/"}),
        (("needs", "module"), 3),
        (("needs", "os"), "code"),
        ((*NETWORK, "head"), "strange"),
        ((*NETWORK, "n_logits"), 3),
        ((*NETWORK, "widest"), -1),
        ((*NETWORK, "pairs"), {"$tuple": [{"$tuple": ["0", "strange"]}]}),
        ((*NETWORK, "pairs"), {"$tuple": [{"$tuple": ["0", "0"]}]}),
        ((*NETWORK, "default_dtype"), {"$dtype": "int64"}),
        ((*NETWORK, "shapes", "fields", "ladder"), {"$tuple": [10**12]}),
        ((*NETWORK, "batcher", "fields", "device"), {"$device": "meta"}),
        ((*NETWORK, "batcher", "$object"), "os.system"),
        ((*NETWORK, "batcher", "$object"), "builtins.eval"),
        ((*NETWORK, "module", "$module", "tensors", "0.weight"), {"$tensor": "none"}),
        ((*NETWORK, "module", "$module", "tensors", "0.weight"), 3),
        ((*NETWORK, "module", "$module", "frozen"), None),
        ((*NETWORK, "head"), {"$tensor": "module.0.weight", "strides": [10**12, 1]}),
        ((*NETWORK, "head"), {"$tensor": "module.0.weight", "strides": [0, 0]}),
        ((*NETWORK, "module", "$module", "values"), {"": {"forward": 3}}),
        ((*SCORE, "$score"), "exec"),
        ((*SCORE, "state", "fit"), 3),
        ((*SCORE, "state", "threshold_"), {"$float": "nan"}),
        ((*SCORE, "state", "percentile"), 1000),
        ((*SCORE, "state", "_width"), 3),
        (SCORE, {"$code": "score_function", "state": None, "code": None}),
        (SCORE, {"$import": "os"}),
        (SCORE, {"$function": "eval"}),
        (("fitted", "_doubts", "fields", "notices"), [{"$tuple": ["a", {"$warning": "quit"}]}]),
    ],
    ids=lambda part: ".".join(part)[-30:] if isinstance(part, tuple) else str(part)[:20],
)
def test_hostile_contents_are_refused(path, written, place, value):
    content, tensors = storage.from_bytes("detector", written)
    path.write_bytes(storage.to_bytes("detector", changed(content, place, value), tensors))
    with pytest.raises(SavedFileError) as caught:
        load(path, module=mlp())
    assert len(str(caught.value)) < 400


def test_a_network_larger_than_its_tensors_is_refused(path):
    fitted(seeded(default_network, (6,), 4)).save(path)
    content, tensors = storage.from_bytes("detector", path.read_bytes())
    place = ("parameters", "module", "$module", "made_by")
    made_by = ["default_network", {"input_shape": [10**9], "n_classes": 10**9}]
    path.write_bytes(storage.to_bytes("detector", changed(content, place, made_by), tensors))
    with pytest.raises(SavedFileError, match="larger than its tensors"):
        load(path)


def test_deep_contents_are_refused(path, written):
    content, tensors = storage.from_bytes("detector", written)
    deep = json.loads(400 * '[{"a":' + "1" + 400 * "}]")
    content["fitted"]["deep_"] = deep
    path.write_bytes(storage.to_bytes("detector", content, tensors))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(600)  # newer versions of Python get by with fewer levels
    try:
        with pytest.raises(SavedFileError, match="RecursionError"):
            load(path, module=mlp())
    finally:
        sys.setrecursionlimit(limit)


# Versions


@pytest.mark.parametrize("file", sorted(saved_files.FOLDER.glob("*.safetensors")), ids=str)
def test_files_of_every_format_are_read(file):
    kept = json.loads(file.with_suffix(".json").read_text())
    detector = load(file, module=saved_files.network())
    now = saved_files.answers(detector)
    assert now.pop("classes") == kept.pop("classes")
    for name, values in kept.items():
        assert now[name] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_this_format_is_among_them():
    assert (saved_files.FOLDER / f"format_{storage.FORMAT}.safetensors").exists()


@pytest.mark.parametrize(
    ("version", "words"),
    [(storage.FORMAT + 1, "Install a newer skood"), (0, "which is none"), ("x", "which is none")],
)
def test_a_newer_format_is_refused(path, monkeypatch, version, words):
    detector = usual()
    monkeypatch.setattr(storage, "FORMAT", version)
    detector.save(path)
    monkeypatch.undo()
    with pytest.raises(SavedFileError, match=words):
        load(path)


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_a_pickle_of_another_version_says_so(monkeypatch, version):
    detector = usual()
    monkeypatch.setattr("skood.detector.__version__", version)
    content = pickle.dumps(RejectingClassifier(detector))
    monkeypatch.undo()
    with pytest.warns(SavedFileWarning, match=version or "an older skood"):
        loaded = pickle.loads(content)
    assert_same(loaded.detector, detector)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(loaded))


def test_thresholds_of_classes_and_paths_are_kept(digits, tmp_path):
    detector = SparseEnergyOODDetector(
        digits.module, max_epochs=1, sparsity_weight="auto", random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y).calibrate(digits.X_fresh, tpr=0.8, per_class=True)
        detector.save(tmp_path / "detector")
        loaded = SparseEnergyOODDetector.load(tmp_path / "detector", module=digits.module)
    assert np.array_equal(loaded.class_offsets_, detector.class_offsets_)
    assert np.array_equal(loaded.p_values(digits.X_test), detector.p_values(digits.X_test))
    assert np.array_equal(loaded.predict(digits.X_test), detector.predict(digits.X_test))
    assert loaded.path_ == detector.path_
    assert loaded.sparsity_weight_ == detector.sparsity_weight_
