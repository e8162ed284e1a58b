"""Scores from distances between features and those of in-distribution rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import torch
from sklearn.utils._param_validation import StrOptions
from torch import Tensor
from torch.nn import functional as F

from ..exceptions import FewTrainingRowsWarning
from ..notices import warn_user
from ..validation import Number
from .activations import SAMPLED_VALUES
from .protocol import (
    FittedScore,
    Head,
    LayeredOutputs,
    Outputs,
    Sample,
    aligned,
    check_as_many,
    energy,
    named,
    valid_head,
    valid_layers,
)

__all__ = ["DirectionLength", "Knn", "LayerMoments", "Mahalanobis", "MahalanobisPlusPlus", "Vim"]

QUERY_ROWS = 256
"""Rows whose distances to a bank are in memory at a time."""

TINY = torch.finfo(torch.float64).tiny
"""Length below which features have no direction."""

NO_VARIANCE = 1e-10
"""Share of the variance of features below which a direction counts as having none."""

MOST_NEIGHBOURS = 1000

SAMPLED_ROWS = 10_000
"""Rows of which a score keeps the moments of layers while it is fitted, at most."""


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
            sample.add(F.normalize(features, eps=TINY))
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
        queries = F.normalize(self._ready(features), eps=TINY)
        squares = self.bank_.square().sum(dim=1)
        # A graph that is compiled or exported takes any number of rows, in one piece.
        whole = torch.compiler.is_compiling()
        pieces = [queries] if whole else aligned(queries).split(QUERY_ROWS)
        nearest = torch.cat([self._nearest(piece, squares) for piece in pieces])
        return -(nearest + queries.square().sum(dim=1)).clamp_min(0).sqrt()

    def _nearest(self, queries: Tensor, squares: Tensor) -> Tensor:
        """Squared distances to the k-th row of the bank, less the squares of the queries."""
        # Matrix products are fast, and lose half of the digits of small distances.
        distances = torch.addmm(squares, queries, self.bank_.T, alpha=-2)
        return distances.topk(self.n_neighbors, dim=1, largest=False).values[:, -1]


@named("mahalanobis")
class Mahalanobis(FittedScore):
    """Negative squared Mahalanobis distance to the nearest class mean.

    All classes share one covariance, that of the features around the means of their classes.
    Directions in which training rows do not vary are ignored.

    Attributes
    ----------
    whitening_ : Tensor of shape (r, d), float64
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

    _name = "mahalanobis"

    def fit(self, outputs: Iterable[Outputs], head: Head | None = None) -> Self:
        """Take the means of the classes and their common covariance.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : None
            Not used.

        Returns
        -------
        self : object
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
        classes = _class_moments(
            piece._replace(features=self._represented(piece.features)) for piece in pieces
        )
        n_rows, covariance, means = classes.counts.sum(), classes.covariance, classes.means
        scale = _resolved_deviations(covariance.diagonal(), classes.total, classes.centre)
        if not scale.isfinite().any():
            raise ValueError(
                f'score_function="{self._name}" needs features that vary within the classes; these '
                "are the same for all training rows of a class. Check X and the network."
            )
        if n_rows - len(means) < scale.isfinite().sum():
            warn_user(
                f'The score "{self._name}" has {int(n_rows)} training rows of '
                f"{len(means)} classes for {int(scale.isfinite().sum())} features, too few for "
                "their covariance: all training rows have about the same distance from their "
                "means. Pass more rows, or another score.",
                FewTrainingRowsWarning,
            )
        # On one scale, small features keep their digits beside large ones.
        variances, directions = torch.linalg.eigh(covariance / scale / scale[:, None])
        varying = variances > NO_VARIANCE * variances[-1]
        whitening = directions[:, varying] / variances[varying].sqrt() / scale[:, None]
        self.whitening_ = whitening.T.contiguous()
        self.means_ = (means + classes.centre) @ whitening
        return self

    def _represented(self, features: Tensor) -> Tensor:
        return features

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The largest ``-(h - mu_k)^T Sigma^-1 (h - mu_k)`` of the classes k, shape (n,)."""
        return _likeness(self._represented(self._ready(features)), self.whitening_, self.means_)


