"""The training loop: cross-entropy plus a penalty on the features, by a recipe of steps."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..penalties import hoyer_index, l1
from .augmentation import Augment, Share
from .batches import STREAM_ROWS, Rows, slices
from .distributed import ALONE, Ranks
from .graphs import Replayed, worth_recording
from .hardware import autocast
from .inference import NonFiniteLogitsError, forward_rows
from .network import Forward, Network, trainable
from .outputs import all_finite

Record = dict[str, float]
Step = tuple[int, dict[str, Tensor]]

PRETRAINING_RATE = 0.1
PRETRAINING_DECAY = 5e-3
PRETRAINING_EPOCHS = 10
PRETRAINING_STEPS = 300

DISTILLATION_TEMPERATURE = 2.0

PROBE_ROWS = 256
"""Rows that tell, after each epoch, whether the network still distinguishes its inputs."""

COLLAPSED_SPREAD = 1e-2
"""Share of the initial range of energies below which they count as constant."""

FLOAT32_NOISE = 1e-6
"""Relative range of energies that rounding alone may cause."""

_training_lock = threading.RLock()


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Parameters
    ----------
    epochs : int
        Passes over the training rows.
    batch_size : int
        Rows of a step, on all ranks together. A last batch of a single row is left out: batch-norm
        cannot train on it. So is one of fewer rows than ranks.
    learning_rate : float
        Learning rate at the start; it falls along a cosine, step by step.
    momentum : float
        Nesterov momentum.
    weight_decay : float
        L2 penalty on all parameters.
    final_learning_rate : float
        Learning rate after the last step.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    final_learning_rate: float = 1e-6


@dataclass(frozen=True)
class Objective:
    """What the loss adds to the cross-entropy.

    Parameters
    ----------
    penalty : callable
        Features (n, d) to values (n,).
    sparsity_weight : float
        Weight of the batch mean of the penalty.
    outlier_weight : float
        Weight of the cross-entropy between the uniform distribution and the prediction on outliers.
    distillation_weight : float
        Weight of the divergence from the predictions that the network made before training.
    """

    penalty: Callable[[Tensor], Tensor]
    sparsity_weight: float = 0.0
    outlier_weight: float = 0.0
    distillation_weight: float = 0.0


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on.

    Parameters
    ----------
    X : array or tensor of shape (n, ...)
        All rows.
    rows : ndarray of shape (m,)
        Rows of X to train on.
    labels : ndarray of shape (m,)
        Their logit indices.
    outliers : ndarray of shape (k,)
        Rows of X that enter the loss as outliers; may be empty.
    ranks : Ranks
        The processes that share the rows of each batch.
    """

    X: Rows
    rows: NDArray[np.intp]
    labels: NDArray[np.int64]
    outliers: NDArray[np.intp]
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Progress:
    """What a training needs to go on after an epoch.

    Parameters
    ----------
    history : list of dict
        Records of the epochs so far.
    initial_spread : float
        Range of the energies before the first.
    module : nn.Module
        The network.
    optimizer : dict
        State of the optimizer.
    """

    history: list[Record]
    initial_spread: float
    module: nn.Module
    optimizer: dict[str, Any]


class DivergenceError(RuntimeError):
    """The loss became NaN or infinite, or the scores collapsed to a constant."""


