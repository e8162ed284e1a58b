"""The global random generators of Python, numpy and torch: their states, and whether they move."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device | None = None) -> tuple[Any, ...]:
    """States of the random generators on the host, and of that of a GPU."""
    of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002, the global one is meant
    on_host = (random.getstate(), of_numpy, torch.get_rng_state().numpy())
    if device is None or device.type != "cuda":
        return on_host
    return (*on_host, torch.cuda.get_rng_state(device).numpy())


def restore_random_states(states: tuple[Any, ...]) -> None:
    """Give the generators on the host the states that they had."""
    of_python, of_numpy, of_torch = states[:3]
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(of_torch))


@contextmanager
def watched_draws(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """A function that tells whether a global generator has moved since the start of the block."""
    before = pickle.dumps(random_states(device))
    yield lambda: pickle.dumps(random_states(device)) != before


@contextmanager
def unmoved_generators(device: torch.device) -> Iterator[None]:
    """Leave the global generators, after a block, as they were before."""
    states = random_states()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            restore_random_states(states)
