"""The training loop: an objective, minimised by a recipe of steps."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..exceptions import DivergenceError, NonFiniteLogitsError
from .augmentation import Augment, Share
from .distributed import ALONE, Ranks
from .graphs import release, replaying
from .hardware import autocast
from .inference import forward_rows
from .network import Network, held_still, trainable
from .objective import Counts, Objective, Term
from .outputs import all_finite
from .precision import in_float32
from .rows import Rows
from .surroundings import own_defaults
from .teacher import Views

Record = dict[str, float]

PRETRAINING_RATE = 0.1
PRETRAINING_DECAY = 5e-3
PRETRAINING_EPOCHS = 10
PRETRAINING_STEPS = 300

PROBE_ROWS = 256
"""Rows that tell, after each epoch, whether the network still distinguishes its inputs."""

SHARES = {"all": 1.0, "last": 0.7}
"""Share of the weights before the head that is trained, the last ones; the head is, too."""

COLLAPSED_SPREAD = 1e-2
"""Share of the initial range of energies below which they count as constant."""

FLOAT32_NOISE = 1e-6
"""Relative range of energies that rounding alone may cause."""

_training_lock = threading.RLock()


def _renew_lock() -> None:
    global _training_lock
    _training_lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # the thread that holds it may not be there
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Parameters
    ----------
    epochs : int
        Passes over the training rows.
    batch_size : int
        Rows of a step, on all processes together. A last batch of a single row is left out, as is
        one of too few rows for all processes: batch-norm needs two on each.
    learning_rate : float
        Learning rate at the start; it falls along a cosine, step by step.
    momentum : float
        Nesterov momentum.
    weight_decay : float
        L2 penalty on all parameters.
    final_learning_rate : float
        Learning rate after the last step.
    layers : str
        Which layers are trained: "all", or the "last" ones.
    still : tuple of str
        Parameters before these, which stay as they are.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    final_learning_rate: float = 1e-6
    layers: str = "all"
    still: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on, the logit indices of their labels, and known outliers, if any."""

    rows: Rows
    labels: NDArray[np.int64]
    outliers: Rows
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Progress:
    """What a training needs to go on after an epoch."""

    history: list[Record]
    initial_spread: float  # range of the energies before the first epoch
    module: nn.Module
    optimizer: dict[str, Any]


