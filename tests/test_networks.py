from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from skood import SparseEnergyOODDetector
from skood.networks import (
    CifarDenseNet,
    CifarResNet,
    NormalizeImages,
    Standardize,
    WideResNet,
    default_network,
)

ROW_SHAPES = [
    (1,),
    (2,),
    (64,),
    (1000,),
    (4, 4),
    (5, 4),
    (8, 8),
    (28, 28),
    (1, 4, 4),
    (2, 5, 7),
    (3, 9, 33),
    (3, 32, 32),
]
NETWORKS = {
    "columns": (lambda: default_network((6,), 3), (6,)),
    "one channel": (lambda: default_network((7, 9), 3), (7, 9)),
    "channels": (lambda: default_network((2, 8, 8), 3), (2, 8, 8)),
    "resnet": (lambda: CifarResNet(8), (3, 16, 16)),
    "wide resnet": (lambda: WideResNet(10), (3, 16, 16)),
    "dense net": (lambda: CifarDenseNet(10), (3, 16, 16)),
}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=NETWORKS)
def network_and_rows(request):
    build, shape = NETWORKS[request.param]
    return build(), torch.randn(8, *shape)


def parameter_count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def features_and_logits(network, rows):
    """What enters the last module of the network, and what the network returns."""
    seen = []
    head = list(network.modules())[-1]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = network(rows)
    handle.remove()
    (features,) = seen
    return features, logits


# Standardize


def test_standardize_columns():
    standardize = Standardize([1.0, -2.0, 0.5], [2.0, 0.25, 1.0])
    rows = torch.tensor([[1.0, -2.0, 0.5], [5.0, -1.5, -0.5]])
    assert standardize(rows).tolist() == [[0.0, 0.0, 0.0], [2.0, 2.0, -1.0]]


def test_standardize_channels():
    standardize = Standardize([1.0, -2.0], [2.0, 0.5])
    images = torch.tensor([[[[1.0, 3.0]], [[-2.0, -1.0]]]])
    assert standardize(images).tolist() == [[[[0.0, 1.0]], [[0.0, 2.0]]]]


def test_standardize_images_without_channel_axis():
    images = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(Standardize([1.0], [4.0])(images), (images - 1) / 4)


def test_standardize_takes_integer_pixels():
    pixels = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert Standardize([5.0, 5.0], [10.0, 10.0])(pixels).tolist() == [[-0.5, 25.0]]


@pytest.mark.parametrize(
    ("mean", "std", "used"),
    [
        (3.0, 0.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.1, 1.4e-17, 1.0),
        (-1e6, 0.1, 1.0),
        (-1e6, 0.2, 0.2),
        (0.0, 1e-30, 1e-30),
        (1.0, 1e-60, 1.0),
    ],
)
def test_standardize_leaves_constant_columns_unscaled(mean, std, used):
    assert Standardize([mean], [std]).std.tolist() == pytest.approx([used], rel=1e-6)


def test_standardize_state_is_saved_but_not_trained():
    standardize = Standardize(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert list(standardize.parameters()) == []
    assert {name: value.tolist() for name, value in standardize.state_dict().items()} == {
        "mean": [1.0, 2.0],
        "std": [3.0, 4.0],
    }
    other = Standardize([0.0, 0.0], [1.0, 1.0])
    other.load_state_dict(standardize.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(standardize)), copy.deepcopy(standardize)):
        assert twin(torch.tensor([[4.0, 6.0]])).tolist() == [[1.0, 1.0]]
    assert standardize.double().mean.dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.ones, lambda n: np.ones(n, dtype=np.float32)])
def test_standardize_copies_what_it_is_given(kind):
    mean, std = kind(2), kind(2)
    standardize = Standardize(mean, std)
    mean[:] = 5
    std[:] = 5
    assert standardize.mean.tolist() == standardize.std.tolist() == [1.0, 1.0]


