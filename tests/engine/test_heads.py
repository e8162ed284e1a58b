from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modules import Body, assert_head_gives_the_logits, mlp
from torch import nn

from skood.engine import heads
from skood.exceptions import HeadNotFoundError
from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("make", "head", "width"),
    [
        (mlp, "4", 8),
        (functools.partial(mlp, bias=False), "4", 8),
        (functools.partial(mlp, dtype=torch.float32), "4", 8),
        (lambda: nn.Linear(6, 4), "", 6),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "3", 8),
    ],
)
def test_head_of_sequential_networks(opened, make, head, width):
    network = opened(make(), X)
    assert network.head == head
    assert assert_head_gives_the_logits(network, X).shape == (10, width)


Logits = namedtuple("Logits", ["aux", "logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z, h: (z, h),
        lambda z, h: [z],
        lambda z, h: {"aux": h, "logits": z},
        lambda z, h: OrderedDict(logits=z),
        lambda z, h: SimpleNamespace(logits=z, aux=h),
        lambda z, h: Logits(h, z),
    ],
    ids=["tuple", "list", "dict", "OrderedDict", "object", "namedtuple"],
)
def test_networks_may_return_more_than_logits(opened, wrap):
    class Wrapped(Body):
        def forward(self, x):
            features = self.features(x)
            return wrap(self.head(features), features)

    network = opened(Wrapped(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_dropout_between_features_and_head_drops_in_training_only(opened):
    class Dropped(Body):
        def forward(self, x):
            return self.head(nn.functional.dropout(self.features(x), 0.5, self.training))

    network = opened(Dropped(), X)
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, network.module.features(torch.tensor(X)))
    network.train(True)
    dropped, logits = network.seen(torch.tensor(X))[:2]
    torch.testing.assert_close(network.module.head(dropped), logits)
    assert (dropped == 0).sum() > (features == 0).sum()


def test_unused_linear_layers_are_passed_over(opened):
    class Cluttered(Body):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(8, 4).double()
            self.another_head = nn.Linear(8, 4).double()

    assert opened(Cluttered(), X).head == "head"


def test_an_auxiliary_head_that_runs_later_is_passed_over(opened):
    class Auxiliary(Body):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(8, 4).double()

        def forward(self, x):
            features = self.features(x)
            logits = self.head(features)
            return logits, self.auxiliary(features)

    network = opened(Auxiliary(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_a_head_may_be_called_with_a_keyword(opened):
    class Keyword(Body):
        def forward(self, x):
            return self.head(input=self.features(x))

    network = opened(Keyword(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_of_two_layers_that_give_the_logits_the_last_is_the_head(opened):
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, bias=False)).double()
    nn.init.eye_(module[1].weight)
    assert opened(module, X).head == "1"


def test_one_layer_under_two_names_is_found_under_the_first(opened):
    class Shared(Body):
        def __init__(self):
            super().__init__()
            self.alias = self.head

        def forward(self, x):
            return self.alias(self.features(x))

    network = opened(Shared(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_the_features_of_a_head_called_twice_are_those_of_its_last_call(opened):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6).double()

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    network = opened(Twice(), X)
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, torch.relu(network.module.layer(torch.tensor(X))))


class Cosine(nn.Module):
    """A head that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, h):
        return nn.functional.normalize(h, dim=1) @ self.weight


def sequential_head():
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.mark.parametrize(("make", "width"), [(Cosine, 8), (sequential_head, 8)])
def test_a_head_that_is_not_linear_can_be_named(opened, make, width):
    network = opened(Body(make()), X, head="head")
    assert network.head == "head"
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, network.module.features(torch.tensor(X)))


def test_without_a_name_the_last_linear_layer_of_a_classifier_is_the_head(opened):
    network = opened(Body(sequential_head()), X)
    assert network.head == "head.2"
    assert assert_head_gives_the_logits(network, X).shape == (10, 5)


def test_a_convolutional_head_can_be_named_and_its_features_are_flat(opened):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(self.body(x)).flatten(1)

    network = opened(Convolutional(), IMAGES, head="head")
    batch = network.batcher(as_rows(IMAGES))
    with torch.no_grad():
        features, logits = network.seen(batch)[:2]
        torch.testing.assert_close(features, network.module.body(batch).flatten(1))
        torch.testing.assert_close(logits, network.module(batch))
    with pytest.raises(HeadNotFoundError, match=r'Pass head="head" \(its input, \(8, 8, 1, 1\)'):
        opened(Convolutional(), IMAGES)


class Declaring(Body):
    """A network with timm's way to name its head."""

    def __init__(self, declare):
        super().__init__(nn.Sequential(nn.Dropout(), nn.Linear(8, 4)))
        self.unused = nn.Linear(8, 4)
        self.declare = declare

    def get_classifier(self):
        return self.declare(self)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: nn.Sequential(module)])
def test_get_classifier_is_asked_first(opened, wrap):
    network = opened(wrap(Declaring(lambda self: self.head)), X)
    assert network.head.removeprefix("0.") == "head"
    assert_head_gives_the_logits(network, X)


@pytest.mark.parametrize(
    "declare",
    [
        lambda self: None,
        lambda self: (self.head, self.head),
        lambda self: 1 / 0,
        lambda self: nn.Identity(),
        lambda self: nn.Linear(8, 4),
        lambda self: self.unused,
        lambda self: self.body,
        lambda self: self,
    ],
    ids=["None", "tuple", "raises", "Identity", "foreign", "unused", "body", "itself"],
)
def test_where_get_classifier_lies_the_head_is_searched(opened, declare):
    network = opened(Declaring(declare), X)
    assert network.head == "head.1"
    assert_head_gives_the_logits(network, X)


class Zeros(Body):
    """Two heads that are zero before training, of which one is called later, for nothing."""

    def __init__(self, later):
        super().__init__()
        self.other = nn.Linear(8, 4).double()
        self.later = later
        for layer in (self.head, self.other):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        features = self.features(x)
        if self.later:
            return self.head(features), self.other(features)
        self.other(x @ torch.ones(6, 8, dtype=x.dtype))
        return self.head(features)


@pytest.mark.parametrize("later", [False, True])
def test_of_two_heads_of_zeros_the_one_that_is_returned_is_found(opened, later):
    network = opened(Zeros(later), X)
    assert network.head == "head"
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, network.module.features(torch.tensor(X)))


def test_a_head_on_several_dropouts_of_the_same_features_is_found(opened):
    class Samples(Body):
        def forward(self, x):
            features = self.features(x)
            dropped = [nn.functional.dropout(features, 0.5, self.training) for _ in range(5)]
            return sum(self.head(sample) for sample in dropped) / 5

    assert opened(Samples(), X).head == "head"


def test_a_head_on_features_with_an_axis_of_one_is_found(opened):
    class Pooled(Body):
        def forward(self, x):
            return self.head(self.features(x)[:, None])[:, 0]

    network = opened(Pooled(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


class Sized(nn.Module):
    """A part with sizes like a linear layer, which it is or is not."""

    def __init__(self, activation):
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.first = nn.Parameter(torch.randn(8, 16))
        self.second = nn.Parameter(torch.randn(16, 4))
        self.activation = activation

    def forward(self, h):
        return self.activation(h @ self.first) @ self.second


def test_a_layer_of_another_class_is_linear_if_it_behaves_so(opened):
    assert opened(Body(Sized(nn.Identity())), X).head == "head"


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()])
def test_a_network_is_no_linear_layer_though_it_has_sizes_like_one(opened, activation):
    message = r'no linear layer gives the logits\. Pass head="head"'
    with pytest.raises(HeadNotFoundError, match=message):
        opened(Body(Sized(activation)), X)


def test_an_adapter_comes_before_the_layer_inside_it(opened):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 4
            self.base = nn.Linear(8, 4)
            self.change = nn.Parameter(torch.zeros(8, 4))

        def forward(self, h):
            return self.base(h) + h @ self.change

    network = opened(Body(Adapter()), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_a_name_may_be_another_one_of_the_same_module(opened):
    module = Body()
    module.alias = module.head
    assert opened(module, X, head="alias").head == "alias"


# Numbers of 16 bits


class Mixed(Body):
    """A classifier with an autocast in its forward, and something after it."""

    def __init__(self, dtype, after, head=None):
        super().__init__(head)
        self.float()
        self.dtype, self.after = dtype, after

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            logits = super().forward(x)
        return self.after(logits)


SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@SIXTEEN
@pytest.mark.parametrize(
    "after", [torch.Tensor.float, torch.clone, lambda z: z.float().bfloat16().half().double()]
)
def test_a_head_under_an_autocast_of_forward_is_found(opened, dtype, after):
    assert opened(Mixed(dtype, after), X.astype(np.float32)).head == "head"


@SIXTEEN
def test_a_layer_that_behaves_linearly_is_found_under_autocast(opened, dtype):
    module = Mixed(dtype, torch.Tensor.float, Sized(nn.Identity()))
    assert opened(module, X.astype(np.float32)).head == "head"


@SIXTEEN
@pytest.mark.parametrize(
    "after",
    [
        lambda z: 5 * z.float().softmax(dim=1),
        lambda z: -z,
        lambda z: 1.02 * z,
        lambda z: 1.001 * z.float(),
        lambda z: z.clamp(-20, 20),
        lambda z: z.sub_(z.amax(dim=1, keepdim=True)),
        lambda z: z[:, [1, 0, 2, 3]],
    ],
    ids=["softmax", "sign", "temperature", "float32", "clip", "in place", "order"],
)
def test_what_changes_logits_of_16_bits_is_seen(opened, dtype, after):
    with pytest.raises(HeadNotFoundError):
        opened(Mixed(dtype, after), X.astype(np.float32))


# The rules


def test_a_rule_proposes_and_what_the_layer_does_decides(monkeypatch):
    module, batch = Body(sequential_head()).eval(), torch.tensor(X)
    proposed = ["body", "head.1", "head", "head.2"]  # only the last two give the logits
    monkeypatch.setattr(heads, "HEAD_RULES", [lambda trial: iter(proposed), *heads.HEAD_RULES])
    assert heads.find_head(module, batch) == "head"


def test_the_next_rule_is_asked_where_the_first_proposes_no_head(monkeypatch):
    monkeypatch.setattr(heads, "HEAD_RULES", [lambda trial: iter(["body"]), heads.linear_layers])
    assert heads.find_head(Body().eval(), torch.tensor(X)) == "head"
    monkeypatch.setattr(heads, "HEAD_RULES", [lambda trial: iter(["body"])])
    with pytest.raises(HeadNotFoundError, match="No classification head found"):
        heads.find_head(Body().eval(), torch.tensor(X))


def test_the_search_leaves_no_hook_behind():
    module = Body().eval()
    for name in (None, "head", "body"):
        with suppress(HeadNotFoundError):
            heads.find_head(module, torch.tensor(X), name)
    assert not any(part._forward_hooks for part in module.modules())


def test_a_rule_may_propose_what_is_no_layer(monkeypatch):
    """A name that no layer has, a part that is everything, another layer: what they do decides."""
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    proposals = ["gone", "", "0", "1", "2"]
    monkeypatch.setattr(heads, "HEAD_RULES", [lambda trial: iter(proposals)])
    assert heads.find_head(module, torch.randn(5, 6)) == "2"
