from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import Tensor, nn
from torch.jit import ScriptModule

from skood import SparseEnergyOODDetector
from skood.engine.copying import copy_module, on_cpu
from skood.engine.inference import forward_rows
from skood.engine.opening import check_trainable
from skood.engine.scripted import Scripted, has_bare_scripts, scripted_parts
from skood.exceptions import HeadNotFoundError
from skood.rows import as_rows

X = np.random.RandomState(0).randn(12, 6).astype(np.float32)


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


class InDict(Plain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(x)
        return {"hidden": h, "logits": self.head(h)}


class InTuple(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.head(h), h


class FeaturesFirst(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return h, self.head(h)


def traced(module):
    return torch.jit.trace(module.eval(), torch.ones(2, 6, dtype=module.body.weight.dtype))


MAKERS = pytest.mark.parametrize("make", [torch.jit.script, traced], ids=["script", "trace"])


def scripted_body():
    return torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))


# Scored by its logits


@MAKERS
@pytest.mark.parametrize(
    "plain",
    [Plain(), Plain(bias=False), Plain().bfloat16(), Plain().double()],
    ids=["plain", "no bias", "bfloat16", "float64"],
)
def test_the_logits_of_a_script_are_those_of_the_module_it_was_made_from(opened, make, plain):
    network = opened(make(plain), X)
    assert network.head is None
    assert "head hidden by TorchScript, 4 logits" in network.describe()
    batch = network.batcher(as_rows(X))
    with torch.no_grad():
        torch.testing.assert_close(network.logits(batch), plain.eval()(batch))
    ((_, (_, logits, _)),) = forward_rows(network, as_rows(X))
    torch.testing.assert_close(logits.to(batch.dtype), plain(batch).detach())


def test_a_dict_from_a_script_is_understood(opened):
    plain = InDict()
    network = opened(torch.jit.script(plain), X)
    torch.testing.assert_close(
        network.logits(torch.tensor(X)), plain.eval()(torch.tensor(X))["logits"]
    )


def frozen():
    return torch.jit.freeze(torch.jit.script(Plain().eval()))


@pytest.mark.parametrize(
    "make",
    [
        frozen,
        lambda: nn.Sequential(nn.BatchNorm1d(6), torch.jit.script(Plain())),
        lambda: nn.Sequential(scripted_body(), nn.Linear(8, 4), nn.Tanh()),
    ],
    ids=["frozen", "inside a module", "before a plain part"],
)
def test_wherever_the_script_hides_the_head_there_are_logits(opened, make):
    module = make()
    network = opened(module, X)
    assert network.head is None
    torch.testing.assert_close(network.logits(torch.tensor(X)), module.eval()(torch.tensor(X)))


def test_a_scripted_body_before_a_plain_head_has_features(opened):
    module = nn.Sequential(scripted_body(), nn.Linear(8, 4))
    network = opened(module, X)
    assert network.head == "1"
    features, logits = network.seen(torch.tensor(X))[:2]
    torch.testing.assert_close(features, module[0](torch.tensor(X)))
    torch.testing.assert_close(logits, module[1](features))


# Refused


@pytest.mark.parametrize("plain", [InTuple(), FeaturesFirst()], ids=["logits", "features first"])
def test_which_element_of_a_tuple_are_the_logits_is_not_guessed(opened, plain):
    script = torch.jit.script(plain)
    message = r"returns a tuple of Tensor .*cannot be told\. Wrap the module in one that returns"
    with pytest.raises(HeadNotFoundError, match=message):
        opened(script, X)
    index = 1 if isinstance(plain, FeaturesFirst) else 0

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.script = script

        def forward(self, x):
            return self.script(x)[index]

    network = opened(Wrapped(), X)
    with torch.no_grad():
        expected = plain.eval()(torch.tensor(X))[index]
        torch.testing.assert_close(network.logits(torch.tensor(X)), expected)


@pytest.mark.parametrize("head", ["head", "fc", "script.head", ""])
def test_a_head_inside_a_script_is_refused_with_what_to_do(opened, head):
    plain = Plain()
    message = r"head=.* cannot be found: TorchScript hides.*nn\.Module.*head=None and max_epochs=0"
    with pytest.raises(HeadNotFoundError, match=message):
        opened(torch.jit.script(plain), X, head=head)
    assert opened(torch.jit.script(plain), X, head=None).n_logits == 4
    assert opened(plain, X, head="head").head == "head"


def test_a_wrong_head_beside_a_script_is_refused_with_the_right_one(opened):
    module = nn.Sequential(scripted_body(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(HeadNotFoundError, match='Pass head="3"'):
        opened(module, X, head="1")
    assert opened(module, X, head="3").head == "3"


def test_a_script_has_no_features(opened):
    network = opened(torch.jit.script(Plain()), X)
    batch = torch.tensor(X)
    for ask in (
        lambda: network.visible_head,
        lambda: network.seen(batch)[:2],
        lambda: list(forward_rows(network, as_rows(X), features=True)),
        lambda: check_trainable(network, as_rows(X)),
    ):
        with pytest.raises(HeadNotFoundError, match=r"TorchScript, which hides its last layer"):
            ask()


def test_a_scripted_body_is_not_trained(opened):
    network = opened(nn.Sequential(scripted_body(), nn.Linear(8, 4)), X)
    message = r"part of the network, '0', is TorchScript.*cannot be trained.*max_epochs=0"
    with pytest.raises(HeadNotFoundError, match=message):
        check_trainable(network, as_rows(X))


def test_compile_and_scripts_do_not_go_together(opened):
    with pytest.raises(ValueError, match=r"compile=True cannot compile a TorchScript module"):
        opened(torch.jit.script(Plain()), X, compiled=True)


def test_a_script_that_cannot_be_saved_is_refused_with_the_reason():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).eval()
    script = torch.jit.optimize_for_inference(torch.jit.script(plain))
    message = r"optimize_for_inference; pass the module as it was before"
    with pytest.raises(TypeError, match=message):
        copy_module(script)


# Copied and pickled


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
        expected = network.logits(batch)
        for found in (travel(network), travel(travel(network))):
            assert found.head is None
            assert torch.equal(found.logits(batch), expected)
        assert torch.equal(travel(network.module)(batch), expected)
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


def test_the_scripted_parts_of_a_copy_are_told():
    module = nn.Sequential(nn.Linear(6, 6), nn.Sequential(scripted_body()), nn.Linear(8, 4))
    assert has_bare_scripts(module)
    assert scripted_parts(module) == {}
    copied = copy_module(module)
    assert not has_bare_scripts(copied)
    assert list(scripted_parts(copied)) == ["1.0"]
    assert not has_bare_scripts(nn.Linear(2, 2))


def test_what_a_script_offers_is_within_reach():
    copied = copy_module(torch.jit.script(Plain()))
    assert copied.features(torch.tensor(X)).shape == (12, 8)
    assert not hasattr(copied, "nothing_of_that_name")


# In a detector


@pytest.fixture(scope="module")
def plain(digits):
    return nn.Sequential(*[layer for layer in digits.module if not isinstance(layer, nn.Dropout)])


@pytest.fixture
def script(plain, request):
    if request.param == "script":
        return torch.jit.script(plain.eval())
    return torch.jit.trace(plain.eval(), torch.zeros(2, 64))


BOTH = pytest.mark.parametrize("script", ["script", "trace"], indirect=True)


@BOTH
@pytest.mark.parametrize("score", ["energy", "gen", "msp", "max_logit", "odin"])
def test_a_detector_scores_a_script_as_the_module_it_was_made_from(script, plain, digits, score):
    def fitted(module):
        detector = SparseEnergyOODDetector(
            module, max_epochs=0, score_function=score, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return detector.fit(digits.X, digits.y).calibrate(digits.X_fresh)

    detector = fitted(script)
    scores = detector.score_samples(digits.X_test)
    expected = fitted(plain).score_samples(digits.X_test)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert detector.head_ is None
    loaded = pickle.loads(pickle.dumps(detector))
    assert isinstance(loaded.module, ScriptModule)
    np.testing.assert_array_equal(loaded.score_samples(digits.X_test), scores)
    np.testing.assert_array_equal(loaded.predict(digits.X_test), detector.predict(digits.X_test))
    again = fitted(clone(loaded).module)
    np.testing.assert_array_equal(again.score_samples(digits.X_test), scores)


@BOTH
@pytest.mark.parametrize(
    "parameters",
    [
        {"max_epochs": 1},
        {"max_epochs": 0, "pretrain_epochs": 1},
        {"max_epochs": 0, "score_function": "mahalanobis"},
        {"max_epochs": 0, "score_function": "react"},
        {"max_epochs": 0, "score_function": lambda features, logits: features.sum(dim=1)},
    ],
    ids=["fine-tuning", "pre-training", "fitted score", "score of features", "callable"],
)
def test_a_detector_refuses_what_needs_features(script, plain, digits, parameters):
    detector = SparseEnergyOODDetector(script, random_state=0, **parameters)
    message = r'TorchScript, which hides.*pass the nn\.Module.*"energy", "gen", .* or "odin"'
    with pytest.raises(HeadNotFoundError, match=message):
        detector.fit(digits.X, digits.y)
    assert not hasattr(detector, "offset_")
    # The remedies of the message.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clone(detector).set_params(module=plain).fit(digits.X, digits.y)
        remedied = {"max_epochs": 0, "pretrain_epochs": 0, "score_function": "energy"}
        detector.set_params(**remedied).fit(digits.X, digits.y)
    with pytest.raises(HeadNotFoundError, match=message):
        detector.features(digits.X)
