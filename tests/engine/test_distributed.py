from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from torch import distributed, nn

from skood.engine.batches import Batcher
from skood.engine.distributed import ALONE, Ranks, joined_ranks
from skood.engine.objective import (
    Counts,
    Objective,
    Term,
    fine_tuning_terms,
    pretraining_terms,
)
from skood.engine.opening import open_network
from skood.engine.training import Recipe, Training, TrainingData
from skood.exceptions import LostRankError
from skood.penalties import l1_over_l2
from skood.rows import as_rows

N_ROWS = 7


def ranks_here():
    with joined_ranks() as ranks:
        return ranks


def rows_of(shape, seed=0):
    random = np.random.RandomState(seed)
    return torch.from_numpy(3 + 2 * random.randn(*shape))


# Without a group


def test_a_process_without_a_group_is_alone():
    assert ranks_here() == ALONE == Ranks(0, 1)
    assert ALONE.first


def test_alone_nothing_is_copied_or_sent():
    rows = np.arange(5)
    facts = {"X": "anything"}
    assert ALONE.share(rows) is rows
    assert ALONE.joined(rows) is rows
    assert ALONE.from_first(facts) is facts
    assert ALONE.gather(facts) == [facts]
    ALONE.agree(facts)
    with ALONE.together():
        pass
    with pytest.raises(ZeroDivisionError), ALONE.together():
        raise ZeroDivisionError
    ALONE.share_buffers(nn.BatchNorm1d(2))
    assert not distributed.is_initialized()


def test_variables_of_another_launcher_start_nothing(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_here() == ALONE


def test_one_process_of_torchrun_is_alone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_here() == ALONE


def test_the_child_of_a_rank_is_alone(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "torchrun's")
    assert ranks_here() == ALONE


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_all_rows_in_their_order(n_rows, size):
    rows = np.arange(n_rows)
    shares = [Ranks(rank, size).share(rows) for rank in range(size)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert np.ptp([len(share) for share in shares]) <= 1


def test_an_error_of_the_users_stays_what_it_is():
    with pytest.raises(RuntimeError, match="mine") as raised, joined_ranks():
        raise RuntimeError("mine")
    assert type(raised.value) is RuntimeError


# In a group


def what_ranks_share():
    ranks = ranks_here()
    module = nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.tensor([ranks.rank == 0]))
    module.running_mean.fill_(ranks.rank)
    ranks.share_buffers(module)
    return {
        "ranks": ranks,
        "gathered": ranks.gather(ranks.rank),
        "from_first": ranks.from_first(f"of {ranks.rank}"),
        "joined": ranks.joined(ranks.share(np.arange(N_ROWS))).tolist(),
        "buffers": (module.running_mean.tolist(), module.mask.tolist()),
    }


def test_what_ranks_share(group):
    first, second = group(what_ranks_share)
    assert (first.pop("ranks"), second.pop("ranks")) == (Ranks(0, 2), Ranks(1, 2))
    expected = {
        "gathered": [0, 1],
        "from_first": "of 0",
        "joined": list(range(N_ROWS)),
        "buffers": ([0, 0], [True]),
    }
    assert first == second == expected


def disagreement():
    ranks = ranks_here()
    ranks.agree({"X": "same", "y": f"labels of {ranks.rank}"})


def test_both_ranks_refuse_what_differs(group):
    for error in group(disagreement):
        assert isinstance(error, ValueError)
        assert (
            "Rank 1 calls fit with another y than rank 0: labels of 1 instead of labels of 0"
            in (str(error))
        )


def an_error_of_one():
    ranks = ranks_here()
    with ranks.together():
        if not ranks.first:
            raise ZeroDivisionError("of the second")


def test_an_error_of_one_rank_before_the_start_ends_the_others_at_once(group):
    lost, own = group(an_error_of_one)
    assert isinstance(lost, LostRankError)
    assert str(lost) == (
        "Rank 1 of 2 refused its fit, so that rank 0 cannot begin: ZeroDivisionError: of the second"
    )
    assert isinstance(own, ZeroDivisionError)


# Batch-norm over ranks. That of torch runs on GPUs alone; here it is put in and taken out.


class Activated(nn.BatchNorm2d):
    """Batch-norm with an activation, as timm has it."""

    def forward(self, batch):
        return torch.relu(super().forward(batch))


class Normalised(nn.Module):
    """A network with batch-norm at several places, one of them twice, and one kept as it is."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sequential(norm), Activated(4))
        self.head = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
        self.frozen = nn.BatchNorm3d(2, affine=False, track_running_stats=True)
        self(torch.randn(5, 3, 2, 2))

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm3d):
                part.eval()
        return self

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def on_gpus(monkeypatch):
    """Two ranks, for which a module counts as one on their GPUs."""
    monkeypatch.setattr("skood.engine.distributed._is_on_gpu", lambda module: True)
    return Ranks(0, 2)


def test_batch_norm_is_that_of_all_ranks_inside_and_as_before_outside(on_gpus):
    module = Normalised().train()
    before = dict(module.named_modules(remove_duplicate=False))
    tensors = {id(x) for x in (*module.parameters(), *module.buffers())}
    with on_gpus.batch_norm(module):
        inside = dict(module.named_modules(remove_duplicate=False))
        synchronised = {name for name, part in inside.items() if isinstance(part, nn.SyncBatchNorm)}
        assert synchronised == {"body.1", "body.2.0", "head.1", "frozen"}
        assert {id(x) for x in (*module.parameters(), *module.buffers())} == tensors
        for name in synchronised:
            for setting in ("eps", "momentum", "affine", "track_running_stats", "training"):
                assert getattr(inside[name], setting) == getattr(before[name], setting)
        assert [inside[name].training for name in ("body.1", "frozen")] == [True, False]
        assert type(inside["body.3"]) is Activated
    assert dict(module.named_modules(remove_duplicate=False)) == before


def test_batch_norm_is_as_before_after_an_error(on_gpus):
    module = Normalised()
    before = dict(module.named_modules())
    with pytest.raises(ZeroDivisionError), on_gpus.batch_norm(module):
        raise ZeroDivisionError
    assert dict(module.named_modules()) == before


@pytest.mark.parametrize("ranks", [ALONE, Ranks(0, 2)])
def test_alone_or_on_cpus_batch_norm_stays_as_it_is(ranks):
    module = Normalised()
    with ranks.batch_norm(module):
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


def test_statistics_that_move_inside_are_those_of_the_network(on_gpus):
    module = Normalised().train()
    with on_gpus.batch_norm(module):
        module.body[1].running_mean.add_(7)
        module.body[1].num_batches_tracked.add_(1)
    assert (module.body[1].running_mean > 6).all()
    assert module.body[1].num_batches_tracked == 3  # it is called twice in a forward


class Modes(nn.Module):
    """Notes in which mode its layers train."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.kept = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.seen = set()

    def train(self, mode=True):
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm1d) and part is not self.norm:
                part.eval()
        return self

    def forward(self, x):
        if self.training:
            self.seen.add((self.norm.training, self.kept.training, type(self.norm)))
        return self.head(torch.relu(self.kept(self.norm(self.body(x)))))


