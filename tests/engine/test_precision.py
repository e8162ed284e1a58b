from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from modules import mlp
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine import hardware
from skood.engine.network import floating_dtype
from skood.engine.precision import failure_in_training, in_float32
from skood.engine.training import Training
from skood.exceptions import PrecisionWarning

IMAGES = np.random.RandomState(0).rand(40, 3, 8, 8).astype(np.float32)
LABELS = np.arange(40) % 4
SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture
def native(monkeypatch):
    """A machine with bfloat16 in hardware, where "auto" trains convolutions in it."""
    monkeypatch.setattr(hardware, "has_native_bfloat16", lambda device: True)


def detector_of(module, **options):
    return SparseEnergyOODDetector(module, random_state=0, **{"max_epochs": 2} | options)


def fitted(module, digits, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector_of(module, **options).fit(digits.X[:300], digits.y[:300])


# Networks in 16 bits


@SIXTEEN
def test_a_network_in_16_bits_learns_as_in_float32(digits, dtype):
    own = fitted(copy.deepcopy(digits.module).to(dtype).float(), digits)
    half = fitted(copy.deepcopy(digits.module).to(dtype), digits)
    assert half.precision_ == {
        "training": "float32",
        "scoring": str(dtype).removeprefix("torch."),
    }
    for name, expected in own.module_.state_dict().items():
        found = half.module_.state_dict()[name]
        assert found.dtype == (dtype if expected.is_floating_point() else expected.dtype)
        if "running" not in name:  # rows reach the network unrounded, statistics end rounded
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=2e-2, atol=1e-3)
    for record, other in zip(own.history_, half.history_, strict=True):
        assert record["mean_l1"] == pytest.approx(other["mean_l1"], rel=1e-2)
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_each_tensor_gets_its_own_dtype_back(opened):
    module = mlp(dtype=torch.float32)
    module[0].half()
    module[4].double()
    network = opened(mlp(dtype=torch.float32), np.random.RandomState(0).randn(10, 6))
    network.adopt(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with in_float32(network):
        assert module[0].weight.dtype == module[1].running_mean.dtype == torch.float32
        assert module[4].weight.dtype == torch.float64
        with torch.no_grad():
            module[0].weight.add_(1e-6)  # which float16 does not hold
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-3)


def test_a_network_in_16_bits_resumes_bitwise(digits, tmp_path, monkeypatch):
    module = copy.deepcopy(digits.module).bfloat16()
    whole = fitted(module, digits)
    epoch = Training._epoch

    def stopping(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            fitted(module, digits, memory=tmp_path)
    for _ in range(2):  # resumed, then loaded
        again = fitted(module, digits, memory=tmp_path)
        states = (detector.module_.state_dict().values() for detector in (whole, again))
        assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))


class Fixed(nn.Module):
    """A network whose forward asks for 16 bits."""

    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, x):
        return self.module(x.to(self.dtype))


@SIXTEEN
def test_a_forward_that_asks_for_16_bits_trains_in_bfloat16(digits, dtype):
    module = Fixed(copy.deepcopy(digits.module).to(dtype), dtype)
    detector = fitted(module, digits, distillation_weight=1.0)
    assert detector.precision_["training"] == "bfloat16"
    assert floating_dtype(detector.module_) == dtype


def test_a_network_in_16_bits_that_cannot_be_widened_is_explained(digits):
    class Bound(Fixed):
        def forward(self, x):
            if self.module[0].weight.dtype != self.dtype:
                raise RuntimeError("only 16 bits")
            return super().forward(x)

    module = Bound(copy.deepcopy(digits.module).bfloat16(), torch.bfloat16)
    message = r"weights in 16 bits.*only 16 bits.*module\.float\(\).*max_epochs=0"
    with pytest.raises(ValueError, match=message) as raised:
        fitted(module, digits)
    assert len(str(raised.value)) <= 400
    fitted(module, digits, max_epochs=0)


def test_what_is_computed_in_16_bits_is_summed_in_32(digits):
    seen = []

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = copy.deepcopy(digits.module)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.module(x)

    def penalty(features):
        seen.append(features.dtype)
        return features.abs().sum(dim=1)

    fitted(Inside(), digits, penalty=penalty, max_epochs=1)
    assert set(seen) == {torch.float32}


# Networks that do not work in bfloat16


class Scattering(nn.Module):
    def __init__(self, scatter):
        super().__init__()
        self.conv, self.head, self.scatter = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), scatter

    def forward(self, x):
        return self.head(self.scatter(self.conv(x).relu().mean((2, 3))))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if gradient.dtype == torch.bfloat16:
            raise RuntimeError("no kernel for bfloat16")
        return gradient


def assign(h):
    out = torch.zeros(len(h), 8)
    out[h > 0] = h[h > 0]
    return out


@pytest.mark.parametrize(
    "scatter",
    [
        assign,
        lambda h: torch.zeros(len(h), 8).scatter_add(1, torch.arange(8).expand_as(h), h),
        lambda h: torch.zeros(len(h), 8).index_add(0, torch.arange(len(h)), h),
        NoBackward.apply,
    ],
    ids=["assign", "scatter_add", "index_add", "backward"],
)
def test_auto_falls_back_to_float32_and_says_so(native, scatter):
    detector = detector_of(Scattering(scatter), max_epochs=1)
    with pytest.warns(PrecisionWarning, match=r"cannot be trained in bfloat16 .*float32"):
        detector.fit(IMAGES, LABELS)
    assert detector.precision_ == {"training": "float32", "scoring": "float32"}
    with pytest.raises(ValueError, match=r'not work with precision="bfloat16".*"float32"'):
        detector.set_params(precision="bfloat16").fit(IMAGES, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        detector.set_params(precision="float32").fit(IMAGES, LABELS)


def test_auto_stays_in_bfloat16_where_that_works(native):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        detector = detector_of(Scattering(nn.Identity()), max_epochs=1).fit(IMAGES, LABELS)
    assert detector.precision_["training"] == "bfloat16"


def test_a_tried_step_changes_nothing(generator_states):
    module, batch = mlp().eval(), torch.randn(8, 6).double()
    before, state = generator_states(), copy.deepcopy(module.state_dict())
    assert failure_in_training(module, batch, None) is None
    assert isinstance(failure_in_training(module, batch[:, :5], None), RuntimeError)
    assert generator_states() == before
    assert all(torch.equal(state[name], x) for name, x in module.state_dict().items())
    assert not module.training
