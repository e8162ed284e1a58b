from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made import refusal
from scipy.special import softmax

from skood.scores import Energy, Gen, MaxLogit, MaxSoftmax, Odin


def random_logits(n_rows=6, n_classes=4, scale=3.0):
    return np.random.RandomState(0).randn(n_rows, n_classes) * scale


def applied(score, logits):
    return score(None, torch.tensor(logits, dtype=torch.float64)).numpy()


@pytest.mark.parametrize("temperature", [0.1, 1, 2.5, 1000.0])
def test_energy_is_the_scaled_log_sum_of_exponentials(temperature):
    logits = random_logits()
    expected = [temperature * math.log(sum(math.exp(z / temperature) for z in r)) for r in logits]
    assert applied(Energy(temperature), logits) == pytest.approx(expected, rel=1e-12)


def test_energy_neither_overflows_nor_vanishes():
    logits = np.array([[1e4, 0.0], [-1e4, -1e4], [1e4, 1e4]])
    expected = [1e4, -1e4 + math.log(2), 1e4 + math.log(2)]
    assert applied(Energy(), logits) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, None, "1", True])
def test_energy_refuses_a_temperature_that_is_not_a_positive_number(temperature):
    with pytest.raises(ValueError, match=refusal("Energy", "temperature", temperature)):
        applied(Energy(temperature), random_logits())


def test_max_softmax_is_the_largest_probability():
    logits = random_logits()
    expected = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
    assert applied(MaxSoftmax(), logits) == pytest.approx(expected, rel=1e-12)


def test_max_logit_is_the_largest_logit():
    logits = random_logits()
    assert applied(MaxLogit(), logits).tolist() == logits.max(axis=1).tolist()


# GEN: Liu et al. 2023, equations 3 and 4


@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("n_largest", [1, 3, 7, 100])
def test_gen_is_the_generalized_entropy_of_the_largest_probabilities(gamma, n_largest):
    logits = random_logits(n_classes=7)
    largest = np.sort(softmax(logits, axis=1), axis=1)[:, ::-1][:, :n_largest]
    expected = -((largest * (1 - largest)) ** gamma).sum(axis=1)
    assert applied(Gen(gamma, n_largest), logits) == pytest.approx(expected, rel=1e-12)


def test_gen_tells_confident_rows_apart():
    # 1 - p of the first is 1e-35 times 2, which a difference of float64 rounds to 0.
    found = applied(Gen(), np.array([[80.0, 0.0, 0.0], [60.0, 0.0, 0.0]]))
    expected = [-(2 * math.exp(-z) ** 0.1 + (2 * math.exp(-z)) ** 0.1) for z in (80, 60)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] > found[1]


def test_gen_is_finite_however_sure_the_network_is():
    assert applied(Gen(), np.array([[1e6, 0.0], [0.0, -1e300]])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, None, "0.1"])
def test_gen_refuses_an_exponent_out_of_range(value):
    with pytest.raises(ValueError, match=refusal("Gen", "gamma", value)):
        applied(Gen(value), random_logits())


@pytest.mark.parametrize("value", [0, 2.5, None, "all", True])
def test_gen_refuses_a_number_of_probabilities_that_is_no_count(value):
    with pytest.raises(ValueError, match=refusal("Gen", "n_largest", value)):
        applied(Gen(n_largest=value), random_logits())


# ODIN: liang2018, equations 1 and 2, worked out for a multilayer perceptron


class Perceptron:
    """One hidden layer of ReLU units, in NumPy and in torch."""

    def __init__(self, seed=0):
        random = np.random.RandomState(seed)
        self.first, self.second = random.randn(8, 5), random.randn(3, 8)
        self.shift, self.bias = random.randn(8), random.randn(3)

    def logits(self, x):
        return np.maximum(x @ self.first.T + self.shift, 0) @ self.second.T + self.bias

    def gradient(self, x, temperature):
        """Of the logarithm of the largest probability at a temperature."""
        on = x @ self.first.T + self.shift > 0
        z = self.logits(x) / temperature
        by_logit = (np.eye(3)[z.argmax(axis=1)] - softmax(z, axis=1)) / temperature
        return (by_logit @ self.second * on) @ self.first

    def __call__(self, x):
        first, second, shift, bias = (
            torch.from_numpy(a) for a in (self.first, self.second, self.shift, self.bias)
        )
        return torch.relu(x @ first.T + shift) @ second.T + bias


@pytest.mark.parametrize("temperature", [1, 10.0, 1000])
@pytest.mark.parametrize("magnitude", [0.0014, 0.5])
def test_odin_steps_along_the_sign_of_the_gradient_of_the_winner(temperature, magnitude):
    network, x = Perceptron(), np.random.RandomState(1).randn(50, 5)
    score = Odin(temperature, magnitude)
    batch = torch.tensor(x, requires_grad=True)
    step = score.perturbation(network(batch), batch)
    gradient = network.gradient(x, temperature)
    np.testing.assert_allclose(step.numpy(), magnitude * np.sign(gradient))
    moved = x + magnitude * np.sign(gradient)
    found = applied(score, network.logits(moved))
    np.testing.assert_allclose(
        found, softmax(network.logits(moved) / temperature, axis=1).max(axis=1), rtol=1e-12
    )
    # As it is meant to: surer than before.
    if magnitude < 0.01:
        assert (found > applied(score, network.logits(x))).all()


def test_the_step_of_odin_does_not_depend_on_other_rows():
    network, x = Perceptron(), torch.tensor(np.random.RandomState(1).randn(9, 5))
    steps = []
    for rows in (x, x[:1], torch.cat([x[:1], 100 * x])):
        rows = rows.clone().requires_grad_()
        steps.append(Odin().perturbation(network(rows), rows)[0])
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


@pytest.mark.parametrize("how", ["none", "detached", "rounded to integers"])
def test_odin_refuses_logits_without_a_gradient_to_the_input(how):
    batch, parameter = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    logits = {
        "none": batch.detach(),
        "detached": batch.detach() * parameter,
        "rounded to integers": batch.long() * parameter,
    }[how]
    with pytest.raises(ValueError, match=r'"odin" needs the gradient .* Pass another score'):
        Odin().perturbation(logits, batch)
