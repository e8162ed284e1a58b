from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from modules import Body, mlp
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from skood.engine.copying import copy_module, on_cpu, weights_digest
from skood.exceptions import HeadNotFoundError

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


class Box:
    """Holds what a module keeps."""

    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize(
    ("keep", "find"),
    [
        (lambda values: values, lambda kept: kept),
        (lambda values: [values], lambda kept: kept[0]),
        (lambda values: {"a": [{"b": values}]}, lambda kept: kept["a"][0]["b"]),
        (lambda values: Box((values,)), lambda kept: kept.content[0]),
    ],
    ids=["attribute", "list", "nested", "object"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_activations_kept_anywhere_are_copied_by_value(keep, find, inference):
    module = mlp()
    with torch.inference_mode(inference):
        values = module(torch.tensor(X))
    module.kept = keep(values)
    copied = copy_module(module)
    assert torch.equal(find(copied.kept), values)
    assert find(copied.kept).data_ptr() != values.data_ptr()
    assert not find(copied.kept).requires_grad
    assert not find(copied.kept).is_inference()
    assert find(module.kept) is values
    for again in (pickle.loads(pickle.dumps(on_cpu(module))), copy.deepcopy(copied)):
        assert torch.equal(find(again.kept), values)


def test_activations_kept_in_a_buffer_are_copied_by_value():
    module = mlp()
    module.register_buffer("kept", torch.zeros(10, 3))
    module.kept = module(torch.tensor(X))
    copied = on_cpu(module)
    assert copied[0].weight is module[0].weight
    assert torch.equal(copy.deepcopy(copied).kept, module.kept)
    assert module.kept.requires_grad


def test_lazy_layers_with_lazy_buffers_are_copied():
    copied = copy_module(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(3)))
    assert copied(torch.ones(8, 5)).shape == (8, 3)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "pruning"])
def test_weights_computed_in_a_forward_are_copied(norm):
    module = mlp()
    if norm == "pruning":
        prune.l1_unstructured(module[0], "weight", 0.5)
    else:
        getattr(nn.utils, norm)(module[0])
    module.eval()
    logits = module(torch.tensor(X))
    copied = copy_module(module)
    assert torch.equal(copied(torch.tensor(X)), logits)
    copied(torch.tensor(X)).sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


class ReturnsItself(nn.Linear):
    def __deepcopy__(self, memo):
        return self


def test_a_part_that_copies_as_itself_is_refused_by_name():
    with pytest.raises(TypeError, match=r"'0\.weight' of the copy is that.*remove that method"):
        copy_module(nn.Sequential(ReturnsItself(6, 4), nn.Linear(4, 3)))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("unflatten", [False, True])
def test_an_exported_program_is_refused_with_what_to_pass(inside, unflatten):
    program = torch.export.export(Body().eval(), (torch.zeros(8, 6),))
    module = torch.export.unflatten(program) if unflatten else program.module()
    with pytest.raises(
        HeadNotFoundError, match=r"exported program.*Pass the nn\.Module from which"
    ):
        copy_module(nn.Sequential(module) if inside else module)


def test_a_traced_module_is_copied():
    traced = torch.fx.symbolic_trace(mlp().eval())
    assert torch.equal(copy_module(traced)(torch.tensor(X)), traced(torch.tensor(X)))


# Parametrizations


def parametrized(kind):
    module = mlp()
    getattr(parametrizations, kind)(module[0])
    return module.eval()


KINDS = ["weight_norm", "spectral_norm", "orthogonal"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrized_copy_pickles_and_computes_the_same(kind):
    module = parametrized(kind)
    logits = module(torch.tensor(X))
    copied = copy_module(module)
    for twin in (
        copied,
        copy.deepcopy(copied),
        pickle.loads(pickle.dumps(copied)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(on_cpu(module))))),
    ):
        assert torch.equal(twin(torch.tensor(X)), logits)
        assert parametrize.is_parametrized(twin[0], "weight")
        assert type(twin[0]).__base__ is nn.Linear
        assert [name for name, _ in twin.named_parameters()] == [
            name for name, _ in module.named_parameters()
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_parametrizations_removed_from_one_stay_in_the_other(kind):
    module = parametrized(kind)
    logits = module(torch.tensor(X))
    copied = copy_module(module)
    parametrize.remove_parametrizations(module[0], "weight")
    assert torch.equal(copied(torch.tensor(X)), logits)
    again = copy_module(copied)
    parametrize.remove_parametrizations(copied[0], "weight")
    assert type(copied[0]) is nn.Linear
    assert torch.allclose(copied(torch.tensor(X)), logits)
    assert torch.equal(again(torch.tensor(X)), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_without_its_parametrizations_pickles(kind):
    module = parametrized(kind)
    parametrize.remove_parametrizations(module[0], "weight")
    loaded = pickle.loads(pickle.dumps(copy_module(module)))
    assert torch.equal(loaded(torch.tensor(X)), module(torch.tensor(X)))


def test_a_cache_of_parametrized_tensors_is_not_that_of_the_module_given():
    module = parametrized("weight_norm")
    copied = copy_module(module)
    with torch.no_grad():
        copied[0].parametrizations.weight.original0.mul_(2)
    with parametrize.cached():
        assert torch.allclose(2 * module[0].weight, copied[0].weight)


def test_what_is_pickled_of_a_module_on_the_cpu_is_on_its_tensors():
    module = mlp()
    pairs = zip(module.parameters(), on_cpu(module).parameters(), strict=True)
    assert all(own is other for own, other in pairs)


class Recording(Body):
    """In the way of transformers: the first forward adds hooks that cannot be pickled."""

    def forward(self, x):
        if not getattr(self, "_output_capturing_hooks_installed", False):
            self._output_capturing_hooks_installed = True

            def output_capturing_hook(module, args, output):
                vars(self).setdefault("seen", []).append(len(output))

            self.body.register_forward_hook(output_capturing_hook)
        return super().forward(x)


def test_hooks_that_a_forward_adds_again_do_not_keep_a_module_from_pickling():
    module = Recording()
    rows = torch.tensor(X).to(module.body.weight.dtype)
    module(rows)
    loaded = pickle.loads(pickle.dumps(on_cpu(module)))
    loaded.seen = []
    loaded(rows)
    assert loaded.seen == [len(X)]
    assert len(module.body._forward_hooks) == 1


class OfEverything(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).to(torch.bfloat16)
        self.later = nn.LazyLinear(3)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("sparse", torch.eye(3).to_sparse())


@pytest.mark.parametrize("name", ["layer.weight", "layer.bias", "flag"])
def test_changed_weights_are_told_by_their_digest(name):
    module = OfEverything()
    digest = weights_digest(module)
    assert weights_digest(copy.deepcopy(module)) == digest
    assert weights_digest(nn.DataParallel(module)) == digest
    with torch.no_grad():
        changed = module.state_dict()[name]
        changed.logical_not_() if changed.dtype == torch.bool else changed.mul_(2)
    assert weights_digest(module) != digest
