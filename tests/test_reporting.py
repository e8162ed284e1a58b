from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from data_sets import Listed
from scipy.stats import binomtest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from skood import RejectingClassifier, SparseEnergyOODDetector
from skood.calibration import place_threshold
from skood.exceptions import SeenRowsWarning, ThresholdWarning
from skood.metrics import aurc, auroc, fpr_at_tpr
from skood.reporting import report

NASTY = "<b>a|b</b> & [x](y) `z`"


@pytest.fixture(scope="module")
def sets(digits):
    noise = np.random.RandomState(0).random_sample((60, 64))
    return {"noise": noise, NASTY: digits.X_test[:80, ::-1], "dark": 0.5 * digits.X_test[:90]}


@pytest.fixture(scope="module")
def made(fitted, digits, sets):
    return report(fitted, digits.X_test, digits.y_test, sets)


class Page(HTMLParser):
    """Elements of a page, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def pictures(self):
        return [attrs for tag, attrs in self.elements if tag == "img"]


def headings(markdown):
    return re.findall(r"^## (.*)", markdown, re.M)


# What it holds


def test_rows_are_kept_and_classified_as_the_detector_says(made, fitted, digits):
    kept = fitted.predict(digits.X_test) == 1
    correct = fitted.predict_class(digits.X_test) == digits.y_test
    rows = made.in_distribution
    assert (rows["rows"], rows["kept"]) == (len(kept), kept.mean())
    interval = binomtest(int(kept.sum()), len(kept)).proportion_ci(method="exact")
    assert (rows["kept_low"], rows["kept_high"]) == pytest.approx(tuple(interval))
    accuracy = fitted.id_accuracy(digits.X_test, digits.y_test)
    assert rows["accuracy_before"] == accuracy["before"]
    assert rows["accuracy_after"] == accuracy["after"] == correct.mean()
    assert rows["accuracy_kept"] == correct[kept].mean()
    assert rows["aurc"] == aurc(fitted.decision_function(digits.X_test), correct)
    assert rows["verdict"] == fitted.check_batch(digits.X_test).verdict


def test_classes_come_with_the_lowest_share_first(made, fitted, digits):
    kept = fitted.predict(digits.X_test) == 1
    assert {label: each["kept"] for label, each in made.classes.items()} == {
        label: kept[digits.y_test == label].mean() for label in range(10)
    }
    shares = [each["kept"] for each in made.classes.values()]
    assert shares == sorted(shares)


def test_sets_are_judged_by_the_threshold_and_by_metrics_and_the_worst_is_first(
    made, fitted, digits, sets
):
    score_id = fitted.score_samples(digits.X_test)
    for name, X in sets.items():
        found, scores = made.outliers[name], fitted.score_samples(X)
        assert found["rows"] == len(X)
        assert found["rejected"] == np.mean(fitted.predict(X) == -1)
        assert found["fpr95"] == fpr_at_tpr(score_id, scores)
        assert found["auroc"] == pytest.approx(auroc(score_id, scores))
    errors = [each["fpr95"] for each in made.outliers.values()]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) > 1


def test_the_detector_is_described(made, fitted, digits):
    described = made.detector
    assert described["network"] == "Sequential"
    assert described["parameters"] == sum(p.numel() for p in digits.module.parameters())
    assert described["features"] == fitted.features(digits.X_test[:1]).shape[1]
    assert (described["classes"], described["score"]) == (10, "energy")
    assert (described["penalty"], described["sparsity_weight"]) == ("relative_l1", 1)
    assert (described["epochs"], described["tpr"]) == (2, 0.95)
    assert described["learning_rate"] == fitted.learning_rate
    assert described["threshold"] == fitted.offset_
    assert described["calibration_rows"] == len(digits.X_fresh)
    assert described["doubts"] == []


def test_the_learning_rate_is_that_of_the_training(digits):
    detector = SparseEnergyOODDetector(
        digits.module, learning_rate=0.00015, max_epochs=1, random_state=0
    )
    detector.fit(digits.X, digits.y).calibrate(digits.X_fresh).set_params(learning_rate=0.5)
    made = report(detector, digits.X_test)
    assert made.detector["learning_rate"] == 0.00015
    assert "| learning rate | 0.00015 |" in made.to_markdown()
    del detector.history_[-1]["learning_rate"]  # as a file of before may lack it
    assert report(detector, digits.X_test).detector["learning_rate"] == 0.5
    untouched = SparseEnergyOODDetector(digits.module, max_epochs=0)
    untouched.fit(digits.X, digits.y).calibrate(digits.X_fresh)
    assert "| learning rate | none |" in report(untouched, digits.X_test).to_markdown()


def test_each_row_is_loaded_once(fitted, digits):
    loaded = []

    class Counted(Listed):
        def __getitem__(self, row):
            loaded.append(row)
            return super().__getitem__(row)

    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, num_workers=0, random_state=0)
    detector.fit(Counted([*zip(digits.X, digits.y, strict=True)])).calibrate(digits.X_fresh)
    loaded.clear()
    outliers = Counted([(x, 0) for x in digits.X_test[:30]])
    report(detector, digits.X_test, X_ood=outliers)
    # But for the first, which tells what rows are like.
    assert sorted(row for row in loaded if row) == list(range(1, 30))


@pytest.mark.parametrize("epochs", [0, 1])
def test_rows_pass_once_through_the_network_with_labels_too(digits, epochs):
    """And once through the one before fine-tuning, if that is another."""
    calls = []

    class Counted(nn.Sequential):
        def forward(self, X):
            calls.append(self[-1].weight.detach().clone())
            return super().forward(X)

    detector = SparseEnergyOODDetector(Counted(*digits.module), max_epochs=epochs, random_state=0)
    detector.fit(digits.X, digits.y).calibrate(digits.X_fresh)
    calls.clear()
    detector.score_samples(digits.X_test)
    n_calls = len(calls)
    calls.clear()
    report(detector, digits.X_test, digits.y_test)
    of_detector = [torch.equal(weight, detector.module_[-1].weight) for weight in calls]
    assert sum(of_detector) == n_calls + 1  # one row tells how many features there are
    assert all(of_detector) == (epochs == 0)


def test_labels_that_a_data_set_brings_are_taken(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, num_workers=0, random_state=0)
    pairs = [*zip(digits.X, digits.y, strict=True)]
    detector.fit(Listed(pairs)).calibrate(digits.X_fresh)
    rows = Listed([*zip(digits.X_test[:50], digits.y_test[:50], strict=True)])
    found = report(detector, rows)
    given = report(detector, digits.X_test[:50], digits.y_test[:50])
    assert found.in_distribution == given.in_distribution
    assert found.classes == given.classes


def test_what_is_around_a_detector_changes_nothing(made, fitted, digits, sets):
    frozen = FrozenEstimator(fitted)
    for estimator in (
        make_pipeline(FunctionTransformer(lambda X: X / 2), frozen),
        RejectingClassifier(frozen).fit(digits.X, digits.y),
    ):
        factor = 2 if hasattr(estimator, "steps") else 1
        scaled = {name: factor * X for name, X in sets.items()}
        found = report(estimator, factor * digits.X_test, digits.y_test, scaled)
        assert found.in_distribution == made.in_distribution
        assert found.outliers == made.outliers


def test_thresholds_of_classes_are_those_of_the_detector(digits, sets):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, tpr=0.8, random_state=0)
    detector.fit(digits.X, digits.y).calibrate(digits.X_fresh, per_class=True)
    found = report(detector, digits.X_test, X_ood=sets)
    assert found.in_distribution["kept"] == np.mean(detector.predict(digits.X_test) == 1)
    assert found.outliers["dark"]["rejected"] == np.mean(detector.predict(sets["dark"]) == -1)
    assert "fpr80" in found.outliers["dark"]
    assert found.detector["threshold"] == detector.class_offsets_.tolist()
    text = str(found)
    assert "| threshold | 10, one a predicted class: " in text
    assert "on average over draws of calibration rows, in each predicted class." in text
    assert "| set | rows | rejected | FPR80 | AUROC |" in text


def test_what_few_calibration_rows_keep_is_what_is_promised(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(digits.X, digits.y).calibrate(digits.X_fresh[:5])
        text = str(report(detector, digits.X_test))
        assert "keeps 83.3 % of in-distribution rows on average" in text  # 5 of 6
        few = str(report(detector.calibrate(digits.X_fresh[:100], per_class=True), digits.X_test))
        counts = np.bincount(detector.predict_class(digits.X_fresh[:150]), minlength=10)
        some = str(report(detector.calibrate(digits.X_fresh[:150], per_class=True), digits.X_test))
    assert "10 of 10 predicted classes have too few calibration rows" in few
    n_own = int((counts >= 19).sum())
    assert 0 < n_own < 10
    assert f"in each of {n_own} predicted classes." in some
    assert f"{10 - n_own} of 10 predicted classes have too few" in some


def test_a_network_that_hides_its_features_is_described(digits):
    scripted = torch.jit.script(digits.module)
    detector = SparseEnergyOODDetector(scripted, max_epochs=0, random_state=0)
    detector.fit(digits.X, digits.y).calibrate(digits.X_fresh)
    found = report(detector, digits.X_test)
    assert found.detector["features"] is None
    assert "| features | hidden |" in str(found)


# What it says


def test_markdown_has_a_section_for_each_thing_and_whole_tables(made):
    text = made.to_markdown()
    assert text == str(made)
    assert headings(text) == [
        "In short",
        "What it is",
        "In-distribution rows",
        "Share kept by true class",
        "Outliers, the worst set first",
        "What it cannot promise",
        "Versions",
    ]
    rows = made.in_distribution
    assert f"It keeps {100 * rows['kept']:.1f} % ({100 * rows['kept_low']:.1f} to " in text
    assert f"| accuracy | {100 * rows['accuracy_after']:.1f} % |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert r"\<b\>a\|b\</b\> & \[x\](y) \`z\`" in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    shares = [100 * each["rejected"] for each in made.outliers.values()]
    (line,) = re.findall("It rejects .*", text)
    assert line.startswith(f"It rejects {min(shares):.1f} % (")
    assert f", the fewest of 3 sets, and {max(shares):.1f} % (" in line


def test_without_labels_and_outliers_it_says_less(fitted, digits):
    found = report(fitted, digits.X_test)
    assert (found.classes, found.outliers) == ({}, {})
    assert headings(str(found)) == [
        "In short",
        "What it is",
        "In-distribution rows",
        "What it cannot promise",
        "Versions",
    ]
    assert "accuracy" not in str(found)
    assert "No outliers were tried" in str(found)
    assert not Page(found.to_html()).pictures()


def test_sets_keep_their_names(fitted, digits, sets):
    name = "__init__ and a_b, ~~$x$~~ &amp; co"
    named = {1: sets["noise"], "1": sets["dark"], name: sets["noise"]}
    found = report(fitted, digits.X_test, X_ood=named)
    assert set(found.outliers) == set(named)
    assert found.outliers[1]["rows"] == len(sets["noise"])
    assert r"| \_\_init\_\_ and a_b, \~\~\$x\$\~\~ \&amp; co |" in str(found)
    assert len(Page(found.to_html()).pictures()) == 2


def test_one_set_is_neither_the_best_nor_the_worst(fitted, digits, sets):
    (line,) = re.findall("It rejects .*", str(report(fitted, digits.X_test, X_ood=sets["noise"])))
    assert line.endswith("of the outliers 'OOD'.")


def test_the_html_page_says_the_same_and_loads_nothing(made):
    page = made.to_html()
    parsed = Page(page)
    text = " ".join(" ".join(parsed.texts).replace("\xa0", " ").split())
    for words in (*headings(str(made)), *made.limits, *made.versions, NASTY):
        assert words in text
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "b", "a"}
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    pictures = parsed.pictures()
    assert len(pictures) == 4
    for picture in pictures:
        assert picture["alt"] in text
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data)
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20]) >= 1200  # pixels wide, for 640 on the page


def test_without_matplotlib_there_are_no_pictures(made, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = Page(made.to_html())
    assert not page.pictures()
    assert "Detector report" in page.texts


def test_of_many_classes_the_lowest_are_in_the_table(made):
    classes = {f"class {i}": each for i, each in enumerate(25 * [*made.classes.values()][:1])}
    many = type(made)(**vars(made) | {"classes": classes})
    assert "## Share kept by true class, the 20 lowest of 25" in str(many)
    assert "class 19" in str(many)
    assert "class 20" not in str(many)


def test_the_range_of_shares_is_that_of_thresholds_placed_on_as_many_rows(made):
    (low, high) = map(float, re.findall(r"(\d+\.\d) % to (\d+\.\d) %", made.limits[0])[0])
    random = np.random.RandomState(0)
    # Of uniform scores, the share kept is 1 minus the threshold.
    kept = [1 - place_threshold(random.random_sample(400), 0.95) for _ in range(4000)]
    assert np.quantile(kept, [0.025, 0.975]) == pytest.approx([low / 100, high / 100], abs=0.003)


def test_doubts_about_the_threshold_come_first(digits):
    detector = SparseEnergyOODDetector(digits.module, max_epochs=0, random_state=0)
    detector.fit(digits.X, digits.y)  # on which the module was trained
    with pytest.warns(ThresholdWarning, match="probably trained on them"):
        found = report(detector, digits.X_test)
    assert re.search(r"## In short\n\n- The threshold is doubtful: The module given", str(found))
    assert ", doubtful |" in str(found)


def test_calibration_rows_are_no_test(fitted, digits):
    with pytest.warns(SeenRowsWarning):
        report(fitted, digits.X_fresh)


# Files and refusals


@pytest.mark.parametrize("suffix", ["md", "html", "HTML"])
def test_saves_what_the_suffix_names(fitted, digits, suffix, tmp_path):
    found = report(fitted, digits.X_test)
    path = tmp_path / f"report.{suffix}"
    found.save(path)
    expected = found.to_markdown() if suffix == "md" else found.to_html()
    assert path.read_text("utf-8") == expected


def test_other_files_are_refused(fitted, digits, tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.pdf'; expected the name of a file that ends"):
        report(fitted, digits.X_test).save(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"detector": FunctionTransformer()}, TypeError, "detector=Func.* holds no detector"),
        ({"detector": SparseEnergyOODDetector()}, NotFittedError, "not fitted"),
        ({"X_ood": {}}, ValueError, "X_ood is an empty dict; expected at least one set"),
        ({"y_id": np.full(397, -1)}, ValueError, r"y_id holds the labels \[-1\], which are none"),
        ({"y_id": [0, 1]}, ValueError, "y_id does not hold labels: y has 2 labels for 397 rows"),
    ],
)
def test_refuses_what_cannot_be_reported(fitted, digits, change, error, message):
    arguments = {"detector": fitted, "X_id": digits.X_test, "y_id": digits.y_test}
    with pytest.raises(error, match=message):
        report(**arguments | change)
