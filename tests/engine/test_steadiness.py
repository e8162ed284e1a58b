from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from modules import Body
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from skood.exceptions import RandomScoresWarning

X = np.random.RandomState(0).randn(100, 6)
STEPS = np.random.RandomState(0).randn(20, 5, 6).astype(np.float32)


class Changed(Body):
    """A classifier whose features are changed by a function of itself and of them."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.register_buffer("mean", torch.zeros(8).double())
        self.register_buffer("steps", torch.tensor(0))
        self.calls = 0
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return self.head(self.change(self, self.features(x)))


class Sequential(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        x = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head((x[0] if isinstance(x, tuple) else x)[:, -1])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda first: nn.LSTM(6, 6, batch_first=first),
        lambda first: nn.GRU(6, 6, batch_first=first),
        lambda first: nn.MultiheadAttention(6, 2, batch_first=first),
        lambda first: nn.TransformerEncoderLayer(6, 2, 8, batch_first=first),
    ],
    ids=["LSTM", "GRU", "attention", "encoder"],
)
def test_layers_over_steps_need_batch_first(opened, make, first):
    module = Sequential(make(first))
    if first:
        opened(module, STEPS)
        return
    with pytest.raises(ValueError, match=r"depend on the other rows.*batch_first=True"):
        opened(module, STEPS)


def test_a_little_of_the_batch_is_told_from_rounding_in_float64(opened):
    def change(module, h):
        return h - 1e-3 * h.mean(0)

    module = Changed(change).float()
    with pytest.raises(ValueError, match="depend on the other rows"):
        opened(module, X.astype(np.float32))


def test_rounding_that_depends_on_the_batch_is_no_company(opened):
    def change(module, h):  # 8 bits, as quantized or in TF32; none in float64
        return h if h.dtype == torch.float64 else h * (1 + 1e-3 * (len(h) > 64))

    opened(Changed(change).float(), X.astype(np.float32))


def average(module, h):
    module.mean = 0.99 * module.mean + 0.01 * h.mean(0)
    return h - module.mean


def average_in_place(module, h):
    module.mean.mul_(0.99).add_(0.01 * h.mean(0))
    return h - module.mean


def late(module, h):
    module.calls += 1
    return h * (1 + (module.calls > 50))


def late_by_buffer(module, h):
    module.steps += 1
    return h * (1 + (module.steps > 50))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (average, "mean"),
        (average_in_place, "mean"),
        (late, "calls"),
        (late_by_buffer, "steps"),
    ],
)
def test_logits_that_follow_what_a_network_writes_are_refused(opened, change, name):
    with pytest.raises(ValueError, match=rf"writes into its '{name}'.*if self\.training"):
        opened(Changed(change), X)


def test_what_a_network_writes_without_effect_is_allowed(opened):
    def change(module, h):
        module.calls += 1
        module.mean += h.mean(0)
        module.last = h
        return h

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(Changed(change), X)


@pytest.mark.parametrize(
    "change",
    [
        lambda module, h: h * (torch.rand(len(h), 1) > 0.02),
        lambda module, h: h * float(torch.rand(()) > 0.1),
        lambda module, h: h * (random.random() > 0.2),
        lambda module, h: h * torch.tensor(module.generator.random((len(h), 1)) > 0.05),
    ],
    ids=["rows", "depth", "python", "own generator"],
)
def test_what_is_seldom_random_is_refused(opened, change):
    random.seed(0)
    message = r"module.* gives other logits for the same rows.*training=self\.training"
    with pytest.raises(ValueError, match=message):
        opened(Changed(change), X)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_draws_without_effect_are_warned_of(opened, generator):
    def change(module, h):
        return h + 0 * torch.rand(h.shape, generator=generator)

    with pytest.warns(RandomScoresWarning, match="draws random numbers"):
        opened(Changed(copy.copy(change)), X)


def test_attention_with_its_own_dropout_switched_off_draws_nothing(opened):
    def change(module, h):
        return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(Changed(change), X)


def test_observers_are_refused_and_the_remedy_works(opened):
    images = np.random.RandomState(0).rand(20, 3, 8, 8).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way to torchao
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        module.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        module = torch.ao.quantization.prepare_qat(module.train())
        module(torch.tensor(images))
        with pytest.raises(ValueError, match=r"observers move.*disable_observer\)"):
            opened(module, images)
        opened(module.apply(torch.ao.quantization.disable_observer), images)


# Who is to blame


class Items(Dataset):
    def __init__(self, change):
        self.change = change

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return self.change(torch.tensor(X[index]))


OWN = np.random.default_rng(0)


@pytest.mark.parametrize(
    "change",
    [lambda x: x * float(torch.rand(()) > 0.05), lambda x: x * float(OWN.random() > 0.1)],
    ids=["global", "own"],
)
def test_a_random_data_set_is_blamed(opened, change):
    with pytest.raises(ValueError, match=r"the data set, Items, gives other values.*augment="):
        opened(Body(), Items(change))


def test_preprocess_is_blamed(opened):
    with pytest.raises(ValueError, match=r"^preprocess gives other values.*augment="):
        opened(Body(), X, preprocess=lambda x: x + torch.randn_like(x))
    with pytest.raises(ValueError, match=r"^preprocess gives a row other values.*depend on the"):
        opened(Body(), X, preprocess=lambda x: x / x.max())


def scaled_if_large(x):
    return x / 255 if x.max() > 1 else x


def scaled_row_by_row(x):
    return torch.where(x.amax(dim=1, keepdim=True) > 1, x / 255, x)


BYTES = (255 * np.random.RandomState(0).rand(100, 6)).astype(np.uint8)


@pytest.mark.parametrize("rows", [BYTES / 255.0, 1.0 * BYTES, BYTES], ids=["1", "255", "uint8"])
def test_rows_on_one_scale_do_not_hide_a_test_of_the_scale_of_a_batch(opened, rows):
    with pytest.raises(ValueError, match=r"^preprocess gives a row other.*a test of x\.max\(\)"):
        opened(Body(), rows, preprocess=lambda x: scaled_if_large(x.double()))
    opened(Body(), rows, preprocess=lambda x: scaled_row_by_row(x.double()))


@pytest.mark.parametrize("scaled", [scaled_if_large, lambda x: x / x.max().clamp(min=1)])
def test_a_network_that_looks_at_the_scale_of_a_batch_is_refused(opened, scaled):
    with pytest.raises(ValueError, match=r"depend on the other rows.*a test of x\.max\(\)"):
        opened(InputScaled(scaled), BYTES / 255.0)
    opened(InputScaled(scaled_row_by_row), BYTES / 255.0)


class InputScaled(Body):
    def __init__(self, scaled):
        super().__init__()
        self.scaled = scaled

    def features(self, x):
        return super().features(self.scaled(x))


class Words(nn.Module):
    """Means of embedded words, with or without those that only fill up."""

    def __init__(self, masked):
        super().__init__()
        self.embedding, self.head, self.masked = nn.Embedding(30, 6), nn.Linear(6, 3), masked

    def forward(self, x):
        counted = (x > 0)[:, :, None] if self.masked else torch.ones_like(x)[:, :, None]
        return self.head((self.embedding(x) * counted).sum(1) / counted.sum(1))


@pytest.mark.parametrize("masked", [False, True])
def test_padding_to_the_longest_row_of_a_batch_needs_a_mask(opened, masked):
    lengths = np.random.RandomState(0).randint(2, 12, size=(40, 1))
    texts = np.random.RandomState(0).randint(1, 30, size=(40, 12)) * (np.arange(12) < lengths)

    def trimmed(x):
        return x[:, : int((x > 0).sum(1).max())].long()

    if masked:
        opened(Words(masked), texts, preprocess=trimmed)
        return
    with pytest.raises(ValueError, match="lengths fixed at training time"):
        opened(Words(masked), texts, preprocess=trimmed)


def test_the_trial_moves_no_generator(opened, generator_states):
    module = Body()
    before = generator_states()
    opened(module, X)
    assert generator_states() == before
