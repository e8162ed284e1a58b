from __future__ import annotations

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from pictures import X_ID, X_OOD, detector, normal, rows
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skood.plotting import DetectionTableDisplay

METHODS, COLUMNS = ["msp", "energy"], ["svhn", "textures", "mean"]
VALUES = [[50.0, 10.04, 30.0], [20.0, 10.0, 15.0]]


def table(values=VALUES, **options):
    names = {"methods": METHODS, "columns": COLUMNS}
    return DetectionTableDisplay(values, **(names | options)).plot()


def cells(display):
    """Texts of the cells, as rows."""
    n_columns = len(display.columns)
    texts = [text.get_text() for text in display.ax_.texts]
    return [texts[start : start + n_columns] for start in range(0, len(texts), n_columns)]


def bold(display):
    return [text.get_text() for text in display.ax_.texts if text.get_fontweight() == "bold"]


def luminance(colour):
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def backgrounds(display):
    """Luminance behind each text."""
    (mesh,) = display.ax_.collections
    display.figure_.canvas.draw()
    return [luminance(colour) for colour in mesh.get_facecolors()]


def test_values_are_printed_where_their_method_meets_their_column():
    display = table()
    assert cells(display) == [["50.0", "10.0", "30.0"], ["20.0", "10.0", "15.0"]]
    display.figure_.canvas.draw()
    for i, (method, ytick) in enumerate(zip(METHODS, display.ax_.get_yticklabels(), strict=True)):
        assert ytick.get_text() == method
        for j, (column, xtick) in enumerate(
            zip(COLUMNS, display.ax_.get_xticklabels(), strict=True)
        ):
            assert xtick.get_text() == column
            text = display.ax_.texts[len(COLUMNS) * i + j]
            assert text.get_position() == (xtick.get_position()[0], ytick.get_position()[1])
    (mesh,) = display.ax_.collections
    assert mesh.get_array().tolist() == VALUES
    # The first method is on top.
    heights = [text.get_window_extent().y0 for text in display.ax_.texts[:: len(COLUMNS)]]
    assert heights[0] > heights[1]


def test_spread_is_printed_after_the_value():
    display = table(spread=[[1, 0.25, 10], [0.04, 0, 2]], lower_is_better=True, label="FPR95, %")
    assert cells(display) == [
        ["50.0 ± 1.0", "10.0 ± 0.2", "30.0 ± 10.0"],
        ["20.0 ± 0.0", "10.0 ± 0.0", "15.0 ± 2.0"],
    ]
    assert display.ax_.get_xlabel() == "FPR95, % (lower is better, best in bold)"


