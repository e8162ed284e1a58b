from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from pictures import X_ID, X_OOD, legend
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, RandomizedSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.plotting import SelectionDisplay
from skood.plotting.shared import COLOURS, MARKERS

WEIGHTS = [0.0, 0.1, 0.02, 0.05, 0.01]


def results(params=None, **scores):
    """Results of a search; a score is a list of means, whose deviations are a tenth of them."""
    params = [{"sparsity_weight": w} for w in WEIGHTS] if params is None else params
    scores = scores or {"neg_fpr_at_tpr": [-0.5, -0.2, -0.4, -0.3, -0.45]}
    columns = {f"mean_test_{name}": np.array(means) for name, means in scores.items()}
    columns |= {f"std_test_{name}": 0.1 * np.abs(means) for name, means in scores.items()}
    return {"params": params, **columns}


ALL_SCORES = {
    "mean_l1": [9.0, 3.0, 6.0, 5.0, 8.0],
    "accuracy_change": [0.0, -0.2, 0.89 - 0.90, -0.02, 0.01],
    "auroc": [0.7, 0.9, 0.8, 0.85, 0.75],
    "neg_fpr_at_tpr": [-0.5, -0.2, -0.4, -0.3, -0.45],
}


def drawn_lines(ax):
    """Lines of candidates, without error bars, white markers and the choice."""
    return [
        line
        for line in ax.lines
        if line.get_marker() in MARKERS and len(line.get_xdata())
        if line.get_markerfacecolor() in COLOURS
    ]


def lines(ax):
    """Labels and points of the lines of candidates."""
    return {line.get_label(): line.get_xydata().tolist() for line in drawn_lines(ax)}


def points(ax, *, face):
    """Points with markers of a face, by line."""
    drawn = [line for line in ax.lines if line.get_markerfacecolor() == face]
    return [line.get_xydata().tolist() for line in drawn if len(line.get_xdata())]


def ring(ax):
    (point,) = points(ax, face="none")[0]
    return point


def errors(ax):
    """Ends of the error bars: x, low and high."""
    (bars,) = [container for container in ax.containers]
    return [(x, low, high) for (x, low), (_, high) in bars[2][0].get_segments()]


def test_panels_show_means_and_deviations_of_the_folds_by_weight():
    display = SelectionDisplay.from_cv_results(results(**ALL_SCORES), metric="auroc")
    assert [ax.get_ylabel() for ax in display.axes_] == [
        "FPR95",
        "AUROC",
        "accuracy change",
        "mean L1 of features",
    ]
    order = [0, 4, 2, 3, 1]
    names = ["neg_fpr_at_tpr", "auroc", "accuracy_change", "mean_l1"]
    for ax, name in zip(display.axes_, names, strict=True):
        means = np.array(ALL_SCORES[name]) * (-1 if name.startswith("neg_") else 1)
        (drawn,) = lines(ax).values()
        assert drawn == [[WEIGHTS[i], means[i]] for i in order]
        expected = [
            (WEIGHTS[i], *(means[i] + 0.1 * abs(means[i]) * np.array([-1, 1]))) for i in order
        ]
        np.testing.assert_allclose(errors(ax), expected)
    assert display.axes_[-1].get_xlabel() == "sparsity_weight"
    assert display.axes_[0].get_legend() is None
    assert display.figure_ is display.axes_[0].figure


@pytest.mark.parametrize(
    ("scores", "metric", "labels"),
    [
        (["neg_fpr_at_tpr", "aupr"], None, ["FPR95"]),
        (["aupr", "auroc"], None, ["AUPR"]),
        (["auroc", "auroc_svhn"], "auroc_svhn", ["AUROC, svhn"]),
        (["neg_fpr_at_tpr_svhn", "mean_l1"], None, ["FPR95, svhn", "mean L1 of features"]),
        (["neg_fpr_at_tpr"], "neg_fpr_at_tpr", ["FPR95"]),
        (["neg_detection_error"], None, ["detection error"]),
        (["neg_brier_score"], None, ["brier_score"]),
        (["accuracy_change"], None, ["accuracy change"]),
    ],
)
def test_panels_are_the_scores_that_there_are(scores, metric, labels):
    cv_results = results(**{name: [-0.1, -0.2, -0.3, -0.4, -0.5] for name in scores})
    display = SelectionDisplay.from_cv_results(cv_results, metric=metric)
    assert [ax.get_ylabel() for ax in display.axes_] == labels
    sign = -1 if "neg_" in (metric or scores[0]) else 1
    (drawn,) = lines(display.axes_[0]).values()
    assert drawn[-1] == [0.1, sign * -0.2]


