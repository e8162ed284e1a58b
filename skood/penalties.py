"""Sparsity measures of a batch of features.

A penalty maps features of shape (n, d) to one non-negative value per row, shape (n,), which depends
on that row alone; one that mixes rows or draws at random is refused. Fine-tuning adds
``sparsity_weight`` times its mean over the batch to the loss. To add one, write the function and
name it in `PENALTIES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from sklearn.utils._param_validation import validate_parameter_constraints
from torch import Tensor

from .engine.outputs import valid_tensor
from .notices import quoted
from .validation import Number

__all__ = ["PENALTIES", "Relative", "fit_penalty", "get_penalty", "hoyer_index", "l1", "l1_over_l2"]

Penalty = Callable[[Tensor], Tensor]


def l1(features: Tensor) -> Tensor:
    """Sum of absolute features of each row.

    This is the penalty of the paper. The effect of a weight depends on the number and the size of
    the features; with `Relative` it does not.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Penultimate features, any floating dtype.

    Returns
    -------
    Tensor of shape (n,)
        ``sum_j |h_j|``, in the dtype of `features`.

    Raises
    ------
    TypeError, ValueError
        If `features` is not a tensor of floats of shape (n, d) with d of at least 1.

    References
    ----------
    Chen & Li, "Sparsity-based regularization for out-of-distribution detection", J. Guilin Univ.
    Electron. Technol. 43(1), 2023.

    Examples
    --------
    >>> import torch
    >>> from skood.penalties import l1
    >>> l1(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    tensor([7., 0.])
    """
    return _valid(features).abs().sum(dim=1)


def l1_over_l2(features: Tensor) -> Tensor:
    """Ratio of the l1 to the l2 norm of each row, whatever the size of the features.

    It lies between 1 (one active feature) and sqrt(d) (all equally active). A row of zeros gets 0.
    Use larger weights than for `l1`: around 0.3.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Penultimate features, any floating dtype.

    Returns
    -------
    Tensor of shape (n,)
        ``||h||_1 / ||h||_2``, in the dtype of `features`.

    Raises
    ------
    TypeError, ValueError
        If `features` is not a tensor of floats of shape (n, d) with d of at least 1.

    References
    ----------
    Hurley & Rickard, "Comparing measures of sparsity", IEEE Trans. Inf. Theory 55(10), 2009.

    Examples
    --------
    >>> import torch
    >>> from skood.penalties import l1_over_l2
    >>> l1_over_l2(torch.tensor([[3.0, -4.0], [0.0, 2.0], [0.0, 0.0]]))
    tensor([1.4000, 1.0000, 0.0000])
    """
    # The ratio ignores scale: one taken out beforehand changes neither it nor its gradient, and
    # squares neither overflow nor vanish. A row of zeros keeps a ratio and a gradient of zero.
    tiny = torch.finfo(_valid(features).dtype).tiny
    scaled = features / features.detach().abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    return l1(scaled) / torch.linalg.vector_norm(scaled, dim=1).clamp_min(tiny)


def hoyer_index(features: Tensor) -> Tensor:
    """Sparsity of each row, from 0 (all features equal) to 1 (one feature active).

    It is not a penalty, because higher is sparser. ``history_`` reports it.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Penultimate features, any floating dtype.

    Returns
    -------
    Tensor of shape (n,)
        ``(sqrt(d) - ||h||_1 / ||h||_2) / (sqrt(d) - 1)``; 1 for a row of zeros, and where d is 1.

    Raises
    ------
    TypeError, ValueError
        If `features` is not a tensor of floats of shape (n, d) with d of at least 1.

    References
    ----------
    Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 5, 2004, section
    3.1.

    Examples
    --------
    >>> import torch
    >>> from skood.penalties import hoyer_index
    >>> hoyer_index(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]]))
    tensor([0., 1.])
    """
    root = _valid(features).shape[1] ** 0.5
    if root == 1:
        return torch.ones_like(features[:, 0])
    return ((root - l1_over_l2(features)) / (root - 1)).clamp(0, 1)


@dataclass(frozen=True)
class Relative:
    """A penalty divided by its mean before fine-tuning.

    So it starts at 1 for every network, and a weight means the same for any number and size of
    features.

    Parameters
    ----------
    penalty : callable
        Features (n, d) to values (n,).
    unit : float, default=1.0
        Mean of `penalty` before fine-tuning, which `fit` measures. Positive.

    Raises
    ------
    TypeError, ValueError
        If `penalty` is not callable, or `unit` is not a positive number.

    Examples
    --------
    >>> import torch
    >>> from skood.penalties import Relative, l1
    >>> features = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
    >>> relative = Relative(l1).fit(features)
    >>> relative(features)
    tensor([1.7500, 0.2500])
    """

    penalty: Penalty
    unit: float = 1.0

    def __post_init__(self) -> None:
        validate_parameter_constraints(
            {"penalty": [callable], "unit": [Number(Real, 0, None, closed="neither")]},
            vars(self),
            caller_name="Relative",
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Values of the penalty, divided by the unit.

        Parameters
        ----------
        features : Tensor of shape (n, d)
            Penultimate features, any floating dtype.

        Returns
        -------
        Tensor of shape (n,)
            Values, in the dtype of `features`.
        """
        return self.penalty(features) / self.unit

    def fit(self, features: Tensor) -> Relative:
        """The same penalty, divided by its mean over some features.

        Parameters
        ----------
        features : Tensor of shape (n, d)
            Features of in-distribution rows before fine-tuning.

        Returns
        -------
        Relative
            A new object.

        Raises
        ------
        TypeError, ValueError
            If that mean is 0 or not finite, so that nothing can be divided by it, or `features` is
            not a tensor of floats of shape (n, d).
        """
        unit = float(self.penalty(_valid(features).float()).mean())
        if not 0 < unit < float("inf"):
            raise ValueError(
                f"The penalty's mean before fine-tuning is {unit:g}, so it cannot be divided by "
                'it: the features may all be zero. Pass penalty="l1" and a number as '
                "sparsity_weight, or check the network."
            )
        return Relative(self.penalty, unit)