def test_standardize_takes_read_only_arrays():
    values = np.array([1.0, 2.0])
    values.flags.writeable = False
    assert Standardize(values, values).mean.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 0.0], [1.0], r"one length, got shapes \(2,\) and \(1,\)"),
        (0.0, 1.0, r"vectors of one length, got shapes \(\) and \(\)"),
        ([[0.0]], [[1.0]], r"got shapes \(1, 1\)"),
        ([0.0], [-1.0], r"std at least 0, got mean=\[0.0\] and std=\[-1.0\]"),
        ([float("nan")], [1.0], r"finite in float32 .* got mean=\[nan\]"),
        ([0.0], [float("inf")], r"finite in float32 .* std=\[inf\]"),
        ([1e39], [1.0], r"finite in float32 .* got mean=\[inf\]"),
    ],
)
def test_standardize_refuses(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Standardize(mean, std)


# Images


RGB = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pixels(*shape):
    return np.random.RandomState(0).randint(256, size=shape).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "to_channels_first", "mean", "std"),
    [
        ((5, 8, 9, 3), (0, 3, 1, 2), *RGB),
        ((5, 3, 8, 9), (0, 1, 2, 3), *RGB),
        ((5, 8, 9, 3), (0, 3, 1, 2), 0.5, 0.25),
        ((5, 3, 8, 9), (0, 1, 2, 3), 0.5, 0.25),
        ((5, 8, 9, 1), (0, 3, 1, 2), 0.5, 0.25),
        ((5, 4, 8, 9), (0, 1, 2, 3), 0.5, [0.1, 0.2, 0.3, 0.4]),
        ((5, 8, 9, 4), (0, 3, 1, 2), [0.1, 0.2, 0.3, 0.4], 0.5),
        # Told by mean and std, where 1, 3 or 4 would not tell.
        ((5, 8, 9, 2), (0, 3, 1, 2), [0.1, 0.2], [0.3, 0.4]),
        ((5, 12, 8, 9), (0, 1, 2, 3), np.linspace(0, 1, 12), 1.0),
        ((5, 3, 4, 4), (0, 1, 2, 3), *RGB),
        ((5, 4, 4, 3), (0, 3, 1, 2), *RGB),
    ],
)
def test_images_are_scaled_normalized_and_put_channels_first(
    shape, to_channels_first, mean, std, dtype
):
    x = pixels(*shape)
    channels_first = x.transpose(to_channels_first)
    mean_of_each, std_of_each = (
        np.broadcast_to(values, channels_first.shape[1])[:, None, None] for values in (mean, std)
    )
    expected = (channels_first / 255 - mean_of_each) / std_of_each
    images = torch.from_numpy(x if dtype == np.uint8 else (x / 255).astype(dtype))
    before = images.clone()
    normalized = NormalizeImages(mean, std)(images)
    assert normalized.dtype == torch.float32
    tolerance = 1e-2 if dtype == np.float16 else 1e-5
    np.testing.assert_allclose(normalized.numpy(), expected, atol=tolerance, rtol=0)
    assert torch.equal(images, before)


def test_grey_images_get_a_channel_axis():
    x = pixels(5, 8, 9)
    for values in ((0.5, 0.25), ([0.5], [0.25]), ([0.5], 0.25)):
        normalized = NormalizeImages(*values)(torch.from_numpy(x))
        np.testing.assert_allclose(normalized.numpy(), ((x / 255 - 0.5) / 0.25)[:, None], atol=1e-6)


def test_images_are_scaled_alone_by_default():
    x = torch.from_numpy(pixels(2, 3, 8, 8))
    assert torch.equal(NormalizeImages()(x), x / 255)
    assert NormalizeImages()(
        torch.tensor([[[0, 255] * 3]], dtype=torch.uint8)
    ).unique().tolist() == [0, 1]


def test_images_without_rows_stay_without():
    assert NormalizeImages()(torch.empty(0, 8, 8, 3)).shape == (0, 3, 8, 8)


def test_nonfinite_pixels_pass_on_for_the_detector_to_name():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 2, 3, 4] = float("nan")
    assert NormalizeImages()(images).isnan().sum() == 1


@pytest.mark.parametrize("values", [RGB, (0.5, 0.25)], ids=["vectors", "numbers"])
def test_images_are_normalized_on_their_device(values):
    normalize = NormalizeImages(*values)
    images = torch.empty(2, 8, 8, 3, dtype=torch.uint8, device="meta")
    assert normalize(images).device == images.device
    assert normalize.mean.device == torch.device("cpu")


def test_normalization_of_images_is_part_of_a_network():
    images = torch.from_numpy(pixels(4, 16, 16, 3))
    normalize = NormalizeImages(*RGB)
    network = nn.Sequential(normalize, CifarResNet(8)).eval()
    logits = network[1](normalize(images))
    for twin in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(twin(images), logits)
    assert {name for name in network.state_dict() if name.startswith("0")} == {"0.mean", "0.std"}
    assert list(normalize.parameters()) == []
    other = NormalizeImages(0.0, [1.0] * 3)
    other.load_state_dict(normalize.state_dict())
    assert torch.equal(other(images), normalize(images))
    torch.testing.assert_close(network.double()(images).float(), logits, rtol=1e-4, atol=1e-5)
    assert network(images).dtype == torch.float64


def test_a_detector_takes_images_with_it():
    x = pixels(120, 8, 8)
    y = np.arange(120) % 2
    x[y == 1, :4] //= 4
    detector = SparseEnergyOODDetector(
        preprocess=NormalizeImages(0.3, 0.2), pretrain_epochs=1, max_epochs=1, random_state=0
    )
    scores = detector.fit(x, y).score_samples(x)
    assert np.array_equal(detector.score_samples((x / 255).astype(np.float32)), scores)
    plain = SparseEnergyOODDetector(pretrain_epochs=1, max_epochs=1, random_state=0)
    rows = ((x[:, None] / np.float32(255) - np.float32(0.3)) / np.float32(0.2)).astype(np.float32)
    np.testing.assert_allclose(plain.fit(rows, y).score_samples(rows), scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 8, 8, 3, dtype=torch.int64), TypeError, "dtype int64; .* to uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.bool), TypeError, "dtype bool; expected uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), TypeError, "a ndarray; expected a dense tensor"),
        (torch.full((2, 8, 8, 3), 255.0), ValueError, r"to 255; expected 0\.\.1\. Scale .* uint8"),
        (torch.linspace(-0.5, 1, 384).view(2, 3, 8, 8), ValueError, "from -0.5 to 1; expected"),
        (torch.full((2, 3, 8, 8), 1.001), ValueError, "from 1.001 to 1.001; expected"),
    ],
)
def test_images_of_other_kinds_and_scales_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        NormalizeImages()(images)


@pytest.mark.parametrize(
    ("shape", "n_channels"),
    [
        ((8, 8, 4, 4, 3), None),
        ((5, 64), None),
        ((64,), None),
        ((), None),
        ((5, 8, 9, 2), None),  # no axis of 1, 3 or 4
        ((5, 3, 8, 4), None),  # two of them
        ((5, 3, 8, 3), None),
        ((32, 32, 3), None),  # a single image
        ((32, 32, 3), 3),
        ((5, 3, 8, 3), 3),
        ((5, 8, 9, 4), 3),
        ((5, 1, 8, 9), 3),
        ((5, 8, 9), 3),
        ((5, 3, 8, 9), 1),
    ],
)
def test_images_whose_channels_cannot_be_told_are_refused(shape, n_channels):
    normalize = NormalizeImages() if n_channels is None else NormalizeImages([0.5] * n_channels)
    expected = "1, 3 or 4" if n_channels is None else n_channels
    with pytest.raises(ValueError, match=f"expected .* {expected} channels") as raised:
        normalize(torch.zeros(shape, dtype=torch.uint8))
    assert str(raised.value).startswith(f"images of shape {shape} ")
    assert "images[None]" in str(raised.value)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 0.0], [1.0], r"numbers or vectors of one length, got shapes \(2,\) and \(1,\)"),
        ([[0.0]], 1.0, r"got shapes \(1, 1\) and \(\)"),
        (0.0, -1.0, "std at least 0, got mean=0.0 and std=-1.0"),
        ([0.0], [-1.0], r"std at least 0, got mean=\[0.0\] and std=\[-1.0\]"),
        (float("nan"), 1.0, "finite in float32 .* got mean=nan"),
        ([123.675, 116.28], [58.4, 57.1], r"mean goes from 116.28 to 123.68; .*divide both by 255"),
        (-0.5, 1.0, r"mean goes from -0.5 to -0.5; expected 0..1"),
    ],
)
def test_normalization_refuses(mean, std, message):
    with pytest.raises(ValueError, match=message):
        NormalizeImages(mean, std)


def test_normalization_leaves_constant_channels_unscaled():
    assert NormalizeImages(0.5, [0.0, 2.0]).std.tolist() == [1.0, 2.0]


# The default networks


@pytest.mark.parametrize("n_classes", [2, 7])
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_default_network_takes_any_shape(shape, n_classes):
    network = default_network(shape, n_classes).eval()
    logits = network(torch.randn(3, *shape))
    assert logits.shape == (3, n_classes)
    assert logits.isfinite().all()


def test_default_network_is_a_plain_sequence_from_standardize_to_a_linear_head():
    for shape in ROW_SHAPES:
        network = default_network(shape, 2)
        assert type(network) is nn.Sequential
        assert type(network[0]) is Standardize
        assert isinstance(network[-1], nn.Linear)


def test_default_network_sizes():
    # Weights, biases, and scales and shifts of normalization, layer by layer.
    perceptron = (64 * 128 + 128 + 256) + (128 * 128 + 128 + 256) + (128 * 10 + 10)
    convolutions = (9 * 3 * 16 + 32) + (9 * 16 * 32 + 64) + (9 * 32 * 64 + 128) + (64 * 10 + 10)
    assert parameter_count(default_network((64,), 10)) == perceptron
    assert parameter_count(default_network((3, 32, 32), 10)) == convolutions


def test_default_network_standardizes_with_what_it_is_given():
    network = default_network((2, 4, 4), 3, mean=[1.0, 2.0], std=[3.0, 0.0])
    assert network[0].mean.tolist() == [1.0, 2.0]
    assert network[0].std.tolist() == [3.0, 1.0]
    plain = default_network((2, 4, 4), 3)
    plain[1:].load_state_dict(network[1:].state_dict())
    images = torch.randn(5, 2, 4, 4)
    moved = images * torch.tensor([3.0, 1.0]).view(2, 1, 1) + torch.tensor([1.0, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(network.eval()(moved), plain.eval()(images))


def test_default_network_of_one_channel_needs_no_channel_axis():
    without, with_axis = default_network((6, 5), 3).eval(), default_network((1, 6, 5), 3).eval()
    for target, source in zip(with_axis.parameters(), without.parameters(), strict=True):
        target.data.copy_(source.data)
    images = torch.randn(4, 6, 5)
    torch.testing.assert_close(without(images), with_axis(images[:, None]))


@pytest.mark.parametrize(("shape", "width"), [((6,), 128), ((9, 6), 64), ((3, 8, 8), 64)])
def test_default_features_stay_bounded_far_away(shape, width):
    # Normalized to mean square 1, no unit (or channel average) exceeds sqrt(width).
    network = default_network(shape, 2).eval()
    features = network[:-1](1e6 * torch.randn(16, *shape))[:, :width]
    assert features.shape == (16, width)
    assert 0 < features.max() <= width**0.5


def test_the_last_feature_of_the_default_perceptron_is_the_length_of_the_row():
    network = default_network((6,), 2, mean=np.ones(6), std=2 * np.ones(6))
    rows = 1e3 * torch.randn(16, 6)
    features = network[:-1](rows)
    assert features.shape == (16, 129)
    expected = np.log(1 + np.mean(((rows.numpy() - 1) / 2) ** 2, axis=1))
    np.testing.assert_allclose(features[:, -1].detach(), expected, rtol=1e-5)
    # No logit sees it.
    moved = torch.cat([features[:, :-1], 0 * features[:, -1:]], dim=1)
    assert torch.equal(network[-1](moved), network[-1](features))


def test_default_perceptron_trains_on_rows_independently():
    network = default_network((5,), 2).train()
    rows = torch.randn(8, 5)
    torch.testing.assert_close(network(rows[:1]), network(rows)[:1])


def test_default_network_draws_from_the_global_generator():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(default_network((4,), 2)[-1].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 4), (4, 3), (32, 32, 3), (0, 8, 8), (1, 3, 8, 8), (2.5,), (-1,), 64, "4"],
)
def test_default_network_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"input_shape must be .* \(d,\) .*\(c, h, w\)") as error:
        default_network(shape, 2)
    assert str(error.value).endswith(f"got {shape!r}.")


@pytest.mark.parametrize(
    ("shape", "values", "named"), [((3,), 2, "3"), ((4, 4), 4, "1"), ((2, 4, 4), 3, "2")]
)
def test_default_network_refuses_statistics_of_other_length(shape, values, named):
    with pytest.raises(ValueError, match=f"must have {named} values .*, got {values}"):
        default_network(shape, 2, mean=np.zeros(values), std=np.ones(values))


@pytest.mark.parametrize("n_classes", [1, 0, -3, 2.0, "3", None, True])
def test_fewer_than_two_classes_are_refused(n_classes):
    for name, build in {
        "default_network": lambda: default_network((4,), n_classes),
        "CifarResNet": lambda: CifarResNet(8, n_classes),
        "WideResNet": lambda: WideResNet(10, n_classes=n_classes),
        "CifarDenseNet": lambda: CifarDenseNet(10, n_classes=n_classes),
    }.items():
        message = (
            rf"'n_classes' parameter of {name} must be .* \[2, 10000000\]\. Got {n_classes!r} "
        )
        with pytest.raises(ValueError, match=message):
            build()


def test_numpy_integers_are_integers():
    network = default_network((np.int64(4),), np.int64(3))
    assert network(torch.zeros(2, 4)).shape == (2, 3)


# All networks


def test_head_is_linear_on_non_negative_features(network_and_rows):
    network, rows = network_and_rows
    for mode in (True, False):
        features, logits = features_and_logits(network.train(mode), rows)
        head = list(network.modules())[-1]
        assert isinstance(head, nn.Linear)
        assert len(features) == 8
        assert features.shape[1] - head.in_features in (0, 1)  # the length of the row
        assert features.min() >= 0
        assert features.max() > 0
        torch.testing.assert_close(head(features), logits)


def test_rows_are_independent_in_evaluation_mode(network_and_rows):
    network, rows = network_and_rows
    network.eval()
    logits = network(rows)
    others = torch.cat([rows[:1], 100 * torch.randn_like(rows[1:])])
    torch.testing.assert_close(network(others)[:1], logits[:1])
    torch.testing.assert_close(network(rows[:1]), logits[:1])
    torch.testing.assert_close(network(rows.flip(0)), logits.flip(0))


def test_gradients_reach_every_parameter(network_and_rows):
    network, rows = network_and_rows
    nn.functional.cross_entropy(network(rows), torch.arange(8) % 3).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_pickles_and_copies_give_the_same_logits(network_and_rows):
    network, rows = network_and_rows
    network(rows)
    logits = network.eval()(rows)
    for twin in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(twin(rows), logits)


def test_other_precisions_and_layouts_agree(network_and_rows):
    network, rows = network_and_rows
    network.eval()
    logits = network(rows)
    torch.testing.assert_close(
        copy.deepcopy(network).double()(rows.double()).float(), logits, rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        low = network(rows)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), logits, rtol=0.1, atol=0.1)
    if rows.ndim == 4:
        network.to(memory_format=torch.channels_last)
        images = rows.to(memory_format=torch.channels_last)
        torch.testing.assert_close(network(images), logits, rtol=1e-4, atol=1e-5)


# CIFAR ResNets


def layer_keys(name, layer):
    entries = {
        "conv": ["weight"],
        "linear": ["weight", "bias"],
        "bn": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    }
    return {f"{name}.{entry}" for entry in entries[layer]}


def test_resnet_keys():
    expected = (
        layer_keys("conv1", "conv") | layer_keys("bn1", "bn") | layer_keys("linear", "linear")
    )
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            for i in (1, 2):
                expected |= layer_keys(f"layer{stage}.{block}.conv{i}", "conv")
                expected |= layer_keys(f"layer{stage}.{block}.bn{i}", "bn")
    assert set(CifarResNet(20).state_dict()) == expected


def test_wide_resnet_keys():
    expected = layer_keys("conv1", "conv") | layer_keys("bn1", "bn") | layer_keys("fc", "linear")
    for stage in (1, 2, 3):
        expected |= layer_keys(f"block{stage}.0.shortcut", "conv")
        for block in (0, 1):
            for i in (1, 2):
                expected |= layer_keys(f"block{stage}.{block}.conv{i}", "conv")
                expected |= layer_keys(f"block{stage}.{block}.bn{i}", "bn")
    assert set(WideResNet(16).state_dict()) == expected
    narrow = set(WideResNet(16, widen_factor=1).state_dict())
    assert narrow == expected - {"block1.0.shortcut.weight"}


def test_dense_net_keys():
    expected = layer_keys("conv1", "conv") | layer_keys("bn1", "bn") | layer_keys("fc", "linear")
    for trans in ("trans1", "trans2"):
        expected |= layer_keys(f"{trans}.bn1", "bn") | layer_keys(f"{trans}.conv1", "conv")
    for block in (1, 2, 3):
        for layer in (0, 1):
            for i in (1, 2):
                expected |= layer_keys(f"block{block}.layer.{layer}.conv{i}", "conv")
                expected |= layer_keys(f"block{block}.layer.{layer}.bn{i}", "bn")
    assert set(CifarDenseNet(16).state_dict()) == expected


