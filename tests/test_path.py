from __future__ import annotations

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from modules import HARM, digit_images, trained_mlp
from sklearn.base import clone
from torch import nn

from skood import SparseEnergyOODDetector, fitting, path
from skood.engine.objective import Distillation
from skood.engine.training import Training
from skood.exceptions import (
    AccuracyDropWarning,
    DetectionDropWarning,
    DivergenceError,
    PenaltyWithoutEffectWarning,
    SelectionWarning,
)
from skood.model_selection import AccuracyGuard, surrogate_outliers, surrogates
from skood.scores import Odin, list_scores

COLUMNS = [
    "sparsity_weight",
    "accuracy_before",
    "accuracy_after",
    "mean_l1",
    "score_function",
    "auroc",
    "auroc_columns",
    "worse",
    "seconds",
    "chosen",
]


@pytest.fixture(scope="module")
def table():
    """Two classes of a table whose columns depend on each other, and a network that knows them."""
    random = np.random.RandomState(0)
    y = random.randint(2, size=600)
    x = random.randn(600, 1) + 4 * y[:, None]
    X = (x + 0.3 * random.randn(600, 5)).astype(np.float32)
    return X, y, trained_mlp(X, y)


def fit(table, **parameters):
    X, y, module = table
    settings = {"max_epochs": 3, "random_state": 0, "sparsity_weight": "auto"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SparseEnergyOODDetector(module, **(settings | parameters)).fit(X, y)


def test_a_row_of_the_path_is_a_rung(table):
    detector = fit(table)
    assert [list(record) for record in detector.path_] == [COLUMNS] * len(detector.path_)
    weights = [record["sparsity_weight"] for record in detector.path_]
    assert weights == [None, 0.0, 0.1, 0.3, 1.0, 3.0]
    assert {record["score_function"] for record in detector.path_} == {"energy"}
    assert {record["accuracy_before"] for record in detector.path_} == {
        detector.path_[0]["accuracy_after"]
    }
    assert all(record["seconds"] > 0 for record in detector.path_)


def test_what_detects_best_of_what_is_accurate_is_chosen(table):
    detector = fit(table)
    results = {
        "mean_test_auroc": [record["auroc"] for record in detector.path_],
        "mean_test_accuracy_change": [
            record["accuracy_after"] - record["accuracy_before"] for record in detector.path_
        ],
    }
    best = AccuracyGuard("auroc")(results)
    assert [record["chosen"] for record in detector.path_] == [
        i == best for i in range(len(detector.path_))
    ]
    assert detector.sparsity_weight_ == detector.path_[best]["sparsity_weight"]


def test_the_network_is_that_of_the_rung(table, monkeypatch):
    """Whichever rung is chosen, the features are those with the mean that the path reports."""
    for wanted in (None, 0.0, 0.3):
        judged = []

        def best_of(records, wanted=wanted):
            return next((r for r in records if r["sparsity_weight"] == wanted), records[0])

        class Judge(path.Judge):
            def __call__(self, network, weight, start, judged=judged):
                judged.append((weight, network.uncompiled_copy()))
                return super().__call__(network, weight, start)

        monkeypatch.setattr(path, "best_of", best_of)
        monkeypatch.setattr(path, "Judge", Judge)
        detector = fit(table)
        monkeypatch.undo()
        assert detector.sparsity_weight_ == wanted
        of_rung = dict(judged)[wanted].public.state_dict()
        for name, tensor in detector.module_.state_dict().items():
            assert tensor.equal(of_rung[name])
        epochs = [record["epoch"] for record in detector.history_]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) == {None: 0, 0.0: 1, 0.3: 3}[wanted]
        assert detector.id_accuracy_["after"] == detector.id_accuracy_["before"] or wanted


def test_a_network_that_fine_tuning_cannot_help_stays_as_it_is(table):
    X, y, module = table
    between = np.full((60, 5), 2, dtype=np.float32)  # which no network tells better
    known = np.concatenate([X, between]), np.concatenate([y, np.full(60, 7)]), module
    detector = fit(known, ood_label=7)
    assert detector.path_[0]["auroc"] == 1
    assert detector.sparsity_weight_ is None
    assert detector.history_ == []
    for name, tensor in detector.module_.state_dict().items():
        assert tensor.equal(module.state_dict()[name])


def test_the_path_goes_on_where_accuracy_is_lost(table, monkeypatch):
    """A rung that loses accuracy is not chosen; those above it may have it back."""

    class Judge(path.Judge):
        def __call__(self, network, weight, start):
            lost = {None: 0.0, 0.0: 0.5, 0.1: 0.02, 0.3: 0.005}.get(weight, 0.1)
            return [
                {
                    **record,
                    "accuracy_after": record["accuracy_before"] - lost,
                    "auroc": 0.5 if weight is None else 0.9,
                }
                for record in super().__call__(network, weight, start)
            ]

    monkeypatch.setattr(path, "Judge", Judge)
    detector = fit(table)
    assert len(detector.path_) == 1 + len(path.LADDER)
    assert detector.sparsity_weight_ == 0.3


