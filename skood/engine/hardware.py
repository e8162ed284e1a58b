"""What the machine offers: device, and the precision to train in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """Dtypes in which a network trains and scores; None leaves the network's own dtype."""

    training: torch.dtype | None
    scoring: torch.dtype | None

    def names(self, own: torch.dtype) -> dict[str, str]:
        """Names of the dtypes, given the network's own."""
        return {
            name: str(getattr(self, name) or own).removeprefix("torch.")
            for name in ("training", "scoring")
        }


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that ``device=`` asks for; "auto" is the best one present.

    Raises
    ------
    ValueError
        If the device is unknown or absent.
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
            f'device={device!r} cannot be used here ({str(error).splitlines()[0]}); pass "auto", '
            '"cpu" or a device that this machine and this build of torch have.'
        ) from error
    return resolved


def available_device(device: torch.device) -> torch.device:
    """The device itself where this machine has it, else the CPU, with a warning."""
    try:
        return resolve_device(device)
    except ValueError:
        warnings.warn(
            f"This detector was fitted on {device}, which is not available here: it now computes "
            "on the CPU.",
            UserWarning,
            stacklevel=3,
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
        isinstance(m, nn.Conv2d) and m.weight.dtype == torch.float32 for m in module.modules()
    )
    # Casting small matrices costs more than it saves, so only convolutions are worth it.
    faster = convolutional and has_native_bfloat16(device)
    return Precision(torch.bfloat16 if faster else None, None)
