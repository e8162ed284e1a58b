"""What a score is, the list of scores, and what they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from ..engine.outputs import all_finite, valid_tensor
from ..notices import quoted

__all__ = [
    "SCORES",
    "Head",
    "LayeredOutputs",
    "Outputs",
    "apply_score",
    "fit_score",
    "get_score",
    "list_scores",
]

ScoreFunction = Callable[..., Tensor]
"""Of features and logits; of these and layers, if it has ``uses_layers = True``."""

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

    Raises
    ------
    TypeError, ValueError
        If `weight` and `bias` are not tensors of floats of these shapes.

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

    def __post_init__(self) -> None:
        n_logits = len(valid_tensor(self.weight, "weight", ("K", "d")))
        if len(valid_tensor(self.bias, "bias", ("K",))) != n_logits:
            raise ValueError(
                f"bias has {len(self.bias)} values and weight {n_logits} rows; expected as many."
            )

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d), ``features @ weight.T + bias``, in float64."""
        valid = of_width(features, self.weight.shape[1]).to(self.weight.dtype)
        return aligned(valid) @ self.weight.T + self.bias


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


class LayeredOutputs(NamedTuple):
    """The same for a score that looks at inner layers.

    Parameters
    ----------
    features, logits, labels : Tensor
        As of `Outputs`.
    layers : Tensor of shape (p, 2, c), float64
        Of inner layers, the mean of each channel over its positions, and the standard deviation.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    layers: Tensor


@dataclass(frozen=True)
class _WithoutLayers:
    """Outputs for a score that does not look at inner layers; they may be read again."""

    outputs: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return map(_without_layers, self.outputs)


def labelled(
    features: Tensor, logits: Tensor, labels: Tensor, layers: Tensor | None
) -> Outputs | LayeredOutputs:
    """What is seen of rows, with their labels.

    Parameters
    ----------
    features : Tensor of shape (p, d), float64
        Features.
    logits : Tensor of shape (p, K), float64
        Logits.
    labels : Tensor of shape (p,), int64
        Class of each row, as the index of its logit.
    layers : Tensor of shape (p, 2, c), float64, or None
        Moments of inner layers, if they are seen.

    Returns
    -------
    Outputs or LayeredOutputs
        All of it.
    """
    outputs = Outputs(features, logits, labels)
    return outputs if layers is None else LayeredOutputs(*outputs, layers)


def outputs_for(score: ScoreFunction, outputs: Iterable[Any]) -> Iterable[Any]:
    """What a score is fitted to: without inner layers, if it does not look at them.

    Parameters
    ----------
    score : callable
        The score.
    outputs : iterable of Outputs or LayeredOutputs
        In-distribution rows. An iterator can be read once, and what is returned as well.

    Returns
    -------
    iterable of Outputs or LayeredOutputs
        The same rows.
    """
    if uses_layers(score):
        return outputs
    if isinstance(outputs, Iterator):
        return map(_without_layers, outputs)
    return _WithoutLayers(outputs)


def read(outputs: Iterable[Any]) -> Iterator[Any]:
    """Outputs, one after another; a TypeError if they are not several.

    Parameters
    ----------
    outputs : iterable of Outputs or LayeredOutputs
        In-distribution rows.

    Returns
    -------
    iterator of Outputs or LayeredOutputs
        The same rows.
    """
    try:
        return iter(outputs)
    except TypeError:
        found = outputs
        while hasattr(found, "outputs"):  # what wraps them here
            found = found.outputs
        raise TypeError(
            f"outputs is a {type(found).__name__}; expected Outputs in a list."
        ) from None


def _without_layers(piece: Any) -> Any:
    return Outputs(*piece[:3]) if isinstance(piece, LayeredOutputs) else piece


class FittedScore(BaseEstimator):
    """A score with statistics of in-distribution rows.

    Its fitted attributes end in an underscore. Tensors among them are on the device of the rows,
    are moved to where they are used, and are pickled on the CPU.
    """

    uses_features = True
    uses_head = False
    """Whether `fit` needs the head. If so, the head must be affine."""
    uses_layers = False
    """Whether it looks at inner layers. If so, it is called with their moments as well."""

    def _pieces(self, outputs: Iterable[Any], head: Head | None) -> Iterator[Any]:
        """Outputs, each checked; a TypeError or ValueError says if one is not what it should be."""
        pieces = read(outputs)
        width = valid_head(head).weight.shape[1] if self.uses_head else None
        for piece in pieces:
            if not isinstance(piece, tuple) or len(piece) not in (3, 4):
                raise TypeError(
                    f"outputs holds a {type(piece).__name__}; expected Outputs(features, logits, "
                    "labels)."
                )
            features, logits, labels = piece[:3]
            width = of_width(features, width).shape[1]
            n_logits = valid_tensor(logits, "logits", ("n", "K")).shape[1]
            if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
                raise TypeError(
                    "labels is no tensor of int64; expected the index of a logit a row."
                )
            if not len(features) == len(logits) == labels.numel():
                raise ValueError(
                    f"outputs has features of {len(features)} rows, logits of {len(logits)} and "
                    f"{labels.numel()} labels; expected as many of each."
                )
            if len(labels) > 0 and not 0 <= labels.min() <= labels.max() < n_logits:
                raise ValueError(f"labels must be within 0..{n_logits - 1}, the logits.")
            self._width = width
            if self.uses_layers:
                layers = valid_layers(piece[3] if len(piece) == 4 else None, logits)
                self._channels = layers.shape[2]
                yield LayeredOutputs(features, logits, labels, layers)
            else:
                yield Outputs(features, logits, labels)
        if width is None or not hasattr(self, "_width"):
            raise ValueError("outputs is empty; pass at least one piece of rows.")

    def _ready(self, features: Tensor) -> Tensor:
        """Features in float64; the statistics follow them to their device."""
        check_is_fitted(self)
        of_width(features, self._width)
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
    """Names that ``score_function=`` accepts.

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
    score: ScoreFunction,
    outputs: Iterable[Outputs | LayeredOutputs],
    head: Callable[[], Head],
    held_out: Callable[[], Iterable[Outputs | LayeredOutputs]] | None = None,
) -> ScoreFunction:
    """Fit a score to in-distribution rows, if it has anything to fit.

    Parameters
    ----------
    score : callable
        The score, changed in place.
    outputs : iterable of Outputs or LayeredOutputs
        In-distribution rows, piece by piece. A score with ``uses_layers = True`` needs
        LayeredOutputs; others get Outputs of them. Read at most once; if they are large, `TwoViews`
        and `ThreeViews` may read them once for each view.
    head : callable
        Returns the head. Called only if the score has ``uses_head = True``.
    held_out : callable, default=None
        Returns outputs of in-distribution rows that the network was not trained on. Called only if
        the score has ``uses_held_out = True``.

    Returns
    -------
    callable
        The score.

    Raises
    ------
    TypeError, ValueError
        If `score`, `head` or `held_out` is not callable, or the score cannot be fitted.
    """
    _check_callable(score=score, head=head)
    if not hasattr(score, "fit"):
        return score
    arguments: list[Any] = [
        outputs_for(score, outputs),
        head() if getattr(score, "uses_head", False) else None,
    ]
    if getattr(score, "uses_held_out", False):
        if held_out is None:
            raise ValueError(
                f"score_function={quoted(score)} needs rows that the network was not trained on. "
                "Pass held_out, a callable that returns their Outputs."
            )
        _check_callable(held_out=held_out)
        arguments.append(outputs_for(score, held_out()))
    score.fit(*arguments)
    return score


