from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from judged_fits import correlated_table, fit
from sklearn.base import clone
from torch import nn

from skood import SparseEnergyOODDetector, fitting, path
from skood.engine.objective import Distillation
from skood.engine.training import Training
from skood.exceptions import (
    AccuracyDropWarning,
    DivergenceError,
    DivergenceWarning,
    NonFiniteLogitsError,
    PenaltyWithoutEffectWarning,
    SelectionWarning,
)
from skood.fitting import Fit
from skood.model_selection import AccuracyGuard
from skood.scores import get_score, list_scores

N_RUNGS = 4
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


def deep_table():
    """The same rows, and a network with a hidden layer before that of the features."""
    X, y, _ = correlated_table()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2)
        )
    settings = {"module": module, "pretrain_epochs": 20, "max_epochs": 0, "random_state": 0}
    return X, y, SparseEnergyOODDetector(**settings).fit(X, y).module_


@pytest.fixture(scope="module")
def table():
    return correlated_table()


def test_a_row_of_the_path_is_a_rung(table):
    detector = fit(table)
    assert [list(record) for record in detector.path_] == [COLUMNS] * len(detector.path_)
    weights = [record["sparsity_weight"] for record in detector.path_]
    assert weights == [None, 0.0, 0.3, 1.0, 3.0]
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
    for wanted in (0, 1, 3, 4):
        judged = []

        def best_of(records, _, wanted=wanted):
            return records[min(wanted, len(records) - 1)]

        class Judge(path.Judge):
            def __call__(self, network, weight, start, judged=judged):
                judged.append(network.uncompiled_copy())
                return super().__call__(network, weight, start)

        monkeypatch.setattr(path, "best_of", best_of)
        monkeypatch.setattr(path, "Judge", Judge)
        detector = fit(table)
        monkeypatch.undo()
        chosen = detector.path_[wanted]
        assert chosen["chosen"]
        assert detector.sparsity_weight_ == chosen["sparsity_weight"]
        of_rung = judged[wanted].public.state_dict()
        for name, tensor in detector.module_.state_dict().items():
            assert tensor.equal(of_rung[name])
        epochs = [record["epoch"] for record in detector.history_]
        assert epochs == list(range(1, wanted + 1))
        for epoch, record in zip(detector.history_, detector.path_[1:], strict=False):
            assert epoch["sparsity_weight"] == record["sparsity_weight"]
            assert (epoch["learning_rate"], epoch["layers"]) == (0.001, "last")
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
            lost = {None: 0.0, 0.0: 0.5, 0.3: 0.005}.get(weight, 0.1)
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
    assert len(detector.path_) == 1 + N_RUNGS
    assert detector.sparsity_weight_ == 0.3


def test_the_score_is_chosen_among_all_but_those_of_the_gradient(table):
    detector = fit(table, score_function="auto", max_epochs=1)
    names = {record["score_function"] for record in detector.path_}
    assert names <= set(list_scores()) - {"odin"}
    assert {"energy", "three_views", "two_views", "knn", "vim"} <= names
    (chosen,) = [record for record in detector.path_ if record["chosen"]]
    # Of a table, one kind is made, which shows too little for another score.
    assert chosen["score_function"] == "three_views"
    assert chosen["auroc"] < max(record["auroc"] for record in detector.path_)
    fixed = fit(table, score_function=chosen["score_function"], max_epochs=1)
    assert type(detector.score_function_) is type(fixed.score_function_)


@pytest.mark.parametrize("chosen", ["three_views", "two_views"])
def test_layers_are_looked_at_if_the_score_that_is_chosen_does(table, monkeypatch, chosen):
    names = [name for name in list_scores() if name in (chosen, "energy", "layer_moments")]
    monkeypatch.setattr("skood.parameters.list_scores", lambda: names)
    detector = fit(table, score_function="auto", max_epochs=0)
    assert detector.path_[0]["score_function"] == "energy"
    assert type(detector.score_function_) is type(get_score(chosen))
    assert bool(detector._network.layers) == (chosen == "three_views")


@pytest.mark.parametrize("max_epochs", [3, 0])
def test_the_score_alone_can_be_chosen(table, capsys, max_epochs):
    settings = {"score_function": "auto", "sparsity_weight": 0.3, "max_epochs": max_epochs}
    detector = fit(table, **settings, verbose=1)
    weight = 0.3 if max_epochs else None  # of a network that is not fine-tuned
    assert detector.sparsity_weight_ == weight
    assert {record["sparsity_weight"] for record in detector.path_} == {weight}
    assert len(detector.history_) == max_epochs
    network = "sparsity_weight=0.3" if max_epochs else "the network untouched"
    assert f"{network} with three_views is chosen" in capsys.readouterr().out


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
    assert chosen["score_function"] == "three_views"


