from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Memory
from processes import printed_elsewhere
from torch import nn

from skood import SparseEnergyOODDetector
from skood.caching import UNFINISHED, DiskMemory, TrainingStore, training_key
from skood.engine.objective import fine_tuning_terms
from skood.engine.training import Progress, Recipe, Training, TrainingData
from skood.exceptions import MemoryEntryWarning
from skood.penalties import Relative, l1, l1_over_l2
from skood.rows import as_rows
from skood.storage import to_bytes

X = np.random.RandomState(0).randn(40, 4)
LABELS = np.random.RandomState(1).randint(3, size=30)
RECIPE = Recipe(2, 8, 0.1, 0.9, 5e-4)


def terms_of(penalty=l1, sparsity_weight=0.02, outlier_weight=0.0, distillation_weight=0.0):
    weights = {
        "sparsity_weight": sparsity_weight,
        "outlier_weight": outlier_weight,
        "distillation_weight": distillation_weight,
    }
    return fine_tuning_terms(penalty, weights)


def data_of(X, labels=LABELS, rows=None, outliers=None):
    everything = as_rows(X)
    return TrainingData(
        everything.pick(np.arange(30) if rows is None else rows),
        labels,
        everything.pick(np.arange(30, 40) if outliers is None else outliers),
    )


def without_outliers():
    return data_of(X, outliers=np.arange(0))


class Scale(nn.Module):
    """Multiplies by a number that is neither a parameter nor a buffer."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class ScaleBuffer(nn.Module):
    """Multiplies by a buffer, which the state_dict may leave out."""

    def __init__(self, factor, persistent):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor), persistent=persistent)

    def forward(self, x):
        return x * self.factor


def classifier(seed=0, dropout=0.1, first=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            first or nn.Identity(),
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 3),
        )


@pytest.fixture
def key(opened):
    """A function that gives the key of one training, of which anything may be changed."""

    def make(
        module=None,
        X=X,
        rows=None,
        labels=LABELS,
        outliers=None,
        penalty=l1,
        sparsity_weight=0.02,
        outlier_weight=0.5,
        distillation_weight=0.0,
        recipe=RECIPE,
        augment=None,
        seed=0,
        preprocess=None,
        precision="float32",
    ):
        network = opened(module or classifier(), X, preprocess=preprocess, precision=precision)
        terms = terms_of(penalty, sparsity_weight, outlier_weight, distillation_weight)
        data = data_of(X, labels, rows, outliers)
        return training_key(network, data, terms, recipe, augment, seed)

    return make


# Keys


def test_equal_trainings_have_equal_keys(key):
    assert key() == key()
    assert key(X=X.copy(), labels=LABELS.copy()) == key()
    assert key(X=np.asfortranarray(X)) == key()


def test_what_reaches_the_network_alike_has_one_key(key):
    assert key(X=X.astype(np.float32)) == key()
    assert key(preprocess=lambda batch: batch.clone()) == key()


def changed(array, position, value):
    array = array.copy()
    array[position] = value
    return array


def frozen(name):
    module = classifier()
    module.get_parameter(name).requires_grad_(False)
    return module


def counted(module):
    module[2].num_batches_tracked += 1
    return module


@pytest.mark.parametrize(
    "change",
    [
        {"module": classifier(seed=1)},
        {"module": counted(classifier())},
        {"module": classifier(dropout=0.2)},
        {"module": frozen("1.weight")},
        {"module": nn.Sequential(*classifier()[:4], nn.Identity(), classifier()[5])},
        {"X": changed(X, (3, 2), 7.0)},
        {"X": changed(X, (33, 2), 7.0)},
        {"rows": np.arange(30)[::-1].copy()},
        {"labels": changed(LABELS, 5, (LABELS[5] + 1) % 3)},
        {"outliers": np.arange(30, 39)},
        {"outliers": np.arange(30, 30)},
        {"penalty": l1_over_l2},
        {"penalty": Relative(l1)},
        {"penalty": Relative(l1, unit=2.0)},
        {"sparsity_weight": 0.03},
        {"outlier_weight": 0.4},
        {"distillation_weight": 1.0},
        {"recipe": Recipe(3, 8, 0.1, 0.9, 5e-4)},
        {"recipe": Recipe(2, 9, 0.1, 0.9, 5e-4)},
        {"recipe": Recipe(2, 8, 0.2, 0.9, 5e-4)},
        {"recipe": Recipe(2, 8, 0.1, 0.8, 5e-4)},
        {"recipe": Recipe(2, 8, 0.1, 0.9, 6e-4)},
        {"recipe": Recipe(2, 8, 0.1, 0.9, 5e-4, final_learning_rate=1e-5)},
        {"recipe": Recipe(2, 8, 0.1, 0.9, 5e-4, layers="last")},
        {"augment": "flip"},
        {"augment": lambda batch: batch},
        {"seed": 1},
        {"preprocess": lambda batch: 2 * batch},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_outcome_changes_the_key(key, change):
    assert key(**change) != key()


@pytest.mark.parametrize("outliers", [np.arange(0), np.flatnonzero(np.zeros(3))])
def test_no_outliers_are_no_obstacle(key, outliers):
    assert key(outliers=outliers) == key(outliers=outliers.copy()) != key()


# Code


def add_one(batch):
    return batch + 1


def add_two(batch):
    return batch + 2


def with_default(factor):
    def preprocess(batch, factor=factor):
        return batch * factor

    return preprocess


def with_closure(factor):
    return lambda batch: batch * factor


def helper(row):
    return row


def by_helper(batch):
    return helper(batch)


def by_nested_helper(batch):
    return torch.stack([helper(row) for row in batch])


def ping(batch, depth=0):
    return batch if depth else pong(batch, depth + 1)


def pong(batch, depth):
    return ping(batch, depth)


@pytest.mark.parametrize("parameter", ["preprocess", "augment"])
@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda function: function, add_one, add_two),
        (with_default, 2.0, 3.0),
        (with_closure, 2.0, 3.0),
        (lambda factor: with_closure(with_closure(factor)(1.0)), 2.0, 3.0),
        (lambda factor: functools.partial(torch.mul, other=factor), 2.0, 3.0),
        (lambda factor: functools.partial(with_closure(factor)), 2.0, 3.0),
        (Scale, 2.0, 3.0),
        (functools.partial(ScaleBuffer, persistent=True), 2.0, 3.0),
        (functools.partial(ScaleBuffer, persistent=False), 2.0, 3.0),
        (lambda factor: Scale(factor).forward, 2.0, 3.0),
    ],
    ids=[
        "function",
        "default",
        "closure",
        "nested closure",
        "partial",
        "partial of a closure",
        "attribute of a module",
        "buffer of a module",
        "buffer outside state_dict",
        "bound method",
    ],
)
def test_other_code_and_other_values_in_it_change_the_key(key, parameter, make, first, second):
    assert key(**{parameter: make(first)}) == key(**{parameter: make(first)})
    assert key(**{parameter: make(first)}) != key(**{parameter: make(second)})


@pytest.mark.parametrize("function", [by_helper, by_nested_helper])
def test_other_code_in_a_function_that_is_called_changes_the_key(key, monkeypatch, function):
    keys = []
    for called in (add_one, add_two):
        monkeypatch.setattr(sys.modules[__name__], "helper", called)
        keys.append(key(preprocess=function))
    assert keys[0] != keys[1]


def test_functions_that_call_each_other_have_a_key(key):
    assert key(preprocess=ping) == key(preprocess=ping)


@pytest.mark.parametrize(
    "make",
    [Scale, functools.partial(ScaleBuffer, persistent=False)],
    ids=["attribute", "buffer outside state_dict"],
)
def test_values_that_the_state_dict_leaves_out_change_the_key(key, make):
    assert key(module=classifier(first=make(2.0))) == key(module=classifier(first=make(2.0)))
    assert key(module=classifier(first=make(2.0))) != key(module=classifier(first=make(3.0)))


PROGRAM = """
import numpy as np, torch
from torch import nn
from skood.caching import training_key
from skood.engine.batches import Batcher
from skood.engine.objective import pretraining_terms
from skood.engine.opening import open_network
from skood.engine.training import Recipe, TrainingData
from skood.rows import as_rows

rows = as_rows(np.arange(40.0).reshape(10, 4))
torch.set_num_threads(1)
with torch.random.fork_rng():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
network = open_network(
    module, rows, head=None, batcher=Batcher(torch.device("cpu"), torch.float32, None),
    precision="float32", compiled=False, small_shape=True,
)
data = TrainingData(rows, np.arange(10) % 3, rows.pick(np.arange(9, 10)))
print(training_key(network, data, pretraining_terms(), Recipe(1, 8, 0.1, 0.9, 0), "flip", 0))
"""


def test_keys_outlive_the_process(capsys):
    n_threads = torch.get_num_threads()
    try:
        exec(PROGRAM, {})
    finally:
        torch.set_num_threads(n_threads)
    here = capsys.readouterr().out
    elsewhere = printed_elsewhere("-c", PROGRAM)
    assert len(here.strip()) == 64
    assert elsewhere == here


# Memory


def training_of(network, seed=0):
    return Training(network, without_outliers(), terms_of(distillation_weight=0.5), RECIPE, seed)


class KeptTraining:
    """A training in a memory that counts the epochs that really ran."""

    def __init__(self, opened, memory):
        self.opened, self.memory, self.epochs = opened, memory, 0

    def __call__(self, seed=0, module=None, killed_after=None):
        network = self.opened(module or classifier(), X)
        # A key of its own keeps this apart from how keys are made.
        name = f"seed {seed}, weights {network.module[1].weight.sum().item()}"
        store = TrainingStore(DiskMemory(self.memory), name)

        def after_epoch(progress):
            self.epochs += 1
            store.save(progress)
            if self.epochs == killed_after:
                raise KeyboardInterrupt

        history = training_of(network, seed).run(store.load(network.public), after_epoch)
        return network.module, history


@pytest.fixture(params=["folder", "Memory"])
def training(request, opened, tmp_path):
    folder = str(tmp_path / "memory")
    return KeptTraining(opened, folder if request.param == "folder" else Memory(folder, verbose=0))


def assert_bitwise(found, expected):
    (module, history), (expected_module, expected_history) = found, expected
    assert history == expected_history
    for own, other in zip(
        module.state_dict().values(), expected_module.state_dict().values(), strict=True
    ):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


def test_equal_trainings_run_once_and_give_the_same_bits(training, opened):
    first = training()
    assert training.epochs == RECIPE.epochs
    network = opened(classifier(), X)
    assert_bitwise_but_seconds(first, (network.module, training_of(network).run()))
    again = training()
    assert training.epochs == RECIPE.epochs
    assert_bitwise(again, first)
    assert not torch.equal(again[0][1].weight, classifier()[1].weight)


def test_other_trainings_run_again(training):
    first = training()
    other = training(seed=1)
    assert training.epochs == 2 * RECIPE.epochs
    assert not torch.equal(other[0][1].weight, first[0][1].weight)
    training(module=classifier(seed=1))
    assert training.epochs == 3 * RECIPE.epochs
    assert_bitwise(training(), first)
    assert training.epochs == 3 * RECIPE.epochs


def test_an_interrupted_training_goes_on_after_its_last_epoch(training, opened, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training(killed_after=1)
    resumed = training()
    assert training.epochs == RECIPE.epochs
    whole = KeptTraining(opened, str(tmp_path / "another"))
    assert_bitwise_but_seconds(resumed, whole())


def test_nothing_is_kept_where_the_memory_has_no_folder(opened):
    training = KeptTraining(opened, Memory(None))
    assert_bitwise_but_seconds(training(), training())
    assert training.epochs == 2 * RECIPE.epochs


def test_a_network_loaded_from_memory_can_be_trained_on_without_changing_what_is_kept(training):
    first = training()
    kept = {name: tensor.clone() for name, tensor in first[0].state_dict().items()}
    loaded, _ = training()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    again, _ = training()
    assert training.epochs == RECIPE.epochs
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, kept[name])


def flipped(content):
    """One bit in the middle, among the weights, is wrong."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no", flipped, lambda c: c[:-1]])
def test_a_damaged_entry_is_computed_again(training, tmp_path, damage):
    first = training()
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(damage(entry.read_bytes()))
    with pytest.warns(MemoryEntryWarning, match="so it is computed again: it is damaged"):
        again = training()
    assert_bitwise_but_seconds(again, first)
    assert training.epochs == 2 * RECIPE.epochs
    training()
    assert training.epochs == 2 * RECIPE.epochs


