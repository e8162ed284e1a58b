from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine.inference import forward_rows
from skood.engine.layers import MOST_CHANNELS, inner_layers, moments_of
from skood.engine.network import layer_is_lost
from skood.engine.outputs import Seen
from skood.networks import CifarDenseNet, CifarResNet, WideResNet
from skood.rows import as_rows

IMAGES = np.random.RandomState(0).randn(90, 3, 8, 8).astype(np.float32)


def linear(n):
    """So many linear layers before the head, which is the last."""
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(n)), nn.Linear(4, 3))


# Which layers


@pytest.mark.parametrize(
    ("n_layers", "found"),
    [
        (0, ()),
        (1, ("0",)),
        (2, ("0",)),
        (3, ("1",)),
        (4, ("1", "2")),
        (6, ("2", "4")),
        (7, ("2", "5")),
        (19, ("6", "13")),
    ],
)
def test_they_lie_a_third_and_two_thirds_of_the_way(n_layers, found):
    module = linear(n_layers).eval()
    assert inner_layers(module, str(n_layers), torch.zeros(5, 4)) == found


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: CifarResNet(20), ("layer1.2.conv2", "layer3.0.conv1")),
        (lambda: WideResNet(16, 2), None),
        (lambda: CifarDenseNet(22, 12), None),
    ],
)
def test_those_of_known_networks(make, found):
    module = make().eval()
    head = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)][-1]
    names = inner_layers(module, head, torch.zeros(4, 3, 32, 32))
    convolutions = [n for n, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    assert len(names) == 2
    assert set(names) <= set(convolutions)
    assert found in (None, names)


class Odd(nn.Module):
    """Has layers of all kinds that do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.counted = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.folded, self.head, self.after = nn.Linear(2, 2), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.counted(self.twice(self.twice(x)))
        x = self.folded(x.reshape(-1, 2)).reshape(x.shape)  # gives values for more rows
        return self.head(x) + 0 * self.after(x.new_ones(len(x), 3))


def test_others_do_not_count():
    assert inner_layers(Odd().eval(), "head", torch.zeros(5, 4)) == ("counted",)


def test_without_a_head_that_is_seen_there_are_none():
    assert inner_layers(linear(3).eval(), None, torch.zeros(5, 4)) == ()


# What is seen of them


def test_moments_are_those_of_the_positions():
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(7, 3, 9, 6)
    output = layer(x)
    found = moments_of(layer, output).detach().numpy()
    values = output.detach().numpy().reshape(7, 5, -1)
    np.testing.assert_allclose(found[:, 0], values.mean(axis=2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[:, 1], values.std(axis=2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv3d])
def test_any_number_of_axes(make):
    axes = {nn.Conv1d: 1, nn.Conv3d: 3}[make]
    layer = make(2, 4, 1)
    output = layer(torch.randn(3, 2, *[5] * axes))
    torch.testing.assert_close(moments_of(layer, output)[:, 0], output.flatten(2).mean(dim=2))


def test_the_channels_of_a_linear_layer_come_last():
    layer, x = nn.Linear(4, 6), torch.randn(5, 8, 4)
    found = moments_of(layer, layer(x))
    assert found.shape == (5, 2, 6)
    torch.testing.assert_close(found[:, 0], layer(x).mean(dim=1))
    torch.testing.assert_close(found[:, 1], layer(x).std(dim=1, correction=0))


def test_values_of_one_position_do_not_deviate():
    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    assert torch.equal(moments_of(layer, layer(x))[:, 0], layer(x))
    assert not moments_of(layer, layer(x))[:, 1].any()


@pytest.mark.parametrize(("width", "kept"), [(256, 256), (257, 129), (600, 200), (2048, 256)])
def test_of_many_channels_some_are_looked_at(width, kept):
    layer = nn.Linear(1, width)
    found = moments_of(layer, torch.arange(width).float()[None])[0, 0]
    assert len(found) == kept <= MOST_CHANNELS
    assert len(found.diff().unique()) == 1


def test_moments_are_computed_in_float32_at_least():
    layer = nn.Conv2d(1, 1, 1)
    half = 1000 + torch.randn(2, 1, 30, 30)
    expected = half.bfloat16().double().flatten(2).std(dim=2, correction=0)
    found = moments_of(layer, half.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 1].double(), expected, rtol=1e-3, atol=1e-3)
    assert moments_of(layer, half.double()).dtype == torch.float64


# In a network


def images():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def layers_of(network, X):
    return Seen.joined(seen for _, seen in forward_rows(network, as_rows(X), features=True)).layers


def test_a_network_looks_at_them_if_asked_to(opened):
    assert layers_of(opened(images(), IMAGES), IMAGES) is None
    network = opened(images(), IMAGES, layers=True, fold_batch_norm=False)
    assert network.layers == ("1", "4")
    assert "inner layers '1', '4'" in network.describe()
    found = layers_of(network, IMAGES)
    with torch.no_grad():  # before what comes next writes into it
        first = network.public[:2](torch.tensor(IMAGES))
    assert found.shape == (90, 2, 14)
    torch.testing.assert_close(found[:, 0, :6], first.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(part._forward_hooks for part in network.public.modules())
    assert not any(len(part._forward_hooks) > 1 for part in network.module.modules())


@pytest.mark.parametrize("fold_batch_norm", [False, True])
def test_a_compiled_network_that_need_not_look_scores_compiled(opened, fold_batch_norm):
    options = {"compiled": True, "fold_batch_norm": fold_batch_norm}
    network = opened(images(), IMAGES, layers=True, **options)
    network.without_layers()
    expected = opened(images(), IMAGES, **options)
    assert network.execution == expected.execution
    run = []
    network._forward = lambda batch: run.append(1) or network._run(batch)
    layers_of(network, IMAGES)
    assert run


def test_training_does_not_look(opened, monkeypatch):
    network = opened(images(), IMAGES, layers=True)
    monkeypatch.setattr("skood.engine.network.moments_of", lambda *_: pytest.fail("it looked"))
    network.train(True)
    network.trained(torch.tensor(IMAGES[:8]))


@pytest.mark.parametrize("n_rows", [1, 3, 64, 90])
def test_a_row_has_the_same_in_any_company(opened, n_rows):
    network = opened(images(), IMAGES, layers=True, small_shape=False)
    order = np.random.RandomState(n_rows).permutation(90)[:n_rows]
    assert torch.equal(layers_of(network, IMAGES[order]), layers_of(network, IMAGES)[order])


@pytest.mark.parametrize("factor", [1.0, 1e-9, 0.0])
def test_a_layer_that_is_looked_at_is_not_folded(opened, factor):
    """Else batch-norm would leave nothing to see of channels that it scales down."""
    module = images()
    module[2].weight.data.mul_(factor)
    module[2].bias.data.fill_(0.3)
    folded = opened(module, IMAGES, layers=True)
    plain = opened(module, IMAGES, layers=True, fold_batch_norm=False)
    assert folded.layers[0] == "1"
    assert opened(module, IMAGES).pairs == (("1", "2"),)
    assert folded.pairs == ()
    assert torch.equal(layers_of(folded, IMAGES), layers_of(plain, IMAGES))


class Fork(nn.Module):
    """Calls its first layer once, or as often as it is told if a value is large."""

    def __init__(self, calls) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), calls

    def forward(self, x):
        for _ in range(self.calls if (x > 1e8).any() else 1):
            x = self.first(x)
        return self.last(x)


class Pieces(nn.Module):
    """Takes at most sixteen rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.cat([self.first(piece) for piece in x.split(16)]))


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_is_called_otherwise_for_some_rows_is_told(opened, calls):
    X = np.random.RandomState(0).randn(20, 4).astype(np.float32)
    network = opened(Fork(calls), X, layers=True)
    expected = layers_of(network, X)
    strange = X.copy()
    strange[7] = 2e8
    with pytest.raises(RuntimeError, match=r"looks at the layer 'first', .* does not call it once"):
        layers_of(network, strange)
    assert torch.equal(layers_of(network, X), expected)
    assert len(list(forward_rows(network, as_rows(strange))))  # the logits alone