def test_judges_are_apart_from_training_and_threshold(table, monkeypatch):
    from skood import fitting

    seen = {}

    def prepared(run, original=fitting.Fit.prepared):
        network, data, held_out = original(run)
        seen.update(run=run, data=data, held_out=held_out)
        return network, data, held_out

    monkeypatch.setattr(fitting.Fit, "prepared", prepared)
    fit(table, score_function="two_views")
    rows = [
        seen["data"].rows.index,
        seen["held_out"].rows.index,
        seen["run"].judging.rows.index,
        seen["run"].scale.rows.index,
    ]
    assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows)) == 600
    assert min(map(len, rows)) >= 39


def test_without_rows_for_the_threshold_the_judges_are_still_apart(table, monkeypatch):
    from skood import fitting

    runs = []
    monkeypatch.setattr(fitting.Fit, "judge_values", lambda run, *_: runs.append(run))
    detector = fit(table, sparsity_weight=0.3, score_function="auto", calibration_size=None)
    judging, scale = (set(held.rows.index) for held in (runs[0].judging, runs[0].scale))
    assert len(judging) == 60
    assert not judging & scale
    assert len(scale) == len(detector.calibration_scores_) == 540


def test_surrogates_judge_each_kind_of_images(digits):
    X, y = digits.X[:400].reshape(-1, 8, 8), digits.y[:400]
    module = nn.Sequential(nn.Flatten(), digits.module)
    detector = fit((X, y, module), max_epochs=1)
    kinds = [name for name in detector.path_[0] if name.startswith("auroc_")]
    drawn = ["strokes", "silhouettes", "shapes", "glyphs"]
    expected = ["patches", "blur", "contrast", "edges", *drawn]
    assert kinds == [f"auroc_{kind}" for kind in expected]
    for record in detector.path_:
        assert record["auroc"] == pytest.approx(np.mean([record[kind] for kind in kinds]))


def run_of(X, y, module, monkeypatch, **parameters):
    """The fit that is judged."""
    from skood import fitting

    runs = []
    original = fitting.Fit.prepared

    def prepared(run):
        runs.append(run)
        return original(run)

    settings = {"score_function": "auto", "sparsity_weight": 0.3, "max_epochs": 1}
    with monkeypatch.context() as patches:
        patches.setattr(fitting.Fit, "prepared", prepared)
        fit((X, y, module), **(settings | parameters))
    return runs[0]


def assert_judge_as_they_are(run, X):
    index = np.append(run.judging.rows.index, run.scale.rows.index)
    np.testing.assert_array_equal(run.inliers_to_judge.in_memory(None), X[index])


@pytest.fixture
def pictures(digits):
    X, y = digits.X[:400].reshape(-1, 8, 8), digits.y[:400]
    return X, y, nn.Sequential(nn.Flatten(), digits.module)


def test_images_that_judge_beside_surrogates_stand_for_new_ones(pictures, monkeypatch):
    X, y, module = pictures
    run = run_of(*pictures, monkeypatch)
    originals = X[np.append(run.judging.rows.index, run.scale.rows.index)]
    turned = run.inliers_to_judge.in_memory(None)
    assert turned.shape == originals.shape
    moved = np.abs(turned - originals).mean(axis=(1, 2))
    assert (moved > 0).all()
    assert moved.mean() < np.abs(originals - originals[::-1]).mean() / 2
    # Accuracy is judged by what they are.
    np.testing.assert_array_equal(run.judging.rows.in_memory(None), X[run.judging.rows.index])
    # Beside known outliers they are what they are.
    X, y = np.append(X, 1 - X[:20], axis=0), np.append(y, np.full(20, 99))
    assert_judge_as_they_are(run_of(X, y, module, monkeypatch, ood_label=99), X)


def test_images_are_new_to_a_network_that_fit_trains(pictures, monkeypatch):
    X, y, module = pictures
    for network in (None, module):
        assert_judge_as_they_are(run_of(X, y, network, monkeypatch, pretrain_epochs=2), X)


def test_what_is_no_picture_is_not_turned(monkeypatch):
    """Classes that differ in the order of three channels, which a turn mixes."""
    random = np.random.RandomState(0)
    y = random.randint(3, size=300)
    steps = np.arange(60)
    frequency = np.array([[0.1, 0.3, 0.5], [0.3, 0.5, 0.1], [0.5, 0.1, 0.3]])[y]
    X = np.sin(frequency[:, :, None] * steps).astype(np.float32)
    module = nn.Sequential(nn.Flatten(), trained_mlp(X.reshape(300, -1), y))
    assert_judge_as_they_are(run_of(X, y, module, monkeypatch), X)


