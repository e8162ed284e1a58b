from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from modules import Body, assert_head_gives_the_logits, hooks_of, mlp
from torch import nn

from skood.engine.batches import Batcher
from skood.engine.network import (
    Network,
    floating_dtype,
    held_still,
    names_before_the_last,
    trainable,
)
from skood.engine.shapes import Shapes
from skood.exceptions import DeviceWarning
from skood.rows import as_rows

X = np.random.RandomState(0).randn(10, 6)
IMAGES = np.random.RandomState(0).rand(8, 3, 32, 32).astype(np.float32)


# Hooks and threads


def test_no_hook_is_left_behind(opened):
    network = opened(mlp(), X)
    assert hooks_of(network.public) == []
    network.seen(torch.tensor(X))[:2]
    assert hooks_of(network.public) == []
    with pytest.raises(RuntimeError):
        network.seen(torch.zeros(3, 99))[:2]
    assert hooks_of(network.public) == []


def test_hooks_of_the_user_keep_running(opened):
    module = mlp()
    module[4].register_forward_hook(lambda layer, args, output: output * 2)
    plain = copy.deepcopy(module).eval()
    network = opened(module, X)
    batch = torch.tensor(X)
    torch.testing.assert_close(network.seen(batch)[1], plain(batch))
    assert len(hooks_of(network.public)) == 1


def test_other_logits_in_training_mode_are_refused(opened):
    class Twofold(Body):
        def forward(self, x):
            features = self.features(x)
            return (features, self.head(features)) if self.training else self.head(features)

    network = opened(Twofold(), X)
    network.train(True)
    message = r"\(n, 4\) in evaluation mode, but \(10, 8\) in training mode.*the same in both"
    with pytest.raises(ValueError, match=message):
        network.seen(torch.tensor(X))[:2]


def test_a_head_that_training_mode_passes_over_is_refused(opened):
    class Bypass(Body):
        def forward(self, x):
            head = self.head.forward if self.training else self.head
            return head(self.features(x))

    network = opened(Bypass(), X)
    network.train(True)
    with pytest.raises(RuntimeError, match=r"In training mode .* does not call its head, 'head'"):
        network.seen(torch.tensor(X))[:2]


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
    expected = [network.seen(batch)[:2] for batch in batches]
    monkeypatch.setattr(Meeting, "barrier", threading.Barrier(8))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(network.seen, batches))
            for (features, logits, _), (own_features, own_logits) in zip(
                found, expected, strict=True
            ):
                assert torch.equal(features, own_features)
                assert torch.equal(logits, own_logits)
    assert hooks_of(network.public) == []


def test_threads_that_start_and_end_forwards_at_any_time_do_not_meet(opened):
    network = opened(mlp(), X)
    batch = torch.tensor(X)
    with torch.no_grad():
        expected = network.seen(batch)[:2]

        def same(_):
            with torch.no_grad():
                found = network.seen(batch)[:2]
            return all(map(torch.equal, found, expected))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(same, range(2000)))


def test_copies_made_while_features_are_captured_carry_no_hooks(opened):
    network = opened(mlp(), X)
    batch = torch.tensor(X)
    stop = threading.Event()

    def capture():
        while not stop.is_set():
            network.seen(batch)[:2]

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
        assert not any(part._forward_hooks for part in copied.public.modules())


# What users see of it


class Moves(nn.Module):
    """Puts a new tensor in the place of its buffer, and keeps what it computes, in each step."""

    def __init__(self):
        super().__init__()
        self.head, self.kept = nn.Linear(6, 4), []
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(dim=0)
            self.kept.append(self.head(x))
        return self.head(x - self.mean)


def test_what_users_do_to_the_module_that_they_see_does_not_reach_the_one_that_runs(opened):
    network = opened(mlp(), X)
    batch = torch.tensor(X)
    expected = network.seen(batch)[:2]
    assert network.public is network.public
    network.public.train()
    network.public[0].register_forward_hook(lambda *args: args[-1] * 100)
    network.public[4] = nn.Identity()
    for own, other in zip(network.seen(batch)[:2], expected, strict=True):
        assert torch.equal(own, other)
    with torch.no_grad():
        network.public[0].weight.zero_()  # the tensors are the same
    assert not torch.equal(network.logits(batch), expected[1])


