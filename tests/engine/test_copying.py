from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from modules import Body, mlp
from torch import nn

from skood.engine.copying import copy_module, on_cpu

X = np.random.RandomState(0).randn(10, 6)


def test_a_copy_shares_nothing_and_changes_nothing():
    module = mlp().train()
    module[0].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    copied = copy_module(module)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.fill_(7)
    copied.eval()
    assert module.training
    assert not copied[0].weight.requires_grad
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda module: torch.compile(nn.DataParallel(module))],
    ids=["DataParallel", "compile", "both"],
)
def test_wrappers_are_taken_off(wrap):
    module = mlp()
    copied = copy_module(wrap(module))
    assert type(copied) is nn.Sequential
    assert copied is not module
    assert [name for name, _ in copied.named_parameters()] == [
        name for name, _ in module.named_parameters()
    ]


def test_a_network_with_a_submodule_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 4)

        def forward(self, x):
            return self.module(x)

    assert type(copy_module(Holder())) is Holder


def test_a_module_that_cannot_be_copied_is_refused_with_the_cause():
    module = mlp()
    module.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"\(Sequential\) cannot be copied: .*lock"):
        copy_module(module)


def test_parts_that_were_compiled_are_copied_plain():
    module = nn.Sequential(torch.compile(mlp(), backend="eager"), nn.Identity())
    module.compile(backend="eager")
    copied = copy_module(module)
    assert [type(part) for part in copied] == [nn.Sequential, nn.Identity]
    assert copied[0][0].weight is not module[0]._orig_mod[0].weight
    assert copied._compiled_call_impl is None
    assert "_orig_mod" in module[0]._modules


@pytest.mark.parametrize(("part", "name"), [("", "the module"), ("body", "body")])
def test_a_forward_that_copies_would_share_is_refused(part, name):
    module = Body()
    owner = module.get_submodule(part)
    owner.forward = torch.compile(owner.forward, backend="eager")
    with pytest.raises(TypeError, match=rf"forward of '{name}' was replaced.*module\.compile\(\)"):
        copy_module(module)


def test_stored_activations_are_copied_by_value():
    module = mlp()
    module.activations = module(torch.tensor(X))
    copied = copy_module(module)
    assert torch.equal(copied.activations, module.activations)
    assert copied.activations.data_ptr() != module.activations.data_ptr()
    assert not copied.activations.requires_grad


class Calling(nn.Module):
    """A classifier that keeps functions as an attribute."""

    def __init__(self, keep):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.kept = keep(self)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "keep",
    [
        lambda module: lambda x: module.layer(x),
        lambda module: [lambda x: module.layer(x)],
        lambda module: {"first": lambda x: module.layer(x)},
        lambda module: {"all": [lambda x: module.layer(x)]},
    ],
    ids=["function", "list", "dict", "lists in a dict"],
)
def test_functions_that_reach_the_module_given_are_refused(keep):
    with pytest.raises(TypeError, match=r"'kept' of 'the module' holds a function.*Make it a meth"):
        copy_module(Calling(keep))


@pytest.mark.parametrize(
    "keep", [lambda module: torch.relu, lambda module: lambda x: x + 1, lambda module: len]
)
def test_functions_that_reach_nothing_are_copied(keep):
    assert isinstance(copy_module(Calling(keep)), Calling)


def test_a_module_on_the_cpu_is_itself():
    module = mlp()
    assert on_cpu(module) is module
