"""What a score is, the list of scores, and what they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..engine.outputs import all_finite
from ..notices import quoted

__all__ = ["SCORES", "Head", "Outputs", "apply_score", "fit_score", "get_score", "list_scores"]

ScoreFunction = Callable[[Tensor | None, Tensor], Tensor]
Score = TypeVar("Score", bound=type[BaseEstimator])

SCORES: dict[str, type[BaseEstimator]] = {}
"""The scores by name, as ``score_function=`` takes them."""


@dataclass(frozen=True)
class Head:
    """The affine layer that turns features into logits.

    Parameters
    ----------
    weight : Tensor of shape (K, d), float64
        One row for each logit.
    bias : Tensor of shape (K,), float64
        The logits of features that are all zero.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Head
    >>> head = Head(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    >>> head(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    tensor([[2., 3.]], dtype=torch.float64)
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d), ``features @ weight.T + bias``, in float64."""
        return features @ self.weight.T + self.bias


class Outputs(NamedTuple):
    """Some in-distribution rows, as a score sees them when it is fitted.

    Parameters
    ----------
    features : Tensor of shape (p, d), float64
        Penultimate features.
    logits : Tensor of shape (p, K), float64
        Logits.
    labels : Tensor of shape (p,), int64
        Class of each row, as the index of its logit.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


class FittedScore(BaseEstimator):
    """A score with statistics of in-distribution rows.

    Its fitted attributes end in an underscore. Tensors among them are on the device of the rows,
    are moved to where they are used, and are pickled on the CPU.
    """

    uses_features = True
    uses_head = False
    """Whether `fit` needs the head. If so, the head must be affine."""

    def _ready(self, features: Tensor) -> Tensor:
        """Features in float64; the statistics follow them to their device."""
        check_is_fitted(self)
        for name, value in vars(self).items():
            if _device(value) not in (None, features.device):
                setattr(self, name, _moved(value, features.device))
        return features.double()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: _moved(value, torch.device("cpu")) for name, value in state.items()}


def named(name: str) -> Callable[[Score], Score]:
    """Register a score under a name."""

    def register(score: Score) -> Score:
        SCORES[name] = score
        return score

    return register


def list_scores() -> list[str]:
    """Names that ``score_function=`` takes.

    Returns
    -------
    list of str
        The names, sorted.

    Examples
    --------
    >>> from skood.scores import list_scores
    >>> "energy" in list_scores()
    True
    """
    return sorted(SCORES)


def get_score(score: str | ScoreFunction) -> ScoreFunction:
    """Look up a score by name. An object is cloned or copied, a function is taken as it is.

    Parameters
    ----------
    score : str or callable
        A name from `list_scores`, an object from `skood.scores`, or a function of (features,
        logits).

    Returns
    -------
    callable
        The score, not fitted.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If `score` is neither a string nor callable.

    Examples
    --------
    >>> from skood.scores import get_score
    >>> get_score("energy")
    Energy()
    """
    expected = (
        f"one of {list_scores()}, an object from skood.scores or a callable of (features, logits)"
    )
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"score_function={quoted(score)} is unknown; pass {expected}.")
        return SCORES[score]()
    if isinstance(score, type) or not callable(score):
        raise TypeError(
            f"score_function={quoted(score)} is not callable on a batch; pass {expected}."
        )
    if isinstance(score, BaseEstimator):
        return clone(score)
    return copy.deepcopy(score) if hasattr(score, "fit") else score


def fit_score(
    score: ScoreFunction, outputs: Iterable[Outputs], head: Callable[[], Head]
) -> ScoreFunction:
    """Fit a score to in-distribution rows, if it has anything to fit.

    Parameters
    ----------
    score : callable
        The score, changed in place.
    outputs : iterable of Outputs
        In-distribution rows, piece by piece. Read at most once.
    head : callable
        Returns the head. Called only if the score has ``uses_head = True``.

    Returns
    -------
    callable
        The score.
    """
    if hasattr(score, "fit"):
        score.fit(outputs, head() if getattr(score, "uses_head", False) else None)
    return score


def apply_score(score: ScoreFunction, features: Tensor | None, logits: Tensor) -> Tensor:
    """Score a batch, and check that there is one finite value per row.

    Parameters
    ----------
    score : callable
        The score.
    features : Tensor of shape (n, d) or None
        Features.
    logits : Tensor of shape (n, K)
        Logits.

    Returns
    -------
    Tensor of shape (n,)
        The scores.

    Raises
    ------
    ValueError
        If the score returns another shape, NaN or infinity.
    TypeError
        If it returns complex numbers.
    """
    values = score(features, logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"score_function={quoted(score)} returned {got} for logits of shape "
            f"{tuple(logits.shape)}; expected one value per row, a tensor of shape "
            f"({len(logits)},)."
        )
    if values.is_complex():
        raise TypeError(
            f"score_function={quoted(score)} returned complex values; expected real ones."
        )
    if not all_finite(values):
        raise ValueError(
            f"score_function={quoted(score)} returned NaN or infinity; expected finite values."
        )
    return values


class Sample:
    """Evenly spaced rows of a stream: at most `size` of them, at least half as many.

    Parameters
    ----------
    size : int
        The most rows to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: list[Tensor] = []
        self._stride = 1
        self._n_seen = 0

    def add(self, rows: Tensor) -> None:
        """Take the next rows of the stream."""
        first = -self._n_seen % self._stride
        self._n_seen += len(rows)
        self._rows.append(rows[first :: self._stride].float())
        while -(-self._n_seen // self._stride) > self.size:
            self._rows = [self.rows()[::2]]
            self._stride *= 2

    def rows(self) -> Tensor:
        """The rows kept, float32, in their order."""
        return torch.cat(self._rows)


def energy(logits: Tensor) -> Tensor:
    """Negative energy of logits at temperature 1, ``logsumexp(z)``."""
    return torch.logsumexp(logits, dim=1)


def _device(value: Any) -> torch.device | None:
    value = value.weight if isinstance(value, Head) else value
    return value.device if isinstance(value, Tensor) else None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Head):
        return Head(value.weight.to(device), value.bias.to(device))
    return value.to(device) if isinstance(value, Tensor) else value
