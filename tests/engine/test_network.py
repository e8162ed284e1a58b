from __future__ import annotations

import copy
import functools
import pickle
import threading
import traceback
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from skood.engine.batches import Batcher
from skood.engine.network import (
    Network,
    copy_module,
    floating_dtype,
    logits_of,
    on_cpu,
)

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mlp(n_classes=4, bias=True, dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, n_classes, bias=bias),
    ).to(dtype)


class Body(nn.Module):
    """A classifier with a body and a head, to be varied."""

    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = head or nn.Linear(8, 4)
        self.double()

    def features(self, x):
        return torch.relu(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


def assert_head_gives_the_logits(network, rows):
    """head(features) equals the logits, which equal what the untouched module returns."""
    batch = network.batcher(rows, slice(0, len(rows)))
    with torch.no_grad():
        features, logits = network.features_and_logits(batch)
        torch.testing.assert_close(logits, logits_of(network.module(batch)), rtol=0, atol=0)
        torch.testing.assert_close(network.logits(batch), logits, rtol=0, atol=0)
        head = network.module.get_submodule(network.head)
        torch.testing.assert_close(head(features), logits, rtol=1e-6, atol=1e-6)
    assert features.ndim == 2
    assert logits.shape == (len(rows), network.n_logits)
    return features


def hooks_of(module):
    return [
        hook
        for part in module.modules()
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        for hook in hooks
    ]


# Finding the head


@pytest.mark.parametrize(
    ("make", "head", "width"),
    [
        (mlp, "4", 8),
        (functools.partial(mlp, bias=False), "4", 8),
        (functools.partial(mlp, dtype=torch.float32), "4", 8),
        (lambda: nn.Linear(6, 4), "", 6),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "3", 8),
    ],
)
def test_head_of_sequential_networks(opened, make, head, width):
    network = opened(make(), X)
    assert network.head == head
    assert assert_head_gives_the_logits(network, X).shape == (10, width)


def torchvision_vit():
    network = torchvision.models.vit_b_16(num_classes=7, image_size=32)
    # It starts with logits of zero, which every layer would give.
    nn.init.normal_(network.heads.head.weight)
    return network


@pytest.mark.parametrize(
    ("make", "head", "width"),
    [
        (lambda: torchvision.models.resnet18(num_classes=7), "fc", 512),
        (torchvision_vit, "heads.head", 768),
        (lambda: timm.create_model("resnet10t", num_classes=7), "fc", 512),
    ],
    ids=["torchvision resnet18", "torchvision vit_b_16", "timm resnet10t"],
)
def test_head_of_well_known_networks(opened, make, head, width):
    network = opened(make(), IMAGES)
    assert network.head == head
    assert network.n_logits == 7
    assert assert_head_gives_the_logits(network, IMAGES).shape == (8, width)


