from __future__ import annotations

import numpy as np
import pytest
import torch
from made import AWKWARD, made


@pytest.fixture(scope="session")
def of_digits(digits):
    """Penultimate features, 64 after a ReLU, of a trained network: of digits, and of noise."""
    body, head = digits.module[:-1], digits.module[-1]
    noise = np.random.RandomState(0).rand(100, digits.X.shape[1])
    with torch.no_grad():
        fit, new = (
            body(torch.tensor(rows, dtype=torch.float32))
            for rows in (digits.X, np.concatenate([digits.X_test, noise]))
        )
        return made(fit, new, head.weight, head.bias, digits.y)


@pytest.fixture(params=["of_digits", *AWKWARD])
def case(request):
    """Features of a trained network, and awkward ones."""
    if request.param in AWKWARD:
        return AWKWARD[request.param]()
    return request.getfixturevalue(request.param)