@pytest.mark.parametrize(
    ("depth", "growth", "features", "count"),
    [(100, 12, 342, 769_162), (190, 40, 2190, 25_624_430)],  # 0.8 and 25.6 million in the paper
)
def test_dense_net_sizes(depth, growth, features, count):
    n_layers, width = (depth - 4) // 6, 2 * growth
    expected = 27 * width
    for block in (1, 2, 3):
        for _ in range(n_layers):
            expected += 2 * width + 4 * growth * width + 8 * growth + 36 * growth * growth
            width += growth
        if block < 3:
            expected += 2 * width + width * (width // 2)
            width //= 2
    assert width == features
    assert expected + 2 * width + 10 * width + 10 == count
    with torch.device("meta"):
        assert parameter_count(CifarDenseNet(depth, growth)) == count


@pytest.mark.parametrize(
    ("depth", "count"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_resnet_sizes(depth, count):
    # Two convolutions and two normalizations a block; the first convolution at widths 32 and 64
    # has half as many inputs.
    blocks = (depth - 2) // 6 * sum(2 * (9 * w * w + 2 * w) for w in (16, 32, 64))
    assert 27 * 16 + 32 + blocks - (9 * 32 * 32 + 9 * 64 * 64) // 2 + 650 == count
    assert parameter_count(CifarResNet(depth)) == count
    assert parameter_count(CifarResNet(depth, n_classes=100)) == count + 90 * 65


@pytest.mark.parametrize(
    ("depth", "widen_factor", "count"),
    [(16, 1, 175_066), (16, 2, 691_674), (40, 2, 2_243_546)],
)
def test_wide_resnet_sizes(depth, widen_factor, count):
    widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
    expected = 27 * 16 + 2 * widths[3] + 10 * widths[3] + 10
    for before, width in pairwise(widths):
        n_plain = (depth - 4) // 6 - 1
        expected += 2 * before + 9 * before * width + 2 * width + 9 * width * width
        expected += before * width if before != width else 0
        expected += n_plain * (4 * width + 18 * width * width)
    assert expected == count
    assert parameter_count(WideResNet(depth, widen_factor)) == count


def test_resnet_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = CifarResNet(8).layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_resnet_block_ends_in_relu_after_the_sum():
    block = CifarResNet(8).layer1[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x.clamp(min=0))


def test_wide_resnet_projects_the_activated_input_where_the_width_changes():
    block = WideResNet(10).block2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    block.bn1.running_mean.fill_(0.3)
    x = torch.randn(2, 32, 6, 6)
    activated = ((x[:, :, ::2, ::2] - 0.3) / (1 + block.bn1.eps) ** 0.5).clamp(min=0)
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[:, :, 0, 0], activated)
    torch.testing.assert_close(block(x), expected)


def test_wide_resnet_carries_the_raw_input_elsewhere():
    block = WideResNet(16).block2[1].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(block(x), x)


def test_dense_layer_puts_its_maps_behind_those_that_it_got():
    layer = CifarDenseNet(10, growth=2).block1.layer[0].eval()
    layer.bn1.running_mean.fill_(0.3)
    x = torch.randn(2, 4, 6, 6)
    out = layer(x)
    assert torch.equal(out[:, :4], x)
    activated = ((x - 0.3) / (1 + layer.bn1.eps) ** 0.5).clamp(min=0)
    hidden = torch.einsum("oi,nihw->nohw", layer.conv1.weight[:, :, 0, 0], activated)
    hidden = (hidden / (1 + layer.bn2.eps) ** 0.5).clamp(min=0)
    new = nn.functional.conv2d(hidden, layer.conv2.weight, padding=1)
    torch.testing.assert_close(out[:, 4:], new)


def test_dense_transition_halves_maps_and_averages_four_pixels():
    trans = CifarDenseNet(10, growth=2).trans1.eval()
    x = torch.randn(2, 6, 6, 4)
    mixed = torch.einsum("oi,nihw->nohw", trans.conv1.weight[:, :, 0, 0], x.clamp(min=0))
    expected = mixed.reshape(2, 3, 3, 2, 2, 2).mean((3, 5)) / (1 + trans.bn1.eps) ** 0.5
    torch.testing.assert_close(trans(x), expected)


def test_wide_resnet_drops_activations_in_training_only():
    images = torch.randn(4, 3, 8, 8)
    network = WideResNet(10, dropout=0.5)
    assert not torch.equal(network(images), network(images))
    assert torch.equal(network.eval()(images), network(images))
    without = WideResNet(10, dropout=0.0)
    assert torch.equal(without(images), without(images))
    assert {m.p for m in WideResNet(10).modules() if isinstance(m, nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("build", "depth", "stage"), [(CifarResNet, 8, "layer"), (WideResNet, 10, "block")]
)
def test_second_and_third_stage_halve_the_image(build, depth, stage):
    network = build(depth)
    x, sizes = network.conv1(torch.zeros(1, 3, 16, 12)), []
    for i in (1, 2, 3):
        x = network.get_submodule(f"{stage}{i}")(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(16, 12), (8, 6), (4, 3)]


@pytest.mark.parametrize(
    ("build", "depth"), [(CifarResNet, 20), (WideResNet, 16), (CifarDenseNet, 40)]
)
def test_fresh_weights_keep_the_variance_of_gradients(build, depth):
    network = build(depth)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            assert abs(module.weight.mean().item()) < 0.05 * (2 / fan_out) ** 0.5
    assert not list(network.modules())[-1].bias.any()


@pytest.mark.parametrize("depth", [2, 18, 21, 22])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"6 n \+ 2 with n >= 1 \(8, 14, 20.*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("depth", [4, 20, 39, 42])
@pytest.mark.parametrize("build", [WideResNet, CifarDenseNet])
def test_wide_and_dense_networks_refuse_other_depths(build, depth):
    with pytest.raises(ValueError, match=rf"6 n \+ 4 with n >= 1 \(10, 16, 22.*got {depth}"):
        build(depth)


@pytest.mark.parametrize("depth", [20.0, "20", True, None])
@pytest.mark.parametrize("build", [CifarResNet, WideResNet, CifarDenseNet])
def test_depths_that_are_no_integers_are_refused(build, depth):
    with pytest.raises(TypeError, match=f"'depth' parameter of {build.__name__} .* Got {depth!r} "):
        build(depth)


@pytest.mark.parametrize("widen_factor", [0, 1.5, True])
def test_wide_resnet_refuses_other_widths(widen_factor):
    with pytest.raises(ValueError, match=f"'widen_factor' .* int .* Got {widen_factor} "):
        WideResNet(10, widen_factor)


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan"), "0.3", True])
def test_wide_resnet_refuses_other_probabilities(dropout):
    with pytest.raises(ValueError, match=rf"'dropout' .* \[0\.0, 1\.0\]\. Got {dropout!r} "):
        WideResNet(10, dropout=dropout)
