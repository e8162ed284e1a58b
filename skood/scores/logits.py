"""Scores from the logits alone."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import validate_parameter_constraints
from torch import Tensor

from ..validation import Number
from .protocol import energy, named, valid_logits

__all__ = ["Energy", "Gen", "MaxLogit", "MaxSoftmax", "Odin"]

POSITIVE = [Number(Real, 0, None, closed="neither")]


@named("energy")
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
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {"temperature": POSITIVE}

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """The negative energy of each row, shape (n,)."""
        temperature = _checked(self, "temperature")
        return temperature * energy(valid_logits(logits) / temperature)


@named("msp")
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
        """The largest softmax probability of each row, shape (n,)."""
        return torch.softmax(valid_logits(logits), dim=1).amax(dim=1)


@named("max_logit")
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
        """The largest logit of each row, shape (n,)."""
        return valid_logits(logits).amax(dim=1)


@named("gen")
class Gen(BaseEstimator):
    """Negative generalized entropy of the largest probabilities of the softmax.

    It is ``-sum_j p_j^gamma (1 - p_j)^gamma`` over the `n_largest` largest probabilities. A small
    gamma gives weight to classes that are unlikely but not impossible.

    Parameters
    ----------
    gamma : float, default=0.1
        The exponent, between 0 and 1, both excluded.
    n_largest : int, default=100
        The most probabilities to take, at least 1.

    References
    ----------
    Liu, Lochman & Zach, "GEN: Pushing the limits of softmax-based out-of-distribution detection",
    CVPR 2023, equations 3 and 4.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Gen
    >>> Gen(gamma=0.5)(None, torch.tensor([[0.0, 0.0]], dtype=torch.float64))
    tensor([-1.], dtype=torch.float64)
    """

    uses_features = False
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "gamma": [Number(Real, 0, 1, closed="neither")],
        "n_largest": [Number(Integral, 1, None, closed="left")],
    }

    def __init__(self, gamma: float = 0.1, n_largest: int = 100) -> None:
        self.gamma = gamma
        self.n_largest = n_largest

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """The negative generalized entropy of each row, shape (n,)."""
        gamma, n_largest = _checked(self, "gamma"), int(_checked(self, "n_largest"))
        probabilities = torch.softmax(valid_logits(logits), dim=1)
        largest, classes = probabilities.topk(min(n_largest, logits.shape[1]), dim=1)
        others = 1 - largest
        # Next to 1 the difference has no digits left.
        others[:, 0] = probabilities.scatter(1, classes[:, :1], 0.0).sum(dim=1)
        return -((largest * others) ** gamma).sum(dim=1)


@named("odin")
class Odin(BaseEstimator):
    """Largest softmax probability at a high temperature, of inputs perturbed to raise it.

    Each input of the network is moved one step along the sign of the gradient of its largest
    log-probability: ``x + magnitude sign(grad_x log max softmax(z / T))``. This raises the score of
    in-distribution rows more than that of others. It needs a backward pass and a second forward
    pass.

    Parameters
    ----------
    temperature : float, default=1000.0
        The temperature T, positive.
    magnitude : float, default=0.0014
        Size of the step, in units of the network's input (after ``preprocess``), positive.

    References
    ----------
    Liang, Li & Srikant, "Enhancing the reliability of out-of-distribution image detection in neural
    networks", ICLR 2018, equations 1 and 2.

    Examples
    --------
    >>> import torch
    >>> from skood.scores import Odin
    >>> Odin(temperature=1.0)(None, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    uses_features = False
    uses_gradient = True
    """The logits to score are those of perturbed inputs."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "temperature": POSITIVE,
        "magnitude": POSITIVE,
    }

    def __init__(self, temperature: float = 1000.0, magnitude: float = 0.0014) -> None:
        self.temperature = temperature
        self.magnitude = magnitude

    def perturbation(self, logits: Tensor, batch: Tensor) -> Tensor:
        """What to add to a batch before it is scored.

        Parameters
        ----------
        logits : Tensor of shape (n, K)
            Logits of the batch, with the graph of their gradient.
        batch : Tensor of shape (n, ...)
            Input of the network.

        Returns
        -------
        Tensor of shape (n, ...)
            The step.

        Raises
        ------
        ValueError
            If the logits have no gradient with respect to the batch, the batch has 16 bits, or a
            parameter is not a positive number.
        """
        magnitude, temperature = _checked(self, "magnitude"), _checked(self, "temperature")
        if batch.dtype.itemsize < 4:
            raise ValueError(
                f'score_function="odin" takes steps of {magnitude:g}, which inputs of '
                f"{batch.dtype} round away. Pass the network in float32, or another score."
            )
        confidence = torch.log_softmax(logits / temperature, dim=1).amax(dim=1).sum()
        gradient = None
        if confidence.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(confidence, batch, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise ValueError(
                    'score_function="odin" needs the gradient of the logits with respect to the '
                    "network's input alone, which torch.utils.checkpoint with use_reentrant=True "
                    "does not give. Pass use_reentrant=False, which gives the same values, or "
                    "another score."
                ) from error
        if gradient is None:
            raise ValueError(
                'score_function="odin" needs the gradient of the logits with respect to the '
                "network's input, but there is none: a part of forward runs under torch.no_grad(), "
                "detaches, rounds or is quantized. Pass another score."
            )
        return magnitude * gradient.sign()

    def __call__(self, features: Tensor | None, logits: Tensor) -> Tensor:
        """The largest softmax probability of each perturbed input, shape (n,)."""
        return torch.softmax(valid_logits(logits) / _checked(self, "temperature"), dim=1).amax(
            dim=1
        )


def _checked(score: BaseEstimator, name: str) -> float:
    # Not all of `_validate_params`, which takes five times as long, for each batch.
    value = getattr(score, name)
    validate_parameter_constraints(
        score._parameter_constraints, {name: value}, caller_name=type(score).__name__
    )
    return float(value)
