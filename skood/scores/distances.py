"""Scores from distances between features and those of in-distribution rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from numbers import Integral
from typing import Any, ClassVar

import torch
from sklearn.utils._param_validation import StrOptions
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import FewTrainingRowsWarning
from ..notices import warn_user
from ..validation import Number
from .activations import SAMPLED_VALUES
from .protocol import FittedScore, Head, Outputs, Sample, energy, named, valid_head

__all__ = ["Knn", "Mahalanobis", "Vim"]

QUERY_ROWS = 256
"""Rows whose distances to a bank are in memory at a time."""

NO_VARIANCE = 1e-10
"""Share of the variance of features below which a direction counts as having none."""

MOST_NEIGHBOURS = 1000


@named("knn")
class Knn(FittedScore):
    """Negative distance to the k-th nearest in-distribution row, features scaled to length 1.

    Parameters
    ----------
    n_neighbors : int, default=50
        Which neighbour, k, from 1 to 1000.
    bank_size : int, default=50000
        The most rows to keep, at least twice the neighbours. If there are more rows, evenly spaced
        ones are kept, at least half as many as `bank_size`.

    Attributes
    ----------
    bank_ : Tensor of shape (m, d), float64
        The rows kept, each of length 1.

    References
    ----------
    Sun, Ming, Zhu & Li, "Out-of-distribution detection with deep nearest neighbors", ICML 2022,
    section 3.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Knn, Outputs
    >>> features = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).double()
    >>> score = Knn(n_neighbors=2).fit([Outputs(features, features, torch.tensor([0, 1]))])
    >>> score(torch.tensor([[5.0, 0.0]]).double(), features[:1])
    tensor([-1.4142], dtype=torch.float64)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_neighbors": [Number(Integral, 1, MOST_NEIGHBOURS, closed="both")],
        "bank_size": [Number(Integral, 1, None, closed="left")],
    }

    def __init__(self, n_neighbors: int = 50, bank_size: int = 50_000) -> None:
        self.n_neighbors = n_neighbors
        self.bank_size = bank_size

    def fit(self, outputs: Iterable[Outputs], head: Head | None = None) -> Knn:
        """Keep rows.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : None
            Not used.

        Returns
        -------
        self : Knn
            The fitted score.

        Raises
        ------
        ValueError
            If a parameter is out of range, or there are fewer rows than neighbours.
        """
        self._validate_params()
        if self.bank_size < 2 * self.n_neighbors:
            raise ValueError(
                "The 'bank_size' parameter of Knn must be at least twice n_neighbors, "
                f"{2 * self.n_neighbors}. Got {self.bank_size} instead."
            )
        sample = Sample(self.bank_size)
        for features, _, _ in self._pieces(outputs, head):
            sample.add(F.normalize(features))
        bank = sample.rows().double()
        if len(bank) < self.n_neighbors:
            raise ValueError(
                "The 'n_neighbors' parameter of Knn must be at most the number of training rows, "
                f"{len(bank)}. Got {self.n_neighbors} instead. Pass fewer neighbours, or more rows."
            )
        self.bank_ = bank
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Minus the Euclidean distance to the k-th nearest row of the bank, shape (n,)."""
        queries = F.normalize(self._ready(features))
        return -torch.cat([self._distances(piece) for piece in queries.split(QUERY_ROWS)])

    def _distances(self, queries: Tensor) -> Tensor:
        # Matrix products are fast, and lose half of the digits of small distances.
        distances = torch.cdist(queries, self.bank_, compute_mode="use_mm_for_euclid_dist")
        return distances.topk(self.n_neighbors, dim=1, largest=False).values[:, -1]


@named("mahalanobis")
class Mahalanobis(FittedScore):
    """Negative squared Mahalanobis distance to the nearest class mean.

    All classes share one covariance, that of the features around the means of their classes.
    Directions in which training rows do not vary are ignored.

    Attributes
    ----------
    whitening_ : Tensor of shape (d, r), float64
        Maps features to r directions of variance 1.
    means_ : Tensor of shape (c, r), float64
        The means of the classes that occurred, in these directions.

    References
    ----------
    Lee, Lee, Lee & Shin, "A simple unified framework for detecting out-of-distribution samples and
    adversarial attacks", NeurIPS 2018, equations 1 and 2; on penultimate features, without input
    perturbation.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Mahalanobis, Outputs
    >>> features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]).double()
    >>> score = Mahalanobis().fit([Outputs(features, features, torch.zeros(4).long())])
    >>> score(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), features[:2])
    tensor([-2.0000, -0.5000], dtype=torch.float64)
    """

    def fit(self, outputs: Iterable[Outputs], head: Head | None = None) -> Mahalanobis:
        """Take the means of the classes and their common covariance.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : None
            Not used.

        Returns
        -------
        self : Mahalanobis
            The fitted score.

        Raises
        ------
        ValueError
            If no feature varies within the classes.

        Warns
        -----
        FewTrainingRowsWarning
            If there are fewer rows, beyond one per class, than features.
        """
        pieces = self._pieces(outputs, head)
        first = next(pieces)
        n_classes, width = first.logits.shape[1], first.features.shape[1]
        centre = first.features.mean(dim=0)  # near the mean, so that squares lose no digits
        counts = centre.new_zeros(n_classes)
        sums = centre.new_zeros(n_classes, width)
        squares = centre.new_zeros(width, width)
        for features, _, labels in chain([first], pieces):
            shifted = features - centre
            counts.index_add_(0, labels, torch.ones_like(shifted[:, 0]))
            sums.index_add_(0, labels, shifted)
            squares += shifted.T @ shifted
        occurred = counts > 0
        counts, means = counts[occurred], sums[occurred] / counts[occurred, None]
        covariance = (squares - (counts[:, None] * means).T @ means) / counts.sum()
        scale = _resolved_deviations(
            covariance.diagonal(), squares.diagonal() / counts.sum(), centre
        )
        if not scale.isfinite().any():
            raise ValueError(
                'score_function="mahalanobis" needs features that vary within the classes; these '
                "are the same for all training rows of a class. Check X and the network."
            )
        if counts.sum() - len(means) < scale.isfinite().sum():
            warn_user(
                f'score_function="mahalanobis" has {int(counts.sum())} training rows of '
                f"{len(means)} classes for {int(scale.isfinite().sum())} features, too few for "
                "their covariance: all training rows have about the same distance from their "
                "means. Pass more rows, or another score.",
                FewTrainingRowsWarning,
            )
        # On one scale, small features keep their digits beside large ones.
        variances, directions = torch.linalg.eigh(covariance / scale / scale[:, None])
        varying = variances > NO_VARIANCE * variances[-1]
        self.whitening_ = directions[:, varying] / variances[varying].sqrt() / scale[:, None]
        self.means_ = (means + centre) @ self.whitening_
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The largest ``-(h - mu_k)^T Sigma^-1 (h - mu_k)`` of the classes k, shape (n,)."""
        whitened = self._ready(features) @ self.whitening_
        exact = "donot_use_mm_for_euclid_dist"
        return -torch.cdist(whitened, self.means_, compute_mode=exact).amin(dim=1).square()


