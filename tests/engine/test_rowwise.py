from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from skood.engine.rowwise import Dependence, Rounding, check_row_by_row, dependence
from skood.exceptions import RandomScoresWarning

CPU = torch.device("cpu")
VALUES = torch.tensor(np.random.RandomState(0).randn(20, 3))
GENERATOR = np.random.default_rng(0)


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + 0.01 * self.calls


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.softmax(1), Dependence.NOTHING),
        (lambda x: x * (1 + 1e-7 * len(x)), Dependence.NOTHING),  # as rounding does
        (lambda x: x - x[:1], Dependence.COMPANY),
        (lambda x: x - x[-1:], Dependence.COMPANY),
        (lambda x: x.cumsum(0), Dependence.COMPANY),
        (lambda x: x.flip(0).cumsum(0).flip(0), Dependence.COMPANY),
        (lambda x: x.sort(0)[0], Dependence.COMPANY),
        (lambda x: x * (x >= x.topk(min(3, len(x)), 0)[0][-1:]), Dependence.COMPANY),
        (lambda x: x - 0.01 * x.mean(0), Dependence.COMPANY),
        (lambda x: x * (len(x) > 1), Dependence.COMPANY),
        (lambda x: x[:, : len(x)], Dependence.COMPANY),  # another shape
        (lambda x: x * (torch.rand(len(x), 1) > 0.02), Dependence.CALL),
        (lambda x: x * torch.tensor(GENERATOR.random((len(x), 1)) > 0.05), Dependence.CALL),
        (Counter(), Dependence.CALL),
        (lambda x: x + 0 * torch.rand(3), Dependence.DRAWS),
        (lambda x: x + 0 * np.random.rand(), Dependence.DRAWS),
    ],
)
def test_what_values_depend_on_beside_their_rows(function, expected):
    found = dependence(lambda picks: function(VALUES[picks]), len(VALUES))
    assert found.dependence is expected


def test_a_function_that_takes_no_single_row_is_tried_on_several():
    def values(picks):
        if len(picks) == 1:
            raise ValueError("one row")
        return VALUES[picks]

    assert dependence(values, len(VALUES)).dependence is Dependence.NOTHING
    with pytest.raises(ValueError, match="20 rows"):
        dependence(lambda picks: fail(f"{len(picks)} rows"), len(VALUES))


def fail(message):
    raise ValueError(message)


def test_draws_from_private_generators_are_asked_for_again():
    generator = torch.Generator()

    def values(picks):
        torch.rand(3, generator=generator)
        return VALUES[picks]

    assert dependence(values, len(VALUES)).dependence is Dependence.NOTHING
    assert dependence(values, len(VALUES), draws=True).dependence is Dependence.DRAWS


def test_rounding_is_measured_by_how_far_rows_lie_apart():
    far = VALUES + 1000
    rounding = Rounding(far)
    assert rounding.explains(far, far * (1 + 1e-7))
    assert not rounding.explains(far, far + 0.01 * VALUES.roll(1, 0))
    assert rounding.may_explain(far, far + 0.01)
    assert not rounding.may_explain(far, far + 0.2)
    assert Rounding(VALUES.bfloat16()).may_explain(VALUES, VALUES * 1.01)
    assert not rounding.may_explain(far, far[:, :2])
    assert not rounding.may_explain(far, far * float("nan"))


def test_functions_of_the_users_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^it gives a row another value.*dim=1"):
        check_row_by_row("it", lambda picks: VALUES[picks].cumsum(0), 20, CPU)
    with pytest.raises(ValueError, match=r"^it gives the same rows other values.*no random"):
        check_row_by_row("it", lambda picks: torch.rand(len(picks), 1), 20, CPU)
    with pytest.warns(RandomScoresWarning, match="it draws random numbers"):
        check_row_by_row("it", lambda picks: VALUES[picks] + 0 * torch.rand(3), 20, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_row_by_row("it", lambda picks: VALUES[picks], 20, CPU)
        check_row_by_row("it", lambda picks: VALUES[picks].argmax(dim=1), 20, CPU)
        check_row_by_row("it", lambda picks: VALUES[picks, 0] > 0, 20, CPU)
