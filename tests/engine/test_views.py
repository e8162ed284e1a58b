from __future__ import annotations

import copy

import pytest
import torch
from modules import hooks_of, mlp
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

from skood.engine.copying import copy_module
from skood.engine.views import view_of


class Keeps(nn.Module):
    """Keeps tensors that are neither parameters nor buffers, and what it computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale, self.kept, self.by_size = torch.ones(4), [], {}

    def forward(self, x):
        self.kept.append(self.layer(x * self.scale))
        self.by_size[len(x)] = self.kept[-1]
        return self.kept[-1]


@pytest.mark.parametrize(
    "module", [mlp(), nn.LSTM(4, 3), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))]
)
def test_a_view_has_the_tensors_of_the_module_and_parts_of_its_own(module):
    view, _ = view_of(module)
    assert {id(part) for part in view.modules()}.isdisjoint(map(id, module.modules()))
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert view.state_dict(keep_vars=True)[name] is tensor


def test_a_view_has_tensors_in_attributes_without_their_graphs():
    module = Keeps()
    module(torch.ones(2, 4))
    view, _ = view_of(module)
    assert view.scale is module.scale
    assert view.kept is not module.kept
    assert torch.equal(view.kept[0], module.kept[0])
    assert not view.kept[0].requires_grad
    assert module.kept[0].requires_grad
    assert view.by_size[2] is view.kept[0]
    copy.deepcopy(view)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_weights_that_are_computed_anew_in_each_forward(wrap):
    module = wrap(nn.Linear(4, 3))
    module(torch.ones(2, 4))
    view, _ = view_of(module.eval())
    assert torch.equal(view(torch.ones(2, 4)), module(torch.ones(2, 4)))
    copy.deepcopy(view_of(module)[0])


def test_a_view_is_in_the_mode_of_the_module_part_by_part():
    class Wakes(nn.Dropout):
        def __setstate__(self, state):
            super().__setstate__(state)
            self.train()

    module = nn.Sequential(Wakes(), nn.BatchNorm1d(4), torch.fx.symbolic_trace(mlp())).train()
    module[0].eval()
    view, _ = view_of(module)
    assert [p.training for p in view.modules()] == [p.training for p in module.modules()]


def test_hooks_come_along_with_their_handle():
    module = mlp()
    handle = module[0].register_forward_hook(lambda *_: None)
    view, copied = view_of(module, handle)
    assert len(hooks_of(view)) == 1
    copied.remove()
    assert hooks_of(view) == []
    assert len(hooks_of(module)) == 1


def test_torchscript_is_shared():
    module = copy_module(nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.Linear(3, 2)))
    view, _ = view_of(module)
    assert view[0] is not module[0]
    assert view[0].script is module[0].script
