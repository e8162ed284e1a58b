from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skood import SparseEnergyOODDetector
from skood.engine.outputs import run
from skood.rows import as_rows

IMAGES = np.random.RandomState(0).rand(40, 3, 8, 8).astype(np.float32)
LABELS = np.arange(40) % 4


class Viewing(nn.Module):
    """A classic network: convolutions, a step that makes vectors of maps, linear layers."""

    def __init__(self, flat, channels=3):
        super().__init__()
        self.conv, self.body = nn.Conv2d(channels, 6, 3, padding=1), nn.Linear(96, 16)
        self.head, self.flat = nn.Linear(16, 4), flat

    def forward(self, x):
        return self.head(self.body(self.flat(self, F.max_pool2d(self.conv(x).relu(), 2))).relu())


def view(module, h):
    return h.view(len(h), -1)


def view_in_training(module, h):
    return view(module, h) if module.training else h.flatten(1)


def view_of_one(module, h):
    return view(module, h) if len(h) == 1 else h.flatten(1)


def view_under_autocast(module, h):
    return view(module, h) if h.dtype == torch.bfloat16 else h.flatten(1)


def in_order_of_memory(module, h):
    return torch.as_strided(h, (len(h), 96), (96, 1))


def by_stride(module, h):
    return h.flatten(1) * (1 + (h.stride(1) == 1))


@pytest.mark.parametrize(
    ("flat", "precision"),
    [
        (view, "float32"),
        (view_in_training, "float32"),
        (view_of_one, "float32"),
        (view_under_autocast, "bfloat16"),
        (in_order_of_memory, "float32"),
        (by_stride, "float32"),
    ],
)
def test_what_needs_contiguous_memory_gets_it(opened, flat, precision):
    module = Viewing(flat).eval()
    network = opened(module, IMAGES, precision=precision)
    assert network.execution["layout"] == "contiguous"
    batch = network.batcher(as_rows(IMAGES))
    assert batch.is_contiguous()
    with torch.no_grad():
        expected = run(module, torch.tensor(IMAGES))
        torch.testing.assert_close(run(network.module, batch), expected)


@pytest.mark.parametrize(
    "flat",
    [
        lambda module, h: h.flatten(1),
        lambda module, h: h.reshape(len(h), 2, 3, 4, 4).transpose(1, 2).reshape(len(h), -1),
    ],
    ids=["flatten", "channel shuffle"],
)
def test_what_works_in_channels_last_stays_there(opened, flat):
    assert opened(Viewing(flat), IMAGES).execution["layout"] == "channels_last"


def test_a_step_that_fails_in_any_layout_does_not_decide(opened):
    def flat(module, h):
        assert not module.training
        return h.flatten(1)

    assert opened(Viewing(flat), IMAGES).execution["layout"] == "channels_last"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": "flip-crop"},
        {"augment": lambda batch: batch.to(memory_format=torch.channels_last)},
        {"preprocess": torch.Tensor.contiguous},
        {"score_function": "odin"},
        {"distillation_weight": 1.0},
    ],
    ids=["plain", "flip-crop", "augment", "preprocess", "odin", "distillation"],
)
def test_a_view_after_convolutions_is_trained_and_scored(options):
    detector = SparseEnergyOODDetector(Viewing(view), max_epochs=1, random_state=0, **options)
    scores = detector.fit(IMAGES, LABELS).score_samples(IMAGES)
    assert np.isfinite(scores).all()
    assert np.allclose(detector.score_samples(IMAGES[:1]), scores[:1], atol=1e-5)


def test_a_network_that_takes_no_single_image_is_scored_in_batches(opened):
    class Squeezed(nn.Module):
        def forward(self, x):
            return x.squeeze()

    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Squeezed(), nn.Linear(8, 4))
    assert opened(module, IMAGES, small_shape=True).shapes.small == 0
