from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from skood.engine.hardware import (
    Precision,
    autocast,
    available_device,
    has_native_bfloat16,
    resolve_device,
    resolve_precision,
    rows_at_once,
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


def test_autocast_follows_the_precision_whatever_surrounds_it():
    x = torch.ones(2, 2)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with autocast(torch.device("cpu"), None):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("widest", "device", "expected"),
    [
        (128, "cpu", 4096),  # a perceptron: bounded, as larger batches leave the cache
        (16 * 32 * 32, "cpu", 64),  # ResNet-20
        (32 * 32 * 32, "cpu", 32),  # WideResNet-16-2
        (64 * 112 * 112, "cpu", 8),  # ResNet-50 on 224 x 224 pixels
        (32 * 32 * 32, "cuda", 2048),
        (32 * 32 * 32, "mps", 256),
        (3000, "cpu", 256),  # a power of two
        (1, "cuda", 65536),
    ],
)
def test_rows_of_a_forward_fit_a_cache_or_fill_a_gpu(widest, device, expected):
    assert rows_at_once(widest, torch.device(device)) == expected


@pytest.mark.parametrize(("device", "share"), [("cpu", 2), ("cuda", 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_holds_twice_as_many_rows_in_16_bits(device, share, dtype):
    where = torch.device(device)
    assert rows_at_once(16384, where, dtype) == share * rows_at_once(16384, where)
    assert rows_at_once(16384, where, torch.float32) == rows_at_once(16384, where)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept_for_the_next_batch():
    # In a process of its own: others have freed large blocks before.
    script = """
import resource, sys, torch
from skood.engine.hardware import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for batch in range(23):
    if batch == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**20) for _ in range(8)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC")
    }
    faults = [
        int(subprocess.check_output([sys.executable, "-c", script, word], env=environment))
        for word in ("keep", "leave")
    ]
    # None at all where a block that large was freed before, at the import.
    assert faults[0] <= faults[1] / 10
