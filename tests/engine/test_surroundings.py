from __future__ import annotations

import os
import threading

import pytest
import torch
from contexts import default_dtype

from skood.engine.surroundings import default_dtype_for, own_defaults, under_autocast, undisturbed

CPU = torch.device("cpu")


SURROUNDINGS = {
    "nothing": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", torch.float16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
}


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


def modes_of_computation():
    *shown, _, dtype, device = modes()
    return (*shown, dtype, device)


EXPECTED = (False, False, False, torch.bfloat16, torch.float32, CPU)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_function_runs_in_the_same_modes_whatever_surrounds_it(name):
    outside = modes()
    with SURROUNDINGS[name]():
        before = modes()
        assert undisturbed(modes_of_computation, CPU, torch.float32) == EXPECTED
        assert modes() == before
        with pytest.raises(KeyboardInterrupt):
            undisturbed(_interrupted, CPU, torch.float32)
        assert modes() == before
    assert modes() == outside


def _interrupted():
    torch.set_grad_enabled(True)
    raise KeyboardInterrupt


def test_what_is_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        made = undisturbed(lambda: torch.ones(3), CPU, torch.float32)
    (made * torch.ones(3, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("surrounding", ["nothing", "autocast"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_autocast_is_to_the_precision_asked_for(surrounding, precision):
    def product():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with SURROUNDINGS[surrounding]():
        before = modes()
        assert under_autocast(product, CPU, precision) == (precision or torch.float32)
        assert modes() == before


def test_a_default_dtype_of_the_caller_counts_if_it_is_the_networks():
    assert default_dtype_for(torch.float64) == torch.float32
    with default_dtype(torch.float64):
        assert default_dtype_for(torch.float64) == torch.float64
        assert default_dtype_for(torch.float32) == torch.float32
        with own_defaults(CPU, torch.float32):
            assert default_dtype_for(torch.float64) == torch.float64


def test_threads_share_a_default_dtype_until_the_last_one_is_done():
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first():
        with own_defaults(CPU, torch.float32):
            first_is_in.set()
            second_is_in.wait(10)

    with default_dtype(torch.float64):
        thread = threading.Thread(target=first)
        thread.start()
        first_is_in.wait(10)
        with own_defaults(CPU, torch.float32):
            second_is_in.set()
            thread.join()
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_does_not_wait_for_a_thread_that_is_not_there():
    from skood.engine.surroundings import _Defaults

    holding, done = threading.Event(), threading.Event()

    def hold():
        with _Defaults.lock:
            holding.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if _Defaults.lock.acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
