from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from skood.engine.hardware import Precision
from skood.engine.inference import forward_rows, score_rows
from skood.engine.outputs import Seen, as_float64
from skood.engine.rows import InMemory, Rows
from skood.engine.shapes import Shapes
from skood.exceptions import NonFiniteLogitsError, SlowScoringWarning
from skood.rows import as_rows

TABLE = np.random.RandomState(0).randn(600, 8)
IMAGES = np.random.RandomState(0).rand(600, 3, 8, 8)


def mlp(width=32):
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, width),
        nn.ReLU(),
        nn.Linear(width, 5),
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


NETWORKS = {"mlp": (mlp, TABLE), "convolutional": (convolutional, IMAGES)}

PRECISIONS = {
    "float32": (torch.float32, "float32"),
    "float64": (torch.float64, "float32"),
    "bfloat16": (torch.float32, "bfloat16"),
}


def rows_of(X):
    return X if isinstance(X, Rows) else as_rows(X)


def outputs(network, X):
    """Features and logits of all rows, in one piece."""
    pieces = list(forward_rows(network, rows_of(X), features=True))
    assert [i for piece, *_ in pieces for i in range(len(X))[piece]] == list(range(len(X)))
    return Seen.joined([seen for _, seen in pieces])[:2]


def assert_equal(found, expected, rows=slice(None)):
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other[rows])


@pytest.fixture(params=[(n, p) for n in NETWORKS for p in PRECISIONS], ids="-".join)
def padded(request, opened):
    """A network that runs every request on one padded shape, and rows for it."""
    (make, X), (dtype, precision) = NETWORKS[request.param[0]], PRECISIONS[request.param[1]]
    return opened(make().to(dtype), X, precision=precision), X


# Values


@pytest.mark.parametrize("n_rows", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_one_plain_forward(opened, name, n_rows):
    make, X = NETWORKS[name]
    network = opened(make(), X)
    features, logits = outputs(network, X[:n_rows])
    body, head = network.module[:-1], network.module[-1]
    with torch.no_grad():
        expected = body(torch.tensor(X[:n_rows], dtype=torch.float32))
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, head(expected).double(), rtol=1e-5, atol=1e-6)
    assert features.dtype == torch.float32
    assert logits.dtype == torch.float64
    assert not logits.requires_grad


def test_features_are_given_where_asked_for(opened):
    network = opened(mlp(), TABLE)
    assert {hidden for _, (hidden, _, _) in forward_rows(network, as_rows(TABLE))} == {None}


def test_bfloat16_scores_in_bfloat16(opened):
    network = opened(mlp(), TABLE, precision="bfloat16")
    features, logits = outputs(network, TABLE)
    assert features.dtype == torch.bfloat16
    assert torch.equal(logits.bfloat16().double(), logits)
    exact = outputs(opened(mlp(), TABLE), TABLE)[1]
    assert logits.shape == exact.shape


def test_what_trains_in_bfloat16_scores_in_its_own_dtype(opened):
    network, plain = opened(mlp(), TABLE), opened(mlp(), TABLE)
    plain.module.load_state_dict(network.module.state_dict())
    network.precision = Precision(torch.bfloat16, None)
    assert_equal(outputs(network, TABLE), outputs(plain, TABLE))


# A row's result depends on that row alone. Bitwise, where rows of features are aligned in memory:
# matrix products of some CPUs round rows of an odd width by their alignment.


def test_order_does_not_matter(padded):
    network, X = padded
    order = np.random.RandomState(1).permutation(len(X))
    assert_equal(outputs(network, X[order]), outputs(network, X), order)
    assert_equal(outputs(network, as_rows(X).pick(order)), outputs(network, X), order)


def test_neighbours_do_not_matter(padded):
    network, X = padded
    others = np.random.RandomState(1).randn(*X.shape) * 100
    kept = np.arange(0, len(X), 7)
    others[kept] = X[kept]
    for own, other in zip(outputs(network, X), outputs(network, others), strict=True):
        assert torch.equal(own[kept], other[kept])
        assert not torch.equal(own, other)


@pytest.mark.parametrize("size", [1, 2, 17, 255, 256, 257, 599])
def test_the_size_of_the_request_does_not_matter(padded, size):
    network, X = padded
    whole = outputs(network, X)
    for start in (0, 101, len(X) - size):
        if start + size <= len(X):
            stop = start + size
            assert_equal(outputs(network, X[start:stop]), whole, slice(start, stop))


