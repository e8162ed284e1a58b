from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from made import fitted, made, pieces, relu_features, scores_of, seen, usual
from scipy.stats import logistic

from skood.scores import (
    Energy,
    Head,
    Knn,
    LayeredOutputs,
    Odin,
    Outputs,
    ThreeViews,
    TwoViews,
    Vim,
    fit_score,
    get_score,
)


def held_out(case):
    return LayeredOutputs(*(tensor[::3] for tensor in case.fit))


@pytest.mark.parametrize(
    ("first", "second"),
    [("energy", "direction_length"), ("gen", "knn"), ("react", "mahalanobis"), ("msp", "energy")],
)
def test_two_views_are_logarithms_of_logistic_p_values_added_up(first, second):
    case, expected = usual(), 0.0
    views = TwoViews(first, second)
    fit_score(views, [case.fit], lambda: case.head, lambda: [held_out(case)])
    for name in (first, second):
        score = fit_score(get_score(name), [case.fit], lambda: case.head)
        reference = score(*held_out(case)[:2]).numpy()
        values = score(*case.new[:2]).numpy()
        # The logistic distribution with the mean and the variance of the rows held out.
        scale = reference.std() * np.sqrt(3) / np.pi
        expected += logistic.logcdf(values, reference.mean(), scale)
    np.testing.assert_allclose(views(*case.new[:2]).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("of_layers", ["layer_moments", "knn"])
def test_three_views_are_logistic_in_the_lowest_quarter(of_layers):
    case, expected = usual(), 0.0
    score = fitted(ThreeViews(of_layers=of_layers), case)
    quartile = logistic.ppf(0.25)
    mean_below = logistic.expect(ub=quartile, conditional=True)
    for name in ("energy", "direction_length", of_layers):
        view = fitted(name, case)
        reference, values = seen(view, held_out(case)).numpy(), seen(view, case.new).numpy()
        of_rows = np.quantile(reference, 0.25)
        lowest = np.sort(reference)[: round(len(reference) / 4)]
        scale = (of_rows - lowest.mean()) / (quartile - mean_below)
        expected += logistic.logcdf(values, of_rows - scale * quartile, scale)
    np.testing.assert_allclose(seen(score, case.new).numpy(), expected, rtol=1e-9)
    assert score.uses_layers is (of_layers == "layer_moments")


@pytest.mark.parametrize("n_rows", [2, 5, 10, 11, 42])
def test_the_lowest_quarter_is_what_lies_below_the_quartile(n_rows):
    case = usual()
    few = LayeredOutputs(*(tensor[:n_rows] for tensor in case.fit))
    score = fit_score(ThreeViews(), [case.fit], lambda: case.head, lambda: [few])
    energy = seen(get_score("energy"), few).numpy()
    quartile = np.quantile(energy, 0.25)
    mean_below = (quartile - energy[energy < quartile]).mean()
    expected = logistic.std() * mean_below / (4 * np.log(4 / 3))
    assert float(score.deviations_[0]) == pytest.approx(expected)


def test_ties_at_the_quartile_do_not_widen_what_is_usual():
    """The mean of the lowest quarter is that of as many rows, also if many of them are alike."""
    case = usual()
    n_rows = len(held_out(case).labels)

    def alike(features, logits, n_below):
        energy = logits.logsumexp(dim=1)
        return -(energy < energy.sort().values[n_below]).double()

    for n_below in (1, n_rows // 10, n_rows // 5):
        score = fitted(ThreeViews(of_logits=partial(alike, n_below=n_below)), case)
        assert score.deviations_[0] == pytest.approx(
            logistic.std() * n_below / round(n_rows / 4) / (4 * np.log(4 / 3))
        )


def test_what_inner_layers_see_is_rejected_whatever_the_others_say():
    case = usual()
    strange = case.fit._replace(layers=10 * case.fit.layers)
    before, after = (seen(fitted("three_views", case), of) for of in (case.fit, strange))
    assert (after < before.min()).all()
    two = fitted("two_views", case)
    assert torch.equal(seen(two, strange), seen(two, case.fit))


def test_no_energy_makes_up_for_features_that_lie_far_away():
    case = usual()
    rows = case.fit.features
    usual_scores = fitted("two_views", case)(rows, case.head(rows))
    assert (Energy()(None, case.head(1e4 * rows)) > 1e3).any()
    far = fitted("two_views", case)(1e4 * rows, case.head(1e4 * rows))
    assert (far < usual_scores.min()).all()


def test_a_low_energy_tells_where_features_lie_near():
    case = usual()
    near, logits = case.fit.features, case.fit.logits
    score = fitted("two_views", case)
    assert (score(near, logits - 1000) < score(near, logits).min()).all()


def test_scores_are_given_as_objects_too():
    case = usual()
    views = TwoViews(Energy(2.0), Knn(3))
    assert views.get_params()["of_features__n_neighbors"] == 3
    by_object = scores_of(views, case)
    views.set_params(of_features__n_neighbors=30)
    assert not np.array_equal(scores_of(views, case), by_object)
    assert not hasattr(views.of_features, "bank_")  # the user's own is not fitted


def test_a_function_may_be_a_view():
    case = usual()
    score = fitted(TwoViews(of_logits=lambda features, logits: logits.amax(dim=1)), case)
    expected = scores_of(TwoViews(of_logits="max_logit"), case)
    np.testing.assert_allclose(score(*case.new[:2]), expected)


@pytest.mark.parametrize(
    ("views", "needed"),
    [(("energy", "knn"), False), (("energy", "vim"), True), (("react", "knn"), True)],
)
def test_the_head_is_asked_for_if_a_view_needs_it(views, needed):
    assert TwoViews(*views).uses_head is needed


def test_rows_held_out_are_needed():
    case = usual()
    with pytest.raises(ValueError, match=r"not trained on. Pass held_out, a callable"):
        fit_score(TwoViews(), [case.fit], lambda: case.head)
    with pytest.raises(ValueError, match="outputs is empty"):
        fit_score(TwoViews(), [case.fit], lambda: case.head, lambda: [])


def test_a_stream_that_is_gone_after_one_pass_is_refused_for_two_that_are_fitted():
    case = usual()
    for views in (TwoViews("energy", "knn"), TwoViews("msp", "vim")):
        fit_score(views, pieces(case.fit, 50), lambda: case.head, lambda: [held_out(case)])
    with pytest.raises(ValueError, match=r"fits more than one score. Pass a list"):
        fit_score(
            TwoViews("react", "knn"),
            pieces(case.fit, 50),
            lambda: case.head,
            lambda: [held_out(case)],
        )


@pytest.mark.parametrize(("most", "n_reads"), [(1e9, 1), (1e4, 2), (0, 2)])
def test_rows_are_read_once_for_all_views_if_they_are_few(most, n_reads, monkeypatch):
    monkeypatch.setattr("skood.scores.composed.MOST_KEPT", most)
    case, reads = usual(), []

    class Read:
        def __iter__(self):
            reads.append(1)
            return pieces(case.fit, 50)

    score = fit_score(ThreeViews(), Read(), lambda: case.head, lambda: [held_out(case)])
    assert len(reads) == n_reads
    assert torch.equal(seen(score, case.new), torch.tensor(scores_of("three_views", case, 50)))


def test_a_score_that_moves_its_inputs_is_refused():
    case = usual()
    with pytest.raises(TypeError, match=r"TwoViews got Odin\(\), which scores inputs"):
        fit_score(TwoViews(Odin()), [case.fit], lambda: case.head, lambda: [case.fit])


def test_a_view_that_is_the_same_for_all_rows_held_out_is_refused():
    case = usual()
    for few in ([case.fit[0][:1], case.fit[1][:1], case.fit[2][:1]],):
        with pytest.raises(ValueError, match=r"cannot weigh Energy\(\) .* all of the 1 rows held"):
            fit_score(TwoViews(), [case.fit], lambda: case.head, lambda few=few: [Outputs(*few)])


def test_a_view_whose_lowest_values_are_the_same_is_refused():
    case = usual()
    n_rows = len(held_out(case).labels)

    def least(features, logits, n_same):
        energy = logits.logsumexp(dim=1)
        return energy.clamp(min=energy.sort().values[n_same - 1])

    for share, refused in ((0.2, False), (0.3, True)):
        score = ThreeViews(of_logits=partial(least, n_same=int(share * n_rows)))
        if refused:
            with pytest.raises(ValueError, match=r"cannot weigh .* the lowest quarter of the"):
                fitted(score, case)
        else:
            assert torch.isfinite(seen(fitted(score, case), case.new)).all()


def test_vim_as_a_view_takes_fewer_rows_held_out_than_features():
    fit, new, weight, bias, labels = relu_features()
    case = made(fit, new, weight, bias, labels)
    few = LayeredOutputs(*(tensor[:5] for tensor in case.fit))
    score = fit_score(TwoViews("energy", Vim(4)), [case.fit], lambda: case.head, lambda: [few])
    assert torch.isfinite(score(*case.new[:2])).all()


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"of_features": "entropy"}, r"^of_features='entropy' is unknown"),
        ({"of_logits": 3}, None),  # which sklearn's constraints name
        ({"of_features": lambda features, logits: features}, r"^of_features=<function .* returned"),
        (
            {"of_logits": lambda _, logits: logits[:, 0] / 0, "of_features": "msp"},
            r"^of_logits=<function .* NaN or infinity",
        ),
        ({"of_logits": "mahalanobis"}, r'^of_logits="mahalanobis" needs features that vary'),
        ({"of_features": TwoViews("msp", "vim")}, r'^of_features="vim" finds nothing outside'),
    ],
)
def test_errors_of_a_view_name_the_parameter_that_chose_it(views, message):
    features = torch.arange(8.0).repeat(3).double()[:, None].repeat(1, 4)
    labels = torch.arange(24) % 8
    head = Head(torch.randn(8, 4).double(), torch.zeros(8).double())
    outputs = [Outputs(features, head(features), labels)]
    with pytest.raises((TypeError, ValueError), match=message or "of_logits") as caught:
        fit_score(TwoViews(**views), outputs, lambda: head, lambda: outputs)
    assert "score_function=" not in str(caught.value)


def test_other_errors_of_a_view_stay_as_they_are():
    def own(features, logits):
        raise UnicodeDecodeError("utf-8", b"ab", 0, 1, "as it is")

    with pytest.raises(UnicodeDecodeError, match="as it is"):
        fitted(TwoViews(own), usual())
