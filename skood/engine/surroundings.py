"""What callers may have set in torch, which must not reach a network: modes, autocast, defaults."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

T = TypeVar("T")

_set_default_dtype = torch._C._set_default_dtype
_set_grad_enabled = torch._C._set_grad_enabled
_InferenceMode = torch._C._InferenceMode
_number_of_modes = torch._C._len_torch_function_stack


def undisturbed(function: Callable[[], T], device: torch.device, dtype: torch.dtype) -> T:
    """What a function returns, without gradients, autocast, and the caller's modes and defaults.

    `device` and `dtype` are those of `own_defaults`. The caller's modes are back afterwards, also
    if the call is interrupted, wherever that happens: Python raises KeyboardInterrupt between calls
    of C functions only, and each `finally` here begins with one that takes a mode back. A context
    manager written in Python can be interrupted after it has switched something on, and before the
    block begins that would switch it off.
    """
    if torch.is_inference_mode_enabled():
        # A network may keep what it computes, and training could not use what is made in that mode.
        with _InferenceMode(False):
            return undisturbed(function, device, dtype)
    before = torch.is_grad_enabled()
    try:
        _set_grad_enabled(False)
        if _Defaults.users or torch.get_default_dtype() is not dtype or _number_of_modes():
            own = own_defaults(device, dtype)
            try:
                with own:
                    return under_autocast(function, device, None)
            finally:
                own.gen.close()  # which an interrupt of `with` leaves open
        return under_autocast(function, device, None)
    finally:
        _set_grad_enabled(before)


def under_autocast(
    function: Callable[[], T], device: torch.device, precision: torch.dtype | None
) -> T:
    """What a function returns under autocast to a precision; None switches off any around it."""
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    if precision is None and not enabled:
        return function()
    dtype, cached = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
    try:
        try:
            try:
                torch.set_autocast_enabled(kind, precision is not None)
                torch.set_autocast_dtype(kind, precision or _autocast_dtype(kind))
                torch.set_autocast_cache_enabled(False)
                return function()
            finally:
                torch.set_autocast_enabled(kind, enabled)
        finally:
            torch.set_autocast_dtype(kind, dtype)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _autocast_dtype(kind: str) -> torch.dtype:
    """What torch.autocast takes if neither the network nor a caller names a dtype."""
    return torch.bfloat16 if kind == "cpu" else torch.float16


class _Defaults:
    """The default dtype, which belongs to the process.

    As long as a thread needs another one than the caller's, all threads have that.
    """

    lock = threading.RLock()
    users = 0
    callers = torch.float32


@contextmanager
def own_defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, a default dtype, and the CPU or the network's own device as default device."""
    counted, mode = False, _mode_of_default_device()
    callers = torch.device("cpu") if mode is None else mode.device
    try:
        with _Defaults.lock:
            if not _Defaults.users:
                _Defaults.callers = torch.get_default_dtype()
            if _Defaults.users or _Defaults.callers is not dtype:
                _Defaults.users += 1
                counted = True
                _set_default_dtype(dtype)
        if mode is not None and mode.device.type != device.type:
            # Not by another mode: while torch adds one it takes all others away, and an interrupt
            # would lose them.
            mode.device = torch.device("cpu")
        yield
    finally:
        if mode is not None:
            mode.device = callers
        if counted:
            with _Defaults.lock:
                _Defaults.users -= 1
                if not _Defaults.users:
                    _set_default_dtype(_Defaults.callers)


def _mode_of_default_device() -> DeviceContext | None:
    """The mode of this thread that names the default device, if any does."""
    modes = _get_current_function_mode_stack()
    return next((mode for mode in modes if isinstance(mode, DeviceContext)), None)


def default_dtype_for(own: torch.dtype) -> torch.dtype:
    """The default dtype for a network: torch's own, unless the caller has set the network's."""
    callers = _Defaults.callers if _Defaults.users else torch.get_default_dtype()
    return own if callers == own else torch.float32


def _renew_lock() -> None:
    _Defaults.lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # the thread that holds it may not be there
    os.register_at_fork(after_in_child=_renew_lock)
