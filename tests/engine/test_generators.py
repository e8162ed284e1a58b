from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from skood.engine.generators import random_states, restore_random_states, watched_draws


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(2)])
def test_draws_from_global_generators_are_seen_and_taken_back(draw):
    before = random_states()
    with watched_draws() as drew:
        assert not drew()
        first = draw()
        assert drew()
    restore_random_states(before)
    assert np.array_equal(draw(), first)
    restore_random_states(before)
