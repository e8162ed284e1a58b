from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import teacher as module_of_teacher
from skood.engine.augmentation import get_augment
from skood.engine.objective import fine_tuning_terms
from skood.engine.teacher import Teacher
from skood.engine.training import Recipe, Training, TrainingData
from skood.networks import CifarResNet
from skood.penalties import l1
from skood.rows import as_rows

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(-5, 6, size=(56, 3, 8, 8)).astype(np.float32)
ROWS = RANDOM.randn(56, 20).astype(np.float32)
BATCH = 16
WEIGHTS = {"sparsity_weight": 0.1, "outlier_weight": 0.0, "distillation_weight": 5.0}


def resnet():
    return CifarResNet(8, n_classes=4)


def perceptron():
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4)
    )


def exact():
    """A network of images in multiples of 1 / 64, which no order of additions rounds."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randint(-3, 4, p.shape, generator=generator) / 64
    return network


@pytest.fixture
def forwards(monkeypatch):
    """Numbers of rows of the forwards that teachers make."""
    sizes, computed = [], Teacher._computed

    def counted(teacher, inputs):
        sizes.append(len(inputs))
        return computed(teacher, inputs)

    monkeypatch.setattr(Teacher, "_computed", counted)
    return sizes


@pytest.fixture
def fit(opened):
    """Weights and history of a training with distillation."""

    def fit(build, *, n_rows=51, n_outliers=0, augment=None, precision=None, epochs=3, **run):
        torch.manual_seed(0)
        X = as_rows(ROWS if build is perceptron else IMAGES)
        network = opened(build(), X.read(slice(0, 56)).numpy())
        network.precision = dataclasses.replace(network.precision, training=precision)
        data = TrainingData(
            X.pick(np.arange(n_rows)), np.arange(n_rows) % 4, X.pick(np.arange(n_rows, 56))
        )
        weights = WEIGHTS | {"outlier_weight": 0.5 if n_outliers else 0.0}
        terms, recipe = fine_tuning_terms(l1, weights), Recipe(epochs, BATCH, 0.1, 0.9, 0)
        history = Training(network, data, terms, recipe, 0, get_augment(augment)).run(**run)
        return network.module.state_dict(), [{**record, "seconds": 0} for record in history]

    return fit


@pytest.mark.parametrize(
    ("build", "augment"),
    [(resnet, None), (resnet, "flip"), (perceptron, None)],
    ids=["images", "flip", "table"],
)
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_kept_logits_train_bitwise_what_computed_ones_train(
    fit, monkeypatch, build, augment, precision
):
    weights, history = fit(build, augment=augment, precision=precision, n_outliers=5)
    monkeypatch.setattr(module_of_teacher, "MOST_KEPT", 0)
    expected, computed = fit(build, augment=augment, precision=precision, n_outliers=5)
    assert history == computed
    assert history[-1]["distillation"] > 1e-4
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("augment", "epochs"), [(None, 1), ("flip", 2), ("flip-crop", 5), (lambda batch: batch, 5)]
)
def test_each_view_of_a_row_is_computed_once(fit, forwards, augment, epochs):
    fit(exact, n_rows=48, augment=augment, epochs=5)
    tried = [BATCH] if epochs < 5 else []
    assert forwards == tried + [BATCH] * 3 * epochs


def test_a_training_that_goes_on_ends_as_one_in_one_go(fit):
    kept = []
    whole, history = fit(
        resnet, augment="flip", after_epoch=lambda progress: kept.append(copy.deepcopy(progress))
    )
    weights, resumed = fit(resnet, augment="flip", resume=kept[0])
    assert resumed == history
    for name, value in weights.items():
        assert torch.equal(value, whole[name]), name


def test_batches_of_another_size_are_computed(fit, forwards):
    fit(exact, n_rows=35, epochs=5)
    assert forwards.count(3) == 5  # the last of each epoch
    assert forwards[:4] == [BATCH, BATCH, BATCH, 3]
    # Its rows are computed once more, in full batches.
    assert 3 < forwards.count(BATCH) < 3 + 2 * 4


def test_no_more_is_kept_than_there_is_room_for(fit, forwards, monkeypatch):
    monkeypatch.setattr(module_of_teacher, "MOST_KEPT", 48 * 4 * 4)
    fit(exact, n_rows=48)
    assert len(forwards) == 1 + 3
    forwards.clear()
    fit(exact, n_rows=48, augment="flip")
    assert len(forwards) == 9


def test_a_network_that_rounds_by_place_computes_all(fit, forwards, monkeypatch):
    computed = Teacher._computed

    def by_place(teacher, inputs):
        logits = computed(teacher, inputs)
        return logits + 1e-3 * (torch.arange(len(logits)) % 2)[:, None]

    monkeypatch.setattr(Teacher, "_computed", by_place)
    fit(exact, n_rows=48)
    assert forwards == [BATCH] * (1 + 9)


class Drawing(nn.Module):
    """A network that draws in evaluation mode, too, to no effect."""

    def __init__(self):
        super().__init__()
        self.layers = exact()

    def forward(self, x):
        return self.layers(x + 0 * torch.rand_like(x))


@pytest.mark.filterwarnings("ignore:.*draws random numbers")
def test_a_network_that_draws_computes_all(fit, forwards):
    fit(Drawing, n_rows=48)
    assert forwards == [BATCH] * 9


def forwards_on_a_rank():
    computed, calls = Teacher._computed, []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(Teacher, "_computed", lambda *args: calls.append(1) or computed(*args))
        SparseEnergyOODDetector(
            exact(),
            distillation_weight=1.0,
            calibration_size=8,
            batch_size=BATCH,
            max_epochs=3,
            random_state=0,
        ).fit(IMAGES, np.arange(56) % 4)
    return len(calls)


def test_a_process_among_several_computes_all(group):
    assert forwards_on_a_rank() == 1 + 3
    assert group(forwards_on_a_rank) == [9, 9]
