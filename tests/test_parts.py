"""Which rows of a fit are for what."""

from __future__ import annotations

import numpy as np
import pytest
from judged_fits import correlated_table, fit

from skood import SparseEnergyOODDetector, fitting, parts
from skood.parameters import scores_of
from skood.scores import get_score

TARGETS = np.arange(600) % 3


def parts_of(targets=TARGETS, **parameters):
    detector = SparseEnergyOODDetector(**parameters)
    scores = [get_score(score) for score in scores_of(detector).values()]
    return parts.parted(detector, scores, targets, seed=0)


def sizes(some):
    return tuple(map(len, some))


def assert_apart(*some):
    together = np.concatenate(some)
    assert len(np.unique(together)) == len(together)


def test_without_a_choice_rows_train_or_place_the_threshold():
    found = parts_of()
    assert sizes(found) == (540, 60, 540, 0, 0)
    assert_apart(found.training, found.threshold)
    assert found.scores is found.training


def test_what_is_held_out_is_held_out_for_one_thing():
    found = parts_of(sparsity_weight="auto", score_function="two_views")
    assert sizes(found) == (438, 60, 48, 54, 48)
    assert_apart(found.training, found.threshold, found.scores, found.judging)
    # Those of two_views judge as well.
    np.testing.assert_array_equal(found.also_judging, found.scores)


def test_each_class_keeps_a_row_to_train_on():
    rare = np.append(np.zeros(40, dtype=int), [1, 2])
    found = parts_of(rare, score_function="auto")
    assert set(rare[found.training]) == {0, 1, 2}
    assert sum(sizes(found)[:4]) == len(rare)


def test_at_most_a_thousand_rows_judge(monkeypatch):
    monkeypatch.setattr(parts, "ROWS_OF_A_JUDGE", 40)
    found = parts_of(score_function="auto")
    assert sizes(found) == (450, 60, 50, 40, 40)
    assert set(found.also_judging) < set(found.scores)


def test_without_rows_for_the_threshold_the_judges_are_still_apart():
    for parameters in ({"score_function": "auto"}, {"sparsity_weight": "auto"}):
        found = parts_of(calibration_size=None, **parameters)
        assert sizes(found) == (540, 540, 540, 60, 0)
        assert_apart(found.training, found.judging)
        assert found.threshold is found.scores is found.training


def test_rows_that_a_score_may_remember_do_not_judge():
    class Remembering:
        uses_held_out = True

        def fit(self, outputs, head, held_out):
            return self

        def __call__(self, features, logits):
            return logits.logsumexp(dim=1)

    found = parts_of(score_function=Remembering(), sparsity_weight="auto")
    assert sizes(found) == (438, 60, 48, 54, 0)


def test_a_score_that_sees_no_rows_held_out_costs_none():
    assert sizes(parts_of(score_function="energy", sparsity_weight="auto")) == (486, 60, 486, 54, 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sparsity_weight": "auto"}, r'sparsity_weight="auto" holds .* another value'),
        ({"score_function": "auto"}, r'score_function="auto" holds .* another value'),
        ({"score_function": "two_views"}, r"score_function='two_views' holds .* another score"),
    ],
    ids=str,
)
def test_too_few_rows_are_refused_by_what_wants_them(parameters, message):
    with pytest.raises(ValueError, match=message):
        parts_of(np.array([0, 0, 1]), calibration_size=1, **parameters)


@pytest.mark.parametrize(
    ("parameters", "judging", "training"),
    [
        ({}, [], [2, 3, 5, 7, 9]),
        ({"outlier_weight": 0.5}, [], [2, 3, 5, 7, 9]),
        ({"sparsity_weight": "auto"}, [2, 3, 5, 7, 9], []),
        ({"score_function": "auto", "outlier_weight": 0.5}, [3, 7], [2, 5, 9]),
    ],
    ids=str,
)
def test_outliers_that_train_do_not_judge(parameters, judging, training):
    detector = SparseEnergyOODDetector(**parameters)
    found = parts.parted_outliers(detector, np.array([2, 3, 5, 7, 9]))
    assert [some.tolist() for some in found] == [judging, training]


def test_a_fit_uses_rows_for_what_they_are_held_out_for(monkeypatch):
    seen = {}

    def prepared(run, original=fitting.Fit.prepared):
        network, data, held_out = original(run)
        seen.update(run=run, data=data, held_out=held_out)
        return network, data, held_out

    monkeypatch.setattr(fitting.Fit, "prepared", prepared)
    X, y, module = correlated_table()
    outliers = np.full((5, 5), 9, dtype=np.float32)  # first, so that positions are not those of X
    known = np.concatenate([outliers, X]), np.concatenate([np.full(5, 7), y]), module
    fit(known, score_function="two_views", ood_label=7)
    run = seen["run"]
    data, held_out = seen["data"], seen["held_out"]
    both = np.append(run.parts.judging, run.parts.also_judging)
    assert len(both) > len(run.parts.judging)
    for rows, targets, part in (
        (data.rows, data.labels, run.parts.training),
        (held_out.rows, held_out.targets, run.parts.threshold),
        (run.apart.rows, run.apart.targets, run.parts.scores),
        (run.judging.rows, run.judging.targets, both),
    ):
        np.testing.assert_array_equal(rows.in_memory(None), X[part])
        np.testing.assert_array_equal(targets, y[part])
