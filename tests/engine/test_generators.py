from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from skood.engine.generators import (
    random_states,
    restore_random_states,
    unmoved_generators,
    watched_draws,
)


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


def test_generators_are_as_they_were_also_after_an_error():
    def draw_and_fail():
        with unmoved_generators(torch.device("cpu")):
            for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
                draw()
            raise ZeroDivisionError

    before = pickle.dumps(random_states())
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert pickle.dumps(random_states()) == before
