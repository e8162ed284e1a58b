from __future__ import annotations

import copy
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from skood.engine.augmentation import get_augment
from skood.engine.hardware import Precision
from skood.engine.training import (
    PRETRAINING_EPOCHS,
    PRETRAINING_STEPS,
    DivergenceError,
    Objective,
    Recipe,
    TrainingData,
    loss_terms,
    pretraining_recipe,
    reproducible,
    train,
)
from skood.penalties import l1, l1_over_l2

N_CLASSES = 3


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def rows_and_labels(n_rows=40, width=4, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(n_rows, width), random.randint(N_CLASSES, size=n_rows)


def data_of(X, labels, outliers=()):
    return TrainingData(
        X, np.arange(len(labels)), np.asarray(labels), np.array(outliers, dtype=np.intp)
    )


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


# An independent implementation, in numpy


def numpy_forward(parameters, X):
    weight1, bias1, weight2, bias2 = parameters
    hidden = np.maximum(X @ weight1.T + bias1, 0)
    return hidden, hidden @ weight2.T + bias2


def numpy_log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def numpy_penalty(name, hidden):
    norm1 = np.abs(hidden).sum(axis=1)
    return norm1 if name == "l1" else norm1 / np.sqrt((hidden**2).sum(axis=1))


def numpy_loss(parameters, X, labels, outliers, name, weight, outlier_weight):
    hidden, logits = numpy_forward(parameters, X)
    cross_entropy = -numpy_log_softmax(logits)[np.arange(len(labels)), labels].mean()
    loss = cross_entropy + weight * numpy_penalty(name, hidden).mean()
    if outlier_weight > 0:
        log_probabilities = numpy_log_softmax(numpy_forward(parameters, outliers)[1])
        loss += outlier_weight * -(log_probabilities / N_CLASSES).sum(axis=1).mean()
    return loss


def numpy_gradient(parameters, *args):
    """Central differences in float64."""
    gradients = []
    for parameter in parameters:
        gradient = np.empty_like(parameter)
        for position in np.ndindex(parameter.shape):
            value, step = parameter[position], 1e-6
            parameter[position] = value + step
            above = numpy_loss(parameters, *args)
            parameter[position] = value - step
            below = numpy_loss(parameters, *args)
            parameter[position] = value
            gradient[position] = (above - below) / (2 * step)
        gradients.append(gradient)
    return gradients


PENALTIES = {"l1": l1, "l1_over_l2": l1_over_l2}


def numpy_divergence(parameters, X, taught, temperature=2.0):
    """Kullback-Leibler divergence of softened predictions from those taught."""
    before = numpy_log_softmax(taught / temperature)
    now = numpy_log_softmax(numpy_forward(parameters, X)[1] / temperature)
    return (np.exp(before) * (before - now)).sum(axis=1).mean()


def test_distillation_adds_the_divergence_from_the_logits_taught(opened):
    X, labels = rows_and_labels(12)
    network = opened(small_network(), X)
    taught = np.random.RandomState(2).randn(12, N_CLASSES) * 4
    outputs = network.features_and_logits(torch.tensor(X))
    objective = Objective(l1, 0.1, distillation_weight=0.7)
    loss, _, _ = loss_terms(*outputs, torch.tensor(labels), objective, torch.tensor(taught))
    parameters = parameters_of(network.module)
    expected = numpy_loss(parameters, X, labels, None, "l1", 0.1, 0.0)
    # Softened by T, gradients shrink by T squared, which the factor makes good.
    expected += 0.7 * 4 * numpy_divergence(parameters, X, taught)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_network_before_training_teaches_in_evaluation_mode_on_the_same_batches(opened):
    X, labels = rows_and_labels()
    before = opened(regularized_network(), X)
    network = copy.deepcopy(before)
    seen = []

    def augment(batch, generator, share):
        seen.append(batch + torch.rand(batch.shape, generator=generator))
        return seen[-1]

    def spy(features, logits, labels, objective, taught):
        assert torch.equal(taught, before.logits(seen[-1][: len(labels)]))
        return loss_terms(features, logits, labels, objective, taught)

    data = data_of(X[:32], labels[:32], outliers=range(32, 40))
    data = dataclasses.replace(data, X=X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skood.engine.training.loss_terms", spy)
        train(
            network,
            data,
            Objective(l1, 0.1, 0.5, distillation_weight=1.0),
            Recipe(3, 8, 0.1, 0.9, 0),
            augment=augment,
            seed=0,
        )
    assert len(seen) == 12


class InPlace(nn.Module):
    """Writes into its input, where the first layer is frozen so that it may."""

    def __init__(self, layers, in_place):
        super().__init__()
        self.layers, self.in_place = layers, in_place
        layers[0].requires_grad_(False)

    def forward(self, x):
        return self.layers(x.sub_(0.5) if self.in_place else x - 0.5)


def test_networks_that_write_into_their_input_learn_what_others_learn(opened):
    X, labels = rows_and_labels()
    layers = small_network()
    trained = []
    for in_place in (False, True):
        network = opened(InPlace(copy.deepcopy(layers), in_place), X)
        objective = Objective(l1, 0.1, distillation_weight=5.0)
        train(network, data_of(X, labels), objective, Recipe(2, 8, 0.1, 0.9, 0), seed=0)
        trained.append(network.module)
    assert_same_weights(*trained)


@pytest.mark.parametrize("outlier_weight", [0.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.02, 1.5])
@pytest.mark.parametrize("name", PENALTIES)
def test_loss_and_its_gradient_follow_the_formula(opened, name, weight, outlier_weight):
    X, labels = rows_and_labels(12)
    outliers = np.random.RandomState(1).randn(7, 4) * 3
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    assert (numpy_forward(parameters, X)[0].sum(axis=1) > 0.01).all()

    batch = np.concatenate([X, outliers]) if outlier_weight > 0 else X
    loss, cross_entropy, penalty = loss_terms(
        *network.features_and_logits(torch.tensor(batch)),
        torch.tensor(labels),
        Objective(PENALTIES[name], weight, outlier_weight),
    )
    loss.backward()

    args = (X, labels, outliers, name, weight, outlier_weight)
    assert loss.item() == pytest.approx(numpy_loss(parameters, *args), rel=1e-12)
    plain = (X, labels, outliers, name, 0.0, 0.0)
    assert cross_entropy.item() == pytest.approx(numpy_loss(parameters, *plain), rel=1e-12)
    hidden = numpy_forward(parameters, X)[0]
    assert penalty.item() == pytest.approx(numpy_penalty(name, hidden).mean(), rel=1e-12)
    for parameter, expected in zip(
        network.module.parameters(), numpy_gradient(parameters, *args), strict=True
    ):
        np.testing.assert_allclose(parameter.grad, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("penalty", "shown"),
    [
        (lambda features: features, r"\(5, 4\)"),
        (lambda features: features.sum(), r"\(\)"),
        (lambda features: l1(features)[:, None], r"\(5, 1\)"),
        (lambda features: 0.0, "float"),
    ],
)
def test_a_penalty_must_give_one_value_a_row(penalty, shown):
    with pytest.raises(ValueError, match=rf"penalty returned {shown} for .*Sum over dim=1"):
        loss_terms(
            torch.ones(5, 4),
            torch.ones(5, N_CLASSES),
            torch.zeros(5, dtype=torch.int64),
            Objective(penalty, 1.0),
        )


# Whole runs


def watching(X, batches):
    """An augmentation that changes nothing and notes which rows of X each batch holds."""
    numbers = {tuple(row): number for number, row in enumerate(X.tolist())}

    def augment(batch, generator, share):
        batches.append([numbers[tuple(row)] for row in batch.tolist()])
        return batch

    return augment


def cosine(recipe, n_steps):
    low, high = min(recipe.final_learning_rate, recipe.learning_rate), recipe.learning_rate
    return [low + (high - low) * (1 + math.cos(math.pi * t / n_steps)) / 2 for t in range(n_steps)]


def numpy_training(parameters, X, labels, batches, recipe, name, weight, outlier_weight):
    """Nesterov momentum as in Sutskever et al. (2013), in the form that torch uses."""
    velocities = [np.zeros_like(parameter) for parameter in parameters]
    for rows, rate in zip(batches, cosine(recipe, len(batches)), strict=True):
        inliers = [row for row in rows if row < len(labels)]
        outliers = [row for row in rows if row >= len(labels)]
        gradients = numpy_gradient(
            parameters, X[inliers], labels[inliers], X[outliers], name, weight, outlier_weight
        )
        for parameter, gradient, velocity in zip(parameters, gradients, velocities, strict=True):
            decayed = gradient + recipe.weight_decay * parameter
            velocity *= recipe.momentum
            velocity += decayed
            parameter -= rate * (decayed + recipe.momentum * velocity)
    return parameters


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
    objective, batches = Objective(PENALTIES[name], 0.1, outlier_weight), []
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
        Objective(l1, 0.1, 0.5),
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
    found = rates_of(
        lambda: train(network, data_of(X, labels), Objective(l1, 0.02), recipe, seed=0)
    )
    expected = 1e-6 + (learning_rate - 1e-6) * 0.5 * (
        1 + np.cos(np.pi * np.arange(n_steps) / n_steps)
    )
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == learning_rate


def test_a_learning_rate_below_the_final_one_stays(opened):
    X, labels = rows_and_labels(20)
    network = opened(small_network(), X)
    data, recipe = data_of(X, labels), Recipe(2, 10, 1e-8, 0.9, 0)
    assert rates_of(lambda: train(network, data, Objective(l1), recipe, seed=0)) == [1e-8] * 4


# Records


def test_the_record_of_one_batch_is_what_numpy_computes_before_the_step(opened):
    X, labels = rows_and_labels(30)
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    recipe = Recipe(1, 64, 0.1, 0.9, 5e-4)
    data = data_of(X, labels[:24], outliers=range(24, 30))
    (record,) = train(network, data, Objective(l1_over_l2, 0.3, 0.5), recipe, seed=0)

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
            "accuracy": np.mean(logits.argmax(axis=1) == labels[:24]),
            "mean_l1": np.abs(hidden).sum(axis=1).mean(),
            "hoyer_index": ((math.sqrt(6) - ratio) / (math.sqrt(6) - 1)).mean(),
            "id_energy": -np.log(np.exp(logits).sum(axis=1)).mean(),
        },
        rel=1e-6,
    )