@named("mahalanobis++")
class MahalanobisPlusPlus(Mahalanobis):
    """Negative squared Mahalanobis distance to the nearest class mean, features scaled to length 1.

    Apart from that it is `Mahalanobis`: one covariance for all classes, and directions in which
    training rows do not vary are ignored.

    Attributes
    ----------
    whitening_ : Tensor of shape (r, d), float64
        Maps features of length 1 to r directions of variance 1.
    means_ : Tensor of shape (c, r), float64
        The means of the classes that occurred, in these directions.

    References
    ----------
    Mueller & Hein, "Mahalanobis++: Improving OOD detection via feature normalization", ICML 2025,
    equation 6; on penultimate features.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import MahalanobisPlusPlus, Outputs
    >>> features = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -5.0]]).double()
    >>> outputs = [Outputs(features, features, torch.zeros(4).long())]
    >>> score = MahalanobisPlusPlus().fit(outputs)
    >>> score(torch.tensor([[9.0, 0.0], [5.0, 0.0]]).double(), features[:2])
    tensor([-2.0000, -2.0000], dtype=torch.float64)
    """

    _name = "mahalanobis++"

    def _represented(self, features: Tensor) -> Tensor:
        return F.normalize(features, eps=TINY)


@named("direction_length")
class DirectionLength(FittedScore):
    """Negative squared Mahalanobis distance of the direction and the log length of the features.

    The features h become ``(h / ||h||, log ||h||)``. Lengths below a hundredth of the usual one are
    raised to that, so that features that are all zero do not distort the variance. All classes
    share one covariance, which is shrunk: the share `shrinkage` of it is that of directions that
    vary alike and independently of the length. So it can be estimated from few rows. In comparison
    with `MahalanobisPlusPlus`, rows with features far longer or shorter than those of
    in-distribution rows score low in any direction.

    Parameters
    ----------
    shrinkage : float, default=0.1
        Share of the covariance that is replaced, between 0 and 1, both excluded. Anything from 0.03
        to 0.3 does nearly the same.

    Attributes
    ----------
    whitening_ : Tensor of shape (d + 1, d + 1), float64
        Maps direction and log length to as many values of variance 1.
    means_ : Tensor of shape (c, d + 1), float64
        The means of the classes that occurred, in these values.

    References
    ----------
    Mueller & Hein, "Mahalanobis++: Improving OOD detection via feature normalization", ICML 2025,
    for the direction. Friedman, "Regularized discriminant analysis", JASA 84, 1989, equation 18,
    for the shrinkage. The length is not in these papers.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import DirectionLength, Outputs
    >>> features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 4.0]]).double()
    >>> score = DirectionLength().fit([Outputs(features, features, torch.tensor([0, 0, 1, 1]))])
    >>> near, far = score(torch.tensor([[1.5, 0.1], [1e3, 0.0]]).double(), features[:2])
    >>> bool(near > far)
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "shrinkage": [Number(Real, 0, 1, closed="neither")]
    }

    def __init__(self, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage

    def fit(self, outputs: Iterable[Outputs], head: Head | None = None) -> Self:
        """Take the means of the classes and their common covariance.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : None
            Not used.

        Returns
        -------
        self : DirectionLength
            The fitted score.

        Raises
        ------
        ValueError
            If `shrinkage` is out of range, or neither direction nor length varies within the
            classes.
        """
        self._validate_params()
        pieces = self._pieces(outputs, head)
        first = next(pieces)
        usual = torch.linalg.vector_norm(first.features, dim=1).median()
        self._least_length = max(float(usual) / 100, torch.finfo(torch.float32).tiny)
        classes = _class_moments(
            piece._replace(features=self._direction_and_length(piece.features))
            for piece in chain([first], pieces)
        )
        variances = classes.covariance.diagonal().clone()
        variances[:-1] = variances[:-1].mean()
        resolved = variances > torch.finfo(torch.float32).eps ** 2
        if not resolved.any():
            raise ValueError(
                'score_function="direction_length" needs features that vary within the classes; '
                "these are the same for all training rows of a class. Check X and the network."
            )
        self.whitening_ = _shrunk_whitening(
            classes.covariance, variances, resolved, float(self.shrinkage)
        )
        self.means_ = (classes.means + classes.centre) @ self.whitening_.T
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The largest ``-(v - mu_k)^T Sigma^-1 (v - mu_k)`` of the classes k, shape (n,).

        Here v is ``(h / ||h||, log ||h||)``.
        """
        values = self._direction_and_length(self._ready(features))
        return _likeness(values, self.whitening_, self.means_)

    def _direction_and_length(self, features: Tensor) -> Tensor:
        """Each row scaled to length 1, and the logarithm of its length behind it."""
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        lengths = lengths.clamp_min(self._least_length)
        return torch.cat([features / lengths, lengths.log()], dim=1)


