from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from modules import Body, assert_head_gives_the_logits, mlp
from torch import nn
from torch.nn import functional as F

from skood.engine.batches import Batcher
from skood.engine.network import (
    Network,
    affine_head,
    check_trainable,
    copy_module,
    floating_dtype,
    on_cpu,
)

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def hooks_of(module):
    return [
        hook
        for part in module.modules()
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        for hook in hooks
    ]


# Hooks, errors and threads


def test_no_hook_is_left_behind(opened):
    network = opened(mlp(), X)
    assert hooks_of(network.module) == []
    network.features_and_logits(torch.tensor(X))
    assert hooks_of(network.module) == []
    with pytest.raises(RuntimeError):
        network.features_and_logits(torch.zeros(3, 99))
    assert hooks_of(network.module) == []


def test_hooks_of_the_user_keep_running(opened):
    module = mlp()
    module[4].register_forward_hook(lambda layer, args, output: output * 2)
    plain = copy.deepcopy(module).eval()
    network = opened(module, X)
    batch = torch.tensor(X)
    torch.testing.assert_close(network.features_and_logits(batch)[1], plain(batch))
    assert len(hooks_of(network.module)) == 1


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
            "channels last, (n, h, w, c), where networks take (n, c, h, w): "
            "preprocess=skood.networks.NormalizeImages(mean, std)",
        ),
        (convolution(1), np.ones((8, 12, 12)), "X[:, None] of gray images (n, h, w)"),
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


def test_the_note_gives_no_hint_that_does_not_apply(opened):
    with pytest.raises(RuntimeError, match="multiplied") as raised:
        opened(mlp(), np.ones((8, 7)))
    (note,) = raised.value.__notes__
    assert note == (
        "Raised by the module given, Sequential, on a batch of shape (8, 7) and dtype "
        "torch.float64. If it expects another shape, dtype or layout, pass a function that makes "
        "it as preprocess=."
    )


def test_a_network_for_batches_of_one_size_is_explained(opened):
    with pytest.raises(RuntimeError, match="size") as raised:
        opened(Inner(lambda x: x + torch.zeros(8, 1)), X)
    (note,) = raised.value.__notes__
    assert "Inner, took a batch of 8 rows, but not one of 12" in note
    assert "x.shape[0]" in note


def test_other_logits_in_training_mode_are_refused(opened):
    class Twofold(Body):
        def forward(self, x):
            features = self.features(x)
            return (features, self.head(features)) if self.training else self.head(features)

    network = opened(Twofold(), X)
    network.train(True)
    message = r"\(n, 4\) in evaluation mode, but \(10, 8\) in training mode.*the same in both"
    with pytest.raises(ValueError, match=message):
        network.features_and_logits(torch.tensor(X))


def test_a_head_that_training_mode_passes_over_is_refused(opened):
    class Bypass(Body):
        def forward(self, x):
            head = self.head.forward if self.training else self.head
            return head(self.features(x))

    network = opened(Bypass(), X)
    network.train(True)
    with pytest.raises(RuntimeError, match=r"In training mode .* does not call its head, 'head'"):
        network.features_and_logits(torch.tensor(X))


class Meeting(nn.Module):
    """Lets threads go on only when all of them are inside."""

    barrier = None

    def forward(self, x):
        if self.barrier is not None:
            self.barrier.wait(timeout=30)
        return x


def test_eight_threads_at_once_get_the_features_of_their_own_batches(opened, monkeypatch):
    rows = np.random.RandomState(1).randn(80, 6)
    # All are inside before any calls the head, and all have called it before any is outside.
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Meeting(), nn.Linear(8, 4), Meeting())
    network = opened(module.double(), rows)
    assert network.head == "3"
    batches = torch.tensor(rows).split(10)
    expected = [network.features_and_logits(batch) for batch in batches]
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(8))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(network.features_and_logits, batches))
            for (features, logits), (own_features, own_logits) in zip(found, expected, strict=True):
                assert torch.equal(features, own_features)
                assert torch.equal(logits, own_logits)
    assert hooks_of(network.module) == []


# Opening and copying


def test_opening_puts_the_network_in_evaluation_mode(opened):
    network = opened(mlp().train(), X)
    assert not any(part.training for part in network.module.modules())
    network.train(True)
    assert all(part.training for part in network.module.modules())