def test_the_axis_of_weights_shows_zero_and_orders_of_magnitude():
    display = SelectionDisplay.from_cv_results(results())
    (ax,) = display.axes_
    at = {weight: ax.transData.transform((weight, 0))[0] for weight in WEIGHTS}
    low, high = ax.get_window_extent().intervalx
    assert low < at[0.0] < at[0.01] < at[0.1] < high
    # Doubling is as far anywhere, and 0 stands apart.
    assert at[0.02] - at[0.01] == pytest.approx(at[0.1] - at[0.05])
    assert at[0.01] - at[0.0] > at[0.02] - at[0.01]
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "0",
        "0.01",
        "0.02",
        "0.05",
        "0.1",
    ]
    assert ax.get_xticks().tolist() == sorted(WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "labels"),
    [
        ([0], ["0"]),
        ([0.02], ["0.02"]),
        ([0.001, 1.0], ["0.001", "1"]),
        ([0.1, 0.101, 0.102, 0.2], ["0.1", "0.2"]),
        ([0.0123456, 0.3], ["0.0123", "0.3"]),
    ],
)
def test_labels_of_weights_do_not_overlap(weights, labels):
    params = [{"sparsity_weight": weight} for weight in weights]
    (ax,) = SelectionDisplay.from_cv_results(results(params, auroc=[0.5] * len(params))).axes_
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_xticklabels()] == labels
    boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
    assert not any(box.overlaps(other) for box, other in pairwise(boxes))


def test_candidates_that_lose_too_much_accuracy_are_white_and_below_the_region():
    cv_results = results(**ALL_SCORES)
    display = SelectionDisplay.from_cv_results(cv_results, tolerance=0.01)
    # -0.02 and -0.2 lose too much; the candidate of 0.89 - 0.90 loses just what may be lost.
    assert [
        [x for x, _ in group] for ax in display.axes_ for group in points(ax, face="white")
    ] == [[0.05, 0.1]] * 3
    assert legend(display, 0) == ["accuracy lost > 0.01"]
    region = display.axes_[1].patches[0].get_window_extent()
    for x, change in next(iter(lines(display.axes_[1]).values())):
        inside = (
            region.y0 - 1e-6 <= display.axes_[1].transData.transform((x, change))[1] <= region.y1
        )
        assert inside == (x not in (0.05, 0.1))
    assert not display.axes_[0].patches
    everything = SelectionDisplay.from_cv_results(cv_results, tolerance=0.2)
    assert everything.accurate.all()
    assert everything.axes_[0].get_legend() is None


def test_the_choice_stands_out_in_every_panel():
    display = SelectionDisplay.from_cv_results(results(**ALL_SCORES), chosen=np.int64(3))
    for ax in display.axes_:
        (height,) = [y for x, y in next(iter(lines(ax).values())) if x == 0.05]
        assert ring(ax) == [0.05, height]
        assert [line for line in ax.lines if [*line.get_xdata()] == [0.05, 0.05]]
    assert legend(display, 0) == ["chosen: 0.05"]


# Other parameters beside the weight


def grid(**others):
    """Candidates of a grid, the weights in no order."""
    ((other, values),) = others.items()
    return [{"sparsity_weight": w, other: value} for value in values for w in (0.1, 0.0)]


def auroc(params):
    return {"auroc": np.linspace(0.5, 0.9, len(params))}