def test_what_training_changes_is_seen_and_travels(opened):
    network = opened(Moves().double(), X)
    before, batch = network.public, torch.tensor(X)
    network.train(True)
    network.logits(batch)
    assert network.public is not before
    network.train(False)
    assert hooks_of(network.public) == []
    assert not any(part.training for part in network.public.modules())
    expected = network.logits(batch)
    for module in (network.public, pickle.loads(pickle.dumps(network)).public):
        assert module.mean.any()
        assert torch.equal(module(batch), expected)


def test_a_copy_of_a_network_that_keeps_what_it_computed_in_training(opened):
    network = opened(Moves().double(), X)
    network.train(True)
    network.logits(torch.tensor(X))
    twin = network.uncompiled_copy()
    network.train(False)
    batch = torch.tensor(X)
    assert torch.equal(twin.logits(batch), network.logits(batch))
    assert twin.public.mean is not network.public.mean


class Wakes(nn.Dropout):
    """Comes in training mode from every copy."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.train()


@pytest.mark.parametrize(
    "part", [Wakes(), torch.fx.symbolic_trace(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(8)))]
)
def test_copies_and_pickles_are_in_evaluation_mode(opened, part):
    module = nn.Sequential(nn.Linear(6, 8), part, nn.Linear(8, 4)).double()
    network, batch = opened(module, X), torch.tensor(X)
    expected = network.logits(batch)
    for _ in range(2):
        for twin in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
            assert not any(part.training for part in twin.public.modules())
            assert torch.equal(twin.logits(batch), expected)
        network = twin


def test_a_part_that_others_put_in_training_mode_is_put_back(opened):
    class Shared(nn.Dropout):
        def __deepcopy__(self, memo):
            return self

    part = Shared()
    network = opened(nn.Sequential(nn.Linear(6, 8), part, nn.Linear(8, 4)), X)
    part.train()
    network.evaluate()
    assert not part.training


# What is known of a network


def test_a_network_is_described_in_a_line(opened):
    network = opened(convolutional(), IMAGES, precision="bfloat16")
    ladder = network.shapes.ladder
    assert network.describe() == (
        "head '5', 4 logits, device cpu, training in bfloat16, scoring in bfloat16, layout "
        f"channels_last, rows of a scoring forward {', '.join(map(str, ladder))}, "
        "batch-norms folded 1"
    )
    assert network.execution == {
        "layout": "channels_last",
        "scoring_rows": ladder,
        "compiled": False,
        "cuda_graphs": False,
        "folded": 1,
    }


def test_a_shape_without_memory_is_given_up(opened):
    network = opened(mlp(), X)
    network.shapes = Shapes((4, 16, 64), small=1)
    network.without_shape(16)
    assert network.shapes == Shapes((4,), small=1)
    assert network.execution["scoring_rows"] == (1, 4)


def test_another_module_of_the_same_make_may_be_adopted(opened):
    network, other = opened(mlp(), X), opened(mlp(), X)
    network.adopt(other.module)
    batch = torch.tensor(X)
    assert torch.equal(network.logits(batch), other.logits(batch))


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


def test_only_parameters_that_change_are_trainable():
    module = mlp()
    module[0].requires_grad_(False)
    assert [id(p) for p in trainable(module)] == [
        id(p) for name, p in module.named_parameters() if not name.startswith("0.")
    ]


# Pickling


BATCH = torch.zeros(2, 4)


def layered():
    """Layers of 16, 64 and 256 weights, and a head of 1,024."""
    sizes = (4, 4, 16, 16, 64)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("share", "still"),
    [
        (1.0, []),
        (0.99, []),
        (0.9, ["0"]),
        (0.77, ["0"]),
        (0.76, ["0", "1"]),
        (0.01, ["0", "1"]),
    ],
)
def test_the_last_layers_hold_a_share_of_the_weights_before_the_head(opened, share, still):
    network = opened(layered(), np.zeros((2, 4)))
    assert names_before_the_last(network, BATCH, share) == [f"{name}.weight" for name in still]


def test_a_head_that_is_registered_first_is_not_among_the_layers_before_the_last(opened):
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 3), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))

        def forward(self, x):
            return self.head(self.body(x))

    network = opened(HeadFirst(), np.zeros((2, 4)))
    assert names_before_the_last(network, BATCH, 0.5) == ["body.0.weight", "body.0.bias"]


@pytest.mark.parametrize("calls_it", [False, True])
def test_what_the_features_do_not_depend_on_does_not_count(opened, calls_it):
    """Such as a decoder, whether its output is thrown away or is not asked for."""

    class WithDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), nn.Linear(8, 3)
            self.decoder = nn.Linear(8, 999)

        def forward(self, x):
            features = self.body(x)
            if calls_it:
                self.decoder(features)
            return self.head(features)

    network = opened(WithDecoder(), np.zeros((2, 4)))
    still = names_before_the_last(network, BATCH, 0.5)
    assert still == ["body.0.weight", "body.0.bias"]
    assert all(p.grad is None for p in network.module.parameters())


def test_all_counts_where_the_gradient_is_cut_in_evaluation_mode(opened):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), nn.Linear(8, 3)

        def forward(self, x):
            with torch.set_grad_enabled(self.training):
                features = self.body(x)
            return self.head(features)

    network = opened(Cut(), np.zeros((2, 4)))
    assert names_before_the_last(network, BATCH, 0.5) == ["body.0.weight", "body.0.bias"]


def test_what_the_user_has_frozen_does_not_count(opened):
    module = layered()
    module[2].requires_grad_(False)
    network = opened(module, np.zeros((2, 4)))
    assert names_before_the_last(network, BATCH, 0.7) == ["0.weight"]


def test_parameters_are_held_still_inside_alone(opened):
    module = layered()
    module[2].requires_grad_(False)
    before = [p.requires_grad for p in module.parameters()]
    try:
        with held_still(module, ["0.weight"]):
            assert [p.requires_grad for p in module.parameters()] == [False, True, False, True]
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [p.requires_grad for p in module.parameters()] == before


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize(("make", "rows"), [(mlp, X), (convolutional, IMAGES), (Moves, X)])
def test_all_pickles_of_a_network_are_the_same(opened, make, rows):
    network = opened(make().float(), rows)
    network.train(True)
    network.logits(network.batcher(as_rows(rows)))
    network.train(False)
    first = pickle.dumps(network)
    network.seen(network.batcher(as_rows(rows)))[:2]
    assert pickle.dumps(network) == first
    loaded = pickle.loads(first)
    again = pickle.dumps(loaded)
    loaded.seen(loaded.batcher(as_rows(rows)))[:2]
    assert pickle.dumps(loaded) == again


@pytest.mark.parametrize(
    "round_trip",
    [lambda network: pickle.loads(pickle.dumps(network)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
@pytest.mark.parametrize(("make", "rows"), [(mlp, X), (convolutional, IMAGES)])
def test_a_network_travels_bitwise(opened, make, rows, round_trip):
    network = opened(make(), rows, precision="bfloat16", small_shape=True)
    loaded = round_trip(network)
    for name in ("head", "precision", "n_logits", "shapes", "compiled", "batcher"):
        assert getattr(loaded, name) == getattr(network, name)
    batch = network.batcher(as_rows(rows), slice(0, 8))
    for found, expected in zip(loaded.seen(batch)[:2], network.seen(batch)[:2], strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        next(loaded.module.parameters()).zero_()
    assert next(network.module.parameters()).any()


def test_a_network_from_an_absent_device_computes_on_the_cpu(opened):
    network = opened(mlp(), X)
    state = network.__getstate__()
    state["batcher"] = Batcher(torch.device("cuda:99"), torch.float64, None)
    loaded = Network.__new__(Network)
    with pytest.warns(DeviceWarning, match="fitted on cuda:99"):
        loaded.__setstate__(state)
    assert loaded.device == torch.device("cpu")
    assert_head_gives_the_logits(loaded, X)


def test_shapes_are_chosen_anew_on_another_kind_of_device(opened):
    network = opened(mlp(), X)
    state = network.__getstate__()
    gpu = dataclasses.replace(state["batcher"], device=torch.device("cuda", 7))
    moved = object.__new__(type(network))
    with pytest.warns(DeviceWarning, match="not available here"):
        moved.__setstate__(state | {"batcher": gpu, "shapes": Shapes((16, 65536), small=16)})
    assert moved.shapes == Shapes((4096,))