def test_rows_of_a_table_judge_as_they_are(table, monkeypatch):
    assert_judge_as_they_are(run_of(*table, monkeypatch), table[0])


def test_few_rows_held_out_for_scores_judge(table, monkeypatch):
    from skood import fitting

    run = run_of(*table, monkeypatch)
    assert (len(run.judging.rows), len(run.scale.rows)) == (54, 48)
    assert len(run.inliers_to_judge) == 54 + 48
    monkeypatch.setattr(fitting, "ROWS_OF_A_JUDGE", 40)
    run = run_of(*table, monkeypatch)
    assert (len(run.judging.rows), len(run.scale.rows)) == (40, 50)
    assert len(run.inliers_to_judge) == 40 + 40
    assert len(np.unique(run.inliers_to_judge.in_memory(None), axis=0)) == 80


def test_rows_that_a_score_may_remember_do_not_judge(table, monkeypatch):
    class Remembering:
        uses_held_out = True

        def fit(self, outputs, head, held_out):
            return self

        def __call__(self, features, logits):
            return logits.logsumexp(dim=1)

    for score in (Remembering(), "energy"):
        run = run_of(*table, monkeypatch, score_function=score, sparsity_weight="auto")
        assert len(run.inliers_to_judge) == len(run.judging.rows) == 54
    # These train.
    run = run_of(*table, monkeypatch, calibration_size=None)
    assert len(run.inliers_to_judge) == len(run.judging.rows) == 60


def test_detection_is_judged_by_what_stands_for_new_rows(pictures, monkeypatch):
    settings = {"sparsity_weight": 0.3, "score_function": "auto", "max_epochs": 0}
    plain = fit(pictures, **settings).path_
    as_new = surrogates.as_new

    def unlike(X, random):
        turned = as_new(X, random)
        turned[::4] = random.rand(*turned[::4].shape)  # few enough to be still pictures
        return turned

    monkeypatch.setattr(surrogates, "as_new", unlike)
    changed = fit(pictures, **settings).path_
    for before, after in zip(plain, changed, strict=True):
        assert before["accuracy_after"] == after["accuracy_after"]
        assert before["mean_l1"] == after["mean_l1"]
        if before["score_function"] in ("energy", "two_views"):
            assert after["auroc"] < before["auroc"]


def test_rows_with_nan_that_preprocess_fills_do_not_judge(pictures, monkeypatch):
    X, y, module = pictures
    X = X.copy()
    X[::10, 2, 2] = np.nan
    X[5::10, 2, 2] = np.inf
    run = run_of(X, y, module, monkeypatch, preprocess=zeros_for_nan)
    index = np.append(run.judging.rows.index, run.scale.rows.index)
    whole = X[index[np.isfinite(X[index]).all(axis=(1, 2))]]
    turned = run.inliers_to_judge.in_memory(None)
    assert turned.shape == whole.shape
    assert 0 < np.abs(turned - whole).mean() < np.abs(whole - whole[::-1]).mean() / 2
    assert all(np.isfinite(rows.in_memory(None)).all() for rows in run.outliers_to_judge.values())
    X[:, 2, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"cannot: Every row of X has NaN or infinity\. Label known"
    ):
        run_of(X, y, module, monkeypatch, preprocess=zeros_for_nan)


def zeros_for_nan(batch):
    return torch.nan_to_num(batch, posinf=0)


def test_known_outliers_judge_in_place_of_surrogates(table):
    X, y, module = table
    outliers = surrogate_outliers(X[:90], kind="scale", random_state=0)
    known = np.concatenate([X, outliers]), np.concatenate([y, np.full(90, 7)]), module
    detector = fit(known, ood_label=7)
    assert [name for name in detector.path_[0] if name.startswith("auroc_")] == ["auroc_outliers"]


def test_known_outliers_that_are_trained_on_do_not_judge(table, monkeypatch):
    from skood import fitting

    X, y, module = table
    runs = []
    monkeypatch.setattr(fitting.Fit, "judge_values", lambda run, *_: runs.append(run), raising=True)
    known = np.concatenate([X, X[:9]]), np.concatenate([y, np.full(9, 7)]), module
    for weight, trained in ((0.0, 0), (0.5, 5)):
        fit(known, ood_label=7, outlier_weight=weight, score_function="auto", sparsity_weight=1.0)
        run = runs.pop()
        assert len(run._trained_outliers) == trained
        assert len(run.outliers_to_judge["outliers"]) == 9 - trained
        assert not set(run._trained_outliers) & set(run._judging_outliers)