def test_each_combination_of_other_parameters_is_a_line():
    params = [
        {"net__sparsity_weight": w, "net__penalty": penalty, "net__tpr": 0.9, "net__head": None}
        for penalty in ("l1_over_l2", "l1")
        for w in (0.1, 0.0)
    ]
    scores = {"auroc": [0.9, 0.8, 0.7, 0.6]}
    (ax,) = SelectionDisplay.from_cv_results(results(params, **scores)).axes_
    assert lines(ax) == {
        "penalty=l1_over_l2": [[0.0, 0.8], [0.1, 0.9]],
        "penalty=l1": [[0.0, 0.6], [0.1, 0.7]],
    }
    params[0]["net__tpr"] = 0.8
    three = SelectionDisplay.from_cv_results(results(params, **scores), chosen=0)
    assert legend(three, 0) == [
        "penalty=l1_over_l2, tpr=0.8",
        "penalty=l1_over_l2, tpr=0.9",
        "penalty=l1, tpr=0.9",
        "chosen: 0.1, penalty=l1_over_l2, tpr=0.8",
    ]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1e-3, 0.02], ["0.001", "0.02"]),
        ([True, False], ["True", "False"]),
        ([None, 39], ["None", "39"]),
        ([np.abs, "flip"], ["absolute", "flip"]),
        ([nn.ReLU(), nn.ReLU()], ["ReLU", "ReLU"]),
        ([np.zeros(2), np.ones(2)], ["ndarray", "ndarray"]),
    ],
)
def test_values_of_other_parameters_are_named_briefly(values, labels):
    params = grid(other=values)
    display = SelectionDisplay.from_cv_results(results(params, **auroc(params)))
    assert legend(display, 0) == [f"other={label}" for label in labels]


def test_lines_differ_in_grey():
    params = grid(tpr=np.linspace(0.5, 0.9, 6))
    (ax,) = SelectionDisplay.from_cv_results(results(params, **auroc(params))).axes_
    drawn = drawn_lines(ax)
    in_grey = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in drawn}
    assert len({line.get_color() for line in drawn}) == len(in_grey) == 6


def test_more_combinations_than_can_be_told_apart_are_points():
    params = grid(tpr=np.linspace(0.5, 0.9, 7))
    (ax,) = SelectionDisplay.from_cv_results(results(params, **auroc(params))).axes_
    (line,) = drawn_lines(ax)
    assert line.get_linestyle() == "None"
    assert sorted(line.get_ydata()) == pytest.approx(np.linspace(0.5, 0.9, 14))
    assert ax.get_legend() is None


def test_a_parameter_that_only_some_grids_name_is_unset_in_the_others():
    params = [{"sparsity_weight": 0.0, "max_epochs": 0}, *grid(max_epochs=[10])]
    del params[1]["max_epochs"], params[2]["max_epochs"]
    display = SelectionDisplay.from_cv_results(results(params, **auroc(params)))
    assert legend(display, 0) == ["max_epochs=0", "max_epochs=unset"]


# From a search


class Weighted(OutlierMixin, BaseEstimator):
    """Separates by the weight, at a price in accuracy."""

    def __init__(self, sparsity_weight=0.0, max_epochs=1):
        self.sparsity_weight = sparsity_weight
        self.max_epochs = max_epochs

    def fit(self, X, y=None):
        self.classes_ = np.unique(y)
        return self

    def score_samples(self, X):
        return X[:, 0] + 100 * self.sparsity_weight * np.linalg.norm(X, axis=1)

    def id_accuracy(self, X, y):
        return {"before": 0.9, "after": 0.9 - self.sparsity_weight}

    def features(self, X):
        return np.full((len(X), 2), -1 / (1 + self.sparsity_weight))

    def score(self, X, y=None):
        return 0.5 + self.sparsity_weight


CLASSES = np.arange(len(X_ID)) % 2


def searched(search=GridSearchCV, parameters=None, estimator=None, **options):
    parameters = {"sparsity_weight": [0.02, 0.0, 0.005]} if parameters is None else parameters
    options = {"cv": InDistributionKFold(2, random_state=0), "error_score": "raise"} | options
    estimator = Weighted() if estimator is None else estimator
    return search(estimator, parameters, **options).fit(X_ID, CLASSES)