def test_records_are_means_over_the_rows_of_an_epoch(opened):
    X, labels = rows_and_labels(23)
    network = opened(small_network(), X)
    hidden, logits = numpy_forward(parameters_of(network.module), X)
    # Batches of 10, 10 and 3, and steps too small to matter.
    history = train(
        network, data_of(X, labels), Objective(l1, 0.5), Recipe(2, 10, 1e-30, 0.9, 0), seed=0
    )
    assert [record["epoch"] for record in history] == [1, 2]
    for record in history:
        assert record["mean_l1"] == pytest.approx(np.abs(hidden).sum(axis=1).mean(), rel=1e-6)
        assert record["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
        assert record["loss"] == pytest.approx(
            record["cross_entropy"] + 0.5 * record["penalty"], rel=1e-9
        )


def test_records_are_made_in_training_mode(opened):
    X, labels = rows_and_labels(50)
    network = opened(nn.Sequential(nn.Dropout(0.5), small_network()).double(), np.abs(X))
    (record,) = train(
        network, data_of(np.abs(X), labels), Objective(l1), Recipe(1, 50, 1e-30, 0, 0), seed=0
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
    history = train(network, data, Objective(l1), recipe, seed=0, after_epoch=show)
    assert shown == history
    assert len(history) == 3
    assert not any(part.training for part in network.module.modules())


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
        Objective(l1, 0.02, 0.5),
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
        train(network, data, Objective(l1), recipe, seed=seed)
        weights.append(network.module[0].weight.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-5


def test_augmentation_draws_anew_for_every_batch_and_every_seed(opened):
    def run(seed):
        found = []

        def augment(batch, generator, share):
            found.append(torch.rand(1, generator=generator).item())
            return batch

        data = data_of(IMAGES, np.arange(48) % N_CLASSES)
        network = opened(image_network(), IMAGES)
        recipe = Recipe(2, 16, 0.1, 0.9, 0)
        train(network, data, Objective(l1), recipe, augment=augment, seed=seed)
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
            train(network, data, Objective(l1), recipe, seed=0)
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
    history = train(network, data, Objective(l1, 0.02), Recipe(2, 8, 0.1, 0.9, 0), seed=0)
    assert len(history) == 2
    assert network.module[1].num_batches_tracked == 2 * (n_rows // 8)


def test_batches_of_one_row_are_all_used(opened):
    X, labels = rows_and_labels(5)
    network = opened(small_network(), X)
    data, recipe = data_of(X, labels), Recipe(1, 1, 0.1, 0.9, 0)
    assert len(rates_of(lambda: train(network, data, Objective(l1), recipe, seed=0))) == 5


def test_frozen_parameters_stay_and_the_others_move(opened):
    X, labels = rows_and_labels()
    module = small_network()
    module[0].weight.requires_grad_(False)
    network = opened(module, X)
    train(network, data_of(X, labels), Objective(l1, 0.1), Recipe(2, 8, 0.1, 0.9, 0.1), seed=0)
    moved = {
        name: not torch.equal(parameter, module.get_parameter(name))
        for name, parameter in network.module.named_parameters()
    }
    assert moved == {"0.weight": False, "0.bias": True, "2.weight": True, "2.bias": True}
    assert not network.module[0].weight.requires_grad


def test_nothing_to_train_is_refused_with_what_to_do(opened):
    X, labels = rows_and_labels()
    network = opened(small_network().requires_grad_(False), X)
    with pytest.raises(ValueError, match=r"no parameter with requires_grad=True.*max_epochs=0"):
        train(network, data_of(X, labels), Objective(l1), Recipe(1, 8, 0.1, 0.9, 0), seed=0)


def test_the_rows_named_are_the_rows_trained_on(opened):
    X, labels = rows_and_labels()
    picked = np.array([31, 4, 12, 7, 29, 0])
    module = small_network()
    recipe = Recipe(2, 4, 0.1, 0.9, 0)
    poisoned = np.full_like(X, np.nan)
    poisoned[picked] = X[picked]
    network, expected = opened(module, X), opened(module, X)
    none = np.array([], dtype=np.intp)
    data = TrainingData(poisoned, picked, labels[picked], none)
    train(network, data, Objective(l1, 0.1), recipe, seed=0)
    alone = data_of(X[picked], labels[picked])
    train(expected, alone, Objective(l1, 0.1), recipe, seed=0)
    assert_same_weights(network.module, expected.module)


def test_outliers_without_a_weight_are_not_read(opened):
    X, labels = rows_and_labels(20)
    X[14:] = np.nan
    module = small_network()
    recipe = Recipe(2, 4, 0.1, 0.9, 0)
    network, expected = opened(module, X[:14]), opened(module, X[:14])
    train(network, data_of(X, labels[:14], range(14, 20)), Objective(l1, 0.1), recipe, seed=0)
    train(expected, data_of(X, labels[:14]), Objective(l1, 0.1), recipe, seed=0)
    assert_same_weights(network.module, expected.module)


def test_outliers_are_pulled_towards_the_uniform_prediction(opened):
    X, labels = rows_and_labels(60)
    X[40:] += 4
    module = small_network()

    def mean_confidence(outlier_weight):
        network = opened(module, X)
        data = data_of(X, labels[:40], range(40, 60))
        objective = Objective(l1, 0.0, outlier_weight)
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
        return batch

    data = data_of(X, labels[:14], range(14, 20))
    train(network, data, Objective(l1, 0, 0.5), Recipe(1, 7, 0.1, 0, 0), augment=augment, seed=0)
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
        (record,) = train(network, data, Objective(penalty, 0.1), Recipe(1, 48, 0.1, 0, 0), seed=0)
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
        train(network, data_of(X, labels), Objective(l1, weight), recipe, seed=0)
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
            network, data_of(X, labels), Objective(penalty, 0.1), Recipe(5, 8, 0.1, 0.9, 0), seed=0
        )


def test_an_infinite_loss_is_a_divergence(opened):
    X, labels = rows_and_labels()
    network = opened(small_network(), X)
    objective = Objective(lambda features: l1(features) * math.inf, 0.1)
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
            Objective(l1, 50.0),
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
    assert len(train(network, data_of(X, labels), Objective(l1, 0.02), recipe, seed=0)) == 30


def test_sparsity_weight_makes_features_sparse(opened):
    X, labels = rows_and_labels(200)
    module = small_network(hidden=32)

    def last_record(penalty, weight):
        network = opened(module, X)
        recipe = Recipe(20, 50, 0.05, 0.9, 0)
        return train(network, data_of(X, labels), Objective(penalty, weight), recipe, seed=0)[-1]

    assert last_record(l1, 0.05)["mean_l1"] < 0.8 * last_record(l1, 0.0)["mean_l1"]
    sparse, plain = last_record(l1_over_l2, 0.3), last_record(l1_over_l2, 0.0)
    assert sparse["hoyer_index"] > plain["hoyer_index"] + 0.05


# Memory


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


@pytest.mark.parametrize(("most", "n_outliers"), [(2, 0), (7, 0), (15, 0), (19, 10)])
def test_a_batch_without_memory_is_refused_with_the_largest_that_has(opened, most, n_outliers):
    X, labels = rows_and_labels(40)
    network = opened(Crowded(regularized_network(), most), X)
    outliers = range(40 - n_outliers, 40)
    data = data_of(X, labels[: 40 - n_outliers], outliers)
    objective = Objective(l1, 0.02, outlier_weight=0.5 if n_outliers else 0.0)
    # As many outliers as there are join the rows, up to their number.
    fits = most if n_outliers == 0 else most // 2
    message = f"no memory for a training step at batch_size=16, .* pass batch_size={fits}, the"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(network, data, objective, Recipe(1, 16, 0.01, 0.9, 0.0), seed=0)


def test_where_not_even_two_rows_have_memory_no_number_is_named(opened):
    X, labels = rows_and_labels(40)
    network = opened(Crowded(regularized_network(), 1), X)
    with pytest.raises(torch.OutOfMemoryError, match="16 rows: pass a smaller one"):
        train(network, data_of(X, labels), Objective(l1), Recipe(1, 16, 0.01, 0.9, 0.0), seed=0)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_no_numbers_are_refused_whatever_the_loss(opened, bounded, value):
    X, labels = rows_and_labels(40)
    module = small_network()
    network = opened(nn.Sequential(nn.Hardtanh(), module) if bounded else module, X)
    X[31, 2] = value
    with pytest.raises(ValueError, match="first in row 31"):
        train(network, data_of(X, labels), Objective(l1), Recipe(1, 16, 0.01, 0.9, 0.0), seed=0)
