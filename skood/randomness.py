"""Random numbers that leave numpy's global generator alone."""

from __future__ import annotations

from numbers import Integral

import numpy as np

from .notices import quoted

__all__ = ["random_generator"]


def random_generator(random_state: object) -> np.random.RandomState:
    """Turn a `random_state` into a generator; None draws fresh entropy.

    It differs from scikit-learn's ``check_random_state`` in None alone, which there is numpy's
    global generator.

    Examples
    --------
    >>> from skood.randomness import random_generator
    >>> random_generator(0).randint(100)
    44
    """
    if isinstance(random_state, np.random.RandomState):
        return random_state
    if random_state is None:
        return np.random.RandomState()
    if isinstance(random_state, Integral):
        return np.random.RandomState(int(random_state))
    raise TypeError(
        f"random_state={quoted(random_state)}; expected an int, a numpy.random.RandomState or None."
    )