class Training:
    """One training of a network, in place; the network is left in evaluation mode.

    The seed decides the order of rows, the augmentation and the dropout. Terms look at the network
    `before`, which is the network itself if None.
    """

    def __init__(
        self,
        network: Network,
        data: TrainingData,
        terms: Sequence[Term],
        recipe: Recipe,
        seed: int,
        augment: Augment | None = None,
        before: Network | None = None,
    ) -> None:
        self.network = network
        self.before = network if before is None else before
        self.data = data
        self.terms = terms
        self.recipe = recipe
        self.seed = seed
        self.augment = augment
        self._sees_outliers = any(term.of_outliers for term in terms)
        self._fewest = (2 if _normalises(network) else 1) * data.ranks.size
        self._check_batch_size()

    def run(
        self,
        resume: Progress | None = None,
        after_epoch: Callable[[Progress], None] = lambda progress: None,
    ) -> list[Record]:
        """Train for all epochs; one record an epoch, of means over its rows in training mode.

        With `resume`, go on after these epochs of the same training: the outcome is bitwise that of
        all in one. `after_epoch` is called with the network in evaluation mode. A `DivergenceError`
        says if the loss is NaN or infinite, or the energies collapse to a constant.

        A network in 16 bits is trained in float32, which `Progress` keeps, and rounded at the end.
        """
        with in_float32(self.network), in_float32(self.before):
            return self._run(resume, after_epoch)

    def _run(
        self, resume: Progress | None, after_epoch: Callable[[Progress], None]
    ) -> list[Record]:
        network, recipe = self.network, self.recipe
        for term in self.terms:
            term.start(self.before)
        if resume is not None:
            resume.module.to(network.device)
            network.adopt(resume.module)
        with held_still(network.module, recipe.still):
            return self._trained(resume, after_epoch)

    def _trained(
        self, resume: Progress | None, after_epoch: Callable[[Progress], None]
    ) -> list[Record]:
        network, recipe, ranks = self.network, self.recipe, self.data.ranks
        objective = Objective(network, self.terms)
        self._optimizer = _optimizer(network, recipe)
        if resume is None:
            history: list[Record] = []
            spread = self._energy_spread()
        else:
            history, spread = list(resume.history), resume.initial_spread
            self._optimizer.load_state_dict(resume.optimizer)
        if ranks.size == 1:
            n_steps = recipe.epochs * math.ceil(len(self.data.rows) / recipe.batch_size)
            objective.forward_of_network = replaying(network, n_steps)
        try:
            self._objective, self._loss = objective, ranks.parallel(objective, network.module)
            for epoch in range(len(history) + 1, recipe.epochs + 1):
                record = self._epoch(epoch)
                self._check_progress(spread, record)
                history.append(record)
                state = self._optimizer.state_dict()
                after_epoch(Progress(history, spread, network.public, state))
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            release(objective.forward_of_network)
        return history

    def _epoch(self, epoch: int) -> Record:
        """One pass over the in-distribution rows, decided by the seed and the epoch's number."""
        start = time.perf_counter()
        ranks, network = self.data.ranks, self.network
        orders = np.random.SeedSequence([self.seed, epoch]).generate_state(4).tolist()
        order, outlier_order, draws = (
            torch.Generator(device="cpu").manual_seed(state) for state in orders[:3]
        )
        means: list[tuple[float, dict[str, Tensor]]] = []
        sums: list[Tensor] = []
        # Dropout is drawn by each process, for its own rows.
        with reproducible(orders[3] + ranks.rank, network.device, network.default_dtype):
            # First, as a network may keep some of its layers in evaluation mode, by their class.
            network.train(True)
            with ranks.batch_norm(network.module):
                for step in self._steps(epoch, order, outlier_order):
                    sums.append(step.batch.sum())
                    means.append(self._step(step, draws))
            network.train(False)
        ranks.share_buffers(network.module)
        record = {"epoch": epoch, **_means(means, start, ranks)}
        # Batches are not checked one by one: to ask a GPU about each would keep it waiting.
        if any(ranks.gather(not all_finite(torch.stack(sums)))):
            self._refuse_nonfinite_rows()
        return record

    def _steps(
        self, epoch: int, order: torch.Generator, outlier_order: torch.Generator
    ) -> Iterator[_StepInput]:
        """What each step of an epoch takes in."""
        data, ranks = self.data, self.data.ranks
        size, fewest = self.recipe.batch_size, max(self._fewest, 2)
        batches = _batches(_permutation(len(data.rows), order), size, fewest)
        drawn = [np.arange(0)] * len(batches)
        if self._sees_outliers:
            endless = _endless_batches(len(data.outliers), size, fewest, outlier_order)
            drawn = list(islice(endless, len(batches)))
        # Positions in each batch of the rows that this process has.
        shares = [ranks.share(np.arange(len(picks))) for picks in batches]
        owns = [picks[own] for picks, own in zip(batches, shares, strict=True)]
        stream = self.network.batcher.stream
        inliers = stream(data.rows, iter(owns), checked=False)
        outliers = stream(data.outliers, map(ranks.share, drawn), checked=False)
        labels_of_steps = (
            torch.from_numpy(data.labels[np.concatenate(owns)])
            .to(self.network.device)
            .split([len(own) for own in owns])
        )
        rates = _cosine(self.recipe, len(batches), epoch)
        for picks, own, others, rate, labels in zip(
            batches, shares, drawn, rates, labels_of_steps, strict=True
        ):
            batch = next(inliers)
            positions = own
            if self._sees_outliers:
                batch = torch.cat([batch, next(outliers)])
                positions = np.concatenate([own, len(picks) + ranks.share(np.arange(len(others)))])
            yield _StepInput(
                batch,
                picks[own],
                labels,
                Share(positions, len(picks) + len(others)),
                Counts(len(picks) / ranks.size, len(others) / ranks.size),
                rate,
            )

    def _step(self, step: _StepInput, draws: torch.Generator) -> tuple[float, dict[str, Tensor]]:
        """One step down the gradient: the rows that count, and means over them."""
        for group in self._optimizer.param_groups:
            group["lr"] = step.rate
        batch, views = self._augmented(step, draws)
        record = self._in_memory(batch, views, step)
        if record is None and release(self._objective.forward_of_network):
            record = self._in_memory(batch, views, step)
        if record is None:
            raise torch.OutOfMemoryError(
                f"{batch.device} has no memory for a training step at batch_size="
                f"{self.recipe.batch_size}, of which it holds {len(step.labels)} rows: pass a "
                "smaller one."
            )
        return step.counts.inliers, record

    def _augmented(self, step: _StepInput, draws: torch.Generator) -> tuple[Tensor, Views | None]:
        """The batch to train on, and which rows it holds, if they will come again as they are."""
        # A process among several would get other rows in each epoch.
        alone = self.data.ranks.size == 1
        views = Views(step.rows, len(self.data.rows)) if alone else None
        if self.augment is None:
            return step.batch, views
        batch, mirrored = self.augment(step.batch, draws, step.share)
        batch = self.network.batcher.laid_out(batch.to(step.batch.dtype))
        if views is None or mirrored is None:
            return batch, None
        return batch, views._replace(mirrored=mirrored[: len(step.rows)].numpy())

    def _in_memory(
        self, batch: Tensor, views: Views | None, step: _StepInput
    ) -> dict[str, Tensor] | None:
        """What a step gives; None if there is no memory for it."""
        try:
            loss, record = self._loss(batch, step.labels, step.counts, views)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            return record
        except torch.OutOfMemoryError:
            return None  # with the error goes what it holds

    def _check_progress(self, initial_spread: float, record: Record) -> None:
        """Stop if the loss, or what it did to the network, is beyond repair."""
        epoch = record["epoch"]
        if not math.isfinite(record["loss"]):
            raise DivergenceError(
                f"The loss is {record['loss']} in epoch {epoch} (cross-entropy "
                f"{record['cross_entropy']:.4g}, penalty {record['penalty']:.4g}). "
                f"{self._remedy()}, and check that X is on the scale that the network expects."
            )
        try:
            spread = self._energy_spread()
        except NonFiniteLogitsError as error:
            raise DivergenceError(
                f"The logits became NaN or infinite in epoch {epoch}. {self._remedy()}, and check "
                "that X is on the scale that the network expects."
            ) from error
        if initial_spread > 0 and spread <= COLLAPSED_SPREAD * initial_spread:
            raise DivergenceError(
                f"The scores collapsed to a constant in epoch {epoch}: the network no longer tells "
                f"its inputs apart. {self._remedy()}."
            )

    def _remedy(self) -> str:
        weights = {term.parameter: term.weight for term in self.terms if term.parameter}
        weights["learning_rate"] = self.recipe.learning_rate
        return "Lower " + " or ".join(f"{name} (now {v:g})" for name, v in weights.items() if v > 0)

    def _refuse_nonfinite_rows(self) -> None:
        """Refuse rows that hold NaN or infinity, if there are any."""
        for rows in (self.data.rows, *([self.data.outliers] if self._sees_outliers else [])):
            for _ in self.network.batcher.stream(rows):
                pass

    def _energy_spread(self) -> float:
        """Range of the energies of some rows, relative to their size; 0 if rounding explains it."""
        probe = self.data.rows.pick(np.arange(min(PROBE_ROWS, len(self.data.rows))))
        energies = np.concatenate(
            [
                torch.logsumexp(seen.logits, dim=1).cpu().numpy()
                for _, seen in forward_rows(self.network, probe)
            ]
        )
        spread = float(np.ptp(energies) / max(np.abs(energies).max(), 1e-300))
        return spread if spread > FLOAT32_NOISE else 0.0

    def _check_batch_size(self) -> None:
        batch_size, data, n_ranks = self.recipe.batch_size, self.data, self.data.ranks.size
        n_rows = min(batch_size, len(data.rows))
        if n_ranks == 1 and n_rows < self._fewest:
            raise ValueError(
                f"batch_size={batch_size} on {len(data.rows)} training rows gives steps of one "
                "row, on which batch-norm cannot train. Pass batch_size of at least 2, and more "
                "rows."
            )
        if n_rows < self._fewest:
            raise ValueError(
                f"batch_size={batch_size} on {len(data.rows)} training rows leaves some of "
                f"{n_ranks} processes without rows: a step of all of them together needs "
                f"{self._fewest}, one on each, or two with batch-norm. Pass a larger batch_size, "
                "more rows, or start fewer processes."
            )
        if self._sees_outliers and len(data.outliers) < n_ranks:
            raise ValueError(
                f"{len(data.outliers)} outliers leave some of {n_ranks} processes without any. "
                "Pass more rows labelled ood_label, or start fewer processes."
            )