def apply_score(
    score: ScoreFunction,
    features: Tensor | None,
    logits: Tensor,
    layers: Tensor | None = None,
) -> Tensor:
    """Score a batch, and check that there is one finite value per row.

    Parameters
    ----------
    score : callable
        The score.
    features : Tensor of shape (n, d) or None
        Features.
    logits : Tensor of shape (n, K)
        Logits.
    layers : Tensor of shape (n, 2, c) or None, default=None
        Moments of inner layers, as `LayeredOutputs` has them.

    Returns
    -------
    Tensor of shape (n,)
        The scores.

    Raises
    ------
    ValueError
        If the score returns another shape, NaN or infinity.
    TypeError
        If `score` is not callable, `logits` is no tensor of floats (n, K), or the score returns
        complex numbers.
    """
    _check_callable(score=score)
    values = score(*seen_by(score, features, valid_logits(logits), layers))
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


def _check_callable(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, type) or not callable(value):
            raise TypeError(f"{name} is a {type(value).__name__}; pass an object to be called.")


def energy(logits: Tensor) -> Tensor:
    """Negative energy of logits at temperature 1, ``logsumexp(z)``."""
    return torch.logsumexp(valid_logits(logits), dim=1)


def valid_logits(logits: Tensor) -> Tensor:
    """Logits, if they are a tensor of floats of shape (n, K)."""
    return valid_tensor(logits, "logits", ("n", "K"))


