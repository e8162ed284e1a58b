"""One fit of a detector: its rows, labels, seeds, processes and device, while `fit` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from torch import nn
from tqdm.auto import tqdm

from .accuracy import (
    first_of_each_class,
    warn_if_accuracy_dropped,
    warn_if_labels_doubtful,
    warn_if_seen_before,
)
from .agreement import facts_of
from .caching import DiskMemory, TrainingStore, packed, training_key, unpacked
from .engine.augmentation import get_augment
from .engine.batches import Batcher, channels_first, moments
from .engine.copying import copy_module, weights_digest
from .engine.distributed import Ranks
from .engine.hardware import resolve_device
from .engine.network import Network, floating_dtype, names_before_the_last
from .engine.objective import (
    FINE_TUNING_TERMS,
    Penalized,
    Term,
    fine_tuning_terms,
    pretraining_terms,
)
from .engine.opening import check_trainable, folds, open_network, unfold
from .engine.precision import in_float32
from .engine.rounding import blur_message, far_from_zero, rounded_number, rounding_message
from .engine.rows import Rows, has_channels_last, spaced
from .engine.staleness import warn_if_stale
from .engine.surroundings import default_dtype_for
from .engine.training import (
    SHARES,
    Progress,
    Recipe,
    Training,
    TrainingData,
    pretraining_recipe,
    reproducible,
)
from .engine.watch import ROWS_OF_A_SCALE, Scale, Watch
from .exceptions import (
    FewTrainingRowsWarning,
    MemoryEntryWarning,
    RoundedValuesWarning,
    ThresholdWarning,
)
from .labels import as_labels, cluster_labels, encode_labels, is_outlier
from .networks import default_network
from .notices import held_back, warn_user
from .parameters import (
    Detector,
    batcher_of,
    chosen_parameters,
    is_auto,
    memory_of,
    n_workers,
    pretraining_epochs,
    scores_of,
)
from .parts import parted, parted_outliers
from .passes import passes_shared
from .penalties import Penalty, fit_penalty, get_penalty
from .randomness import random_generator
from .rows import rows_like_fit, warn_if_unscaled
from .scores import fit_score, get_score
from .scores.protocol import ScoreFunction, uses_layers
from .scoring import (
    LabelledRows,
    Passes,
    Scores,
    Winners,
    check_penalty,
    check_score,
    features_of,
    head_of,
    outputs_of,
    scored,
    winners_of,
)

__all__ = ["HOW", "Fit", "Seeds", "given_network", "unchanged_on_error"]

ROWS_OF_A_PENALTY = 1024
"""Rows to whose features a penalty is fitted, at most."""

ROWS_OF_A_TRIAL = 1024
"""Rows on which a score is tried before training, at most."""

ROWS_OF_A_GRADIENT = 32
"""Rows by which it is told what the features depend on, at most."""

ROWS_OF_A_CLASS = 20
"""Rows of each class by which the order of the labels is judged, at most."""

HOW = ("sparsity_weight", "learning_rate", "layers")
"""What a record of an epoch tells of how the network was fine-tuned."""

SHOWN_OF_AN_EPOCH = ("loss", "accuracy", "mean_l1")


class Seeds(NamedTuple):
    """What is random in a fit, each with a seed of its own."""

    split: int
    clusters: int
    network: int
    pretraining: int
    fine_tuning: int
    judging: int


class Fit:
    """One fit: of a detector, whose parameters are read, to X and y, shared by ranks.

    Of the detector's attributes, those that describe X are set. A TypeError or ValueError says if X
    or y cannot be used, or differ between processes.
    """

    def __init__(self, detector: Detector, X: Any, y: ArrayLike | None, ranks: Ranks) -> None:
        self.detector = detector
        self.ranks = ranks
        with ranks.together():
            detector._validate_params()
            self.scores = scores_of(detector)
            self.rows = rows_like_fit(detector, X, detector.preprocess, reset=True)
            y = self.rows.labels(n_workers(detector)) if y is None else y
            if detector.preprocess is None:
                self.rows.check_finite()
                if detector.module is not None:
                    warn_if_unscaled(self.rows)
            self._inliers, self._outliers, self._labels = _split_outliers(self.rows, y, detector)
            self.inliers = self.rows.pick(self._inliers)
            judging, self.trained_outliers = parted_outliers(detector, self._outliers)
            self.outliers_to_judge = self.rows.pick(judging)
            self._check_counts()
            self._memory = self._usable_memory()
            self.device = ranks.device(resolve_device(detector.device))
            self._check_ranks()
            seeds = _drawn_seeds(detector)
            facts = facts_of(detector, self.rows, y, seeds) if ranks.size > 1 else {}
        ranks.agree(facts)
        self.seeds = ranks.from_first(seeds)
        self._rounded = False
        self._tried = False
        self._still: tuple[str, ...] | None = None

    @property
    def chosen(self) -> list[str]:
        """Parameters that are to be chosen."""
        return chosen_parameters(self.detector)

    def shared(self) -> AbstractContextManager[None]:
        """Inside, passes through the network are shared with other fits by way of the memory.

        Several processes share the rows of each pass instead.
        """
        return passes_shared(self._memory if self.ranks.size == 1 else None)

    def reproducible(self) -> AbstractContextManager[None]:
        """Inside, torch draws from the seed of the network, and gradients are on."""
        module = self.detector.module
        own = torch.float32 if module is None else floating_dtype(module)
        return reproducible(self.seeds.network, self.device, default_dtype_for(own))

    def prepared(self) -> tuple[Network, TrainingData, LabelledRows]:
        """The network, the rows to train it on, and those held out for the threshold.

        What classes there are, and which rows are for what, is known from then on. The score is
        tried.
        """
        detector, network = self.detector, None
        if detector.module is not None:
            network = given_network(detector, self.inliers, self.device)
            self._warn_if_rounded(network.batcher)
        self.classes, targets = self._encoded(network)
        scores = [get_score(score) for score in self.scores.values()]
        self.parts = parted(detector, scores, targets, self.seeds.split)
        training, held_out, apart, *both = self.parts
        judging = np.concatenate(both)
        self.apart = LabelledRows(self.inliers.pick(apart), targets[apart])
        self.judging = LabelledRows(self.inliers.pick(judging), targets[judging])
        if network is None:
            network = self._default_network(self.inliers.pick(training))
        rows = self.rows
        if pretraining_epochs(detector) != 0 or detector.max_epochs > 0:
            rows = network.batcher.resident(rows)
        if detector.verbose and self.ranks.first:
            print(f"{type(detector).__name__}: {network.describe()}")
        data = TrainingData(
            rows.pick(self._inliers[training]),
            targets[training],
            rows.pick(self.trained_outliers),
            self.ranks,
        )
        self._try_score(network, data)
        return network, data, LabelledRows(rows.pick(self._inliers[held_out]), targets[held_out])

    @property
    def given(self) -> str | None:
        """By which the weights that are fine-tuned are known again; None if none were given."""
        module = self.detector.module
        if module is None or self.detector.max_epochs == 0:
            return None
        return weights_digest(module)

    def watch(self, network: Network) -> Watch:
        """What will compare rows with those that the network got here."""
        batches = network.batcher.stream(self.rows.spaced(ROWS_OF_A_SCALE))
        exact = self.detector.module is not None and self.detector.preprocess is None
        return Watch(Scale.of(batches, self.rows.dtype), exact, self._rounded)

    def pretrain(self, network: Network, data: TrainingData) -> list[dict[str, Any]]:
        """Train from scratch, if the network is built or `pretrain_epochs` asks for it."""
        epochs = pretraining_epochs(self.detector)
        recipe = pretraining_recipe(len(data.rows), int(self.detector.batch_size), epochs)
        terms = pretraining_terms()
        return self._train("pretrain", network, data, terms, recipe, self.seeds.pretraining)

    def fitted_penalty(self, network: Network, data: TrainingData) -> Penalty:
        """The penalty, with the statistics of the features before fine-tuning if it has any."""
        some, weight = data.rows.spaced(ROWS_OF_A_PENALTY), self.detector.sparsity_weight
        penalty = get_penalty(self.detector.penalty)
        try:
            penalty = fit_penalty(penalty, lambda: features_of(network, some))
        except ValueError:
            if is_auto(weight) or weight > 0:
                raise  # else it is only recorded, in units of its own
        check_penalty(network, data.rows, penalty)
        return penalty

    def mean_penalty(self, network: Network, data: TrainingData, penalty: Penalty) -> float:
        """Mean of a penalty over some training rows."""
        features = features_of(network, data.rows.spaced(ROWS_OF_A_PENALTY))
        return float(Penalized(penalty, 0.0).values(features).mean())

    def fine_tune(
        self,
        network: Network,
        data: TrainingData,
        penalty: Penalty,
        weight: float,
        recipe: Recipe,
        seed: int,
        before: Network | None = None,
    ) -> list[dict[str, Any]]:
        """Fine-tune for sparse features; one record an epoch, which also tells how.

        `before` is what distillation keeps to, if that is not the network as it is.
        """
        weights = self.detector.get_params(deep=False) | {"sparsity_weight": weight}
        terms = fine_tuning_terms(penalty, weights)
        trained = self._train("fine-tune", network, data, terms, recipe, seed, before)
        how = dict(zip(HOW, (weight, recipe.learning_rate, recipe.layers), strict=True))
        return [record | how for record in trained]

    def judge_values(self, network: Network, data: TrainingData) -> None:
        """Warn if the user's network goes on with what it computed before it was trained.

        What skood folds of it must still agree with it.
        """
        if not all(self.ranks.gather(folds(network, data.rows))):
            unfold(network, data.rows)
        if self.detector.module is not None and self.ranks.first:
            warn_if_stale(network, self.detector.module, data.rows)

    def predicted(
        self, network: Network, training: TrainingData, held_out: LabelledRows
    ) -> Winners | None:
        """Logit index that the network predicts before fine-tuning for each row held out.

        None without fine-tuning: it will be the same afterwards.
        """
        if self.detector.max_epochs == 0:
            return None
        before = self._winners(network, held_out.rows)
        self._judge_labels(network, training, held_out, before)
        return before

    def scored(
        self, network: Network, held_out: LabelledRows, score: ScoreFunction
    ) -> tuple[Scores, Winners]:
        """Score and predicted logit index of each row held out."""
        scores, winners = outputs_of(network, self._share(held_out.rows), score)
        return self.ranks.joined(scores), self.ranks.joined(winners)

    def judged(
        self,
        network: Network,
        training: TrainingData,
        held_out: LabelledRows,
        before: Winners | None,
        after: Winners,
        weight: float | None,
    ) -> dict[str, float]:
        """Accuracy on the rows held out before and after, with a warning if it is suspicious."""
        truth = held_out.targets
        if before is None:
            before = after
            self._judge_labels(network, training, held_out, before)
        warn_if_accuracy_dropped(truth, before, after, weight or 0.0)
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

    def _judge_labels(
        self, network: Network, training: TrainingData, held_out: LabelledRows, before: Winners
    ) -> None:
        """Warn if the labels do not fit the user's network; it also predicts some training rows."""
        if not self._is_given or (held_out.targets == before).all():
            return
        more = training.labels[: 0 if self.detector.calibration_size is None else None]
        targets = np.concatenate([held_out.targets, more])
        picks = first_of_each_class(targets, ROWS_OF_A_CLASS)
        n_held_out = len(before)
        further = picks[picks >= n_held_out] - n_held_out
        predictions = np.concatenate(
            [
                before[picks[picks < n_held_out]],
                self._winners(network, training.rows.pick(further)),
            ]
        )
        warn_if_labels_doubtful(
            held_out.targets, before, self.classes, (targets[picks], predictions)
        )

    def _warn_if_rounded(self, batcher: Batcher) -> None:
        """Warn of what the cast to the dtype of the user's network loses."""
        found = None if batcher.preprocess else rounded_number(self.rows, batcher)
        self._rounded = found is not None
        if found is not None:
            warn_user(rounding_message(found, batcher.dtype), RoundedValuesWarning)
            return
        center = far_from_zero(batcher, self.rows)
        if center is not None:
            warn_user(blur_message(center, self.rows, batcher.dtype), RoundedValuesWarning)

    @property
    def comes_trained(self) -> bool:
        """Whether the network is the user's, and not trained anew."""
        return self.detector.module is not None and pretraining_epochs(self.detector) == 0

    @property
    def _is_given(self) -> bool:
        """Whether the user's network is judged by the user's labels."""
        return self.comes_trained and self._labels is not None

    def _try_score(self, network: Network, data: TrainingData) -> None:
        """Fit and apply the score to a few rows, so that what it refuses shows before training.

        If the score is yet to be chosen, what a score refuses makes it none to choose.
        """
        if len(self.scores) > 1:
            return
        score = get_score(self.detector.score_function)
        picks = spaced(len(data.rows), ROWS_OF_A_TRIAL)
        few = TrainingData(data.rows.pick(picks), data.labels[picks], data.outliers)
        with held_back(FewTrainingRowsWarning):
            try:
                fitted = self.fitted_score(score, network, few, LabelledRows(few.rows, few.labels))
            except ValueError:
                if len(picks) == len(data.rows):
                    raise
                # More rows may be what it needs.
                held_out = LabelledRows(data.rows, data.labels)
                fitted = self.fitted_score(score, network, data, held_out)
        for _ in scored(network, few.rows.pick(np.arange(1)), fitted):
            pass
        check_score(network, few.rows, fitted)

    def fitted_score(
        self,
        score: ScoreFunction,
        network: Network,
        data: TrainingData,
        held_out: LabelledRows | None = None,
    ) -> ScoreFunction:
        """A score, with the statistics of the training rows if it has any.

        If it does not look at inner layers, nor does the network from here on.
        """
        if not uses_layers(score):
            network.without_layers()
        apart = self.apart if held_out is None else held_out
        return fit_score(
            score,
            Passes(network, LabelledRows(data.rows, data.labels)),
            lambda: head_of(network, data.rows),
            lambda: Passes(network, apart),
        )

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

    def _check_ranks(self) -> None:
        if self.detector.compile and self.ranks.size > 1:
            raise ValueError(
                f"compile=True trains on one process, and there are {self.ranks.size}. Pass "
                "compile=False."
            )

    def _usable_memory(self) -> DiskMemory | None:
        memory = memory_of(self.detector)
        if memory is None and self.detector.memory is not None:
            warn_user(
                "memory= keeps nothing while random_state=None, as no two fits are alike "
                "then. Pass an int as random_state.",
                MemoryEntryWarning,
            )
        return memory

    def _encoded(self, network: Network | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Classes, and the logit index of each in-distribution row."""
        rows, labels = self.inliers, self._labels
        if network is not None and labels is not None:
            return encode_labels(labels, network.n_logits)
        if network is not None:
            return np.arange(network.n_logits), self._winners(network, rows)
        if labels is None:
            batcher = batcher_of(self.detector, torch.device("cpu"), torch.float64)

            def read(picks: NDArray[np.intp]) -> NDArray[np.float64]:
                batches = batcher.stream(rows.pick(picks))
                return torch.cat([batch.flatten(1) for batch in batches]).numpy()

            labels = self.ranks.from_first(cluster_labels(read, len(rows), self.seeds.clusters))
        return np.unique(labels, return_inverse=True)

    def _default_network(self, rows: Rows) -> Network:
        batcher = batcher_of(self.detector, self.device, torch.float32)
        if batcher.preprocess is None and has_channels_last((1, *rows.shape)):
            batcher = dataclasses.replace(batcher, preprocess=channels_first)
        batcher = dataclasses.replace(batcher, center=far_from_zero(batcher, rows))
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
        before: Network | None = None,
    ) -> list[dict[str, Any]]:
        if recipe.epochs == 0:
            return []
        detector, first = self.detector, self.ranks.first
        if detector.module is not None:
            self._check_trainable(network, data.rows)
        recipe = dataclasses.replace(recipe, still=self._held_still(network, recipe.layers))
        augment = get_augment(detector.augment)
        training = Training(network, data, terms, recipe, seed, augment, before)
        store, resume = None, None
        if self._memory is not None and first:
            decides = (network, data, terms, recipe, detector.augment, seed, before)
            key = self._memory.key(
                partial(training_key, *decides),
                "keeps no training, as it cannot tell what decides it",
            )
            if key is not None:
                store = TrainingStore(self._memory, key)
                resume = store.load(network.public)
        if self.ranks.size > 1:
            sent = self.ranks.from_first(None if resume is None else packed(resume))
            resume = None if sent is None else unpacked(sent, network.public)
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

            with passes_shared(None):  # of the network of each epoch, which is not met again
                history = training.run(resume, after_epoch)
        return [{"phase": phase, **record} for record in history]

    def _check_trainable(self, network: Network, rows: Rows) -> None:
        """Refuse to train the user's network in vain, once; of a penalty, a warning may tell."""
        if not self._tried:
            given, weight = cast(nn.Module, self.detector.module), self.detector.sparsity_weight
            penalized = self.detector.max_epochs > 0 and (is_auto(weight) or weight > 0)
            check_trainable(network, rows, given=given, penalized=penalized)
            self._tried = True

    def _held_still(self, network: Network, layers: str) -> tuple[str, ...]:
        """Parameters before the layers that are trained, which stay still throughout a fit."""
        share = SHARES[layers]
        if share == 1:
            return ()
        if self._still is None:
            size = min(int(self.detector.batch_size), ROWS_OF_A_GRADIENT)
            with in_float32(network):
                batch = network.batcher(self.inliers.spaced(size))
                self._still = tuple(names_before_the_last(network, batch, share))
        return self._still


def _drawn_seeds(detector: Detector) -> Seeds:
    random = random_generator(detector.random_state)
    return Seeds(*random.randint(np.iinfo(np.int32).max, size=len(Seeds._fields)).tolist())


def given_network(detector: Detector, rows: Rows, device: torch.device) -> Network:
    """A copy of the detector's module, tried on rows and ready to run."""
    module = copy_module(cast(nn.Module, detector.module))
    batcher = batcher_of(detector, device, floating_dtype(module))
    return _opened(detector, module, batcher, rows, small_shape=True)


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
        fold_batch_norm=detector.fold_batch_norm,
        layers=any(uses_layers(get_score(score)) for score in scores_of(detector).values()),
        given=detector.module,
    )