def test_the_score_is_chosen_among_all_but_those_of_the_gradient(table):
    detector = fit(table, score_function="auto", max_epochs=1)
    names = {record["score_function"] for record in detector.path_}
    assert names <= set(list_scores()) - {"odin"}
    assert {"energy", "two_views", "knn", "vim"} <= names
    (chosen,) = [record for record in detector.path_ if record["chosen"]]
    # Of a table, one kind is made, which shows too little for another score.
    assert chosen["score_function"] == "two_views"
    assert chosen["auroc"] < max(record["auroc"] for record in detector.path_)
    fixed = fit(table, score_function=chosen["score_function"], max_epochs=1)
    assert type(detector.score_function_) is type(fixed.score_function_)


def test_the_score_alone_can_be_chosen(table):
    detector = fit(table, score_function="auto", sparsity_weight=0.3)
    assert detector.sparsity_weight_ == 0.3
    assert {record["sparsity_weight"] for record in detector.path_} == {0.3}
    assert len(detector.history_) == 3


def test_a_weight_that_costs_accuracy_is_no_reason_to_choose_no_score(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SelectionWarning)  # there is nothing to select
        X, y, module = table
        with pytest.warns(AccuracyDropWarning):
            detector = SparseEnergyOODDetector(
                module,
                sparsity_weight=30.0,
                score_function="auto",
                learning_rate=0.02,
                max_epochs=3,
                random_state=0,
            ).fit(X, y)
    (chosen,) = [record for record in detector.path_ if record["chosen"]]
    assert chosen["score_function"] == "two_views"


def test_distillation_keeps_to_the_network_given(table, monkeypatch):
    X, _, module = table
    expected = module(torch.as_tensor(X[:9]))
    taught = []

    def start(term, network, original=Distillation.start):
        original(term, network)
        taught.append(term._teacher.logits(torch.as_tensor(X[:9])))

    monkeypatch.setattr(Distillation, "start", start)
    fit(table, distillation_weight=1.0, learning_rate=0.01)
    assert len(taught) > 2
    for logits in taught:
        assert torch.allclose(logits, expected, atol=1e-5)


def test_features_that_cannot_be_trained_are_said_once(table):
    X, y, module = table
    frozen = copy.deepcopy(module).requires_grad_(False)
    frozen[-1].requires_grad_(True)
    detector = SparseEnergyOODDetector(frozen, sparsity_weight="auto", random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector.fit(X, y)
    assert [w.category for w in caught].count(PenaltyWithoutEffectWarning) == 1


def test_rows_without_surrogates_are_refused_before_training(table, monkeypatch):
    X, y, _ = table
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("has trained"))
    with pytest.raises(ValueError, match="judges by outliers that it makes of X, and cannot"):
        fit((X[:, :1], y, None))


def test_a_score_of_the_gradient_is_fitted_to_be_judged(table):
    class Scaled(Odin):
        """ODIN in units of the largest logit."""

        def fit(self, outputs, head):
            self.unit_ = max(float(some.logits.max()) for some in outputs)
            return self

        def __call__(self, features, logits):
            return super().__call__(features, logits) / self.unit_

    detector = fit(table, score_function=Scaled(), max_epochs=0)
    assert (
        detector.path_[0]["auroc"]
        == fit(table, score_function="odin", max_epochs=0).path_[0]["auroc"]
    )


def test_a_score_of_the_gradient_is_taken_if_asked_for(table):
    detector = fit(table, score_function="odin", max_epochs=1)
    assert {record["score_function"] for record in detector.path_} == {"odin"}


def test_a_script_chooses_among_the_scores_of_its_logits(table):
    X, y, module = table
    detector = fit((X, y, torch.jit.script(module)), max_epochs=0, score_function="auto")
    assert {r["score_function"] for r in detector.path_} == {"energy", "gen", "max_logit", "msp"}
    assert detector.sparsity_weight_ is None
    assert np.isnan(detector.path_[0]["mean_l1"])


def test_a_weight_that_is_given_is_kept_as_it_is(table):
    detector = fit(table, sparsity_weight=2, max_epochs=1)
    assert (detector.sparsity_weight_, detector.path_) == (2.0, [])


@pytest.mark.parametrize(
    ("penalty", "unit"),
    [
        ("l1", lambda h: np.abs(h).sum(axis=1).mean()),
        (lambda h: 5 * h.square().sum(dim=1), lambda h: 5 * (h**2).sum(axis=1).mean()),
    ],
)
def test_the_ladder_means_the_same_for_any_penalty(table, penalty, unit):
    X, y, module = table
    detector = fit(table, penalty=penalty)
    expected = SparseEnergyOODDetector(module, max_epochs=0).fit(X, y)
    weights = [record["sparsity_weight"] for record in detector.path_[1:]]
    for weight, relative in zip(weights, (0.0, 0.1, 0.3, 1.0, 3.0), strict=True):
        assert weight * unit(expected.features(X)) == pytest.approx(relative, rel=0.1)