def valid_head(head: Head | None) -> Head:
    """The head, if it is one."""
    if not isinstance(head, Head):
        raise TypeError(f"head is a {type(head).__name__}; expected a Head.")
    return head


def of_width(features: Tensor, width: int | None) -> Tensor:
    """Features, if they are a tensor of floats of shape (n, width); None is any width."""
    found = valid_tensor(features, "features", ("n", "d")).shape[1]
    if found != width is not None:
        raise ValueError(f"features has {found} columns; expected {width}, as in fit.")
    return features


def aligned(rows: Tensor) -> Tensor:
    """Rows, each of which begins at a multiple of 16 bytes.

    In products of them with the rows of a matrix, libraries may round others otherwise, so that a
    row would get other values at another place among its company.

    Parameters
    ----------
    rows : Tensor of shape (n, d), float64
        Rows.

    Returns
    -------
    Tensor of shape (n, d), float64
        The same rows, copied if need be.
    """
    width = rows.shape[1]
    return F.pad(rows, (0, width % 2))[:, :width] if rows.stride(0) % 2 else rows


def uses_gradient(score: ScoreFunction) -> bool:
    """Whether a score needs the gradient of the network.

    Parameters
    ----------
    score : callable
        The score.

    Returns
    -------
    bool
        True if it has ``uses_gradient = True``.
    """
    return bool(getattr(score, "uses_gradient", False))


def uses_layers(score: ScoreFunction) -> bool:
    """Whether a score looks at inner layers.

    Parameters
    ----------
    score : callable
        The score.

    Returns
    -------
    bool
        True if it has ``uses_layers = True``.
    """
    return bool(getattr(score, "uses_layers", False))


def valid_layers(layers: Any, logits: Tensor, width: int | None = None) -> Tensor:
    """Moments of inner layers in float64, if there are any.

    Parameters
    ----------
    layers : Tensor of shape (n, 2, c), or None
        The moments.
    logits : Tensor of shape (n, K)
        Logits of the same rows.
    width : int or None
        How many channels there must be; None for any number.

    Returns
    -------
    Tensor of shape (n, 2, c), float64
        The moments.

    Raises
    ------
    TypeError, ValueError
        If they are missing, or something else.
    """
    if layers is None:
        raise ValueError(
            "The score looks at inner layers, and there are none: no torch.nn.Linear or "
            "convolution before the head is called once a batch, and gives values for each row. "
            'Pass another score: "two_views" in the place of "three_views".'
        )
    n_rows, two, found = valid_tensor(layers, "layers", ("n", "2", "c")).shape
    if n_rows != logits.shape[0] or two != 2 or found != (width or found):
        raise ValueError(
            f"layers is of shape {tuple(layers.shape)}; expected "
            f"({len(logits)}, 2, {width or found}), moments of as many rows as the logits have."
        )
    return layers.double()


def seen_by(
    score: ScoreFunction, features: Tensor | None, logits: Tensor, layers: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What a score is called with.

    Parameters
    ----------
    score : callable
        The score.
    features : Tensor of shape (n, d) or None
        Features.
    logits : Tensor of shape (n, K)
        Logits.
    layers : Tensor of shape (n, 2, c) or None
        Moments of inner layers.

    Returns
    -------
    tuple of Tensor or None
        All three if it looks at inner layers, else the first two.
    """
    return (features, logits, layers) if uses_layers(score) else (features, logits)


def check_as_many(features: Tensor, logits: Tensor) -> None:
    """Refuse features and logits of different numbers of rows, with a ValueError.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Features.
    logits : Tensor of shape (n, K)
        Logits.
    """
    if logits.shape[0] != features.shape[0]:  # len() would fix it in an exported graph
        raise ValueError(
            f"logits has {len(logits)} rows and features {len(features)}; expected as many."
        )


def _device(value: Any) -> torch.device | None:
    value = value.weight if isinstance(value, Head) else value
    return value.device if isinstance(value, Tensor) else None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Head):
        return Head(value.weight.to(device), value.bias.to(device))
    return value.to(device) if isinstance(value, Tensor) else value
