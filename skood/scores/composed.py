"""Scores that are composed of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..notices import quoted
from .protocol import (
    FittedScore,
    Head,
    LayeredOutputs,
    Outputs,
    ScoreFunction,
    apply_score,
    check_as_many,
    fit_score,
    get_score,
    named,
    uses_gradient,
    uses_layers,
    valid_head,
    valid_logits,
)

__all__ = ["ThreeViews", "TwoViews"]

View = TypeVar("View")
Result = TypeVar("Result")

MOST_KEPT = 256 * 2**20
"""Bytes of the outputs that are read once for all views, at most."""

LOGISTIC = math.pi / 3**0.5
"""Standard deviation of the standard logistic distribution."""

LOWEST = 1 / 4
"""Share of the rows held out by whose values `ThreeViews` tells what is unusual."""


class _Kept:
    """Outputs that are kept when they are read, if they are not too large, to be read again."""

    def __init__(self, outputs: Iterable[Any]) -> None:
        self.outputs = outputs
        self._kept: list[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._kept) if self._kept is not None else self._read(iter(self.outputs))

    def _read(self, pieces: Iterator[Any]) -> Iterator[Any]:
        kept: list[Any] = []
        n_bytes = 0
        for piece in pieces:
            if n_bytes <= MOST_KEPT and isinstance(piece, tuple):
                n_bytes += sum(x.nbytes for x in piece if isinstance(x, Tensor))
                kept.append(piece)
            else:
                kept.clear()
            yield piece
        if n_bytes <= MOST_KEPT:
            self._kept = kept


class Views(FittedScore):
    """Scores in one, each standardised: what they share, whatever they look at."""

    uses_held_out = True

    _compared: ClassVar[str] = "all"
    """Which of the rows held out decide what is usual, as an error tells it."""

    @property
    def uses_head(self) -> bool:  # type: ignore[override]
        """Whether one of the views needs the head.

        Returns
        -------
        bool
            True if one of them has ``uses_head = True``.
        """
        return any(getattr(score, "uses_head", False) for score in self._asked())

    @property
    def uses_layers(self) -> bool:  # type: ignore[override]
        """Whether one of the views looks at inner layers.

        Returns
        -------
        bool
            True if one of them has ``uses_layers = True``.
        """
        return any(map(uses_layers, self._asked()))

    def fit(
        self,
        outputs: Iterable[Outputs | LayeredOutputs],
        head: Head | None = None,
        held_out: Iterable[Outputs | LayeredOutputs] = (),
    ) -> Self:
        """Fit the views, and standardise them.

        Parameters
        ----------
        outputs : iterable of Outputs, or of LayeredOutputs if a view looks at inner layers
            In-distribution rows. Read once, or if they take more than 256 MB, for each of the views
            that has anything to fit.
        head : Head or None
            The head, if one of the views needs it.
        held_out : iterable of the same
            In-distribution rows that the network was not trained on, at least two.

        Returns
        -------
        self : object
            The fitted score.

        Raises
        ------
        ValueError
            If a view cannot be fitted, or is the same for all rows held out, of which `ThreeViews`
            compares the lowest quarter.
        TypeError
            If a view needs the gradient of the network.
        """
        self._validate_params()
        views, name = self._chosen(), type(self).__name__
        for view in views:
            if uses_gradient(view):
                raise TypeError(
                    f"{name} got {quoted(view)}, which scores inputs that it moves, so that the "
                    "other views would see other rows. Pass a score without uses_gradient."
                )
        to_fit = [view for view in views if hasattr(view, "fit")]
        if len(to_fit) > 1 and isinstance(outputs, Iterator):
            raise ValueError(
                f"outputs is an iterator, which can be read once, and {name} fits more than one "
                "score. Pass a list of Outputs."
            )
        read = _Kept(outputs) if len(to_fit) > 1 else outputs
        self._of_each(
            views, lambda view: fit_score(view, read, lambda: valid_head(head), lambda: held_out)
        )
        for parameter, view in zip(self._of, views, strict=True):
            setattr(self, f"{parameter}_", view)
        pieces = self._pieces(held_out, head)
        values = torch.cat([self._values(*z[:2], *z[3:]) for z in pieces], dim=1)
        self.means_, self.deviations_ = self._moments(values)
        rounding = torch.finfo(torch.float32).eps * self.means_.abs()
        for view, deviation, least in zip(views, self.deviations_, rounding, strict=True):
            if not deviation > least:
                raise ValueError(
                    f"{name} cannot weigh {quoted(view)} against other views, as it is the same "
                    f"for {self._compared} of the {values.shape[1]} rows held out. Pass more rows, "
                    "another view, or one of them alone as score_function."
                )
        return self

    def _moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each view, both of shape (number of views, 1)."""
        return values.mean(dim=1, keepdim=True), values.std(dim=1, keepdim=True, correction=0)

    def __call__(self, features: Tensor, logits: Tensor, layers: Tensor | None = None) -> Tensor:
        """Sum of the logarithms of p-values, ``log sigmoid(pi / sqrt(3) v)``, shape (n,).

        Here v is a view of the row, standardised.
        """
        features = self._ready(features)
        standardised = (self._values(features, logits, layers) - self.means_) / self.deviations_
        return F.logsigmoid(LOGISTIC * standardised).sum(dim=0)

    @property
    def _of(self) -> list[str]:
        """The parameters that choose the views, in their order."""
        return list(self._parameter_constraints)

    def _asked(self) -> list[ScoreFunction]:
        """The views as they were passed: every batch asks, and copies take long."""
        return self._of_each(
            self._passed, lambda view: get_score(view) if isinstance(view, str) else view
        )

    def _chosen(self) -> list[ScoreFunction]:
        return self._of_each(self._passed, get_score)

    @property
    def _passed(self) -> list[Any]:
        return [getattr(self, parameter) for parameter in self._of]

    def _values(self, features: Tensor, logits: Tensor, layers: Tensor | None = None) -> Tensor:
        """What the views say of rows, shape (number of views, n), float64."""
        check_as_many(features, valid_logits(logits))
        views = [getattr(self, f"{parameter}_") for parameter in self._of]
        return torch.stack(
            self._of_each(views, lambda view: apply_score(view, features, logits, layers).double())
        )

    def _of_each(self, views: Sequence[View], function: Callable[[View], Result]) -> list[Result]:
        """What a function gives of each view; its errors name the parameter that chose the view."""
        results = []
        for parameter, view in zip(self._of, views, strict=True):
            try:
                results.append(function(view))
            except (TypeError, ValueError) as error:
                error.args = tuple(
                    said.replace("score_function=", f"{parameter}=")
                    if isinstance(said, str)
                    else said
                    for said in error.args
                )
                raise
        return results


