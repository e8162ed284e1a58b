from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from modules import Body
from torch import nn

from skood.exceptions import HeadNotFoundError

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)
refused = functools.partial(pytest.raises, HeadNotFoundError)


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class WithoutClasses(Body):
    """A network with timm's way to say that it has no classes."""

    def __init__(self):
        super().__init__(nn.Identity())

    def get_classifier(self):
        return self.head


def test_a_network_made_without_classes_is_refused_with_how_to_make_it(opened):
    with refused(match=r"get_classifier\(\) .*is an Identity.*num_classes=K"):
        opened(WithoutClasses(), X)


class AfterHead(Body):
    """A classifier with something after its last layer."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        return self.after(self.head(self.features(x)))


def halve_in_place(logits):
    logits /= 2
    return logits


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits / 2,
        lambda logits: logits[:, :3],
        lambda logits: logits + torch.arange(4),
        torch.relu,
        torch.sigmoid,
        halve_in_place,  # which changes what the head returned as well
    ],
    ids=["scale", "columns", "prior", "relu", "sigmoid", "in place"],
)
def test_anything_after_the_last_layer_is_refused_with_what_to_do(opened, after):
    message = (
        r"No classification head found: what the module returns, \(8, [34]\), is not what its "
        r"linear layer '(head|body)' gives, \(8, [48]\)\..* a scale, a sum .*return what the layer "
        r"gives.*torch\.nn\.Linear, and call it"
    )
    with refused(match=message):
        opened(AfterHead(after), X)


def test_a_loss_beside_the_logits_is_not_the_reason(opened):
    with refused(match=r"is not what its linear layer 'head' gives"):
        opened(AfterHead(lambda logits: (logits / 2, logits.sum())), X)


def test_the_layer_that_gives_as_many_columns_is_named_though_another_is_called_later(opened):
    class Later(Body):
        def forward(self, x):
            logits = super().forward(x)
            self.body(x)
            return logits / 2

    with refused(match=r"is not what its linear layer 'head' gives, \(8, 4\)"):
        opened(Later(), X)


def test_a_network_without_linear_layers_is_refused_with_what_to_do(opened):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    message = r"calls no torch\.nn\.Linear \(registered are: none\).*trained by pretrain_epochs="
    with refused(match=message):
        opened(network, IMAGES)


class Functional(Body):
    """A classifier that calls none, or only the first, of its layers."""

    def __init__(self, calls_body):
        super().__init__()
        self.calls_body = calls_body

    def forward(self, x):
        body = self.body if self.calls_body else self.body.forward
        return nn.functional.linear(torch.relu(body(x)), self.head.weight)


@pytest.mark.parametrize(
    ("calls_body", "reason"),
    [
        (False, r"calls no torch\.nn\.Linear \(registered are: body, head\)"),
        (True, r"is not what its linear layer 'body' gives, \(8, 8\)"),
    ],
)
def test_a_functional_head_is_refused_with_what_to_do(opened, calls_body, reason):
    message = rf"{reason}.*F\.linear\(h, weight\) or h @ weight.*submodule, a torch\.nn\.Linear"
    with refused(match=message):
        opened(Functional(calls_body), X)


def test_what_only_changes_logits_is_not_offered_as_the_head(opened):
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(2.0))

        def forward(self, logits):
            return logits / self.value

    with refused(match=r"is not what its linear layer 'head' gives") as raised:
        opened(AfterHead(Temperature()), X)
    assert 'head="after"' not in str(raised.value)


def test_a_part_that_is_the_whole_network_is_not_offered_as_its_head(opened):
    with refused(match=r"not what its linear layer '1\.body' gives") as raised:
        opened(nn.Sequential(nn.Identity(), Functional(calls_body=True)), X)
    assert 'head="1"' not in str(raised.value)


class Prototypes(nn.Module):
    """A head that is no linear layer: how near features are to one vector for each class."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(4, 8))

    def forward(self, h):
        return -torch.cdist(h, self.vectors)


def test_of_a_head_that_is_not_linear_the_name_is_given(opened):
    message = r'Pass head="head" \(its input, \(8, 8\), becomes features of width 8\)'
    with refused(match=message):
        opened(Body(Prototypes()), X)


def test_of_nested_heads_that_are_not_linear_the_innermost_is_given(opened):
    with refused(match=r'Pass head="head\.0" \(its input, \(8, 8\), [^)]*\)\.$'):
        opened(Body(nn.Sequential(Prototypes())), X)


