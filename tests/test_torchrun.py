"""A fit on two processes: both end with one network, without batch-norm that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.utils.data import Dataset

from skood import SparseEnergyOODDetector
from skood.exceptions import LostRankError
from skood.scores import Knn

N_ROWS = 301


class Convolutions(nn.Module):
    """A classifier of digits with batch-norm, a frozen layer, and one that nothing uses.

    Parameters
    ----------
    normalised : bool
        Whether batch-norm trains; else it keeps the statistics that it has.
    """

    def __init__(self, normalised=False):
        super().__init__()
        self.normalised = normalised
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Flatten(),
            )
            self.unused = nn.Linear(3, 3)
            self.head = nn.Linear(128, 10)
        self.body[0].weight.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and not self.normalised:
                part.eval()
        return self

    def forward(self, x):
        # A view of the shape of its rows, which a batch without any could not take.
        return self.head(self.body(x).view(x.shape[0], -1))


def perceptron():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def data(images=True, dtype="float64"):
    X, y = load_digits(return_X_y=True)
    X = (X[:N_ROWS] / 16).astype(dtype)
    return (X.reshape(-1, 1, 8, 8) if images else X), y[:N_ROWS]


def outcome(module, X, y, **parameters):
    """All that a fit leaves behind, in plain values."""
    parameters = {
        "sparsity_weight": 0.02,
        "penalty": "l1",
        "max_epochs": 2,
        "random_state": 0,
        "precision": "float32",
    } | parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = SparseEnergyOODDetector(module, **parameters).fit(X, y)
    return {
        "weights": {name: x.numpy() for name, x in detector.module_.state_dict().items()},
        "scores": detector.score_samples(X),
        "calibration": np.append(detector.calibration_scores_, detector.offset_),
        "classes": detector.classes_,
        "accuracy": np.array(list(detector.id_accuracy_.values())),
        "history": [
            {
                name: value
                for name, value in record.items()
                if name not in ("phase", "seconds", "layers")
            }
            for record in detector.history_
        ],
        "seconds": [record["seconds"] for record in detector.history_],
    }


CASES = {
    "no batch-norm, odd batches": lambda: outcome(
        perceptron().double(), *data(images=False), batch_size=33
    ),
    "batch-norm in evaluation mode, odd batches, crops": lambda: outcome(
        Convolutions().double(), *data(), batch_size=37, augment="flip-crop", learning_rate=0.02
    ),
    "outliers": lambda: outcome(
        Convolutions().double(),
        *data(),
        ood_label=9,
        outlier_weight=0.5,
        batch_size=35,
        augment="flip",
        learning_rate=0.02,
    ),
    "distillation, relative penalty": lambda: outcome(
        Convolutions().double(),
        *data(),
        distillation_weight=1.0,
        penalty="relative_l1",
        sparsity_weight=0.3,
        learning_rate=0.02,
    ),
    "a fitted score, labels of its own": lambda: outcome(
        perceptron().double(), data(images=False)[0], None, score_function="mahalanobis"
    ),
    # Shares of 1 and 0 rows in the last batch: one process leaves it out as well.
    "a last batch of one row": lambda: outcome(
        Convolutions().double(), *data(), batch_size=60, calibration_size=60, learning_rate=0.02
    ),
    "a path without labels or module": lambda: outcome(
        None, *data(images=False)[:1], None, pretrain_epochs=2
    ),
    "float32": lambda: outcome(Convolutions(), *data(dtype="float32")),
    "the weight and the score chosen": lambda: outcome(
        Convolutions().double(),
        *data(),
        sparsity_weight="auto",
        score_function="auto",
        distillation_weight=0.5,
        learning_rate=0.02,
    ),
}


OF_EACH_RANK = {
    "batch-norm, odd batches, crops": lambda: outcome(
        Convolutions(normalised=True).double(),
        *data(),
        batch_size=33,
        augment="flip-crop",
        learning_rate=0.02,
    ),
    "batch-norm of built networks": lambda: outcome(None, *data(), pretrain_epochs=2),
    "batch-norm, outliers, distillation": lambda: outcome(
        Convolutions(normalised=True),
        *data(dtype="float32"),
        ood_label=9,
        outlier_weight=0.5,
        distillation_weight=1.0,
        batch_size=35,
    ),
    # The smallest step: two rows on each rank.
    "batch-norm, steps of four rows": lambda: outcome(
        Convolutions(normalised=True).double(),
        *data(),
        batch_size=4,
        max_epochs=1,
        learning_rate=1e-3,
    ),
}
"""Fits in which each rank normalises by its own rows: the ranks agree, and not with one process."""


def run(case):
    return (CASES | OF_EACH_RANK)[case]()


def assert_close(found, expected, tolerance):
    for part in expected.keys() - {"weights", "history", "seconds"}:
        np.testing.assert_allclose(found[part], expected[part], rtol=tolerance, atol=tolerance)
    for name, values in expected["weights"].items():
        np.testing.assert_allclose(
            found["weights"][name], values, rtol=tolerance, atol=tolerance, err_msg=name
        )
    for record, other in zip(found["history"], expected["history"], strict=True):
        # The accuracy of a step is a float32.
        assert record == pytest.approx(other, rel=tolerance and max(tolerance, 1e-7), abs=tolerance)


def assert_same(first, second):
    assert_close(first, second, 0)
    assert first["seconds"] == second["seconds"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(group, case):
    first, second = group(run, case)
    assert_same(first, second)
    in_float32 = case in ("float32", "a path without labels or module")
    assert_close(first, run(case), 1e-5 if in_float32 else 1e-9)


@pytest.mark.parametrize("case", OF_EACH_RANK)
def test_two_processes_with_batch_norm_end_with_the_same_network(group, case):
    first, second = group(run, case)
    assert_same(first, second)
    alone = run(case)
    moved = [name for name in alone["weights"] if "running_mean" in name]
    assert moved
    for name in moved:
        assert not np.allclose(first["weights"][name], alone["weights"][name], rtol=1e-9)
    # Another network, and as good a one.
    assert first["accuracy"][1] == pytest.approx(alone["accuracy"][1], abs=0.3)


def rows_read(batch_size):
    """Rows that reach the augmentation of this rank in an epoch."""
    read = []

    def count(batch):
        read.append(len(batch))
        return batch

    outcome(perceptron(), *data(images=False), augment=count, max_epochs=1, batch_size=batch_size)
    return read


def test_each_rank_reads_its_share(group):
    batches = zip(*group(rows_read, 51), strict=True)
    n_training = 301 - 39  # the fewest calibration rows for tpr 0.95
    assert [first + second for first, second in batches] == [51] * 5 + [n_training % 51]


def fit_without_a_seed():
    return outcome(None, *data(images=False), pretrain_epochs=2, random_state=None)


def test_without_a_seed_rank_0_draws_for_all(group):
    first, second = group(fit_without_a_seed)
    assert_same(first, second)
    assert first["scores"].std() > 0


def fit_with_dropout():
    module = nn.Sequential(*perceptron()[:2], nn.Dropout(0.5), perceptron()[2])
    masks = []
    module[2].register_forward_hook(lambda dropout, args, output: masks.append(output[0] == 0))
    found = outcome(module, *data(images=False))
    # A module carries hooks to the copy that is trained, and they write where they always did.
    return found, torch.stack(masks).numpy()


def test_dropout_draws_for_each_rank(group):
    (first, masks), (second, others) = group(fit_with_dropout)
    assert_same(first, second)
    assert not np.array_equal(masks, others)


def warnings_of_a_fit():
    X, y = data(images=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparseEnergyOODDetector(perceptron(), max_epochs=0, random_state=0, calibration_size=5).fit(
            X, y
        )
    return len(caught)


def test_rank_0_alone_warns(group):
    first, second = group(warnings_of_a_fit)
    assert first > 0
    assert second == 0


# What is refused, on both ranks


class Scaled(nn.Module):
    """A classifier with a number that is no weight."""

    def __init__(self, factor=1.0, settings=None):
        super().__init__()
        self.factor = factor
        self.settings = settings or {"scales": [1.0, 1.0]}
        self.layers = perceptron()

    def forward(self, x):
        self.kept = x  # differs between ranks, and decides nothing
        return self.layers(x) * self.factor


class Rows(Dataset):
    """Digits as a data set that must be loaded."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return torch.tensor(self.X[row]), int(self.y[row])


