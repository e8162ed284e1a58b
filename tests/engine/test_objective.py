from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import (
    N_CLASSES,
    numpy_divergence,
    numpy_forward,
    numpy_gradient,
    numpy_log_softmax,
    numpy_loss,
    numpy_penalty,
    numpy_uniformity,
)
from modules import InPlace
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import objective as module_of_objective
from skood.engine.hardware import Precision
from skood.engine.objective import (
    FINE_TUNING_TERMS,
    MEASURES,
    Counts,
    CrossEntropy,
    Distillation,
    Objective,
    Pass,
    Penalized,
    Term,
    Uniformity,
    fine_tuning_terms,
    pretraining_terms,
    weighted_by,
)
from skood.engine.training import Recipe, Training, TrainingData
from skood.penalties import l1, l1_over_l2
from skood.rows import as_rows

RANDOM = np.random.RandomState(0)
X, LABELS = RANDOM.randn(12, 4), RANDOM.randint(N_CLASSES, size=12)
OUTLIERS = RANDOM.randn(7, 4) * 3
PENALTIES = {"l1": l1, "l1_over_l2": l1_over_l2}


def small_network():
    """Two layers, whose penultimate features are non-negative."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, N_CLASSES)).double()


def parameters_of(module):
    return [p.detach().numpy().copy() for p in module.parameters()]


def weights(**given):
    return dict.fromkeys(("sparsity_weight", *FINE_TUNING_TERMS), 0.0) | given


def passed(network, labels=LABELS, outliers=OUTLIERS):
    """A batch after its forward, in which gradients are on."""
    inputs = torch.tensor(np.concatenate([X, outliers]))
    features, logits = network.seen(inputs)[:2]
    n = len(labels)
    return Pass(inputs[:n], features[:n], logits[:n], torch.tensor(labels), logits[n:])


def losses(network, terms, outliers=OUTLIERS):
    """The loss of all rows, after its backward pass, and the record."""
    for term in terms:
        term.start(network)
    batch = torch.tensor(np.concatenate([X, outliers]))
    counts = Counts(len(X), len(outliers))
    loss, record = Objective(network, terms)(batch, torch.tensor(LABELS), counts)
    if loss.requires_grad:
        loss.backward()
    return loss, {name: value.item() for name, value in record.items()}


# Terms, one by one


def test_cross_entropy(opened):
    network = opened(small_network(), X)
    _, logits = numpy_forward(parameters_of(network.module), X)
    expected = -numpy_log_softmax(logits)[np.arange(12), LABELS]
    found = CrossEntropy()(passed(network))
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty(opened, name):
    network = opened(small_network(), X)
    hidden, _ = numpy_forward(parameters_of(network.module), X)
    found = Penalized(PENALTIES[name], 0.3)(passed(network))
    np.testing.assert_allclose(found.detach(), numpy_penalty(name, hidden), rtol=1e-12)


def test_uniformity(opened):
    network = opened(small_network(), X)
    _, logits = numpy_forward(parameters_of(network.module), OUTLIERS)
    found = Uniformity(0.5)(passed(network))
    np.testing.assert_allclose(found.detach(), numpy_uniformity(logits), rtol=1e-12)


def test_uniformity_is_least_where_the_prediction_is_uniform():
    logits = torch.zeros(2, 5)
    logits[1, 0] = 1.0
    flat, tilted = Uniformity()(Pass(*[torch.zeros(0)] * 4, logits)).tolist()
    assert flat == pytest.approx(math.log(5))
    assert tilted > flat


def test_distillation(opened):
    network = opened(small_network(), X)
    term = Distillation(0.7)
    term.start(network)
    _, before = numpy_forward(parameters_of(network.module), X)
    np.testing.assert_allclose(term(passed(network)).detach(), np.zeros(12), atol=1e-12)
    with torch.no_grad():
        network.module[2].weight.mul_(-2)
    _, now = numpy_forward(parameters_of(network.module), X)
    found = term(passed(network))
    np.testing.assert_allclose(found.detach(), numpy_divergence(before, now), rtol=1e-12)
    assert found.detach().min() > 0.001


def test_the_gradient_of_distillation_is_the_difference_of_softened_predictions(opened):
    # d/dz T^2 KL(softmax(z' / T) || softmax(z / T)) = T (softmax(z / T) - softmax(z' / T)).
    network = opened(small_network(), X)
    term = Distillation(1.0)
    term.start(network)
    batch = passed(network)
    logits = (3 * batch.logits).detach().requires_grad_()
    term(batch._replace(logits=logits)).sum().backward()
    expected = 2 * (torch.softmax(logits / 2, dim=1) - torch.softmax(batch.logits / 2, dim=1))
    torch.testing.assert_close(logits.grad, expected.detach())
    assert all(p.grad is None for p in network.module.parameters())


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
    batch = Pass(torch.ones(5, 4), torch.ones(5, 4), *[torch.zeros(0)] * 3)
    with pytest.raises(ValueError, match=rf"penalty returned {shown} for .*Sum over dim=1"):
        Penalized(penalty, 1.0)(batch)


def test_a_penalty_must_give_floating_values():
    batch = Pass(torch.ones(5, 4), torch.ones(5, 4), *[torch.zeros(0)] * 3)
    with pytest.raises(TypeError, match=r"penalty returned torch\.int64 values"):
        Penalized(lambda features: features.long().sum(dim=1), 1.0)(batch)


# All together


@pytest.mark.parametrize("outlier_weight", [0.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.02, 1.5])
@pytest.mark.parametrize("name", PENALTIES)
def test_loss_and_its_gradient_follow_the_formula(opened, name, weight, outlier_weight):
    network = opened(small_network(), X)
    parameters = parameters_of(network.module)
    hidden = numpy_forward(parameters, X)[0]
    assert (hidden.sum(axis=1) > 0.01).all()
    terms = fine_tuning_terms(
        PENALTIES[name], weights(sparsity_weight=weight, outlier_weight=outlier_weight)
    )
    loss, record = losses(network, terms, OUTLIERS if outlier_weight > 0 else OUTLIERS[:0])

    args = (X, LABELS, OUTLIERS, name, weight, outlier_weight)
    assert loss.item() == pytest.approx(numpy_loss(parameters, *args), rel=1e-12)
    assert record["loss"] == loss.item()
    plain = (X, LABELS, OUTLIERS, name, 0.0, 0.0)
    assert record["cross_entropy"] == pytest.approx(numpy_loss(parameters, *plain), rel=1e-12)
    assert record["penalty"] == pytest.approx(numpy_penalty(name, hidden).mean(), rel=1e-12)
    for parameter, expected in zip(
        network.module.parameters(), numpy_gradient(parameters, *args), strict=True
    ):
        np.testing.assert_allclose(parameter.grad, expected, rtol=0, atol=1e-7)


def test_the_loss_is_the_weighted_sum_of_what_is_recorded(opened):
    network = opened(small_network(), X)
    terms = fine_tuning_terms(
        l1, weights(sparsity_weight=0.2, outlier_weight=0.5, distillation_weight=0.7)
    )
    for term in terms:
        term.start(network)
    with torch.no_grad():
        network.module[2].weight.mul_(-1)
    batch = torch.tensor(np.concatenate([X, OUTLIERS]))
    loss, record = Objective(network, terms)(batch, torch.tensor(LABELS), Counts(12, 7))
    assert [term.name for term in terms] == ["cross_entropy", "penalty", "outlier", "distillation"]
    total = sum(
        weight * record[name]
        for name, weight in [
            ("cross_entropy", 1),
            ("penalty", 0.2),
            ("outlier", 0.5),
            ("distillation", 0.7),
        ]
    )
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert not any(value.requires_grad for value in record.values())


def test_measures_are_means_over_the_rows(opened):
    network = opened(small_network(), X)
    hidden, logits = numpy_forward(parameters_of(network.module), X)
    _, record = losses(network, pretraining_terms())
    ratio = numpy_penalty("l1_over_l2", hidden)
    assert record["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == LABELS))
    assert record["mean_l1"] == pytest.approx(np.abs(hidden).sum(axis=1).mean())
    assert record["hoyer_index"] == pytest.approx(
        ((math.sqrt(6) - ratio) / (math.sqrt(6) - 1)).mean()
    )
    assert record["id_energy"] == pytest.approx(-np.log(np.exp(logits).sum(axis=1)).mean())


# Weights


def test_pretraining_is_cross_entropy_alone(opened):
    network = opened(small_network(), X)
    loss, record = losses(network, pretraining_terms())
    assert loss.item() == record["cross_entropy"]
    assert record["penalty"] == record["mean_l1"]


def test_a_term_without_a_weight_is_left_out_but_for_the_penalty():
    terms = fine_tuning_terms(l1, weights())
    assert [(term.name, term.weight) for term in terms] == [("cross_entropy", 1), ("penalty", 0)]


def test_each_term_has_a_parameter_of_the_detector_for_its_weight():
    assert FINE_TUNING_TERMS["outlier_weight"] is Uniformity
    assert FINE_TUNING_TERMS["distillation_weight"] is Distillation
    assert Penalized.parameter == "sparsity_weight"
    parameters = SparseEnergyOODDetector().get_params()
    names = set(MEASURES) | {"loss", "epoch", "phase", "seconds", "cross_entropy", "penalty"}
    for parameter, term in FINE_TUNING_TERMS.items():
        assert term.parameter == parameter
        assert parameters[parameter] == 0
        assert term.name not in names  # in a record of history_
        names.add(term.name)


class Refuses(Term):
    """A term that computes no gradient."""

    name = "refuses"

    def __call__(self, batch):
        assert not torch.is_grad_enabled()
        return batch.logits.square().sum(dim=1)


def test_a_term_of_weight_0_is_recorded_and_gives_no_gradient(opened):
    plain, other = opened(small_network(), X), opened(small_network(), X)
    other.module.load_state_dict(plain.module.state_dict())
    loss, record = losses(plain, [CrossEntropy()])
    with_others, found = losses(
        other, [CrossEntropy(), Refuses(0.0), Penalized(lambda h: math.nan * l1(h), 0.0)]
    )
    assert with_others.item() == loss.item()
    logits = numpy_forward(parameters_of(plain.module), X)[1]
    assert found["refuses"] == pytest.approx((logits**2).sum(axis=1).mean())
    assert math.isnan(found["penalty"])
    assert {name: found[name] for name in record} == record
    for own, expected in zip(other.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(own.grad, expected.grad)


# A term of one's own


@pytest.fixture
def further_term(monkeypatch):
    """A term that is added to fine-tuning, beside those that exist."""
    monkeypatch.setattr(module_of_objective, "FINE_TUNING_TERMS", dict(FINE_TUNING_TERMS))

    @weighted_by("spread_weight")
    class Spread(Term):
        """Squares of the logits."""

        name = "spread"

        def __call__(self, batch):
            return batch.logits.square().sum(dim=1)

    return Spread


def test_a_term_that_is_added_shows_in_the_record_and_in_the_gradient(opened, further_term):
    network, plain = opened(small_network(), X), opened(small_network(), X)
    plain.module.load_state_dict(network.module.state_dict())
    terms = fine_tuning_terms(l1, weights(spread_weight=0.3))
    assert [term.name for term in terms] == ["cross_entropy", "penalty", "spread"]
    assert further_term.parameter == "spread_weight"
    loss, record = losses(network, terms)
    losses(plain, fine_tuning_terms(l1, weights(spread_weight=0.0)))

    hidden, logits = numpy_forward(parameters_of(network.module), X)
    assert record["spread"] == pytest.approx((logits**2).sum(axis=1).mean(), rel=1e-12)
    assert loss.item() == pytest.approx(record["cross_entropy"] + 0.3 * record["spread"])
    for found, expected, gradient in zip(
        list(network.module.parameters())[2:],
        list(plain.module.parameters())[2:],
        (2 * logits.T @ hidden / 12, 2 * logits.mean(axis=0)),
        strict=True,
    ):
        np.testing.assert_allclose(found.grad - expected.grad, 0.3 * gradient, rtol=1e-10)


def test_a_term_that_is_added_shows_in_the_history_and_in_the_remedy(opened, further_term):
    network = opened(small_network(), X)
    rows = as_rows(X)
    data = TrainingData(rows, LABELS, rows.pick(np.arange(0)))
    terms = fine_tuning_terms(l1, weights(spread_weight=0.3))
    (record, _) = Training(network, data, terms, Recipe(2, 5, 0.01, 0.9, 0), seed=0).run()
    assert record["spread"] > 0
    terms = fine_tuning_terms(l1, weights(spread_weight=1e30))
    with pytest.raises(RuntimeError, match=r"Lower spread_weight \(now 1e\+30\) or learning_rate"):
        Training(network, data, terms, Recipe(2, 5, 1e9, 0.9, 0), seed=0).run()


# Counts


@pytest.mark.parametrize("split", [(5, 3), (11, 6), (12, 7)])
def test_parts_of_a_batch_add_up_to_the_whole(opened, split):
    network, whole = opened(small_network(), X), opened(small_network(), X)
    whole.module.load_state_dict(network.module.state_dict())

    def terms():
        made = fine_tuning_terms(
            l1_over_l2, weights(sparsity_weight=0.3, outlier_weight=0.5, distillation_weight=1.0)
        )
        for term in made:
            term.start(network)
        return made

    loss, record = losses(whole, terms())
    objective, sums = Objective(network, terms()), dict.fromkeys(record, 0.0)
    for rows, outliers in [
        (slice(0, split[0]), slice(0, split[1])),
        (slice(split[0], 12), slice(split[1], 7)),
    ]:
        batch = torch.tensor(np.concatenate([X[rows], OUTLIERS[outliers]]))
        # The rows of the whole, by the number of processes; gradients are averaged over these.
        part, found = objective(batch, torch.tensor(LABELS[rows]), Counts(12 / 2, 7 / 2))
        (part / 2).backward()
        for name, value in found.items():
            sums[name] += value.item() / 2
    assert sums == pytest.approx(record, rel=1e-12)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for own, expected in zip(network.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-12, atol=1e-14)


# The module


def test_it_shows_the_parameters_of_the_network_and_no_buffers(opened):
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    network = opened(module, X)
    objective = Objective(network, pretraining_terms())
    assert {id(p) for p in objective.parameters()} == {id(p) for p in network.module.parameters()}
    assert list(objective.buffers()) == []


class SeesInputs(Term):
    """A term that looks at the inputs."""

    name = "inputs"
    sees_inputs = True

    def __call__(self, batch):
        return batch.inputs.sum(dim=1) + 0 * batch.logits.sum(dim=1)


def test_terms_see_the_inputs_as_they_were(opened):
    layers = small_network()
    for in_place in (False, True):
        network = opened(InPlace(layers, in_place), X)
        terms = [CrossEntropy(), Distillation(5.0), SeesInputs(1.0)]
        _, record = losses(network, terms)
        assert record["distillation"] == pytest.approx(0, abs=1e-12)
        assert record["inputs"] == pytest.approx(X.sum(axis=1).mean())


def test_terms_are_computed_in_float32_where_the_network_runs_in_less(opened):
    network = opened(small_network().float(), X)
    network.precision = Precision(torch.bfloat16, None)
    seen = []

    class Seen(Term):
        name = "seen"

        def __call__(self, batch):
            seen.append({x.dtype for x in (batch.features, batch.logits, batch.outlier_logits)})
            return batch.logits.sum(dim=1)

    batch = torch.tensor(np.concatenate([X, OUTLIERS]), dtype=torch.float32)
    loss, _ = Objective(network, [Seen()])(batch, torch.tensor(LABELS), Counts(12, 7))
    assert seen == [{torch.float32}]
    assert loss.dtype == torch.float32