Logits = namedtuple("Logits", ["aux", "logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z, h: (z, h),
        lambda z, h: [z],
        lambda z, h: {"aux": h, "logits": z},
        lambda z, h: OrderedDict(logits=z),
        lambda z, h: SimpleNamespace(logits=z, aux=h),
        lambda z, h: Logits(h, z),
    ],
    ids=["tuple", "list", "dict", "OrderedDict", "object", "namedtuple"],
)
def test_networks_may_return_more_than_logits(opened, wrap):
    class Wrapped(Body):
        def forward(self, x):
            features = self.features(x)
            return wrap(self.head(features), features)

    network = opened(Wrapped(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_dropout_between_features_and_head_drops_in_training_only(opened):
    class Dropped(Body):
        def forward(self, x):
            return self.head(nn.functional.dropout(self.features(x), 0.5, self.training))

    network = opened(Dropped(), X)
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, network.module.features(torch.tensor(X)))
    network.train(True)
    dropped, logits = network.features_and_logits(torch.tensor(X))
    torch.testing.assert_close(network.module.head(dropped), logits)
    assert (dropped == 0).sum() > (features == 0).sum()


def test_unused_linear_layers_are_passed_over(opened):
    class Cluttered(Body):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(8, 4).double()
            self.another_head = nn.Linear(8, 4).double()

    assert opened(Cluttered(), X).head == "head"


def test_an_auxiliary_head_that_runs_later_is_passed_over(opened):
    class Auxiliary(Body):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(8, 4).double()

        def forward(self, x):
            features = self.features(x)
            logits = self.head(features)
            return logits, self.auxiliary(features)

    network = opened(Auxiliary(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_a_head_may_be_called_with_a_keyword(opened):
    class Keyword(Body):
        def forward(self, x):
            return self.head(input=self.features(x))

    network = opened(Keyword(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_of_two_layers_that_give_the_logits_the_last_is_the_head(opened):
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, bias=False)).double()
    nn.init.eye_(module[1].weight)
    assert opened(module, X).head == "1"


def test_one_layer_under_two_names_is_found_under_the_first(opened):
    class Shared(Body):
        def __init__(self):
            super().__init__()
            self.alias = self.head

        def forward(self, x):
            return self.alias(self.features(x))

    network = opened(Shared(), X)
    assert network.head == "head"
    assert_head_gives_the_logits(network, X)


def test_the_features_of_a_head_called_twice_are_those_of_its_last_call(opened):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6).double()

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    network = opened(Twice(), X)
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, torch.relu(network.module.layer(torch.tensor(X))))


class Cosine(nn.Module):
    """A head that is no linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, h):
        return nn.functional.normalize(h, dim=1) @ self.weight


def sequential_head():
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.mark.parametrize(("make", "width"), [(Cosine, 8), (sequential_head, 8)])
def test_a_head_that_is_not_linear_can_be_named(opened, make, width):
    network = opened(Body(make()), X, head="head")
    assert network.head == "head"
    features = assert_head_gives_the_logits(network, X)
    torch.testing.assert_close(features, network.module.features(torch.tensor(X)))


def test_without_a_name_the_last_linear_layer_of_a_classifier_is_the_head(opened):
    network = opened(Body(sequential_head()), X)
    assert network.head == "head.2"
    assert assert_head_gives_the_logits(network, X).shape == (10, 5)


def test_a_convolutional_head_can_be_named_and_its_features_are_flat(opened):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(self.body(x)).flatten(1)

    network = opened(Convolutional(), IMAGES, head="head")
    batch = network.batcher(IMAGES, slice(0, 8))
    with torch.no_grad():
        features, logits = network.features_and_logits(batch)
        torch.testing.assert_close(features, network.module.body(batch).flatten(1))
        torch.testing.assert_close(logits, network.module(batch))


# Where there is no head


class AfterHead(Body):
    """A classifier with something after its last layer."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        return self.after(self.head(self.features(x)))


def subtract_in_place(logits):
    logits -= logits.logsumexp(dim=1, keepdim=True)
    return logits


@pytest.mark.parametrize(
    "after",
    [
        functools.partial(torch.softmax, dim=1),
        functools.partial(torch.log_softmax, dim=1),
        lambda logits: logits / 2,
        lambda logits: logits[:, :3],
        # Changes what the head returned as well.
        subtract_in_place,
    ],
    ids=["softmax", "log-softmax", "scale", "columns", "in place"],
)
def test_anything_after_the_last_layer_is_refused_with_what_to_do(opened, after):
    message = (
        r"No classification head found: the output, of shape \(8, [34]\), is not the output of "
        r"a linear layer .*body gives \(8, 8\), head gives \(8, 4\).*softmax .*"
        r'return the logits themselves.*Pass head="NAME"'
    )
    with pytest.raises(ValueError, match=message):
        opened(AfterHead(after), X)


def test_a_network_without_linear_layers_is_refused_with_what_to_do(opened):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    message = r'calls no torch\.nn\.Linear \(linear layers registered: none\)\. Pass head="NAME"'
    with pytest.raises(ValueError, match=message):
        opened(network, IMAGES)


def test_linear_layers_that_are_never_called_are_named(opened):
    class Functional(Body):
        def forward(self, x):
            hidden = torch.relu(nn.functional.linear(x, self.body.weight))
            return nn.functional.linear(hidden, self.head.weight)

    with pytest.raises(ValueError, match=r"\(linear layers registered: body, head\)"):
        opened(Functional(), X)


def test_a_head_whose_first_of_two_calls_gives_the_logits_is_refused(opened):
    class First(Body):
        def forward(self, x):
            return self.head(self.features(x)), self.head(self.features(-x))

    with pytest.raises(ValueError, match="No classification head found"):
        opened(First(), X)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc", r"head='fc' names no submodule of Body; its linear layers are body, head"),
        ("", r"head='' names no submodule of Body"),
        ("body", r"head='body' is not the head: its output, \(8, 8\), is not the logits \(8, 4\)"),
        ("unused", r"head='unused' is not the head: the forward pass never calls it"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(opened, name, message):
    module = Body()
    module.unused = nn.Identity()
    with pytest.raises(ValueError, match=message):
        opened(module, X, head=name)


def test_of_many_linear_layers_the_last_are_named(opened):
    module = nn.Sequential(*(nn.Linear(6, 6) for _ in range(9)))
    with pytest.raises(ValueError, match=r"layers are \.\.\., 4, 5, 6, 7, 8\. Pass the name"):
        opened(module, X, head="head")


# What a network may return


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (None, "a NoneType"),
        (np.zeros((3, 2)), "a ndarray"),
        ((), "a tuple of nothing"),
        (("a", torch.zeros(3, 2)), "a tuple of str, Tensor"),
        ({"scores": torch.zeros(3, 2)}, r"a dict with the keys \['scores'\]"),
    ],
)
def test_an_output_without_logits_is_refused(output, shown):
    with pytest.raises(TypeError, match=rf"The module returned {shown}; expected logits: a tensor"):
        logits_of(output)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 2), ()])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"logits of shape .*; expected \(n, K\).*K >= 2"):
        logits_of(torch.zeros(shape))


@pytest.mark.parametrize("columns", [3, 12])
def test_a_network_must_give_one_row_of_logits_a_row(opened, columns):
    class Regrouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(columns, 4).double()

        def forward(self, x):
            return self.head(x.reshape(-1, columns))

    with pytest.raises(ValueError, match="rows"):
        opened(Regrouped(), X)


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
@pytest.mark.parametrize("single_rows", [False, True])
def test_few_images_run_one_by_one_where_that_is_allowed(opened, rows, single_rows):
    module = nn.Sequential(nn.Flatten(), nn.Linear(rows[0].size, 4))
    network = opened(module, rows, single_rows=single_rows)
    assert (network.few_rows > 0) == (single_rows and rows.ndim > 2)


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
    network = opened(make(), rows, precision="bfloat16", single_rows=True)
    loaded = round_trip(network)
    for name in ("head", "precision", "n_logits", "few_rows", "compiled", "batcher"):
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
