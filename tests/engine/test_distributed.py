from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from skood.engine.distributed import ALONE, Ranks, digest, joined_ranks

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


def test_a_digest_tells_bytes_shapes_and_dtypes_apart():
    zeros = torch.zeros(2, 3)
    others = [zeros.int(), zeros.view(3, 2), zeros + 1, zeros[:0], zeros.bfloat16()]
    assert len({digest(x) for x in [zeros, *others]}) == 6
    assert digest(np.zeros(2)) != digest(np.zeros(2, dtype=int))
    assert digest(zeros, zeros) != digest(zeros)
    assert digest(zeros.T) == digest(zeros.T.contiguous())
    assert digest() != digest(torch.tensor(0.0))


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


def batch_norm_of(shape, affine, ranks, momentum=0.1):
    """Output, gradients and statistics of this rank's rows, through a subclass of batch-norm."""

    class Scaled(nn.BatchNorm2d):
        def _check_input_dim(self, batch):
            pass

        def forward(self, batch):
            return 2 * super().forward(batch)

    module = Scaled(shape[1], affine=affine, momentum=momentum).double()
    own = ranks.share(np.arange(len(rows_of(shape))))
    batch = rows_of(shape)[own].requires_grad_()
    with ranks.batch_norm():
        output = module(batch)
        again = module.eval()(batch.detach())  # the statistics, which do not change any more
        (output * rows_of(shape, seed=1)[own]).sum().backward()
    gradients = [p.grad for p in module.parameters()]
    return [
        [x.detach().numpy() for x in (output, again, batch.grad)],
        [x.numpy() for x in gradients],
        [x.numpy() for x in module.buffers()],
    ]


def batch_norm_on_a_rank(*args):
    return batch_norm_of(*args[:2], ranks_here(), *args[2:])


@pytest.mark.parametrize(
    ("shape", "affine", "momentum"),
    [((N_ROWS, 3), True, 0.1), ((N_ROWS, 3, 4, 2), False, None), ((2, 3, 5), True, 0.1)],
)
def test_batch_norm_is_that_of_all_rows(group, shape, affine, momentum):
    first, second = group(batch_norm_on_a_rank, shape, affine, momentum)
    rows, sums, statistics = batch_norm_of(shape, affine, ALONE, momentum)
    for own, other, expected in zip(first[0], second[0], rows, strict=True):
        np.testing.assert_allclose(np.concatenate([own, other]), expected, rtol=1e-11, atol=1e-12)
    for own, other, expected in zip(first[1], second[1], sums, strict=True):
        np.testing.assert_allclose(own + other, expected, rtol=1e-11, atol=1e-12)
    for own, other, expected in zip(first[2], second[2], statistics, strict=True):
        assert np.array_equal(own, other)
        np.testing.assert_allclose(own, expected, rtol=1e-12)


def batch_norm_in_bfloat16():
    """Output and gradient of the input in half precision, with weights in single."""
    ranks = ranks_here()
    batch = rows_of((N_ROWS, 3)).bfloat16()[ranks.share(np.arange(N_ROWS))].requires_grad_()
    with ranks.batch_norm():
        output = F.batch_norm(batch, None, None, torch.ones(3), torch.zeros(3), training=True)
        output.float().pow(3).sum().backward()
    assert output.dtype == batch.grad.dtype == torch.bfloat16
    return output.detach().float().numpy(), batch.grad.float().numpy()


def test_batch_norm_keeps_half_precision(group):
    batch = rows_of((N_ROWS, 3)).bfloat16().double().requires_grad_()
    output = F.batch_norm(batch, None, None, training=True)
    output.pow(3).sum().backward()
    found = [np.concatenate(parts) for parts in zip(*group(batch_norm_in_bfloat16), strict=True)]
    for values, expected in zip(found, (output.detach(), batch.grad), strict=True):
        tolerance = 2**-6 * expected.abs().max().item()
        np.testing.assert_allclose(values, expected.numpy(), rtol=0, atol=tolerance)
