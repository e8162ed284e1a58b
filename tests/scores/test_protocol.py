from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from made import (
    fitted,
    layers_of,
    made,
    of_two_classes,
    picked,
    pieces,
    refusal,
    relu_features,
    scores_of,
    seen,
    statistics,
    usual,
)
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from skood.scores import (
    SCORES,
    Dice,
    Energy,
    Head,
    Knn,
    LayeredOutputs,
    MaxLogit,
    MaxSoftmax,
    Odin,
    ReAct,
    Scale,
    Vim,
    apply_score,
    fit_score,
    get_score,
    list_scores,
)
from skood.scores.protocol import Sample

WITH_STATISTICS = [name for name in list_scores() if hasattr(SCORES[name], "fit")]


# The registry


def test_scores_are_listed_and_found_by_name():
    assert list_scores() == sorted(SCORES)
    for name, kind in {"energy": Energy, "msp": MaxSoftmax, "max_logit": MaxLogit}.items():
        assert type(get_score(name)) is kind


def test_the_scores_are_among_these():
    expected = "dice energy knn mahalanobis max_logit msp odin react scale vim"
    assert set(expected.split()) <= set(list_scores())
    assert set(WITH_STATISTICS) <= set(list_scores())


def test_a_score_object_is_cloned_with_its_parameters():
    given = Energy(temperature=3.0)
    score = get_score(given)
    assert score is not given
    assert score.get_params() == {"temperature": 3.0}


def test_a_fitted_score_object_is_cloned_unfitted():
    given = fitted(ReAct(80), usual())
    score = get_score(given)
    assert score.get_params() == {"percentile": 80}
    assert not hasattr(score, "threshold_")
    assert hasattr(given, "threshold_")


def test_a_function_is_taken_as_it_is():
    def score(features, logits):
        return logits[:, 0]

    assert get_score(score) is score


def test_an_object_with_fit_is_copied():
    class Centre:
        def fit(self, outputs, head):
            self.centre = torch.cat([features for features, _, _ in outputs]).mean(dim=0)

        def __call__(self, features, logits):
            return -(features - self.centre).square().sum(dim=1)

    given, case = Centre(), usual()
    score = get_score(given)
    assert score is not given
    fit_score(score, pieces(case.fit, 50), lambda: pytest.fail("no head was asked for"))
    torch.testing.assert_close(score.centre, case.fit.features.mean(dim=0))
    assert not hasattr(given, "centre")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"score_function='entropy' is unknown; .*'energy'"):
        get_score("entropy")


@pytest.mark.parametrize("score", [Energy, Knn, 3, None, BaseEstimator()])
def test_what_cannot_score_a_batch_is_refused(score):
    with pytest.raises(TypeError, match="is not callable on a batch"):
        get_score(score)


# What a score gives


@pytest.mark.parametrize("name", list_scores())
def test_every_score_is_an_estimator_that_is_higher_for_confident_rows(name):
    case = usual()
    score = fitted(clone(get_score(name)), case)
    # In the middle of a class, and where no row is.
    centre = case.fit.features[case.fit.labels == 0].mean(dim=0)
    features = torch.stack([centre, torch.full_like(centre, 1e-3)])
    scores = apply_score(score, features, case.head(features), layers_of(features))
    assert scores.dtype == torch.float64
    assert scores[0] > scores[1]


@pytest.mark.parametrize("name", list_scores())
def test_every_score_gives_finite_float64_on_any_features(name, case):
    scores = scores_of(name, case)
    assert scores.shape == (len(case.new.labels),)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1


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


def test_a_score_must_be_real():
    with pytest.raises(TypeError, match="complex"):
        apply_score(lambda h, z: torch.zeros(3, dtype=torch.complex64), None, torch.zeros(3, 4))


# Parameters


OTHERS = {"auto": 3, "energy": "gen", "direction_length": "knn", "layer_moments": "vim"}


@pytest.mark.parametrize("name", list_scores())
def test_parameters_are_read_set_and_cloned(name):
    score = SCORES[name]()
    for parameter, value in score.get_params().items():
        other = OTHERS.get(value) or value + 1
        assert getattr(clone(score.set_params(**{parameter: other})), parameter) == other
    assert set(vars(score)) == set(score.get_params())


