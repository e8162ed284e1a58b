from __future__ import annotations

import copy
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from formulas import (
    N_CLASSES,
    numpy_divergence,
    numpy_forward,
    numpy_log_softmax,
    numpy_loss,
    numpy_penalty,
    numpy_training,
    numpy_uniformity,
)
from modules import InPlace
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from skood.engine.augmentation import Augmented, get_augment
from skood.engine.distributed import Ranks
from skood.engine.hardware import Precision
from skood.engine.objective import Distillation, fine_tuning_terms
from skood.engine.training import (
    PRETRAINING_EPOCHS,
    PRETRAINING_STEPS,
    Recipe,
    Training,
    TrainingData,
    pretraining_recipe,
    reproducible,
)
from skood.exceptions import DivergenceError
from skood.penalties import l1, l1_over_l2
from skood.rows import as_rows


def data_of(X, labels, outliers=()):
    """Rows of X to train on, the first ones, and outliers among them by their numbers."""
    rows = as_rows(X)
    return TrainingData(
        rows.pick(np.arange(len(labels))),
        np.asarray(labels),
        rows.pick(np.array(outliers, dtype=np.intp)),
    )


def terms_of(penalty, weight=0.0, outlier_weight=0.0, distillation_weight=0.0):
    return fine_tuning_terms(
        penalty,
        {
            "sparsity_weight": weight,
            "outlier_weight": outlier_weight,
            "distillation_weight": distillation_weight,
        },
    )


def train(network, data, terms, recipe, *, seed, augment=None, **options):
    return Training(network, data, terms, recipe, seed, augment).run(**options)


