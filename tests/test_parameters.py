"""What the parameters of a detector come to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone

from skood import SparseEnergyOODDetector, parameters
from skood.caching import DiskMemory
from skood.engine.training import Recipe
from skood.scores import Energy, list_scores


@pytest.mark.parametrize(
    ("value", "expected"),
    [("auto", True), (np.str_("auto"), True), ("energy", False), (0.5, False), (Energy(), False)],
)
def test_a_choice_is_left_to_fit_by_a_word(value, expected):
    assert parameters.is_auto(value) is expected


def test_what_fit_is_to_choose_is_told_in_one_order():
    both = SparseEnergyOODDetector(score_function="auto", sparsity_weight="auto")
    assert parameters.chosen_parameters(both) == ["sparsity_weight", "score_function"]
    assert parameters.chosen_parameters(SparseEnergyOODDetector(calibration_size="auto")) == []


def test_a_score_that_is_asked_for_goes_by_its_name():
    assert parameters.scores_of(SparseEnergyOODDetector(score_function="odin")) == {"odin": "odin"}
    score = Energy()
    assert parameters.scores_of(SparseEnergyOODDetector(score_function=score)) == {
        "Energy()": score
    }


def test_scores_of_the_gradient_are_not_chosen_unasked():
    chosen = parameters.scores_of(SparseEnergyOODDetector(score_function="auto"))
    assert set(list_scores()) - set(chosen) == {"odin"}


def test_a_score_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="is unknown"):
        parameters.scores_of(SparseEnergyOODDetector(score_function="enrgy"))


@pytest.mark.parametrize(
    ("module", "asked", "expected"),
    [(None, "auto", None), (None, 3, 3), (torch.nn.Linear(2, 2), "auto", 0)],
)
def test_a_network_that_comes_trained_is_not_pretrained(module, asked, expected):
    detector = SparseEnergyOODDetector(module, pretrain_epochs=asked)
    assert parameters.pretraining_epochs(detector) == expected


def test_the_recipe_is_that_of_the_parameters():
    detector = SparseEnergyOODDetector(
        max_epochs=4, batch_size=16, learning_rate=1, momentum=0, weight_decay=np.float32(0.5)
    )
    recipe = parameters.recipe_of(detector)
    assert recipe == Recipe(4, 16, 1.0, 0.0, 0.5)
    rates = (recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    assert [type(rate) for rate in rates] == [float] * 3
    narrow = parameters.recipe_of(clone(detector).set_params(batch_size=np.int8(16)))
    assert type(narrow.batch_size) is int
    last = parameters.recipe_of(detector.set_params(layers="last"))
    assert last == replace(recipe, layers="last")


@pytest.mark.parametrize(("asked", "expected"), [("auto", None), (0, 0), (np.int64(3), 3)])
def test_workers_are_a_number_or_left_to_the_machine(asked, expected):
    assert parameters.n_workers(SparseEnergyOODDetector(num_workers=asked)) == expected


def test_batches_are_made_as_the_parameters_say():
    def halved(batch):
        return batch.float() / 2

    detector = SparseEnergyOODDetector(preprocess=halved, num_workers=2)
    batcher = parameters.batcher_of(detector, torch.device("cpu"), torch.float32)
    assert (batcher.preprocess, batcher.workers) == (halved, 2)
    assert (batcher.device, batcher.dtype) == (torch.device("cpu"), torch.float32)


def test_nothing_is_kept_that_would_never_be_found_again(tmp_path):
    for settings in ({}, {"memory": tmp_path}, {"random_state": 0}):
        assert parameters.memory_of(SparseEnergyOODDetector(**settings)) is None
    kept = parameters.memory_of(SparseEnergyOODDetector(memory=tmp_path, random_state=0))
    assert isinstance(kept, DiskMemory)