NOT_POSITIVE = [0, -1.0, math.nan, math.inf, None, "1", True]
NOT_A_COUNT = [0, -1, 2.5, math.nan, None, "3", True]
REFUSED = [
    *((Energy(value), "Energy.temperature") for value in NOT_POSITIVE),
    *((Odin(temperature=value), "Odin.temperature") for value in NOT_POSITIVE),
    *((Dice(value), "Dice.sparsity") for value in [0, 1, -0.1, 90, math.nan, None, "0.9"]),
    *((ReAct(value), "ReAct.percentile") for value in [0, 100, -1, math.nan, None, "90"]),
    *((Scale(value), "Scale.percentile") for value in [0, 100, -1, math.nan, None, "85"]),
    *((Knn(value), "Knn.n_neighbors") for value in [*NOT_A_COUNT, 1001]),
    *((Knn(bank_size=value), "Knn.bank_size") for value in [*NOT_A_COUNT, 99]),
    *((Vim(value), "Vim.n_components") for value in [*NOT_A_COUNT, 24, "all"]),
]


@pytest.mark.parametrize(("score", "parameter"), REFUSED, ids=str)
def test_parameters_out_of_range_are_refused_by_name(score, parameter):
    name, _, parameter = parameter.partition(".")
    with pytest.raises(ValueError, match=refusal(name, parameter, getattr(score, parameter))):
        scores_of(score, usual())


@pytest.mark.parametrize("magnitude", NOT_POSITIVE)
def test_the_step_of_odin_must_be_positive(magnitude):
    batch = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=refusal("Odin", "magnitude", magnitude)):
        Odin(magnitude=magnitude).perturbation(batch * 2, batch)


@pytest.mark.parametrize("score", [Dice(np.float32(0.5)), Knn(np.int64(5)), Vim(np.int32(5))])
def test_parameters_of_numpy_types_are_taken(score):
    assert np.isfinite(scores_of(score, usual())).all()


