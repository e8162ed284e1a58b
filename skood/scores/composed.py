"""A score that is composed of two others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..notices import quoted
from .protocol import (
    FittedScore,
    Head,
    Outputs,
    ScoreFunction,
    apply_score,
    check_as_many,
    fit_score,
    get_score,
    named,
    uses_gradient,
    valid_head,
    valid_logits,
)

__all__ = ["TwoViews"]

View = TypeVar("View")
Result = TypeVar("Result")

LOGISTIC = math.pi / 3**0.5
"""Standard deviation of the standard logistic distribution."""


@named("two_views")
class TwoViews(FittedScore):
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

    uses_held_out = True
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

    @property
    def uses_head(self) -> bool:  # type: ignore[override]
        """Whether one of the two needs the head.

        Returns
        -------
        bool
            True if one of them has ``uses_head = True``.
        """
        return any(getattr(score, "uses_head", False) for score in self._chosen())

    def fit(
        self,
        outputs: Iterable[Outputs],
        head: Head | None = None,
        held_out: Iterable[Outputs] = (),
    ) -> TwoViews:
        """Fit the two scores, and standardise them.

        Parameters
        ----------
        outputs : iterable of Outputs
            In-distribution rows. Read once for each of the two scores that has anything to fit.
        head : Head or None
            The head, if one of the two needs it.
        held_out : iterable of Outputs
            In-distribution rows that the network was not trained on, at least two.

        Returns
        -------
        self : TwoViews
            The fitted score.

        Raises
        ------
        ValueError
            If one of the two cannot be fitted, or is the same for all rows held out.
        TypeError
            If one of the two needs the gradient of the network.
        """
        self._validate_params()
        views = self._chosen()
        for view in views:
            if uses_gradient(view):
                raise TypeError(
                    f"TwoViews got {quoted(view)}, which scores inputs that it moves, so that the "
                    "other view would see other rows. Pass a score without uses_gradient."
                )
        to_fit = [view for view in views if hasattr(view, "fit")]
        if len(to_fit) == 2 and iter(outputs) is outputs:
            raise ValueError(
                "outputs is an iterator, which can be read once, and TwoViews fits two scores. "
                "Pass a list of Outputs."
            )
        _of_each(
            views, lambda view: fit_score(view, outputs, lambda: valid_head(head), lambda: held_out)
        )
        self.of_logits_, self.of_features_ = views
        values = torch.cat([self._values(*piece[:2]) for piece in self._pieces(held_out, head)], 1)
        self.means_ = values.mean(dim=1, keepdim=True)
        self.deviations_ = values.std(dim=1, keepdim=True, correction=0)
        rounding = torch.finfo(torch.float32).eps * self.means_.abs()
        for view, deviation, least in zip(views, self.deviations_, rounding, strict=True):
            if not deviation > least:
                raise ValueError(
                    f"TwoViews cannot weigh {quoted(view)} against the other view, as it is the "
                    f"same for all of the {values.shape[1]} rows held out. Pass more rows, or one "
                    "of the two alone as score_function."
                )
        return self

    def __call__(self, features: Tensor, logits: Tensor) -> Tensor:
        """Sum of the logarithms of two p-values, ``log sigmoid(pi / sqrt(3) v)``, shape (n,).

        Here v is a view of the row, standardised.
        """
        features = self._ready(features)
        standardised = (self._values(features, logits) - self.means_) / self.deviations_
        return F.logsigmoid(LOGISTIC * standardised).sum(dim=0)

    def _chosen(self) -> list[ScoreFunction]:
        return _of_each((self.of_logits, self.of_features), get_score)

    def _values(self, features: Tensor, logits: Tensor) -> Tensor:
        """What the two views say of rows, shape (2, n), float64."""
        check_as_many(features, valid_logits(logits))
        views = (self.of_logits_, self.of_features_)
        return torch.stack(
            _of_each(views, lambda view: apply_score(view, features, logits).double())
        )


def _of_each(views: Sequence[View], function: Callable[[View], Result]) -> list[Result]:
    """What a function gives of each view; its errors name the parameter that chose the view."""
    results = []
    for parameter, view in zip(("of_logits", "of_features"), views, strict=True):
        try:
            results.append(function(view))
        except (TypeError, ValueError) as error:
            error.args = tuple(
                said.replace("score_function=", f"{parameter}=") if isinstance(said, str) else said
                for said in error.args
            )
            raise
    return results
