from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from modules import Body, mlp
from torch import nn

from skood.engine.opening import check_trainable
from skood.engine.shapes import Shapes
from skood.exceptions import PenaltyWithoutEffectWarning
from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)


# What is opened


def test_opening_puts_the_network_in_evaluation_mode(opened):
    network = opened(mlp().train(), X)
    assert not any(part.training for part in network.module.modules())
    network.train(True)
    assert all(part.training for part in network.module.modules())


def test_a_module_on_the_meta_device_is_refused_with_what_to_do(opened):
    with pytest.raises(ValueError, match=r"'body\.weight' is on the meta device.*to_empty"):
        opened(Body().to("meta"), X)


def test_lazy_layers_take_shape_before_anything_else(opened):
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    assert opened(module, np.zeros((10, 2, 6, 6), dtype=np.float32)).n_logits == 3


@pytest.mark.parametrize(
    ("rows", "laid_out"), [(IMAGES, "channels_last"), (IMAGES[:, :, 0], "contiguous")]
)
def test_images_are_laid_out_channels_last(opened, rows, laid_out):
    body = nn.Conv2d(3, 8, 3) if rows.ndim == 4 else nn.Conv1d(3, 8, 3)
    module = nn.Sequential(body, nn.Flatten(), nn.LazyLinear(3))
    assert opened(module, rows).execution["layout"] == laid_out


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(X.shape[1], 3)

    def forward(self, x):
        return self.head(input=x)


def test_a_head_called_by_keyword_is_found(opened):
    network = opened(ByKeyword(), X.astype(np.float32))
    features, _ = network.seen(torch.tensor(X[:5], dtype=torch.float32))[:2]
    assert network.head == "head"
    assert torch.equal(features, torch.tensor(X[:5], dtype=torch.float32))


# Rows that depend on their company


class Randomly(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("layer", "preprocess", "message"),
    [
        (Randomly(), None, r"other logits for the same rows.*training=self\.training"),
        (nn.BatchNorm1d(X.shape[1], track_running_stats=False), None, "depend on the other rows"),
        (nn.Identity(), lambda batch: batch - batch.mean(dim=0), "depend on the other rows"),
    ],
    ids=["dropout", "batch-norm", "preprocess"],
)
def test_logits_that_change_from_call_to_call_or_with_company_are_refused(
    opened, layer, preprocess, message
):
    module = nn.Sequential(nn.Identity(), layer, nn.Linear(X.shape[1], 3))
    with pytest.raises(ValueError, match=message):
        opened(module, X.astype(np.float32), preprocess=preprocess)


class OfOneSize(Body):
    def forward(self, x):
        return super().forward(x + torch.zeros(8, 1))


def test_a_network_for_batches_of_one_size_is_explained(opened):
    with pytest.raises(RuntimeError, match="size") as raised:
        opened(OfOneSize(), X)
    (note,) = raised.value.__notes__
    assert "OfOneSize, took a batch of 8 rows, but not one of 4" in note
    assert "x.shape[0]" in note


# Shapes


@pytest.mark.parametrize("rows", [X, IMAGES])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("off", [1e-7, 1e-3])
def test_an_image_runs_alone_where_that_is_allowed_and_agrees(opened, rows, apart, off):
    class Alone(nn.Flatten):
        def forward(self, x):
            return super().forward(x) * (1 + off * (len(x) == 1))

    module = nn.Sequential(Alone(), nn.Linear(rows[0].size, 4))
    network = opened(module, rows, small_shape=apart)
    assert network.shapes.small == (apart and rows.ndim > 2 and off < 1e-5)


def test_only_shapes_that_round_alike_are_taken(opened):
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-6 * (len(x) < 60))

    network = opened(Rounding(6, 4), X)
    assert network.shapes == Shapes((64, 256, 1024, 4096))
    assert opened(nn.Linear(6, 4), X, compiled=True).shapes == Shapes((4096,))


def test_a_shape_that_rounds_one_row_otherwise_is_left_out(opened):
    rows = np.random.RandomState(0).randn(300, 6)

    class Rounding(nn.Linear):
        def forward(self, x):
            odd = (x[:, :1] == x[:, :1].max()) & (len(x) == 16)
            return super().forward(x) * (1 + 1e-6 * odd)

    assert opened(Rounding(6, 4).double(), rows).shapes.ladder == (4, 64, 256, 1024, 4096)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(2, 64, batch_first=True), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head((torch.softmax(x @ x.mT, dim=2) @ x).mean(dim=1))