def _resolved_deviations(within: Tensor, total: Tensor, centre: Tensor) -> Tensor:
    """Standard deviation of each feature within classes; infinite if rounding explains it."""
    rounding = torch.finfo(torch.float32).eps * centre.abs()
    resolved = within > torch.maximum(NO_VARIANCE * total, rounding.square())
    return torch.where(resolved, within.clamp_min(0).sqrt(), torch.inf)


@named("vim")
class Vim(FittedScore):
    """Energy minus a virtual logit, which says how far features are from the principal space.

    The virtual logit is the norm of the part of the features outside the principal space of
    in-distribution rows. It is scaled to the mean of their largest logits.

    Parameters
    ----------
    n_components : "auto" or int, default="auto"
        Dimension of the principal space, less than the number of features. "auto" is 1000 from 2048
        features on, 512 from 768 on, and else half of them.

    Attributes
    ----------
    origin_ : Tensor of shape (d,), float64
        The features that the head maps closest to zero.
    residual_space_ : Tensor of shape (d, d - n_components), float64
        Orthonormal directions outside the principal space.
    alpha_ : float
        Scale of the virtual logit.

    Notes
    -----
    If training rows have more than 10 million activations, the scale comes from evenly spaced ones
    with 5 to 10 million.

    References
    ----------
    Wang, Li, Feng & Zhang, "ViM: Out-of-distribution with virtual-logit matching", CVPR 2022,
    section 4.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head, Outputs, Vim
    >>> head = Head(torch.eye(2).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double()
    >>> outputs = [Outputs(features, head(features), torch.tensor([0, 1]))]
    >>> Vim(n_components=1).fit(outputs, head).alpha_
    5.0
    """

    uses_head = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [StrOptions({"auto"}), Number(Integral, 1, None, closed="left")]
    }

    def __init__(self, n_components: str | int = "auto") -> None:
        self.n_components = n_components

    def fit(self, outputs: Iterable[Outputs], head: Head) -> Vim:
        """Find the principal space and the scale of the virtual logit.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : Head
            The head.

        Returns
        -------
        self : Vim
            The fitted score.

        Raises
        ------
        ValueError
            If `n_components` is not "auto" or an integer below the number of features, or nothing
            lies outside the principal space.
        """
        self._validate_params()
        width = valid_head(head).weight.shape[1]
        n_components = self._resolved(width)
        origin = -torch.linalg.pinv(head.weight) @ head.bias
        squares = torch.zeros(width, width).to(head.weight)
        sample = Sample(max(SAMPLED_VALUES // (width + 1), 1))
        for features, logits, _ in self._pieces(outputs, head):
            shifted = features - origin
            squares += shifted.T @ shifted
            sample.add(torch.cat([shifted, logits.amax(dim=1, keepdim=True)], dim=1))
        # Eigenvalues ascend: the principal directions come last.
        residual_space = torch.linalg.eigh(squares).eigenvectors[:, : width - n_components].clone()
        rows = sample.rows().double()
        residuals = torch.linalg.vector_norm(rows[:, :-1] @ residual_space, dim=1).mean()
        lengths = torch.linalg.vector_norm(rows[:, :-1], dim=1).mean()
        if not residuals > torch.finfo(torch.float32).eps * lengths:
            raise ValueError(
                f'score_function="vim" finds nothing outside the principal space: {n_components} '
                f"directions explain all of the {width} features of the training rows. Pass a "
                "smaller Vim(n_components=...)."
            )
        self.origin_, self.residual_space_ = origin, residual_space
        self.alpha_ = float(rows[:, -1].mean() / residuals)
        return self

    def _resolved(self, width: int) -> int:
        if width < 2:
            raise ValueError(
                'score_function="vim" needs at least 2 features, and the network has 1. Pass '
                "another score."
            )
        if self.n_components == "auto":
            return 1000 if width >= 2048 else 512 if width >= 768 else width // 2
        n_components = int(self.n_components)
        if n_components >= width:
            raise ValueError(
                "The 'n_components' parameter of Vim must be less than the number of features, "
                f"{width}. Got {n_components} instead."
            )
        return n_components

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """``logsumexp(z) - alpha ||residual||`` of each row, shape (n,)."""
        shifted = self._ready(features) - self.origin_
        residuals = torch.linalg.vector_norm(shifted @ self.residual_space_, dim=1)
        energies = energy(logits)
        if len(energies) != len(residuals):
            raise ValueError(
                f"logits has {len(energies)} rows and features {len(residuals)}; expected as many."
            )
        return energies - self.alpha_ * residuals