@pytest.mark.parametrize("rows", [X, IMAGES])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("off", [1e-7, 1e-3])
def test_an_image_runs_alone_where_that_is_allowed_and_agrees(opened, rows, apart, off):
    class Alone(nn.Flatten):
        def forward(self, x):
            return super().forward(x) * (1 + off * (len(x) == 1))

    module = nn.Sequential(Alone(), nn.Linear(rows[0].size, 4))
    network = opened(module, rows, few_rows_apart=apart)
    assert network.few_rows == (apart and rows.ndim > 2 and off < 1e-5)


def test_only_shapes_that_round_alike_are_taken(opened):
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-6 * (len(x) < 60))

    network = opened(Rounding(6, 4), X)
    assert network.shapes == (64, 256, 1024, 4096)
    assert opened(nn.Linear(6, 4), X, compiled=True).shapes == (4096,)


def test_a_shape_that_rounds_one_row_otherwise_is_left_out(opened):
    rows = np.random.RandomState(0).randn(300, 6)

    class Rounding(nn.Linear):
        def forward(self, x):
            odd = (x[:, :1] == x[:, :1].max()) & (len(x) == 16)
            return super().forward(x) * (1 + 1e-6 * odd)

    assert opened(Rounding(6, 4).double(), rows).shapes == (4, 64, 256, 1024, 4096)


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


def test_shapes_are_chosen_anew_on_another_kind_of_device(opened):
    network = opened(mlp(), X)
    state = network.__getstate__()
    gpu = dataclasses.replace(state["batcher"], device=torch.device("cuda", 7))
    moved = object.__new__(type(network))
    with pytest.warns(UserWarning, match="not available here"):
        moved.__setstate__(state | {"batcher": gpu, "shapes": (16, 65536), "few_rows": 16})
    assert (moved.shapes, moved.few_rows) == ((4096,), 0)


def test_shapes_are_those_that_memory_has_room_for(opened):
    class Crowded(nn.Linear):
        def forward(self, x):
            if len(x) > 1000:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    assert opened(Crowded(6, 4), X).shapes[-2:] == (128, 512)


def test_a_copy_shares_nothing_and_changes_nothing():
    module = mlp().train()
    module[0].weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    copied = copy_module(module)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.fill_(7)
    copied.eval()
    assert module.training
    assert not copied[0].weight.requires_grad
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda module: torch.compile(nn.DataParallel(module))],
    ids=["DataParallel", "compile", "both"],
)
def test_wrappers_are_taken_off(wrap):
    module = mlp()
    copied = copy_module(wrap(module))
    assert type(copied) is nn.Sequential
    assert copied is not module
    assert [name for name, _ in copied.named_parameters()] == [
        name for name, _ in module.named_parameters()
    ]


def test_a_network_with_a_submodule_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 4)

        def forward(self, x):
            return self.module(x)

    assert type(copy_module(Holder())) is Holder


def test_a_module_that_cannot_be_copied_is_refused_with_the_cause():
    module = mlp()
    module.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"\(Sequential\) cannot be copied: .*lock"):
        copy_module(module)


def test_parts_that_were_compiled_are_copied_plain():
    module = nn.Sequential(torch.compile(mlp(), backend="eager"), nn.Identity())
    module.compile(backend="eager")
    copied = copy_module(module)
    assert [type(part) for part in copied] == [nn.Sequential, nn.Identity]
    assert copied[0][0].weight is not module[0]._orig_mod[0].weight
    assert copied._compiled_call_impl is None
    assert "_orig_mod" in module[0]._modules


@pytest.mark.parametrize(("part", "name"), [("", "the module"), ("body", "body")])
def test_a_forward_that_copies_would_share_is_refused(part, name):
    module = Body()
    owner = module.get_submodule(part)
    owner.forward = torch.compile(owner.forward, backend="eager")
    with pytest.raises(TypeError, match=rf"forward of '{name}' was replaced.*module\.compile\(\)"):
        copy_module(module)


def test_a_module_on_the_meta_device_is_refused_with_what_to_do(opened):
    with pytest.raises(ValueError, match=r"'body\.weight' is on the meta device.*to_empty"):
        opened(Body().to("meta"), X)