def test_rungs_take_a_third_of_the_epochs_each(table, monkeypatch):
    steps = []
    monkeypatch.setattr(
        Training,
        "_step",
        lambda training, step, draws, original=Training._step: (
            steps.append(len(step.labels)) or original(training, step, draws)
        ),
    )
    fit(table, sparsity_weight=1.0, max_epochs=3)
    plain = sum(steps)
    for epochs, share in ((3, 1 / 3), (6, 2 / 3), (1, 1 / 9)):
        steps.clear()
        detector = fit(table, max_epochs=epochs)
        n_rungs = len(detector.path_) - 1
        # A tenth of the rows judges; a rung of few rows has a batch at least.
        least = 128 * n_rungs
        assert max(0.9 * plain * share * n_rungs, least) == pytest.approx(sum(steps), rel=0.05)


def test_an_interrupted_path_resumes_at_its_rung(table, tmp_path, monkeypatch):
    epochs = []

    def epoch(training, number, original=Training._epoch):
        epochs.append(number)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return original(training, number)

    monkeypatch.setattr(Training, "_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        fit(table, memory=tmp_path)
    resumed = fit(table, memory=tmp_path)
    n_rungs = len(resumed.path_) - 1
    assert len(epochs) == 3 + n_rungs - 2
    whole = fit(table)
    assert np.array_equal(resumed.score_samples(table[0]), whole.score_samples(table[0]))
    assert [r["auroc"] for r in resumed.path_] == [r["auroc"] for r in whole.path_]


def test_training_that_cannot_succeed_is_refused(table):
    with pytest.raises(DivergenceError, match="Lower learning_rate"):
        fit(table, learning_rate=1e8)


def test_a_rung_that_diverges_ends_the_path(table, monkeypatch):
    X, _, _ = table

    def epoch(training, number, original=Training._epoch):
        record = original(training, number)
        weight = next(t.weight for t in training.terms if t.parameter == "sparsity_weight")
        return record | {"loss": np.nan} if weight >= 0.3 else record

    monkeypatch.setattr(Training, "_epoch", epoch)
    detector = fit(table)
    weights = [record["sparsity_weight"] for record in detector.path_]
    assert weights == [None, 0.0, 0.1]
    assert detector.sparsity_weight_ in weights
    assert np.isfinite(detector.score_samples(X)).all()


def test_a_rung_that_the_score_refuses_ends_the_path(table):
    before = fit(table, max_epochs=0).path_[0]["mean_l1"]

    def size(features, logits):
        sizes = features.abs().sum(dim=1)
        if len(sizes) >= 39 and sizes.mean() < 0.8 * before:
            raise ValueError("The features are too small.")
        return sizes

    detector = fit(table, score_function=size, learning_rate=0.03)
    assert 1 < len(detector.path_) < 6
    assert detector.path_[-1]["accuracy_after"] >= detector.path_[0]["accuracy_after"] - 0.01


def judged(score, weight, **by_kind):
    change = 0.0 if weight is None else -0.005
    return {
        "sparsity_weight": weight,
        "score_function": score,
        "accuracy_before": 0.9,
        "accuracy_after": 0.9 + change,
        "auroc": float(np.mean(list(by_kind.values()))),
        "worse": "",
        **{f"auroc_{kind}": value for kind, value in by_kind.items()},
    }


def test_another_score_is_chosen_only_if_it_is_clearly_better():
    energy = judged("energy", None, blur=0.90, strokes=0.50, silhouettes=0.40)
    reference = judged("two_views", None, blur=0.85, strokes=0.95, silhouettes=0.70)
    blind = judged("mahalanobis", None, blur=0.80, strokes=1.0, silhouettes=0.99)
    by_one_kind = judged("vim", None, blur=0.85, strokes=0.95, silhouettes=0.99)
    better = judged("knn", None, blur=0.88, strokes=0.97, silhouettes=0.74)
    everything = [energy, blind, by_one_kind, reference]
    assert path.best_of(everything) is reference
    assert path.best_of([*everything, better]) is better
    # Without the reference, another takes its place; a score that was asked for is its own.
    assert path.best_of([energy, blind]) is energy
    assert path.best_of([blind]) is blind


def test_a_score_is_no_better_because_of_what_fine_tuning_gains_with_it():
    reference = judged("two_views", None, blur=0.85, strokes=0.95, silhouettes=0.70)
    blind = judged("mahalanobis", None, blur=0.80, strokes=0.96, silhouettes=0.99)
    tuned = judged("two_views", 0.1, blur=0.90, strokes=0.97, silhouettes=0.80)
    blind_tuned = judged("mahalanobis", 0.1, blur=0.96, strokes=0.99, silhouettes=0.90)
    assert path.best_of([reference, blind, tuned, blind_tuned]) is tuned
    # With a score that is better, it may be.
    better = judged("knn", None, blur=0.88, strokes=0.97, silhouettes=0.74)
    better_tuned = judged("knn", 0.1, blur=0.92, strokes=0.98, silhouettes=0.83)
    records = [reference, better, tuned, better_tuned]
    assert path.best_of(records) is better_tuned


def test_the_smallest_weight_that_is_as_good_is_chosen():
    untouched = judged("two_views", None, blur=0.80, strokes=0.80, edges=0.80)
    small = judged("two_views", 0.1, blur=0.88, strokes=0.90, edges=0.90)
    middle = judged("two_views", 0.3, blur=0.90, strokes=0.94, edges=0.93)
    large = judged("two_views", 1.0, blur=0.96, strokes=0.93, edges=0.92)
    # Its gains over the middle one are 0.06, -0.01 and -0.01: a mean of 0.013, an error of 0.023.
    assert path.best_of([untouched, small, middle, large]) is middle
    # Over the small one they are 0.08, 0.03 and 0.02: a mean of 0.043, an error of 0.019.
    assert path.best_of([untouched, small, large]) is large
    middle["accuracy_after"] = 0.88
    assert path.best_of([untouched, small, middle, large]) is large
    # A smaller weight must not be worse than the network as it was, which is no small weight.
    middle["accuracy_after"] = 0.9
    better = judged("two_views", None, blur=0.93, strokes=0.92, edges=0.925)
    assert better["auroc"] > middle["auroc"]
    assert path.best_of([better, small, middle, large]) is large
    near = judged("two_views", None, blur=0.95, strokes=0.92, edges=0.93)
    assert path.best_of([near, large]) is large


def test_a_weight_that_lets_in_more_of_any_kind_is_not_chosen():
    untouched = judged("two_views", None, blur=0.80, strokes=0.80)
    small = judged("two_views", 0.1, blur=0.82, strokes=0.83)
    large = judged("two_views", 1.0, blur=0.99, strokes=0.99) | {"worse": "strokes"}
    assert path.best_of([untouched, small, large]) is small
    assert path.best_of([untouched, large]) is untouched


@pytest.mark.parametrize(
    ("n_rows", "let_in", "shut_out", "expected"),
    [
        (100, 14, 2, True),  # 12 > 10, and 12 > 2 sqrt(16) = 8
        (100, 30, 18, False),  # 12 < 2 sqrt(48) = 13.9
        (100, 2, 14, False),
        (1000, 95, 0, False),  # fewer than ten in a hundred
        (1000, 105, 0, True),
        (11, 2, 0, False),  # some rows more of few may be chance
        (11, 0, 0, False),
    ],
)
def test_more_outliers_kept_are_clear_beyond_two_errors(n_rows, let_in, shut_out, expected):
    before, after = np.zeros(n_rows, dtype=bool), np.zeros(n_rows, dtype=bool)
    after[:let_in] = before[let_in : let_in + shut_out] = True
    before[-1:] = after[-1:] = n_rows > let_in + shut_out  # kept as before
    assert path.is_clearly_worse(before, after) is expected


def test_kinds_are_compared_with_the_network_before(table, monkeypatch):
    seen = []

    def is_clearly_worse(before, after):
        seen.append((before, after))
        return before is not after

    monkeypatch.setattr(path, "is_clearly_worse", is_clearly_worse)
    detector = fit(table, verbose=1)
    assert detector.sparsity_weight_ is None
    assert [r["worse"] for r in detector.path_] == [""] + ["columns"] * (len(detector.path_) - 1)
    assert all(before is seen[0][1] for before, _ in seen)
    assert 0 < seen[0][1].mean() < 1


def test_outliers_of_one_kind_decide_by_their_mean():
    reference = judged("two_views", None, outliers=0.90)
    assert path.best_of([reference, judged("vim", None, outliers=0.89)]) is reference
    assert path.best_of([reference, judged("vim", None, outliers=0.91)]) is not reference
    # If they were made, one kind shows too little.
    made = judged("two_views", None, columns=0.90)
    assert path.best_of([made, judged("vim", None, columns=0.99)]) is made


def test_scores_that_the_first_network_refused_are_not_chosen():
    untouched = judged("two_views", None, blur=0.90, strokes=0.90)
    better = judged("two_views", 1.0, blur=0.89, strokes=0.99)
    refused = judged("vim", 1.0, blur=0.95, strokes=0.99)
    assert path.best_of([untouched, better, refused]) is better
    worse = judged("two_views", 1.0, blur=0.70, strokes=0.80)
    assert path.best_of([untouched, worse, refused]) is untouched
    # Nor is the usual reference, if another has taken its place.
    energy = judged("energy", None, blur=0.80, strokes=0.80)
    late = judged("two_views", 1.0, blur=0.90, strokes=0.91)
    assert path.best_of([energy, judged("vim", None, blur=0.82, strokes=0.79), late]) is energy


def test_the_choice_is_told_in_a_line(table, capsys):
    detector = fit(table, verbose=1, max_epochs=1, score_function="auto")
    told = [line for line in capsys.readouterr().out.splitlines() if "is chosen" in line]
    (chosen,) = [record for record in detector.path_ if record["chosen"]]
    assert len(told) == 1
    assert f"chosen of {len(detector.path_)}, " in told[0]
    assert f"{chosen['auroc']:.3f}" in told[0]
    assert chosen["score_function"] in told[0]


def test_clones_are_as_the_parameters_say(table):
    detector = clone(fit(table, max_epochs=0))
    assert detector.sparsity_weight == "auto"
    assert not hasattr(detector, "path_")


def test_a_tie_falls_to_two_views(table):
    X, y, module = table
    between = np.full((60, 5), 2, dtype=np.float32)  # which many scores tell perfectly
    known = np.concatenate([X, between]), np.concatenate([y, np.full(60, 7)]), module
    detector = fit(known, ood_label=7, score_function="auto", max_epochs=0)
    perfect = [r["score_function"] for r in detector.path_ if r["auroc"] == 1]
    assert len(perfect) > 1
    assert perfect[0] != "two_views"
    assert repr(detector.score_function_) == "TwoViews()"


# The check of a weight that is given


def warnings_of_fit(X, y, module, **parameters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector = SparseEnergyOODDetector(module, **({"random_state": 0} | HARM | parameters))
        detector.fit(X, y)
    told = [str(w.message) for w in caught if w.category is DetectionDropWarning]
    return detector, told


@pytest.mark.parametrize(
    ("score", "size"),
    [("energy", 200), ("energy", None), ("two_views", 200), ("two_views", None), ("auto", 200)],
)
def test_fine_tuning_that_lets_more_outliers_in_is_told(score, size):
    detector, (told,) = warnings_of_fit(
        *digit_images(), score_function=score, calibration_size=size
    )
    if score != "auto":
        assert detector.path_ == []
    shares = re.findall(r"(\d+)% of (\w+) \((\d+)% before\)", told)
    assert 1 <= len(shares) <= 3
    assert all(int(after) > int(before) + 10 for after, _, before in shares)
    assert {kind for _, kind, _ in shares} < set(surrogates.AUTO[False])
    if score == "auto":
        (chosen,) = (record for record in detector.path_ if record["chosen"])
        assert chosen["worse"].split(", ")[: len(shares)] == [kind for _, kind, _ in shares]


@pytest.mark.parametrize(
    "harmless",
    [
        {"sparsity_weight": "auto"},
        {"sparsity_weight": 0.0, "learning_rate": 1e-3},
        {"max_epochs": 0},
    ],
    ids=str,
)
def test_what_lets_no_more_in_is_not_told(harmless):
    assert warnings_of_fit(*digit_images(), **harmless)[1] == []


def test_the_shares_told_are_those_of_the_detectors_themselves(monkeypatch):
    """Of the same outliers, the detector and the network as it was keep what the warning says."""
    X, y, module = digit_images()
    seen = {}

    class Judge(path.Judge):
        def __init__(self, run, network, data):
            super().__init__(run, network, data)
            seen.update({name: rows.in_memory(None) for name, rows in self.rows.items()})

    monkeypatch.setattr(path, "Judge", Judge)
    after, (told,) = warnings_of_fit(X, y, module)
    before, _ = warnings_of_fit(X, y, module, max_epochs=0)
    for share_after, kind, share_before in re.findall(r"(\d+)% of (\w+) \((\d+)% before", told):
        for detector, share in ((after, share_after), (before, share_before)):
            inliers = np.sort(detector.score_samples(seen[path.INLIERS]))
            threshold = inliers[int(0.05 * (len(inliers) - 1))]
            kept = np.mean(detector.score_samples(seen[kind]) >= threshold)
            assert round(100 * kept) == int(share)


def test_the_check_leaves_no_mark(monkeypatch):
    X, y, module = digit_images()
    checked, _ = warnings_of_fit(X, y, module)
    monkeypatch.setattr(fitting, "ROWS_OF_A_CHECK", 10**6)
    plain, told = warnings_of_fit(X, y, module)
    assert told == []
    assert checked.offset_ == plain.offset_
    assert checked.score_samples(X).tolist() == plain.score_samples(X).tolist()
    assert checked.history_[-1]["loss"] == plain.history_[-1]["loss"]


def test_few_rows_short_trainings_tables_and_own_networks_are_not_checked(monkeypatch):
    X, y, module = digit_images()
    made = []
    kinds = surrogates.surrogates_by_kind
    monkeypatch.setattr(
        surrogates, "surrogates_by_kind", lambda *given: made.append(1) or kinds(*given)
    )
    mild = {"sparsity_weight": 1.0, "learning_rate": 1e-3}
    warnings_of_fit(X, y, module, **mild, calibration_size=99)
    warnings_of_fit(X, y, module, **mild, max_epochs=5)
    warnings_of_fit(X, y, module, **mild, pretrain_epochs=1)
    warnings_of_fit(X, y, None, **mild, pretrain_epochs=1)
    warnings_of_fit(X.reshape(len(X), -1), y, module, **mild)
    assert made == []
    warnings_of_fit(X, y, module, **mild)
    assert made == [1]


def test_rows_of_which_no_outliers_can_be_made_are_not_checked():
    X, y, module = digit_images()
    flat = np.broadcast_to(X[:, :, :1, :1], X.shape).copy()
    _, told = warnings_of_fit(flat, y, module, sparsity_weight=0.0, learning_rate=1e-3)
    assert told == []


def sixteen_greys(x):
    """Which images are as they were, not turned."""
    return ((16 * x) == (16 * x).round()).flatten(1).all(dim=1)


def low_contrast(x):
    """Which images may be digits; few glyphs are like that."""
    return x.flatten(1).std(dim=1) < 0.46


class Particular(nn.Module):
    """A network that takes only what it expects."""

    def __init__(self, module, expects, error):
        super().__init__()
        self.module, self.expects, self.error = module, expects, error

    def forward(self, x):
        known = self.expects(x)
        if self.error is not None and not known.all():
            raise self.error("cannot be taken")
        return torch.where(known[:, None], self.module(x), torch.nan)


@pytest.mark.parametrize("error", [None, ValueError, IndexError, RuntimeError, AssertionError])
@pytest.mark.parametrize("expects", [sixteen_greys, low_contrast])
def test_a_network_that_cannot_take_the_outliers_is_not_checked(expects, error):
    X, y, module = digit_images()
    tame = X.reshape(len(X), -1).std(axis=1) < 0.46
    _, told = warnings_of_fit(X[tame], y[tame], Particular(module, expects, error))
    assert told == []


def test_a_preprocess_that_cannot_take_the_outliers_is_not_checked():
    X, y, module = digit_images()

    def preprocess(x):
        if sixteen_greys(x).all():
            return x
        raise RuntimeError("cannot be taken")

    assert warnings_of_fit(X, y, module, preprocess=preprocess)[1] == []


class OfIndices(nn.Module):
    """A network of indices, which an embedding turns into greys."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.greys = nn.Embedding.from_pretrained(torch.arange(17)[:, None] / 16)

    def forward(self, x):
        return self.module(self.greys(x.long())[..., 0])


def test_indices_are_no_images():
    X, y, module = digit_images()
    indices = (16 * X).astype(np.int64)
    assert warnings_of_fit(indices, y, OfIndices(module))[1] == []


@pytest.mark.parametrize("form", ["bytes", "references", "data set"])
def test_images_in_other_forms_are_checked(form):
    X, y, module = digit_images()
    forms = {
        "bytes": ((16 * X).astype(np.uint8), lambda x: x.float() / 16),
        "references": (
            [f"row {i}" for i in range(len(X))],
            lambda names: torch.from_numpy(X[[int(name.split()[1]) for name in names]]),
        ),
        "data set": (torch.utils.data.TensorDataset(torch.from_numpy(X)), None),
    }
    rows, preprocess = forms[form]
    _, told = warnings_of_fit(rows, y, module, preprocess=preprocess, num_workers=0)
    assert len(told) == 1
    if form != "bytes":  # whose outliers are rounded
        assert told == warnings_of_fit(X, y, module)[1]


def test_a_handful_of_rows_without_nan_is_not_enough():
    X, y, module = digit_images()
    X[20:, 0, 0, 0] = np.nan
    _, told = warnings_of_fit(X, y, module, preprocess=torch.nan_to_num)
    assert told == []


def test_the_mean_over_kinds_is_told_if_no_kind_is_clearly_worse():
    kept = {"a": np.ones(50, bool), "b": np.ones(50, bool), "c": np.ones(50, bool)}
    before = path.Detection({"a": 0.7, "b": 0.8, "c": 0.75}, kept)
    worse = path.Detection({"a": 0.65, "b": 0.74, "c": 0.71}, kept)
    assert worse.told_if_worse_than(before, 0.95) == (
        "the mean AUROC over 3 kinds is 0.700, 0.750 before"
    )
    mixed = path.Detection({"a": 0.55, "b": 0.82, "c": 0.76}, kept)
    assert mixed.told_if_worse_than(before, 0.95) == ""
    assert before.told_if_worse_than(worse, 0.95) == ""
    little = path.Detection({kind: value - 0.019 for kind, value in before.auroc.items()}, kept)
    assert little.told_if_worse_than(before, 0.95) == ""
    one = path.Detection({"a": 0.5}, {"a": kept["a"]})
    assert one.told_if_worse_than(path.Detection({"a": 0.9}, {"a": kept["a"]}), 0.95) == ""