def train(
    network: Network,
    data: TrainingData,
    objective: Objective,
    recipe: Recipe,
    *,
    augment: Augment | None = None,
    seed: int,
    resume: Progress | None = None,
    after_epoch: Callable[[Progress], None] = lambda progress: None,
) -> list[Record]:
    """Train a network in place and leave it in evaluation mode.

    Parameters
    ----------
    network : Network
        The network, changed in place.
    data : TrainingData
        Rows and labels.
    objective : Objective
        Terms of the loss beside the cross-entropy.
    recipe : Recipe
        Epochs, batch size and optimizer settings.
    augment : Augment, optional
        Applied to in-distribution and outlier batches, drawn per row.
    seed : int
        Seeds the order of rows, the augmentation and the dropout.
    resume : Progress, optional
        Go on after these epochs of the same training; the outcome is bitwise that of all in one.
    after_epoch : callable, optional
        Called with the progress after each epoch, the network in evaluation mode.

    Returns
    -------
    list of dict
        One record an epoch: means over its rows, in training mode, and seconds, those of the
        slowest rank.

    Raises
    ------
    DivergenceError
        If the loss is NaN or infinite, or the energies collapse to a constant.
    """
    _check_batch_size(network, data, objective, recipe)
    teacher = network.uncompiled_copy() if objective.distillation_weight > 0 else None
    probe = data.rows[:PROBE_ROWS]
    if resume is not None:
        network.adopt(resume.module.to(network.device))
    optimizer = _optimizer(network, recipe)
    if resume is None:
        history: list[Record] = []
        spread = _energy_spread(network, data.X, probe)
    else:
        history, spread = list(resume.history), resume.initial_spread
        optimizer.load_state_dict(resume.optimizer)
    n_steps = len(_batches(data.rows, recipe.batch_size, data.ranks.size)) * recipe.epochs
    if data.ranks.size == 1 and worth_recording(network, n_steps):
        forward: Forward = Replayed(network)
    else:
        forward = data.ranks.parallel(network)
    try:
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            start = time.perf_counter()
            means, sums = _epoch(
                network, forward, teacher, data, objective, recipe, augment, optimizer, epoch, seed
            )
            data.ranks.share_buffers(network.module)
            record = _epoch_record(epoch, means, start, data.ranks)
            if any(data.ranks.gather(not all_finite(sums))):
                _refuse_nonfinite_rows(network, data, objective)
            _check_progress(network, data.X, probe, spread, record, _remedy(objective, recipe))
            history.append(record)
            after_epoch(Progress(history, spread, network.module, optimizer.state_dict()))
    finally:
        optimizer.zero_grad(set_to_none=True)
        if isinstance(forward, Replayed):
            forward.release()
    return history


def pretraining_recipe(n_rows: int, batch_size: int, epochs: int | None) -> Recipe:
    """Recipe of plain cross-entropy from scratch, long enough for many rows and for few.

    Parameters
    ----------
    n_rows : int
        Number of training rows.
    batch_size : int
        Rows of a step.
    epochs : int or None
        Epochs, where the user wants a number; None sizes them in steps where there are few rows.

    Returns
    -------
    Recipe
        The recipe.
    """
    if epochs is None:
        steps = math.ceil(n_rows / batch_size)
        epochs = max(PRETRAINING_EPOCHS, math.ceil(PRETRAINING_STEPS / steps))
    return Recipe(
        epochs, batch_size, PRETRAINING_RATE, momentum=0.9, weight_decay=PRETRAINING_DECAY
    )


@contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for dropout and initial weights, and give them back as they were.

    The generators belong to the whole process: a lock lets one thread train at a time. Gradients
    are on inside, whatever mode the caller is in.
    """
    gpus = [device] if device.type == "cuda" else []
    with (
        _training_lock,
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


def loss_terms(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    objective: Objective,
    taught: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy and penalty of a batch whose first rows are in-distribution.

    ``L = CE(z, y) + sparsity_weight mean_i penalty(h_i) + outlier_weight mean_o CE(uniform,
    softmax(z_o)) + distillation_weight T^2 mean_i KL(softmax(z'_i / T) || softmax(z_i / T))``, with
    z' the logits before training and T = 2.

    Parameters
    ----------
    features : Tensor of shape (n + m, d)
        Features; the m last rows are outliers and pay no penalty.
    logits : Tensor of shape (n + m, K)
        Logits.
    labels : Tensor of shape (n,), int64
        Logit indices of the in-distribution rows.
    objective : Objective
        Penalty and weights.
    taught : Tensor of shape (n, K), optional
        Logits of the in-distribution rows before training; needed where the objective distils.

    Returns
    -------
    loss, cross_entropy, penalty : Tensor of shape ()
        The loss, and two of its terms without their weights.

    References
    ----------
    Chen & Li, J. Guilin Univ. Electron. Technol. 43(1), 2023 (penalty); Sci. Rep. 14:28444, 2024
    (outliers). Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", 2015; Li &
    Hoiem, "Learning without forgetting", ECCV 2016, equation 2 (distillation, and its T).
    """
    n_rows = len(labels)
    cross_entropy = F.cross_entropy(logits[:n_rows], labels)
    values = objective.penalty(features[:n_rows])
    if not isinstance(values, Tensor) or values.shape != (n_rows,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"penalty returned {got} for features of shape {tuple(features[:n_rows].shape)}; it "
            f"must return one value per row, a tensor of shape ({n_rows},). Sum over dim=1."
        )
    if not values.is_floating_point():
        raise TypeError(f"penalty returned {values.dtype} values; it must return floating ones.")
    penalty = values.mean()
    loss = cross_entropy + objective.sparsity_weight * penalty
    if objective.outlier_weight > 0:
        uniform = -F.log_softmax(logits[n_rows:], dim=1).mean()
        loss = loss + objective.outlier_weight * uniform
    if taught is not None:
        before, now = (
            F.log_softmax(z / DISTILLATION_TEMPERATURE, dim=1) for z in (taught, logits[:n_rows])
        )
        divergence = F.kl_div(now, before, reduction="batchmean", log_target=True)
        loss = loss + objective.distillation_weight * DISTILLATION_TEMPERATURE**2 * divergence
    return loss, cross_entropy, penalty