# Fitting


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("size", [1, 7, 64, 299])
def test_pieces_of_any_size_give_the_statistics_of_one(name, size):
    case = usual()
    whole, parts = fitted(name, case), fitted(name, case, size)
    for found, expected in zip(statistics(parts).values(), statistics(whole).values(), strict=True):
        if name == "mahalanobis":  # directions are found up to their sign
            found, expected = np.abs(found), np.abs(expected)
        if found.shape == (12, 24):  # and those of the residual space up to a rotation
            found, expected = found.T @ found, expected.T @ expected
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    values, expected = (seen(score, case.new) for score in (parts, whole))
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in WITH_STATISTICS if name != "three_views"])
def test_rows_are_read_once_at_most(name):
    case = usual()
    stream = pieces(case.fit, 40)
    fit_score(get_score(name), stream, lambda: case.head, lambda: [case.fit])
    # Scale needs a look at the first piece.
    assert len(list(stream)) == (7 if name == "scale" else 0)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_the_rows_given_are_not_changed(name):
    case = usual()
    before = copy.deepcopy(case)
    scores_of(name, case)
    for own, other in zip(case.fit + case.new, before.fit + before.new, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(case.head.weight, before.head.weight)
    assert torch.equal(case.head.bias, before.head.bias)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_fitting_twice_is_fitting_once(name):
    case = usual()
    once, twice = fitted(name, case), fitted(name, of_two_classes())
    held_out = LayeredOutputs(*(tensor[::3] for tensor in case.fit))
    fit_score(twice, [case.fit], lambda: case.head, lambda: [held_out])
    expected = statistics(once)
    assert expected
    for attribute, value in statistics(twice).items():
        assert np.array_equal(value, expected[attribute])


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
def test_statistics_travel_bitwise(name, copied):
    case = usual()
    score = fitted(name, case)
    other = copied(score)
    for own, value in zip(statistics(score).items(), statistics(other).items(), strict=True):
        assert own[0] == value[0]
        assert np.array_equal(own[1], value[1])
    assert torch.equal(seen(score, case.new), seen(other, case.new))


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_score_that_is_not_fitted_says_so(name):
    case = usual()
    with pytest.raises(NotFittedError, match=SCORES[name].__name__):
        seen(get_score(name), case.new)


@pytest.mark.parametrize("name", list_scores())
def test_a_row_is_scored_alone(name):
    case = usual()
    score = fitted(name, case)
    whole = seen(score, case.new)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    shuffled = seen(score, picked(case.new, order))
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-9, atol=1e-9)
    alone = [seen(score, picked(case.new, slice(i, i + 1))) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole[:5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list_scores())
@pytest.mark.parametrize("width", [9, 24, 33])  # after which the next row lies otherwise in memory
@pytest.mark.parametrize("n_classes", [3, 4])
def test_the_place_of_a_row_changes_no_bit_of_its_score(name, width, n_classes):
    case = made(*relu_features(width=width, n_classes=n_classes))
    score = fitted(name, case)
    whole = seen(score, case.new)
    for order in (np.arange(60)[::-1].copy(), np.roll(np.arange(60), 1), np.zeros(60, dtype=int)):
        assert torch.equal(seen(score, picked(case.new, order)), whole[order])


@pytest.mark.parametrize("name", list_scores())
def test_features_of_lower_precision_are_scored_in_float64(name):
    case = usual()  # whose features are float32 numbers
    score = fitted(name, case)
    lower = case.new._replace(features=case.new.features.float())
    assert torch.equal(seen(score, lower), seen(score, case.new))


@pytest.mark.parametrize("name", ["knn", "layer_moments", "react", "vim"])
def test_of_many_rows_a_sample_is_kept(name, monkeypatch):
    monkeypatch.setattr("skood.scores.activations.SAMPLED_VALUES", 20_000)
    monkeypatch.setattr("skood.scores.distances.SAMPLED_VALUES", 20_000)
    monkeypatch.setattr("skood.scores.distances.SAMPLED_ROWS", 800)
    case = usual()
    score = Knn(n_neighbors=50, bank_size=800) if name == "knn" else get_score(name)
    n_pieces = 400  # of 300 rows of 24 features: 23 MB in float64, of which 80 kB are kept

    def stream():
        for _ in range(n_pieces):
            yield LayeredOutputs(*(tensor.clone() for tensor in case.fit))

    kept = 0
    original = Sample.add

    def add(self, rows):
        nonlocal kept
        original(self, rows)
        kept = max(kept, sum(len(piece) for piece in self._rows))

    monkeypatch.setattr(Sample, "add", add)
    score.fit(stream(), case.head)
    assert 400 <= kept <= 834
    sizes = [value.size for value in statistics(score).values()]
    assert max(sizes) <= 800 * 24


# A sample of a stream


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize("n_rows", [1, 2, 6, 7, 8, 99, 100, 101, 1000])
@pytest.mark.parametrize("piece", [1, 3, 64, 5000])
def test_a_sample_is_evenly_spaced_and_of_the_size_asked_for(size, n_rows, piece):
    sample, rows = Sample(size), torch.arange(n_rows, dtype=torch.float64)[:, None]
    for some in rows.split(piece):
        sample.add(some)
    kept = sample.rows()[:, 0]
    assert kept.dtype == torch.float32
    assert min(n_rows, size / 2) <= len(kept) <= size
    steps = kept.diff().unique()
    assert kept[0] == 0
    assert len(steps) <= 1
    # The next row of the sample would be beyond the last.
    step = int(steps[0]) if len(steps) else n_rows
    assert kept[-1] + step >= n_rows


def test_an_empty_piece_changes_nothing():
    sample = Sample(10)
    for some in (torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0, 2)):
        sample.add(some)
    assert sample.rows().tolist() == [[1, 1]] * 3


# What moves between devices


def test_statistics_follow_the_features():
    for name in WITH_STATISTICS:
        case = usual()
        score = fitted(name, case)
        score._ready(case.new.features.to("meta"))
        tensors = [value for value in vars(score).values() if isinstance(value, torch.Tensor)]
        for head in (value for value in vars(score).values() if isinstance(value, Head)):
            tensors += [head.weight, head.bias]
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_head_is_affine():
    head = Head(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0]))
    assert head(torch.tensor([[1.0, 1.0]])).tolist() == [[3.5, -1.0]]
