from __future__ import annotations

import functools
import types
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skood.engine.copying import copy_module
from skood.engine.sharing import check_scoring, check_training

BATCH = torch.from_numpy(np.random.RandomState(0).randn(8, 6)).float()
OFFSET = torch.tensor([1.0, -1.0, 0.5, 2.0])


class Stepping(nn.Module):
    """A classifier whose first step is a function that it keeps."""

    def __init__(self, make_step):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.step = make_step(self)

    def forward(self, x):
        return self.head(self.step(x).relu())


def stepping(make_step):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Stepping(make_step)


def state(module):
    """Values and gradients, bit by bit, and the identity of all attributes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {name: (t.detach().numpy().tobytes(), t.grad) for name, t in tensors.items()}
    return values, [dict(vars(part)) for part in module.modules()]


@contextmanager
def untouched(module):
    before = state(module)
    yield
    assert str(state(module)) == str(before)
    assert all(part is not None for part in module.modules())


def checked(module, check):
    with untouched(module), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")
        check(copy_module(module).eval(), BATCH, module, nullcontext())


def default(net):
    return lambda x, body=net.body: body(x)


def keyword_default(net):
    return lambda x, *, body=net.body: body(x)


def closure(net):
    return lambda x: net.body(x)


def container(net):
    layers = {"first": [net.body]}
    return lambda x: layers["first"][0](x)


def bound_method(net):
    run = net.body.forward
    return lambda x: run(x)


def weak(net):
    body = weakref.ref(net.body)
    return lambda x: body()(x)


def proxy(net):
    body = weakref.proxy(net.body)
    return lambda x: body(x)


def nested(net):
    def outer(x):
        def inner():
            return net.body(x)

        return inner()

    return outer


def cached(net):
    @functools.cache
    def body():
        return net.body

    return lambda x: body()(x)


def partial_of_closure(net):
    return functools.partial(closure(net))


def without_gradient(net):
    def step(x):
        with torch.no_grad():
            return net.body(x)

    return step


def that_catches(net):
    def step(x):
        try:
            return net.body(x)
        except Exception:
            return x[:, :4]

    return step


class ItsOwnCopy:
    def __init__(self, body):
        self.body = body

    def __call__(self, x):
        return self.body(x)

    def __deepcopy__(self, memo):
        return self


def own_copy(net):
    return ItsOwnCopy(net.body)


REACHING = [
    default,
    keyword_default,
    closure,
    container,
    bound_method,
    weak,
    proxy,
    nested,
    cached,
    partial_of_closure,
    without_gradient,
    that_catches,
    own_copy,
]


@pytest.mark.parametrize("check", [check_scoring, check_training])
@pytest.mark.parametrize("make_step", REACHING)
def test_what_reaches_the_module_given_is_refused_by_name(make_step, check):
    with pytest.raises(TypeError, match=r"'body\.weight' of the module given.*self\.layer\(x\)"):
        checked(stepping(make_step), check)


@pytest.mark.parametrize("training", [False, True])
def test_statistics_of_the_module_given_stay_as_they_are(training):
    module = stepping(lambda net: lambda x: net.norm(x[:, :4])).train(training)
    with pytest.raises(TypeError, match=r"'norm\.\w+' of the module given"):
        checked(module, check_scoring)


@pytest.mark.parametrize(
    "wrap", [functools.partial(torch.compile, backend="eager"), nn.DataParallel]
)
def test_names_are_those_without_wrappers(wrap):
    with pytest.raises(TypeError, match=r"uses 'body\.weight'"):
        checked(wrap(stepping(closure)), check_scoring)


@pytest.mark.parametrize(
    "replace", [lambda f: lambda x: f(x), functools.partial(torch.compile, backend="eager")]
)
def test_a_forward_replaced_by_one_of_the_module_given_is_refused(replace):
    module = stepping(lambda net: None)
    module.forward = replace(lambda x: module.head(module.body(x).relu()))
    with pytest.raises(TypeError, match=r"a forward that was replaced.*module\.compile\(\)"):
        checked(module, check_scoring)


def test_attributes_set_in_the_module_given_are_refused_and_set_back():
    def make_step(net):
        def step(x):
            net.last = x
            return x[:, :4]

        return step

    with pytest.raises(TypeError, match="sets 'last' of the module given"):
        checked(stepping(make_step), check_scoring)


# What belongs to no module

LAYER, FROZEN = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)
STATISTICS = nn.BatchNorm1d(4, affine=False)
KEPT = {"text": LAYER(BATCH)}


@pytest.mark.parametrize("check", [check_scoring, check_training])
@pytest.mark.parametrize(
    "step",
    [LAYER.forward, lambda x: LAYER(x), lambda x: FROZEN(x), lambda x: KEPT["text"]],
    ids=["method", "global", "frozen", "computed"],
)
def test_parameters_of_no_module_are_refused_with_their_shape(step, check):
    module = stepping(lambda net: None)
    module.__class__ = type("Reaching", (Stepping,), {"step": staticmethod(step)})
    del module.__dict__["step"]
    with pytest.raises(TypeError, match=r"shape \((4, 6|8, 4)\) that is no part.*Register it"):
        checked(module, check)


def test_training_that_writes_elsewhere_is_refused_and_taken_back():
    module = stepping(lambda net: lambda x: STATISTICS(x[:, :4]))
    before = {name: x.clone() for name, x in STATISTICS.state_dict().items()}
    with pytest.raises(TypeError, match=r"In training mode, forward writes into.*Register it"):
        checked(module, check_training)
    assert all(torch.equal(x, before[name]) for name, x in STATISTICS.state_dict().items())


def test_layers_in_a_plain_list_are_refused_in_training_alone():
    module = stepping(lambda net: [nn.Linear(6, 4)])
    module.__class__ = type(
        "Listed", (Stepping,), {"forward": lambda self, x: self.head(self.step[0](x))}
    )
    checked(module, check_scoring)
    with pytest.raises(TypeError, match=r"in a plain list, dict or object.*nn\.ModuleList"):
        checked(module, check_training)
    module.layers = nn.ModuleList(module.step)
    checked(module, check_training)


# What passes


class Metric(nn.Module):
    """In the way of torchmetrics: each copy wraps its own update."""

    def __init__(self):
        super().__init__()
        self.update = self._wrapped(self.update)

    def _wrapped(self, update):
        @functools.wraps(update)
        def wrapped(*args):
            self.computed = None
            return update(*args)

        return wrapped

    def update(self, x):
        return x[:, :4]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "update"}

    def __setstate__(self, kept):
        vars(self).update(kept)
        self.update = self._wrapped(self.update)


def metric(net):
    net.metric = Metric()
    return lambda x: x[:, :4]


def used_metric(net):
    net.metric = Metric()
    return types.MethodType(lambda self, x: self.metric.update(self.norm(self.body(x))), net)


def partial_of_weights(net):
    return functools.partial(nn.functional.linear, weight=net.body.weight, bias=net.body.bias)


def hidden_teacher(net):
    teacher = [nn.Linear(6, 4).requires_grad_(False), nn.Linear(6, 4)]

    def step(self, x):
        with torch.no_grad():
            taught = self.teacher[1](x)
        return self.body(x) + self.teacher[0](x) + taught

    net.teacher = teacher
    return types.MethodType(step, net)


def own_statistics(net):
    net.kept = {"mean": [torch.zeros(4)], "seen": 0}

    def step(self, x):
        self.last = self.body(x)
        self.kept["mean"][0].add_(self.last.detach().mean(0))
        self.kept["seen"] += 1
        self.kept["mean"].append(self.last)
        return self.last

    return types.MethodType(step, net)


def constants_of_its_own(net):
    def step(x):
        fresh = torch.from_numpy(np.ones(4, dtype=np.float32))
        fresh += 1
        listed = torch.tensor([1.0, 2.0, 3.0, 4.0])
        listed *= 2
        return x[:, :4] * fresh + listed + torch.zeros(4, requires_grad=True)

    return step


@pytest.mark.parametrize("check", [check_scoring, check_training])
@pytest.mark.parametrize(
    "make_step",
    [
        lambda net: lambda x: x[:, :4] + OFFSET,
        lambda net: lambda x, unused=net, also=net.body: x[:, :4],
        lambda net: net.body.forward,
        lambda net: net.body,
        partial_of_weights,
        metric,
        used_metric,
        hidden_teacher,
        own_statistics,
        constants_of_its_own,
    ],
    ids=[
        "constant",
        "unused",
        "own method",
        "own layer",
        "own weights",
        "metric",
        "used metric",
        "teacher",
        "own statistics",
        "made in forward",
    ],
)
def test_what_shares_nothing_passes(make_step, check):
    checked(stepping(make_step), check)


def test_a_replaced_forward_that_reaches_nothing_passes():
    module = stepping(lambda net: net.norm)
    module.norm.forward = lambda x: x[:, :4]
    checked(module, check_training)


def test_the_copy_and_the_random_generator_stay_as_they_are():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    copied = copy_module(module).eval()
    generator = torch.get_rng_state()
    with untouched(copied), untouched(module):
        check_scoring(copied, BATCH, module, nullcontext())
        check_training(copied, BATCH, module, nullcontext())
    assert torch.equal(torch.get_rng_state(), generator)


def test_lazy_layers_are_left_lazy():
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))
    copied = copy_module(module).eval()
    check_scoring(copied, BATCH, module, nullcontext())
    assert copied[0].has_uninitialized_params()


def test_an_error_of_the_forward_is_explained():
    @contextmanager
    def explained():
        try:
            yield
        except RuntimeError as error:
            error.add_note("explained")
            raise

    module = nn.Linear(5, 3)
    with pytest.raises(RuntimeError) as raised:
        check_scoring(copy_module(module), BATCH, module, explained())
    assert raised.value.__notes__ == ["explained"]


# Checkpoints


class Checkpointed(nn.Module):
    def __init__(self, reentrant, first, frozen=False):
        super().__init__()
        self.before = nn.Identity() if first else nn.Linear(6, 6)
        self.body = nn.Linear(6, 4).requires_grad_(not frozen)
        self.head = nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        if self.training:
            x = checkpoint(self.body, self.before(x), use_reentrant=self.reentrant)
        else:
            x = self.body(self.before(x))
        return self.head(x.relu())


def test_a_checkpoint_that_cuts_the_gradient_is_refused_with_what_to_pass():
    with pytest.raises(ValueError, match=r"would not be trained\. Pass use_reentrant=False"):
        checked(Checkpointed(reentrant=True, first=True), check_training)


@pytest.mark.parametrize(
    ("reentrant", "first", "frozen"),
    [(False, True, False), (True, False, False), (True, True, True)],
    ids=["not re-entrant", "later", "frozen"],
)
def test_other_checkpoints_pass(reentrant, first, frozen):
    checked(Checkpointed(reentrant, first, frozen), check_training)