def test_the_best_of_each_column_is_bold_and_so_is_what_is_printed_alike():
    assert bold(table(lower_is_better=True)) == ["10.0", "20.0", "10.0", "15.0"]
    higher = table([[50.0, 10.06, 30.0], [20.0, 10.0, 15.0]], label="AUROC, %")
    assert bold(higher) == ["50.0", "10.1", "30.0"]
    assert higher.ax_.get_xlabel() == "AUROC, % (higher is better, best in bold)"
    assert table().ax_.get_xlabel() == "higher is better, best in bold"


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_better_the_lighter_and_texts_stand_out(lower_is_better):
    values = np.arange(24.0).reshape(4, 6)
    display = table(
        values, methods=list("abcd"), columns=list("uvwxyz"), lower_is_better=lower_is_better
    )
    light = backgrounds(display)
    assert light == sorted(light, reverse=lower_is_better)
    assert len(set(light)) == 24
    for text, behind in zip(display.ax_.texts, light, strict=True):
        high, low = sorted([luminance(to_rgb(text.get_color())), behind], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG's contrast for text


def test_texts_fit_a_table_of_the_usual_size():
    columns = ["svhn", "textures", "places", "intel_scenes", "tinyimagenet_crop"]
    columns += ["tinyimagenet_resize", "mean"]
    methods = [f"method {i}" for i in range(11)] + ["sparse energy, weight 0.05"]
    values = np.random.RandomState(0).uniform(10, 100, size=(12, 7))
    display = table(values, methods=methods, columns=columns, spread=values / 9)
    display.figure_.canvas.draw()
    boxes = [text.get_window_extent() for text in display.ax_.texts]
    assert not any(box.overlaps(other) for box, other in combinations(boxes, 2))
    whole = display.figure_.bbox
    labels = [*display.ax_.get_xticklabels(), *display.ax_.get_yticklabels()]
    for label in [*labels, display.ax_.xaxis.label]:
        box = label.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_equal_values_can_be_drawn():
    display = table([[7]], methods=["energy"], columns=["svhn"])
    display.figure_.canvas.draw()
    assert bold(display) == ["7.0"]


# From scores


def scores(sets=("near", "far")):
    score_id = {"a": normal(3, 200, 0), "b": normal(2, 150, 1).round(1)}
    score_ood = {
        method: {name: normal(i, 100 + i, seed + i).round(1) for i, name in enumerate(sets)}
        for seed, method in enumerate(score_id)
    }
    return score_id, score_ood


def fpr95(score_id, score_ood):
    threshold = np.sort(score_id)[::-1][int(np.ceil(0.95 * len(score_id))) - 1]
    return np.mean(score_ood >= threshold)


def least_error(score_id, score_ood):
    return min(
        (np.mean(score_id < threshold) + np.mean(score_ood >= threshold)) / 2
        for threshold in [*score_id, *score_ood]
    )


def by_scikit_learn(metric):
    def computed(score_id, score_ood):
        is_id = np.repeat([1, 0], [len(score_id), len(score_ood)])
        return metric(is_id, np.concatenate([score_id, score_ood]))

    return computed


@pytest.mark.parametrize(
    ("metric", "computed", "label", "best"),
    [
        ("fpr95", fpr95, "FPR95, % (lower is better, best in bold)", np.min),
        (
            "auroc",
            by_scikit_learn(roc_auc_score),
            "AUROC, % (higher is better, best in bold)",
            np.max,
        ),
        (
            "aupr",
            by_scikit_learn(average_precision_score),
            "AUPR, % (higher is better, best in bold)",
            np.max,
        ),
        (
            "detection_error",
            least_error,
            "detection error, % (lower is better, best in bold)",
            np.min,
        ),
    ],
)
def test_metrics_are_computed_in_percent_with_their_mean(metric, computed, label, best):
    score_id, score_ood = scores()
    # Sets are found by name, in whatever order a method has them.
    score_ood["b"] = dict(reversed(score_ood["b"].items()))
    display = DetectionTableDisplay.from_predictions(score_id, score_ood, metric=metric)
    expected = np.array(
        [
            [100 * computed(score_id[method], score_ood[method][name]) for name in ("near", "far")]
            for method in ("a", "b")
        ]
    )
    expected = np.column_stack([expected, expected.mean(axis=1)])
    np.testing.assert_allclose(display.values, expected)
    assert display.methods == ["a", "b"]
    assert display.columns == ["near", "far", "mean"]
    assert display.ax_.get_xlabel() == label
    assert {f"{value:.1f}" for value in best(expected, axis=0)} <= set(bold(display))
    assert display.spread is None


@pytest.mark.parametrize("kind", [dict, list])
def test_from_detectors_by_name(kind):
    estimators = {
        "energy": detector().fit(rows(3, 300)),
        "scaled": make_pipeline(StandardScaler(), detector("msp")).fit(rows(3, 300)),
    }
    sets = {"small": X_OOD, "in": rows(3, 60)}
    given = estimators if kind is dict else list(estimators.items())
    display = DetectionTableDisplay.from_estimator(given, X_ID, sets, metric="auroc")
    for row, estimator in zip(display.values, estimators.values(), strict=True):
        of_sets = [
            by_scikit_learn(roc_auc_score)(
                estimator.score_samples(X_ID), estimator.score_samples(X)
            )
            for X in sets.values()
        ]
        np.testing.assert_allclose(row, 100 * np.array([*of_sets, np.mean(of_sets)]))
    assert display.methods == list(estimators)
    one = DetectionTableDisplay.from_estimator(given, X_ID, X_OOD)
    assert one.columns == ["OOD", "mean"]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": []}, ValueError, r"values has shape \(0,\); expected \(n_methods, n_columns\)"),
        ({"values": [1, 2, 3]}, ValueError, r"values has shape \(3,\)"),
        ({"values": [[1, 2, 3], [1]]}, ValueError, "values does not form an array"),
        ({"values": [["1", "2", "3"]] * 2}, TypeError, "values has dtype <U1; expected real"),
        ({"values": [[1, 2, np.nan]] * 2}, ValueError, "values has 2 NaN or infinite values in 6"),
        ({"methods": ["a"]}, ValueError, r"methods names \['a'\]; expected 2 names"),
        ({"methods": ["a", "a"]}, ValueError, "methods names .* none of them twice"),
        ({"columns": ["a", "b"]}, ValueError, r"columns names \['a', 'b'\]; expected 3 names"),
        ({"columns": ["mean", "b", "mean"]}, ValueError, "columns names .* none of them twice"),
        ({"spread": [[1, 2, 3]]}, ValueError, r"spread has shape \(1, 3\); expected that of val"),
        ({"spread": [[1, 2, -3]] * 2}, ValueError, "spread has a value of -3; expected at least 0"),
        ({"spread": [[1, 2, np.nan]] * 2}, ValueError, "spread has 2 NaN or infinite values"),
    ],
)
def test_refuses_a_table_that_cannot_be_drawn(arguments, error, message):
    with pytest.raises(error, match=message):
        table(**({"values": VALUES} | arguments))
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("score_id", "score_ood", "error", "message"),
    [
        ([1], {"a": {"far": [0]}}, TypeError, "score_id is a list; expected a dict from the names"),
        ({"a": [1]}, [0], TypeError, "score_ood is a list; expected a dict from the names"),
        ({}, {}, ValueError, r"score_id has the methods \[\], score_ood \[\]; expected the same"),
        (
            {"a": [1]},
            {"b": {"far": [0]}},
            ValueError,
            r"score_id has the methods \['a'\], score_oo",
        ),
        ({"a": [1]}, {"a": {}}, ValueError, r"score_ood\['a'\] is an empty dict"),
        (
            {"a": [1], "b": [1]},
            {"a": {"far": [0]}, "b": {"near": [0]}},
            ValueError,
            r"score_ood\['b'\] has the sets \['near'\], score_ood\['a'\] \['far'\]; expected",
        ),
        ({"a": [np.nan]}, {"a": {"far": [0]}}, ValueError, r"score_id\['a'\] has 1 NaN"),
        ({"a": [1]}, {"a": {"far": []}}, ValueError, r"score_ood\['a'\]\['far'\] is empty"),
        ({"a": [1]}, {"a": {"mean": [0]}}, ValueError, r"columns names \['mean', 'mean'\]"),
    ],
)
def test_refuses_scores_that_make_no_table(score_id, score_ood, error, message):
    with pytest.raises(error, match=message):
        DetectionTableDisplay.from_predictions(score_id, score_ood)
    assert plt.get_fignums() == []


def test_refuses_an_unknown_metric_and_names_that_come_twice():
    with pytest.raises(ValueError, match=r"'metric' .*'fpr95'.* Got 'f1' instead"):
        DetectionTableDisplay.from_predictions({"a": [1]}, {"a": {"far": [0]}}, metric="f1")
    fitted = detector().fit(rows(3, 300))
    with pytest.raises(ValueError, match=r"estimators names \['a', 'a'\]; .* none of them twice"):
        DetectionTableDisplay.from_estimator([("a", fitted), ("a", fitted)], X_ID, X_OOD)
    with pytest.raises(ValueError, match=r"estimators names \[\]; expected some names"):
        DetectionTableDisplay.from_estimator({}, X_ID, X_OOD)
