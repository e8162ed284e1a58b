"""What the processes of a group must have in common."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from skood import SparseEnergyOODDetector
from skood.agreement import facts_of
from skood.rows import as_rows

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([0, 1, 0, 1])

OTHERS = {
    "head": "1",
    "penalty": "l1",
    "sparsity_weight": 0.5,
    "outlier_weight": 0.5,
    "distillation_weight": 1.0,
    "score_function": "msp",
    "tpr": 0.9,
    "calibration_size": 0.2,
    "ood_label": -1,
    "max_epochs": 2,
    "pretrain_epochs": 1,
    "batch_size": 64,
    "learning_rate": 0.01,
    "momentum": 0.5,
    "weight_decay": 0.1,
    "layers": "last",
    "augment": "flip",
    "preprocess": nn.ReLU(),
    "precision": "float32",
    "compile": True,
    "fold_batch_norm": False,
}
"""Another value of each parameter that all must share."""

OF_A_PROCESS = {"device": "cpu", "num_workers": 2, "memory": "folder", "verbose": 1}
"""Parameters in which processes may differ."""


def facts(X=X, y=Y, seeds=(1, 2), **parameters):
    settings = {"random_state": 0} | parameters
    return facts_of(SparseEnergyOODDetector(**settings), as_rows(X), y, seeds)


def test_every_parameter_is_shared_or_of_a_process():
    names = set(SparseEnergyOODDetector().get_params(deep=False))
    assert names == {*OTHERS, *OF_A_PROCESS, "module", "random_state"}


@pytest.mark.parametrize("name", OTHERS)
def test_a_parameter_that_differs_is_told(name):
    one, other = facts(), facts(**{name: OTHERS[name]})
    assert {key for key in one if one[key] != other[key]} == {name}


@pytest.mark.parametrize("name", sorted(set(OF_A_PROCESS) - {"memory"}))
def test_processes_may_differ_in_what_is_their_own(name):
    assert facts(**{name: OF_A_PROCESS[name]}) == facts()


def test_memory_differs_only_if_one_has_none(tmp_path):
    one, other, none = facts(memory=tmp_path / "a"), facts(memory=tmp_path / "b"), facts()
    assert one == other
    assert {key for key in one if one[key] != none[key]} == {"memory"}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"X": X + 1}, "X"),
        ({"X": X.astype(np.float64)}, "X"),
        ({"y": Y[::-1]}, "y"),
        ({"y": None}, "y"),
        ({"seeds": (1, 3)}, "random_state"),
        ({"module": nn.Linear(3, 2)}, "module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_fitted_to_what_is_told(changed, name):
    one, other = facts(), facts(**changed)
    assert {key for key in one | other if one.get(key) != other.get(key)} == {name}


def test_weights_of_a_module_that_differ_are_told():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert facts(module=one)["module"] != facts(module=other)["module"]
    other.load_state_dict(one.state_dict())
    assert facts(module=one) == facts(module=other)