def test_from_a_guarded_search_in_a_pipeline():
    search = searched(
        parameters={"weighted__sparsity_weight": [0.02, 0.0, 0.005]},
        estimator=make_pipeline(StandardScaler(), Weighted()),
        scoring=make_ood_scorer(["auroc", "accuracy_change", "mean_l1", "neg_fpr_at_tpr"], X_OOD),
        refit=AccuracyGuard("auroc", tolerance=0.015),
    )
    display = SelectionDisplay.from_estimator(search)
    assert [ax.get_ylabel() for ax in display.axes_] == [
        "FPR95",
        "AUROC",
        "accuracy change",
        "mean L1 of features",
    ]
    for ax, name in zip(display.axes_, display.scores, strict=True):
        (drawn,) = lines(ax).values()
        expected = np.abs(search.cv_results_[f"mean_test_{name}"])[[1, 2, 0]]
        np.testing.assert_allclose(np.abs([y for _, y in drawn]), expected)
        assert [x for x, _ in drawn] == [0.0, 0.005, 0.02]
    np.testing.assert_allclose([y for _, y in drawn], 2 / np.array([1, 1.005, 1.02]))
    assert legend(display, 0) == ["accuracy lost > 0.015", "chosen: 0.005"]
    assert points(display.axes_[2], face="white") == [[[0.02, pytest.approx(-0.02)]]]
    assert ring(display.axes_[2]) == [0.005, pytest.approx(-0.005)]
    for around in (make_pipeline(search), SimpleNamespace(detector_=search)):
        assert legend(SelectionDisplay.from_estimator(around), 0) == legend(display, 0)


@pytest.mark.parametrize(
    ("options", "labels", "chosen"),
    [
        ({}, ["score"], "chosen: 0.02"),
        ({"refit": False}, ["score"], "chosen: 0.02"),
        ({"scoring": make_ood_scorer("neg_fpr_at_tpr", X_OOD)}, ["FPR95"], "chosen: 0.02"),
        ({"scoring": make_ood_scorer("aupr", X_OOD)}, ["AUPR"], "chosen: 0.02"),
        ({"scoring": lambda search, X, y: -search.sparsity_weight}, ["score"], "chosen: 0"),
        (
            {"scoring": {"ours": make_ood_scorer("auroc", X_OOD)}, "refit": "ours"},
            ["ours"],
            "chosen: 0.02",
        ),
        (
            {
                "scoring": make_ood_scorer(["neg_fpr_at_tpr", "aupr", "auroc"], X_OOD),
                "refit": "auroc",
            },
            ["FPR95", "AUROC"],
            "chosen: 0.02",
        ),
        (
            {
                "scoring": make_ood_scorer(["auroc", "accuracy_change"], X_OOD),
                "refit": lambda cv_results: 2,
            },
            ["AUROC", "accuracy change"],
            "chosen: 0.005",
        ),
    ],
)
def test_from_searches_that_choose_otherwise(options, labels, chosen):
    display = SelectionDisplay.from_estimator(searched(**options))
    assert [ax.get_ylabel() for ax in display.axes_] == labels
    assert legend(display, 0) == [chosen]


def test_errors_of_a_single_scorer_are_drawn_as_errors():
    search = searched(scoring=make_ood_scorer("neg_fpr_at_tpr", X_OOD))
    (ax,) = SelectionDisplay.from_estimator(search).axes_
    (drawn,) = lines(ax).values()
    np.testing.assert_allclose(
        [y for _, y in drawn], -search.cv_results_["mean_test_score"][[1, 2, 0]]
    )


def test_a_search_that_chose_nothing_has_no_choice_drawn():
    scoring = make_ood_scorer(["auroc", "aupr"], X_OOD)
    display = SelectionDisplay.from_estimator(searched(scoring=scoring, refit=False))
    assert display.chosen is None
    assert display.axes_[0].get_legend() is None


def test_from_a_random_search():
    search = searched(
        RandomizedSearchCV,
        {"sparsity_weight": np.linspace(0, 0.1, 9), "max_epochs": range(9)},
        n_iter=9,
        random_state=0,
    )
    (ax,) = SelectionDisplay.from_estimator(search).axes_
    (drawn,) = lines(ax).values()
    weights = sorted(params["sparsity_weight"] for params in search.cv_results_["params"])
    np.testing.assert_allclose(sorted(drawn), [(w, 0.5 + w) for w in weights])