def test_stored_activations_are_copied_by_value():
    module = mlp()
    module.activations = module(torch.tensor(X))
    copied = copy_module(module)
    assert torch.equal(copied.activations, module.activations)
    assert copied.activations.data_ptr() != module.activations.data_ptr()
    assert not copied.activations.requires_grad


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


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(X.shape[1], 3)

    def forward(self, x):
        return self.head(input=x)


def test_a_head_called_by_keyword_is_found(opened):
    network = opened(ByKeyword(), X.astype(np.float32))
    features, _ = network.features_and_logits(torch.tensor(X[:5], dtype=torch.float32))
    assert network.head == "head"
    assert torch.equal(features, torch.tensor(X[:5], dtype=torch.float32))


def test_lazy_layers_take_shape_before_anything_else(opened):
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    assert opened(module, np.zeros((10, 2, 6, 6), dtype=np.float32)).n_logits == 3


def test_copies_made_while_features_are_captured_carry_no_hooks(opened):
    network = opened(mlp(), X)
    batch = torch.tensor(X)
    stop = threading.Event()

    def capture():
        while not stop.is_set():
            network.features_and_logits(batch)

    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        copies = [pickle.loads(pickle.dumps(network)) for _ in range(30)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for copied in copies:
        assert not any(part._forward_hooks for part in copied.module.modules())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2).double(), torch.float64),
        (nn.Linear(2, 2).bfloat16(), torch.bfloat16),
        (nn.BatchNorm1d(2, affine=False).half(), torch.float16),
        (nn.Identity(), torch.float32),
    ],
)
def test_the_dtype_of_a_network_is_that_of_its_first_floating_tensor(module, expected):
    assert floating_dtype(module) == expected


def test_a_module_on_the_cpu_is_itself():
    module = mlp()
    assert on_cpu(module) is module


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
        check_trainable(network, X, np.arange(10))
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
        check_trainable(network, X, np.arange(10))


def test_a_gradient_that_only_seems_to_pass_is_refused(opened):
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(module, {"2"})
        network = opened(module, X.astype(np.float32))
    with pytest.raises(ValueError, match=r"quantized layers.*max_epochs=0"):
        check_trainable(network, X.astype(np.float32), np.arange(10))


@pytest.mark.parametrize("frozen", [False, True])
def test_features_without_a_gradient_are_warned_of(opened, frozen):
    network = opened(Cut(to_body=frozen, to_head=True), X)
    if frozen:
        network.module.requires_grad_(False)
        network.module.head.requires_grad_(True)
    message = r"Only the head, 'head', can be trained.*Unfreeze the body.*sparsity_weight=0"
    with pytest.warns(UserWarning, match=message):
        check_trainable(network, X, np.arange(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trainable(network, X, np.arange(10), penalized=False)


def test_a_part_in_inference_mode_is_explained(opened):
    class Inference(Body):
        def forward(self, x):
            with torch.inference_mode():
                features = self.features(x)
            return self.head(features)

    network = opened(Inference(), X)
    with pytest.raises(RuntimeError, match="Inference tensors") as raised:
        check_trainable(network, X, np.arange(10))
    assert "remove it, or pass max_epochs=0" in raised.value.__notes__[0]


# What an affine head multiplies by, and adds


class Mapped(nn.Module):
    """A classifier whose features have a shape of their own."""

    def __init__(self, head, width=8, shape=None):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.ReLU()), head
        self.shape = (width,) if shape is None else shape

    def forward(self, x):
        return self.head(self.body(x).reshape(len(x), *self.shape)).flatten(1)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def layer_of(head):
    """The layer with the weights, in float64."""
    layer = [part for part in head.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return layer.weight.detach().flatten(1).double(), bias.detach().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("head", "width", "shape"),
    [
        (nn.Linear(8, 4), 8, None),
        (nn.Linear(8, 4, bias=False), 8, None),
        (nn.Sequential(nn.Dropout(0.9), nn.Linear(8, 4)), 8, None),
        (nn.Conv2d(8, 4, 1), 8, (8, 1, 1)),
        (nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten()), 8, (8, 1, 1)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), 12, (3, 2, 2)),
        (nn.Linear(1, 2), 1, None),
        (nn.Linear(700, 4), 700, None),
        (nn.Linear(512, 4), 512, None),
    ],
    ids=str,
)
def test_an_affine_head_is_read_from_what_it_returns(opened, head, width, shape, dtype):
    network = opened(Mapped(head, width, shape).to(dtype), X, head="head")
    weight, bias = affine_head(network, X, np.arange(10))
    for found, expected in zip((weight, bias), layer_of(network.module.head), strict=True):
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert not found.is_inference()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_affine_head_in_half_precision_is_read_to_its_precision(opened, dtype):
    module = Mapped(nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        module.head.weight.mul_(0.1)
        module.head.bias.fill_(3)  # beside which the weights are small
    network = opened(module, X)
    weight, bias = affine_head(network, X, np.arange(10))
    expected, _ = layer_of(network.module.head)
    error = (weight - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    assert bias.tolist() == [3] * 4


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(8, 4), nn.Tanh()),
        Cosine(8, 4),
    ],
    ids=["mlp", "tanh", "cosine"],
)
def test_a_head_that_is_not_affine_is_refused(opened, head):
    network = opened(Mapped(head), X, head="head")
    with pytest.raises(ValueError, match=r"head, 'head' \(.*\), is not affine .* another score"):
        affine_head(network, X, np.arange(10))