def _epoch(
    network: Network,
    forward: Forward,
    teacher: Network | None,
    data: TrainingData,
    objective: Objective,
    recipe: Recipe,
    augment: Augment | None,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    seed: int,
) -> tuple[list[Step], Tensor]:
    """One pass over the in-distribution rows, decided by the seed and the epoch's number alone.

    With the steps come the sums of their batches, finite where all values are. To ask the device
    for each in its turn would keep it waiting.
    """
    orders = np.random.SeedSequence([seed, epoch]).generate_state(4).tolist()
    order, outlier_order, draws = (
        torch.Generator(device="cpu").manual_seed(state) for state in orders[:3]
    )
    ranks = data.ranks
    batches = _batches(_permutation(len(data.rows), order), recipe.batch_size, ranks.size)
    rates = _cosine(recipe, len(batches), epoch)
    drawn = [data.outliers[:0]] * len(batches)
    if objective.outlier_weight > 0:
        endless = _endless_batches(data.outliers, recipe.batch_size, ranks.size, outlier_order)
        drawn = list(islice(endless, len(batches)))
    # Positions in each batch of the rows that this rank has.
    shares = [ranks.share(np.arange(len(picks))) for picks in batches]
    owns = [picks[own] for picks, own in zip(batches, shares, strict=True)]
    stream = partial(network.batcher.stream, data.X, checked=False)
    inliers = stream((data.rows[own] for own in owns), len(data.rows))
    outliers = stream(map(ranks.share, drawn), len(data.outliers))
    labels_of_steps = (
        torch.from_numpy(data.labels[np.concatenate(owns)])
        .to(network.device)
        .split([len(own) for own in owns])
    )
    means: list[Step] = []
    sums: list[Tensor] = []
    # Dropout is drawn by each rank, for its own rows.
    with reproducible(orders[3] + ranks.rank, network.device), ranks.batch_norm():
        network.train(True)
        steps = zip(batches, shares, drawn, rates, labels_of_steps, strict=True)
        for picks, own, others, rate, labels in steps:
            _set_rate(optimizer, rate)
            own_others = ranks.share(np.arange(len(others)))
            batch = next(inliers)
            if objective.outlier_weight > 0:
                batch = torch.cat([batch, next(outliers)])
            sums.append(batch.sum())
            if augment is not None:
                positions = np.concatenate([own, len(picks) + own_others])
                share = Share(positions, len(picks) + len(others))
                batch = augment(batch, draws, share).to(batch.dtype)
            # Ranks have a row more or less than others, and the mean of their losses counts.
            weight = ranks.size * len(own) / len(picks)
            others_weight = ranks.size * len(own_others) / max(len(others), 1)
            terms = dataclasses.replace(
                objective, outlier_weight=objective.outlier_weight * others_weight / weight
            )
            step = partial(_step, network, teacher, terms, weight, optimizer)
            done = _in_memory(step, forward, batch, labels)
            if done is None and isinstance(forward, Replayed) and forward.release():
                done = _in_memory(step, forward, batch, labels)
            if done is None:
                trial = partial(step, network.features_and_logits)
                _refuse_batch(trial, batch, labels, recipe, ranks)
            means.append(done)
        network.train(False)
    return means, torch.stack(sums)