@pytest.mark.parametrize(
    ("resource", "name", "amounts"),
    [("max_epochs", "max_epochs", (2, 4)), ("n_samples", "n_resources", (40, 80))],
)
def test_the_rounds_of_a_halving_search_are_lines(resource, name, amounts):
    search = searched(
        HalvingGridSearchCV,
        {"sparsity_weight": [0.0, 0.1]},
        resource=resource,
        min_resources=amounts[0],
        max_resources=amounts[1],
        factor=2,
        return_train_score=False,
        random_state=0,
    )
    (ax,) = SelectionDisplay.from_estimator(search).axes_
    assert lines(ax) == {
        f"{name}={amounts[0]}": [[0.0, 0.5], [0.1, 0.6]],
        f"{name}={amounts[1]}": [[0.1, 0.6]],
    }
    assert ring(ax) == [0.1, 0.6]


def test_results_may_be_a_data_frame_and_hold_failures():
    cv_results = results(auroc=[0.5, np.nan, 0.7, 0.8, 0.6])
    (ax,) = SelectionDisplay.from_cv_results(pd.DataFrame(cv_results)).axes_
    (drawn,) = lines(ax).values()
    np.testing.assert_equal(drawn, [[0, 0.5], [0.01, 0.6], [0.02, 0.7], [0.05, 0.8], [0.1, np.nan]])
    ax.figure.canvas.draw()


def test_selections_are_drawn_side_by_side_on_axes_given():
    figure = Figure()
    axes = figure.subplots(2, 2, sharex=True)
    cv_results = results(auroc=ALL_SCORES["auroc"], accuracy_change=ALL_SCORES["accuracy_change"])
    display = SelectionDisplay(cv_results=cv_results)
    assert not hasattr(display, "axes_")
    assert display.plot(axes[:, 1]) is display
    assert [*display.axes_] == [*axes[:, 1]]
    assert display.figure_ is figure
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["", ""]
    one = SelectionDisplay.from_estimator(searched(), ax=axes[0, 0])
    assert [*one.axes_] == [axes[0, 0]]
    assert plt.get_fignums() == []
    with pytest.raises(ValueError, match=r"ax holds 4 axes; expected 2, one for each of \['auroc'"):
        SelectionDisplay.from_cv_results(cv_results, ax=axes)