def test_rows_may_be_asked_for_repeatedly_and_in_any_order(padded):
    network, X = padded
    rows = np.array([5, 599, 5, 0, *range(300, 0, -1)])
    assert_equal(outputs(network, as_rows(X).pick(rows)), outputs(network, X), rows)


def test_autocast_around_the_call_does_not_matter(padded):
    network, X = padded
    expected = outputs(network, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(outputs(network, X), expected)


@pytest.mark.parametrize("width", [5, 33, 50])
def test_order_matters_to_rounding_at_most_for_features_of_any_width(opened, width):
    network = opened(mlp(width), TABLE)
    order = np.random.RandomState(1).permutation(len(TABLE))
    for own, other in zip(outputs(network, TABLE[order]), outputs(network, TABLE), strict=True):
        torch.testing.assert_close(own, other[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_rows_lie_in_memory_does_not_matter(opened, dtype):
    aligned = torch.tensor(TABLE, dtype=dtype).numpy()
    shifted = np.empty(aligned.size + 1, aligned.dtype)[1:].reshape(aligned.shape)
    shifted[:] = aligned
    network = opened(nn.Linear(8, 5).to(dtype), aligned)
    assert_equal(outputs(network, shifted), outputs(network, aligned))


@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 16, 17, 100, 300])
def test_smaller_forwards_do_not_matter(padded, n_rows):
    network, X = padded
    assert network.shapes.small == 0
    found = outputs(network, X[:n_rows])
    network.shapes = Shapes(network.shapes.ladder[-1:])
    assert_equal(found, outputs(network, X[:n_rows]))


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_an_image_alone_agrees_with_many(opened, dtype):
    own, precision = PRECISIONS[dtype]
    network = opened(convolutional().to(own), IMAGES, small_shape=True, precision=precision)
    network.shapes = Shapes(network.shapes.ladder[-1:], small=1)
    whole = outputs(network, IMAGES)
    for found, expected in zip(outputs(network, IMAGES[:1]), whole, strict=True):
        torch.testing.assert_close(found, expected[:1], rtol=1e-5, atol=1e-7)
    # Two have the padded shape.
    assert_equal(outputs(network, IMAGES[:2]), whole, slice(0, 2))


class Crowded(nn.Module):
    """Has memory for a number of rows at a time."""

    def __init__(self, network, most):
        super().__init__()
        self.network = network
        self.most = most
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.network(x)


def test_batches_are_halved_until_there_is_memory(opened):
    network = opened(Crowded(mlp(), 10**6), TABLE, fold_batch_norm=False)
    whole = outputs(network, TABLE)
    network.shapes, network.module.most = Shapes((512,)), 200
    network.module.seen.clear()
    with pytest.warns(
        SlowScoringWarning, match=r"cpu has no memory for a forward of (512|256) rows"
    ):
        found = outputs(network, TABLE)
    assert network.module.seen == [512, 256, 128, 128, 128, 128, 128]
    assert network.shapes == Shapes((128,))
    for own, other in zip(found, whole, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_smaller_shapes_that_are_known_are_taken_where_there_is_no_memory(opened):
    network = opened(Crowded(mlp(), 10**6), TABLE, fold_batch_norm=False)
    whole = outputs(network, TABLE)
    network.module.most = 100
    with pytest.warns(SlowScoringWarning, match=r"scores are computed (256|64) at a time"):
        assert_equal(outputs(network, TABLE), whole)
    assert network.shapes == Shapes((4, 16, 64))


def test_few_rows_without_memory_run_in_other_shapes(opened):
    network = opened(Crowded(mlp(), 10**6), TABLE, fold_batch_norm=False)
    network.shapes = dataclasses.replace(network.shapes, small=16)
    network.module.most = 8
    with pytest.warns(SlowScoringWarning, match="no memory for a forward of 16 rows"):
        found = outputs(network, TABLE[:3])
    assert_equal(found, outputs(network, TABLE[:3]))
    assert network.shapes == Shapes((4,))


def test_memory_may_run_out_in_the_middle(opened):
    network = opened(Crowded(mlp(), 10**6), TABLE, fold_batch_norm=False)
    expected = scored(network, TABLE, product)
    network.shapes = Shapes((128,))

    def score(hidden, logits, layers):
        if network.module.seen.count(128) == 3:
            network.module.most = 64
        return product(hidden, logits, layers)

    network.module.seen.clear()
    with pytest.warns(SlowScoringWarning, match="forward of 128 rows: .* 64 at a time"):
        found = scored(network, TABLE, score)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_row_for_which_there_is_no_memory_is_an_error(opened):
    network = opened(Crowded(mlp(), 10**6), TABLE, fold_batch_norm=False)
    network.shapes, network.module.most = Shapes((4,)), 0
    with (
        pytest.warns(SlowScoringWarning, match="no memory"),
        pytest.raises(torch.OutOfMemoryError, match="out of memory"),
    ):
        outputs(network, TABLE)


# What the forward touches


class WritesIntoItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize("writer", ["network", "preprocess"])
@pytest.mark.parametrize("n_rows", [3, 600])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_rows_are_left_alone_by_a_network_that_writes_into_its_input(opened, writer, n_rows, kind):
    X = TABLE[:n_rows].astype(np.float32)
    rows = X.copy() if kind == "array" else torch.tensor(X)
    if writer == "network":
        network = opened(nn.Sequential(WritesIntoItsInput(), nn.Linear(8, 3)), rows)
    else:
        network = opened(nn.Linear(8, 3), rows, preprocess=lambda batch: batch.mul_(2))
    first, second = outputs(network, rows), outputs(network, rows)
    assert np.array_equal(np.asarray(rows), X)
    assert_equal(second, first)


class Recorded(np.ndarray):
    """Rows that note how many of them are asked for at a time, and refuse to be read whole."""

    asked: list[int]

    def __getitem__(self, index):
        rows = self.view(np.ndarray)[index]
        self.asked.append(len(rows))
        return rows

    def refuse(self, *args, **kwargs):
        raise AssertionError("read whole")

    __array__ = __array_ufunc__ = __array_function__ = astype = copy = tobytes = refuse


def test_a_large_read_only_memmap_is_read_slice_by_slice(opened, tmp_path):
    n_rows = 200_000
    written = np.memmap(tmp_path / "rows", dtype=">f8", mode="w+", shape=(n_rows, 3))
    written[:] = np.random.RandomState(0).randn(n_rows, 3)
    written.flush()
    X = np.memmap(tmp_path / "rows", dtype=">f8", mode="r", shape=(n_rows, 3)).view(Recorded)
    X.asked = []
    network = opened(nn.Linear(3, 2).double(), np.array(written[:8]))
    scores = np.empty((n_rows, 2))
    for piece, (_, logits, _) in forward_rows(network, InMemory(X)):
        scores[piece] = logits.numpy()
    assert max(X.asked) <= network.shapes.ladder[-1] < n_rows
    assert sum(X.asked) <= n_rows + network.shapes.ladder[-1]
    weight, bias = (p.detach().numpy() for p in network.module.parameters())
    np.testing.assert_allclose(scores, written @ weight.T + bias, rtol=1e-9, atol=1e-12)


# Logits that are no numbers


@pytest.mark.parametrize(("value", "row"), [(1e3, 299), (np.float32(3e38), 0), (-1e3, 598)])
@pytest.mark.parametrize("picked", [False, True])
def test_non_finite_logits_are_refused_with_their_row(opened, value, row, picked):
    module = nn.Linear(2, 3, bias=False)
    nn.init.constant_(module.weight, 1e37)
    X = np.full((599, 2), 0.5, dtype=np.float32)
    network = opened(module, X)
    X[row] = value
    rows = as_rows(X)
    if picked:
        rows = rows.pick(np.random.RandomState(0).permutation(599))
    with pytest.raises(
        NonFiniteLogitsError, match=rf"NaN or infinite logits for row {row} of X.*scale of X"
    ):
        list(forward_rows(network, rows))


def test_padding_is_never_blamed(opened):
    network = opened(nn.Linear(2, 3), TABLE[:, :2])
    with pytest.raises(ValueError, match=r"first in row 2\."):
        list(forward_rows(network, as_rows([[0.0, 0.0], [1.0, 1.0], [np.nan, 0.0]])))


# Scores of rows


def scored(network, X, score, **options):
    """Scores and logits of all rows, in one piece."""
    pieces = list(score_rows(network, rows_of(X), score, **options))
    assert [i for piece, *_ in pieces for i in range(len(X))[piece]] == list(range(len(X)))
    return torch.cat([some for _, some, _ in pieces]), torch.cat([z for *_, z in pieces])


def product(hidden, logits, layers):
    return hidden.sum(dim=1) * logits.amax(dim=1)


@pytest.mark.parametrize("n_rows", [1, 255, 256, 257, 600])
def test_a_score_sees_features_and_logits_in_float64(padded, n_rows):
    network, X = padded
    seen = []

    def score(hidden, logits, layers):
        seen.append((hidden.dtype, logits.dtype))
        assert len(hidden) == len(logits)
        assert len(hidden) in network.shapes.ladder
        return product(hidden, logits, layers)

    scores, logits = scored(network, X[:n_rows], score)
    hidden, expected = outputs(network, X[:n_rows])
    assert set(seen) == {(torch.float64, torch.float64)}
    assert torch.equal(logits, expected)
    torch.testing.assert_close(scores, product(hidden.double(), expected, None))


def test_features_are_captured_only_for_a_score_that_wants_them(opened):
    network, seen = opened(mlp(), TABLE), []

    def score(hidden, logits, layers):
        seen.append(hidden)
        return logits[:, 0]

    scores, logits = scored(network, TABLE, score, features=False)
    assert set(seen) == {None}
    assert torch.equal(scores, logits[:, 0])


def test_a_row_is_scored_alone_and_in_any_order(padded):
    network, X = padded
    whole = scored(network, X, product)
    order = np.random.RandomState(1).permutation(len(X))[:300]
    assert_equal(scored(network, as_rows(X).pick(order), product), whole, order)
    assert_equal(scored(network, X[order], product), whole, order)


def uphill(logits, batch):
    """A step along the gradient of the first logit."""
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), batch)
    return 0.5 * gradient.sign()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_perturbation_moves_what_is_scored_and_not_the_logits(opened, name):
    make, X = NETWORKS[name]
    network = opened(make().double(), X)
    scores, logits = scored(network, X, lambda _, z, layers: z[:, 0], perturbation=uphill)
    torch.testing.assert_close(logits, outputs(network, X)[1])
    batch = torch.tensor(X, requires_grad=True)
    (gradient,) = torch.autograd.grad(network.module(batch)[:, 0].sum(), batch)
    with torch.no_grad():
        expected = network.module(batch + 0.5 * gradient.sign())[:, 0]
    torch.testing.assert_close(scores, expected)
    assert not logits.requires_grad
    assert all(parameter.grad is None for parameter in network.module.parameters())