def test_clearing_the_memory_clears_all(opened, tmp_path):
    memory = Memory(tmp_path, verbose=0)
    KeptTraining(opened, memory)()
    assert list(tmp_path.rglob("*.safetensors"))
    memory.clear(warn=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def assert_bitwise_but_seconds(found, expected):
    (module, history), (expected_module, expected_history) = found, expected
    drop = [[{**record, "seconds": 0} for record in h] for h in (history, expected_history)]
    assert_bitwise((module, drop[0]), (expected_module, drop[1]))


def test_whoever_is_killed_while_saving_leaves_the_epoch_before(training, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        training(killed_after=1)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skood.storage.os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            training()
    assert len(list(tmp_path.rglob("skood/*"))) == 1
    epochs = training.epochs
    training()
    assert training.epochs == epochs + RECIPE.epochs - 1


# What cannot be kept or read


def fit(memory, module=None, **parameters):
    """A fit in two phases, and its warnings about the memory."""
    parameters = {"max_epochs": 2, "random_state": 0} | parameters
    parameters.setdefault("pretrain_epochs", 1 if module is None else 0)
    detector = SparseEnergyOODDetector(module, memory=memory, **parameters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector.fit(X, np.arange(len(X)) % 3)
    return detector, [str(w.message) for w in caught if w.category is MemoryEntryWarning]


@pytest.fixture(scope="module")
def offset():
    """The threshold of a fit without a memory."""
    return fit(None)[0].offset_


def fails(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("skood.storage.os.replace", OSError(errno.ENOSPC, "No space left on device")),
        ("skood.storage.os.replace", OSError(errno.ESTALE, "Stale file handle")),
        ("skood.storage.os.fsync", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("skood.caching.Path.mkdir", PermissionError(errno.EACCES, "Permission denied")),
        ("skood.caching.Path.read_bytes", PermissionError(errno.EACCES, "Permission denied")),
        ("skood.caching.to_bytes", RuntimeError("cannot keep this network")),
    ],
)
def test_what_cannot_be_written_or_read_is_said_once_and_costs_nothing(
    tmp_path, monkeypatch, offset, place, error
):
    monkeypatch.setattr(place, fails(error))
    detector, messages = fit(tmp_path)
    assert detector.offset_ == offset
    (message,) = messages
    assert str(error.args[-1]) in message
    assert len(message) < 400
    assert not list(tmp_path.rglob(f"*{UNFINISHED}"))


@pytest.mark.parametrize("name", ["", "nul\0", "z" * 300, "/".join(["y" * 200] * 30), "file", b"b"])
def test_what_is_no_folder_is_said_once_and_costs_nothing(tmp_path, monkeypatch, offset, name):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    memory = AsPath(name) if isinstance(name, bytes) else name
    detector, messages = fit(memory)
    assert detector.offset_ == offset
    assert len(messages) == (name != b"b")
    assert all(len(message) < 400 for message in messages)
    assert {path.name for path in tmp_path.iterdir()} == {"file"} | (
        {"b"} if name == b"b" else set()
    )


class AsPath:
    def __init__(self, name):
        self.name = name

    def __fspath__(self):
        return self.name


def unreadable(features):
    return features.abs().sum(dim=1) * next(VALUES)


VALUES = (1 for _ in range(1_000_000))


def test_where_the_key_cannot_be_told_nothing_is_kept_and_that_is_said(tmp_path):
    detector, messages = fit(tmp_path, penalty=unreadable)
    (message,) = messages
    assert message.startswith("memory= keeps no training, as it cannot tell what decides it")
    assert "penalty" in message
    assert len(message) < 400
    # Pre-training has no penalty of the user's.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert detector.offset_ == fit(None, penalty=unreadable)[0].offset_


class Ran(Exception):
    """Raised by code that a file holds."""


class Hostile:
    def __reduce__(self):
        return exec, ("raise Ran",)


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    payload = buffer.getvalue()
    return hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no",
        pickle.dumps(Hostile()),
        pickled("text"),
        pickled(Hostile()),
        to_bytes("training", {"key": "another"}, {}),
        to_bytes("training", {"key": 7 * ["deep"]}, {"a": torch.ones(2)}),
        to_bytes("detector", {}, {}),
    ],
)
def test_an_entry_that_cannot_be_used_is_computed_again(tmp_path, offset, content):
    fit(tmp_path)
    for entry in tmp_path.rglob("*.safetensors"):
        entry.write_bytes(content)
    detector, messages = fit(tmp_path)
    assert detector.offset_ == offset
    assert len(messages) == 1
    assert fit(tmp_path)[1] == []


def stored(memory):
    """A store, and an epoch to keep there."""
    module, store = classifier(), TrainingStore(DiskMemory(memory), "key")
    assert store.load(module) is None
    return store, Progress([{"loss": 1.0}], 0.5, module, {"state": {}, "param_groups": []})


def test_a_folder_that_goes_meanwhile_is_made_again(tmp_path):
    folder = tmp_path / "kept"
    store, progress = stored(folder)
    for _ in range(2):
        store.save(progress)
        assert len(list(folder.rglob("*.safetensors"))) == 1
        shutil.rmtree(folder)


def test_what_a_killed_process_has_left_is_removed_after_a_day(tmp_path):
    store, progress = stored(tmp_path)
    store.save(progress)
    (entry,) = tmp_path.rglob("*.safetensors")
    old, new = (entry.with_name(f"{name}{UNFINISHED}") for name in ("old", "new"))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    store.save(progress)
    assert not old.exists()
    assert new.exists()


def test_a_repeated_fit_is_loaded(tmp_path):
    first, _ = fit(tmp_path)
    entries = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(entries) == 2
    again, _ = fit(tmp_path)
    assert entries == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert again.history_ == first.history_


def local_network(n_hooks):
    """A network of a class, and with functions, that no module holds, as a worker of joblib has."""

    class Local(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    network = Local(*classifier())
    for factor in range(n_hooks):
        network[1].register_forward_hook(
            lambda module, args, output, factor=factor: (1 + factor) * output
        )
    return network


def test_a_network_that_no_module_holds_is_kept_and_loaded(tmp_path):
    first, messages = fit(tmp_path, local_network(n_hooks=1))
    assert messages == []
    (entry,) = (path for path in tmp_path.rglob("*.safetensors"))
    written = entry.stat().st_mtime_ns
    module = local_network(n_hooks=1)
    again, messages = fit(tmp_path, module)
    assert messages == []
    assert entry.stat().st_mtime_ns == written
    assert again.history_ == first.history_
    assert again.offset_ == first.offset_
    assert type(again.module_) is type(module)


def test_functions_of_one_name_are_told_apart(tmp_path):
    first, messages = fit(tmp_path, local_network(n_hooks=2))
    again, more = fit(tmp_path, local_network(n_hooks=2))
    assert messages + more == []
    assert again.history_ == first.history_  # to the second
    assert again.offset_ == fit(None, local_network(n_hooks=2))[0].offset_


def test_an_entry_under_the_name_of_another_is_of_no_use(tmp_path, offset):
    fit(tmp_path)
    one, other = tmp_path.rglob("*.safetensors")
    here, there = one.read_bytes(), other.read_bytes()
    one.write_bytes(there)
    other.write_bytes(here)
    detector, messages = fit(tmp_path)
    assert detector.offset_ == offset
    (message,) = messages
    assert "the entry is of another training" in message


class Counting(nn.Sequential):
    """Counts its training batches, and keeps the last in a tensor or in a list."""

    def __init__(self, *layers, into_list=False):
        super().__init__(*layers)
        self.count, self.last, self.all = 0, None, []
        self.into_list = into_list

    def forward(self, x):
        if self.training:
            self.count += 1
            self.last = x.detach().mean(dim=0)
            if self.into_list:
                self.all.append(self.count)
        return super().forward(x * (1 + self.count / 1000))


def test_numbers_and_tensors_that_a_network_remembers_are_kept(tmp_path):
    first, messages = fit(tmp_path, Counting(*classifier()))
    again, more = fit(tmp_path, Counting(*classifier()))
    assert messages + more == []
    assert again.history_ == first.history_
    assert again.offset_ == first.offset_
    assert again.module_.count == first.module_.count > 0
    assert torch.equal(again.module_.last, first.module_.last)


def test_a_training_that_changes_more_is_not_kept_and_that_is_said(tmp_path):
    detector, messages = fit(tmp_path, Counting(*classifier(), into_list=True))
    (message,) = messages
    assert "training changes more of the network than tensors and numbers" in message
    assert not list(tmp_path.rglob("*.safetensors"))
    assert detector.offset_ == fit(None, Counting(*classifier(), into_list=True))[0].offset_


# What rounds otherwise


@pytest.fixture
def settings():
    """Gives the settings of torch back as they were."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch._C._set_mkldnn_enabled(True)
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: torch.set_float32_matmul_precision("medium"),
        lambda patch: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda patch: torch._C._set_mkldnn_enabled(False),
        lambda patch: torch.backends.cuda.enable_flash_sdp(False),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
        lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE"),
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ],
    ids=["products", "oneDNN's products", "oneDNN", "attention", "instructions", "MKL", "ISA"],
)
def test_what_rounds_otherwise_changes_the_key(key, settings, monkeypatch, change):
    before = key()
    change(monkeypatch)
    assert key() != before