PENALTIES: dict[str, Penalty] = {
    "l1": l1,
    "l1_over_l2": l1_over_l2,
    "relative_l1": Relative(l1),
}
"""The penalties by name, as ``penalty=`` takes them."""


def get_penalty(penalty: str | Penalty) -> Penalty:
    """Look up a penalty by name; a callable is returned as it is.

    Parameters
    ----------
    penalty : str or callable
        A key of `PENALTIES`, or a function from features (n, d) to values (n,).

    Returns
    -------
    callable
        The penalty function.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If `penalty` is neither a string nor callable, or a class instead of an object.

    Examples
    --------
    >>> from skood.penalties import get_penalty
    >>> get_penalty("l1").__name__
    'l1'
    """
    if callable(penalty) and not isinstance(penalty, type):
        return penalty
    expected = f"one of {sorted(PENALTIES)} or a callable from features (n, d) to values (n,)"
    if not isinstance(penalty, str):
        kind = type(penalty).__name__
        raise TypeError(f"penalty={quoted(penalty)} is a {kind}, not a penalty; pass {expected}.")
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={quoted(penalty)} is unknown; pass {expected}.")
    return PENALTIES[penalty]


def fit_penalty(penalty: Penalty, features: Callable[[], Tensor]) -> Penalty:
    """Fit a penalty to features, if it has statistics of its own.

    Parameters
    ----------
    penalty : callable
        The penalty. If it has a method ``fit(features)``, a copy of it is fitted; yours stays as it
        is.
    features : callable
        Gives features (n, d) of training rows before fine-tuning. Called only if needed.

    Returns
    -------
    callable
        What ``fit`` returned, or the copy itself if ``fit`` returned nothing; else the penalty.

    Raises
    ------
    TypeError
        If an argument, or what ``fit`` returned, is not callable.

    Examples
    --------
    >>> import torch
    >>> from skood.penalties import PENALTIES, fit_penalty
    >>> fit_penalty(PENALTIES["relative_l1"], lambda: torch.ones(2, 3)).unit
    3.0
    """
    for name, value in (("penalty", penalty), ("features", features)):
        if isinstance(value, type) or not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}; pass an object to be called.")
    if not hasattr(penalty, "fit"):
        return penalty
    fitted = copy.deepcopy(penalty)
    returned = fitted.fit(features())
    fitted = fitted if returned is None else returned
    if not callable(fitted):
        raise TypeError(
            f"The fit of penalty={quoted(penalty)} returned a {type(fitted).__name__}; it must "
            "return nothing or the fitted penalty, a callable from features (n, d) to values (n,)."
        )
    return fitted


def _valid(features: Tensor) -> Tensor:
    return valid_tensor(features, "features", ("n", "d"))