def test_distillation_keeps_to_the_network_given(table, monkeypatch):
    X, _, module = table
    expected = module(torch.as_tensor(X[:9]))
    taught = []

    def start(term, network, original=Distillation.start):
        original(term, network)
        taught.append(term._teacher.logits(torch.as_tensor(X[:9])))

    monkeypatch.setattr(Distillation, "start", start)
    fit(table, distillation_weight=1.0, learning_rate=0.01)
    assert len(taught) == N_RUNGS
    for logits in taught:
        assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("pretrain_epochs", [0, 1])
def test_features_that_cannot_be_trained_are_said_once(table, pretrain_epochs):
    X, y, module = table
    frozen = copy.deepcopy(module).requires_grad_(False)
    frozen[-1].requires_grad_(True)
    settings = {"pretrain_epochs": pretrain_epochs, "random_state": 0}
    detector = SparseEnergyOODDetector(frozen, sparsity_weight="auto", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector.fit(X, y)
    assert [w.category for w in caught].count(PenaltyWithoutEffectWarning) == 1


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
    (epoch,) = detector.history_
    assert (epoch["sparsity_weight"], epoch["learning_rate"]) == (2.0, 1e-3)


def test_the_network_is_tried_once(table, monkeypatch):
    tried = []
    monkeypatch.setattr("skood.fitting.check_trainable", lambda *_, **__: tried.append(1))
    fit(table, max_epochs=1)
    assert len(tried) == 1


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
    for weight, relative in zip(weights, (0.0, 0.3, 1.0, 3.0), strict=True):
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


def test_a_rung_is_trained_as_the_path_says(table, monkeypatch):
    trained_by = []

    def run(training, *arguments, original=Training.run):
        weight = next(t.weight for t in training.terms if t.parameter == "sparsity_weight")
        trained_by.append((weight, training.recipe.learning_rate))
        return original(training, *arguments)

    monkeypatch.setattr(Training, "run", run)
    rate = 0.0123456789
    _, *rungs = fit(table, max_epochs=1, learning_rate=rate).path_
    assert trained_by == [(r["sparsity_weight"], rate) for r in rungs]


@pytest.mark.parametrize("layers", ["all", "last"])
def test_the_last_layers_are_trained(monkeypatch, layers):
    data, moved = deep_table(), []

    def run(training, *arguments, original=Training.run):
        before = copy.deepcopy(training.network.public.state_dict())
        records = original(training, *arguments)
        after = training.network.public.state_dict()
        moved.append([name for name in before if not before[name].equal(after[name])])
        return records

    monkeypatch.setattr(Training, "run", run)
    monkeypatch.setattr(path, "best_of", lambda records, _: records[-1])
    detector = fit(data, max_epochs=1, layers=layers)
    everything = list(detector.module_.state_dict())
    # The first layer has less than 30 % of the weights before the head.
    assert moved == [everything[2:]] * N_RUNGS
    assert all(p.requires_grad for p in detector.module_.parameters())
    assert [r["layers"] for r in detector.history_] == ["last"] * N_RUNGS


def test_a_resumed_path_trains_the_same_layers(tmp_path, monkeypatch):
    data = deep_table()
    whole = fit(data)
    for stop in range(1, N_RUNGS + 1):
        epochs = []

        def epoch(training, number, original=Training._epoch, stop=stop, epochs=epochs):
            epochs.append(number)
            if len(epochs) == stop:
                raise KeyboardInterrupt
            return original(training, number)

        with monkeypatch.context() as patches:
            patches.setattr(Training, "_epoch", epoch)
            with pytest.raises(KeyboardInterrupt):
                fit(data, memory=tmp_path / str(stop))
        resumed = fit(data, memory=tmp_path / str(stop))
        for name, tensor in whole.module_.state_dict().items():
            assert tensor.equal(resumed.module_.state_dict()[name])
        assert all(p.requires_grad for p in resumed.module_.parameters())
        assert [r["auroc"] for r in resumed.path_] == [r["auroc"] for r in whole.path_]


def test_each_rung_draws_on_its_own(table, monkeypatch):
    seeds, trained_on = [], []

    def fine_tune(run, network, data, *arguments, original=Fit.fine_tune):
        *_, seed, _ = arguments
        seeds.append(seed)
        trained_on.append(tuple(data.rows.index))
        return original(run, network, data, *arguments)

    monkeypatch.setattr(Fit, "fine_tune", fine_tune)
    fit(table, max_epochs=1)
    for drawn in (seeds, trained_on):
        assert len(set(drawn)) == len(drawn) == N_RUNGS
    assert all(list(rows) == sorted(set(rows)) for rows in trained_on)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e8}, r"Lower learning_rate \(now 1e\+08\)"),
        (
            {"outlier_weight": 1e30, "ood_label": 7},
            r"Lower outlier_weight \(now 1e\+30\) or learning_rate \(now 0.001\)",
        ),
    ],
)
def test_training_that_cannot_succeed_is_refused(table, settings, message):
    X, y, module = table
    known = X, np.where(np.arange(len(y)) % 9 == 0, 7, y), module
    with pytest.raises(DivergenceError, match=message):
        fit(known if "ood_label" in settings else table, **settings)


def diverging(monkeypatch, weight_that_diverges):
    """Let one rung of a path diverge."""

    def epoch(training, number, original=Training._epoch):
        record = original(training, number)
        weight = next(t.weight for t in training.terms if t.parameter == "sparsity_weight")
        return record | {"loss": np.nan} if weight == weight_that_diverges else record

    monkeypatch.setattr(Training, "_epoch", epoch)


@pytest.mark.parametrize(
    ("weight", "tried", "told"),
    [
        (3.0, [None, 0.0, 0.3, 1.0], None),
        (1.0, [None, 0.0, 0.3], None),
        (0.3, [None, 0.0], r"no weight above 0: The loss is nan in epoch 1 .* Lower"),
    ],
)
def test_a_rung_that_diverges_ends_the_ladder(table, monkeypatch, weight, tried, told):
    X, y, module = table
    diverging(monkeypatch, weight)
    detector = SparseEnergyOODDetector(module, sparsity_weight="auto", max_epochs=3, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector.fit(X, y)
    weights = [record["sparsity_weight"] for record in detector.path_]
    assert weights == tried
    assert detector.sparsity_weight_ in weights
    assert np.isfinite(detector.score_samples(X)).all()
    messages = [str(w.message) for w in caught if w.category is DivergenceWarning]
    assert len(messages) == (told is not None)
    assert all(re.search(told, message) for message in messages)


def test_a_path_with_a_rung_that_fails_is_found_again(table, tmp_path, monkeypatch):
    diverging(monkeypatch, 3.0)
    monkeypatch.setattr(path, "best_of", lambda records, _: records[-1])
    epochs, settings = [], {"distillation_weight": 1.0, "learning_rate": 1e-3}

    def epoch(training, number, original=Training._epoch):
        epochs.append(number)
        return original(training, number)

    monkeypatch.setattr(Training, "_epoch", epoch)
    first = fit(table, memory=tmp_path, **settings)
    assert len(epochs) == 4
    again = fit(table, memory=tmp_path, **settings)
    assert len(epochs) == 5  # that which fails, anew
    assert [r["auroc"] for r in again.path_] == [r["auroc"] for r in first.path_]
    assert np.array_equal(again.score_samples(table[0]), first.score_samples(table[0]))


def test_logits_that_overflow_after_training_are_said_to_be(table, monkeypatch):
    class Judge(path.Judge):
        def __call__(self, network, weight, start):
            if weight is not None:
                raise NonFiniteLogitsError("The network gives NaN. Check the scale of X.")
            return super().__call__(network, weight, start)

    monkeypatch.setattr(path, "Judge", Judge)
    told = r"The logits are NaN .* fine-tuning\. Lower learning_rate \(now 0"
    with pytest.raises(DivergenceError, match=told):
        fit(table, max_epochs=1)


def test_the_ladder_begins_with_the_network_given(table, monkeypatch):
    begun_with, taught = [], []

    def fine_tune(run, network, data, *arguments, original=Fit.fine_tune):
        begun_with.append(copy.deepcopy(network.public.state_dict()))
        records = original(run, network, data, *arguments)
        taught.append(copy.deepcopy(arguments[-1].public.state_dict()))
        return records

    monkeypatch.setattr(Fit, "fine_tune", fine_tune)
    monkeypatch.setattr(path, "best_of", lambda records, _: records[-1])
    detector = fit(table)
    given = table[2].state_dict()

    def is_given(state):
        return all(state[name].equal(given[name]) for name in given)

    assert [is_given(state) for state in begun_with] == [True, False, False, False]
    # Nor is the teacher trained, which is the network given, too.
    assert all(is_given(state) for state in taught)
    assert [(r["epoch"], r["sparsity_weight"]) for r in detector.history_] == [
        (1, 0.0),
        (2, 0.3),
        (3, 1.0),
        (4, 3.0),
    ]


def test_a_penalty_that_cannot_be_trained_leaves_weight_0(table):
    def entropy(features):  # has no gradient where a feature is 0
        return torch.special.entr(features / (features.sum(dim=1, keepdim=True) + 1e-12)).sum(1)

    with pytest.warns(DivergenceWarning, match=r"no weight above 0: .*, or pass another penalty"):
        detector = SparseEnergyOODDetector(
            table[2], sparsity_weight="auto", penalty=entropy, max_epochs=3, random_state=0
        ).fit(*table[:2])
    assert [record["sparsity_weight"] for record in detector.path_] == [None, 0.0]


def test_a_rung_that_the_score_refuses_ends_the_ladder(table):
    before = fit(table, max_epochs=0).path_[0]["mean_l1"]

    def size(features, logits, least=0.9):
        sizes = features.abs().sum(dim=1)
        if len(sizes) >= 39 and sizes.mean() < least * before:
            raise ValueError("The features are too small.")
        return sizes

    detector = fit(table, score_function=size, learning_rate=0.03)
    assert 1 < len(detector.path_) < 1 + N_RUNGS
    assert detector.path_[-1]["accuracy_after"] >= detector.path_[0]["accuracy_after"] - 0.01
    with pytest.raises(DivergenceError, match=r"refuses .* \(The features are too small\)\. Low"):
        fit(table, score_function=partial(size, least=0.9999), learning_rate=0.03)


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


def test_the_best_weight_that_is_accurate_enough_is_chosen():
    untouched = judged("two_views", None, blur=0.80, strokes=0.80, edges=0.80)
    small = judged("two_views", 0.1, blur=0.88, strokes=0.90, edges=0.90)
    large = judged("two_views", 1.0, blur=0.90, strokes=0.94, edges=0.93)
    assert path.best_of([untouched, small, large]) is large
    large["accuracy_after"] = 0.88
    assert path.best_of([untouched, small, large]) is small
    assert path.best_of([untouched, large]) is untouched


def test_of_equal_weights_the_smallest_is_chosen():
    equals = [judged("two_views", weight, blur=0.9) for weight in (None, 0.0, 1.0)]
    assert path.best_of(equals) is equals[0]
    assert path.best_of([equals[0] | {"auroc": 0.8}, *equals[1:]]) is equals[1]


def test_a_weight_that_lets_in_more_of_any_kind_is_not_chosen():
    untouched = judged("two_views", None, blur=0.80, strokes=0.80)
    small = judged("two_views", 0.1, blur=0.82, strokes=0.83)
    large = judged("two_views", 1.0, blur=0.99, strokes=0.99) | {"worse": "strokes"}
    assert path.best_of([untouched, small, large]) is small
    assert path.best_of([untouched, large]) is untouched


def test_what_stays_still_is_decided_once_for_all_rungs(table, monkeypatch):
    decided = []
    decide = fitting.names_before_the_last

    def seeing(*given):
        decided.append(decide(*given))
        return decided[-1]

    monkeypatch.setattr(fitting, "names_before_the_last", seeing)
    fit(table)
    assert len(decided) == 1


@pytest.mark.parametrize("aurocs", [(0.0, 1.0), (0.5, 1.0), (0.9, 1.0)])
def test_a_single_known_outlier_chooses_no_score(aurocs):
    reference, other = (
        judged(score, None, outliers=auroc)
        for score, auroc in zip(("two_views", "vim"), aurocs, strict=True)
    )
    assert path.best_of([reference, other], 1) is reference


def test_outliers_of_one_kind_decide_by_their_mean():
    reference = judged("two_views", None, outliers=0.90)
    worse, better = (judged("vim", None, outliers=auroc) for auroc in (0.89, 0.95))
    assert path.best_of([reference, worse], 10**6) is reference
    assert path.best_of([reference, better], 10**6) is better
    # Two standard errors are 2 * sqrt(2 * 0.925 * 0.075 / n), which is 0.05 for 222 outliers.
    assert path.best_of([reference, better], 222) is reference
    assert path.best_of([reference, better], 223) is better
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


def test_a_tie_falls_to_three_views(table):
    X, y, module = table
    # Columns that depend on each other no more, which scores of a distance tell perfectly.
    between = np.full((60, 5), 2, dtype=np.float32) + np.float32([2, -2, 2, -2, 0])
    known = np.concatenate([X, between]), np.concatenate([y, np.full(60, 7)]), module
    detector = fit(known, ood_label=7, score_function="auto", max_epochs=0)
    perfect = [r["score_function"] for r in detector.path_ if r["auroc"] == 1]
    assert len(perfect) > 1
    assert perfect[0] != "three_views"
    assert repr(detector.score_function_) == "ThreeViews()"
