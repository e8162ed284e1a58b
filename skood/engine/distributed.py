"""One fit on several processes: the ranks of a torch.distributed group, and what they exchange.

Every rank holds the same network and takes its share of the rows of each batch.
`DistributedDataParallel` wraps the objective and averages the gradients. So a step is the step of
one process on the whole batch, except for batch-norm on CPUs: there each rank normalises its own
rows, and the running statistics of rank 0 are kept. On GPUs `torch.nn.SyncBatchNorm` takes the
statistics of all rows; a subclass of batch-norm does more than that, so it stays as it is.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..exceptions import LostRankError
from ..notices import first_line

T = TypeVar("T")

LONGEST_QUOTE = 250

LONGEST_CAUSE = 70
"""Characters that are shown of what the transport says."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Ranks:
    """The processes that fit one detector, seen from one of them.

    With one process, nothing is sent and nothing copied.
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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, where ranks do not exchange anything, an error of one ends all of them.

        A `LostRankError` says on the others which it was.
        """
        try:
            yield
        except Exception as error:
            with suppress(RuntimeError):  # of ranks that are lost: this error says more
                self.gather(f"{type(error).__name__}: {str(error)[:LONGEST_QUOTE]}")
            raise
        reasons: list[str | None] = self.gather(None)
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise LostRankError(
                    f"Rank {rank} of {self.size} refused its fit, so that rank {self.rank} cannot "
                    f"begin: {reason}"
                )

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse with a ValueError, on every rank, facts that are not the same on all."""
        expected, *others = self.gather(dict(facts))
        for rank, got in enumerate(others, start=1):
            for name in {**expected, **got}:
                one, other = got.get(name, "none"), expected.get(name, "none")
                if one != other:
                    raise ValueError(
                        f"Rank {rank} calls fit with another {name} than rank 0: {one} "
                        f"instead of {other}. The {self.size} processes of a "
                        "torch.distributed group fit one detector: each passes the same X, y and "
                        "parameters, and all rows, which fit shares out itself. Start processes "
                        "that fit detectors of their own without torchrun."
                    )

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank, where no GPU in particular is asked for."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", _local_gpu(self.rank))

    def parallel(self, objective: nn.Module, module: nn.Module) -> nn.Module:
        """The objective of a module, with gradients that are averaged over ranks."""
        if self.size == 1:
            return objective
        self.share_buffers(module)
        for part in module.modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                part.sparse = False  # ranks exchange dense gradients alone
        # Which parameters have a gradient does not change from step to step, and some have none.
        return DistributedDataParallel(objective, static_graph=True)

    @contextmanager
    def batch_norm(self, module: nn.Module) -> Iterator[None]:
        """Inside, batch-norm on GPUs takes its statistics from the rows of all ranks.

        Each layer is in the mode, training or evaluation, that it had before.
        """
        places = []
        if self.size > 1 and _is_on_gpu(module):
            places = [
                (part, name, child)
                for part in module.modules()
                for name, child in part._modules.items()
                if type(child) in BATCH_NORMS
            ]
        for part, name, child in places:  # on the same tensors
            part._modules[name] = nn.SyncBatchNorm.convert_sync_batchnorm(child)
        try:
            yield
        finally:
            for part, name, child in places:
                part._modules[name] = child

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0, in place."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer.data, src=0)


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of this process's torch.distributed group; one if it has none.

    A group that exists is used. Under ``torchrun`` one is started if there is none yet, for all
    fits to come. A child of a rank, such as a worker of joblib, inherits the environment, and is
    alone nonetheless. Inside, no rank but the first shows warnings. A `LostRankError` says if
    another rank ends, or does not answer in time.
    """
    try:
        ranks = _ranks()
        with _silent_but_on_first(ranks), _on_own_gpu(ranks):
            yield ranks
    except RuntimeError as error:
        if not _is_of_engine(error):
            raise
        # Without the place in the source before it, and what gloo guesses after it.
        cause = re.sub(r"^\[\S*\] ", "", first_line(error)).partition(". ")[0]
        raise LostRankError(
            f"This process{_name_of_rank()} lost the others of its torch.distributed group: "
            f"{cause[:LONGEST_CAUSE]}. One of them ended, or did not reach the same "
            "point within the group's time-out; look for its own error first. Every process must "
            "call fit. Start all of them again: with memory= and a random_state, fit goes on after "
            "the last epoch."
        ) from error


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


def _is_on_gpu(module: nn.Module) -> bool:
    return all(p.is_cuda for p in module.parameters())


def _local_gpu(rank: int) -> int:
    """The current GPU where the user has chosen one, else that of the rank on this machine."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    return torch.cuda.current_device() or local % torch.cuda.device_count()