def _step(
    network: Network,
    teacher: Network | None,
    objective: Objective,
    weight: float,
    optimizer: torch.optim.Optimizer,
    forward: Forward,
    batch: Tensor,
    labels: Tensor,
) -> Step:
    precision = network.precision.training
    taught = None
    if teacher is not None:
        # A copy, and before the student, as networks may write into their input.
        with torch.no_grad(), autocast(batch.device, precision):
            taught = teacher.logits(batch[: len(labels)].clone())
    with autocast(batch.device, precision):
        features, logits = forward(batch)
    if precision is not None:
        features, logits = features.float(), logits.float()
    taught = None if taught is None else taught.to(logits.dtype)
    loss, cross_entropy, penalty = loss_terms(features, logits, labels, objective, taught)
    optimizer.zero_grad(set_to_none=True)
    (weight * loss).backward()
    optimizer.step()
    with torch.no_grad():
        features, logits = features[: len(labels)], logits[: len(labels)]
        return len(labels), {
            "loss": loss.detach(),
            "cross_entropy": cross_entropy.detach(),
            "penalty": penalty.detach(),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
            "mean_l1": l1(features).mean(),
            "hoyer_index": hoyer_index(features).mean(),
            "id_energy": -torch.logsumexp(logits, dim=1).mean(),
        }


def _in_memory(
    step: Callable[[Forward, Tensor, Tensor], Step],
    forward: Forward,
    batch: Tensor,
    labels: Tensor,
) -> Step | None:
    """What a step gives; None where there is no memory for it."""
    try:
        return step(forward, batch, labels)
    except torch.OutOfMemoryError:
        return None  # with the error goes what it holds


def _refuse_batch(
    step: Callable[[Tensor, Tensor], Step],
    batch: Tensor,
    labels: Tensor,
    recipe: Recipe,
    ranks: Ranks,
) -> NoReturn:
    """Say which batch the memory has room for; the network may be spoilt by trying."""
    # Ranks would wait for each other in a step that not all of them take.
    rows = _most_rows(step, batch, labels) if ranks.size == 1 else 0
    remedy = f"pass batch_size={rows}, the largest that fits now" if rows else "pass a smaller one"
    raise torch.OutOfMemoryError(
        f"{batch.device} has no memory for a training step at batch_size={recipe.batch_size}, of "
        f"which it holds {len(labels)} rows: {remedy}."
    )


def _most_rows(step: Callable[[Tensor, Tensor], Step], batch: Tensor, labels: Tensor) -> int:
    """Most in-distribution rows, and as many outliers, of a step for which there is memory."""
    n_outliers = len(batch) - len(labels)
    # A single row is not tried: batch-norm cannot train on it.
    fitting, failing = 1, len(labels)
    while failing - fitting > 1:
        rows = (fitting + failing) // 2
        outliers = batch[len(labels) :][: min(rows, n_outliers)]
        try:
            step(torch.cat([batch[:rows], outliers]), labels[:rows])
            fitting = rows
        except torch.OutOfMemoryError:
            failing = rows
    return fitting if fitting > 1 else 0


def _epoch_record(epoch: int, steps: list[Step], start: float, ranks: Ranks) -> Record:
    """Means over the rows of an epoch; the device is asked once, at its end."""
    rows = np.array([n_rows for n_rows, _ in steps], dtype=np.float64)
    names = list(steps[0][1])
    own = [rows.sum()]
    for name in names:
        values = torch.stack([means[name] for _, means in steps]).cpu().double().numpy()
        own.append(values @ rows)
    # Now that it has answered, the device has done the work.
    gathered = ranks.gather((np.array(own), time.perf_counter() - start))
    n_rows, *totals = np.sum([sums for sums, _ in gathered], axis=0)
    record: Record = {"epoch": epoch}
    record |= {name: float(total / n_rows) for name, total in zip(names, totals, strict=True)}
    record["seconds"] = max(taken for _, taken in gathered)
    return record


def _check_progress(
    network: Network,
    X: Rows,
    probe: NDArray[np.intp],
    initial_spread: float,
    record: Record,
    remedy: str,
) -> None:
    """Stop where the loss, or what it did to the network, is beyond repair."""
    epoch = record["epoch"]
    if not math.isfinite(record["loss"]):
        raise DivergenceError(
            f"The loss is {record['loss']} in epoch {epoch} (cross-entropy "
            f"{record['cross_entropy']:.4g}, penalty {record['penalty']:.4g}). {remedy}, and check "
            "that X is on the scale that the network expects."
        )
    try:
        spread = _energy_spread(network, X, probe)
    except NonFiniteLogitsError as error:
        raise DivergenceError(
            f"The logits became NaN or infinite in epoch {epoch}. {remedy}, and check that X is on "
            "the scale that the network expects."
        ) from error
    if initial_spread > 0 and spread <= COLLAPSED_SPREAD * initial_spread:
        raise DivergenceError(
            f"The scores collapsed to a constant in epoch {epoch}: the network no longer tells its "
            f"inputs apart. {remedy}."
        )