def test_a_linear_layer_on_positions_that_together_are_the_logits_can_be_named(opened):
    class Flat(Body):
        def forward(self, x):
            features = self.features(x)
            return self.head(torch.stack([features, -features], dim=1)).flatten(1)

    with refused(match=r'head="head" \(its input, \(8, 2, 8\), becomes features of width 16\)'):
        opened(Flat(), X)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "combine",
    [lambda first, second: (first, second), lambda first, second: (first + second) / 2],
    ids=["first of two", "mean"],
)
def test_a_head_called_twice_whose_last_call_is_not_the_answer_is_refused(opened, combine, zero):
    class Twice(Body):
        def forward(self, x):
            return combine(self.head(self.features(x)), self.head(self.features(-x)))

    module = Twice()
    if zero:
        nn.init.zeros_(module.head.weight)
        nn.init.zeros_(module.head.bias)
    with refused(match=r"'head' is called 2 times.*Wrap the network in a module"):
        opened(module, X)


def test_a_head_on_every_position_is_refused_with_what_to_do(opened):
    class EveryPosition(Body):
        def forward(self, x):
            return self.head(torch.stack([self.features(x), self.features(-x)], dim=1))[:, -1]

    message = (
        r"'head' is applied at every position, \(8, 2, 8\) to \(8, 2, 4\), "
        r"so .*head\(hidden\[:, -1\]\)"
    )
    with refused(match=message):
        opened(EveryPosition(), X)


@pytest.mark.parametrize(("scale", "kind"), [(1, "sum"), (2, "mean")])
def test_several_heads_are_refused_with_the_reason(opened, scale, kind):
    class Several(Body):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 4).double()

        def forward(self, x):
            features = self.features(x)
            return (self.head(features) + self.other(features * 2)) / scale

    message = rf"the logits are the {kind} of what head, other give.*Wrap the network in a module"
    with refused(match=message):
        opened(Several(), X)


class Pair(Body):
    """A network that returns its features, linear or not, before its logits."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        features = self.activation(self.body(x))
        return features, self.head(features)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (torch.relu, r"Not its first element but element 1 comes from a linear layer, 'head'"),
        (lambda h: h, r"Its first element, from 'body', enters 'head', whose output is element 1"),
    ],
    ids=["relu", "linear"],
)
def test_features_before_logits_are_refused_with_the_index(opened, activation, reason, zero):
    module = Pair(activation)
    if zero:
        nn.init.zeros_(module.head.weight)
    message = rf"a tuple of Tensor \(8, 8\), Tensor \(8, 4\).*{reason}.*returns .*output\[1\]"
    with refused(match=message):
        opened(module, X)


def test_logits_that_are_returned_twice_are_clear(opened):
    class Again(Body):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits

    assert opened(Again(), X).head == "head"


def test_features_before_logits_of_another_head_are_refused(opened):
    module = Pair(torch.relu)
    module.head = Prototypes().double()
    message = r"first element does not come from a linear layer\. Wrap .* returns the logits alone"
    with refused(match=message):
        opened(module, X)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc", r"head='fc' names no submodule of Body; its linear layers are body, head"),
        ("", r"head='' names no submodule of Body"),
        (
            "body",
            r"head='body' is not the head: its output, \(8, 8\), is not the logits \(8, 4\)\. "
            r'Pass head="head", or head=None',
        ),
        (
            "unused",
            r"head='unused' is not the head: the forward pass never calls it\. "
            r'Pass head="head", or head=None',
        ),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(opened, name, message):
    module = Body()
    module.unused = nn.Identity()
    with refused(match=message):
        opened(module, X, head=name)


def test_a_name_whose_output_is_changed_is_refused_with_the_reason(opened):
    message = (
        r"head='head' is not the head: its output, \(8, 4\), is not the logits \(8, 4\) that the "
        r"module returns, because something after it changes them\. Let forward return what this"
    )
    with refused(match=message):
        opened(AfterHead(torch.tanh), X, head="head")


def test_a_wrong_name_where_the_logits_are_not_clear_is_refused_with_both_reasons(opened):
    module = Pair(nn.Identity())
    module.unused = nn.Identity()
    message = r"never calls it\. Linear layers: body, head\. The module .* either may be the logits"
    with refused(match=message):
        opened(module, X, head="unused")


def test_of_many_linear_layers_the_last_are_named(opened):
    module = nn.Sequential(*(nn.Linear(6, 6) for _ in range(9)))
    with refused(match=r"layers are \.\.\., 4, 5, 6, 7, 8\. Pass the name"):
        opened(module, X, head="head")
