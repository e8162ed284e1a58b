from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modules import Body
from torch import nn

from skood.engine.outputs import check_usable, logits_of, run
from skood.exceptions import NonFiniteLogitsError

X = np.random.RandomState(0).randn(10, 6)
Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

Named = namedtuple("Named", ["aux", "logits"])


@pytest.mark.parametrize(
    "output",
    [
        Z,
        (Z, None),
        [Z],
        {"aux": None, "logits": Z},
        OrderedDict(logits=Z),
        SimpleNamespace(logits=Z),
        Named(None, Z),
    ],
    ids=["tensor", "tuple", "list", "dict", "OrderedDict", "object", "namedtuple"],
)
def test_logits_are_found_in_what_a_network_returned(output):
    assert logits_of(output) is Z
    assert logits_of(output, 3) is Z
    assert run(lambda batch: output, torch.zeros(3, 1)) is Z


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (None, r"None \(has its forward no return\?\)"),
        (np.zeros((3, 2)), "a ndarray"),
        ((), "a tuple of nothing"),
        (("a", torch.zeros(3, 2)), r"a tuple of str, Tensor \(3, 2\)"),
        ({"scores": torch.zeros(3, 2)}, r"a dict with the keys \['scores'\]"),
    ],
)
def test_an_output_without_logits_is_refused(output, shown):
    message = (
        rf"The module returned {shown}; expected logits: a tensor \(n, K\), a tuple whose first "
        r'element is that tensor, or a dict with the key "logits"\. Wrap the module'
    )
    with pytest.raises(TypeError, match=message):
        logits_of(output)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((), r"is no logits, but a loss"),
        ((3,), r"give last, its last layer, a second one"),
        ((3, 1), r"give last, its last layer, a second one"),
        ((3, 4, 1, 1), r"Return them flat: output\.flatten\(1\)"),
        ((3, 4, 2), r"Wrap the module in one that averages the positions"),
    ],
)
def test_logits_of_another_shape_are_refused(shape, remedy):
    message = rf"logits of shape {re.escape(str(shape))}; expected \(n, K\).*K >= 2.*{remedy}"
    with pytest.raises(ValueError, match=message):
        logits_of(torch.zeros(shape))


def test_the_company_of_logits_of_another_shape_is_described():
    with pytest.raises(ValueError, match=r"a tuple of Tensor \(3, 7, 2\), Tensor \(3, 4\)"):
        logits_of((torch.zeros(3, 7, 2), Z))


@pytest.mark.parametrize("columns", [3, 12])
def test_a_network_must_give_one_row_of_logits_a_row(opened, columns):
    class Regrouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(columns, 4).double()

        def forward(self, x):
            return self.head(x.reshape(-1, columns))

    with pytest.raises(ValueError, match=r"shape \(\d+, 4\) for 8 rows; expected one row"):
        opened(Regrouped(), X)


class After(Body):
    """A classifier that does something with its logits."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.mark.parametrize("head", [None, "head"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (torch.Tensor.long, TypeError, r"dtype torch\.int64; expected floating-point numbers"),
        (
            lambda z: z.to("meta"),
            ValueError,
            r"logits on meta for a batch on cpu: its forward moves.*Remove \.to\(",
        ),
        (lambda z: z / 0, ValueError, r"NaN or infinite logits for 8 of 8 rows.*Check the scale"),
        (
            lambda z: z.softmax(dim=1),
            ValueError,
            r"returns probabilities \(each row is non-negative and sums to 1\), whose energy tells "
            r"nothing.*Return the logits themselves: leave out the last softmax",
        ),
        (
            lambda z: z.log_softmax(dim=1),
            ValueError,
            r"returns log-probabilities \(the logsumexp of each row is 0\), whose energy.*leave "
            r"out the last log_softmax",
        ),
    ],
    ids=["integers", "device", "infinite", "softmax", "log_softmax"],
)
def test_logits_without_a_meaningful_energy_are_refused(opened, change, error, message, head):
    with pytest.raises(error, match=message):
        opened(After(change), X, head=head)


def test_a_weight_that_is_not_finite_is_named():
    module = Body()
    with torch.no_grad():
        module.head.bias[0] = torch.nan
    batch = torch.tensor(X)
    with pytest.raises(ValueError, match=r"Its 'head\.bias' holds such values"):
        check_usable(module(batch), batch, module)


@pytest.mark.parametrize(
    "mask", [[[0, 0, 0, 1]], [[1, 0, 0, 0], [0, 1, 1, 0]] * 5], ids=["all", "each"]
)
def test_a_mask_of_classes_is_refused_with_what_to_return(mask):
    batch = torch.tensor(X)
    logits = torch.randn(10, 4).masked_fill(torch.tensor(mask, dtype=torch.bool), -torch.inf)
    for masked in (logits, logits.log_softmax(dim=1)):
        with pytest.raises(NonFiniteLogitsError, match=r"-inf.*Return the logits without"):
            check_usable(masked, batch, Body())
    logits[0] = -torch.inf
    with pytest.raises(NonFiniteLogitsError, match=r"NaN or infinite logits for 10 of 10 rows"):
        check_usable(logits, batch, Body())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_probabilities_are_recognised_in_every_precision(dtype, function):
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * 5
    check_usable(logits.to(dtype), logits, nn.Identity())
    with pytest.raises(ValueError, match="probabilities"):
        check_usable(function(logits.to(dtype), dim=1), logits, nn.Identity())


@pytest.mark.parametrize(
    "logits", [torch.zeros(8, 4), torch.full((8, 4), 0.3), -torch.eye(8, 4), torch.eye(8, 4) * 2]
)
def test_logits_that_only_resemble_probabilities_pass(logits):
    check_usable(logits, logits, nn.Identity())