def test_reading_a_head_leaves_no_hook_and_no_gradient(opened):
    network = opened(mlp(), X)
    affine_head(network, X, np.arange(10))
    assert hooks_of(network.module) == []
    assert all(parameter.grad is None for parameter in network.module.parameters())
    assert not network.module.training


# Pickling and compiling


@pytest.fixture
def eager_compiler(monkeypatch):
    """The compiler's capture without its code generator, which needs a C++ compiler."""
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    yield
    torch.compiler.reset()


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize(
    "round_trip",
    [lambda network: pickle.loads(pickle.dumps(network)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
@pytest.mark.parametrize(("make", "rows"), [(mlp, X), (convolutional, IMAGES)])
def test_a_network_travels_bitwise(opened, make, rows, round_trip):
    network = opened(make(), rows, precision="bfloat16", few_rows_apart=True)
    loaded = round_trip(network)
    for name in ("head", "precision", "n_logits", "shapes", "few_rows", "compiled", "batcher"):
        assert getattr(loaded, name) == getattr(network, name)
    batch = network.batcher(rows, slice(0, 8))
    for found, expected in zip(
        loaded.features_and_logits(batch), network.features_and_logits(batch), strict=True
    ):
        assert torch.equal(found, expected)
    with torch.no_grad():
        next(loaded.module.parameters()).zero_()
    assert next(network.module.parameters()).any()


def test_a_network_from_an_absent_device_computes_on_the_cpu(opened):
    network = opened(mlp(), X)
    state = network.__getstate__()
    state["batcher"] = Batcher(torch.device("cuda:99"), torch.float64, None)
    loaded = Network.__new__(Network)
    with pytest.warns(UserWarning, match="fitted on cuda:99"):
        loaded.__setstate__(state)
    assert loaded.device == torch.device("cpu")
    assert_head_gives_the_logits(loaded, X)


@pytest.mark.usefixtures("eager_compiler")
def test_a_compiled_network_agrees_with_the_plain_one(opened):
    module = mlp()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = plain.batcher(X, slice(0, 10))
    for network in (compiled, pickle.loads(pickle.dumps(compiled))):
        with torch.inference_mode():
            torch.testing.assert_close(
                network.features_and_logits(batch),
                plain.features_and_logits(batch),
                rtol=1e-5,
                atol=1e-8,
            )
            torch.testing.assert_close(network.logits(batch), plain.logits(batch))
        assert hooks_of(network.module) == []


@pytest.mark.usefixtures("eager_compiler")
def test_a_compiled_network_trains_the_weights_that_it_shows(opened):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    plain, compiled = opened(module, X), opened(module, X, compiled=True)
    batch = torch.tensor(X)
    for network in (plain, compiled):
        network.train(True)
        features, logits = network.features_and_logits(batch)
        (features.sum() + logits.square().sum()).backward()
        network.train(False)
    for own, expected in zip(compiled.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-5, atol=1e-8)
    for name, expected in plain.module.named_buffers():
        torch.testing.assert_close(compiled.module.get_buffer(name), expected)
    with torch.no_grad():
        for network in (plain, compiled):
            network.module[3].weight.mul_(2)
            network.module[3].bias.add_(1)
        torch.testing.assert_close(compiled.logits(batch), plain.logits(batch))