def test_refuses_what_is_no_fitted_search():
    with pytest.raises(NotFittedError, match="GridSearchCV is not fitted"):
        SelectionDisplay.from_estimator(GridSearchCV(Weighted(), {"sparsity_weight": [0]}))
    with pytest.raises(TypeError, match=r"Weighted\(\) has no cv_results_; expected a fit"):
        SelectionDisplay.from_estimator(Weighted())
    with pytest.raises(ValueError, match=r"no parameter named sparsity_weight.*\['max_epochs'\]"):
        SelectionDisplay.from_estimator(searched(parameters={"max_epochs": [1, 2]}))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], r"no parameter named sparsity_weight.*among \[\]"),
        ([{"my_sparsity_weight": 0.1}], r"no parameter named sparsity_weight.*my_spar"),
        ([{"a__sparsity_weight": 0, "b__sparsity_weight": 0}], r"\['a__sp.*'b__sp.*expected one"),
        (
            [{"sparsity_weight": 0.1}, {"tpr": 0.9}],
            r"Candidate 1, .* has sparsity_weight=None; exp",
        ),
        ([{"sparsity_weight": "0.1"}], "sparsity_weight='0.1'; expected a number"),
        ([{"sparsity_weight": True}], "sparsity_weight=True; expected a number"),
        ([{"sparsity_weight": -0.1}], "sparsity_weight=-0.1; expected a number of at least 0"),
        ([{"sparsity_weight": np.nan}], "sparsity_weight=nan; expected a number of at least 0"),
        ([{"sparsity_weight": np.inf}], "sparsity_weight=inf; expected a number of at least 0"),
    ],
)
def test_refuses_candidates_without_a_weight(params, message):
    with pytest.raises(ValueError, match=message):
        SelectionDisplay.from_cv_results(results(params, **auroc(params)))
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("scores", "arguments", "error", "message"),
    [
        (["auroc"], {"metric": "aupr"}, ValueError, r"mean_test_aupr.*the scores \['auroc'\]"),
        (["auroc"], {"tolerance": 0.01}, ValueError, "Name 'accuracy_change' among the metrics"),
        (["auroc"], {"tolerance": -1}, ValueError, r"'tolerance' .* or None\. Got -1 "),
        (["auroc"], {"tolerance": "1 %"}, TypeError, "'tolerance' .* Got '1 %'"),
        (["auroc"], {"chosen": 5}, ValueError, "chosen=5; expected the index of one of 5"),
        (["auroc"], {"chosen": -1}, ValueError, "'chosen' .* int .* Got -1"),
        (["auroc"], {"chosen": 0.05}, TypeError, "'chosen' .* int .* Got 0.05"),
        (["auroc"], {"chosen": True}, TypeError, "'chosen' .* int .* Got True"),
        (["auroc"], {"tolerance": True}, TypeError, "'tolerance' .* Got True"),
        (["auroc"], {"tolerance": np.nan}, ValueError, "'tolerance' .* Got nan"),
        (["auroc"], {"metric": 3}, TypeError, "'metric' .* Got 3"),
        (["failed"], {}, ValueError, "All 5 candidates have NaN as failed"),
    ],
)
def test_refuses_a_selection_that_cannot_be_drawn(scores, arguments, error, message):
    values = {name: [np.nan if name == "failed" else 0.5] * 5 for name in scores}
    with pytest.raises(error, match=message):
        SelectionDisplay.from_cv_results(results(**values), **arguments)
    assert plt.get_fignums() == []


def test_refuses_results_without_scores():
    cv_results = results()
    deviations = {k: v for k, v in cv_results.items() if "mean" not in k}
    with pytest.raises(ValueError, match="no column mean_test_<score>"):
        SelectionDisplay.from_cv_results(deviations)
    means = {k: v for k, v in cv_results.items() if "std" not in k}
    with pytest.raises(ValueError, match="lacks mean_test_neg_fpr_at_tpr or std_test_neg_fpr_at_"):
        SelectionDisplay.from_cv_results(means)


BEFORE = {
    "sparsity_weight": None,
    "accuracy_before": 0.9,
    "accuracy_after": 0.9,
    "mean_l1": 5.0,
    "score_function": "energy",
    "auroc": 0.8,
    "auroc_columns": 0.8,
    "chosen": False,
}
"""What a path says of a network before fine-tuning, if it is not chosen."""


def test_rungs_that_let_a_kind_in_are_marked():
    before = BEFORE | {"worse": ""}
    good = before | {"sparsity_weight": 0.0, "chosen": True}
    worse = before | {"sparsity_weight": 0.1, "auroc": 0.9, "worse": "columns"}
    inaccurate = worse | {"sparsity_weight": 0.3, "accuracy_after": 0.5}
    path_ = [before, good, worse, inaccurate]
    display = SelectionDisplay.from_estimator(SimpleNamespace(path_=path_))
    points = {
        line.get_markerfacecolor(): line.get_xdata().tolist()
        for line in display.axes_[0].lines
        if line.get_linestyle() == "None" and len(line.get_xdata()) == 1
    }
    assert points["white"] == [0.3]
    assert points["lightgrey"] == [0.1]
    labels = [text.get_text() for text in display.figure_.findobj(Text)]
    assert {"a kind detected worse", "accuracy lost > 0.01"} <= {*labels}


def test_a_path_that_ended_at_once_is_drawn():
    untouched = BEFORE | {"chosen": True}
    rung = untouched | {"sparsity_weight": 0.0, "accuracy_after": 0.5, "chosen": False}
    display = SelectionDisplay.from_estimator(SimpleNamespace(path_=[untouched, rung]))
    assert display.weights.tolist() == [0]
    assert "chosen: untouched" in [text.get_text() for text in display.figure_.findobj(Text)]
