"""One fit of a detector: its rows, labels, seeds, processes and device, while `fit` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from os import PathLike
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from joblib import Memory
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm.auto import tqdm

from .accuracy import warn_if_accuracy_dropped, warn_if_near_chance, warn_if_seen_before
from .caching import TrainingStore, training_key
from .calibration import calibration_split
from .engine.affine import affine_head
from .engine.augmentation import get_augment
from .engine.batches import Batcher, channels_first, moments
from .engine.copying import copy_module
from .engine.distributed import Ranks, digest
from .engine.hardware import resolve_device
from .engine.inference import forward_rows, score_rows
from .engine.network import Network, floating_dtype
from .engine.objective import FINE_TUNING_TERMS, Term, fine_tuning_terms, pretraining_terms
from .engine.opening import check_trainable, open_network
from .engine.outputs import as_float64
from .engine.rows import Rows, as_array, has_channels_last, spaced
from .engine.training import (
    Progress,
    Recipe,
    Training,
    TrainingData,
    pretraining_recipe,
    reproducible,
)
from .exceptions import MemoryEntryWarning, SkoodWarning, ThresholdWarning
from .labels import as_labels, cluster_labels, encode_labels, is_outlier
from .networks import default_network
from .notices import held_back, quoted, warn_user
from .penalties import fit_penalty, get_penalty
from .randomness import random_generator
from .rows import rows_like_fit, warn_if_unscaled
from .scores import Head, Outputs, apply_score, fit_score, get_score
from .scores.protocol import ScoreFunction

__all__ = [
    "Fit",
    "given_network",
    "n_workers",
    "outputs_of",
    "scored",
    "unchanged_on_error",
    "winners_of",
]

Detector = Any
"""A `SparseEnergyOODDetector`, which lives above this module."""

Scores = NDArray[np.float64]
Winners = NDArray[np.int64]

ROWS_OF_A_PENALTY = 1024
"""Rows to whose features a penalty is fitted, at most."""

ROWS_OF_A_TRIAL = 1024
"""Rows on which a score is tried before training, at most."""

ROWS_OF_A_COMPARISON = 16
"""Rows by which the processes of a group see whether they have the same X."""

PARAMETERS_OF_A_RANK = {"module", "device", "num_workers", "memory", "random_state", "verbose"}
"""Parameters that may differ between the processes of a group, or are compared by what they do."""

SHOWN_OF_AN_EPOCH = ("loss", "accuracy", "mean_l1")


@dataclass(frozen=True)
class HeldOut:
    """In-distribution rows that place the threshold, and the logit indices of their labels."""

    rows: Rows
    targets: NDArray[np.int64]


class Seeds(NamedTuple):
    """What is random in a fit, each with a seed of its own."""

    split: int
    clusters: int
    network: int
    pretraining: int
    fine_tuning: int


class Fit:
    """One fit: of a detector, whose parameters are read, to X and y, shared by ranks.

    Of the detector's attributes, those that describe X are set. A TypeError or ValueError says if X
    or y cannot be used, or differ between processes.
    """

    def __init__(self, detector: Detector, X: Any, y: ArrayLike | None, ranks: Ranks) -> None:
        self.detector = detector
        self.ranks = ranks
        get_score(detector.score_function)  # refuses a name that is unknown
        self.rows = rows_like_fit(detector, X, detector.preprocess, reset=True)
        y = self.rows.labels(n_workers(detector)) if y is None else y
        if detector.preprocess is None:
            self.rows.check_finite()
            if detector.module is not None:
                warn_if_unscaled(self.rows)
        self._inliers, self._outliers, self._labels = _split_outliers(self.rows, y, detector)
        self._check_counts()
        self._memory = self._usable_memory()
        self.seeds = self._agreed_seeds(y)
        self.device = ranks.device(resolve_device(detector.device))

    def reproducible(self) -> AbstractContextManager[None]:
        """Inside, torch draws from the seed of the network, and gradients are on."""
        return reproducible(self.seeds.network, self.device)

    def prepared(self) -> tuple[Network, TrainingData, HeldOut]:
        """The network, the rows to train it on, and those held out for the threshold."""
        detector, network = self.detector, None
        if detector.module is not None:
            network = given_network(detector, self.rows.pick(self._inliers), self.device)
        self.classes, targets = self._encoded(network)
        training, held_out = calibration_split(
            targets,
            detector.calibration_size,
            detector.tpr,
            np.random.RandomState(self.seeds.split),
        )
        if network is None:
            network = self._default_network(self.rows.pick(self._inliers[training]))
        rows = self.rows
        if self._pretraining_epochs() != 0 or detector.max_epochs > 0:
            rows = network.batcher.resident(rows)
        if detector.verbose and self.ranks.first:
            print(f"{type(detector).__name__}: {network.describe()}")
        return (
            network,
            TrainingData(
                rows.pick(self._inliers[training]),
                targets[training],
                rows.pick(self._outliers),
                self.ranks,
            ),
            HeldOut(rows.pick(self._inliers[held_out]), targets[held_out]),
        )

    def pretrain(self, network: Network, data: TrainingData) -> list[dict[str, Any]]:
        """Train from scratch, if the network is built or `pretrain_epochs` asks for it."""
        epochs = self._pretraining_epochs()
        recipe = pretraining_recipe(len(data.rows), self.detector.batch_size, epochs)
        terms = pretraining_terms()
        return self._train("pretrain", network, data, terms, recipe, self.seeds.pretraining)

    def fine_tune(self, network: Network, data: TrainingData) -> list[dict[str, Any]]:
        """Fine-tune for sparse features."""
        detector = self.detector
        if detector.max_epochs == 0:
            return []

        def features() -> Tensor:
            pieces = forward_rows(network, data.rows.spaced(ROWS_OF_A_PENALTY), features=True)
            return torch.cat([hidden for _, hidden, _ in pieces if hidden is not None])

        penalty = fit_penalty(get_penalty(detector.penalty), features)
        terms = fine_tuning_terms(penalty, detector.get_params(deep=False))
        recipe = Recipe(
            detector.max_epochs,
            detector.batch_size,
            float(detector.learning_rate),
            float(detector.momentum),
            float(detector.weight_decay),
        )
        return self._train("fine-tune", network, data, terms, recipe, self.seeds.fine_tuning)

    def predicted(self, network: Network, held_out: HeldOut) -> Winners | None:
        """Logit index that the network predicts before fine-tuning for each row held out.

        None without fine-tuning: it will be the same afterwards.
        """
        if self.detector.max_epochs == 0:
            return None
        before = self._winners(network, held_out.rows)
        self._warn_if_near_chance(held_out, before)
        return before

    def scored(
        self, network: Network, held_out: HeldOut, score: ScoreFunction
    ) -> tuple[Scores, Winners]:
        """Score and predicted logit index of each row held out."""
        scores, winners = outputs_of(network, self._share(held_out.rows), score)
        return self.ranks.joined(scores), self.ranks.joined(winners)

    def judged(self, held_out: HeldOut, before: Winners | None, after: Winners) -> dict[str, float]:
        """Accuracy on the rows held out before and after, with a warning if it is suspicious."""
        truth = held_out.targets
        if before is None:
            before = after
            self._warn_if_near_chance(held_out, before)
        warn_if_accuracy_dropped(truth, before, after, self.detector.sparsity_weight)
        if self.detector.calibration_size is None:
            warn_user(
                "The threshold was placed on the training rows (calibration_size=None), which "
                "score higher than fresh ones. So it keeps fewer fresh rows than tpr promises. "
                "Call the detector's calibrate(X_fresh) after fit, with rows that the network has "
                "never seen (detector_.calibrate of a RejectingClassifier).",
                ThresholdWarning,
            )
        elif self._is_given:
            warn_if_seen_before(truth, before)
        return {
            "before": float(np.mean(truth == before)),
            "after": float(np.mean(truth == after)),
        }

    def _warn_if_near_chance(self, held_out: HeldOut, before: Winners) -> None:
        if self._is_given:
            warn_if_near_chance(held_out.targets, before)

    @property
    def _is_given(self) -> bool:
        """Whether the user's network is judged by the user's labels."""
        given = self.detector.module is not None and self._labels is not None
        return given and self._pretraining_epochs() == 0

    def try_score(self, network: Network, data: TrainingData) -> None:
        """Fit and apply the score to a few rows, so that what it refuses shows before training."""
        picks = spaced(len(data.rows), ROWS_OF_A_TRIAL)
        few = TrainingData(data.rows.pick(picks), data.labels[picks], data.outliers)
        with held_back(SkoodWarning):  # of rows too few
            try:
                score = self.fitted_score(network, few)
            except ValueError:
                if len(picks) == len(data.rows):
                    raise
                score = self.fitted_score(network, data)  # more rows may be what it needs
        for _ in scored(network, few.rows.pick(np.arange(1)), score):
            pass

    def fitted_score(self, network: Network, data: TrainingData) -> ScoreFunction:
        """The score, with the statistics of the training rows if it has any."""
        labels = torch.from_numpy(data.labels)
        outputs = (
            Outputs(as_float64(features), logits, labels[piece].to(logits.device))
            for piece, features, logits in forward_rows(network, data.rows, features=True)
            if features is not None
        )
        score = get_score(self.detector.score_function)
        return fit_score(score, outputs, lambda: Head(*affine_head(network, data.rows)))

    def _winners(self, network: Network, rows: Rows) -> Winners:
        """Most likely logit of each row, from the shares of all ranks."""
        return self.ranks.joined(winners_of(network, self._share(rows)))

    def _share(self, rows: Rows) -> Rows:
        return rows.pick(self.ranks.share(np.arange(len(rows))))

    def _check_counts(self) -> None:
        label = self.detector.ood_label
        if len(self._inliers) < 2:
            raise ValueError(
                f"fit got n_samples = {len(self._inliers)} in-distribution row(s) and needs at "
                "least 2, one to train on and one to calibrate on (rows labelled "
                f"ood_label={label!r} do not count)."
            )
        for name, term in FINE_TUNING_TERMS.items():
            weight = getattr(self.detector, name)
            if term.of_outliers and weight > 0 and len(self._outliers) == 0:
                remedy = (
                    "Pass ood_label=, their label in y"
                    if label is None
                    else f"Label some rows of y with ood_label={label!r}, which none carries"
                )
                raise ValueError(
                    f"{name}={weight:g} needs known outliers, and there are none. {remedy}; or set "
                    f"{name}=0."
                )

    def _usable_memory(self) -> str | PathLike[str] | Memory | None:
        detector = self.detector
        if detector.memory is not None and detector.random_state is None:
            warn_user(
                "memory= keeps nothing while random_state=None, as no two fits are alike "
                "then. Pass an int as random_state.",
                MemoryEntryWarning,
            )
            return None
        return detector.memory

    def _pretraining_epochs(self) -> int | None:
        """Epochs of pre-training; None if they depend on the number of rows."""
        if self.detector.pretrain_epochs == "auto":
            return 0 if self.detector.module is not None else None
        return int(self.detector.pretrain_epochs)

    def _encoded(self, network: Network | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Classes, and the logit index of each in-distribution row."""
        rows, labels = self.rows.pick(self._inliers), self._labels
        if network is not None and labels is not None:
            return encode_labels(labels, network.n_logits)
        if network is not None:
            return np.arange(network.n_logits), self._winners(network, rows)
        if labels is None:
            batcher = _batcher(self.detector, torch.device("cpu"), torch.float64)

            def read(picks: NDArray[np.intp]) -> NDArray[np.float64]:
                batches = batcher.stream(rows.pick(picks))
                return torch.cat([batch.flatten(1) for batch in batches]).numpy()

            labels = self.ranks.from_first(cluster_labels(read, len(rows), self.seeds.clusters))
        return np.unique(labels, return_inverse=True)

    def _default_network(self, rows: Rows) -> Network:
        batcher = _batcher(self.detector, self.device, torch.float32)
        if batcher.preprocess is None and has_channels_last((1, *rows.shape)):
            batcher = dataclasses.replace(batcher, preprocess=channels_first)
        mean, std = moments(batcher, rows)
        shape = tuple(batcher(rows, np.arange(1)).shape[1:])
        with torch.device("cpu"):  # whatever device and dtype are the caller's default
            module = default_network(shape, len(self.classes), mean=mean, std=std).float()
        return _opened(self.detector, module, batcher, rows, small_shape=False)

    def _train(
        self,
        phase: str,
        network: Network,
        data: TrainingData,
        terms: list[Term],
        recipe: Recipe,
        seed: int,
    ) -> list[dict[str, Any]]:
        if recipe.epochs == 0:
            return []
        detector, first = self.detector, self.ranks.first
        if detector.module is not None:
            penalized = any(t.parameter == "sparsity_weight" and t.weight > 0 for t in terms)
            check_trainable(network, data.rows, penalized=penalized)
        training = Training(network, data, terms, recipe, seed, get_augment(detector.augment))
        store, resume = None, None
        if self._memory is not None and first:
            key = training_key(network, data, terms, recipe, detector.augment, seed)
            store = TrainingStore(self._memory, key)
            resume = store.load()
        resume = self.ranks.from_first(resume)
        n_kept = 0 if resume is None else len(resume.history)
        with tqdm(
            total=recipe.epochs,
            initial=n_kept,
            desc=f"{phase}, {n_kept} from memory" if n_kept else phase,
            unit="epoch",
            disable=not (detector.verbose and first),
        ) as bar:

            def after_epoch(progress: Progress) -> None:
                if store is not None:
                    store.save(progress)
                bar.set_postfix(
                    {name: f"{progress.history[-1][name]:.4g}" for name in SHOWN_OF_AN_EPOCH}
                )
                bar.update()

            history = training.run(resume, after_epoch)
        return [{"phase": phase, **record} for record in history]

    def _agreed_seeds(self, y: ArrayLike | None) -> Seeds:
        """The seeds of rank 0, once all ranks are known to fit the same."""
        random = random_generator(self.detector.random_state)
        seeds = Seeds(*random.randint(np.iinfo(np.int32).max, size=len(Seeds._fields)).tolist())
        if self.ranks.size == 1:
            return seeds
        if self.detector.compile:
            raise ValueError(
                f"compile=True trains on one process, and there are {self.ranks.size}. Pass "
                "compile=False."
            )
        self.ranks.agree(self._facts(y, seeds))
        return self.ranks.from_first(seeds)

    def _facts(self, y: ArrayLike | None, seeds: Seeds) -> dict[str, str]:
        """What must be the same on all ranks, in a few characters each."""
        rows, detector = self.rows, self.detector
        some = rows.values(spaced(len(rows), ROWS_OF_A_COMPARISON))
        facts = {
            "X": f"{len(rows)} rows of shape {rows.shape}, {rows.dtype}, digest {digest(*some)}",
            "y": "none",
        }
        if y is not None:
            labels, indices = np.unique(as_labels(y, len(rows)), return_inverse=True)
            facts["y"] = f"{len(labels)} labels, digest {digest(labels.astype(str), indices)}"
        module = nn.Module() if detector.module is None else detector.module
        state = (*module.parameters(), *module.buffers())
        values = [x for x in state if not is_lazy(x) and not x.is_meta]
        facts["module"] = (
            f"{type(module).__name__} of {len(state)} tensors, digest {digest(*values)}"
        )
        for name, value in detector.get_params(deep=False).items():
            if name not in PARAMETERS_OF_A_RANK:
                plain = isinstance(value, str | Real | None)
                facts[name] = repr(value) if plain else type(value).__name__
        given = detector.random_state is not None
        facts["random_state"] = f"seeds {tuple(seeds)}" if given else "None"
        facts["memory"] = "none" if self._memory is None else "a folder"
        return facts


