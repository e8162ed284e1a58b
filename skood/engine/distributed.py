"""One fit on several processes: the ranks of a torch.distributed group, and what passes between.

Every rank holds the same network and takes its share of the rows of each batch, so that a step is
the step of one process on the whole batch. `DistributedDataParallel` averages the gradients, while
the backward pass still runs. What enters the loss must come out of the forward that it wraps, and
the features come from a hook inside: so it wraps a module that returns both features and logits,
and the gradient of the penalty reaches the same reducer as that of the cross-entropy.

Batch-norm takes its statistics from all ranks, through `F.batch_norm`, which every batch-norm in
Python ends in. torch.nn.SyncBatchNorm runs on GPUs alone, and putting it in would change modules
that are the user's; this runs on both, and the network stays as it is.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from .network import Captured, Forward, Network

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another rank ended, or did not answer within the time-out of the process group."""


@dataclass(frozen=True)
class Ranks:
    """The processes that fit one detector, seen from one of them.

    Parameters
    ----------
    rank : int, default=0
        Number of this process.
    size : int, default=1
        Number of processes. With one, nothing is sent and nothing copied.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks to the user and writes to disk."""
        return self.rank == 0

    def share(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows of this rank: consecutive ones, one more or less than the others have."""
        return rows if self.size == 1 else np.array_split(rows, self.size)[self.rank]

    def gather(self, thing: T) -> list[T]:
        """What each rank has, in their order."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        distributed.all_gather_object(things, thing)
        return things

    def joined(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of all rows, from those of each rank's share."""
        return values if self.size == 1 else np.concatenate(self.gather(values))

    def from_first(self, thing: T) -> T:
        """What rank 0 has, on every rank."""
        if self.size == 1:
            return thing
        things = [thing if self.first else None]
        distributed.broadcast_object_list(things, src=0)
        return things[0]  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse, on every rank, what is not the same on all.

        Raises
        ------
        ValueError
            If a rank has another fact than rank 0.
        """
        expected, *others = self.gather(dict(facts))
        for rank, got in enumerate(others, start=1):
            for name in facts:
                if got[name] != expected[name]:
                    raise ValueError(
                        f"Rank {rank} calls fit with another {name} than rank 0: {got[name]} "
                        f"instead of {expected[name]}. The {self.size} processes of a "
                        "torch.distributed group fit one detector: each passes the same X, y and "
                        "parameters, and all rows, which fit shares out itself. Start processes "
                        "that fit detectors of their own without torchrun."
                    )

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank, where no GPU in particular is asked for."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", _local_gpu(self.rank))

    def parallel(self, network: Network) -> Forward:
        """Features and logits of a batch, by a forward whose gradients are averaged over ranks."""
        if self.size == 1:
            return network.features_and_logits
        self.share_buffers(network.module)
        # Which parameters have a gradient does not change from step to step, and some have none.
        return DistributedDataParallel(Captured(network), static_graph=True)

    def batch_norm(self) -> AbstractContextManager[Any]:
        """Batch-norm over the rows of all ranks, inside."""
        return nullcontext() if self.size == 1 else _BatchNormOfAllRanks()

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0, in place.

        Those of batch-norm are the same already, except inside TorchScript.
        """
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer.data, src=0)


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of this process's torch.distributed group; one where it has none.

    A group that exists is used. Under ``torchrun`` one is started where there is none yet, for all
    fits to come. A child of a rank, such as a worker of joblib, inherits the environment, and is
    alone nonetheless.

    Yields
    ------
    Ranks
        The ranks. On all but the first, no warning is shown inside.

    Raises
    ------
    LostRankError
        If another rank ends, or does not answer in time.
    """
    try:
        ranks = _ranks()
        with _silent_but_on_first(ranks), _on_own_gpu(ranks):
            yield ranks
    except RuntimeError as error:
        if not _is_of_engine(error):
            raise
        raise LostRankError(
            f"This process{_name_of_rank()} lost the others of its torch.distributed group: "
            f"{str(error).splitlines()[0]} One of them ended, or did not reach the same point "
            "within the group's time-out; look for its own error first. Every process of the group "
            "must call fit. Start all of them again: with memory= and a random_state, fit goes on "
            "after the last epoch."
        ) from error


def digest(*parts: NDArray[Any] | Tensor) -> str:
    """A few characters that differ where dtype, shape or bytes do."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(f"{part.dtype} {tuple(part.shape)}".encode())
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().flatten()
            part = (part.view(torch.uint8) if part.numel() else part).numpy()
        hashed.update(np.ascontiguousarray(part).tobytes())
    return hashed.hexdigest()[:8]


def _ranks() -> Ranks:
    if not distributed.is_available():
        return ALONE
    if not distributed.is_initialized():
        is_child = multiprocessing.parent_process() is not None
        if is_child or not distributed.is_torchelastic_launched():
            return ALONE
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        distributed.init_process_group()
        atexit.register(_end_group)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _end_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _name_of_rank() -> str:
    if not distributed.is_initialized():
        return ""
    return f", rank {distributed.get_rank()} of {distributed.get_world_size()},"


def _is_of_engine(error: RuntimeError) -> bool:
    """Whether an error comes from the transport; that of gloo has no class of its own."""
    if not distributed.is_available():
        return False
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or "gloo" in text or "nccl" in text


@contextmanager
def _silent_but_on_first(ranks: Ranks) -> Iterator[None]:
    if ranks.first:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _on_own_gpu(ranks: Ranks) -> AbstractContextManager[Any]:
    """What nccl sends goes through the current GPU, of which each rank needs its own."""
    if ranks.size == 1 or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(_local_gpu(ranks.rank))


def _local_gpu(rank: int) -> int:
    """The current GPU where the user has chosen one, else that of the rank on this machine."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    return torch.cuda.current_device() or local % torch.cuda.device_count()


class _BatchNormOfAllRanks(TorchFunctionMode):
    """Replaces `F.batch_norm` in training, whichever module calls it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` with the mean and the variance of the rows of all ranks."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    own_dtype = torch.float32 if input.dtype.itemsize < 4 else input.dtype
    zeros = torch.zeros(input.shape[1], dtype=own_dtype, device=input.device)
    weight = torch.ones_like(zeros) if weight is None else weight
    output, mean, unbiased = _BatchNorm.apply(input, weight, zeros if bias is None else bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return output


class _BatchNorm(torch.autograd.Function):
    """Batch-norm whose sums over rows, forward and backward, are sums over all ranks.

    The kernels are those of batch-norm with given statistics. Its backward pass takes these as
    constants, and what depends on them is added: with N values, standard deviations s, values x of
    mean 0 and variance 1 and gradients g of the output, the gradient of the input is ``(weight / s)
    (g - sum(g) / N - x sum(g x) / N)`` (Ioffe & Szegedy, "Batch normalization", ICML 2015).
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Statistics of half precision are those of float32, as these buffers are.
        buffers = torch.zeros_like(weight), torch.zeros_like(weight)
        own_mean, own_var = torch.batch_norm_update_stats(input, *buffers, 1.0)
        own_mean, own_var = own_mean.double(), own_var.double()
        # In float64, second moments give the variance of all without a loss.
        n_own = torch.full_like(own_mean, input.numel() // input.shape[1])
        sums = torch.stack([n_own, n_own * own_mean, n_own * (own_var + own_mean**2)])
        distributed.all_reduce(sums)
        n_values = sums[0]
        mean = sums[1] / n_values
        var = sums[2] / n_values - mean**2
        ctx.eps = eps
        statistics = mean.to(weight.dtype), var.to(weight.dtype)
        ctx.save_for_backward(input, weight, *statistics, n_values)
        unbiased = var * n_values / (n_values - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        output = F.batch_norm(input, *statistics, weight, bias, False, 0.0, eps)
        return output, mean, unbiased

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, n_values = ctx.saved_tensors
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias]).double()
        distributed.all_reduce(sums)
        scale = torch.rsqrt(var.double() + ctx.eps)
        slope = weight * scale**2 * sums[0] / n_values
        offset = weight * scale * sums[1] / n_values - slope * mean
        channels = (1, -1, *[1] * (input.ndim - 2))
        slope, offset = (x.to(weight.dtype).view(channels) for x in (slope, offset))
        of_input = of_input - torch.addcmul(offset, input, slope)
        return of_input.to(input.dtype), of_weight, of_bias, None
