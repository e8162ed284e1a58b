"""The estimator: fit -> fine-tune -> calibrate -> score."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import torch
from joblib import Memory
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.utils import Tags
from sklearn.utils._param_validation import StrOptions, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from . import __version__
from .accuracy import warn_if_tied
from .calibration import (
    SIZE,
    calibration_rank,
    conformal_p_values,
    minimum_rows,
    outliers_at_fdr,
    place_class_thresholds,
    place_threshold,
)
from .engine.augmentation import AUGMENTATIONS
from .engine.copying import copy_module, on_cpu, weights_digest
from .engine.distributed import joined_ranks
from .engine.inference import forward_rows
from .engine.loading import workers_kept
from .engine.network import Network
from .engine.rows import Rows, as_array
from .engine.training import SHARES, reproducible
from .evidence import gathered
from .exceptions import (
    FewCalibrationRowsWarning,
    SavedFileWarning,
    SelectionWarning,
    ThresholdWarning,
)
from .exporting.files import export
from .exporting.module import detector_module
from .fitting import Fit, given_network, unchanged_on_error
from .labels import as_labels, is_outlier
from .notices import Doubts, held_back, quoted, warn_user
from .parameters import n_workers
from .path import fine_tuned
from .penalties import PENALTIES, Penalty
from .rows import rows_like_fit
from .saving import loaded, saved
from .scores.protocol import ScoreFunction
from .scoring import outputs_of, scored, winners_of
from .validation import Number

if TYPE_CHECKING:
    import pandas as pd

    from .monitoring import BatchCheck

ScoreArray = NDArray[np.float64]

LARGEST = float(np.finfo(np.float32).max)
"""What torch takes as a learning rate or weight decay, at most."""


class SparseEnergyOODDetector(OutlierMixin, BaseEstimator):
    """Turn a trained classifier into one that tells which inputs are unlike its training data.

    ``fit`` fine-tunes a copy of the classifier on in-distribution rows, with the loss
    ``CE(z(x), y) + sparsity_weight * mean ||h(x)||_1 / m``. Here h are the penultimate features, z
    the logits, and m is the mean of ``||h(x)||_1`` before fine-tuning. The score of a row is its
    negative energy, ``logsumexp(z(x))``. A row is kept if its score is at least a threshold, which
    keeps a share `tpr` of in-distribution rows. Place it on rows that the classifier has never
    seen: ``fit(X_train, y_train).calibrate(X_fresh)``. With ``penalty="l1", sparsity_weight=0.02``
    the loss is the paper's.

    The parameters, by what they decide:

    - what is learned: `module` to `distillation_weight`;
    - what is detected: `score_function` to `calibration_size`;
    - how it is trained: `pretrain_epochs` to `augment`;
    - how rows arrive: `preprocess` and `num_workers`;
    - where it runs and what is kept: `device` to `verbose`.

    Parameters
    ----------
    module : torch.nn.Module, default=None
        Your trained classifier. It returns logits (n, K); a copy is trained and yours never
        changes. Parts without parameters that require a gradient stay as they are, and so do the
        statistics of their batch-norm. None builds a small network for X and trains it first.
    head : str, default=None
        Name of the last layer, which turns features into logits. None searches for it.
    sparsity_weight : float or "auto", default=1.0
        How strongly sparse features are asked for, at least 0. With 0, fine-tuning minimises the
        cross-entropy alone. "auto" tries several with warm starts, in the last layers, judges each
        on rows held out, and keeps what detects best; see `path_`. It takes about as long as one
        weight.
    penalty : str or callable, default="relative_l1"
        How sparsity is measured, see `skood.penalties`. With "relative_l1" a weight means the same
        at any number and size of the features. "l1" is the paper's, whose weight is 0.02; on the
        paper's networks that is nearly the same as the default. A callable maps features (n, d) to
        values (n,).
    ood_label : int, str or bool, default=None
        Label in y of known outliers. They are not trained on, unless `outlier_weight` is positive;
        `score` compares with them.
    outlier_weight : float, default=0.0
        How strongly uncertain predictions are asked for on known outliers, at least 0: weight of
        the cross-entropy between the uniform distribution and the prediction (SROE; the paper uses
        0.5).
    distillation_weight : float, default=0.0
        How strongly predictions are held to those before fine-tuning, at least 0: weight of their
        divergence at temperature 2 (not in the paper). It protects accuracy, and undoes much of
        what the penalty gains; try a smaller `sparsity_weight` first, then 1 here. The logits
        before are kept, in rows x classes x 4 bytes: 20 MB for 50,000 rows and 100 classes, and
        twice as much if `augment` is "flip". Each step computes them anew with any other `augment`,
        on several processes, in a last batch of another size, where they would take more than 256
        MB, and where the network draws random numbers or rounds a row otherwise at another place.
    score_function : str, object or callable, default="energy"
        What a row is judged by. See `skood.scores` for what each one uses. A callable maps features
        (n, d) and logits (n, K), both float64, to values (n,), higher for in-distribution. "auto"
        chooses among the names, as `sparsity_weight` does; among all but "odin", which is slow.
    tpr : float, default=0.95
        Share of in-distribution rows to keep, between 0 and 1.
    calibration_size : "auto", int, float or None, default="auto"
        In-distribution rows, a number or a share, that are not trained on but place the threshold.
        "auto" is a tenth of them, at least 39 at tpr 0.95 (rank 2), and at most a third. None
        trains on all rows and uses them for the threshold too: follow it with `calibrate`.
    pretrain_epochs : "auto" or int, default="auto"
        Epochs of plain cross-entropy before fine-tuning. "auto" is 0 for your module, and enough to
        train the small network from scratch.
    max_epochs : int, default=10
        Epochs of fine-tuning. 0 uses the network as it is.
    batch_size : int, default=128
        Rows of a training step, on all processes of a torch.distributed group together.
    learning_rate : float, default=1e-3
        Learning rate at the start of fine-tuning. It falls along a cosine to 1e-6, step by step.
    momentum : float, default=0.9
        Nesterov momentum of fine-tuning, at least 0 and below 1.
    weight_decay : float, default=5e-4
        Weight decay of fine-tuning, at least 0.
    layers : {"all", "last"}, default="all"
        Layers whose parameters fine-tuning with a given weight trains; "auto" as `sparsity_weight`
        trains the last. These are the head and, of the others that the features depend on, those
        that the module registered last, until they have at least 70 % of the weights. If the first
        layer alone has over 30 %, that is all of them.
    augment : {"flip", "flip-crop"} or callable, default=None
        Random changes of training batches, after `preprocess`. The named ones draw for each image;
        a callable maps a batch to a batch.
    preprocess : callable, default=None
        Function that turns a batch of X into the input of the network, in training and in scoring.
        It gets a tensor of X's dtype and returns one with as many rows. Without it, batches are
        cast to the network's dtype. If X holds paths or other references, it gets an array of them
        and loads them.
    num_workers : "auto" or int, default="auto"
        Processes that load data sets and references, if that takes more than a moment. "auto" is
        one a core on Linux, 0 elsewhere. 0 loads in this process. Arrays of numbers need none.
    device : str or torch.device, default="auto"
        Where to compute. "auto" takes a GPU if there is one.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Number format of the computation. "auto" trains convolutional networks in bfloat16 if the
        hardware has it and the network works in it, and scores in the network's own dtype.
        "float32" computes in the dtype of the weights. "bfloat16" trains and scores in bfloat16.
        The weights of a network in 16 bits are trained in float32, and rounded at the end.
    compile : bool, default=False
        Whether to run the network through torch.compile. If training can use CUDA graphs, it is not
        compiled. Nor is scoring by what looks at inner layers, such as "three_views".
    fold_batch_norm : bool, default=True
        Whether to score with batch-norms folded into the convolutions and linear layers before
        them, where features and logits stay the same to a relative 1e-5. Inner layers at which the
        score looks are left as they are. It takes memory for a second copy of what is folded.
        `module_` keeps its batch-norms.
    memory : path or joblib.Memory, default=None
        Folder for a checkpoint after each epoch. A repeated fit is loaded; an interrupted one
        resumes. `fit` and the scorers of skood also keep features and logits there, 2 GiB at most,
        which other candidates of a search use again. It needs a `random_state`.
    random_state : int, RandomState or None, default=None
        Seed of all that is random: the split, the order of rows, augmentation, dropout, initial
        weights. None draws fresh entropy. No global generator is read or advanced.
    verbose : int, default=0
        1 shows the progress of each epoch and what was chosen.

    Attributes
    ----------
    module_ : torch.nn.Module
        The fine-tuned copy, in evaluation mode.
    head_ : str or None
        Name of the last layer of `module_`; None if TorchScript hides it.
    classes_ : ndarray of shape (K,)
        Label of each logit.
    sparsity_weight_ : float or None
        The sparsity weight of `module_`; None if it was not fine-tuned.
    path_ : list of dict
        What "auto" tried: one record a "sparsity_weight" and "score_function", in the order of
        training. The weight is None for the network before fine-tuning. "auroc" is the mean over
        the kinds of outliers, "auroc_<kind>", that judge. It is there to compare by, as rows that
        judge may be made (see the notes). "worse" names the kinds of which clearly more are kept
        than before fine-tuning, by the same score. Further "accuracy_before" and "accuracy_after",
        on the in-distribution rows that judge, "mean_l1" of their features, "seconds" to train and
        judge, and whether it was "chosen". Empty if nothing was to be chosen.
    score_function_ : callable
        The score, with its statistics of the training rows if it has any.
    offset_ : float
        The threshold on `score_samples`.
    class_offsets_ : ndarray of shape (K,), float64, or None
        The threshold of each class, after ``calibrate(X, per_class=True)``.
    tpr_ : float
        The share of in-distribution rows that `offset_` was placed to keep.
    calibration_scores_ : ndarray of shape (m,), float64
        Scores of the calibration rows.
    id_accuracy_ : dict
        Accuracy on the calibration rows "before" and "after" fine-tuning. If y has no labels, the
        network's own predictions stand in.
    history_ : list of dict
        One record an epoch: "phase" ("pretrain" or "fine-tune"), "epoch", "seconds", and means over
        its rows, in training mode: "loss", its terms "cross_entropy" and "penalty" and those in use
        of "outlier" and "distillation", "accuracy", "mean_l1", "hoyer_index" and "id_energy".
        Those of fine-tuning have the "sparsity_weight", at its start the "learning_rate", and the
        "layers" that were trained. Of a path, the epochs are those that led to the weight chosen.
    device_ : torch.device
        Where it computes.
    precision_ : dict
        Dtype in which the network was "training" and is "scoring".
    execution_ : dict
        What was picked for speed: "layout" of the weights of convolutions, "scoring_rows" (the
        sizes to which batches are padded), whether the network is "compiled", whether training
        replayed "cuda_graphs", and how many batch-norms are "folded" for scoring.
    n_features_in_ : int
        Number of columns, for X of two dimensions.
    feature_names_in_ : ndarray of str
        Names of the columns, if all are strings.
    input_shape_ : tuple of int
        Shape of a row, for X of more than two dimensions.

    Notes
    -----
    What ``sparsity_weight="auto"`` does: it trains the last layers, whatever `layers` says, with
    the weights 0, 0.3, 1 and 3, as many networks lose by their first layers more than they gain.
    The weights are divided by the mean of the penalty before fine-tuning. Each trains a third of
    `max_epochs`, from where the one before ended (Friedman, Hastie & Tibshirani, "Regularization
    paths for generalized linear models via coordinate descent", J. Stat. Softw. 33(1), 2010, on
    warm starts).
    A tenth of the rows, at most 1,000, is held out to judge: by the accuracy, and by the AUROC
    against rows labelled `ood_label`. If there are none, it is the AUROC against each kind of
    `skood.model_selection.surrogate_outliers` that "auto" takes there. For that, images are turned
    by up to 15 degrees, unless `fit` trains the network first: a network is surer of images that it
    was trained on than of new ones, and turned ones are like new ones to it. If it takes more than
    a third of them for another class then, they are no pictures, and stay as they are. Rows held
    out for "two_views" or "three_views" judge as well.

    Of what loses at most a point of accuracy, the best mean AUROC is kept, the network before
    fine-tuning being one of the choices. No weight is taken that is worse on a kind: with which, at
    the threshold that keeps `tpr` of the rows that judge, more of the kind are kept than before, by
    over a tenth of them and over two standard errors (McNemar, Psychometrika 12, 1947). If the
    score is chosen too, it is "three_views", "two_views" if no inner layers can be looked at, or
    "energy" if features are hidden. Another can be chosen if before fine-tuning it detects no kind
    worse than these do, and its mean is higher by two standard errors over kinds; of tables, one
    kind is made, which is not enough. With a number as `sparsity_weight`, scores are compared after
    fine-tuning. If training diverges at a weight, or the score refuses the network after it, larger
    weights are left out.

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
        "head": [str, None],
        "sparsity_weight": [StrOptions({"auto"}), Number(Real, 0, None, closed="left")],
        "penalty": [StrOptions(set(PENALTIES)), callable],
        "ood_label": [Integral, str, "boolean", None],
        "outlier_weight": [Number(Real, 0, None, closed="left")],
        "distillation_weight": [Number(Real, 0, None, closed="left")],
        "score_function": [str, callable],
        "tpr": [Number(Real, 0, 1, closed="neither")],
        "calibration_size": SIZE,
        "pretrain_epochs": [StrOptions({"auto"}), Number(Integral, 0, None, closed="left")],
        "max_epochs": [Number(Integral, 0, None, closed="left")],
        "batch_size": [Number(Integral, 1, None, closed="left")],
        "learning_rate": [Number(Real, 0, LARGEST, closed="neither")],
        "momentum": [Number(Real, 0, 1, closed="left")],
        "weight_decay": [Number(Real, 0, LARGEST, closed="left")],
        "layers": [StrOptions(set(SHARES))],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "preprocess": [callable, None],
        "num_workers": [StrOptions({"auto"}), Number(Integral, 0, None, closed="left")],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "compile": ["boolean"],
        "fold_batch_norm": ["boolean"],
        "memory": [str, PathLike, Memory, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        module: nn.Module | None = None,
        *,
        head: str | None = None,
        sparsity_weight: str | float = 1.0,
        penalty: str | Penalty = "relative_l1",
        ood_label: int | str | bool | None = None,
        outlier_weight: float = 0.0,
        distillation_weight: float = 0.0,
        score_function: str | ScoreFunction = "energy",
        tpr: float = 0.95,
        calibration_size: str | int | float | None = "auto",
        pretrain_epochs: str | int = "auto",
        max_epochs: int = 10,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        layers: str = "all",
        augment: str | Callable[[Tensor], Tensor] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        num_workers: str | int = "auto",
        device: str | torch.device = "auto",
        precision: str = "auto",
        compile: bool = False,
        fold_batch_norm: bool = True,
        memory: str | PathLike[str] | Memory | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.module = module
        self.head = head
        self.sparsity_weight = sparsity_weight
        self.penalty = penalty
        self.ood_label = ood_label
        self.outlier_weight = outlier_weight
        self.distillation_weight = distillation_weight
        self.score_function = score_function
        self.tpr = tpr
        self.calibration_size = calibration_size
        self.pretrain_epochs = pretrain_epochs
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.layers = layers
        self.augment = augment
        self.preprocess = preprocess
        self.num_workers = num_workers
        self.device = device
        self.precision = precision
        self.compile = compile
        self.fold_batch_norm = fold_batch_norm
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike | None = None) -> Self:
        """Fine-tune a copy of the network on in-distribution rows, then place the threshold.

        Under ``torchrun``, or in a torch.distributed group, every process calls it with the same
        arguments and takes its share of each batch. All end with the same detector.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...), or Dataset
            Rows as `preprocess` takes them; without it, as the network takes them. The items of a
            data set, which may be a list, are x or (x, y).
        y : array-like of shape (n,), default=None
            Labels. None takes those of the data set, if X is one with labels. Integers from 0 to
            K-1 are positions among the logits of your module; other labels need exactly K distinct
            values, which are matched to the logits in sorted order. Rows labelled `ood_label` are
            known outliers. Without labels, or with only one, your module labels the rows by its own
            predictions; without a module, clusters from k-means are the labels.

        Returns
        -------
        self : SparseEnergyOODDetector
            The fitted detector. If fit fails, the detector stays as it was.

        Raises
        ------
        ValueError
            If a parameter, X, y or the network's output cannot be used, or "auto" can make no
            outliers of X; the message says what to pass.
        TypeError
            If a parameter, X or the network's output is of the wrong type.
        DivergenceError
            If the loss or the logits become NaN or infinite, or all scores become the same. With
            "auto" as `sparsity_weight`, if that is so at weight 0, or if the score refuses what the
            network becomes there.
        LostRankError
            If another process of the group ends, or does not answer in time.

        Warns
        -----
        DivergenceWarning
            If that is so at every weight above 0 that "auto" tries.
        LabelOrderWarning
            If the labels seem to be in another order than the logits of your module.
        NearChanceWarning
            If your module classifies hardly better than chance.
        AccuracyDropWarning
            If fine-tuning costs accuracy.
        DetectionDropWarning
            If images are detected clearly worse after fine-tuning than before that are made as
            outliers of those that place the threshold. That needs 100 of these, your own module,
            and 32 rows of training, over all epochs, for each; indices for an embedding are no
            images. With `score_function` "auto" and a weight of yours, whatever judges the scores
            is looked at, tables and known outliers, too. "auto" as `sparsity_weight` never warns.
        PenaltyWithoutEffectWarning
            If the features cannot be trained.
        FewTrainingRowsWarning
            If there are too few rows for the statistics of the score.
        SelectionWarning
            If fewer than 20 known outliers judge what "auto" chooses.
        SlowScoringWarning
            If rows must be scored one by one, or in small batches for lack of memory.
        UnscaledImagesWarning
            If images in uint8 reach your module without `preprocess`.
        RoundedValuesWarning
            If the cast of X to the dtype of your module loses whole numbers, or the detail of
            columns far from 0.
        RandomScoresWarning
            If the network, `preprocess`, the score or the penalty draws random numbers.
        PrecisionWarning
            If the network cannot be trained in bfloat16, and is trained in float32.
        StaleValuesWarning
            If your module keeps what it computed from its weights before training.
        MemoryEntryWarning
            If `memory` keeps nothing, for want of a `random_state` or because it cannot tell what
            decides the training; or if its folder or an entry cannot be used. The fit goes on.

        Notes
        -----
        What is wrong with the threshold is said when it is first used, as `calibrate` may move it
        before: a `ThresholdWarning` if it was placed on rows that the network has probably seen, on
        too few, or on rows of which many score the same.
        """
        with unchanged_on_error(self), workers_kept(), joined_ranks() as ranks:
            run = Fit(self, X, y, ranks)  # refuses early what it cannot use
            with run.shared():
                with run.reproducible():
                    network, training, held_out = run.prepared()
                    evidence = gathered(run, network)
                    self.history_ = run.pretrain(network, training)
                    self._pretrained = network.uncompiled_copy() if self.history_ else None
                    before = run.predicted(network, training, held_out)
                    outcome = fine_tuned(run, evidence, network, training)
                    self.history_ += outcome.history
                    if self.history_:
                        run.judge_values(network, training)
                    self.score_function_ = run.fitted_score(outcome.score, network, training)
                scores, after = run.scored(network, held_out, self.score_function_)
            self.sparsity_weight_, self.path_ = outcome.weight, outcome.path
            self.classes_, self._seed_of_network = run.classes, run.seeds.network
            self._network, self._watch, self._given = network, run.watch(network), run.given
            with held_back(ThresholdWarning) as notices:  # calibrate may move it right afterwards
                self.id_accuracy_ = run.judged(
                    network, training, held_out, before, after, outcome.weight
                )
                self._place_threshold(scores, self.tpr)
            self._doubts = Doubts(notices if ranks.first else [])
        return self

    def id_accuracy(self, X: Any, y: ArrayLike | None = None) -> dict[str, float]:
        """Accuracy of the classifier before and after fine-tuning, on in-distribution rows.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...), or Dataset
            Rows like those of `fit`.
        y : array-like of shape (n,), default=None
            Labels, those in `classes_`; rows labelled `ood_label` are left out. None takes those of
            the data set, if X is one with labels.

        Returns
        -------
        dict
            Share of right classes "before" (the network given, or the one built, pre-trained) and
            "after" fine-tuning.

        Raises
        ------
        ValueError
            If there are no labels, no in-distribution rows, or labels that are not in `classes_`;
            or if the weights of `module` are others than in `fit`.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        y = rows.labels(n_workers(self)) if y is None else y
        if y is None:
            raise ValueError("id_accuracy needs labels: pass y, one label of `classes_` a row.")
        labels = as_labels(y, len(rows))
        inliers = np.flatnonzero(~is_outlier(labels, self.ood_label))
        if len(inliers) == 0 or not np.isin(labels[inliers], self.classes_).all():
            raise ValueError(
                f"id_accuracy got y with the labels {quoted(np.unique(labels).tolist())}; expected "
                f"those of the classifier, {quoted(self.classes_.tolist())}, and perhaps "
                f"ood_label={self.ood_label!r}."
            )
        labels, rows = labels[inliers], rows.pick(inliers)
        after = self.classes_[winners_of(self._network, rows)]
        before = self._classes_before(rows, after)
        return {
            "before": float(np.mean(before == labels)),
            "after": float(np.mean(after == labels)),
        }

    def calibrate(self, X: Any, tpr: float | None = None, *, per_class: bool = False) -> Self:
        """Place the threshold on fresh in-distribution rows, without training again.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            In-distribution rows on which neither the network nor the detector was trained.
        tpr : float, default=None
            Share of in-distribution rows to keep, between 0 and 1; None takes the parameter
            ``tpr``. `skood.calibration.tpr_by_cost` finds the one at which mistakes cost least.
        per_class : bool, default=False
            Whether each predicted class gets a threshold of its own, so that `tpr` of the rows of
            each are kept. With one for all, a class that is hard to tell may lose several times as
            many rows as another.

        Returns
        -------
        self : SparseEnergyOODDetector
            The detector, with new `offset_`, `class_offsets_`, `tpr_` and `calibration_scores_`.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError
            If `tpr` is out of range, or X does not look like the rows of `fit`.

        Warns
        -----
        FewCalibrationRowsWarning
            If there are too few rows for `tpr`, of all or of a class, which then takes the
            threshold of all.
        TiedScoresWarning
            If so many rows score the same that the threshold tells little apart.
        """
        check_is_fitted(self)
        tpr = self.tpr if tpr is None else tpr
        validate_parameter_constraints(
            {"tpr": self._parameter_constraints["tpr"], "per_class": ["boolean"]},
            {"tpr": tpr, "per_class": per_class},
            caller_name="calibrate",
        )
        scores, winners = outputs_of(self._network, self._rows(X), self.score_function_)
        self._place_threshold(scores, tpr, winners if per_class else None)
        self._doubts = Doubts([])
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

        Warns
        -----
        AnotherScaleWarning
            If nearly all rows lie on another scale than those of `fit`; once in each process.
        RoundedValuesWarning
            If the cast of X to the dtype of your module loses whole numbers; once, and if `fit` has
            not said so.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        scores = np.empty(len(rows))
        for piece, some, _ in scored(self._network, rows, self.score_function_):
            scores[piece] = as_array(some)
        return scores

    def decision_function(self, X: Any) -> ScoreArray:
        """Score minus the threshold: at least 0 for rows that are kept as in-distribution.

        The threshold is `offset_`, or that of the predicted class in `class_offsets_` if there are
        any.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), float64
            ``score_samples(X)`` minus the threshold.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        scores, winners = self._scores_and_classes(X)
        self._doubts.warn()
        return scores - self._thresholds(winners)

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

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def p_values(self, X: Any) -> ScoreArray:
        """How unusual each row is among the calibration rows: its conformal p-value.

        A small value means that few calibration rows score as low; of those of its predicted class,
        if each has a threshold of its own. For rows drawn like the calibration rows, the chance of
        a p-value of at most a is at most a.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n,), float64
            The p-values. `predict` gives -1 exactly to rows with ``p <= 1 - tpr_``, if there are
            enough calibration rows for `tpr_`.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.

        References
        ----------
        Bates et al., "Testing for outliers with conformal p-values", Ann. Statist. 51(1), 2023.
        """
        scores, winners = self._scores_and_classes(X)
        self._doubts.warn()
        return self._p_values(scores, winners)

    def select_outliers(self, X: Any, fdr: float = 0.1) -> NDArray[np.bool_]:
        """Outliers of a batch, of which at most a share `fdr` is in-distribution on average.

        Benjamini and Hochberg's procedure on `p_values`. Where `predict` rejects a fixed share of
        in-distribution rows, this rejects few of them in a batch without outliers.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        fdr : float, default=0.1
            False discovery rate, between 0 and 1: mean share of in-distribution rows among those
            selected.

        Returns
        -------
        ndarray of shape (n,), bool
            True for outliers.

        Raises
        ------
        ValueError
            If `fdr` is out of range, or X does not look like the rows of `fit`.

        Warns
        -----
        FewCalibrationRowsWarning
            If no row can ever be selected, because there are fewer than ``1 / fdr - 1`` calibration
            rows.
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.

        Notes
        -----
        The guarantee is that of Bates et al.: it holds if the in-distribution rows of the batch and
        the calibration rows are independent draws of one distribution, on average over both. With m
        calibration rows no p-value is below 1 / (m + 1), so at least n / (fdr (m + 1)) of n rows
        must score lower than all calibration rows before any is selected.

        References
        ----------
        Bates et al., "Testing for outliers with conformal p-values", Ann. Statist. 51(1), 2023,
        theorem 2.
        """
        p_values = self.p_values(X)
        selected = outliers_at_fdr(p_values, fdr)
        n_calibration, of_a_class = len(self.calibration_scores_), ""
        if self._calibration_classes is not None:  # a p-value compares within a class
            n_calibration = int(np.bincount(self._calibration_classes).max())
            of_a_class = " of a class, at most,"
        share_kept = min(1 - fdr, math.nextafter(1, 0))
        if calibration_rank(n_calibration, share_kept) == 0:
            warn_user(
                f"{n_calibration} calibration rows{of_a_class} are too few to select any outliers "
                f"at fdr={fdr:.4g}: that needs at least {minimum_rows(1, share_kept)}. Pass more "
                "rows to calibrate(X), or a higher fdr.",
                FewCalibrationRowsWarning,
            )
        return selected

    def check_batch(self, X: Any, false_alarm: float = 0.01) -> BatchCheck:
        """Whether the rows of a batch, taken together, are like the calibration rows.

        It compares all scores, not only the share of rows that are rejected, so it sees changes
        that move few rows across the threshold.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`, in any order.
        false_alarm : float, default=0.01
            Chance that rows like the calibration rows are called unlike them, between 0 and 1. To
            look at a stream again and again, use `skood.monitoring.DriftMonitor`.

        Returns
        -------
        skood.monitoring.BatchCheck
            The share rejected with intervals, p-values, and a verdict in words.

        Raises
        ------
        ValueError
            If `false_alarm` is out of range, or X does not look like the rows of `fit`.

        Warns
        -----
        SeenRowsWarning
            If most rows score exactly as calibration rows do.
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        # Imported here, as a detector needs nothing of it otherwise.
        from .monitoring import _check_batch

        check_is_fitted(self)
        return _check_batch(self, X, false_alarm)

    def predict_class(self, X: Any, reject_label: Any = None) -> NDArray[Any]:
        """Class of each row, or `reject_label` if the row is out-of-distribution.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        reject_label : int, str or bool, default=None
            Answer for rows to which `predict` gives -1. It must not be one of `classes_`. None
            rejects nothing.

        Returns
        -------
        ndarray of shape (n,)
            Labels. The dtype is object if `reject_label` and the classes are of different types.

        Raises
        ------
        ValueError
            If `reject_label` is one of `classes_`, or is not one label.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        check_is_fitted(self)
        if not (reject_label is None or np.isscalar(reject_label)):
            raise ValueError(
                f"reject_label={quoted(reject_label)} is a {type(reject_label).__name__}; expected "
                "one label for all rows that are rejected, an int, str or bool."
            )
        if reject_label is not None and reject_label in self.classes_.tolist():
            raise ValueError(
                f"reject_label={reject_label!r} is one of the classes "
                f"{quoted(self.classes_.tolist())}; pass a label that no class has."
            )
        rows = self._rows(X)
        if reject_label is None:
            return self.classes_[winners_of(self._network, rows)]
        _, margins, winners = self._judged(rows)
        labels = self.classes_[winners]
        # As an array: a Python int would take the dtype of the labels, which may be unsigned.
        rejected = np.asarray(reject_label)
        kinds = {rejected.dtype.kind, labels.dtype.kind}
        # Of uint64 and a number below 0, numpy would make floats, which round.
        are_integers = kinds <= {"i", "u"} and np.result_type(labels, rejected).kind in "iu"
        if len(kinds) > 1 and not are_integers:
            labels = labels.astype(object)
        return np.where(margins >= 0, labels, rejected)

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
        pieces = forward_rows(self._network, self._rows(X))
        return np.concatenate([as_array(torch.softmax(seen.logits, dim=1)) for _, seen in pieces])

    def predict_frame(self, X: Any) -> pd.DataFrame:
        """Class, score, p-value and decision of each row, from one pass over the rows.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        pandas.DataFrame of shape (n, 4)
            "class", as `predict_class` gives it if nothing is rejected; "score" and "p_value",
            float64; and "rejected", whether `predict` gives -1. The index is that of X, if X is of
            pandas.

        Raises
        ------
        ImportError
            If pandas is not installed.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "predict_frame needs pandas, which is not installed: run `pip install pandas`, or "
                "use predict_class, score_samples, p_values and predict."
            ) from error
        check_is_fitted(self)
        scores, margins, winners = self._judged(self._rows(X))
        columns = {
            "class": self.classes_[winners],
            "score": scores,
            "p_value": self._p_values(scores, winners),
            "rejected": margins < 0,
        }
        return pd.DataFrame(columns, index=X.index if hasattr(X, "iloc") else None)

    def features(self, X: Any) -> NDArray[Any]:
        """Penultimate features: the input of the head.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.

        Returns
        -------
        ndarray of shape (n, d)
            Features, in the dtype of the network (float32 if that is bfloat16).

        Raises
        ------
        HeadNotFoundError
            If the network is TorchScript, which hides its features.
        """
        check_is_fitted(self)
        pieces = forward_rows(self._network, self._rows(X), features=True)
        found = [seen.features for _, seen in pieces]
        return np.concatenate([as_array(features) for features in found if features is not None])

    def score(self, X: Any, y: ArrayLike | None = None) -> float:
        """AUROC of in-distribution rows against outliers, for searches without ``scoring``.

        Parameters
        ----------
        X : array-like or Tensor of shape (n, ...)
            Rows like those of `fit`.
        y : array-like of shape (n,), default=None
            Labels. Rows labelled `ood_label` are the outliers. If there are none,
            `skood.model_selection.surrogate_outliers` makes some from X.

        Returns
        -------
        float
            Area under the ROC curve, between 0 and 1.

        Raises
        ------
        ValueError
            If X has no in-distribution rows, or labels that the detector was not trained on; or if
            no row is labelled `ood_label` and no outliers can be made from X.

        Warns
        -----
        SelectionWarning
            If no row carries the detector's `ood_label`, so that outliers are made from X.
        """
        # Imported here, as it takes long, and `import skood` needs nothing of it.
        from .model_selection import make_ood_scorer

        check_is_fitted(self)
        rows = self._rows(X)
        y = rows.labels(n_workers(self)) if y is None else y
        label = self.ood_label
        labels = None if y is None or label is None else as_labels(y, len(rows))
        if labels is not None and not is_outlier(labels, label).any():
            warn_user(
                f"No row of y carries ood_label={label!r}, so score makes outliers from X: compare "
                "it with no score on known outliers. In a search, give every test fold some of "
                f"them: cv=InDistributionKFold(ood_label={label!r}).",
                SelectionWarning,
            )
            label = None
        score = make_ood_scorer("auroc", ood_label=None if y is None else label)
        return cast(float, score(self, X, y))

    def as_module(self, *, preprocess: bool = True) -> nn.Module:
        """The detector as one module, from raw rows to logits, scores, decisions and p-values.

        It has copies of the network, the score and the threshold, and of ``preprocess`` if that has
        a state, so what is done to the detector later does not reach it. Plain functions are the
        detector's own.

        Parameters
        ----------
        preprocess : bool, default=True
            Whether the parameter ``preprocess`` is a part of it. If not, the module takes what
            ``preprocess`` returns.

        Returns
        -------
        torch.nn.Module
            The module, in evaluation mode, on the detector's device. A batch (n, ...) of rows
            becomes a dict of tensors: "logits" (n, K), "score" (n,) as from `score_samples`,
            "decision" (n,) as from `predict`, and "p_value" (n,) as from `p_values`.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ExportError
            If the network is TorchScript or rounds rows by their batch, the score needs a gradient,
            or ``preprocess`` loads rows by references.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.

        Notes
        -----
        Logits have the network's dtype (float32 if that has 16 bits), decisions are int64. Scores
        and p-values are computed in float64: do not cast the module. Where the detector refuses a
        row, because it, its logits or its score is NaN or infinite, the score is NaN and the row
        is rejected. Gradients reach the rows, but no weight asks for one.
        """
        check_is_fitted(self)
        return detector_module(self, preprocess)

    def export(
        self, path: str | PathLike[str], X: Any = None, *, preprocess: bool = True
    ) -> dict[str, Any]:
        """Write the detector as one graph to a file, which runs without skood.

        The graph is that of `as_module`: from a raw batch of any number of rows, named "rows", to
        "logits", "score", "decision" and "p_value". Before the file appears, it is run on rows on
        both sides of the threshold, and compared with the detector.

        Parameters
        ----------
        path : str or path
            Name of the file. ".onnx" is a graph for ONNX runtimes, and needs ``pip install
            "skood[export]"``; ".pt2" is one for ``torch.export.load``. A file of that name is
            replaced.
        X : array-like or Tensor of shape (n, ...), or Dataset, default=None
            Rows like those of `fit`, some of which are compared; none is kept in the file. The
            graph takes their dtype. None draws random rows, in the dtype of `fit`. If one side of
            the threshold is missing, rows are changed until they reach it.
        preprocess : bool, default=True
            Whether the parameter ``preprocess`` is a part of the graph. If not, the graph takes
            what ``preprocess`` returns.

        Returns
        -------
        dict
            What was compared: the number of "rows", how many of them are "kept" and "rejected" by
            a clear margin, and the "largest_difference" of a score.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ExportError
            If a part of the detector cannot be exported, or the file would differ from the
            detector. Nothing is left behind then.
        ImportError
            If what ".onnx" needs is not installed.
        ValueError, OSError
            If the suffix is another, or the file cannot be written.

        Warns
        -----
        ThresholdWarning
            If the threshold of `fit` is doubtful, at its first use; `calibrate` clears that.
        """
        check_is_fitted(self)
        return export(self, path, X, preprocess=preprocess)

    @property
    def module_(self) -> nn.Module:
        """The fine-tuned copy of `module`, in evaluation mode."""
        check_is_fitted(self)
        return self._network.public

    @property
    def head_(self) -> str | None:
        """Name of the last layer of `module_`; None if TorchScript hides it."""
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
        """What was picked for speed, by name."""
        check_is_fitted(self)
        return self._network.execution

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fitted detector to a file that holds no code.

        Weights and other tensors are kept in the safetensors format, everything else as JSON in its
        metadata. `load` reads it.

        Parameters
        ----------
        path : str or path
            The file; one that is there is replaced. It appears whole or not at all.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        SavedFileError
            If it holds what no such file keeps, such as quantized weights or a label that is a
            date.
        OSError
            If the file cannot be written.

        Warns
        -----
        SavedFileWarning
            If the network has changed in more than its tensors and numbers since `fit` was given
            it, so that it may score otherwise when it is loaded.
        """
        check_is_fitted(self)
        saved(self, path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        module: nn.Module | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        score_function: ScoreFunction | None = None,
    ) -> Self:
        """Read a detector from a file that `save` has written. Nothing in it is executed.

        Networks of `skood.networks`, `NormalizeImages` and the scores of `skood.scores` come back
        by themselves. All other code you pass, as `fit` had it; an error names what is missing or
        does not fit.

        Parameters
        ----------
        path : str or path
            The file.
        module : torch.nn.Module, default=None
            A module of the architecture that `fit` was given. Its weights do not matter, and it
            stays as it is.
        preprocess : callable, default=None
            The function that `fit` was given, if it is not from skood.
        score_function : callable, default=None
            The score that `fit` was given, if it is not from skood. Its statistics are in the file.

        Returns
        -------
        SparseEnergyOODDetector
            The detector. On the same machine its scores are the same to the last bit. A `penalty`
            or `augment` of yours must be set again before it is fitted again, and so must `memory`.

        Raises
        ------
        SavedFileError
            If the file is none of `save`, is damaged, comes from a newer skood, or needs code that
            is not passed or does not fit.
        OSError
            If the file cannot be read.

        Warns
        -----
        DeviceWarning
            If the device of the detector is not available here, so that it computes on the CPU.

        Examples
        --------
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sklearn.datasets import load_digits
        >>> from skood import SparseEnergyOODDetector
        >>> X, y = load_digits(return_X_y=True)
        >>> detector = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=1, random_state=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "detector.safetensors"
        ...     detector.fit(X, y).save(file)
        ...     loaded = SparseEnergyOODDetector.load(file)
        >>> bool((loaded.score_samples(X) == detector.score_samples(X)).all())
        True
        """
        given = {"module": module, "preprocess": preprocess, "score_function": score_function}
        return loaded(cls, path, given)

    def _rows(self, X: Any) -> Rows:
        """X as rows like those of `fit`."""
        return rows_like_fit(self, X, self.preprocess)

    def _scores_and_classes(self, X: Any) -> tuple[ScoreArray, NDArray[np.int64] | None]:
        """Scores, and the logit indices of the predicted classes if thresholds go by them."""
        check_is_fitted(self)
        if self.class_offsets_ is None:
            return self.score_samples(X), None
        return outputs_of(self._network, self._rows(X), self.score_function_)

    def _class_proba_and_kept(self, X: Any) -> tuple[ScoreArray, NDArray[np.bool_]]:
        """What `predict_class_proba` gives, and whether `predict` keeps a row, from one pass."""
        check_is_fitted(self)
        pieces = scored(self._network, self._rows(X), self.score_function_)
        scores, logits = zip(*((some, logits) for _, some, logits in pieces), strict=True)
        self._doubts.warn()
        of_rows = torch.cat(logits)
        margins = as_array(torch.cat(scores).double()) - self._thresholds(
            as_array(of_rows.argmax(dim=1))
        )
        return as_array(torch.softmax(of_rows, dim=1)), margins >= 0

    def _judged(self, rows: Rows) -> tuple[ScoreArray, ScoreArray, NDArray[np.int64]]:
        """Scores, how far they lie above the thresholds, and the logit indices of the classes."""
        scores, winners = outputs_of(self._network, rows, self.score_function_)
        self._doubts.warn()
        return scores, scores - self._thresholds(winners), winners

    def _classes_before(self, rows: Rows, after: NDArray[Any]) -> NDArray[Any]:
        """Classes of rows before fine-tuning; those `after` it if there was none."""
        if all(record["phase"] != "fine-tune" for record in self.history_):
            return after
        return self.classes_[winners_of(self._pretrained or self._given_network(rows), rows)]

    def _given_network(self, rows: Rows) -> Network:
        """The network that `fit` was given, from the module if its weights are still the same."""
        given = getattr(self, "_given", None)  # which files of an older skood lack
        if given is not None and (self.module is None or weights_digest(self.module) != given):
            raise ValueError(
                "The weights of module are not those that fit was given, so the accuracy before "
                "fine-tuning cannot be told. Give them back, module.load_state_dict(weights_of_fit)"
                "; or fit a new detector. id_accuracy_ has the accuracies that fit saw."
            )
        # As in fit, for layers that are lazy.
        with reproducible(self._seed_of_network, self.device_, self._network.default_dtype):
            return given_network(self, rows, self.device_)

    def _p_values(self, scores: ScoreArray, winners: NDArray[np.int64] | None) -> ScoreArray:
        """Conformal p-values of scores, within the classes if thresholds go by them."""
        return conformal_p_values(
            scores,
            self.calibration_scores_,
            self.tpr_,
            None if self.class_offsets_ is None else winners,
            self._calibration_classes,
        )

    def _thresholds(self, winners: NDArray[np.int64] | None) -> float | ScoreArray:
        """The threshold, or that of each row if each class has its own."""
        offsets = self.class_offsets_
        return self.offset_ if offsets is None else offsets[winners]

    def _place_threshold(
        self, scores: ScoreArray, tpr: float, winners: NDArray[np.int64] | None = None
    ) -> None:
        offset, offsets = place_threshold(scores, tpr), None
        if winners is not None:
            offsets = place_class_thresholds(scores, winners, len(self.classes_), tpr)
        warn_if_tied(scores, offset)
        self.offset_, self.class_offsets_ = offset, offsets
        self.calibration_scores_, self._calibration_classes, self.tpr_ = scores, winners, tpr

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
        return state | {"_skood_version": __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        written = state.get("_skood_version")
        if written != __version__:
            by = f"skood {written}" if written else "an older skood"
            warn_user(
                f"This pickle was written by {by} and is read by skood {__version__}, where the "
                "detector may score otherwise. Compare scores, or fit again. Files that its save "
                "writes are read by other versions, or refused.",
                SavedFileWarning,
            )
        super().__setstate__({k: x for k, x in state.items() if k != "_skood_version"})

    def __sklearn_is_fitted__(self) -> bool:
        # scikit-learn would look through all attributes, at every call.
        return hasattr(self, "offset_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
