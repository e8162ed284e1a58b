"""Scores that change the features or the head, and take the energy."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..validation import Number
from .protocol import FittedScore, Head, Outputs, Sample, energy, named, valid_head

__all__ = ["Dice", "ReAct", "Scale"]

SAMPLED_VALUES = 10_000_000
"""Most activations from which a percentile is taken; 40 MB."""

PERCENTILE = [Number(Real, 0, 100, closed="neither")]


@named("dice")
class Dice(FittedScore):
    """Energy computed with the weights of the head that contribute most on in-distribution rows.

    The contribution of a weight is ``w_kj mean(h_j)``. The share `sparsity` of the weights, those
    with the smallest contributions, is set to zero.

    Parameters
    ----------
    sparsity : float, default=0.9
        Share of the weights to set to zero, between 0 and 1, both excluded.

    Attributes
    ----------
    head_ : Head
        The head with the remaining weights.

    References
    ----------
    Sun & Li, "DICE: Leveraging sparsification for out-of-distribution detection", ECCV 2022,
    equations 2 to 4.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Dice, Head, Outputs
    >>> head = Head(torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[1.0, 1.0]]).double()
    >>> score = Dice(0.5).fit([Outputs(features, head(features), torch.tensor([0]))], head)
    >>> score.head_.weight
    tensor([[2., 0.],
            [0., 3.]], dtype=torch.float64)
    """

    uses_head = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "sparsity": [Number(Real, 0, 1, closed="neither")]
    }

    def __init__(self, sparsity: float = 0.9) -> None:
        self.sparsity = sparsity

    def fit(self, outputs: Iterable[Outputs], head: Head) -> Dice:
        """Find the weights to set to zero.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : Head
            The head.

        Returns
        -------
        self : Dice
            The fitted score.

        Raises
        ------
        ValueError
            If `sparsity` is out of range.
        """
        self._validate_params()
        total, n_rows = torch.zeros_like(valid_head(head).weight[0]), 0
        for features, _, _ in self._pieces(outputs, head):
            total += features.sum(dim=0)
            n_rows += len(features)
        contributions = total / n_rows * head.weight
        bound = float(np.quantile(contributions.cpu().numpy(), float(self.sparsity)))
        self.head_ = Head(torch.where(contributions > bound, head.weight, 0), head.bias)
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The negative energy of the logits of the sparse head, shape (n,)."""
        features = self._ready(features)
        return energy(self.head_(features))


@named("react")
class ReAct(FittedScore):
    """Energy of features that are clipped from above.

    Parameters
    ----------
    percentile : float, default=90.0
        Percentile of all activations of in-distribution rows at which features are clipped, between
        0 and 100, both excluded.

    Attributes
    ----------
    head_ : Head
        The head.
    threshold_ : float
        The bound c of ``min(h, c)``.

    Notes
    -----
    If there are more than 10 million activations, the percentile is that of evenly spaced rows with
    5 to 10 million.

    References
    ----------
    Sun, Guo & Li, "ReAct: Out-of-distribution detection with rectified activations", NeurIPS 2021,
    equations 1 and 2.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head, Outputs, ReAct
    >>> head = Head(torch.eye(2).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).double()
    >>> score = ReAct(50).fit([Outputs(features, head(features), torch.tensor([1, 1]))], head)
    >>> score.threshold_
    1.5
    """

    uses_head = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {"percentile": PERCENTILE}

    def __init__(self, percentile: float = 90.0) -> None:
        self.percentile = percentile

    def fit(self, outputs: Iterable[Outputs], head: Head) -> ReAct:
        """Take the percentile of the activations.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows.
        head : Head
            The head.

        Returns
        -------
        self : ReAct
            The fitted score.

        Raises
        ------
        ValueError
            If `percentile` is out of range.
        """
        self._validate_params()
        sample = Sample(max(SAMPLED_VALUES // valid_head(head).weight.shape[1], 1))
        for features, _, _ in self._pieces(outputs, head):
            sample.add(features)
        activations = sample.rows().cpu().numpy()
        self.head_ = head
        self.threshold_ = float(np.percentile(activations, float(self.percentile)))
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The negative energy of the logits of the clipped features, shape (n,)."""
        features = self._ready(features)
        return energy(self.head_(features.clamp_max(self.threshold_)))


@named("scale")
class Scale(FittedScore):
    """Energy of scaled features: the less the largest ones dominate a row, the larger the scale.

    Features are multiplied by ``exp(r)``, with r the sum of all features over that of the largest.

    Parameters
    ----------
    percentile : float, default=85.0
        Percentile of the features of a row above which they count as the largest, between 0 and
        100, both excluded.

    Attributes
    ----------
    head_ : Head
        The head.

    References
    ----------
    Xu, Chen, Franchi & Yao, "Scaling for training time and post-hoc out-of-distribution detection
    enhancement", ICLR 2024, equations 4 and 5.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head, Outputs, Scale
    >>> head = Head(torch.eye(2).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double()
    >>> outputs = [Outputs(features, head(features), torch.tensor([1, 1]))]
    >>> Scale(50).fit(outputs, head)(features, head(features))
    tensor([2.7822, 8.0822], dtype=torch.float64)
    """

    uses_head = True
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {"percentile": PERCENTILE}

    def __init__(self, percentile: float = 85.0) -> None:
        self.percentile = percentile

    def fit(self, outputs: Iterable[Outputs], head: Head) -> Scale:
        """Keep the head, and check that no feature is negative.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows. Only the first piece is read.
        head : Head
            The head.

        Returns
        -------
        self : Scale
            The fitted score.

        Raises
        ------
        ValueError
            If `percentile` is out of range, or features are negative.
        """
        self._validate_params()
        for features, _, _ in islice(self._pieces(outputs, head), 1):
            _check_not_negative(features)
        self.head_ = head
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """The negative energy of the logits of the scaled features, shape (n,)."""
        features = self._ready(features)
        _check_not_negative(features)
        width = features.shape[1]
        n_largest = max(width - round(width * self.percentile / 100), 1)
        largest = features.topk(n_largest, dim=1).values.sum(dim=1, keepdim=True)
        # A row of zeros stays so, whatever its scale.
        ratio = features.sum(dim=1, keepdim=True) / torch.where(largest > 0, largest, 1)
        return energy(self.head_(features * ratio.exp()))


def _check_not_negative(features: Tensor) -> None:
    # A graph that is compiled or exported has no values yet.
    if not torch.compiler.is_compiling() and len(features) > 0 and features.min() < 0:
        raise ValueError(
            'score_function="scale" needs features of at least 0, such as after a ReLU; these go '
            f"down to {float(features.min()):.3g}. Pass another score."
        )
