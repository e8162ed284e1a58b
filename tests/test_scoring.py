"""What a network gives for rows: features, scores and predictions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from skood import scoring
from skood.penalties import l1
from skood.rows import as_rows
from skood.scores import Energy, Knn, apply_score

N_ROWS = 5000  # more than one piece


@pytest.fixture
def table():
    return np.random.RandomState(0).randn(N_ROWS, 6).astype(np.float32)


@pytest.fixture
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def by_hand(module, X):
    """Features and logits, float64, from the layers themselves."""
    with torch.no_grad():
        features = module[:2](torch.from_numpy(X))
        return features.double(), module[2](features).double()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_outputs_are_those_of_the_layers(opened, module, table):
    features, logits, _ = scoring.seen_of_all(opened(module, table), as_rows(table))
    expected = by_hand(module, table)
    close(features, expected[0])
    close(logits, expected[1])
    close(scoring.features_of(opened(module, table), as_rows(table)).double(), expected[0])


def test_scores_and_winners_go_with_their_rows(opened, module, table):
    _, logits = by_hand(module, table)
    scores, winners = scoring.outputs_of(opened(module, table), as_rows(table), Energy())
    np.testing.assert_allclose(scores, logits.logsumexp(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(winners, logits.argmax(dim=1))
    assert (scores.dtype, winners.dtype) == (np.float64, np.int64)
    alone = scoring.winners_of(opened(module, table), as_rows(table))
    np.testing.assert_array_equal(alone, winners)


def test_a_score_gets_features_only_if_it_uses_them(opened, module, table):
    class WithoutFeatures:
        uses_features = False

        def __call__(self, features, logits):
            assert features is None
            return logits[:, 0]

    scores, _ = scoring.outputs_of(opened(module, table), as_rows(table), WithoutFeatures())
    np.testing.assert_allclose(scores, by_hand(module, table)[1][:, 0], rtol=1e-5, atol=1e-6)


def test_passes_can_be_gone_through_again_and_carry_the_labels(opened, module, table):
    targets = np.arange(N_ROWS) % 3
    passes = scoring.Passes(opened(module, table), scoring.LabelledRows(as_rows(table), targets))
    for _ in range(2):
        pieces = list(passes)
        assert len(pieces) > 1
        features, logits, labels = map(torch.cat, zip(*pieces, strict=True))
        close(features, by_hand(module, table)[0])
        close(logits, by_hand(module, table)[1])
        assert labels.tolist() == targets.tolist()


def test_the_head_is_the_last_layer(opened, module, table):
    head = scoring.head_of(opened(module, table), as_rows(table))
    close(head.weight, module[2].weight.detach().double())
    close(head.bias, module[2].bias.detach().double())


def test_without_visible_features_there_are_logits(opened, module, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, by torch
        network = opened(torch.jit.script(module), table)
    features, logits, _ = scoring.seen_of_all(network, as_rows(table))
    assert features is None
    close(logits, by_hand(module, table)[1])


def test_a_score_of_the_gradient_needs_a_perturbation(opened, module, table):
    class Unmoved(Energy):
        uses_gradient = True

    with pytest.raises(TypeError, match=r"no method perturbation\(logits, batch\)"):
        scoring.outputs_of(opened(module, table), as_rows(table), Unmoved())


def test_what_looks_at_other_rows_is_refused(opened, module, table):
    network, rows = opened(module, table), as_rows(table)

    def centred(features, logits):
        return logits[:, 0] - logits[:, 0].mean()

    with pytest.raises(ValueError, match="score_function="):
        scoring.check_score(network, rows, centred)
    with pytest.raises(ValueError, match="penalty="):
        scoring.check_penalty(network, rows, lambda features: l1(features) / l1(features).mean())
    scoring.check_score(network, rows, Energy())
    scoring.check_penalty(network, rows, l1)


def test_a_score_may_know_the_rows_that_it_is_tried_on(opened, module, table):
    """At no distance from a row of its own it may round, which says nothing of others."""
    network, rows = opened(module, table), as_rows(table)
    targets = np.zeros(N_ROWS, dtype=int)
    score = Knn(n_neighbors=1).fit(
        list(scoring.Passes(network, scoring.LabelledRows(rows, targets))), None
    )
    scoring.check_score(network, rows, score)
    features, logits, _ = scoring.seen_of_all(network, rows)
    scores, _ = scoring.outputs_of(network, rows, score)
    np.testing.assert_allclose(scores, apply_score(score, features, logits), atol=1e-6)
