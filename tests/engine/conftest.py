from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_weights():
    """The same initial weights in every test, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