def _shrunk_whitening(
    covariance: Tensor, variances: Tensor, resolved: Tensor, shrinkage: float
) -> Tensor:
    """Maps values to as many of variance 1, by a covariance shrunk towards these variances.

    What is not resolved, as it does not vary, is left out: its column is zero.
    """
    variances = torch.where(resolved, variances, 1.0)
    shrunk = torch.lerp(covariance, variances.diag(), shrinkage)
    identity = torch.eye(len(shrunk)).to(shrunk)
    factor = torch.linalg.cholesky(torch.where(resolved & resolved[:, None], shrunk, identity))
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return (inverse * resolved).contiguous()


def _likeness(values: Tensor, whitening: Tensor, means: Tensor) -> Tensor:
    """Minus the squared distance of whitened values (n, d) to the nearest of some means."""
    whitened = aligned(values) @ whitening.T
    exact = "donot_use_mm_for_euclid_dist"  # matrix products lose digits of small distances
    return -torch.cdist(whitened, means, compute_mode=exact).amin(dim=1).square()


class Moments(NamedTuple):
    """Moments of features, about a centre near their mean, so that squares lose no digits."""

    counts: Tensor
    """Rows of each class that occurred."""
    means: Tensor
    """Their means, less the centre."""
    covariance: Tensor
    """Covariance about these means, which all classes share."""
    total: Tensor
    """Mean square of each feature."""
    centre: Tensor


def _class_moments(outputs: Iterator[Outputs]) -> Moments:
    """The moments of rows that come piece by piece."""
    first = next(outputs)
    n_classes, width = first.logits.shape[1], first.features.shape[1]
    centre = first.features.mean(dim=0)
    counts = centre.new_zeros(n_classes)
    sums = centre.new_zeros(n_classes, width)
    squares = centre.new_zeros(width, width)
    for features, _, labels in chain([first], outputs):
        shifted = features - centre
        counts.index_add_(0, labels, torch.ones_like(shifted[:, 0]))
        sums.index_add_(0, labels, shifted)
        squares += shifted.T @ shifted
    occurred = counts > 0
    counts, means = counts[occurred], sums[occurred] / counts[occurred, None]
    covariance = (squares - (counts[:, None] * means).T @ means) / counts.sum()
    return Moments(counts, means, covariance, squares.diagonal() / counts.sum(), centre)


def _resolved_deviations(within: Tensor, total: Tensor, centre: Tensor) -> Tensor:
    """Standard deviation of each feature within classes; infinite if rounding explains it."""
    rounding = torch.finfo(torch.float32).eps * centre.abs()
    resolved = within > torch.maximum(NO_VARIANCE * total, rounding.square())
    return torch.where(resolved, within.clamp_min(0).sqrt(), torch.inf)


