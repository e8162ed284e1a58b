"""Scores of a batch from its features and logits: higher means more in-distribution.

A score is called as ``score(features, logits)`` with float64 logits of shape (n, K) and features of
shape (n, d), and returns one value per row, shape (n,). Those here are scikit-learn estimators, so
that a search can set their parameters (``score_function__temperature``). To add one, write the
class and name it in `SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from sklearn.base import BaseEstimator, clone
from torch import Tensor

__all__ = ["SCORES", "Energy", "MaxLogit", "MaxSoftmax", "apply_score", "get_score", "list_scores"]

ScoreFunction = Callable[[Tensor | None, Tensor], Tensor]


class Energy(BaseEstimator):
    """Negative energy of the logits, ``T * logsumexp(z / T)``.

    Parameters
    ----------
    temperature : float, default=1.0
        The temperature T, positive.

    References
    ----------
    Liu, Wang, Owens & Li, "Energy-based out-of-distribution detection", NeurIPS 2020, equation 4.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Energy
    >>> Energy()(None, torch.tensor([[0.0, 0.0]], dtype=torch.float64))
    tensor([0.6931], dtype=torch.float64)
    """

    uses_features = False

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """Score a batch.

        Parameters
        ----------
        features : Tensor of shape (n, d) or None
            Not used.
        logits : Tensor of shape (n, K)
            Logits.

        Returns
        -------
        Tensor of shape (n,)
            The negative energy.

        Raises
        ------
        ValueError
            If the temperature is not a positive number.
        """
        temperature = _positive(self.temperature, "Energy.temperature")
        return temperature * torch.logsumexp(logits / temperature, dim=1)


class MaxSoftmax(BaseEstimator):
    """Largest softmax probability (MSP).

    References
    ----------
    Hendrycks & Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in
    neural networks", ICLR 2017.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import MaxSoftmax
    >>> MaxSoftmax()(None, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    uses_features = False

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """Score a batch.

        Parameters
        ----------
        features : Tensor of shape (n, d) or None
            Not used.
        logits : Tensor of shape (n, K)
            Logits.

        Returns
        -------
        Tensor of shape (n,)
            The largest softmax probability.
        """
        return torch.softmax(logits, dim=1).amax(dim=1)


class MaxLogit(BaseEstimator):
    """Largest logit.

    References
    ----------
    Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", ICML 2022.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import MaxLogit
    >>> MaxLogit()(None, torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    tensor([3.], dtype=torch.float64)
    """

    uses_features = False

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """Score a batch.

        Parameters
        ----------
        features : Tensor of shape (n, d) or None
            Not used.
        logits : Tensor of shape (n, K)
            Logits.

        Returns
        -------
        Tensor of shape (n,)
            The largest logit.
        """
        return logits.amax(dim=1)


SCORES: dict[str, type[BaseEstimator]] = {
    "energy": Energy,
    "max_logit": MaxLogit,
    "msp": MaxSoftmax,
}
"""The scores by name, as ``score_function=`` takes them."""


def list_scores() -> list[str]:
    """Names that ``score_function`` takes.

    Returns
    -------
    list of str
        The names, sorted.

    Examples
    --------
    >>> from skood.scores import list_scores
    >>> list_scores()
    ['energy', 'max_logit', 'msp']
    """
    return sorted(SCORES)


def get_score(score: str | ScoreFunction) -> ScoreFunction:
    """Look a score up by name; an estimator is cloned, another callable taken as it is.

    Parameters
    ----------
    score : str or callable
        A key of `SCORES`, one of its objects, or a function of (features, logits).

    Returns
    -------
    callable
        The score.

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
            raise ValueError(f"score_function={score!r} is unknown; pass {expected}.")
        return SCORES[score]()
    if isinstance(score, type) or not callable(score):
        raise TypeError(f"score_function={score!r} is not callable on a batch; pass {expected}.")
    return clone(score) if isinstance(score, BaseEstimator) else score


def apply_score(score: ScoreFunction, features: Tensor | None, logits: Tensor) -> Tensor:
    """Score a batch, and check what comes out: one finite value a row.

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
    """
    values = score(features, logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"score_function={score!r} returned {got} for logits of shape {tuple(logits.shape)}; "
            f"it must return one value per row, a tensor of shape ({len(logits)},)."
        )
    if values.is_complex():
        raise TypeError(f"score_function={score!r} returned complex values; scores must be real.")
    if not torch.isfinite(values).all():
        raise ValueError(
            f"score_function={score!r} returned NaN or infinity; scores must be finite."
        )
    return values


def _positive(value: float, name: str) -> float:
    if not isinstance(value, Real) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}; pass a positive number.")
    return float(value)