@dataclass(frozen=True)
class _StepInput:
    batch: Tensor
    rows: NDArray[np.intp]  # positions among the training rows of those that are no outliers
    labels: Tensor
    share: Share
    counts: Counts
    rate: float


def pretraining_recipe(n_rows: int, batch_size: int, epochs: int | None) -> Recipe:
    """Recipe of plain cross-entropy from scratch, long enough for many rows and for few.

    If `epochs` is None, there are at least `PRETRAINING_STEPS` steps.
    """
    if epochs is None:
        steps = math.ceil(n_rows / batch_size)
        epochs = max(PRETRAINING_EPOCHS, math.ceil(PRETRAINING_STEPS / steps))
    return Recipe(
        epochs, batch_size, PRETRAINING_RATE, momentum=0.9, weight_decay=PRETRAINING_DECAY
    )


@contextmanager
def reproducible(
    seed: int, device: torch.device, default_dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Seed torch's generators for dropout and initial weights, and give them back as they were.

    The generators belong to the whole process: a lock lets one thread train at a time. Inside,
    gradients are on, and defaults are the network's, whatever mode the caller is in.
    """
    gpus = [device] if device.type == "cuda" else []
    with (
        _training_lock,
        own_defaults(device, default_dtype),
        torch.random.fork_rng(devices=gpus),
        torch.inference_mode(False),
        torch.enable_grad(),
        autocast(device, None),
    ):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _means(steps: list[tuple[float, dict[str, Tensor]]], start: float, ranks: Ranks) -> Record:
    """Means over the rows of an epoch; the device is asked once, at its end."""
    rows = np.array([n_rows for n_rows, _ in steps], dtype=np.float64)
    names = list(steps[0][1])
    own = [rows.sum()]
    for name in names:
        values = torch.stack([record[name] for _, record in steps]).cpu().double().numpy()
        own.append(values @ rows)
    # Now that it has answered, the device has done the work.
    gathered = ranks.gather((np.array(own), time.perf_counter() - start))
    n_rows, *totals = np.sum([sums for sums, _ in gathered], axis=0)
    record = {name: float(total / n_rows) for name, total in zip(names, totals, strict=True)}
    return record | {"seconds": max(taken for _, taken in gathered)}


def _normalises(network: Network) -> bool:
    """Whether batch-norm takes the statistics of training batches, of which it needs two rows."""
    network.train(True)  # in which a network may keep some of its layers in evaluation mode
    parts = network.module.modules()
    normalises = any(isinstance(part, _BatchNorm) and part.training for part in parts)
    network.train(False)
    return normalises


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = trainable(network.module)
    if not parameters:
        raise ValueError(
            "The module has no parameter with requires_grad=True, so there is nothing to "
            "fine-tune. Unfreeze some, or set max_epochs=0 to use the network as it is."
        )
    fused = all(p.is_cuda and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=fused or None,  # one kernel on a GPU; None leaves the choice to torch
    )
    optimizer.register_step_pre_hook(_make_dense)
    if fused and recipe.momentum > 0:
        # Which torch asks for where a parameter has its first gradient later than another.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _make_dense(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fill up sparse gradients, such as an embedding's, which momentum and weight decay refuse."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.layout is not torch.strided:
                p.grad = p.grad.to_dense()


def _cosine(recipe: Recipe, steps: int, epoch: int) -> list[float]:
    """Learning rates of an epoch's steps; over all epochs they go down half a cosine."""
    low = min(recipe.final_learning_rate, recipe.learning_rate)
    return [
        low + (recipe.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * step))
        for step in (np.arange(steps) / steps + epoch - 1) / recipe.epochs
    ]


def _permutation(n_rows: int, generator: torch.Generator) -> NDArray[np.intp]:
    return torch.randperm(n_rows, generator=generator, device="cpu").numpy()


def _batches(order: NDArray[np.intp], size: int, fewest: int) -> list[NDArray[np.intp]]:
    """Consecutive batches; a last one of too few rows is left out, unless it is the only one."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    too_few = len(batches) > 1 and len(batches[-1]) < min(size, fewest)
    return batches[:-1] if too_few else batches


def _endless_batches(
    n_rows: int, size: int, fewest: int, generator: torch.Generator
) -> Iterator[NDArray[np.intp]]:
    while True:
        yield from _batches(_permutation(n_rows, generator), size, fewest)