def test_perturbed_rows_are_scored_alone_and_in_any_order(padded):
    network, X = padded
    whole = scored(network, X, product, perturbation=uphill)
    order = np.random.RandomState(1).permutation(len(X))[:300]
    assert_equal(
        scored(network, as_rows(X).pick(order), product, perturbation=uphill), whole, order
    )


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode])
def test_perturbations_have_a_gradient_whatever_surrounds_them(opened, surrounding):
    network = opened(mlp(), TABLE)
    expected = scored(network, TABLE, product, perturbation=uphill)
    with surrounding():
        assert_equal(scored(network, TABLE, product, perturbation=uphill), expected)


def test_a_network_that_writes_into_its_input_can_be_perturbed(opened):
    linear = nn.Linear(8, 3)
    writing = opened(nn.Sequential(WritesIntoItsInput(), linear), TABLE)
    scores, logits = scored(writing, TABLE, lambda _, z, layers: z[:, 0], perturbation=uphill)
    # The input moves by half, its double by one.
    gain = linear.weight[0].abs().sum().double()
    torch.testing.assert_close(scores - logits[:, 0], gain.expand(600), rtol=1e-4, atol=1e-4)


def test_an_input_without_a_gradient_cannot_be_perturbed(opened):
    X = np.random.RandomState(0).randint(0, 9, size=(20, 4))
    module = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 3))
    network = opened(module, X, preprocess=lambda batch: batch)
    with pytest.raises(ValueError, match=r"dtype torch\.int64 does not have. Pass another"):
        scored(network, X, product, perturbation=uphill)


@pytest.mark.parametrize("perturbation", [None, uphill])
def test_non_finite_logits_are_refused_before_they_are_scored(opened, perturbation):
    module = nn.Linear(2, 3, bias=False)
    nn.init.constant_(module.weight, 1e37)
    X = np.full((300, 2), 0.5, dtype=np.float32)
    network = opened(module, X)
    X[270] = 1e3
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite logits for row 270 of X"):
        scored(network, X, lambda _, z, layers: z[:, 0], features=False, perturbation=perturbation)


# Helpers


def test_logits_become_float64():
    assert as_float64(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
