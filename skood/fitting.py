"""One fit of a detector: its rows, labels, seeds, processes and device, while `fit` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from .accuracy import (
    first_of_each_class,
    warn_if_accuracy_dropped,
    warn_if_labels_doubtful,
    warn_if_seen_before,
)
from .caching import DiskMemory, TrainingStore, packed, training_key, unpacked
from .calibration import calibration_split
from .engine.affine import affine_head
from .engine.augmentation import get_augment
from .engine.batches import Batcher, channels_first, moments
from .engine.copying import copy_module
from .engine.distributed import Ranks
from .engine.hardware import resolve_device
from .engine.inference import forward_rows, score_rows
from .engine.network import TRIAL_ROWS, Network, floating_dtype
from .engine.objective import (
    FINE_TUNING_TERMS,
    Penalized,
    Term,
    fine_tuning_terms,
    pretraining_terms,
)
from .engine.opening import check_trainable, folds, open_network, unfold
from .engine.outputs import as_float64
from .engine.precision import widened
from .engine.rounding import blur_message, far_from_zero, rounded_number, rounding_message
from .engine.rows import Rows, as_array, has_channels_last, spaced
from .engine.rowwise import check_row_by_row
from .engine.staleness import warn_if_stale
from .engine.surroundings import default_dtype_for
from .engine.training import (
    Progress,
    Recipe,
    Training,
    TrainingData,
    pretraining_recipe,
    reproducible,
)
from .engine.watch import ROWS_OF_A_SCALE, Scale, Watch
from .exceptions import (
    MemoryEntryWarning,
    RoundedValuesWarning,
    SkoodWarning,
    ThresholdWarning,
)
from .fingerprints import UnreadableError, fingerprint
from .labels import as_labels, cluster_labels, encode_labels, is_outlier
from .networks import default_network
from .notices import first_line, held_back, quoted, warn_user
from .passes import passes_shared
from .penalties import Penalty, fit_penalty, get_penalty
from .randomness import random_generator
from .rows import rows_like_fit, warn_if_unscaled
from .scores import Head, Outputs, TwoViews, apply_score, fit_score, get_score, list_scores
from .scores.protocol import ScoreFunction, uses_gradient

__all__ = [
    "Fit",
    "given_network",
    "memory_of",
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

ROWS_APART = 39
"""Rows held out for a score that wants some, or to judge, at least, as for the threshold."""

ROWS_OF_A_JUDGE = 1000
"""Rows held out to judge what may be chosen, at most."""

OUTLIERS_OF_A_JUDGE = 2
"""Surrogate outliers of all kinds together, for each row that judges."""

ROWS_OF_A_CHECK, MOST_ROWS_OF_A_CHECK = 100, 256
"""Rows held out by which fine-tuning is checked, at least and at most."""

TRAINED_FOR_A_CHECK = 32
"""Rows that fine-tuning takes for each of these, so that the check takes little of its time."""

KNOWN = "outliers"
"""Kind of the outliers that the user knows."""

AUTO = "auto"
"""What a parameter is that `fit` chooses."""

CHOSEN = ("sparsity_weight", "score_function")
"""Parameters that `fit` can choose."""

ROWS_TURNED = 64
"""Images by which it is told if a network takes turned ones for what they were, at most."""

LEAST_SAME = 2 / 3
"""Share of the turned images that a network takes for what they were, if they are pictures."""

ROWS_OF_A_TRIAL = 1024
"""Rows on which a score is tried before training, at most."""

ROWS_OF_A_CLASS = 20
"""Rows of each class by which the order of the labels is judged, at most."""

PARAMETERS_OF_A_RANK = {"module", "device", "num_workers", "memory", "random_state", "verbose"}
"""Parameters that may differ between the processes of a group, or are compared by what they do."""

SHOWN_OF_AN_EPOCH = ("loss", "accuracy", "mean_l1")


@dataclass(frozen=True)
class HeldOut:
    """In-distribution rows that place the threshold, and the logit indices of their labels."""

    rows: Rows
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Passes:
    """Outputs of rows, piece by piece; each iteration is a pass through the network."""

    network: Network
    rows: Rows
    targets: NDArray[np.int64]

    def __iter__(self) -> Iterator[Outputs]:
        labels = torch.from_numpy(self.targets)
        for piece, features, logits in forward_rows(self.network, self.rows, features=True):
            if features is not None:
                yield Outputs(as_float64(features), logits, labels[piece].to(logits.device))


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
            self._judging_outliers, self._trained_outliers = self._parted_outliers()
            self._check_counts()
            self._memory = self._usable_memory()
            self.device = ranks.device(resolve_device(detector.device))
            seeds = _drawn_seeds(detector)
            facts = self._facts(y, seeds) if ranks.size > 1 else {}
        ranks.agree(facts)
        self.seeds = ranks.from_first(seeds)
        self._rounded = False
        self._tried: set[bool] = set()
        self.outliers_to_judge: dict[str, Rows] = {}

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

    def prepared(self) -> tuple[Network, TrainingData, HeldOut]:
        """The network, the rows to train it on, and those held out for the threshold."""
        detector, network = self.detector, None
        if detector.module is not None:
            network = given_network(detector, self.rows.pick(self._inliers), self.device)
            self._warn_if_rounded(network.batcher)
        self.classes, targets = self._encoded(network)
        training, held_out = calibration_split(
            targets,
            detector.calibration_size,
            detector.tpr,
            np.random.RandomState(self.seeds.split),
        )
        training, judging = self._apart_to_judge(targets, training)
        training, apart = self._apart_for_scores(targets, training)
        self.scale = HeldOut(self.rows.pick(self._inliers[apart]), targets[apart])
        self.judging = HeldOut(self.rows.pick(self._inliers[judging]), targets[judging])
        if detector.calibration_size is None:
            held_out = training
        if self._chosen:
            self._set_rows_to_judge(network, judging, self._apart_to_share(apart, training))
        else:
            self._set_rows_to_check(network, held_out, len(training))
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
                rows.pick(self._trained_outliers),
                self.ranks,
            ),
            HeldOut(rows.pick(self._inliers[held_out]), targets[held_out]),
        )

    def _apart_for_scores(
        self, targets: NDArray[np.int64], training: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to train on, and rows that the scores see as rows held out, if one wants any.

        They are not those that place the threshold: it would keep fewer rows than promised.
        """
        if not self._scores_of_held_out() or self.detector.calibration_size is None:
            return training, training
        what = f"score_function={quoted(self.detector.score_function)}"
        return self._apart(targets, training, what, "score")

    def _scores_of_held_out(self) -> list[ScoreFunction]:
        """Scores that see rows held out."""
        scores = map(get_score, self.scores.values())
        return [score for score in scores if getattr(score, "uses_held_out", False)]

    def _apart_to_share(
        self, apart: NDArray[np.intp], training: NDArray[np.intp]
    ) -> NDArray[np.intp]:
        """Rows held out for the scores that may judge as well: more rows tell more.

        "two_views" takes from them only where values lie and how far they spread. Another score
        may remember them.
        """
        held_out = apart is not training
        if held_out and all(isinstance(score, TwoViews) for score in self._scores_of_held_out()):
            return apart[spaced(len(apart), ROWS_OF_A_JUDGE)]
        return apart[:0]

    def _apart_to_judge(
        self, targets: NDArray[np.int64], training: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to train on, and rows that judge what may be chosen, if anything may."""
        if not self._chosen:
            return training, training[:0]
        what = f'{self._chosen[0]}="auto"'
        return self._apart(targets, training, what, "value", at_most=ROWS_OF_A_JUDGE)

    @property
    def _chosen(self) -> list[str]:
        """Parameters that are to be chosen."""
        return [name for name in CHOSEN if is_auto(getattr(self.detector, name))]

    def _parted_outliers(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Known outliers that judge, and those to train on: apart, if something is chosen."""
        outliers, detector = self._outliers, self.detector
        if not self._chosen:
            return outliers[:0], outliers
        terms = FINE_TUNING_TERMS.items()
        if not any(term.of_outliers and getattr(detector, name) > 0 for name, term in terms):
            return outliers, outliers[:0]
        return outliers[1::2], outliers[::2]

    def _set_rows_to_judge(
        self, network: Network | None, judging: NDArray[np.intp], also: NDArray[np.intp]
    ) -> None:
        """In-distribution rows, and outliers of each kind, known or made, to judge detection by."""
        inliers = self.rows.pick(self._inliers[np.append(judging, also)])
        if len(self._judging_outliers) > 0:
            self.inliers_to_judge = inliers
            self.outliers_to_judge = {KNOWN: self.rows.pick(self._judging_outliers)}
            return
        # Imported here, as few fits need it, and it takes long.
        from .model_selection.surrogates import INSTEAD, finite_rows, surrogates_by_kind

        workers, random = n_workers(self.detector), np.random.RandomState(self.seeds.judging)
        values = originals = inliers.in_memory(workers)
        if len(judging) < ROWS_APART:  # of a handful of rows, none of some kinds can be made
            originals = self.rows.pick(self._inliers).in_memory(workers)
        try:
            made = surrogates_by_kind(originals, OUTLIERS_OF_A_JUDGE * len(judging), random)
        except ValueError as error:
            if not self._chosen:
                raise
            (name, *_) = self._chosen
            raise ValueError(
                f'{name}="auto" judges by outliers that it makes of X, and cannot: '
                f"{first_line(error).removesuffix(INSTEAD)}Label known outliers in y, with "
                f"ood_label=; or pass {name} yourself."
            ) from error
        self.outliers_to_judge = {kind: inliers.like(values) for kind, values in made.items()}
        self.inliers_to_judge = self._as_new(network, inliers.like(finite_rows(values)), random)

    def _set_rows_to_check(
        self, network: Network | None, held_out: NDArray[np.intp], n_training: int
    ) -> None:
        """The same, to see if fine-tuning harms a user's image classifier, where nothing is chosen.

        There are none if there are too few rows that place the threshold, or training is short.
        """
        trained = n_training * self.detector.max_epochs
        size = min(trained // TRAINED_FOR_A_CHECK, MOST_ROWS_OF_A_CHECK, len(held_out))
        if network is None or self._pretraining_epochs() != 0 or size < ROWS_OF_A_CHECK:
            return
        picks = held_out[spaced(len(held_out), size)]
        try:
            if self._are_images(picks[:1]):
                with held_back(SkoodWarning):
                    self._set_rows_to_judge(network, picks, picks[:0])
        except Exception:  # of a network or preprocess that takes no other rows than the user's
            self.outliers_to_judge = {}

    def _are_images(self, picks: NDArray[np.intp]) -> bool:
        """Whether rows have the shape of images, and values that may be others: not indices."""
        values = self.rows.pick(self._inliers[picks]).in_memory(n_workers(self.detector))
        is_raw = self.detector.preprocess is not None and not self.rows.preprocessed
        return values.ndim > 2 and (values.dtype.kind == "f" or is_raw)

    def _as_new(self, network: Network | None, rows: Rows, random: np.random.RandomState) -> Rows:
        """Rows of which a network is no surer than of new ones, if these can be made like that.

        A network that is not trained here may be trained on them. Then images are turned a little,
        unless it takes many of them for others: these are no pictures.
        """
        # Imported here, as few fits need it, and it takes long.
        from .model_selection.surrogates import as_new

        values = rows.in_memory(None)
        if network is None or self._pretraining_epochs() != 0 or values.ndim == 2:
            return rows
        turned = rows.like(as_new(values, random))
        few = (each.spaced(ROWS_TURNED) for each in (rows, turned))
        same = np.mean(np.equal(*(winners_of(network, each) for each in few)))
        return turned if self.ranks.from_first(bool(same >= LEAST_SAME)) else rows

    def _apart(
        self,
        targets: NDArray[np.int64],
        training: NDArray[np.intp],
        what: str,
        other: str,
        at_most: int | None = None,
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to train on, and rows held out of training."""
        share = min(len(training) // 10, at_most or len(training))
        free = len(training) - len(np.unique(targets[training]))
        size = min(max(share, ROWS_APART), max(len(training) // 3, 2), free)
        if size < 2:
            raise ValueError(
                f"{what} holds rows out of training, at least 2, and of {len(training)} rows only "
                f"{max(size, 0)} are free. Pass more rows, or another {other}."
            )
        kept, apart = calibration_split(
            targets[training], size, self.detector.tpr, np.random.RandomState(self.seeds.split)
        )
        return training[kept], training[apart]

    def watch(self, network: Network) -> Watch:
        """What will compare rows with those that the network got here."""
        batches = network.batcher.stream(self.rows.spaced(ROWS_OF_A_SCALE))
        exact = self.detector.module is not None and self.detector.preprocess is None
        return Watch(Scale.of(batches, self.rows.dtype), exact, self._rounded)

    def pretrain(self, network: Network, data: TrainingData) -> list[dict[str, Any]]:
        """Train from scratch, if the network is built or `pretrain_epochs` asks for it."""
        epochs = self._pretraining_epochs()
        recipe = pretraining_recipe(len(data.rows), self.detector.batch_size, epochs)
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

    def recipe(self) -> Recipe:
        """How long and how fast fine-tuning is."""
        detector = self.detector
        return Recipe(
            detector.max_epochs,
            detector.batch_size,
            float(detector.learning_rate),
            float(detector.momentum),
            float(detector.weight_decay),
        )

    def fine_tune(
        self,
        network: Network,
        data: TrainingData,
        penalty: Penalty,
        weight: float,
        *,
        recipe: Recipe | None = None,
        seed: int | None = None,
        before: Network | None = None,
    ) -> list[dict[str, Any]]:
        """Fine-tune for sparse features; the recipe and the seed are the detector's if None.

        `before` is what distillation keeps to, if that is not the network as it is.
        """
        weights = self.detector.get_params(deep=False) | {"sparsity_weight": weight}
        terms = fine_tuning_terms(penalty, weights)
        recipe = self.recipe() if recipe is None else recipe
        seed = self.seeds.fine_tuning if seed is None else seed
        return self._train("fine-tune", network, data, terms, recipe, seed, before)

    def judge_values(self, network: Network, data: TrainingData) -> None:
        """Warn if the user's network goes on with what it computed before it was trained.

        What skood folds of it must still agree with it.
        """
        if not all(self.ranks.gather(folds(network, data.rows))):
            unfold(network, data.rows)
        if self.detector.module is not None and self.ranks.first:
            warn_if_stale(network, self.detector.module, data.rows)

    def predicted(
        self, network: Network, training: TrainingData, held_out: HeldOut
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
        self, network: Network, held_out: HeldOut, score: ScoreFunction
    ) -> tuple[Scores, Winners]:
        """Score and predicted logit index of each row held out."""
        scores, winners = outputs_of(network, self._share(held_out.rows), score)
        return self.ranks.joined(scores), self.ranks.joined(winners)

    def judged(
        self,
        network: Network,
        training: TrainingData,
        held_out: HeldOut,
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
        self, network: Network, training: TrainingData, held_out: HeldOut, before: Winners
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
    def _is_given(self) -> bool:
        """Whether the user's network is judged by the user's labels."""
        given = self.detector.module is not None and self._labels is not None
        return given and self._pretraining_epochs() == 0

    def try_score(self, network: Network, data: TrainingData) -> None:
        """Fit and apply the score to a few rows, so that what it refuses shows before training.

        If the score is yet to be chosen, what a score refuses makes it none to choose.
        """
        if len(self.scores) > 1:
            return
        score = get_score(self.detector.score_function)
        picks = spaced(len(data.rows), ROWS_OF_A_TRIAL)
        few = TrainingData(data.rows.pick(picks), data.labels[picks], data.outliers)
        with held_back(SkoodWarning):  # of rows too few
            try:
                fitted = self.fitted_score(score, network, few, HeldOut(few.rows, few.labels))
            except ValueError:
                if len(picks) == len(data.rows):
                    raise
                # More rows may be what it needs.
                held_out = HeldOut(data.rows, data.labels)
                fitted = self.fitted_score(score, network, data, held_out)
        for _ in scored(network, few.rows.pick(np.arange(1)), fitted):
            pass
        check_score(network, few.rows, fitted)

    def fitted_score(
        self,
        score: ScoreFunction,
        network: Network,
        data: TrainingData,
        held_out: HeldOut | None = None,
    ) -> ScoreFunction:
        """A score, with the statistics of the training rows if it has any."""
        apart = self.scale if held_out is None else held_out
        return fit_score(
            score,
            Passes(network, data.rows, data.labels),
            lambda: head_of(network, data.rows),
            lambda: Passes(network, apart.rows, apart.targets),
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

    def _usable_memory(self) -> DiskMemory | None:
        memory = memory_of(self.detector)
        if memory is None and self.detector.memory is not None:
            warn_user(
                "memory= keeps nothing while random_state=None, as no two fits are alike "
                "then. Pass an int as random_state.",
                MemoryEntryWarning,
            )
        return memory

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
            self._check_trainable(network, data.rows, terms)
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

    def _check_trainable(self, network: Network, rows: Rows, terms: list[Term]) -> None:
        """Refuse to train the user's network in vain, with and without a penalty, each once."""
        penalized = any(t.parameter == "sparsity_weight" and t.weight > 0 for t in terms)
        if penalized not in self._tried:
            given = cast(nn.Module, self.detector.module)
            check_trainable(network, rows, given=given, penalized=penalized)
            self._tried.add(penalized)

    def _facts(self, y: ArrayLike | None, seeds: Seeds) -> dict[str, str]:
        """What must be the same on all ranks, in a few characters each."""
        rows, detector = self.rows, self.detector
        if detector.compile:
            raise ValueError(
                f"compile=True trains on one process, and there are {self.ranks.size}. Pass "
                "compile=False."
            )
        columns = getattr(detector, "feature_names_in_", None)
        pieces = [fingerprint(piece.contiguous()) for piece in rows.compared()]
        shown = f"{len(rows)} rows of shape {rows.shape}, {rows.dtype}"
        facts = {"X": f"{shown}, digest {_digest([columns, pieces])}", "y": "none"}
        if y is not None:
            labels, indices = np.unique(as_labels(y, len(rows)), return_inverse=True)
            facts["y"] = f"{len(labels)} labels, digest {_digest([labels.tolist(), indices])}"
        if (module := detector.module) is not None:
            told = _told(_deciding(module)) or _told([*module.parameters(), *module.buffers()])
            facts["module"] = f"{type(module).__name__}{told}"
        for name, value in detector.get_params(deep=False).items():
            if name not in PARAMETERS_OF_A_RANK:
                plain = isinstance(value, str | Real | None)
                facts[name] = repr(value) if plain else f"{type(value).__name__}{_told(value)}"
        given = detector.random_state is not None
        facts["random_state"] = f"seeds {_digest(list(seeds))}" if given else "None"
        facts["memory"] = "none" if self._memory is None else "a folder"
        return facts


def memory_of(detector: Detector) -> DiskMemory | None:
    """Where what a detector computes is kept; None where nothing would ever be found again."""
    if detector.memory is None or detector.random_state is None:
        return None
    return DiskMemory(detector.memory)


def is_auto(value: Any) -> bool:
    """Whether a parameter leaves the choice to `fit`."""
    return isinstance(value, str) and value == AUTO


def scores_of(detector: Detector) -> dict[str, str | ScoreFunction]:
    """The score by its name; or all that may be chosen, if the choice is left to `fit`.

    A name that is unknown is refused. A score that needs the gradient of the network takes several
    times as long as the others, and is not chosen unasked.
    """
    asked = detector.score_function
    if not is_auto(asked):
        get_score(asked)
        return {asked if isinstance(asked, str) else quoted(asked): asked}
    return {name: name for name in list_scores() if not uses_gradient(get_score(name))}


def _drawn_seeds(detector: Detector) -> Seeds:
    random = random_generator(detector.random_state)
    return Seeds(*random.randint(np.iinfo(np.int32).max, size=len(Seeds._fields)).tolist())


def _deciding(module: nn.Module) -> list[Any]:
    """What must be the same of a module on all ranks: not what a forward has left in it."""
    return [
        (
            name,
            type(part),
            {k: v for k, v in vars(part).items() if isinstance(v, tuple) or _is_plain(v)},
            part._parameters,
            part._buffers,
        )
        for name, part in module.named_modules(remove_duplicate=False)
    ]


def _is_plain(thing: Any) -> bool:
    """Whether a thing is text or a number, or a dict or list of such, as settings are."""
    return all(isinstance(leaf, str | Real | None) for leaf in tree_leaves(thing))


def _told(thing: Any) -> str:
    """A digest of what a thing does, to be read after the name of its type, if it can be told."""
    try:
        return f", digest {_digest(thing)}"
    except UnreadableError:
        return ""


def _digest(thing: Any) -> str:
    return fingerprint(thing).hex()[:8]


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
    gradient = uses_gradient(score)
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


def check_score(network: Network, rows: Rows, score: ScoreFunction) -> None:
    """Refuse a score that mixes rows or draws at random, tried on some rows."""
    some, what = rows.spaced(TRIAL_ROWS), f"score_function={quoted(score)}"
    if uses_gradient(score):  # which is taken from a forward

        def values(picks: NDArray[np.intp]) -> Tensor:
            return torch.cat([got for _, got, _ in scored(network, some.pick(picks), score)])
    else:
        uses_features = getattr(score, "uses_features", True)
        pieces = [*zip(*forward_rows(network, some, features=uses_features), strict=True)][1:]
        # Halfway between rows, as a row that a score was fitted to may be at no distance from it.
        features = _halfway(as_float64(torch.cat(pieces[0]))) if uses_features else None
        logits = _halfway(torch.cat(pieces[1]))

        def values(picks: NDArray[np.intp]) -> Tensor:
            index = torch.from_numpy(picks).to(logits.device)
            return apply_score(score, None if features is None else features[index], logits[index])

    check_row_by_row(what, values, len(some), network.device)


def _halfway(values: Tensor) -> Tensor:
    return (values + values.roll(1, dims=0)) / 2


def head_of(network: Network, rows: Rows) -> Head:
    """The head as an affine layer, for scores that need it; an error if it is none."""
    return Head(*affine_head(network, rows))


def features_of(network: Network, rows: Rows) -> Tensor:
    """Features (n, d) of rows, as training sees them."""
    pieces = forward_rows(network, rows, features=True)
    return torch.cat([widened(hidden) for _, hidden, _ in pieces if hidden is not None])


def check_penalty(network: Network, rows: Rows, penalty: Penalty) -> None:
    """Refuse a penalty that mixes rows or draws at random, tried on some rows."""
    features = features_of(network, rows.spaced(TRIAL_ROWS))
    term = Penalized(penalty, 0.0)
    check_row_by_row(
        f"penalty={quoted(penalty)}",
        lambda picks: term.values(features[torch.from_numpy(picks).to(features.device)]),
        len(features),
        network.device,
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
        fold_batch_norm=detector.fold_batch_norm,
        given=detector.module,
    )
