from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from modules import assert_head_gives_the_logits
from sklearn.base import clone
from torch import Tensor, nn
from torch.jit import ScriptModule

from skood import SparseEnergyOODDetector
from skood.engine.network import copy_module, on_cpu
from skood.engine.scripted import Scripted

X = np.random.RandomState(0).randn(12, 6).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _deprecated_parts_of_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class Plain(nn.Module):
    """A classifier with batch-norm, dropout and a layer beside the head."""

    def __init__(self, bias: bool = True, width: int = 8):
        super().__init__()
        self.body = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 4, bias=bias)
        self.other = nn.Linear(width, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.norm(self.body(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class WithFeatures(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.head(h), h


class WithAuxiliary(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.head(h), self.other(h)


class InDict(Plain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(x)
        return {"hidden": h, "logits": self.head(h)}


class FeaturesFirst(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return h, self.head(h)


class Scaled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)) / 2


class Functional(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.head.weight.T + 1


def zero(module):
    for layer in (module.head, module.other):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return module


def traced(module):
    return torch.jit.trace(module.eval(), torch.ones(2, 6, dtype=module.body.weight.dtype))


MAKERS = pytest.mark.parametrize("make", [torch.jit.script, traced], ids=["script", "trace"])


@MAKERS
@pytest.mark.parametrize(
    "plain",
    [
        Plain(),
        Plain(bias=False),
        zero(WithAuxiliary()),
        zero(WithAuxiliary(width=4)),
        WithFeatures(),
        Plain().bfloat16(),
        Plain().double(),
    ],
    ids=["plain", "no bias", "zero", "square zero", "tuple", "bfloat16", "float64"],
)
def test_the_features_of_a_script_are_those_of_the_module_it_was_made_from(opened, make, plain):
    network = opened(make(plain), X)
    assert network.head == "head"
    features = assert_head_gives_the_logits(network, X)
    batch = network.batcher(X, slice(0, len(X)))
    with torch.no_grad():
        torch.testing.assert_close(features, plain.eval().features(batch))
        torch.testing.assert_close(network.logits(batch), plain.head(features))


def test_a_dict_from_a_script_is_understood(opened):
    plain = InDict()
    network = opened(torch.jit.script(plain), X)
    torch.testing.assert_close(
        network.logits(torch.tensor(X)), plain.eval()(torch.tensor(X))["logits"]
    )


@pytest.mark.parametrize("head", [None, "1.head"])
def test_a_script_inside_a_module_is_opened(opened, head):
    module = nn.Sequential(nn.BatchNorm1d(6), torch.jit.script(Plain()))
    network = opened(module, X, head=head)
    assert network.head == "1.head"
    assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(network.logits(torch.tensor(X)), module.eval()(torch.tensor(X)))


def test_a_scripted_body_before_a_plain_head_stays_as_it_is(opened):
    module = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU())))
    module.append(nn.Linear(8, 4))
    network = opened(module, X)
    assert network.head == "1"
    assert network.module[0].head is None
    assert_head_gives_the_logits(network, X)


@MAKERS
@pytest.mark.parametrize("training", [False, True])
def test_the_gradients_of_a_script_are_those_of_the_module_it_was_made_from(opened, make, training):
    plain = Plain().eval()
    plain.body.bias.requires_grad_(False)
    plain.dropout.p = 0.0
    script = make(plain)
    network = opened(script, X)
    network.train(training)
    if training and make is traced:
        plain.norm.eval()  # a trace keeps the mode in which it was made
    else:
        plain.train(training)
    batch = torch.tensor(X)
    for _ in range(3):  # the compiler of TorchScript takes several calls to settle
        network.module.zero_grad(set_to_none=True)
        features, logits = network.features_and_logits(batch)
        (features.abs().sum() + logits.square().sum()).backward()
    assert all(p.grad is None for p in script.parameters())
    h = plain.features(batch)
    (h.abs().sum() + plain.head(h).square().sum()).backward()
    found = {name.removeprefix("script."): p for name, p in network.module.named_parameters()}
    for name, expected in plain.named_parameters():
        inside = found[name]
        if expected.grad is None:
            assert inside.grad is None
        else:
            torch.testing.assert_close(inside.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert {name for name, p in found.items() if p.requires_grad} == {
        name for name, p in plain.named_parameters() if p.requires_grad
    }


@MAKERS
def test_a_script_is_copied_and_never_changed(opened, make):
    script = make(Plain())
    before = {name: t.clone() for name, t in script.state_dict().items()}
    copied = copy_module(script)
    assert isinstance(copied, Scripted)
    network = opened(script, X)
    with torch.no_grad():
        for parameter in (*copied.parameters(), *network.module.parameters()):
            parameter.fill_(7)
    assert all(torch.equal(before[name], t) for name, t in script.state_dict().items())
    assert all(p.is_leaf for p in copied.parameters())


@MAKERS
@pytest.mark.parametrize(
    "travel",
    [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))],
    ids=["copy", "pickle"],
)
def test_an_opened_script_travels_bitwise(opened, make, travel):
    network = opened(make(Plain()), X)
    batch = torch.tensor(X)
    with torch.no_grad():
        expected = network.features_and_logits(batch)
        for found in (travel(network), travel(travel(network))):
            for one, other in zip(found.features_and_logits(batch), expected, strict=True):
                assert torch.equal(one, other)
        assert torch.equal(travel(network.module)(batch), expected[1])
    assert all(p.is_leaf for p in travel(network).module.parameters())
    assert travel(network.module).double()(batch.double()).dtype == torch.float64


@MAKERS
def test_a_script_is_a_script_again_after_pickling(make):
    script = make(Plain())
    batch = torch.tensor(X)
    for module, part in ((script, lambda m: m), (nn.Sequential(script), lambda m: m[0])):
        loaded = pickle.loads(pickle.dumps(on_cpu(module)))
        assert isinstance(part(loaded), ScriptModule)
        assert part(module) is script
        torch.testing.assert_close(loaded.eval()(batch), module.eval()(batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "head", "message"),
    [
        (
            lambda: torch.jit.freeze(torch.jit.script(Plain().eval())),
            None,
            r"no linear layer with a weight to be seen, as after torch\.jit\.freeze.*Pass the "
            r"module as it was before that",
        ),
        (
            lambda: torch.jit.script(FeaturesFirst()),
            None,
            r"it returns a tuple of Tensor \(8, 8\), Tensor \(8, 4\), and of its linear layers, "
            r"other, head, body, none gives the logits .*Pass the nn\.Module from which",
        ),
        (
            lambda: torch.jit.script(FeaturesFirst(width=6)),
            None,
            r"it returns a tuple of Tensor \(8, 6\), Tensor \(8, 4\), .*and alone\.",
        ),
        (lambda: torch.jit.script(Scaled()), None, r"none gives the logits just as they are"),
        (lambda: torch.jit.script(Functional()), None, r"none gives the logits just as they are"),
        (lambda: torch.jit.script(Plain()), "fc", r"of that name is not in it; .*, head, .*=None"),
        (
            lambda: torch.jit.script(Plain()),
            "body",
            r"of that name gives something other than the logits; .*, head, .*head=None",
        ),
    ],
    ids=[
        "frozen",
        "features first",
        "square features first",
        "scaled",
        "functional",
        "unknown name",
        "wrong name",
    ],
)
def test_a_script_without_a_head_is_refused_with_the_reason(opened, make, head, message):
    with pytest.raises(ValueError, match=f"in the TorchScript module: .*{message}"):
        opened(make(), X, head=head)


def test_a_plain_part_that_fails_is_named_rather_than_the_script(opened):
    body = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
    module = nn.Sequential(body, nn.Linear(8, 4), nn.Tanh())
    with pytest.raises(ValueError, match=r"not what its linear layer '1' gives"):
        opened(module, X)


def test_a_script_that_cannot_be_saved_is_refused_with_the_reason():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).eval()
    script = torch.jit.optimize_for_inference(torch.jit.script(plain))
    message = r"optimize_for_inference; pass the module as it was before"
    with pytest.raises(TypeError, match=message):
        copy_module(script)


def test_compile_and_scripts_do_not_go_together(opened):
    with pytest.raises(ValueError, match=r"compile=True cannot compile a TorchScript module"):
        opened(torch.jit.script(Plain()), X, compiled=True)


@MAKERS
def test_a_detector_on_a_script_learns_what_one_on_the_module_learns(make, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [layer for layer in digits.module if not isinstance(layer, nn.Dropout)]
        plain = nn.Sequential(*layers).eval()
        if make is traced:
            module = torch.jit.trace(plain, torch.zeros(2, 64))
        else:
            module = torch.jit.script(plain)
        detector = SparseEnergyOODDetector(module, max_epochs=1, random_state=0)
        detector.fit(digits.X, digits.y)
        scores = detector.score_samples(digits.X_test)
        loaded = pickle.loads(pickle.dumps(detector))
        again = clone(loaded).fit(digits.X, digits.y)
        expected = SparseEnergyOODDetector(plain, max_epochs=1, random_state=0)
        expected = expected.fit(digits.X, digits.y).score_samples(digits.X_test)
    np.testing.assert_array_equal(loaded.score_samples(digits.X_test), scores)
    np.testing.assert_array_equal(again.score_samples(digits.X_test), scores)
    assert isinstance(loaded.module, ScriptModule)
    if make is torch.jit.script:  # a trace keeps batch-norm in evaluation mode
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert np.corrcoef(scores, expected)[0, 1] > 0.99
