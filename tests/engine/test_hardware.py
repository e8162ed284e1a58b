from __future__ import annotations

import pytest
import torch
from torch import nn

from skood.engine.hardware import (
    Precision,
    available_device,
    has_native_bfloat16,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device_present(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("device", ["cpu", CPU])
def test_a_present_device_is_taken_as_it_is(device):
    assert resolve_device(device) == CPU


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "", torch.device("cuda:99")])
def test_an_absent_or_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=r'device=.* cannot be used here .*; pass "auto", "cpu"'):
        resolve_device(device)


def test_an_absent_device_falls_back_to_the_cpu_with_a_warning():
    with pytest.warns(UserWarning, match=r"fitted on cuda:99, which is not available here"):
        assert available_device(torch.device("cuda:99")) == CPU
    assert available_device(CPU) == CPU


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx2": True}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_native_where_a_cpu_says_so(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bfloat16(CPU) is expected


def test_bfloat16_is_not_native_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_native_bfloat16(CPU) is False


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), True), ((8, 0), True), ((7, 5), False)]
)
def test_bfloat16_is_native_on_gpus_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_native_bfloat16(torch.device("cuda")) is expected


def test_bfloat16_is_not_native_elsewhere():
    assert has_native_bfloat16(torch.device("mps")) is False


LINEAR = nn.Sequential(nn.Linear(2, 2))
CONVOLUTIONAL = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(2, 2))
DOUBLE = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(2, 2)).double()


@pytest.mark.parametrize(
    ("precision", "module", "native", "expected"),
    [
        ("auto", CONVOLUTIONAL, True, Precision(torch.bfloat16, None)),
        ("auto", CONVOLUTIONAL, False, Precision(None, None)),
        ("auto", LINEAR, True, Precision(None, None)),
        ("auto", DOUBLE, True, Precision(None, None)),
        ("float32", CONVOLUTIONAL, True, Precision(None, None)),
        ("bfloat16", CONVOLUTIONAL, False, Precision(torch.bfloat16, torch.bfloat16)),
        ("bfloat16", LINEAR, True, Precision(torch.bfloat16, torch.bfloat16)),
    ],
)
def test_auto_trains_convolutions_in_native_bfloat16_and_scores_in_their_own_dtype(
    monkeypatch, precision, module, native, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native}, raising=False)
    assert resolve_precision(precision, module, CPU) == expected


@pytest.mark.parametrize(
    ("precision", "own", "training", "scoring"),
    [
        (Precision(None, None), torch.float64, "float64", "float64"),
        (Precision(torch.bfloat16, None), torch.float32, "bfloat16", "float32"),
        (Precision(torch.bfloat16, torch.bfloat16), torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_precisions_have_names(precision, own, training, scoring):
    assert precision.names(own) == {"training": training, "scoring": scoring}
