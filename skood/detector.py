"""The estimator: fit -> fine-tune -> calibrate -> score."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from joblib import Memory
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .accuracy import warn_if_accuracy_dropped, warn_of_given
from .caching import TrainingStore, training_key
from .calibration import calibration_split, conformal_p_values, place_threshold
from .engine.augmentation import AUGMENTATIONS, get_augment
from .engine.batches import (
    STREAM_ROWS,
    Batcher,
    Rows,
    as_array,
    channels_first,
    check_finite,
    has_channels_last,
    moments,
    slices,
    spaced,
)
from .engine.distributed import Ranks, digest, joined_ranks
from .engine.hardware import resolve_device
from .engine.inference import forward_rows, score_rows
from .engine.loading import (
    is_loadable,
    read_labels,
    row_count,
    row_shape,
)
from .engine.network import (
    Network,
    affine_head,
    check_trainable,
    copy_module,
    floating_dtype,
    on_cpu,
    open_network,
)
from .engine.outputs import as_float64
from .engine.training import (
    Objective,
    Progress,
    Recipe,
    TrainingData,
    pretraining_recipe,
    reproducible,
    train,
)
from .labels import as_labels, cluster_labels, encode_labels, is_outlier
from .networks import default_network
from .penalties import PENALTIES, Penalty, Relative, get_penalty, l1
from .randomness import random_generator
from .rows import as_rows, warn_if_unscaled
from .scores import Head, Outputs, apply_score, fit_score, get_score
from .scores.protocol import ScoreFunction

ScoreArray = NDArray[np.float64]

ROWS_OF_A_UNIT = 1024
"""Rows on which the unit of a relative penalty is measured."""

ROWS_OF_A_TRIAL = 1024
"""Rows on which a score is tried before training, at most."""

ROWS_OF_A_COMPARISON = 16
"""Rows by which the processes of a group see whether they have the same X."""

PARAMETERS_OF_A_RANK = {"module", "device", "num_workers", "memory", "random_state", "verbose"}
"""Parameters that may differ between the processes of a group, or are compared by what they do."""

SHOWN_OF_AN_EPOCH = ("loss", "accuracy", "mean_l1")


class SparseEnergyOODDetector(OutlierMixin, BaseEstimator):
    """Out-of-distribution detector: a classifier fine-tuned for sparse features, and its energy.

    ``fit`` fine-tunes a copy of `module` on in-distribution rows with ``CE(z(x), y) +
    sparsity_weight * mean ||h(x)||_1``, where h are the penultimate features and z the logits, then
    places a threshold on the negative energy that keeps a share `tpr` of in-distribution rows.

    Parameters
    ----------
    module : torch.nn.Module, default=None
        Trained classifier that gives logits (n, K). It is copied and never changed. None builds a
        small network for X and trains it first.
    sparsity_weight : float, default=0.02
        Weight of the penalty, at least 0; 0 fine-tunes on cross-entropy alone.
    penalty : str or callable, default="l1"
        Sparsity measure, see `skood.penalties`: "l1" is the paper's, and the weight of
        "relative_l1" means the same at any width and scale of the features. A callable maps
        features (n, d) to values (n,).
    score_function : str, object or callable, default="energy"
        Score, see `skood.scores`. A callable maps features (n, d) and logits (n, K), both float64,
        to values (n,), higher for in-distribution.
    tpr : float, default=0.95
        Share of in-distribution rows to keep, between 0 and 1.
    calibration_size : "auto", int, float or None, default="auto"
        In-distribution rows, a number or a share, kept out of fine-tuning to place the threshold.
        "auto" is a tenth of them, at least the rows for rank 2 (39 at tpr 0.95), at most a third.
        None uses the training rows, whose scores flatter the detector.
    head : str, default=None
        Name of the submodule whose input are the features and whose output are the logits; None
        finds it.
    pretrain_epochs : "auto" or int, default="auto"
        Epochs of plain cross-entropy first, by a recipe of their own. "auto" is 0 for a given
        module, and enough to train the built network from scratch.
    max_epochs : int, default=10
        Epochs of fine-tuning; 0 uses the network as it is.
    batch_size : int, default=128
        Rows of a training step, on all processes of a torch.distributed group together.
    learning_rate : float, default=1e-3
        Initial learning rate of fine-tuning; it falls along a cosine, step by step, to 1e-6.
    momentum : float, default=0.9
        Nesterov momentum of fine-tuning, at least 0 and below 1.
    weight_decay : float, default=5e-4
        Weight decay of fine-tuning.
    preprocess : callable, default=None
        Applied to each batch of X, a tensor of X's dtype on the device, at training and at scoring;
        returns the network's input with as many rows. Without it, batches are cast to the network's
        floating dtype. Where X has one dimension or holds no numbers (paths, row numbers, objects),
        it gets an array of them and loads them, in worker processes.
    augment : {"flip", "flip-crop"} or callable, default=None
        Applied to each preprocessed training batch. The named ones draw per row; a callable maps a
        batch to a batch.
    ood_label : int, str or bool, default=None
        Label in y of known out-of-distribution rows: not trained on, used by `score`.
    outlier_weight : float, default=0.0
        Above 0, the rows labelled `ood_label` enter the loss: this weight times the cross-entropy
        between the uniform distribution and the prediction (SROE; the paper uses 0.5).
    distillation_weight : float, default=0.0
        Above 0, the loss gains this weight times the divergence from the predictions that the
        network made before fine-tuning, at temperature 2 (self-distillation, not in the paper). It
        holds accuracy, so that a larger `sparsity_weight` can be afforded.
    device : str or torch.device, default="auto"
        Where to compute; "auto" takes a GPU where there is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        "auto" trains convolutional networks in bfloat16 where the hardware has it, and scores in
        the network's own dtype. "float32" autocasts nothing; "bfloat16" autocasts training and
        scoring.
    compile : bool, default=False
        Run the network through torch.compile; on a GPU scoring replays it as a CUDA graph, and
        training that can replay graphs leaves the compiler out.
    num_workers : "auto" or int, default="auto"
        Processes that load the rows of a data set or of references; 0 loads in this process. "auto"
        is one a core on Linux, 0 elsewhere. Arrays of numbers need none.
    memory : path or joblib.Memory, default=None
        Where to keep networks, after each epoch: a fit with the same network, rows and settings
        loads its result, and one that was interrupted goes on after the last epoch. Needs a
        `random_state`.
    random_state : int, RandomState or None, default=None
        Seeds the split, the order of rows, augmentation, dropout and initial weights. None draws
        fresh entropy; no global generator is read or advanced.
    verbose : int, default=0
        1 shows the progress of each epoch and what was chosen.

    Attributes
    ----------
    module_ : torch.nn.Module
        The fine-tuned copy, in evaluation mode.
    head_ : str
        Name of the head in `module_`.
    classes_ : ndarray of shape (K,)
        Label of each logit.
    score_function_ : callable
        The score, with the statistics of the training rows where it has any.
    offset_ : float
        The threshold on `score_samples`.
    tpr_ : float
        The share of in-distribution rows that `offset_` was placed to keep.
    calibration_scores_ : ndarray of shape (m,), float64
        Scores of the calibration rows.
    id_accuracy_ : dict
        Accuracy on the calibration rows "before" and "after" fine-tuning; against the network's own
        labels where y gave none.
    history_ : list of dict
        One record an epoch: "phase" ("pretrain" or "fine-tune"), "epoch", and the means over its
        rows of "loss", "cross_entropy", "penalty", "accuracy", "mean_l1", "hoyer_index" and
        "id_energy" in training mode, and "seconds".
    device_ : torch.device
        Where it computes.
    precision_ : dict
        Dtype in which the network was "training" and is "scoring".
    execution_ : dict
        What was picked for speed: "layout" of the weights of convolutions, "scoring_rows" that
        forwards take, to which requests are padded, whether the network is "compiled", and whether
        training replayed "cuda_graphs".
    n_features_in_ : int
        Number of columns, for X of two dimensions.
    feature_names_in_ : ndarray of str
        Names of the columns, where X has them all as strings.
    input_shape_ : tuple of int
        Shape of a row, for X of more than two dimensions.

    References
    ----------
    Chen & Li, "Sparsity-based regularization for out-of-distribution detection", J. Guilin Univ.
    Electron. Technol. 43(1), 2023. Liu, Wang, Owens & Li, "Energy-based out-of-distribution
    detection", NeurIPS 2020.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skood import SparseEnergyOODDetector
    >>> X, y = load_digits(return_X_y=True)
    >>> detector = SparseEnergyOODDetector(random_state=0).fit(X[:1500], y[:1500])
    >>> bool(detector.predict(X[1500:]).mean() > 0.5)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "module": [nn.Module, None],
        "sparsity_weight": [Interval(Real, 0, None, closed="left")],
        "penalty": [StrOptions(set(PENALTIES)), callable],
        "score_function": [str, callable],
        "tpr": [Interval(Real, 0, 1, closed="neither")],
        "calibration_size": [
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
            Interval(Real, 0, 1, closed="neither"),
            None,
        ],
        "head": [str, None],
        "pretrain_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "momentum": [Interval(Real, 0, 1, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "preprocess": [callable, None],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "ood_label": [Integral, str, "boolean", None],
        "outlier_weight": [Interval(Real, 0, None, closed="left")],
        "distillation_weight": [Interval(Real, 0, None, closed="left")],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "compile": ["boolean"],
        "num_workers": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "memory": [str, PathLike, Memory, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        sparsity_weight: float = 0.02,
        penalty: str | Penalty = "l1",
        score_function: str | ScoreFunction = "energy",
        tpr: float = 0.95,
        calibration_size: str | int | float | None = "auto",
        head: str | None = None,
        pretrain_epochs: str | int = "auto",
        max_epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        augment: str | Callable[[Tensor], Tensor] | None = None,
        ood_label: int | str | bool | None = None,
        outlier_weight: float = 0.0,
        distillation_weight: float = 0.0,
        device: str | torch.device = "auto",
        precision: str = "auto",
        compile: bool = False,
        num_workers: str | int = "auto",
        memory: str | PathLike[str] | Memory | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.module = module
        self.sparsity_weight = sparsity_weight
        self.penalty = penalty
        self.score_function = score_function
        self.tpr = tpr
        self.calibration_size = calibration_size
        self.head = head
        self.pretrain_epochs = pretrain_epochs
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.preprocess = preprocess
        self.augment = augment
        self.ood_label = ood_label
        self.outlier_weight = outlier_weight
        self.distillation_weight = distillation_weight
        self.device = device
        self.precision = precision
        self.compile = compile
        self.num_workers = num_workers
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike | None = None) -> Self:
        """Fine-tune a copy of the network on in-distribution rows, then place the threshold.

        Under ``torchrun``, or in a torch.distributed group, every process calls it with the same
        arguments and takes its share of each batch; all end with the same detector.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...), or Dataset
            Rows as `preprocess` takes them, or without one as the network takes them. A map-style
            torch data set gives x or (x, y).
        y : array-like of shape (n,), default=None
            Labels; None takes those of a data set of pairs. Integers within 0..K-1 are logit
            indices of a given module; other labels need exactly K distinct values, in sorted order.
            Rows labelled `ood_label` are known outliers. Without labels, or with a single one, a
            given module labels the rows by its own prediction, and k-means clusters stand in where
            there is no module either.

        Returns
        -------
        self : SparseEnergyOODDetector
            The fitted detector. Where fit fails, it is as it was before.

        Raises
        ------
        ValueError
            If a parameter, X, y or the network's output cannot be used; the message says what to
            pass.
        TypeError
            If a parameter, X or the network's output is of the wrong type.
        RuntimeError
            If the loss becomes NaN or infinite, or the scores collapse to a constant; if another
            process of the group ends, or does not answer within the group's time-out.

        Warns
        -----
        UserWarning
            If the network given does hardly better than chance on y, or implausibly well on its
            calibration rows; if fine-tuning costs accuracy; if there are too few calibration rows
            for `tpr`.
        """
        self._validate_params()
        get_score(self.score_function)  # refuses a name that is unknown
        with _unchanged_on_error(self), joined_ranks() as ranks:
            y = self._labels_of(X, y)
            X = self._check_rows(X, reset=True)
            if self.preprocess is None and not is_loadable(X):
                check_finite(X)
            if self.module is not None and self.preprocess is None:
                warn_if_unscaled(X)
            inliers, outliers, labels = self._split_outliers(X, y)
            self._check_counts(inliers, outliers)
            if self.memory is not None and self._usable_memory() is None:
                warnings.warn(
                    "memory= keeps nothing while random_state=None, as no two fits are alike "
                    "then. Pass an int as random_state.",
                    UserWarning,
                    stacklevel=2,
                )
            seeds = self._agree(ranks, X, y, _draw_seeds(self.random_state))
            self._seed_of_network = seeds.network
            device = ranks.device(resolve_device(self.device))
            with reproducible(seeds.network, device):
                network = self._given_network(X, inliers, device)
                self.classes_, targets = self._encode(labels, network, X, inliers, seeds, ranks)
                training, held_out = calibration_split(
                    targets, self.calibration_size, self.tpr, np.random.RandomState(seeds.split)
                )
                data = TrainingData(X, inliers[training], targets[training], outliers, ranks)
                calibration, truth = inliers[held_out], targets[held_out]
                if network is None:
                    network = self._default_network(data, device)
                if self._pretraining_epochs() != 0 or self.max_epochs > 0:
                    X = network.batcher.resident(X)
                    data = dataclasses.replace(data, X=X)
                if self.verbose and ranks.first:
                    print(f"{type(self).__name__}: {network.describe()}")
                self._try_score(network, data)
                self.history_ = self._pretrain(network, data, seeds)
                self._pretrained = copy.deepcopy(network) if self.history_ else None
                is_given = self.module is not None and labels is not None and not self.history_
                before = None
                if self.max_epochs > 0:  # else it will be as after
                    before = ranks.joined(self._winners(network, X, ranks.share(calibration)))
                    if is_given:
                        warn_of_given(truth, before)
                self.history_ += self._fine_tune(network, data, seeds)
                self.score_function_ = self._fitted_score(network, data)
            outputs = self._outputs(network, X, ranks.share(calibration))
            scores, after = map(ranks.joined, outputs)
            if before is None:
                before = after
                if is_given:
                    warn_of_given(truth, before)
            warn_if_accuracy_dropped(truth, before, after, self.sparsity_weight)
            self.id_accuracy_ = {
                "before": float(np.mean(truth == before)),
                "after": float(np.mean(truth == after)),
            }
            self._network = network
            self._place_threshold(scores, self.tpr)
        return self

    def id_accuracy(self, X: Any, y: ArrayLike | None = None) -> dict[str, float]:
        """Accuracy of the classifier before and after fine-tuning, on in-distribution rows.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...), or Dataset
            Rows like those of `fit`.
        y : array-like of shape (n,), default=None
            Labels, those in `classes_`; rows labelled `ood_label` are left out. None takes those of
            a data set of pairs.

        Returns
        -------
        dict
            Share of right classes "before" (the network given, or the one built, pre-trained) and
            "after" fine-tuning.

        Raises
        ------
        ValueError
            If there are no labels, no in-distribution rows, or labels that are not in `classes_`.
        """
        check_is_fitted(self)
        y = self._labels_of(X, y)
        X = self._check_rows(X)
        if y is None:
            raise ValueError("id_accuracy needs labels: pass y, one label of `classes_` a row.")
        labels = as_labels(y, row_count(X))
        rows = np.flatnonzero(~is_outlier(labels, self.ood_label))
        if len(rows) == 0 or not np.isin(labels[rows], self.classes_).all():
            raise ValueError(
                f"id_accuracy got y with the labels {np.unique(labels)[:12].tolist()}; expected "
                f"those of the classifier, {self.classes_[:12].tolist()}, and perhaps "
                f"ood_label={self.ood_label!r}."
            )
        with reproducible(self._seed_of_network, self.device_):  # for lazy layers, as in fit
            before = self._pretrained or self._given_network(X, rows, self.device_)
        return {
            name: float(np.mean(self.classes_[self._winners(network, X, rows)] == labels[rows]))
            for name, network in {"before": before, "after": self._network}.items()
            if network is not None
        }

    def calibrate(self, X: Any, tpr: float | None = None) -> Self:
        """Move the threshold to fresh in-distribution rows, without training again.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            In-distribution rows that neither the network nor the detector was trained on.
        tpr : float, default=None
            Share of in-distribution rows to keep, between 0 and 1; None takes the parameter
            ``tpr``.

        Returns
        -------
        self : SparseEnergyOODDetector
            The detector, with new `offset_`, `tpr_` and `calibration_scores_`.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If `tpr` is out of range, or X does not look like the rows of `fit`.

        Warns
        -----
        UserWarning
            If there are too few rows for `tpr`.
        """
        check_is_fitted(self)
        tpr = self.tpr if tpr is None else tpr
        constraint = {"tpr": self._parameter_constraints["tpr"]}
        validate_parameter_constraints(constraint, {"tpr": tpr}, caller_name="calibrate")
        self._place_threshold(self.score_samples(X), tpr)
        return self

    def score_samples(self, X: Any) -> ScoreArray:
        """Score of each row, higher for in-distribution; for "energy" exactly -E(x).

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), float64
            The scores.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If X does not look like the rows of `fit`, or holds NaN or infinity.
        """
        check_is_fitted(self)
        return self._scores(self._check_rows(X))

    def decision_function(self, X: Any) -> ScoreArray:
        """Score measured from the threshold: at least 0 for rows taken as in-distribution.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), float64
            ``score_samples(X) - offset_``.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Whether each row is in-distribution.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), int64
            +1 for in-distribution, -1 for out-of-distribution.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def p_values(self, X: Any) -> ScoreArray:
        """Conformal p-value of "this row is in-distribution", against the calibration scores.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), float64
            The p-values; `predict` is -1 exactly where ``p <= 1 - tpr_``, given enough calibration
            rows for `tpr_`.

        References
        ----------
        Bates et al., "Testing for outliers with conformal p-values", Ann. Statist. 51(1), 2023.
        """
        return conformal_p_values(self.score_samples(X), self.calibration_scores_, self.tpr_)

    def predict_class(self, X: Any, reject_label: Any = None) -> NDArray[Any]:
        """Class of each row, or a label of rejection where the row is out-of-distribution.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        reject_label : int, str or bool, default=None
            Returned where `predict` is -1; must not be one of `classes_`. None rejects nothing.

        Returns
        -------
        ndarray of shape (n,)
            Labels; of dtype object where `reject_label` is of another kind than the classes.

        Raises
        ------
        ValueError
            If `reject_label` is one of `classes_`.
        """
        check_is_fitted(self)
        if reject_label is not None and reject_label in self.classes_.tolist():
            raise ValueError(
                f"reject_label={reject_label!r} is one of the classes "
                f"{self.classes_.tolist()[:12]}; pass a label that no class has."
            )
        X = self._check_rows(X)
        if reject_label is None:
            return self.classes_[self._winners(self._network, X)]
        scores, winners = self._outputs(self._network, X)
        labels = self.classes_[winners]
        kinds = {np.asarray(reject_label).dtype.kind, labels.dtype.kind}
        if len(kinds) > 1 and kinds != {"i", "u"}:
            labels = labels.astype(object)
        # As an array: a Python int would take the dtype of the labels, which may be unsigned.
        return np.where(scores - self.offset_ >= 0, labels, np.asarray(reject_label))

    def predict_class_proba(self, X: Any) -> ScoreArray:
        """Softmax probabilities of the classes, in the order of `classes_`.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n, K), float64
            Probabilities; each row sums to 1.
        """
        check_is_fitted(self)
        pieces = forward_rows(self._network, self._check_rows(X))
        return np.concatenate([as_array(torch.softmax(logits, dim=1)) for _, _, logits in pieces])

    def features(self, X: Any) -> NDArray[Any]:
        """Penultimate features: what enters the head.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n, d)
            Features, in the dtype of the network (float32 where it is bfloat16).
        """
        check_is_fitted(self)
        pieces = forward_rows(self._network, self._check_rows(X), features=True)
        return np.concatenate([as_array(hidden) for _, hidden, _ in pieces if hidden is not None])

    def score(self, X: Any, y: ArrayLike | None = None) -> float:
        """AUROC of in-distribution rows against outliers, so that a search needs no ``scoring``.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        y : array-like of shape (n,), default=None
            Labels. Rows labelled `ood_label` are the outliers; without any,
            `skood.model_selection.surrogate_outliers` makes some from X.

        Returns
        -------
        float
            Area under the ROC curve, between 0 and 1.

        Raises
        ------
        ValueError
            If X has no in-distribution rows, or labels that the detector was not trained on; or if
            no row is labelled and no surrogates can be made of X.
        """
        # Imported here, as it takes long, and `import skood` needs nothing of it.
        from .model_selection import make_ood_scorer

        check_is_fitted(self)
        y = self._labels_of(X, y)
        rows = self._check_rows(X)
        label = self.ood_label
        if y is not None and label is not None and len(self._split_outliers(rows, y)[1]) == 0:
            warnings.warn(
                f"No row of y carries ood_label={label!r}, so score makes outliers from X: compare "
                "it with no score on known outliers. In a search, give every test fold some of "
                f"them: cv=InDistributionKFold(ood_label={label!r}).",
                UserWarning,
                stacklevel=2,
            )
            label = None
        score = make_ood_scorer("auroc", ood_label=None if y is None else label)
        return cast(float, score(self, X, y))

    @property
    def module_(self) -> nn.Module:
        """The fine-tuned copy of `module`, in evaluation mode."""
        check_is_fitted(self)
        return self._network.module

    @property
    def head_(self) -> str:
        """Name of the head in `module_`."""
        check_is_fitted(self)
        return self._network.head

    @property
    def device_(self) -> torch.device:
        """Where the detector computes."""
        check_is_fitted(self)
        return self._network.device

    @property
    def precision_(self) -> dict[str, str]:
        """Dtypes in which the network was "training" and is "scoring"."""
        check_is_fitted(self)
        return self._network.dtypes

    @property
    def execution_(self) -> dict[str, Any]:
        """What was picked for speed: "layout", "scoring_rows", "compiled", "cuda_graphs"."""
        check_is_fitted(self)
        return self._network.execution

    def _check_rows(self, X: Any, *, reset: bool = False) -> Rows:
        """X ready to be read row by row, neither copied nor cast, with rows like those of `fit`."""
        rows = as_rows(X, with_preprocess=self.preprocess is not None)
        shape = row_shape(rows)
        if reset:
            for name in {"n_features_in_", "feature_names_in_", "input_shape_"} & set(vars(self)):
                delattr(self, name)
        expected = getattr(self, "input_shape_", None)
        if len(shape) == 1 and expected is None:
            nameless = isinstance(X, np.ndarray | Tensor) and not hasattr(self, "feature_names_in_")
            if not reset and nameless and shape == (self.n_features_in_,):
                return rows  # validate_data would find nothing, in half the time of a small network
            table = X if hasattr(X, "shape") else np.empty((1, *shape))
            validate_data(self, table, reset=reset, skip_check_array=True)
            return rows
        if reset:
            self.input_shape_ = shape
        elif shape != (expected := (self.n_features_in_,) if expected is None else expected):
            raise ValueError(
                f"X has rows of shape {shape}, but {type(self).__name__} was fitted on rows of "
                f"shape {expected}. Pass an array of shape (n, {str(expected)[1:]}."
            )
        return rows

    def _labels_of(self, X: Any, y: ArrayLike | None) -> ArrayLike | None:
        """The labels passed, or else those that a data set brings along."""
        return read_labels(X, self._n_workers) if y is None and isinstance(X, Dataset) else y

    @property
    def _n_workers(self) -> int | None:
        return None if self.num_workers == "auto" else int(self.num_workers)

    def _batcher(
        self, device: torch.device, dtype: torch.dtype, preprocess: Callable[[Any], Tensor] | None
    ) -> Batcher:
        return Batcher(device, dtype, preprocess, self._n_workers)

    def _split_outliers(
        self, X: Rows, y: ArrayLike | None
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[Any] | None]:
        """Rows in and out of the distribution, and labels of the former if of several classes."""
        if y is None:
            return np.arange(row_count(X)), np.arange(0), None
        labels = as_labels(y, row_count(X))
        outlying = is_outlier(labels, self.ood_label)
        inliers, outliers = np.flatnonzero(~outlying), np.flatnonzero(outlying)
        return inliers, outliers, labels[inliers] if len(np.unique(labels[inliers])) > 1 else None

    def _check_counts(self, inliers: NDArray[np.intp], outliers: NDArray[np.intp]) -> None:
        if len(inliers) < 2:
            raise ValueError(
                f"fit got n_samples = {len(inliers)} in-distribution row(s) and needs at least 2, "
                "one to train on and one to calibrate on (rows labelled "
                f"ood_label={self.ood_label!r} do not count)."
            )
        if self.outlier_weight > 0 and len(outliers) == 0:
            raise ValueError(
                f"outlier_weight={self.outlier_weight:g} needs known outliers, but no row of y "
                f"carries ood_label={self.ood_label!r}. Label some rows so, or set "
                "outlier_weight=0."
            )

    def _given_network(
        self, X: Rows, rows: NDArray[np.intp], device: torch.device
    ) -> Network | None:
        if self.module is None:
            return None
        module = copy_module(self.module)
        batcher = self._batcher(device, floating_dtype(module), self.preprocess)
        return self._open(module, batcher, X, rows, few_rows_apart=True)

    def _default_network(self, data: TrainingData, device: torch.device) -> Network:
        preprocess = self.preprocess
        if preprocess is None and has_channels_last((1, *row_shape(data.X))):
            preprocess = channels_first
        batcher = self._batcher(device, torch.float32, preprocess)
        mean, std = moments(batcher, data.X, data.rows)
        shape = tuple(batcher(data.X, data.rows[:1]).shape[1:])
        with torch.device("cpu"):  # whatever device and dtype are the caller's default
            module = default_network(shape, len(self.classes_), mean=mean, std=std).float()
        return self._open(module, batcher, data.X, data.rows, few_rows_apart=False)

    def _open(
        self,
        module: nn.Module,
        batcher: Batcher,
        X: Rows,
        rows: NDArray[np.intp],
        few_rows_apart: bool,
    ) -> Network:
        return open_network(
            module,
            X,
            rows,
            head=self.head,
            batcher=batcher,
            precision=self.precision,
            compiled=self.compile,
            few_rows_apart=few_rows_apart,
        )

    def _encode(
        self,
        labels: NDArray[Any] | None,
        network: Network | None,
        X: Rows,
        rows: NDArray[np.intp],
        seeds: _Seeds,
        ranks: Ranks,
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Classes, and the logit index of each in-distribution row."""
        if network is not None and labels is not None:
            return encode_labels(labels, network.n_logits)
        if network is not None:
            winners = ranks.joined(self._winners(network, X, ranks.share(rows)))
            return np.arange(network.n_logits), winners
        if labels is None:
            batcher = self._batcher(torch.device("cpu"), torch.float64, self.preprocess)

            def read(picks: NDArray[np.intp]) -> NDArray[np.float64]:
                indices = (rows[picks[piece]] for piece in slices(len(picks), STREAM_ROWS))
                batches = batcher.stream(X, indices, len(picks))
                return torch.cat([batch.flatten(1) for batch in batches]).numpy()

            labels = ranks.from_first(cluster_labels(read, len(rows), seeds.clusters))
        return np.unique(labels, return_inverse=True)

    def _pretraining_epochs(self) -> int | None:
        """Epochs of pre-training; None where they depend on the number of rows."""
        if self.pretrain_epochs == "auto":
            return 0 if self.module is not None else None
        return int(self.pretrain_epochs)

    def _pretrain(
        self, network: Network, data: TrainingData, seeds: _Seeds
    ) -> list[dict[str, Any]]:
        epochs = self._pretraining_epochs()
        recipe = pretraining_recipe(len(data.rows), self.batch_size, epochs)
        return self._train("pretrain", network, data, Objective(l1), recipe, seeds.pretraining)

    def _fine_tune(
        self, network: Network, data: TrainingData, seeds: _Seeds
    ) -> list[dict[str, Any]]:
        penalty = get_penalty(self.penalty)
        if isinstance(penalty, Relative):
            rows = spaced(data.rows, ROWS_OF_A_UNIT)
            pieces = forward_rows(network, data.X, rows=rows, features=True)
            penalty = penalty.measured_on(torch.cat([h for _, h, _ in pieces if h is not None]))
        objective = Objective(
            penalty, self.sparsity_weight, self.outlier_weight, self.distillation_weight
        )
        recipe = Recipe(
            self.max_epochs, self.batch_size, self.learning_rate, self.momentum, self.weight_decay
        )
        return self._train("fine-tune", network, data, objective, recipe, seeds.fine_tuning)

    def _train(
        self,
        phase: str,
        network: Network,
        data: TrainingData,
        objective: Objective,
        recipe: Recipe,
        seed: int,
    ) -> list[dict[str, Any]]:
        if recipe.epochs == 0:
            return []
        if self.module is not None:
            penalized = objective.sparsity_weight > 0
            check_trainable(network, data.X, data.rows, penalized=penalized)
        memory, store, resume = self._usable_memory(), None, None
        if memory is not None and data.ranks.first:
            key = training_key(network, data, objective, recipe, self.augment, seed)
            store = TrainingStore(memory, key)
            resume = store.load()
        resume = data.ranks.from_first(resume)
        n_kept = 0 if resume is None else len(resume.history)
        with tqdm(
            total=recipe.epochs,
            initial=n_kept,
            desc=f"{phase}, {n_kept} from memory" if n_kept else phase,
            unit="epoch",
            disable=not (self.verbose and data.ranks.first),
        ) as bar:

            def after_epoch(progress: Progress) -> None:
                if store is not None:
                    store.save(progress)
                bar.set_postfix(
                    {name: f"{progress.history[-1][name]:.4g}" for name in SHOWN_OF_AN_EPOCH}
                )
                bar.update()

            history = train(
                network,
                data,
                objective,
                recipe,
                augment=get_augment(self.augment),
                seed=seed,
                resume=resume,
                after_epoch=after_epoch,
            )
        return [{"phase": phase, **record} for record in history]

    def _agree(self, ranks: Ranks, X: Rows, y: ArrayLike | None, seeds: _Seeds) -> _Seeds:
        """The seeds of rank 0, once all ranks are known to fit the same."""
        if ranks.size == 1:
            return seeds
        if self.compile:
            raise ValueError(
                f"compile=True cannot train on {ranks.size} processes, as batch-norm could not "
                "take its statistics from all of them. Pass compile=False."
            )
        ranks.agree(self._facts(X, y, seeds))
        return ranks.from_first(seeds)

    def _facts(self, X: Rows, y: ArrayLike | None, seeds: _Seeds) -> dict[str, str]:
        """What must be the same on all ranks, in a few characters each."""
        n_rows = row_count(X)
        kind = str(getattr(X, "dtype", type(X).__name__))
        facts = {"X": f"{n_rows} rows of shape {row_shape(X)}, {kind}", "y": "none"}
        if not is_loadable(X):
            some = spaced(np.arange(n_rows), ROWS_OF_A_COMPARISON)
            facts["X"] += f", digest {digest(cast(Any, X)[some])}"
        if y is not None:
            labels, indices = np.unique(as_labels(y, n_rows), return_inverse=True)
            facts["y"] = f"{len(labels)} labels, digest {digest(labels.astype(str), indices)}"
        module = nn.Module() if self.module is None else self.module
        state = (*module.parameters(), *module.buffers())
        values = [x for x in state if not is_lazy(x) and not x.is_meta]
        facts["module"] = (
            f"{type(module).__name__} of {len(state)} tensors, digest {digest(*values)}"
        )
        for name, value in self.get_params(deep=False).items():
            if name not in PARAMETERS_OF_A_RANK:
                plain = isinstance(value, str | Real | None)
                facts[name] = repr(value) if plain else type(value).__name__
        facts["random_state"] = "None" if self.random_state is None else f"seeds {tuple(seeds)}"
        facts["memory"] = "none" if self._usable_memory() is None else "a folder"
        return facts

    def _usable_memory(self) -> str | PathLike[str] | Memory | None:
        return None if self.random_state is None else self.memory

    def _try_score(self, network: Network, data: TrainingData) -> None:
        """Fit and apply the score on a few rows, so that what it refuses shows before training."""
        picks = spaced(np.arange(len(data.rows)), ROWS_OF_A_TRIAL)
        few = dataclasses.replace(data, rows=data.rows[picks], labels=data.labels[picks])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows too few
            try:
                score = self._fitted_score(network, few)
            except ValueError:
                if len(picks) == len(data.rows):
                    raise
                score = self._fitted_score(network, data)  # more rows may be what it needs
        for _ in _score_rows(network, few.X, score, few.rows[:1]):
            pass

    def _fitted_score(self, network: Network, data: TrainingData) -> ScoreFunction:
        """The score, with the statistics of the training rows where it has any."""
        labels = torch.from_numpy(data.labels)
        outputs = (
            Outputs(as_float64(features), logits, labels[piece].to(logits.device))
            for piece, features, logits in forward_rows(
                network, data.X, rows=data.rows, features=True
            )
            if features is not None
        )
        score = get_score(self.score_function)
        return fit_score(score, outputs, lambda: Head(*affine_head(network, data.X, data.rows)))

    def _outputs(
        self, network: Network, X: Rows, rows: NDArray[np.intp] | None = None
    ) -> tuple[ScoreArray, NDArray[np.int64]]:
        """Score and most likely logit of each row, or of those asked for."""
        n_rows = row_count(X) if rows is None else len(rows)
        scores, winners = np.empty(n_rows), np.empty(n_rows, dtype=np.int64)
        for piece, some, logits in _score_rows(network, X, self.score_function_, rows):
            scores[piece], winners[piece] = as_array(some), as_array(logits.argmax(dim=1))
        return scores, winners

    def _scores(self, X: Rows) -> ScoreArray:
        """Score of each row, in no more memory than that of the result."""
        scores = np.empty(row_count(X))
        for piece, some, _ in _score_rows(self._network, X, self.score_function_):
            scores[piece] = as_array(some)
        return scores

    def _winners(
        self, network: Network, X: Rows, rows: NDArray[np.intp] | None = None
    ) -> NDArray[np.int64]:
        """Most likely logit of each row, or of those asked for."""
        winners = np.empty(row_count(X) if rows is None else len(rows), dtype=np.int64)
        for piece, _, logits in forward_rows(network, X, rows=rows):
            winners[piece] = as_array(logits.argmax(dim=1))
        return winners

    def _place_threshold(self, scores: ScoreArray, tpr: float) -> None:
        self.offset_ = place_threshold(scores, tpr)
        self.calibration_scores_, self.tpr_ = scores, tpr

    def __sklearn_clone__(self) -> Self:
        try:
            return super().__sklearn_clone__()
        except Exception:
            if not isinstance(self.module, nn.Module):
                raise
        # copy.deepcopy refuses what an earlier forward has left in a module; our copy takes it.
        parameters = self.get_params(deep=False) | {"module": None}
        twin = type(self)(**{name: clone(p, safe=False) for name, p in parameters.items()})
        return twin.set_params(module=copy_module(self.module))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if isinstance(self.module, nn.Module):
            state = state | {"module": on_cpu(self.module)}
        return state

    def __sklearn_is_fitted__(self) -> bool:
        # scikit-learn would look through all attributes, at every call.
        return hasattr(self, "offset_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


def _score_rows(
    network: Network, X: Rows, score: ScoreFunction, rows: NDArray[np.intp] | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Positions, scores and logits of rows, piece by piece, by what the score declares it needs."""
    gradient = getattr(score, "uses_gradient", False)
    if gradient and not hasattr(score, "perturbation"):
        raise TypeError(
            f"score_function={score!r} sets uses_gradient, but has no method "
            "perturbation(logits, batch) that gives what to add to the batch."
        )
    return score_rows(
        network,
        X,
        partial(apply_score, score),
        rows=rows,
        features=getattr(score, "uses_features", True),
        perturbation=cast(Any, score).perturbation if gradient else None,
    )


class _Seeds(NamedTuple):
    split: int
    clusters: int
    network: int
    pretraining: int
    fine_tuning: int


def _draw_seeds(random_state: int | np.random.RandomState | None) -> _Seeds:
    draws = random_generator(random_state).randint(np.iinfo(np.int32).max, size=len(_Seeds._fields))
    return _Seeds(*draws.tolist())


@contextmanager
def _unchanged_on_error(estimator: BaseEstimator) -> Iterator[None]:
    before = vars(estimator).copy()
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise
