"""Networks: small ones for users who bring none, and three families known from CIFAR.

All end in a `torch.nn.Linear` head on non-negative (post-ReLU) features. In evaluation mode, a row
of a batch does not depend on the others. :class:`NormalizeImages` turns images into their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils._param_validation import validate_parameter_constraints
from torch import Tensor, nn
from torch.nn import functional as F

from .engine.hardware import sent
from .engine.rows import has_channels_last
from .notices import quoted
from .validation import Number, valid_array, validated

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "CifarDenseNet",
    "CifarResNet",
    "NormalizeImages",
    "Standardize",
    "WideResNet",
    "default_network",
]

# By number of dimensions. A side of three pixels is mostly a channel axis in the wrong place.
SMALLEST_ROWS = {1: (1,), 2: (4, 4), 3: (1, 4, 4)}

# The upper bounds are far beyond what fits any memory or takes a reasonable time.
CONSTRAINTS = {
    "depth": [Number(Integral, 1, 10_000, closed="both")],
    "n_classes": [Number(Integral, 2, 10_000_000, closed="both")],
    "growth": [Number(Integral, 1, 10_000, closed="both")],
    "widen_factor": [Number(Integral, 1, 1000, closed="both")],
    "dropout": [Number(Real, 0, 1, closed="both")],
}


@validated(n_classes=CONSTRAINTS["n_classes"])
def default_network(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
) -> nn.Sequential:
    """Build a small classifier for rows of a given shape.

    For columns it is a multilayer perceptron with two hidden layers of 128 units. For images it is
    three convolutions of 16, 32 and 64 channels, with max pooling between them and global average
    pooling at the end. The perceptron and the last convolution are layer-normalized [1]_, the first
    two convolutions batch-normalized [2]_. Layer normalization bounds the logits. Without it, the
    negative energy may grow without bound as a row moves away from the training data [3]_. So that
    a score of features sees how far away a row lies, the perceptron has one more feature, which the
    head leaves out: ``log(1 + mean(x**2))`` of the standardized row.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of one row: `(d,)` for `d` columns, `(h, w)` for images of one channel, `(c, h, w)`
        for images of `c` channels; `h` and `w` are at least 4.
    n_classes : int
        Number of logits, at least 2.
    mean, std : array-like of float of shape (d,) or (c,), optional
        Mean and standard deviation of each column or channel (one for `(h, w)`), for the first
        layer, :class:`Standardize`. By default 0 and 1.

    Returns
    -------
    nn.Sequential
        Network that maps a batch `(n, *input_shape)` to logits `(n, n_classes)`. Its weights are
        drawn from torch's global random generator.

    Raises
    ------
    TypeError, ValueError
        If `input_shape` or `n_classes` is not one of those above, or if `mean` or `std` does not
        fit the rows or is refused by :class:`Standardize`.

    References
    ----------
    .. [1] Ba, Kiros & Hinton, "Layer normalization", arXiv:1607.06450, 2016.
    .. [2] Ioffe & Szegedy, "Batch normalization: accelerating deep network training by reducing
       internal covariate shift", ICML 2015.
    .. [3] Hein, Andriushchenko & Bitterwolf, "Why ReLU networks yield high-confidence predictions
       far away from the training data and how to mitigate the problem", CVPR 2019, theorem 3.1.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import default_network
    >>> network = default_network((8, 8), n_classes=10)
    >>> network(torch.zeros(5, 8, 8)).shape
    torch.Size([5, 10])
    """
    shape = _checked_shape(input_shape)
    n_channels = 1 if len(shape) == 2 else shape[0]
    standardize = Standardize(
        np.zeros(n_channels) if mean is None else mean,
        np.ones(n_channels) if std is None else std,
    )
    if len(standardize.mean) != n_channels:
        raise ValueError(
            f"mean and std must have {n_channels} values for input_shape={shape}, one per column "
            f"or channel, got {len(standardize.mean)}."
        )
    if len(shape) == 1:
        layers = [_WithLength(_perceptron(n_channels)), _Head(128, n_classes)]
    else:
        add_channel_axis = [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []
        layers = [*add_channel_axis, *_convolutions(n_channels), nn.Linear(64, n_classes)]
    network = nn.Sequential(standardize, *layers)
    _note(network, "default_network", input_shape=list(map(int, shape)), n_classes=int(n_classes))
    return network


class Standardize(nn.Module):
    """Subtract a fixed mean from each column or channel and divide by a fixed standard deviation.

    Parameters
    ----------
    mean, std : array-like of float of shape (c,)
        One value for each column of rows `(n, c)` or each channel of images `(n, c, h, w)`; a
        single value for images `(n, h, w)`. They are kept as float32 buffers: not trained, but part
        of `state_dict` and of a pickle. A `std` of 0 counts as 1, and so does one that float32
        cannot tell from 0 beside `mean` (at most ``eps * abs(mean)``).

    Raises
    ------
    TypeError, ValueError
        If `mean` and `std` are not vectors of real numbers of one length, or if in float32 a value
        is not finite or a `std` is negative. In a call, if there is not one column or channel for
        each value.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import Standardize
    >>> standardize = Standardize(mean=[1.0, 10.0], std=[2.0, 0.0])
    >>> standardize(torch.tensor([[5.0, 10.0], [1.0, 13.0]]))
    tensor([[2., 0.],
            [0., 3.]])
    """

    def __init__(self, mean: ArrayLike, std: ArrayLike) -> None:
        super().__init__()
        means, stds = _as_float32(mean, "mean"), _as_float32(std, "std")
        if means.ndim != 1 or means.shape != stds.shape:
            raise ValueError(
                "mean and std must be vectors of one length, got shapes "
                f"{tuple(means.shape)} and {tuple(stds.shape)}."
            )
        self.mean, self.std = _buffers(means, stds)

    def forward(self, x: Tensor) -> Tensor:
        """Standardize a batch."""
        if not _is_dense(x) or x.ndim < 2 or len(self.mean) not in (1, x.shape[1]):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x is {got}; expected a tensor of rows, (n, {len(self.mean)}) or (n, "
                f"{len(self.mean)}, h, w)."
            )
        return _standardized(x, self.mean, self.std)


class NormalizeImages(nn.Module):
    """Scale and normalize images for a network that was trained on such images.

    Pass it as ``preprocess=`` if X holds images as they are in files. It computes
    ``(x / 255 - mean) / std`` for uint8 and ``(x - mean) / std`` for floats.

    Parameters
    ----------
    mean, std : float or array-like of float of shape (c,), default=0.0 and 1.0
        Mean and standard deviation that the network was trained with, on the scale 0..1: one
        number, or one for each channel. They are kept like those of :class:`Standardize`, so a
        `std` of 0 counts as 1, and follow each batch to its device.

    Raises
    ------
    TypeError, ValueError
        If `mean` and `std` are neither real numbers nor vectors of one length, or if in float32 a
        value is not finite, a `std` is negative, or a `mean` is not within 0..1.

    Notes
    -----
    Takes tensors of uint8 within 0..255 or of floats within 0..1: `(n, h, w, c)`, `(n, c, h, w)`,
    or grey `(n, h, w)`. The channels are the axis with as many entries as `mean` and `std` have. If
    these are numbers, they are the axis with 1, 3 or 4 entries, or else that beside two axes of the
    same length. Gives float32 `(n, c, h, w)`. Other dtypes are a TypeError, other shapes and values
    a ValueError.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import NormalizeImages
    >>> normalize = NormalizeImages(mean=[0.0, 0.0, 0.6], std=[1.0, 0.5, 0.2])
    >>> images = torch.full((5, 32, 32, 3), 255, dtype=torch.uint8)
    >>> normalize(images).shape
    torch.Size([5, 3, 32, 32])
    >>> normalize(images)[0, :, 0, 0]
    tensor([1.0000, 2.0000, 2.0000])
    """

    def __init__(self, mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> None:
        super().__init__()
        means, stds = _as_float32(mean, "mean"), _as_float32(std, "std")
        lengths = {values.shape for values in (means, stds) if values.ndim > 0}
        if len(lengths) > 1 or any(len(shape) > 1 for shape in lengths):
            raise ValueError(
                "mean and std must be numbers or vectors of one length, got shapes "
                f"{tuple(means.shape)} and {tuple(stds.shape)}."
            )
        self.mean, self.std = _buffers(*torch.broadcast_tensors(means, stds))
        if not ((means >= 0) & (means <= 1)).all():
            raise ValueError(
                f"mean goes from {means.min():.5g} to {means.max():.5g}; expected 0..1, the scale "
                "of pixels that are divided by 255. If mean and std are those of pixels of 0..255, "
                "divide both by 255."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch of images."""
        white = _white(images)
        x = self._channels_first(images).to(self.mean.dtype) / white
        return _standardized(x, sent(self.mean, x.device), sent(self.std, x.device))

    def _channels_first(self, images: Tensor) -> Tensor:
        """Images as (n, c, h, w)."""
        is_grey = images.ndim == 3
        x = images[:, None] if is_grey else images
        first, last = self._channel_axes(x.shape) if x.ndim == 4 else (False, False)
        if first == last or (last and is_grey):
            channels = len(self.mean) if self.mean.ndim else "1, 3 or 4"
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not show which axis has the channels; "
                f"expected (n, h, w, c) or (n, c, h, w), with {channels} channels on only one of "
                "these two axes, or grey (n, h, w). Pass mean and std with one value per channel, "
                "drop channels that these lack (images[..., :3]), or make a batch of a single "
                "image (images[None])."
            )
        return x.movedim(3, 1) if last else x

    def _channel_axes(self, shape: Sequence[int]) -> tuple[bool, bool]:
        """Whether axis 1, and whether axis 3, may be that of the channels."""
        n, c, h, w = shape
        if self.mean.ndim:
            return c == len(self.mean), w == len(self.mean)
        return has_channels_last((n, w, h, c)), has_channels_last((n, c, h, w))


