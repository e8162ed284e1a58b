from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
from modules import mlp
from torch import nn
from torch.nn.utils import parametrizations

from skood.engine.folding import Folded, foldable
from skood.engine.inference import forward_rows
from skood.engine.opening import folds, unfold
from skood.networks import CifarDenseNet, CifarResNet, WideResNet
from skood.rows import as_rows

X = np.random.RandomState(0).randn(40, 6).astype(np.float32)
IMAGES = np.random.RandomState(0).rand(12, 3, 16, 16).astype(np.float32)


BOTH = {("conv", "norm"), ("conv2", "norm2")}


def with_statistics(module):
    """The module in evaluation mode, its batch-norms far from doing nothing."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (*part.parameters(), *list(part.buffers())[:2]):
                values.data.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return module.eval()


class Parts(nn.Module):
    """A convolution, a batch-norm, another of each, and a function of them."""

    def __init__(self, function, **options):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.norm2 = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
        self.head = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self, x).mean(dim=(2, 3)))


def names(module, batch):
    return foldable(with_statistics(module), torch.as_tensor(batch))


def assert_scores_without_batch_norm(network, rows, monkeypatch):
    """What scores gives what the network does, and calls no batch-norm."""
    expected = network.module(torch.as_tensor(rows))
    monkeypatch.delattr(nn.functional, "batch_norm")
    torch.testing.assert_close(logits_of(network, rows).float(), expected, rtol=1e-5, atol=1e-5)


def logits_of(network, rows):
    return torch.cat([logits for _, (_, logits, _) in forward_rows(network, as_rows(rows))])


# What is folded


@pytest.mark.parametrize(
    ("function", "pairs"),
    [
        (lambda m, x: m.norm(m.conv(x)), {("conv", "norm")}),
        (lambda m, x: m.norm2(m.conv2(m.norm(m.conv(x)))), BOTH),
        (lambda m, x: m.norm2(m.conv2(torch.relu(m.norm(m.conv(x))))), BOTH),
        # A batch-norm before a convolution is none of its own.
        (lambda m, x: m.conv2(torch.relu(m.norm(m.conv(x)))), {("conv", "norm")}),
        # By what flows where, not by the order in which layers are made.
        (lambda m, x: m.norm(m.conv2(m.norm2(m.conv(x)))), {("conv", "norm2"), ("conv2", "norm")}),
    ],
    ids=["one", "two", "relu", "before", "crossed"],
)
def test_a_batch_norm_after_a_layer_is_found(function, pairs):
    assert set(names(Parts(function), IMAGES)) == pairs


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(torch.relu(m.conv(x))),
        lambda m, x: m.norm(m.conv(x).relu_()),
        lambda m, x: m.norm(h := m.conv(x)) + h,
        lambda m, x: (h := m.conv(x)) * 2 + m.norm(h),
        lambda m, x: m.norm(h := m.conv(x)) + m.norm2(h),
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(2 * x)),
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),
        lambda m, x: (
            m.norm(m.conv(x)) + m.norm(m.conv2(m.conv2.weight.new_ones(len(x), 4, 16, 16)))
        ),
        lambda m, x: m.norm(m.conv(x)[:, :, ::2]),
        lambda m, x: m.norm(nn.functional.conv2d(x, m.conv.weight)),
        lambda m, x: m.norm(h := m.conv(x)) * float(h.mean()),
    ],
    ids=[
        *("relu", "in_place", "skip", "used_before", "two_norms", "twice", "layer_twice"),
        *("norm_twice", "view", "function", "number"),
    ],
)
def test_what_another_operation_sees_is_not_folded(function):
    assert names(Parts(function), IMAGES) == ()


def conv_then_norm(m, x):
    return m.norm(m.conv(x))


def hooked(module):
    module.conv.register_forward_hook(lambda layer, args, output: output * 2)


def hooked_norm(module):
    module.norm.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def replaced(module):
    conv = module.conv
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2


def parametrized(module):
    parametrizations.weight_norm(module.conv)


def subclassed(module):
    class Loud(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    module.norm.__class__ = Loud


@pytest.mark.parametrize("change", [hooked, hooked_norm, replaced, parametrized, subclassed])
def test_layers_that_do_more_than_their_class_are_not_folded(change):
    module = Parts(conv_then_norm)
    change(module)
    assert names(module, IMAGES) == ()


def test_batch_norm_without_statistics_is_not_folded():
    module = Parts(conv_then_norm, track_running_stats=False)
    assert names(module, IMAGES) == ()


def test_a_layer_of_sequences_is_not_folded(opened):
    # The batch-norm is over positions, of which there are as many as outputs.
    layers = [nn.Unflatten(1, (3, 2)), nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Flatten()]
    network = opened(with_statistics(nn.Sequential(*layers, nn.Linear(9, 4))), X)
    assert network.pairs == ()
    torch.testing.assert_close(logits_of(network, X).float(), network.module(torch.tensor(X)))


@pytest.mark.parametrize(
    ("make", "n_pairs"),
    [
        (lambda: CifarResNet(8, n_classes=4), 7),
        (lambda: WideResNet(10, 1, n_classes=4), 3),
        (lambda: CifarDenseNet(10, 4, n_classes=4), 3),
    ],
    ids=["resnet", "wide_resnet", "densenet"],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_agree_with_what_they_are_folded_from(opened, make, n_pairs, precision):
    module = with_statistics(make())
    rows = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)
    network, plain = (
        opened(module, rows, precision=precision, fold_batch_norm=fold) for fold in (True, False)
    )
    assert (network.execution["folded"], plain.execution["folded"]) == (n_pairs, 0)
    found, expected = (logits_of(each, rows) for each in (network, plain))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[precision] * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert not torch.equal(found, expected)


def test_what_is_folded_by_hand_is_the_same():
    module = with_statistics(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    layer, norm = copy.deepcopy(module[0]), module[1]
    folded = Folded(copy.deepcopy(module), [("0", "1")]).module
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded[0].weight, layer.weight * scale[:, None])
    torch.testing.assert_close(folded[0].bias, (layer.bias - norm.running_mean) * scale + norm.bias)
    assert torch.equal(folded[1](layer.weight.T), layer.weight.T)


# What stays as it is


def test_the_module_that_users_see_keeps_its_batch_norms(opened):
    network = opened(with_statistics(mlp().float()), X)
    before = copy.deepcopy(network.public.state_dict())
    logits_of(network, X)
    assert any(isinstance(part, nn.BatchNorm1d) for part in network.public.modules())
    for name, tensor in network.public.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_not_folded_is_there_once(opened):
    network = opened(with_statistics(Parts(conv_then_norm)), IMAGES)
    logits_of(network, IMAGES)
    folded = network._folded.module
    assert folded.head.weight is network.module.head.weight
    assert folded.conv.weight is not network.module.conv.weight


def test_with_fold_batch_norm_false_the_network_scores_itself(opened):
    module = with_statistics(mlp().float())
    network = opened(module, X, fold_batch_norm=False)
    assert network.pairs == ()
    assert torch.equal(network.logits(torch.tensor(X)), module(torch.tensor(X)))


def test_training_is_by_the_batch_norms_themselves(opened):
    network = opened(with_statistics(mlp().float()), X)
    before = {name: x.clone() for name, x in network.module.named_buffers()}
    network.train(True)
    _, logits = network.trained(torch.tensor(X))
    logits.sum().backward()
    network.train(False)
    assert all(p.grad is not None for p in network.module.parameters())
    changed = [not torch.equal(x, before[name]) for name, x in network.module.named_buffers()]
    assert all(changed)


def test_a_batch_norm_with_two_names_that_is_called_twice_is_not_folded(opened):
    module = Parts(lambda m, x: m.again[0](m.conv(x)) + m.norm(m.conv2(m.norm(m.conv(x)))))
    module.again = nn.ModuleList([module.norm])
    assert opened(with_statistics(module), IMAGES).pairs == ()


@pytest.mark.parametrize("kind", [list, nn.ModuleList, lambda parts: nn.Sequential(*parts)])
def test_layers_with_other_names_or_in_lists_are_folded(opened, kind, monkeypatch):
    module = Parts(lambda m, x: m.held[1](m.held[0](x)))
    module.held = kind([module.conv, module.norm])
    network = opened(with_statistics(module), IMAGES)
    assert_scores_without_batch_norm(network, IMAGES, monkeypatch)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 10.0}])
def test_batch_norms_of_all_options_are_folded(opened, bias, options, monkeypatch):
    layer, norm = nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4, **options)
    module = nn.Sequential(layer, norm, nn.ReLU(), nn.Linear(4, 3))
    network = opened(with_statistics(module), X)
    assert_scores_without_batch_norm(network, X, monkeypatch)


class OwnModes(nn.Sequential):
    """Switches the mode of its batch-norms alone."""

    def train(self, mode=True):
        for part in self:
            if isinstance(part, nn.BatchNorm1d):
                part.training = mode
        return self


def test_a_network_whose_mode_nobody_switches_is_folded(opened, monkeypatch):
    module = OwnModes(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    network = opened(with_statistics(module), X)
    assert module.training
    assert module[0].training
    assert_scores_without_batch_norm(network, X, monkeypatch)


def test_layers_called_by_keyword_are_folded(opened, monkeypatch):
    module = Parts(lambda m, x: m.norm(input=m.conv(input=x)))
    network = opened(with_statistics(module), IMAGES)
    assert_scores_without_batch_norm(network, IMAGES, monkeypatch)


def test_looking_for_pairs_keeps_no_outputs_of_layers():
    released = []

    def function(m, x):
        hidden = m.conv(x)
        output = weakref.ref(hidden)
        hidden = m.norm(hidden)
        released.append(output() is None)
        return hidden

    assert names(Parts(function), IMAGES) == (("conv", "norm"),)
    assert released == [True]


def test_a_batch_norm_whose_values_are_read_is_not_folded(opened):
    network = opened(
        with_statistics(Parts(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.norm())), IMAGES
    )
    assert network.pairs == ()


# After changes


def change_in_place(module):
    with torch.no_grad():
        module.norm.weight.mul_(2)


def change_statistics(module):
    module.norm.running_mean.add_(1)


def replace_values(module):
    # As torch.nn.utils.vector_to_parameters does.
    for parameter in module.parameters():
        parameter.data = parameter.data * 2


@pytest.mark.parametrize("change", [change_in_place, change_statistics, replace_values])
def test_changes_of_the_module_that_users_see_reach_the_scores(opened, change):
    network = opened(with_statistics(Parts(conv_then_norm)), IMAGES)
    before = logits_of(network, IMAGES)
    change(network.public)
    found, expected = logits_of(network, IMAGES), network.public(torch.tensor(IMAGES))
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_scores_bitwise_the_same(opened, travel):
    network = opened(with_statistics(mlp().float()), X)
    twin = travel(network)
    assert twin.pairs == network.pairs != ()
    assert torch.equal(logits_of(twin, X), logits_of(network, X))


def test_rows_score_bitwise_the_same_in_any_company(opened):
    network = opened(with_statistics(CifarResNet(8, n_classes=4)), np.tile(IMAGES, (4, 1, 2, 2)))
    rows = np.tile(IMAGES, (4, 1, 2, 2))
    whole = logits_of(network, rows)
    for part in (slice(0, 20), slice(7, 8), slice(20, 48)):
        assert torch.equal(logits_of(network, rows[part]), whole[part])


@pytest.mark.parametrize("layers", [False, True])
def test_a_network_that_no_longer_agrees_goes_on_as_it_is(opened, layers):
    module = with_statistics(Parts(lambda m, x: m.norm2(m.conv2(conv_then_norm(m, x)))))
    network = opened(module, IMAGES, layers=layers)
    assert network.pairs == ((("conv2", "norm2"),) if layers else tuple(sorted(BOTH)))
    logits_of(network, IMAGES)  # which folds it
    assert folds(network, as_rows(IMAGES))
    network.module.function = lambda m, x: (y := m.conv2(conv_then_norm(m, x))).relu() + m.norm2(y)
    assert not folds(network, as_rows(IMAGES))
    unfold(network, as_rows(IMAGES))
    assert network.pairs == ()
    assert network.layers == (("conv",) if layers else ())
    own = {"fold_batch_norm": False, "layers": layers}
    expected = opened(copy.deepcopy(network.module), IMAGES, **own)
    assert network.shapes == expected.shapes
    assert torch.equal(logits_of(network, IMAGES), logits_of(expected, IMAGES))