@named("layer_moments")
class LayerMoments(FittedScore):
    """Negative Mahalanobis distance, to the nearest class mean, of what two inner layers do.

    Features keep what tells the classes apart, and may be blind to the rest. Layers before them
    still see strokes, flat areas, or a foreign texture. Of each of their channels, the score takes
    the mean over all positions, and the logarithm of the standard deviation. Deviations below a
    hundredth of the usual one are raised to that. All classes share one covariance, shrunk as in
    `DirectionLength`; here it is shrunk towards values that are independent. Of tables, each value
    has one position, and there are only means.

    The layers lie a third and two thirds of the way through the network. Convolutions and linear
    layers of torch count, if the network calls them once in a forward, before its head, and the
    last of them only if it is the only one, as it gives the features. Of more than 256 channels,
    evenly spaced ones are taken.

    Parameters
    ----------
    shrinkage : float, default=0.1
        Share of the covariance that is replaced, between 0 and 1, both excluded.

    Attributes
    ----------
    whitening_ : Tensor of shape (2 c, 2 c), float64
        Maps means and log deviations of c channels to as many values of variance 1.
    means_ : Tensor of shape (number of classes that occurred, 2 c), float64
        The means of the classes, in these values.
    least_ : Tensor of shape (c,), float64
        Deviation to which smaller ones are raised.

    References
    ----------
    Lee, Lee, Lee & Shin, "A simple unified framework for detecting out-of-distribution samples and
    adversarial attacks", NeurIPS 2018, for distances in inner layers. Quintanilha et al.,
    "Detecting out-of-distribution samples using low-order deep features statistics", 2018, for
    means and standard deviations of channels.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import LayeredOutputs, LayerMoments
    >>> layers = torch.tensor([[[1.0], [0.5]], [[2.0], [0.4]], [[1.5], [0.6]]]).double()
    >>> logits = torch.eye(3).double()[:, :2]
    >>> outputs = LayeredOutputs(logits, logits, torch.tensor([0, 0, 1]), layers)
    >>> score = LayerMoments().fit([outputs])
    >>> near, far = score(logits[:2], logits[:2], torch.tensor([[[1.4], [0.5]], [[9.0], [0.0]]]))
    >>> bool(near > far)
    True
    """

    uses_layers = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "shrinkage": [Number(Real, 0, 1, closed="neither")]
    }

    def __init__(self, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage

    def fit(self, outputs: Iterable[LayeredOutputs], head: Head | None = None) -> Self:
        """Take the means of the classes and their common covariance, of at most 10,000 rows.

        Parameters
        ----------
        outputs : iterable of LayeredOutputs
            In-distribution rows.
        head : None
            Not used.

        Returns
        -------
        self : LayerMoments
            The fitted score.

        Raises
        ------
        ValueError
            If `shrinkage` is out of range, there are no layers, or nothing in them varies within
            the classes.
        """
        self._validate_params()
        sample, n_logits = Sample(SAMPLED_ROWS), 0
        for piece in self._pieces(outputs, head):
            sample.add(torch.cat([piece.layers.flatten(1), piece.labels[:, None]], dim=1))
            n_logits = piece.logits.shape[1]
        rows = sample.rows().double()
        labels, layers = rows[:, -1].long(), rows[:, :-1].unflatten(1, (2, -1))
        self.least_ = (layers[:, 1].mean(dim=0) / 100).clamp_min(torch.finfo(torch.float32).tiny)
        values, logits = self._represented(layers), layers.new_zeros(len(layers), n_logits)
        classes = _class_moments(iter([Outputs(values, logits, labels)]))
        variances = classes.covariance.diagonal()
        resolved = _resolved_deviations(variances, classes.total, classes.centre).isfinite()
        if not resolved.any():
            raise ValueError(
                'score_function="layer_moments" needs inner layers whose outputs vary within the '
                "classes; these are the same for all training rows of a class. Check X and the "
                "network."
            )
        self.whitening_ = _shrunk_whitening(
            classes.covariance, variances, resolved, float(self.shrinkage)
        )
        self.means_ = (classes.means + classes.centre) @ self.whitening_.T
        return self

    def __call__(self, features: Tensor, logits: Tensor, layers: Tensor) -> Tensor:
        """The largest ``-((v - mu_k)^T Sigma^-1 (v - mu_k))^(1/2)`` of the classes k, shape (n,).

        Here v are the means and the log deviations of a row.
        """
        self._ready(features)
        values = self._represented(valid_layers(layers, logits, len(self.least_)))
        squares = -_likeness(values, self.whitening_, self.means_)
        return -squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def _represented(self, layers: Tensor) -> Tensor:
        """Means, and logarithms of standard deviations behind them."""
        means, deviations = layers.unbind(dim=1)
        return torch.cat([means, torch.maximum(deviations, self.least_).log()], dim=1)


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
    residual_space_ : Tensor of shape (d - n_components, d), float64
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
        residual_space = torch.linalg.eigh(squares).eigenvectors.T[: width - n_components]
        residual_space = residual_space.contiguous()
        rows = sample.rows().double()
        residuals = torch.linalg.vector_norm(rows[:, :-1] @ residual_space.T, dim=1).mean()
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
        residuals = torch.linalg.vector_norm(aligned(shifted) @ self.residual_space_.T, dim=1)
        energies = energy(logits)
        check_as_many(features, logits)
        return energies - self.alpha_ * residuals