class CifarResNet(nn.Module):
    """Residual network for 32 by 32 images with shortcuts that have no parameters [1]_.

    If a block doubles the number of channels, its shortcut takes every second pixel and adds zero
    channels, half before and half after ("option A"). The features are 64 global averages.

    Parameters
    ----------
    depth : int
        Number of layers with weights: 6 n + 2 with n >= 1. The paper has 20, 32, 44, 56 and 110.
    n_classes : int, default=10
        Number of logits, at least 2.

    Raises
    ------
    ValueError
        If `depth` is not 6 n + 2, or `n_classes` is below 2.

    Notes
    -----
    Takes float images `(n, 3, h, w)`, normalized like those that the weights were trained on, and
    gives logits `(n, n_classes)`. Fresh convolutions are drawn as in [2]_, eq. 14.

    References
    ----------
    .. [1] He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016,
       section 4.2.
    .. [2] He, Zhang, Ren & Sun, "Delving deep into rectifiers: surpassing human-level performance
       on ImageNet classification", ICCV 2015.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import CifarResNet
    >>> CifarResNet(20)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """

    def __init__(self, depth: int, n_classes: int = 10) -> None:
        super().__init__()
        validate_parameter_constraints(
            CONSTRAINTS, {"depth": depth, "n_classes": n_classes}, caller_name="CifarResNet"
        )
        n_blocks = _blocks_per_stage(depth, extra_layers=2)
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(_ResidualBlock, n_blocks, 16, 16, stride=1)
        self.layer2 = _stage(_ResidualBlock, n_blocks, 16, 32, stride=2)
        self.layer3 = _stage(_ResidualBlock, n_blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, n_classes)
        self.apply(_initialize)
        _note(self, "CifarResNet", depth=int(depth), n_classes=int(n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(_global_average(x))


class WideResNet(nn.Module):
    """Wide residual network, with pre-activation blocks, for 32 by 32 images [1]_.

    The features are `64 * widen_factor` global averages.

    Parameters
    ----------
    depth : int, default=40
        Number of layers with weights: 6 n + 4 with n >= 1. The paper has 16, 22, 28 and 40.
    widen_factor : int, default=2
        Factor on the number of channels of a :class:`CifarResNet`'s blocks, at least 1.
    dropout : float, default=0.3
        Probability of dropping an activation between the two convolutions of a block, in training.
    n_classes : int, default=10
        Number of logits, at least 2.

    Raises
    ------
    ValueError
        If `depth` is not 6 n + 4, `widen_factor` is below 1, `dropout` is outside [0, 1], or
        `n_classes` is below 2.

    Notes
    -----
    Takes float images `(n, 3, h, w)`, normalized like those that the weights were trained on, and
    gives logits `(n, n_classes)`. Fresh convolutions are drawn as in [2]_, eq. 14.

    References
    ----------
    .. [1] Zagoruyko & Komodakis, "Wide residual networks", BMVC 2016.
    .. [2] He, Zhang, Ren & Sun, "Delving deep into rectifiers: surpassing human-level performance
       on ImageNet classification", ICCV 2015.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import WideResNet
    >>> WideResNet(16, n_classes=100)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 100])
    """

    def __init__(
        self,
        depth: int = 40,
        widen_factor: int = 2,
        dropout: float = 0.3,
        n_classes: int = 10,
    ) -> None:
        super().__init__()
        validate_parameter_constraints(
            CONSTRAINTS,
            {
                "depth": depth,
                "widen_factor": widen_factor,
                "dropout": dropout,
                "n_classes": n_classes,
            },
            caller_name="WideResNet",
        )
        n_blocks = _blocks_per_stage(depth, extra_layers=4)
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        block = partial(_PreActivationBlock, dropout=dropout)
        self.conv1 = _conv3x3(3, 16)
        self.block1 = _stage(block, n_blocks, 16, widths[0], stride=1)
        self.block2 = _stage(block, n_blocks, widths[0], widths[1], stride=2)
        self.block3 = _stage(block, n_blocks, widths[1], widths[2], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], n_classes)
        self.apply(_initialize)
        _note(
            self,
            "WideResNet",
            depth=int(depth),
            widen_factor=int(widen_factor),
            dropout=float(dropout),
            n_classes=int(n_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(_global_average(F.relu(self.bn1(x))))


class CifarDenseNet(nn.Module):
    """Densely connected network with bottlenecks and compression, for 32 by 32 images [1]_.

    It is the paper's DenseNet-BC. A layer sees the maps of all layers before it in its block, and
    appends `growth` of its own. Between blocks, half of the maps and a quarter of the pixels
    remain. The features are global averages: 342 at depth 100 and growth 12.

    Parameters
    ----------
    depth : int, default=100
        Number of layers with weights: 6 n + 4 with n >= 1. The paper has 100, 190 and 250.
    growth : int, default=12
        Maps that a layer adds, at least 1. The paper has 12, 24 and 40.
    n_classes : int, default=10
        Number of logits, at least 2.

    Raises
    ------
    ValueError
        If `depth` is not 6 n + 4, `growth` is below 1, or `n_classes` is below 2.

    Notes
    -----
    Takes float images `(n, 3, h, w)`, normalized like those that the weights were trained on, and
    gives logits `(n, n_classes)`. Fresh convolutions are drawn as in [2]_, eq. 14.

    References
    ----------
    .. [1] Huang, Liu, van der Maaten & Weinberger, "Densely connected convolutional networks",
       CVPR 2017, section 3.
    .. [2] He, Zhang, Ren & Sun, "Delving deep into rectifiers: surpassing human-level performance
       on ImageNet classification", ICCV 2015.

    Examples
    --------
    >>> import torch
    >>> from skood.networks import CifarDenseNet
    >>> CifarDenseNet(22)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    """

    def __init__(self, depth: int = 100, growth: int = 12, n_classes: int = 10) -> None:
        super().__init__()
        validate_parameter_constraints(
            CONSTRAINTS,
            {"depth": depth, "growth": growth, "n_classes": n_classes},
            caller_name="CifarDenseNet",
        )
        n_layers = _blocks_per_stage(depth, extra_layers=4)
        width = 2 * growth
        self.conv1 = _conv3x3(3, width)
        self.block1 = _DenseBlock(n_layers, width, growth)
        width += n_layers * growth
        self.trans1 = _Transition(width, width // 2)
        width //= 2
        self.block2 = _DenseBlock(n_layers, width, growth)
        width += n_layers * growth
        self.trans2 = _Transition(width, width // 2)
        width //= 2
        self.block3 = _DenseBlock(n_layers, width, growth)
        width += n_layers * growth
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, n_classes)
        self.apply(_initialize)
        _note(self, "CifarDenseNet", depth=int(depth), growth=int(growth), n_classes=int(n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        return self.fc(_global_average(F.relu(self.bn1(x))))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "default_network": default_network,
    "CifarResNet": CifarResNet,
    "WideResNet": WideResNet,
    "CifarDenseNet": CifarDenseNet,
}
"""What makes the networks here, by the names that files of detectors use."""


def _note(network: nn.Module, name: str, **arguments: Any) -> None:
    """Note in a network what makes another one like it: a name in `BUILDERS`, and arguments."""
    vars(network)["_made_by"] = name, arguments


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else _SubsampleAndPad(stride, (out_channels - in_channels) // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class _SubsampleAndPad(nn.Module):
    """Take every `stride`-th pixel and add `padding` zero channels on either side."""

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class _PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = (
            None if in_channels == out_channels else _conv1x1(in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        out = self.conv2(self.dropout(out))
        # Only the identity takes the input before the activation.
        return out + (x if self.shortcut is None else self.shortcut(activated))


class _WithLength(nn.Module):
    """The features of a body, and behind them the logarithm of the length of the row."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        length = torch.log1p(x.square().mean(dim=1, keepdim=True))
        return torch.cat([self.body(x), length], dim=1)


class _Head(nn.Linear):
    """A linear layer of all features but the last, so that the length moves no logit."""

    def forward(self, input: Tensor) -> Tensor:
        # Products with rows that do not lie close together round by their place among others.
        return super().forward(input[:, :-1].contiguous())


class _DenseBlock(nn.Module):
    def __init__(self, n_layers: int, in_channels: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(_DenseLayer(in_channels + n * growth, growth) for n in range(n_layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv1x1(in_channels, 4 * growth)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], 1)


class _Transition(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


def _as_float32(values: ArrayLike, name: str) -> Tensor:
    numbers = valid_array(values, name, None, missing=True).astype(np.float64)
    return torch.from_numpy(numbers).to(torch.float32)


def _buffers(means: Tensor, stds: Tensor) -> tuple[nn.Buffer, nn.Buffer]:
    """Mean and standard deviation to keep in a module, or an error if they cannot be used."""
    if not (means.isfinite().all() and stds.isfinite().all() and (stds >= 0).all()):
        raise ValueError(
            "mean and std must be finite in float32 and std at least 0, "
            f"got mean={quoted(means.tolist())} and std={quoted(stds.tolist())}."
        )
    # The std of a constant column may be a rounding error.
    constant = stds <= torch.finfo(torch.float32).eps * means.abs()
    return nn.Buffer(means.contiguous()), nn.Buffer(stds.masked_fill(constant, 1.0))


def _standardized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if x.dim() < 3:
        return (x - mean) / std
    # Spread over the pixels in the layout of x: one value per channel is slow for images with the
    # channels last, which would be read three values at a time.
    per_channel = [-1] + [1] * (x.dim() - 2)
    mean, std = (
        torch.empty_like(x[:1], dtype=values.dtype).copy_(values.view(per_channel))
        for values in (mean, std)
    )
    return (x - mean) / std


def _is_dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def _white(images: Tensor) -> int:
    """Largest value of a pixel, by the dtype."""
    if not _is_dense(images):
        raise TypeError(
            f"images are a {type(images).__name__}; expected a dense tensor, such as "
            "torch.from_numpy(images)."
        )
    if images.dtype == torch.uint8:
        return 255
    if not images.is_floating_point():
        raise TypeError(
            f"images have dtype {str(images.dtype).removeprefix('torch.')}; expected uint8 within "
            "0..255 or floats within 0..1. Cast pixels of 0..255 to uint8."
        )
    # A graph that is compiled or exported has no values yet.
    if not torch.compiler.is_compiling() and ((images < 0) | (images > 1)).any():
        raise ValueError(
            f"images of dtype {str(images.dtype).removeprefix('torch.')} have values from "
            f"{images.min().item():g} to {images.max().item():g}; expected 0..1. Scale them, for "
            "instance with images / 255, or cast pixels of 0..255 to uint8. Clamp them if "
            "interpolation went beyond 0..1."
        )
    return 1


def _perceptron(n_columns: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_columns, 128),
        nn.LayerNorm(128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.LayerNorm(128),
        nn.ReLU(),
    )


def _convolutions(n_channels: int) -> list[nn.Module]:
    return [
        _conv3x3(n_channels, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _conv3x3(16, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _conv3x3(32, 64),
        nn.GroupNorm(1, 64),  # one group: layer normalization of an image
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]


def _stage(
    block: Callable[..., nn.Module], n_blocks: int, in_channels: int, out_channels: int, stride: int
) -> nn.Sequential:
    """Blocks of one width; the first changes size and width."""
    return nn.Sequential(
        block(in_channels, out_channels, stride=stride),
        *(block(out_channels, out_channels, stride=1) for _ in range(n_blocks - 1)),
    )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias, because the normalization that follows would cancel it."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def _global_average(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _blocks_per_stage(depth: int, extra_layers: int) -> int:
    """Blocks of two layers in each of three stages, beside `extra_layers` layers."""
    n_blocks, remainder = divmod(depth - extra_layers, 6)
    if remainder or n_blocks < 1:
        examples = ", ".join(str(6 * n + extra_layers) for n in (1, 2, 3))
        raise ValueError(
            f"depth must be 6 n + {extra_layers} with n >= 1 ({examples}, ...), got {depth}."
        )
    return n_blocks


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    smallest = SMALLEST_ROWS.get(len(shape))
    if smallest is None or not all(
        Number(Integral, least, None, closed="left").is_satisfied_by(size)
        for size, least in zip(shape, smallest, strict=True)
    ):
        raise ValueError(
            "input_shape must be the shape of one row, in positive integers: (d,) for columns, "
            "(h, w) or (c, h, w) for images, with h and w of at least 4; "
            f"got {quoted(input_shape)}."
        )
    return shape