def _refuse_nonfinite_rows(network: Network, data: TrainingData, objective: Objective) -> None:
    """Refuse rows that hold NaN or infinity, if there are any."""
    outliers = data.outliers if objective.outlier_weight > 0 else data.outliers[:0]
    rows = np.concatenate([data.rows, outliers])
    indices = (rows[piece] for piece in slices(len(rows), STREAM_ROWS))
    for _ in network.batcher.stream(data.X, indices, len(rows)):
        pass


def _remedy(objective: Objective, recipe: Recipe) -> str:
    weights = {
        "sparsity_weight": objective.sparsity_weight,
        "distillation_weight": objective.distillation_weight,
        "learning_rate": recipe.learning_rate,
    }
    return "Lower " + " or ".join(f"{name} (now {v:g})" for name, v in weights.items() if v > 0)


def _energy_spread(network: Network, X: Rows, rows: NDArray[np.intp]) -> float:
    """Range of the energies of some rows, relative to their size; 0 where rounding explains it."""
    energies = np.concatenate(
        [
            torch.logsumexp(logits, dim=1).cpu().numpy()
            for _, _, logits in forward_rows(network, X, rows=rows)
        ]
    )
    spread = float(np.ptp(energies) / max(np.abs(energies).max(), 1e-300))
    return spread if spread > FLOAT32_NOISE else 0.0


def _check_batch_size(
    network: Network, data: TrainingData, objective: Objective, recipe: Recipe
) -> None:
    size, n_ranks = min(recipe.batch_size, len(data.rows)), data.ranks.size
    if size == 1 and any(isinstance(m, _BatchNorm) for m in network.module.modules()):
        raise ValueError(
            f"batch_size={recipe.batch_size} on {len(data.rows)} training rows gives steps of one "
            "row, on which batch-norm cannot train. Pass batch_size of at least 2, and more rows."
        )
    n_outliers = len(data.outliers) if objective.outlier_weight > 0 else size
    if min(size, n_outliers) < n_ranks:
        raise ValueError(
            f"batch_size={recipe.batch_size} on {len(data.rows)} training rows and "
            f"{len(data.outliers)} outliers leaves some of {n_ranks} processes without rows. "
            "batch_size is that of a step on all of them together: pass a larger one, more rows, "
            "or start fewer processes."
        )


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = trainable(network.module)
    if not parameters:
        raise ValueError(
            "The module has no parameter with requires_grad=True, so there is nothing to "
            "fine-tune. Unfreeze some, or set max_epochs=0 to use the network as it is."
        )
    sparse = any(getattr(module, "sparse", False) for module in network.module.modules())
    fused = not sparse and all(p.is_cuda and p.is_floating_point() for p in parameters)
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=fused or None,  # one kernel on a GPU; None leaves the choice to torch
    )
    if fused and recipe.momentum > 0:
        # Which torch asks for where a parameter has its first gradient later than another.
        for p in parameters:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _cosine(recipe: Recipe, steps: int, epoch: int) -> list[float]:
    """Learning rates of an epoch's steps; over all epochs they go down half a cosine."""
    low = min(recipe.final_learning_rate, recipe.learning_rate)
    return [
        low + (recipe.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * step))
        for step in (np.arange(steps) / steps + epoch - 1) / recipe.epochs
    ]


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _permutation(n_rows: int, generator: torch.Generator) -> NDArray[np.intp]:
    return torch.randperm(n_rows, generator=generator, device="cpu").numpy()


def _batches(order: NDArray[np.intp], size: int, n_ranks: int) -> list[NDArray[np.intp]]:
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    too_few = len(batches[-1]) < min(size, max(2, n_ranks)) if len(batches) > 1 else False
    return batches[:-1] if too_few else batches


def _endless_batches(
    rows: NDArray[np.intp], size: int, n_ranks: int, generator: torch.Generator
) -> Iterator[NDArray[np.intp]]:
    while True:
        for picks in _batches(_permutation(len(rows), generator), size, n_ranks):
            yield rows[picks]
