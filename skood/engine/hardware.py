"""What the machine offers: device, precision to train in, and rows to score at a time."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..exceptions import DeviceWarning
from ..notices import first_line, quoted, warn_user

VALUES_IN_CACHE = 2**20
"""Values of the largest tensor in a network with which a CPU scores fastest: 4 MB in float32."""

VALUES = {"cpu": VALUES_IN_CACHE, "cuda": 2**26}
"""The same by device: a GPU wants few large kernels, and not too much padding in the last batch."""

VALUES_ELSEWHERE = 2**23

FEWEST_ROWS, MOST_ROWS = 8, {"cpu": 2**12, "cuda": 2**16}

LARGEST_KEPT_BLOCK = 2**25 - 2**16
"""Bytes of a block, just below the largest that glibc keeps when it is freed."""


@dataclass(frozen=True)
class Precision:
    """Dtypes in which a network computes in training and in scoring.

    None leaves the network's own dtype; in training, that is float32 for one in 16 bits.
    """

    training: torch.dtype | None
    scoring: torch.dtype | None

    def names(self, own: torch.dtype) -> dict[str, str]:
        """Names of the dtypes, given the network's own."""
        trained = torch.promote_types(own, torch.float32)
        dtypes = {"training": self.training or trained, "scoring": self.scoring or own}
        return {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that ``device=`` asks for; "auto" is the best one present.

    A ValueError says if it is unknown or absent.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device={quoted(device)} cannot be used here ({first_line(error)[:100]}); "
            'pass "auto", "cpu" or a device that this machine and this build of torch have.'
        ) from error
    return resolved


def available_device(device: torch.device) -> torch.device:
    """The device itself where this machine has it, else the CPU, with a warning."""
    try:
        return resolve_device(device)
    except ValueError:
        warn_user(
            f"This detector was fitted on {device}, which is not available here: it now computes "
            "on the CPU.",
            DeviceWarning,
        )
        return torch.device("cpu")


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic runs in hardware on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def resolve_precision(precision: str, module: nn.Module, device: torch.device) -> Precision:
    """Dtypes for ``precision=``; "auto" trains convolutions in bfloat16 where that is native."""
    if precision == "float32":
        return Precision(None, None)
    if precision == "bfloat16":
        return Precision(torch.bfloat16, torch.bfloat16)
    convolutional = any(
        isinstance(m, nn.Conv2d) and m.weight.dtype != torch.float64 for m in module.modules()
    )
    # Casting small matrices costs more than it saves, so only convolutions are worth it.
    faster = convolutional and has_native_bfloat16(device)
    return Precision(torch.bfloat16 if faster else None, None)


def rows_at_once(widest: int, device: torch.device, precision: torch.dtype | None = None) -> int:
    """Rows of a forward for the most throughput, a power of two.

    `widest` is how many values a row has where the network is widest; `precision` is that of
    autocast.
    """
    values = VALUES.get(device.type, VALUES_ELSEWHERE)
    if device.type == "cpu" and precision is not None:
        values = values * 4 // precision.itemsize  # twice as many in 16 bits as in float32
    most = MOST_ROWS.get(device.type, MOST_ROWS["cpu"])
    rows = min(max(values // widest, FEWEST_ROWS), most)
    return 1 << (rows.bit_length() - 1)


def rows_of_small_shape(device: torch.device) -> int:
    """Rows of the smallest forward worth its while: a GPU takes as long for a row as for some."""
    return 1 if device.type == "cpu" else 16


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next batch, of up to 64 MB in all.

    It gives a freed block back to the system, and takes new pages for the next one, unless it has
    seen a block of at least that size freed before; the largest that counts has 32 MiB. This one is
    never written to, so it takes no memory.
    """
    torch.empty(LARGEST_KEPT_BLOCK, dtype=torch.uint8, device="cpu")


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast context for a precision; None switches off any that surrounds the call."""
    if precision is None and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(
        device.type, dtype=precision, enabled=precision is not None, cache_enabled=False
    )


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Few values on a device, which for CUDA need not be done with earlier work first."""
    # The driver has read memory that is not pinned before this returns.
    return values.to(device, non_blocking=device.type == "cuda")


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU with memory of its own has free; 0 on other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free