def penalty_of(factor):
    return lambda features: factor * features.abs().sum(dim=1)


def changed_row(X, row):
    X = X.copy()
    X[row] += 1
    return X


CHANGES = {
    "X": lambda X, y: {"X": 2 * X},
    "X, in a row": lambda X, y: {"X": changed_row(X, 151)},
    "X, in its columns": lambda X, y: {"X": pd.DataFrame(X).add_prefix("a")},
    "X, fewer": lambda X, y: {"X": X[:-1], "y": y[:-1]},
    "y": lambda X, y: {"y": y[::-1]},
    "y, a label": lambda X, y: {"y": np.where(np.arange(len(y)) == 151, y[0], y)},
    "module": lambda X, y: {"module": nn.Sequential(*perceptron(), nn.Identity())},
    "module, its code": lambda X, y: {"module": Scaled(2.0)},
    "module, its settings": lambda X, y: {"module": Scaled(settings={"scales": [1.0, 2.0]})},
    "module, none": lambda X, y: {"module": None},
    "module, frozen": lambda X, y: {"module": frozen(Scaled())},
    "random_state": lambda X, y: {"random_state": 1},
    "batch_size": lambda X, y: {"batch_size": 64},
    "memory": lambda X, y: {"memory": "/nowhere"},
    "penalty": lambda X, y: {"penalty": penalty_of(2.0)},
    "augment": lambda X, y: {"augment": lambda batch: batch + 1},
    "preprocess": lambda X, y: {"preprocess": lambda batch: batch + 1},
    "score_function": lambda X, y: {"score_function": Knn(n_neighbors=3)},
}
"""What rank 1 alone passes, by the name of what differs."""