def rows_and_labels(n_rows=40, width=4, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(n_rows, width), random.randint(N_CLASSES, size=n_rows)


def small_network(width=4, hidden=6):
    """Two layers, whose penultimate features are non-negative."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, N_CLASSES)).double()


def regularized_network():
    """Batch-norm and dropout: what behaves differently in training."""
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, N_CLASSES)
    )


def parameters_of(module):
    return [p.detach().numpy().copy() for p in module.parameters()]


def assert_same_weights(module, other):
    for own, expected in zip(
        module.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(own, expected)


PENALTIES = {"l1": l1, "l1_over_l2": l1_over_l2}


# Whole runs


def watching(X, batches):
    """An augmentation that changes nothing and notes which rows of X each batch holds."""
    numbers = {tuple(row): number for number, row in enumerate(X.tolist())}

    def augment(batch, generator, share):
        batches.append([numbers[tuple(row)] for row in batch.tolist()])
        return Augmented(batch, None)

    return augment


@pytest.mark.parametrize("outlier_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_whole_run_agrees_with_numpy(opened, name, momentum, outlier_weight):
    X, labels = rows_and_labels(20)
    labels = labels[:14]
    recipe = Recipe(3, 5, learning_rate=0.3, momentum=momentum, weight_decay=0.05)
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    data = data_of(X, labels, range(14, 20) if outlier_weight > 0 else ())
    objective, batches = terms_of(PENALTIES[name], 0.1, outlier_weight), []
    train(network, data, objective, recipe, augment=watching(X, batches), seed=0)

    assert len(batches) == 9
    expected = numpy_training(parameters, X, labels, batches, recipe, name, 0.1, outlier_weight)
    for parameter, value in zip(network.module.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach(), value, rtol=0, atol=1e-6)


def test_every_epoch_is_one_pass_in_an_order_of_its_own(opened):
    X, labels = rows_and_labels(22)
    network, batches = opened(small_network(), X), []
    train(
        network,
        data_of(X, labels[:16], outliers=range(16, 22)),
        terms_of(l1, 0.1, 0.5),
        Recipe(4, 5, 0.1, 0.9, 0),
        augment=watching(X, batches),
        seed=0,
    )
    # 16 rows make three batches of 5, the last row has no company; outliers follow in fives.
    assert [len(batch) for batch in batches] == [10] * 12
    own, others = np.array(batches).reshape(4, 3, 10)[..., :5], np.array(batches)[:, 5:]
    for rows in own.reshape(4, 15):
        assert len(set(rows)) == 15
        assert set(rows) <= set(range(16))
    assert len({tuple(rows) for rows in own.reshape(4, 15)}) == 4
    assert set(others.ravel()) == set(range(16, 22))


def rates_of(function):
    rates = []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append([g["lr"] for g in optimizer.param_groups])
    )
    try:
        function()
    finally:
        handle.remove()
    return [rate for (rate,) in rates]


@pytest.mark.parametrize(
    ("n_rows", "n_steps"), [(40, 12), (41, 12), (42, 15), (33, 12), (8, 3), (5, 3)]
)
@pytest.mark.parametrize("learning_rate", [1e-3, 0.1])
def test_learning_rate_falls_along_a_cosine_step_by_step(opened, n_rows, n_steps, learning_rate):
    X, labels = rows_and_labels(n_rows)
    network = opened(small_network(), X)
    recipe = Recipe(3, 10, learning_rate, 0.9, 5e-4)
    found = rates_of(lambda: train(network, data_of(X, labels), terms_of(l1, 0.02), recipe, seed=0))
    expected = 1e-6 + (learning_rate - 1e-6) * 0.5 * (
        1 + np.cos(np.pi * np.arange(n_steps) / n_steps)
    )
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == learning_rate


def test_a_learning_rate_below_the_final_one_stays(opened):
    X, labels = rows_and_labels(20)
    network = opened(small_network(), X)
    data, recipe = data_of(X, labels), Recipe(2, 10, 1e-8, 0.9, 0)
    assert rates_of(lambda: train(network, data, terms_of(l1), recipe, seed=0)) == [1e-8] * 4


# Records


def test_the_record_of_one_batch_is_what_numpy_computes_before_the_step(opened):
    X, labels = rows_and_labels(30)
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    recipe = Recipe(1, 64, 0.1, 0.9, 5e-4)
    data = data_of(X, labels[:24], outliers=range(24, 30))
    (record,) = train(network, data, terms_of(l1_over_l2, 0.3, 0.5, 2.0), recipe, seed=0)

    hidden, logits = numpy_forward(parameters, X[:24])
    ratio = numpy_penalty("l1_over_l2", hidden)
    loss_args = (X[:24], labels[:24], X[24:], "l1_over_l2")
    assert record.pop("seconds") >= 0
    assert record == pytest.approx(
        {
            "epoch": 1,
            "loss": numpy_loss(parameters, *loss_args, 0.3, 0.5),
            "cross_entropy": numpy_loss(parameters, *loss_args, 0, 0),
            "penalty": ratio.mean(),
            "outlier": numpy_uniformity(numpy_forward(parameters, X[24:])[1]).mean(),
            "distillation": 0.0,
            "accuracy": np.mean(logits.argmax(axis=1) == labels[:24]),
            "mean_l1": np.abs(hidden).sum(axis=1).mean(),
            "hoyer_index": ((math.sqrt(6) - ratio) / (math.sqrt(6) - 1)).mean(),
            "id_energy": -np.log(np.exp(logits).sum(axis=1)).mean(),
        },
        rel=1e-6,
        abs=1e-9,
    )


def test_records_are_means_over_the_rows_of_an_epoch(opened):
    X, labels = rows_and_labels(32)
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    hidden, logits = numpy_forward(parameters, X[:23])
    others = numpy_uniformity(numpy_forward(parameters, X[23:])[1])
    # Batches of 10, 10 and 3 with all outliers each, and steps too small to matter.
    data, terms = data_of(X, labels[:23], range(23, 32)), terms_of(l1, 0.5, 0.2)
    history = train(network, data, terms, Recipe(2, 10, 1e-30, 0.9, 0), seed=0)
    assert [record["epoch"] for record in history] == [1, 2]
    for record in history:
        assert record["mean_l1"] == pytest.approx(np.abs(hidden).sum(axis=1).mean(), rel=1e-6)
        assert record["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels[:23]))
        assert record["outlier"] == pytest.approx(others.mean(), rel=1e-6)
        assert record["loss"] == pytest.approx(
            record["cross_entropy"] + 0.5 * record["penalty"] + 0.2 * record["outlier"], rel=1e-9
        )


def test_records_are_made_in_training_mode(opened):
    X, labels = rows_and_labels(50)
    network = opened(nn.Sequential(nn.Dropout(0.5), small_network()).double(), np.abs(X))
    (record,) = train(
        network, data_of(np.abs(X), labels), terms_of(l1), Recipe(1, 50, 1e-30, 0, 0), seed=0
    )
    hidden, _ = numpy_forward(parameters_of(network.module), np.abs(X))
    assert abs(record["mean_l1"] / np.abs(hidden).sum(axis=1).mean() - 1) > 1e-3


def test_after_each_epoch_the_record_is_shown_in_evaluation_mode(opened):
    X, labels = rows_and_labels()
    network = opened(regularized_network(), X)
    shown = []

    def show(progress):
        assert not network.module.training
        shown.append(progress.history[-1])

    data, recipe = data_of(X, labels), Recipe(3, 16, 0.1, 0.9, 0)
    history = train(network, data, terms_of(l1), recipe, seed=0, after_epoch=show)
    assert shown == history
    assert len(history) == 3
    assert not any(part.training for part in network.module.modules())


# Distillation


def test_the_network_before_training_teaches_in_evaluation_mode_on_the_same_batches(
    opened, monkeypatch
):
    X, labels = rows_and_labels()
    network = opened(regularized_network(), X)
    before = copy.deepcopy(network)
    seen, taught = [], []
    divergence = Distillation.__call__

    def augment(batch, generator, share):
        seen.append(batch + torch.rand(batch.shape, generator=generator))
        return Augmented(seen[-1], None)

    def spy(term, batch):
        taught.append(divergence(term, batch).detach())
        assert torch.equal(batch.inputs, seen[-1][: len(batch.labels)])
        logits = before.logits(batch.inputs).detach().double().numpy()
        expected = numpy_divergence(logits, batch.logits.detach().double().numpy())
        np.testing.assert_allclose(taught[-1], expected, rtol=1e-3, atol=1e-6)
        return divergence(term, batch)

    monkeypatch.setattr(Distillation, "__call__", spy)
    data = data_of(X, labels[:32], outliers=range(32, 40))
    recipe = Recipe(3, 8, 0.1, 0.9, 0)
    train(network, data, terms_of(l1, 0.1, 0.5, 1.0), recipe, augment=augment, seed=0)
    assert len(taught) == len(seen) == 12
    assert taught[-1].mean() > 0.01


def test_networks_that_write_into_their_input_learn_what_others_learn(opened):
    X, labels = rows_and_labels()
    layers = small_network()
    trained = []
    for in_place in (False, True):
        network = opened(InPlace(copy.deepcopy(layers), in_place), X)
        terms = terms_of(l1, 0.1, distillation_weight=5.0)
        train(network, data_of(X, labels), terms, Recipe(2, 8, 0.1, 0.9, 0), seed=0)
        trained.append(network.module)
    assert_same_weights(*trained)


# Interrupted


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_training_that_goes_on_ends_as_one_in_one_go(opened, done):
    X, labels = rows_and_labels()
    module = regularized_network()
    data, recipe = data_of(X, labels[:32], range(32, 40)), Recipe(3, 8, 0.1, 0.9, 0.01)

    def terms():
        return terms_of(l1_over_l2, 0.1, 0.5, 1.0)

    kept = []
    whole = opened(module, X)
    history = train(
        whole,
        data,
        terms(),
        recipe,
        seed=0,
        after_epoch=lambda progress: kept.append(copy.deepcopy(progress)),
    )
    network, further = opened(module, X), []
    found = train(
        network, data, terms(), recipe, seed=0, resume=kept[done - 1], after_epoch=further.append
    )
    assert_same_weights(network.module, whole.module)
    assert len(further) == 3 - done
    assert [{**record, "seconds": 0} for record in found] == [
        {**record, "seconds": 0} for record in history
    ]
    assert not network.module.training


# The seed


IMAGES = np.random.RandomState(0).rand(48, 2, 6, 6).astype(np.float32)


def image_network():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8, N_CLASSES),
    )


def run_on_images(opened, module, seed, augment="flip-crop", compiled=False):
    network = opened(module, IMAGES, compiled=compiled)
    labels = np.arange(36) % N_CLASSES
    data = data_of(IMAGES, labels, outliers=range(36, 48))
    history = train(
        network,
        data,
        terms_of(l1, 0.02, 0.5),
        Recipe(2, 16, 0.05, 0.9, 5e-4),
        augment=get_augment(augment),
        seed=seed,
    )
    return network.module, [{**record, "seconds": 0} for record in history]


def test_the_seed_decides_bitwise_whatever_the_global_generators_hold(opened, generator_states):
    module = image_network()
    first, first_history = run_on_images(opened, module, seed=0)
    torch.manual_seed(123)
    np.random.seed(123)
    before = generator_states()
    second, second_history = run_on_images(opened, module, seed=0)
    assert generator_states() == before
    assert_same_weights(first, second)
    assert first_history == second_history


@pytest.mark.parametrize("what", ["order", "dropout"])
def test_another_seed_draws_otherwise(opened, what):
    module = image_network()
    if what == "order":
        module[5].p = 0.0
    weights = []
    for seed in (0, 1):
        network = opened(module, IMAGES)
        recipe = Recipe(1, 16 if what == "order" else 48, 0.1, 0.9, 0)
        data = data_of(IMAGES, np.arange(48) % N_CLASSES)
        train(network, data, terms_of(l1), recipe, seed=seed)
        weights.append(network.module[0].weight.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-5


def test_augmentation_draws_anew_for_every_batch_and_every_seed(opened):
    def run(seed):
        found = []

        def augment(batch, generator, share):
            found.append(torch.rand(1, generator=generator).item())
            return Augmented(batch, None)

        data = data_of(IMAGES, np.arange(48) % N_CLASSES)
        network = opened(image_network(), IMAGES)
        recipe = Recipe(2, 16, 0.1, 0.9, 0)
        train(network, data, terms_of(l1), recipe, augment=augment, seed=seed)
        return found

    draws = run(0) + run(1)
    assert len(set(draws)) == len(draws) == 12
    assert run(0) == draws[:6]


def test_trainings_in_threads_are_the_same_as_one_after_the_other(opened):
    module = image_network()
    expected = [run_on_images(opened, module, seed=seed)[0] for seed in range(4)]
    start = threading.Barrier(4)

    def run(seed):
        start.wait(timeout=30)
        return run_on_images(opened, module, seed=seed)[0]

    with ThreadPoolExecutor(4) as pool:
        for found, own in zip(pool.map(run, range(4)), expected, strict=True):
            assert_same_weights(found, own)


@pytest.mark.parametrize("precision", [Precision(None, None), Precision(torch.bfloat16, None)])
def test_autocast_around_the_training_does_not_matter(opened, precision):
    module = image_network()
    trained = []
    for enabled in (False, True):
        network = opened(module, IMAGES)
        network.precision = precision
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            data, recipe = data_of(IMAGES, np.arange(48) % N_CLASSES), Recipe(2, 16, 0.1, 0.9, 0)
            train(network, data, terms_of(l1), recipe, seed=0)
        trained.append(network.module)
    assert_same_weights(*trained)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_mode_the_caller_is_in(opened, mode):
    module = image_network()
    expected, _ = run_on_images(opened, module, seed=0)
    with mode(), reproducible(0, torch.device("cpu")):
        assert_same_weights(run_on_images(opened, module, seed=0)[0], expected)


def test_reproducible_gives_the_generators_back_after_an_error(generator_states):
    def draw_and_fail():
        with reproducible(5, torch.device("cpu")):
            torch.rand(3)
            raise ZeroDivisionError

    before = generator_states()
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert generator_states() == before


def test_reproducible_seeds_what_is_drawn_inside():
    draws = []
    for _ in range(2):
        torch.rand(1)
        with reproducible(5, torch.device("cpu")):
            draws.append(torch.rand(3))
    assert torch.equal(*draws)


# What is trained


@pytest.mark.parametrize("n_rows", [9, 17])
def test_a_last_batch_of_one_row_does_not_break_batch_norm(opened, n_rows):
    X, labels = rows_and_labels(n_rows)
    network = opened(regularized_network(), X)
    data = data_of(X, labels, outliers=())
    history = train(network, data, terms_of(l1, 0.02), Recipe(2, 8, 0.1, 0.9, 0), seed=0)
    assert len(history) == 2
    assert network.module[1].num_batches_tracked == 2 * (n_rows // 8)


def test_batches_of_one_row_are_all_used(opened):
    X, labels = rows_and_labels(5)
    network = opened(small_network(), X)
    data, recipe = data_of(X, labels), Recipe(1, 1, 0.1, 0.9, 0)
    assert len(rates_of(lambda: train(network, data, terms_of(l1), recipe, seed=0))) == 5


def test_frozen_parameters_stay_and_the_others_move(opened):
    X, labels = rows_and_labels()
    module = small_network()
    module[0].weight.requires_grad_(False)
    network = opened(module, X)
    train(network, data_of(X, labels), terms_of(l1, 0.1), Recipe(2, 8, 0.1, 0.9, 0.1), seed=0)
    moved = {
        name: not torch.equal(parameter, module.get_parameter(name))
        for name, parameter in network.module.named_parameters()
    }
    assert moved == {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": True}
    assert not network.module[0].weight.requires_grad


def test_a_frozen_body_keeps_its_statistics_and_trains_on_single_rows(opened):
    X, labels = rows_and_labels(5)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).requires_grad_(False)
    network = opened(nn.Sequential(body, nn.Linear(6, N_CLASSES)).double(), X)
    before = copy.deepcopy(network.module.state_dict())
    train(network, data_of(X, labels), terms_of(l1), Recipe(1, 1, 0.1, 0.9, 0), seed=0)
    after = network.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"1.weight", "1.bias"}


class Embedded(nn.Module):
    """A classifier of tokens."""

    def __init__(self, sparse, of_layer=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6, sparse=sparse and of_layer)
        self.sparse, self.head = sparse, nn.Linear(6, N_CLASSES)

    def forward(self, x):
        if self.embedding.sparse:
            return self.head(self.embedding(x.long()).mean(dim=1))
        hidden = nn.functional.embedding(x.long(), self.embedding.weight, sparse=self.sparse)
        return self.head(hidden.mean(dim=1))


@pytest.mark.parametrize("of_layer", [False, True])
def test_sparse_embeddings_train_as_dense_ones(opened, of_layer):
    X = np.random.RandomState(0).randint(10, size=(40, 3)).astype(np.float32)
    labels = np.arange(40) % N_CLASSES
    weights = []
    for sparse in (False, True):
        network = opened(Embedded(sparse, of_layer), X)
        recipe = Recipe(2, 8, 0.1, 0.9, 0.01)
        train(network, data_of(X, labels), terms_of(l1, 0.1), recipe, seed=0)
        weights.append(network.module.state_dict())
    assert all(torch.allclose(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_to_train_is_refused_with_what_to_do(opened):
    X, labels = rows_and_labels()
    network = opened(small_network().requires_grad_(False), X)
    with pytest.raises(ValueError, match=r"no parameter with requires_grad=True.*max_epochs=0"):
        train(network, data_of(X, labels), terms_of(l1), Recipe(1, 8, 0.1, 0.9, 0), seed=0)


def test_the_rows_named_are_the_rows_trained_on(opened):
    X, labels = rows_and_labels()
    picked = np.array([31, 4, 12, 7, 29, 0])
    module = small_network()
    recipe = Recipe(2, 4, 0.1, 0.9, 0)
    poisoned = np.full_like(X, np.nan)
    poisoned[picked] = X[picked]
    network, expected = opened(module, X), opened(module, X)
    rows = as_rows(poisoned)
    data = TrainingData(rows.pick(picked), labels[picked], rows.pick(np.arange(0)))
    train(network, data, terms_of(l1, 0.1), recipe, seed=0)
    alone = data_of(X[picked], labels[picked])
    train(expected, alone, terms_of(l1, 0.1), recipe, seed=0)
    assert_same_weights(network.module, expected.module)


def test_outliers_without_a_weight_are_not_read(opened):
    X, labels = rows_and_labels(20)
    X[14:] = np.nan
    module = small_network()
    recipe = Recipe(2, 4, 0.1, 0.9, 0)
    network, expected = opened(module, X[:14]), opened(module, X[:14])
    train(network, data_of(X, labels[:14], range(14, 20)), terms_of(l1, 0.1), recipe, seed=0)
    train(expected, data_of(X, labels[:14]), terms_of(l1, 0.1), recipe, seed=0)
    assert_same_weights(network.module, expected.module)


def test_outliers_are_pulled_towards_the_uniform_prediction(opened):
    X, labels = rows_and_labels(60)
    X[40:] += 4
    module = small_network()

    def mean_confidence(outlier_weight):
        network = opened(module, X)
        data = data_of(X, labels[:40], range(40, 60))
        objective = terms_of(l1, 0.0, outlier_weight)
        train(network, data, objective, Recipe(60, 20, 0.05, 0.9, 0), seed=0)
        logits = numpy_forward(parameters_of(network.module), X[40:])[1]
        return np.exp(numpy_log_softmax(logits)).max(axis=1).mean()

    assert mean_confidence(2.0) < 0.5 < mean_confidence(0.0)


def test_augmentation_reaches_rows_and_outliers_but_not_the_labels(opened):
    X, labels = rows_and_labels(20)
    network = opened(small_network(), X)
    seen = []

    def augment(batch, generator, share):
        seen.append(len(batch))
        return Augmented(batch, None)

    data = data_of(X, labels[:14], range(14, 20))
    train(network, data, terms_of(l1, 0, 0.5), Recipe(1, 7, 0.1, 0, 0), augment=augment, seed=0)
    assert seen == [7 + 6, 7 + 6]


def test_bfloat16_trains_float32_weights_and_computes_the_loss_in_float32(opened):
    seen = []

    def penalty(features):
        seen.append(features.dtype)
        return l1(features)

    histories = {}
    for dtype in (torch.bfloat16, None):
        network = opened(image_network(), IMAGES)
        network.precision = Precision(dtype, None)
        data = data_of(IMAGES, np.arange(48) % N_CLASSES)
        (record,) = train(network, data, terms_of(penalty, 0.1), Recipe(1, 48, 0.1, 0, 0), seed=0)
        histories[dtype] = record["loss"]
        assert {p.dtype for p in network.module.parameters()} == {torch.float32}
        torch.manual_seed(0)
    assert seen == [torch.float32] * 2
    assert histories[torch.bfloat16] != histories[None]


@pytest.mark.parametrize("n_rows", [1, 10, 300, 1000, 2432, 50_000])
def test_pretraining_is_sized_in_steps_where_there_are_few_rows(n_rows):
    recipe = pretraining_recipe(n_rows, 128, None)
    steps = -(-n_rows // 128)
    fewest = next(n for n in range(10_000) if n * steps >= PRETRAINING_STEPS)
    assert recipe.epochs == max(PRETRAINING_EPOCHS, fewest)
    assert recipe.batch_size == 128


@pytest.mark.parametrize("epochs", [0, 7])
def test_pretraining_lasts_as_long_as_the_user_says(epochs):
    assert pretraining_recipe(300, 128, epochs).epochs == epochs


# Divergence


@pytest.mark.parametrize(
    ("weight", "remedy"),
    [(0.0, r"Lower learning_rate \(now 1e\+20\)"), (0.5, r"Lower sparsity_weight \(now 0\.5\) or")],
)
@pytest.mark.parametrize("n_rows", [40, 8])
def test_a_loss_that_is_no_number_names_its_epoch_and_the_parameter(opened, n_rows, weight, remedy):
    # With 8 rows the only step of the epoch has a finite loss, and ruins the weights.
    X, labels = rows_and_labels(n_rows)
    network = opened(small_network().float(), X)
    recipe = Recipe(3, 8, 1e20, 0.9, 0)
    with pytest.raises(DivergenceError, match=rf"in epoch 1\b.*{remedy}"):
        train(network, data_of(X, labels), terms_of(l1, weight), recipe, seed=0)
    assert not network.module.training


def test_the_epoch_of_a_later_divergence_is_named(opened):
    X, labels = rows_and_labels()
    network = opened(small_network(), X)
    calls = []

    def penalty(features):
        calls.append(1)
        return l1(features) * (math.nan if len(calls) > 10 else 1)

    # Five steps an epoch.
    with pytest.raises(DivergenceError, match=r"The loss is nan in epoch 3 .*penalty nan"):
        train(
            network, data_of(X, labels), terms_of(penalty, 0.1), Recipe(5, 8, 0.1, 0.9, 0), seed=0
        )


def test_an_infinite_loss_is_a_divergence(opened):
    X, labels = rows_and_labels()
    network = opened(small_network(), X)
    objective = terms_of(lambda features: l1(features) * math.inf, 0.1)
    with pytest.raises(DivergenceError, match=r"The loss is inf in epoch 1"):
        train(network, data_of(X, labels), objective, Recipe(1, 64, 1e-30, 0, 0), seed=0)


def test_scores_that_collapse_name_their_epoch_and_the_parameter(opened):
    X, labels = rows_and_labels(200)
    network = opened(small_network(hidden=32), X)
    recipe = Recipe(30, 50, 0.01, 0.9, 0)
    message = (
        r"scores collapsed to a constant in epoch \d+: .*"
        r"Lower sparsity_weight \(now 50\) or learning_rate \(now 0\.01\)"
    )
    history = []
    with pytest.raises(DivergenceError, match=message) as raised:
        train(
            network,
            data_of(X, labels),
            terms_of(l1, 50.0),
            recipe,
            seed=0,
            after_epoch=lambda progress: history.append(progress.history[-1]),
        )
    assert f"epoch {len(history) + 1}:" in str(raised.value)
    energies = np.log(np.exp(numpy_forward(parameters_of(network.module), X)[1]).sum(axis=1))
    assert np.ptp(energies) < 0.01


def test_a_moderate_weight_does_not_collapse(opened):
    X, labels = rows_and_labels(200)
    network = opened(small_network(hidden=32), X)
    recipe = Recipe(30, 50, 0.01, 0.9, 0)
    assert len(train(network, data_of(X, labels), terms_of(l1, 0.02), recipe, seed=0)) == 30


def test_sparsity_weight_makes_features_sparse(opened):
    X, labels = rows_and_labels(200)
    module = small_network(hidden=32)

    def last_record(penalty, weight):
        network = opened(module, X)
        recipe = Recipe(20, 50, 0.05, 0.9, 0)
        return train(network, data_of(X, labels), terms_of(penalty, weight), recipe, seed=0)[-1]

    assert last_record(l1, 0.05)["mean_l1"] < 0.8 * last_record(l1, 0.0)["mean_l1"]
    sparse, plain = last_record(l1_over_l2, 0.3), last_record(l1_over_l2, 0.0)
    assert sparse["hoyer_index"] > plain["hoyer_index"] + 0.05


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_no_numbers_are_refused_whatever_the_loss(opened, bounded, value):
    X, labels = rows_and_labels(40)
    module = small_network()
    network = opened(nn.Sequential(nn.Hardtanh(), module) if bounded else module, X)
    X[31, 2] = value
    with pytest.raises(ValueError, match="first in row 31"):
        train(network, data_of(X, labels), terms_of(l1), Recipe(1, 16, 0.01, 0.9, 0.0), seed=0)


# Memory, and the smallest steps


class Crowded(nn.Module):
    """Has memory to train on a number of rows at a time."""

    def __init__(self, network, most):
        super().__init__()
        self.network = network
        self.most = most

    def forward(self, x):
        if self.training and len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.network(x)


@pytest.mark.parametrize(("most", "n_outliers"), [(15, 0), (19, 10)])
def test_a_step_without_memory_is_refused_with_the_batch_size_to_lower(opened, most, n_outliers):
    X, labels = rows_and_labels(40)
    network = opened(Crowded(regularized_network(), most), X)
    data = data_of(X, labels[: 40 - n_outliers], range(40 - n_outliers, 40))
    terms = terms_of(l1, 0.02, outlier_weight=0.5 if n_outliers else 0.0)
    message = (
        r"^cpu has no memory for a training step at batch_size=16, of which it holds 16 rows: "
        r"pass a smaller one\.$"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(network, data, terms, Recipe(1, 16, 0.01, 0.9, 0.0), seed=0)
    smaller = Recipe(1, 9 if n_outliers else 15, 0.01, 0.9, 0.0)
    assert train(opened(Crowded(regularized_network(), most), X), data, terms, smaller, seed=0)


class FrozenBatchNorm(nn.Sequential):
    """Keeps its batch-norm in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.eval()
        return self


def frozen_batch_norm():
    return FrozenBatchNorm(*regularized_network())


@pytest.mark.parametrize(
    ("make", "n_ranks", "n_rows", "batch_size", "message"),
    [
        (small_network, 1, 1, 8, None),
        (small_network, 1, 8, 1, None),
        (regularized_network, 1, 8, 2, None),
        (regularized_network, 1, 8, 1, r"batch_size=1 on 8 training rows .* batch-norm cannot"),
        (regularized_network, 1, 1, 8, r"batch_size=8 on 1 training rows .* and more rows"),
        (small_network, 2, 8, 2, None),
        (small_network, 2, 8, 1, r"leaves some of 2 processes without rows: .* needs 2,"),
        (small_network, 3, 2, 8, r"leaves some of 3 processes without rows: .* needs 3,"),
        (frozen_batch_norm, 1, 8, 1, None),
        (frozen_batch_norm, 2, 8, 2, None),
        (regularized_network, 2, 8, 4, None),
        (regularized_network, 2, 8, 3, r"batch_size=3 on 8 .* together needs 4,"),
        (regularized_network, 2, 3, 8, r"batch_size=8 on 3 .* together needs 4,"),
    ],
)
def test_a_step_needs_rows_for_all_processes_and_two_on_each_for_batch_norm(
    opened, make, n_ranks, n_rows, batch_size, message
):
    X, labels = rows_and_labels(10)
    network = opened(make(), X)
    data = dataclasses.replace(data_of(X, labels[:n_rows]), ranks=Ranks(0, n_ranks))
    recipe = Recipe(1, batch_size, 0.1, 0.9, 0)
    if message is None:
        Training(network, data, terms_of(l1), recipe, seed=0)
        return
    with pytest.raises(ValueError, match=message):
        Training(network, data, terms_of(l1), recipe, seed=0)


@pytest.mark.parametrize(("n_outliers", "n_ranks"), [(0, 1), (1, 2)])
def test_every_process_needs_an_outlier_if_they_are_trained_on(opened, n_outliers, n_ranks):
    X, labels = rows_and_labels(20)
    network = opened(small_network(), X)
    data = data_of(X, labels[:16], range(16, 16 + n_outliers))
    data = dataclasses.replace(data, ranks=Ranks(0, n_ranks))
    recipe = Recipe(1, 8, 0.1, 0.9, 0)
    Training(network, data, terms_of(l1, 0.1), recipe, seed=0)
    with pytest.raises(ValueError, match=rf"^{n_outliers} outliers leave some of {n_ranks} "):
        Training(network, data, terms_of(l1, 0.1, outlier_weight=0.5), recipe, seed=0)
