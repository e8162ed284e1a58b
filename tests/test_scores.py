from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone

from skood.scores import (
    SCORES,
    Energy,
    MaxLogit,
    MaxSoftmax,
    apply_score,
    get_score,
    list_scores,
)


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


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, None, "1"])
def test_energy_refuses_a_temperature_that_is_not_a_positive_number(temperature):
    with pytest.raises(ValueError, match=r"Energy.temperature=.*; pass a positive number"):
        applied(Energy(temperature), random_logits())


def test_max_softmax_is_the_largest_probability():
    logits = random_logits()
    expected = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
    assert applied(MaxSoftmax(), logits) == pytest.approx(expected, rel=1e-12)


def test_max_logit_is_the_largest_logit():
    logits = random_logits()
    assert applied(MaxLogit(), logits).tolist() == logits.max(axis=1).tolist()


@pytest.mark.parametrize("name", ["energy", "max_logit", "msp", "odin"])
def test_every_score_of_logits_is_an_estimator_that_is_higher_for_confident_rows(name):
    score = clone(get_score(name))
    scores = apply_score(
        score, torch.ones(2, 3), torch.tensor([[9.0, 0, 0], [1, 0, 0]], dtype=torch.float64)
    )
    assert scores.dtype == torch.float64
    assert scores[0] > scores[1]


def test_scores_are_listed_and_found_by_name():
    assert list_scores() == sorted(SCORES)
    for name, kind in {"energy": Energy, "msp": MaxSoftmax, "max_logit": MaxLogit}.items():
        assert type(get_score(name)) is kind


def test_a_score_object_is_cloned_with_its_parameters():
    given = Energy(temperature=3.0)
    score = get_score(given)
    assert score is not given
    assert score.get_params() == {"temperature": 3.0}


def test_a_function_is_taken_as_it_is():
    def score(features, logits):
        return logits[:, 0]

    assert get_score(score) is score


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"score_function='entropy' is unknown; .*'energy'"):
        get_score("entropy")


@pytest.mark.parametrize("score", [Energy, 3, None])
def test_what_cannot_score_a_batch_is_refused(score):
    with pytest.raises(TypeError, match="is not callable on a batch"):
        get_score(score)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (torch.zeros(3, 1), r"\(3, 1\)"),
        (torch.zeros(2), r"\(2,\)"),
        (torch.tensor(0.0), r"\(\)"),
        (np.zeros(3), "ndarray"),
    ],
)
def test_a_score_must_give_one_value_a_row(result, shown):
    with pytest.raises(ValueError, match=rf"returned {shown} for logits of shape \(3, 4\)"):
        apply_score(lambda features, logits: result, None, torch.zeros(3, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_must_be_finite(value):
    def score(features, logits):
        return torch.tensor([0.0, value, 0.0])

    with pytest.raises(ValueError, match="returned NaN or infinity"):
        apply_score(score, None, torch.zeros(3, 4))