def test_a_layer_that_gets_many_rows_in_pieces_does_not_count(opened):
    X = np.random.RandomState(0).randn(40, 4).astype(np.float32)
    network = opened(Pieces(), X, layers=True)
    assert network.layers == ()
    assert layers_of(network, X) is None


def test_the_error_for_a_lost_layer_travels():
    error = layer_is_lost("body.0")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)


def test_a_score_is_chosen_where_a_layer_gets_many_rows_in_pieces():
    X = np.random.RandomState(0).randn(200, 4).astype(np.float32)
    y = np.arange(200) % 3
    detector = SparseEnergyOODDetector(
        Pieces(), score_function="auto", max_epochs=0, random_state=0
    ).fit(X, y)
    assert "two_views" in {record["score_function"] for record in detector.path_}
    with pytest.raises(ValueError, match='"two_views" in the place of'):
        clone(detector).set_params(score_function="three_views").fit(X, y)


class Sequences(nn.Module):
    """Holds the positions of its rows before the rows, of which there are as many on trial."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x.transpose(0, 1)).mean(dim=0))


@pytest.mark.parametrize("length", [4, 8])
def test_layers_whose_rows_do_not_come_first_do_not_count(opened, length):
    X = np.random.RandomState(0).randn(20, length, 4).astype(np.float32)
    assert opened(Sequences(), X, layers=True).layers == ()


def test_layers_of_nested_tensors_do_not_count(opened):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 16), nn.Linear(16, 3)
            self.encoder = nn.TransformerEncoder(encoder, 3)

        def forward(self, x):
            x = x.long()
            return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x == 0)[:, 0])

    X = np.random.RandomState(0).randint(1, 9, size=(20, 6))
    X[:, 4:] = 0
    X[3, 2:] = 0
    network = opened(Text(), X.astype(np.float32), layers=True)
    if network.layers:
        layers_of(network, X.astype(np.float32))


def test_the_gradient_is_finite_where_nothing_deviates():
    layer, x = nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 3, 3, requires_grad=True)
    moments_of(layer, layer(x)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e22, 1e30])
def test_moments_of_numbers_of_any_size_are_finite(scale):
    layer = nn.Conv2d(1, 1, 1)
    found = moments_of(layer, scale * torch.randn(2, 1, 30, 30))
    assert found.isfinite().all()
    assert (found[:, 1] > 0).all()