@named("two_views")
class TwoViews(Views):
    """Two scores in one: what the logits say, and where the features lie.

    Each of the two is standardised on in-distribution rows that are held out of fine-tuning (on the
    training rows if ``calibration_size`` is None), and becomes a p-value under a logistic
    distribution. The score is the sum of their logarithms, which is Fisher's method. So a row that
    looks very unusual in one view scores low whatever the other says, and a value above the usual
    counts for little: no energy makes up for features that lie far away.

    Parameters
    ----------
    of_logits : str, object or callable, default="energy"
        One score, as ``score_function`` takes it.
    of_features : str, object or callable, default="direction_length"
        The other one.

    Attributes
    ----------
    of_logits_, of_features_ : callable
        The two scores, with their statistics of the training rows if they have any.
    means_ : Tensor of shape (2, 1), float64
        Means of the two on the rows held out.
    deviations_ : Tensor of shape (2, 1), float64
        Their standard deviations.

    References
    ----------
    Fisher, "Statistical methods for research workers", 4th edition, 1932, section 21.1. That two
    views see more kinds of outliers than one is measured on the page "Results".

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head, Outputs, TwoViews, fit_score
    >>> head = Head(torch.eye(2).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[4.0, 0.0], [3.0, 0.5], [0.5, 3.0], [0.0, 5.0]]).double()
    >>> outputs = Outputs(features, head(features), torch.tensor([0, 0, 1, 1]))
    >>> score = fit_score(TwoViews(), [outputs], lambda: head, lambda: [outputs])
    >>> rows = torch.tensor([[3.5, 0.1], [0.3, 0.3], [4e3, 0.0]]).double()
    >>> near, weak, far = score(rows, head(rows))
    >>> bool(near > weak), bool(near > far)
    (True, True)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "of_logits": [str, callable],
        "of_features": [str, callable],
    }

    def __init__(
        self,
        of_logits: str | ScoreFunction = "energy",
        of_features: str | ScoreFunction = "direction_length",
    ) -> None:
        self.of_logits = of_logits
        self.of_features = of_features


@named("three_views")
class ThreeViews(Views):
    """Three scores in one: `TwoViews`, and what inner layers do.

    The third view sees what features have dropped, and so most of what is drawn, written or made
    rather than photographed. Values of the three are low in different ways: distances are far from
    usual for some in-distribution rows, the energy hardly ever is. So the logistic distribution of
    each is that with the quartile and the mean of the lowest quarter of the rows held out.

    Parameters
    ----------
    of_logits : str, object or callable, default="energy"
        One score, as ``score_function`` takes it.
    of_features : str, object or callable, default="direction_length"
        Another one.
    of_layers : str, object or callable, default="layer_moments"
        The third.

    Attributes
    ----------
    of_logits_, of_features_, of_layers_ : callable
        The three scores, with their statistics of the training rows if they have any.
    means_ : Tensor of shape (3, 1), float64
        Means of the logistic distributions of the three.
    deviations_ : Tensor of shape (3, 1), float64
        Their standard deviations.

    References
    ----------
    As of `TwoViews`. What the third view adds is measured on the page "Results".

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head, LayeredOutputs, ThreeViews, fit_score
    >>> head = Head(torch.eye(2).double(), torch.zeros(2).double())
    >>> features = torch.tensor([[4, 0], [3, 0.5], [5, 0.2], [0.5, 3.5], [0, 5], [0.1, 4]]).double()
    >>> layers = torch.tensor([[1, 0.5], [2, 0.4], [1.5, 0.7], [1.5, 0.6], [1.2, 0.5], [1, 0.4]])
    >>> layers = layers[:, :, None].double()  # means and deviations of one channel
    >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> outputs = LayeredOutputs(features, head(features), labels, layers)
    >>> score = fit_score(ThreeViews(), [outputs], lambda: head, lambda: [outputs])
    >>> strange = layers + torch.tensor([[9.0], [0.0]])
    >>> bool((score(*outputs[:2], layers) > score(*outputs[:2], strange)).all())
    True
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "of_logits": [str, callable],
        "of_features": [str, callable],
        "of_layers": [str, callable],
    }
    _compared: ClassVar[str] = "the lowest quarter"

    def __init__(
        self,
        of_logits: str | ScoreFunction = "energy",
        of_features: str | ScoreFunction = "direction_length",
        of_layers: str | ScoreFunction = "layer_moments",
    ) -> None:
        self.of_logits = of_logits
        self.of_features = of_features
        self.of_layers = of_layers

    def _moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the logistic distributions that agree with the lowest values of each view."""
        ordered, place = values.sort(dim=1).values, LOWEST * (values.shape[1] - 1)
        above = math.ceil(place)
        quartile = ordered[:, [math.floor(place)]].lerp(ordered[:, [above]], place % 1)
        lowest = ordered[:, : max(1, above)]
        # Below its quantile of p, a logistic distribution lies -s log(1 - p) / p on average.
        scale = (quartile - lowest).mean(dim=1, keepdim=True) * LOWEST / -math.log1p(-LOWEST)
        return quartile + scale * math.log(1 / LOWEST - 1), LOGISTIC * scale
