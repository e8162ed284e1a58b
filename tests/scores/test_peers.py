"""Every score against pytorch-ood 0.4, in which higher means further out: each is minus ours."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from contexts import default_dtype
from made import fitted, scores_of, usual
from pytorch_ood import detector as peers
from torch.nn import functional as F

from skood.scores import (
    Dice,
    Energy,
    Gen,
    Knn,
    MaxLogit,
    MaxSoftmax,
    Odin,
    ReAct,
    Scale,
    Vim,
    list_scores,
)


@pytest.fixture
def _float64_by_default():
    with default_dtype(torch.float64):
        yield


def assert_agree(ours, theirs, scale=None):
    """To 1e-4, relative to each value, or to the largest of what it is the difference of."""
    theirs = np.asarray(theirs)
    atol = 0 if scale is None else 1e-4 * float(scale)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
def test_energy(case, temperature):
    theirs = peers.EnergyBased.score(case.new.logits, t=temperature)
    assert_agree(scores_of(Energy(temperature), case), -theirs)


def test_max_softmax_and_max_logit(case):
    assert_agree(scores_of(MaxSoftmax(), case), -peers.MaxSoftmax.score(case.new.logits))
    assert_agree(scores_of(MaxLogit(), case), -peers.MaxLogit.score(case.new.logits))


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("n_largest", [2, 100])
def test_gen(gamma, n_largest):
    # Theirs is a mean, of probabilities not below 1e-7.
    case = usual()
    theirs = peers.GEN.score(case.new.logits, gamma=gamma, M=n_largest)
    ours = scores_of(Gen(gamma, n_largest), case)
    np.testing.assert_allclose(ours, -theirs * min(n_largest, 4), rtol=1e-4, atol=2.0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_dice(case, sparsity):
    peer = peers.DICE(None, case.head.weight, case.head.bias, sparsity)
    peer.fit_features(case.fit.features, case.fit.labels)  # in float32
    assert_agree(
        scores_of(Dice(sparsity), case),
        -peer.predict_features(case.new.features),
        scale=case.new.logits.abs().max(),
    )


@pytest.mark.parametrize("percentile", [50, 90, 99])
def test_react(case, percentile):
    # Theirs is a share.
    peer = peers.ReAct(None, case.head, percentile=percentile / 100)
    peer.fit_feature_maps(case.fit.features, case.fit.labels)
    assert_agree(scores_of(ReAct(percentile), case), -peer.predict_feature_maps(case.new.features))


@pytest.mark.parametrize("percentile", [50, 65, 85])
def test_scale(case, percentile):
    # Theirs is a share, takes maps (n, d, 1, 1), and divides zero by zero in a row of zeros.
    varied = case.new.features.any(dim=1)
    peer = peers.SCALE(None, lambda maps: case.head(maps.flatten(1)), percentile / 100)
    theirs = peer.predict_feature_maps(case.new.features[varied, :, None, None])
    assert_agree(scores_of(Scale(percentile), case)[varied.numpy()], -theirs)


@pytest.mark.parametrize("k", [1, 50])
def test_knn(case, k):
    peer = peers.KNN(None, k).fit_features(case.fit.features, case.fit.labels)
    peer.knn.n_jobs = 1
    # Ours keeps a float32 bank, which tells between equal rows alone.
    np.testing.assert_allclose(
        scores_of(Knn(k), case), -peer.predict_features(case.new.features), rtol=1e-4, atol=1e-7
    )


@pytest.mark.usefixtures("_float64_by_default")  # in which theirs computes
def test_mahalanobis(case):
    # Theirs has the scatter matrix n Sigma where ours has Sigma, and half of the square: 1 / (2 n)
    # of ours. It adds 1e-6 to the diagonal, which features a thousand times as large make small,
    # but not in directions without any scatter, which ours leaves out. It wants classes 0 to c - 1.
    features, _, labels, _ = case.fit
    varied = features.std(dim=0) > 0
    labels = labels.unique(return_inverse=True)[1]
    peer = peers.Mahalanobis(None).fit_features(1000 * features[:, varied], labels)
    theirs = -2 * len(labels) * peer.predict_features(1000 * case.new.features[:, varied])
    assert_agree(scores_of("mahalanobis", case), theirs)


@pytest.mark.usefixtures("_float64_by_default")
def test_mahalanobis_pp():
    # Theirs of features of length 1, as above: a thousand times as large, and with all features.
    case = usual()
    features, new = (F.normalize(rows) for rows in (case.fit.features, case.new.features))
    peer = peers.Mahalanobis(None).fit_features(1000 * features, case.fit.labels)
    theirs = -2 * len(features) * peer.predict_features(1000 * new)
    assert_agree(scores_of("mahalanobis++", case), theirs)


@pytest.mark.parametrize("n_components", [1, 3])
def test_vim(case, n_components):
    peer = peers.ViM(None, n_components, case.head.weight, case.head.bias)
    peer.fit_features(case.fit.features, case.fit.labels)  # in float32
    score = fitted(Vim(n_components), case)
    assert score.alpha_ == pytest.approx(peer.alpha, rel=1e-4)
    # The score is a difference, of which both parts may be large.
    ours = score(case.new.features, case.new.logits).numpy()
    theirs = -peer.predict_features(case.new.features)
    energies = torch.logsumexp(case.new.logits, dim=1)
    assert_agree(ours, theirs, scale=energies.abs().max())


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
@pytest.mark.parametrize("magnitude", [0.0014, 0.1])
def test_odin(digits, temperature, magnitude):
    module = copy.deepcopy(digits.module).double()
    peer = peers.ODIN(module, eps=magnitude, temperature=temperature)
    X = torch.tensor(np.concatenate([digits.X_test, np.random.RandomState(0).rand(100, 64)]))
    score, batch = Odin(temperature, magnitude), X.clone().requires_grad_()
    moved = X + score.perturbation(module(batch), batch)
    with torch.no_grad():
        ours = score(None, module(moved))
    # At a high temperature all probabilities are near 1 / K: what is above tells.
    assert_agree(ours - 0.1, -peer.predict(X) - 0.1)


def test_no_score_is_left_out():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    tested |= {"msp", "max_logit"}  # together
    tested |= {"mahalanobis++"}
    without_peer = {"direction_length", "layer_moments", "three_views", "two_views"}
    tested |= without_peer
    assert set(list_scores()) <= tested