def test_batch_norm_that_a_network_keeps_in_evaluation_mode_is_kept_so(opened, monkeypatch):
    rows = as_rows(np.random.RandomState(0).randn(20, 4))
    network = opened(Modes(), rows)
    # One rank alone, whose batch-norm is put in as if there were others.
    monkeypatch.setattr("skood.engine.distributed._is_on_gpu", lambda module: True)
    monkeypatch.setattr(Ranks, "batch_norm", _as_of_two(Ranks.batch_norm))
    data = TrainingData(rows, np.arange(20) % 3, rows.pick(np.arange(0)))
    terms, recipe = pretraining_terms(), Recipe(2, 8, 0.1, 0.9, 0)
    Training(network, data, terms, recipe, seed=0).run()
    assert network.module.seen == {(True, False, nn.SyncBatchNorm)}
    assert type(network.module.kept) is nn.BatchNorm1d
    assert network.module.norm.num_batches_tracked > network.module.kept.num_batches_tracked == 0
    assert not network.module.norm.training


def _as_of_two(batch_norm):
    return lambda ranks, module: batch_norm(Ranks(0, 2), module)


# Gradients over ranks


class Weighted(Term):
    """A term of the test's, beside those that there are."""

    name = "weighted"

    def __call__(self, batch):
        return batch.logits.square().sum(dim=1)


def gradients_of(ranks):
    """Loss, gradients and record of a batch of seven rows and three outliers, shared by ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    rows, outliers = rows_of((N_ROWS, 5)), rows_of((3, 5), seed=1)
    labels = torch.arange(N_ROWS) % 3
    network = open_network(
        module,
        as_rows(rows),
        head=None,
        batcher=Batcher(torch.device("cpu"), torch.float64, None),
        precision="float32",
        compiled=False,
        small_shape=False,
    )
    weights = {"sparsity_weight": 0.3, "outlier_weight": 0.5, "distillation_weight": 0.7}
    terms = [*fine_tuning_terms(l1_over_l2, weights), Weighted(0.2)]
    for term in terms:
        term.start(network)
    with torch.no_grad():
        module[2].weight.mul_(-1)
    loss = ranks.parallel(Objective(network, terms), module)
    own, others = ranks.share(np.arange(N_ROWS)), ranks.share(np.arange(3))
    counts = Counts(N_ROWS / ranks.size, 3 / ranks.size)
    for _ in range(2):  # the second step finds the buckets of gradients rebuilt
        module.zero_grad()
        value, record = loss(torch.cat([rows[own], outliers[others]]), labels[own], counts)
        value.backward()
    record = {name: x.item() for name, x in record.items()}
    return [p.grad.numpy() for p in module.parameters()], record


def gradients_on_a_rank():
    return gradients_of(ranks_here())


def test_gradients_over_two_ranks_are_those_of_the_whole_batch(group):
    (first, record), (second, other) = group(gradients_on_a_rank)
    expected, whole = gradients_of(ALONE)
    for own, same, gradient in zip(first, second, expected, strict=True):
        assert np.array_equal(own, same)
        np.testing.assert_allclose(own, gradient, rtol=1e-11, atol=1e-13)
    assert {name: (record[name] + other[name]) / 2 for name in whole} == pytest.approx(whole)
    assert record["outlier"] != pytest.approx(other["outlier"])