def n_workers(detector: Detector) -> int | None:
    """Processes that load rows; None for one a core."""
    return None if detector.num_workers == "auto" else int(detector.num_workers)


def given_network(detector: Detector, rows: Rows, device: torch.device) -> Network:
    """A copy of the detector's module, tried on rows and ready to run."""
    module = copy_module(cast(nn.Module, detector.module))
    batcher = _batcher(detector, device, floating_dtype(module))
    return _opened(detector, module, batcher, rows, small_shape=True)


def scored(
    network: Network, rows: Rows, score: ScoreFunction
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Positions, scores and logits of rows, piece by piece; the score says what it needs."""
    gradient = getattr(score, "uses_gradient", False)
    if gradient and not hasattr(score, "perturbation"):
        raise TypeError(
            f"score_function={quoted(score)} sets uses_gradient, but has no method "
            "perturbation(logits, batch) that gives what to add to the batch."
        )
    return score_rows(
        network,
        rows,
        partial(apply_score, score),
        features=getattr(score, "uses_features", True),
        perturbation=cast(Any, score).perturbation if gradient else None,
    )


def outputs_of(network: Network, rows: Rows, score: ScoreFunction) -> tuple[Scores, Winners]:
    """Score and most likely logit of each row."""
    scores, winners = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
    for piece, some, logits in scored(network, rows, score):
        scores[piece], winners[piece] = as_array(some), as_array(logits.argmax(dim=1))
    return scores, winners


def winners_of(network: Network, rows: Rows) -> Winners:
    """Most likely logit of each row."""
    winners = np.empty(len(rows), dtype=np.int64)
    for piece, _, logits in forward_rows(network, rows):
        winners[piece] = as_array(logits.argmax(dim=1))
    return winners


@contextmanager
def unchanged_on_error(estimator: BaseEstimator) -> Iterator[None]:
    """Give an estimator its attributes back if what is inside fails."""
    before = vars(estimator).copy()
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def _split_outliers(
    rows: Rows, y: ArrayLike | None, detector: Detector
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[Any] | None]:
    """Positions in and out of the distribution, and labels of the former if of several classes."""
    if y is None:
        return np.arange(len(rows)), np.arange(0), None
    labels = as_labels(y, len(rows))
    outlying = is_outlier(labels, detector.ood_label)
    inliers, outliers = np.flatnonzero(~outlying), np.flatnonzero(outlying)
    return inliers, outliers, labels[inliers] if len(np.unique(labels[inliers])) > 1 else None


def _batcher(detector: Detector, device: torch.device, dtype: torch.dtype) -> Batcher:
    return Batcher(device, dtype, detector.preprocess, n_workers(detector))


def _opened(
    detector: Detector,
    module: nn.Module,
    batcher: Batcher,
    rows: Rows,
    small_shape: bool,
) -> Network:
    return open_network(
        module,
        rows,
        head=detector.head,
        batcher=batcher,
        precision=detector.precision,
        compiled=detector.compile,
        small_shape=small_shape,
    )