def frozen(module):
    module.layers[0].requires_grad_(False)
    return module


def fit_with(name):
    """A fit in which something is another on rank 1."""
    X, y = data(images=False)
    given = {
        "module": Scaled(),
        "X": pd.DataFrame(X) if name == "X, in its columns" else X,
        "y": y,
        "penalty": penalty_of(1.0),
        "augment": lambda batch: batch,
        "preprocess": lambda batch: batch,
        "score_function": Knn(n_neighbors=5),
        "max_epochs": 1,
    }
    if distributed.get_rank() == 1 and name is not None:
        given |= CHANGES[name](X, y)
    if given["module"] is not None:
        given["module"](torch.full((2, 64), float(distributed.get_rank())))
    outcome(given.pop("module"), given.pop("X"), given.pop("y"), **given)


@pytest.mark.parametrize("name", CHANGES)
def test_ranks_that_disagree_are_refused(group, name):
    for error in group(fit_with, name):
        assert isinstance(error, ValueError)
        differs = name.partition(",")[0]
        assert f"Rank 1 calls fit with another {differs} than rank 0: " in str(error)
        assert len(str(error)) <= 400


def test_ranks_that_agree_are_not_refused(group):
    assert group(fit_with, None) == [None, None]


def fit_of_a_data_set(changed):
    X, y = data(images=False)
    if changed and distributed.get_rank() == 1:
        X = X + 1
    outcome(perceptron().double(), Rows(X, y), None, num_workers=0, max_epochs=1)


def test_data_sets_that_differ_are_refused(group):
    for error in group(fit_of_a_data_set, True):
        assert isinstance(error, ValueError)
        assert "Rank 1 calls fit with another X than rank 0: " in str(error)


def fit_that_one_rank_refuses(**parameters):
    X, y = data(images=False)
    if distributed.get_rank() == 1:
        return outcome(perceptron(), np.where(X > 0, X, np.nan), y)
    return outcome(perceptron(), X, y)


def fit_with_a_parameter_out_of_range():
    return outcome(perceptron(), *data(images=False), tpr=2.0 * distributed.get_rank() or 0.5)


@pytest.mark.parametrize("fit", [fit_that_one_rank_refuses, fit_with_a_parameter_out_of_range])
def test_what_one_rank_refuses_ends_the_others_at_once(group, fit):
    lost, own = group(fit)
    assert isinstance(lost, LostRankError)
    assert str(lost).startswith("Rank 1 of 2 refused its fit, so that rank 0 cannot begin: ")
    assert isinstance(own, ValueError)
    assert str(own)[:100] in str(lost)


def fit_of(**parameters):
    return outcome(perceptron(), *data(images=False), **parameters)


def fit_with_one_row_a_step():
    return fit_of(batch_size=1)


def fit_with_one_outlier():
    X, y = data(images=False)
    y = np.where(np.arange(N_ROWS) == 0, -1, y)
    return outcome(perceptron(), X, y, ood_label=-1, outlier_weight=0.5)


def fit_with_three_rows_for_batch_norm():
    return outcome(Convolutions(normalised=True), *data(), batch_size=3)


