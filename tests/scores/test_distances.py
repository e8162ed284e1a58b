from __future__ import annotations

import numpy as np
import pytest
import torch
from made import AWKWARD, fitted, in_tight_clusters, made, relu_features, scores_of, usual
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from skood.exceptions import FewTrainingRowsWarning
from skood.scores import DirectionLength, Knn, Mahalanobis, MahalanobisPlusPlus, Outputs, Vim


def unit(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


# Nearest neighbours


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_is_the_distance_to_the_kth_row_of_length_one(case, k):
    # Sun et al. 2022: z = h / ||h||, -||z - z_(k)||.
    fit, new, *_ = case.arrays
    expected = -np.sort(cdist(unit(new), unit(fit)), axis=1)[:, k - 1]
    # The bank is float32, which tells in distances near zero alone.
    np.testing.assert_allclose(scores_of(Knn(k), case), expected, rtol=1e-4, atol=1e-7)


def test_knn_tells_small_distances_apart():
    case = in_tight_clusters()
    fit, new, *_ = case.arrays
    expected = np.sort(cdist(unit(new), unit(fit)), axis=1)[:, 2]
    assert np.median(expected) < 0.01
    np.testing.assert_allclose(-scores_of(Knn(3), case), expected, rtol=1e-4)


def test_knn_scores_any_number_of_rows_in_pieces(monkeypatch):
    case = usual()
    expected = scores_of("knn", case)
    monkeypatch.setattr("skood.scores.distances.QUERY_ROWS", 7)
    np.testing.assert_allclose(scores_of("knn", case), expected, rtol=1e-9)


def test_the_bank_of_knn_is_evenly_spaced():
    case = usual()
    bank = fitted(Knn(50, bank_size=100), case).bank_
    assert bank.dtype == torch.float64
    np.testing.assert_allclose(bank, unit(case.arrays[0])[::4], rtol=1e-6, atol=1e-7)


def test_knn_wants_as_many_rows_as_neighbours():
    with pytest.raises(ValueError, match=r"'n_neighbors' .* rows, 300\. Got 301 .* Pass fewer"):
        fitted(Knn(301), usual())
    with pytest.raises(ValueError, match=r"'bank_size' .* twice n_neighbors, 100\. Got 99 "):
        fitted(Knn(50, bank_size=99), usual())


# Mahalanobis


def test_mahalanobis_does_not_depend_on_the_scale_of_single_features():
    fit, new, weight, bias, labels = relu_features()
    scale = np.ones(fit.shape[1])
    scale[:3] = 1e6, 1e-4, 1e3
    expected = scores_of("mahalanobis", made(fit, new, weight, bias, labels))
    found = scores_of("mahalanobis", made(fit * scale, new * scale, weight / scale, bias, labels))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mahalanobis_warns_of_fewer_rows_than_features():
    fit, new, weight, bias, labels = relu_features()
    with pytest.warns(
        FewTrainingRowsWarning, match=r"20 training rows of \d classes for 2\d features, too few"
    ):
        fitted("mahalanobis", made(fit[:20], new, weight, bias, labels[:20]))


def mahalanobis(fit, labels, new):
    """Lee et al. 2018, equations 1 and 2, and the inverse on what varies."""
    means = np.stack([fit[labels == k].mean(axis=0) for k in np.unique(labels)])
    around = fit - means[np.searchsorted(np.unique(labels), labels)]
    inverse = np.linalg.pinv(around.T @ around / len(fit), rcond=1e-10, hermitian=True)
    away = new[:, None] - means
    return -np.einsum("nkd,de,nke->nk", away, inverse, away).min(axis=1)


def test_mahalanobis_is_the_distance_to_the_nearest_mean(case):
    fit, new, *_ = case.arrays
    expected = mahalanobis(fit, case.fit.labels.numpy(), new)
    np.testing.assert_allclose(scores_of("mahalanobis", case), expected, rtol=1e-6)


def test_mahalanobis_does_not_depend_on_the_units_or_on_the_origin():
    case = usual()
    fit, new, weight, bias = case.arrays
    other = made(1e3 * fit + 1e4, 1e3 * new + 1e4, weight, bias, case.fit.labels)
    found = scores_of("mahalanobis", other)
    np.testing.assert_allclose(found, scores_of("mahalanobis", case), rtol=1e-6)


def test_a_direction_that_never_varies_counts_for_nothing():
    case = AWKWARD["with_a_constant_feature"]()
    score = fitted("mahalanobis", case)
    assert score.whitening_.shape == (23, 24)
    moved = case.new.features.clone()
    moved[:, 3] += 100
    torch.testing.assert_close(
        score(moved, case.new.logits), score(case.new.features, case.new.logits)
    )


def test_a_class_that_does_not_occur_has_no_mean():
    assert len(fitted("mahalanobis", AWKWARD["with_an_absent_class"]()).means_) == 3


@pytest.mark.parametrize("rows", ["one", "equal", "one a class"])
def test_mahalanobis_refuses_features_that_do_not_vary_within_classes(rows):
    features, logits, labels, _ = usual().fit
    if rows == "one a class":
        outputs = Outputs(features[:4], logits[:4], torch.arange(4))
    else:
        n_rows = 1 if rows == "one" else 9
        outputs = Outputs(features[:1].repeat(n_rows, 1), logits[:n_rows], labels[:n_rows])
    with pytest.raises(ValueError, match='"mahalanobis" needs features that vary within'):
        Mahalanobis().fit([outputs])


# Mahalanobis++


def test_mahalanobis_pp_is_mahalanobis_of_features_of_length_one(case):
    # Mueller & Hein 2025, equation 6.
    fit, new, *_ = case.arrays
    expected = mahalanobis(unit(fit), case.fit.labels.numpy(), unit(new))
    np.testing.assert_allclose(scores_of("mahalanobis++", case), expected, rtol=1e-6)


def test_mahalanobis_pp_says_its_own_name():
    features, logits, labels, _ = usual().fit
    same = Outputs(torch.ones_like(features), logits, labels)
    with pytest.raises(ValueError, match=r'score_function="mahalanobis\+\+" needs features that'):
        MahalanobisPlusPlus().fit([same])


# Direction and length


def direction_and_length(rows):
    return np.hstack([unit(rows), np.log(np.linalg.norm(rows, axis=1, keepdims=True))])


def shrunk_distances(fit, labels, new, shrinkage):
    """Friedman 1989, equation 18: the target is one variance for the direction, one for length."""
    known = np.unique(labels)
    means = np.stack([fit[labels == k].mean(axis=0) for k in known])
    around = fit - means[np.searchsorted(known, labels)]
    covariance = around.T @ around / len(fit)
    width = fit.shape[1] - 1
    target = [np.trace(covariance[:-1, :-1]) / width] * width + [covariance[-1, -1]]
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.diag(target)
    away = new[:, None] - means
    return -np.einsum("nkd,de,nke->nk", away, np.linalg.inv(shrunk), away).min(axis=1)


@pytest.mark.parametrize("shrinkage", [0.01, 0.1, 0.9])
def test_direction_length_is_the_distance_under_a_shrunk_covariance(shrinkage):
    case = usual()
    fit, new = map(direction_and_length, case.arrays[:2])
    expected = shrunk_distances(fit, case.fit.labels.numpy(), new, shrinkage)
    np.testing.assert_allclose(scores_of(DirectionLength(shrinkage), case), expected, rtol=1e-9)


def test_direction_length_does_not_depend_on_the_unit_of_the_features():
    fit, new, weight, bias, labels = relu_features()
    expected = scores_of("direction_length", made(fit, new, weight, bias, labels))
    found = scores_of("direction_length", made(1e3 * fit, 1e3 * new, weight, bias, labels))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("score", ["knn", "mahalanobis++", "direction_length"])
@pytest.mark.parametrize("factor", [1e-14, 1e14])
def test_directions_do_not_depend_on_the_unit_of_the_features(score, factor):
    fit, new, weight, bias, labels = relu_features()
    expected = scores_of(score, made(fit, new, weight, bias, labels))
    found = scores_of(score, made(factor * fit, factor * new, weight, bias, labels))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_rows_far_longer_or_shorter_than_usual_score_low(factor):
    case = usual()
    score = fitted("direction_length", case)
    rows = case.fit.features
    lowest = score(rows, case.fit.logits).min()
    assert (score(factor * rows, case.fit.logits) < 3 * lowest).all()
    # Mahalanobis++ cannot tell.
    blind = fitted("mahalanobis++", case)
    torch.testing.assert_close(blind(factor * rows, rows), blind(rows, rows))


@pytest.mark.parametrize("n_zeros", [1, 3, 10])
def test_features_that_are_all_zero_do_not_blind_the_length(n_zeros):
    fit, new, weight, bias, labels = relu_features()
    fit[:n_zeros] = 0
    case = made(fit, new, weight, bias, labels)
    score = fitted("direction_length", case)
    rows = case.new.features
    lowest = score(case.fit.features[n_zeros:], case.fit.logits[n_zeros:]).min()
    assert (score(1e3 * rows, rows) < lowest).all()


def test_direction_length_takes_fewer_rows_than_features():
    fit, new, weight, bias, labels = relu_features()
    few = made(fit[:12], new, weight, bias, labels[:12])
    found = scores_of("direction_length", few)
    expected = shrunk_distances(
        direction_and_length(fit[:12]), labels[:12], direction_and_length(new), 0.1
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_features_of_one_length_are_judged_by_their_direction():
    fit, new, weight, bias, labels = relu_features()
    score = fitted("direction_length", made(unit(fit), unit(new), weight, bias, labels))
    rows = torch.as_tensor(unit(new))
    torch.testing.assert_close(score(1e3 * rows, rows), score(rows, rows))


def test_a_single_feature_is_judged_by_its_length():
    fit, _, weight, bias, labels = relu_features()
    fit = 1 + fit[:, :1]
    case = made(fit, [[2.0], [1e3]], weight[:, :1], bias, labels)
    near, far = scores_of("direction_length", case)
    assert near > -20 > -100 > far


def test_direction_length_refuses_features_that_do_not_vary_within_classes():
    features, logits, labels, _ = usual().fit
    same = Outputs(torch.ones_like(features), logits, labels)
    with pytest.raises(ValueError, match=r'score_function="direction_length" needs features that'):
        DirectionLength().fit([same])


# ViM


def vim(fit, new, weight, bias, n_components):
    """Wang et al. 2022: the log-odds against the virtual class, of a softmax over K + 1 logits."""
    origin = -np.linalg.pinv(weight) @ bias
    _, _, directions = np.linalg.svd(fit - origin, full_matrices=True)
    outside = directions[n_components:]
    residuals = [np.linalg.norm((rows - origin) @ outside.T, axis=1) for rows in (fit, new)]
    alpha = (fit @ weight.T + bias).max(axis=1).mean() / residuals[0].mean()
    logits = np.c_[new @ weight.T + bias, alpha * residuals[1]]
    log_probabilities = logits - logsumexp(logits, axis=1, keepdims=True)
    return logsumexp(log_probabilities[:, :-1], axis=1) - log_probabilities[:, -1]


@pytest.mark.parametrize("n_components", ["auto", 1, 3])
def test_vim_is_the_log_odds_against_the_virtual_class(case, n_components):
    fit, new, weight, bias = case.arrays
    n_resolved = fit.shape[1] // 2 if n_components == "auto" else n_components
    expected = vim(fit, new, weight, bias, n_resolved)
    found = scores_of(Vim(n_components), case)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("width", "expected"), [(2, 1), (24, 12), (767, 383), (768, 512), (2047, 512), (2048, 1000)]
)
def test_the_principal_space_has_the_dimension_of_the_paper(width, expected):
    assert Vim()._resolved(width) == expected


def test_vim_refuses_a_principal_space_that_holds_all():
    fit, new, weight, bias, labels = *usual().arrays, usual().fit.labels
    fit[:, 12:] = 0
    case = made(fit, new, np.where(np.arange(24) < 12, weight, 0), bias, labels)
    fitted(Vim(10), case)
    with pytest.raises(ValueError, match=r"13 directions explain all of the 24 .* smaller Vim"):
        fitted(Vim(13), case)


@pytest.mark.parametrize("n_components", ["auto", 1])
def test_vim_refuses_a_single_feature(n_components):
    features = np.random.RandomState(0).rand(50, 1)
    case = made(features, features, np.ones((2, 1)), np.zeros(2))
    with pytest.raises(ValueError, match='score_function="vim"'):
        fitted(Vim(n_components), case)


@pytest.mark.parametrize("score", [Knn(1), Mahalanobis()])
def test_one_feature_is_enough(score):
    features = np.random.RandomState(0).rand(50, 1)
    case = made(features, features, [[1.0], [-1.0]], [0.0, 1.0])
    assert np.isfinite(scores_of(score, case)).all()


def test_one_row_is_enough_for_its_neighbour():
    case = made([[3.0, 4.0]], [[3.0, 4.0], [4.0, -3.0]], np.eye(2), np.zeros(2))
    np.testing.assert_allclose(scores_of(Knn(1), case), [0, -np.sqrt(2)], atol=1e-7)
