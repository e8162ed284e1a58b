from __future__ import annotations

import numpy as np
import pytest
import torch
from made import fitted, made, scores_of, usual
from scipy.special import logsumexp

from skood.scores import Dice, Outputs, ReAct, Scale


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_dice_keeps_the_weights_that_contribute_most(case, sparsity):
    # Sun & Li 2022: V = E[h] * W elementwise, and of V the largest entries stay.
    fit, new, weight, bias = case.arrays
    contributions = (weight * fit.mean(axis=0)).ravel()
    rank = np.empty(contributions.size)
    rank[np.argsort(contributions)] = np.arange(contributions.size)
    kept = rank > sparsity * (contributions.size - 1)
    # Of equal contributions, such as those of dead features, all go or all stay.
    kept &= contributions > contributions[~kept].max()
    sparse = np.where(kept.reshape(weight.shape), weight, 0)
    expected = logsumexp(new @ sparse.T + bias, axis=1)
    np.testing.assert_allclose(scores_of(Dice(sparsity), case), expected, rtol=1e-9)


def test_dice_keeps_the_share_asked_for():
    case = usual()
    for sparsity in (0.25, 0.5, 0.75):
        kept = fitted(Dice(sparsity), case).head_.weight != 0
        assert kept.double().mean() == 1 - sparsity


@pytest.mark.parametrize("percentile", [10, 90.0, 99.9])
def test_react_clips_at_a_percentile_of_all_activations(case, percentile):
    # Sun, Guo & Li 2021: min(h, c), c the p-th percentile of the activations.
    fit, new, weight, bias = case.arrays
    ordered = np.sort(fit.ravel())
    place = percentile / 100 * (ordered.size - 1)
    below = int(place)
    bound = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
    score = fitted(ReAct(percentile), case)
    assert score.threshold_ == pytest.approx(bound, rel=1e-6)
    expected = logsumexp(np.minimum(new, bound) @ weight.T + bias, axis=1)
    found = score(case.new.features, case.new.logits).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("percentile", [10, 65, 85.0])
def test_scale_multiplies_by_the_exponential_of_the_ratio_of_sums(case, percentile):
    # Xu et al. 2024: r = sum of h over the sum of those above the p-th percentile; h exp(r).
    _, new, weight, bias = case.arrays
    expected = []
    for h in new:
        largest = np.sort(h)[round(percentile / 100 * len(h)) :]
        ratio = h.sum() / largest.sum() if largest.sum() > 0 else 0
        expected.append(logsumexp(weight @ (h * np.exp(ratio)) + bias))
    np.testing.assert_allclose(scores_of(Scale(percentile), case), expected, rtol=1e-9)


def test_scale_of_a_row_of_zeros_is_the_energy_of_the_bias():
    case = usual()
    score = fitted(Scale(), case)
    zeros = torch.zeros(1, 24).double()
    assert score(zeros, case.head(zeros)).item() == pytest.approx(
        torch.logsumexp(case.head.bias, dim=0).item()
    )


def test_scale_keeps_one_feature_at_least():
    case = made([[1.0, 3.0]], [[1.0, 3.0]], np.eye(2), np.zeros(2))
    ratio = 4 / 3
    expected = logsumexp(np.array([1, 3]) * np.exp(ratio))
    assert scores_of(Scale(99), case) == pytest.approx(expected)


def test_scale_refuses_negative_features():
    case = usual()
    outputs = Outputs(case.fit.features - 0.25, case.fit.logits, case.fit.labels)
    with pytest.raises(ValueError, match=r'"scale" .* at least 0.* down to -0.25\. Pass another'):
        Scale().fit([outputs], case.head)


@pytest.mark.parametrize("score", [Dice(), ReAct(), Scale(50)])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 24), (5, 1), (1, 1)])
def test_one_row_and_one_feature_are_enough(score, n_rows, width):
    features = np.random.RandomState(0).rand(n_rows, width)
    case = made(features, features, np.ones((2, width)), np.zeros(2))
    assert np.isfinite(scores_of(score, case)).all()