def fit_compiled():
    return fit_of(compile=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            fit_with_one_row_a_step,
            "batch_size=1 on .* leaves some of 2 processes without rows",
        ),
        (fit_with_one_outlier, "1 outliers leave some of 2 processes without any"),
        (fit_with_three_rows_for_batch_norm, "batch_size=3 on .* needs 4, .* two with batch-norm"),
        (fit_compiled, "Pass compile=False"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(group, function, message):
    for error in group(function):
        with pytest.raises(ValueError, match=message):
            raise error


def fit_as_told(remedy):
    """A fit with what the messages say instead."""
    X, y = data(images=False)
    if remedy == "more outliers":
        y = np.where(np.arange(N_ROWS) < 2, -1, y)
        return outcome(perceptron(), X, y, ood_label=-1, outlier_weight=0.5)
    return outcome(perceptron(), X, y, **remedy)


@pytest.mark.parametrize("remedy", [{"batch_size": 2}, {"compile": False}, "more outliers"])
def test_what_cannot_be_shared_out_can_be_as_the_messages_say(group, remedy):
    for result in group(fit_as_told, remedy):
        assert np.isfinite(result["scores"]).all()


# Memory


class Fails:
    """An augmentation that raises in one of its batches, and counts them."""

    batches = 0

    def __init__(self, at):
        type(self).batches = 0
        self.at = at

    def __call__(self, batch):
        type(self).batches += 1
        if type(self).batches == self.at:
            raise RuntimeError("interrupted")
        return batch

    def __reduce__(self):
        return Fails, (None,)


def fit_with_memory(folder, fail_at=None):
    """A fit with a folder of each rank's own; whether it kept anything, and the batches it ran."""
    memory = f"{folder}/{distributed.get_rank()}"
    parameters = {"max_epochs": 3, "memory": memory, "augment": Fails(fail_at)}
    try:
        found = outcome(Convolutions().double(), *data(), **parameters)
    except RuntimeError as error:
        return str(error)
    return found, os.path.isdir(memory), Fails.batches


def test_an_interrupted_fit_goes_on_from_the_memory_of_rank_0(group, tmp_path):
    # Three batches an epoch: the second epoch is interrupted on both.
    assert group(fit_with_memory, tmp_path, 5) == ["interrupted"] * 2
    (first, kept, batches), (second, kept_by_other, _) = group(fit_with_memory, tmp_path)
    assert_same(first, second)
    assert (kept, kept_by_other) == (True, False)
    assert batches == 2 * 3
    (whole, _, batches), _ = group(fit_with_memory, tmp_path / "new")
    assert batches == 3 * 3
    assert_close(first, whole, 0)
    (again, _, batches), _ = group(fit_with_memory, tmp_path)
    assert batches == 0
    assert_same(again, first)


# Lost ranks


class Ends:
    """An augmentation in whose third batch rank 1 is killed, or hangs."""

    def __init__(self, how):
        self.how = how
        self.batches = 0

    def __call__(self, batch):
        self.batches += 1
        if self.batches == 3 and distributed.get_rank() == 1:
            os.kill(os.getpid(), self.how)
        return batch


def fit_that_ends(how):
    detector = SparseEnergyOODDetector(perceptron(), augment=Ends(how), random_state=0)
    start = time.perf_counter()
    try:
        detector.fit(*data(images=False))
    except LostRankError as error:
        return str(error), time.perf_counter() - start, list(vars(detector))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_an_error_in_time(mortal_group, how):
    for connection in mortal_group.connections:
        connection.send((fit_that_ends, (how,)))
    message, _, attributes = mortal_group.answer(0)
    assert message.startswith("This process, rank 0 of 2, lost the others of its torch.distributed")
    assert "Start all of them again: with memory=" in message
    assert len(message) <= 400
    assert not any(name.endswith("_") for name in attributes)


def fit_on_rank_0_alone():
    if distributed.get_rank() == 0:
        fit_of()


def test_a_rank_that_does_not_call_fit_is_an_error_in_time(mortal_group):
    error, _ = mortal_group(fit_on_rank_0_alone)
    assert isinstance(error, LostRankError)
    assert "Every process must call fit" in str(error)


SCRIPT = """
import os
import sys
import numpy as np
import torch
from sklearn.datasets import load_digits
from skood import SparseEnergyOODDetector
X, y = load_digits(return_X_y=True)
for seed in range(2):
    detector = SparseEnergyOODDetector(
        pretrain_epochs=2, max_epochs=1, random_state=seed, verbose=1
    )
    detector.fit(X / 16, y)
assert torch.distributed.get_world_size() == 2
np.save(sys.argv[1] + os.environ["RANK"], detector.score_samples(X / 16))
"""


@pytest.mark.slow
def test_a_plain_script_under_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node=2", str(script), f"{tmp_path}/scores"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SparseEnergyOODDetector: head") == 2  # two fits, one speaker
    first, second = (np.load(tmp_path / f"scores{rank}.npy") for rank in range(2))
    assert np.array_equal(first, second)