@pytest.mark.parametrize(
    ("module", "shape", "widest"),
    [
        (nn.Linear(3000, 2000), (3000,), 3000),  # its weights do not count
        (nn.Linear(3, 2000), (3,), 2000),
        (Recurrent(), (60, 2), 60 * 64),
        (Attention(), (60, 2), 60 * 60),
        (torch.jit.script(nn.Sequential(nn.Linear(3, 70), nn.Linear(70, 4))), (3,), 70),
    ],
    ids=["linear", "wide output", "LSTM", "functional", "scripted"],
)
def test_a_network_is_as_wide_as_its_largest_tensor(opened, module, shape, widest):
    rows = np.random.RandomState(0).randn(20, *shape)
    found = opened(module, rows).widest
    assert widest <= found <= 4 * widest  # gates of the LSTM stand side by side


def test_shapes_are_those_that_memory_has_room_for(opened):
    class Crowded(nn.Linear):
        def forward(self, x):
            if len(x) > 1000:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    assert opened(Crowded(6, 4), X).shapes.ladder[-2:] == (128, 512)


# Whether it can be trained


class Cut(Body):
    """A classifier through which gradients go to nothing, to the head alone, or everywhere."""

    def __init__(self, to_body, to_head):
        super().__init__()
        self.norm = nn.BatchNorm1d(8).double()
        self.dropout = nn.Dropout()
        self.to_body = to_body
        self.to_head = to_head

    def forward(self, x):
        features = self.dropout(torch.relu(self.norm(self.body(x))))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.to_head):
            return self.head(features if self.to_body else features.detach())


def test_a_network_that_can_be_trained_passes_and_is_not_changed(opened):
    network = opened(Cut(to_body=True, to_head=True), X)
    before = copy.deepcopy(network.module.state_dict())
    generator = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainable(network, as_rows(X))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], t) for name, t in network.module.state_dict().items())
    assert all(p.grad is None for p in network.module.parameters())
    assert not network.module.training


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_without_a_gradient_are_refused(opened, frozen):
    network = opened(Cut(to_body=True, to_head=frozen), X)
    network.module.requires_grad_(not frozen)
    message = r"logits carry no gradient.*torch\.no_grad.*Unfreeze.*max_epochs=0"
    with pytest.raises(ValueError, match=message):
        check_trainable(network, as_rows(X))


def test_a_gradient_that_only_seems_to_pass_is_refused(opened):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(module, {"2"})
        network = opened(module, X.astype(np.float32))
    with pytest.raises(ValueError, match=r"quantized layers.*max_epochs=0"):
        check_trainable(network, as_rows(X.astype(np.float32)))


@pytest.mark.parametrize("frozen", [False, True])
def test_features_without_a_gradient_are_warned_of(opened, frozen):
    network = opened(Cut(to_body=frozen, to_head=True), X)
    if frozen:
        network.module.requires_grad_(False)
        network.module.head.requires_grad_(True)
    message = r"Only the head, 'head', can be trained.*Unfreeze the body.*sparsity_weight=0"
    with pytest.warns(PenaltyWithoutEffectWarning, match=message):
        check_trainable(network, as_rows(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainable(network, as_rows(X), penalized=False)


def test_a_part_in_inference_mode_is_explained(opened):
    class Inference(Body):
        def forward(self, x):
            with torch.inference_mode():
                features = self.features(x)
            return self.head(features)

    network = opened(Inference(), X)
    with pytest.raises(RuntimeError, match="Inference tensors") as raised:
        check_trainable(network, as_rows(X))
    assert "remove it, or pass max_epochs=0" in raised.value.__notes__[0]


class Otherwise(Body):
    """A classifier that returns something else in training mode, or passes over its head."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        logits = super().forward(x)
        return self.change(logits) if self.training else logits


@pytest.mark.parametrize(
    "change", [lambda z: -z, lambda z: torch.softmax(z, dim=1), lambda z: 2 * z + 1]
)
def test_other_logits_in_training_mode_are_refused_before_training(opened, change):
    network = opened(Otherwise(change), X)
    with pytest.raises(ValueError, match=r"In training mode .* its head, 'head',.*in both modes"):
        check_trainable(network, as_rows(X))
