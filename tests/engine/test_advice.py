from __future__ import annotations

import traceback

import numpy as np
import pytest
import torch
from data_sets import Listed
from modules import Body, mlp
from torch import nn

X = np.random.RandomState(0).randn(10, 6)


class Failing(nn.Module):
    def forward(self, x):
        return self.refuse(x)

    def refuse(self, x):
        raise RuntimeError("shapes cannot be multiplied")


def test_the_error_of_a_network_keeps_its_traceback_and_gains_a_note(opened):
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied") as raised:
        opened(Failing(), X)
    frames = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert frames[-2:] == ["forward", "refuse"]
    (note,) = raised.value.__notes__
    assert "Raised by the module given, Failing, on a batch of shape (8, 6)" in note
    assert "torch.float32" in note
    assert "preprocess=" in note


class Inner(Body):
    """A classifier whose forward begins with a function of the test's."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.head(torch.relu(self.body(self.change(x))))


def embedding():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3))


def convolution(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.LazyLinear(3))


def refuse_device(x):
    raise RuntimeError("Expected all tensors to be on the same device, but found two, cpu and cuda")


@pytest.mark.parametrize(
    ("module", "rows", "hint"),
    [
        (
            embedding(),
            np.ones((8, 6), dtype=np.int64),
            "integers are cast to float32; a network on token ids takes them with "
            "preprocess=torch.Tensor.long",
        ),
        (embedding(), np.ones((8, 6)), "preprocess=torch.Tensor.long"),
        (
            convolution(),
            np.ones((8, 12, 12, 3), dtype=np.float32),
            "channels last, (n, h, w, c), where networks take (n, c, h, w): np.moveaxis(X, 3, 1) "
            "puts them first, and so does preprocess=skood.networks.NormalizeImages(mean, std)",
        ),
        (convolution(1), np.ones((8, 12, 12)), "X[:, None] of (n, h, w)"),
        (convolution(), np.ones((8, 432)), "X.reshape(n, c, h, w)"),
        (Inner(refuse_device), X, "Tensors kept as plain attributes stay where they were: use"),
    ],
    ids=["token ids", "float ids", "channels last", "gray", "flat", "device"],
)
def test_the_note_says_what_may_help(opened, module, rows, hint):
    with pytest.raises(RuntimeError) as raised:
        opened(module, rows)
    (note,) = raised.value.__notes__
    assert hint in note
    assert f"on a batch of shape {(8, *rows.shape[1:])}" in note


def test_images_of_integers_are_not_taken_for_token_ids(opened):
    with pytest.raises(RuntimeError) as raised:
        opened(convolution(), np.ones((8, 12, 12, 3), dtype=np.uint8))
    (note,) = raised.value.__notes__
    assert "channels last" in note
    assert "token" not in note


class Points(Listed):
    """A data set of floating-point numbers, whose name could be mistaken for a dtype."""


def test_a_data_set_is_not_taken_for_token_ids_by_its_name(opened):
    with pytest.raises(RuntimeError, match="multiplied") as raised:
        opened(mlp(), Points(list(np.ones((8, 7)))))
    (note,) = raised.value.__notes__
    assert "token" not in note


def test_the_note_gives_no_hint_that_does_not_apply(opened):
    with pytest.raises(RuntimeError, match="multiplied") as raised:
        opened(mlp(), np.ones((8, 7)))
    (note,) = raised.value.__notes__
    assert note == (
        "Raised by the module given, Sequential, on a batch of shape (8, 7) and dtype "
        "torch.float64. If it expects another shape, dtype or layout, pass a function that makes "
        "it as preprocess=."
    )


def test_what_preprocess_turns_into_numbers_is_not_taken_for_token_ids(opened):
    with pytest.raises(RuntimeError) as raised:
        opened(mlp(), np.ones((8, 7), dtype=np.int64), preprocess=torch.Tensor.double)
    assert "token" not in raised.value.__notes__[0]
