from __future__ import annotations

import numpy as np
import pytest

from skood.randomness import random_generator


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7)])
def test_an_integer_seeds_a_generator(seed):
    draws = random_generator(seed).random_sample(5)
    assert draws.tolist() == np.random.RandomState(7).random_sample(5).tolist()


def test_a_generator_is_used_as_it_is():
    generator = np.random.RandomState(0)
    assert random_generator(generator) is generator


def test_none_draws_fresh_entropy_and_leaves_the_global_generator_alone(generator_states):
    before = generator_states()
    first, second = (random_generator(None).random_sample(4).tolist() for _ in range(2))
    assert first != second
    assert generator_states() == before


@pytest.mark.parametrize("random_state", [1.0, "0", np.random.default_rng(0), np.random])
def test_anything_else_is_refused(random_state):
    with pytest.raises(TypeError, match=r"expected an int, a numpy\.random\.RandomState or None"):
        random_generator(random_state)
