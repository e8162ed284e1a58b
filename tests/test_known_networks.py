"""The head of networks that users bring, found without help."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from skood import SparseEnergyOODDetector
from skood.engine.inference import forward_rows
from skood.engine.outputs import logits_of
from skood.exceptions import SlowScoringWarning
from skood.rows import as_rows

N_CLASSES = 7


@pytest.fixture(autouse=True)
def _same_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _deprecated_parts_of_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def images(size, n=4):
    return np.random.RandomState(0).rand(n, 3, size, size).astype(np.float32)


def assert_head(network, module, X, head, width):
    """The head is where it should be, and its layer turns the features into the module's logits."""
    batch = network.batcher(as_rows(X))
    with torch.no_grad():
        features, logits = network.seen(batch)[:2]
        layer = network.module.get_submodule(network.head)
        torch.testing.assert_close(layer(features), logits, rtol=1e-5, atol=1e-5)
        expected = logits_of(module.eval()(batch))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (network.head, features.shape) == (head, (len(X), width))
    assert network.n_logits == logits.shape[1]


# Libraries of image networks


@pytest.mark.parametrize(
    ("make", "size", "head", "width"),
    [
        (tv.resnet18, 32, "fc", 512),
        (partial(tv.vgg11_bn, init_weights=False), 32, "classifier.6", 4096),
        (tv.mobilenet_v3_small, 32, "classifier.3", 1024),
        (tv.densenet121, 32, "classifier", 1024),
        (tv.efficientnet_b0, 32, "classifier.1", 1280),
        (tv.convnext_tiny, 32, "classifier.2", 768),
        (partial(tv.vit_b_16, image_size=32), 32, "heads.head", 768),
        (tv.swin_t, 32, "head", 768),
        (tv.shufflenet_v2_x0_5, 32, "fc", 1024),
        (tv.regnet_y_400mf, 32, "fc", 440),
        (partial(tv.googlenet, init_weights=False, aux_logits=True), 64, "fc", 1024),
        (partial(timm.create_model, "resnet10t"), 32, "fc", 512),
        (partial(timm.create_model, "vit_tiny_patch16_224", img_size=32), 32, "head", 192),
        (partial(timm.create_model, "convnext_atto"), 32, "head.fc", 320),
        (partial(timm.create_model, "efficientnet_lite0"), 32, "classifier", 1280),
        (partial(timm.create_model, "mixer_s32_224", img_size=32), 32, "head", 512),
        (partial(timm.create_model, "repvgg_a0"), 32, "head.fc", 1280),
    ],
)
def test_the_head_of_an_image_network(opened, make, size, head, width):
    module = make(num_classes=N_CLASSES)
    X = images(size)
    assert_head(opened(module, X), module, X, head, width)


def test_a_head_without_classes_is_refused_with_what_to_pass(opened):
    with pytest.raises(ValueError, match=r"get_classifier\(\).*is an Identity.*num_classes=K"):
        opened(timm.create_model("resnet10t", num_classes=0), images(32))


def test_two_heads_that_are_averaged_are_refused_with_the_reason(opened):
    module = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=7)
    message = r"the logits are the mean of what head, head_dist give.*Wrap the network in a module"
    with pytest.raises(ValueError, match=message):
        opened(module, images(32))


def test_of_a_network_without_a_linear_head_the_module_to_pass_is_named(opened):
    module, X = tv.squeezenet1_1(num_classes=N_CLASSES), images(64, n=8)
    message = (
        r'no linear layer gives the logits\. Pass head="classifier" \(its input, '
        r"\(8, 512, 3, 3\), becomes features of width 4608\)"
    )
    with pytest.raises(ValueError, match=message):
        opened(module, X)
    network = opened(module, X, head="classifier")
    batch = network.batcher(as_rows(X))
    with torch.no_grad():
        features, logits = network.seen(batch)[:2]
        torch.testing.assert_close(logits, module.eval()(batch))
        torch.testing.assert_close(features, module.features(batch).flatten(1))


# Networks by the way they are made


class Small(nn.Module):
    """A convolutional classifier with an unused layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.hidden = nn.Linear(8, 12)
        self.fc = nn.Linear(12, 5)
        self.unused = nn.Linear(12, 5)

    def features(self, x):
        h = torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3))
        return torch.relu(self.hidden(h))

    def forward(self, x):
        return self.fc(self.drop(self.features(x)))


def perceptron(bias=True, head=None):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head or nn.Linear(8, 5, bias=bias))


def frozen(module):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(("hidden", "fc")))
    return module


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


KEPT = []
"""Networks of a process group: as one goes, torch may wait for a thread that waits for Python."""


def distributed(module):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        KEPT.append(nn.parallel.DistributedDataParallel(module))
        return KEPT[-1]
    finally:
        torch.distributed.destroy_process_group()


def quantized(module):
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Returning(Small):
    """A classifier that returns more than logits."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        h = self.features(x)
        return self.wrap(self.fc(h), h)


class LightningLike(nn.Module):
    """A network inside a module that has its loss, metrics and settings about it."""

    def __init__(self):
        super().__init__()
        self.network = Small()
        self.loss = nn.CrossEntropyLoss()
        self.settings = {"rate": 0.1}

    def forward(self, x):
        return self.network(x)


class Adapter(nn.Module):
    """A low-rank change to a linear layer, zero at first."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_layer = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapted(trained):
    module = perceptron(head=Adapter(nn.Linear(8, 5)))
    if trained:
        nn.init.normal_(module[2].up.weight)
    return module


TABLE = np.random.RandomState(0).randn(10, 6).astype(np.float32)
PICTURES = images(12, n=8)


@pytest.mark.parametrize(
    ("make", "X", "head", "width"),
    [
        (perceptron, TABLE, "2", 8),
        (partial(perceptron, bias=False), TABLE, "2", 8),
        (Small, PICTURES, "fc", 12),
        (lambda: frozen(Small()), PICTURES, "fc", 12),
        (lambda: Small().half(), PICTURES, "fc", 12),
        (lambda: Small().bfloat16(), PICTURES, "fc", 12),
        (lambda: Small().double(), PICTURES, "fc", 12),
        (lambda: torch.compile(Small(), backend="eager"), PICTURES, "fc", 12),
        (lambda: compiled_in_place(Small()), PICTURES, "fc", 12),
        (
            lambda: nn.Sequential(nn.Identity(), torch.compile(Small(), backend="eager")),
            PICTURES,
            "1.fc",
            12,
        ),
        (lambda: nn.DataParallel(Small()), PICTURES, "fc", 12),
        (lambda: distributed(Small()), PICTURES, "fc", 12),
        (LightningLike, PICTURES, "network.fc", 12),
        (partial(adapted, trained=False), TABLE, "2", 8),
        (partial(adapted, trained=True), TABLE, "2", 8),
        (
            lambda: perceptron(head=nn.utils.weight_norm(nn.Linear(8, 5))),
            TABLE,
            "2",
            8,
        ),
        (lambda: perceptron(head=nn.utils.spectral_norm(nn.Linear(8, 5))), TABLE, "2", 8),
        (lambda: perceptron(head=parametrizations.weight_norm(nn.Linear(8, 5))), TABLE, "2", 8),
        (lambda: perceptron(head=parametrizations.spectral_norm(nn.Linear(8, 5))), TABLE, "2", 8),
        (lambda: Returning(lambda z, h: (z, h)), PICTURES, "fc", 12),
        (lambda: Returning(lambda z, h: {"logits": z, "hidden": h}), PICTURES, "fc", 12),
        (lambda: Returning(Output), PICTURES, "fc", 12),
    ],
    ids=[
        "Sequential",
        "no bias",
        "convolutions",
        "partly frozen",
        "float16",
        "bfloat16",
        "float64",
        "torch.compile",
        "module.compile",
        "compiled part",
        "DataParallel",
        "DistributedDataParallel",
        "Lightning",
        "new adapter",
        "trained adapter",
        "weight_norm",
        "spectral_norm",
        "parametrized weight_norm",
        "parametrized spectral_norm",
        "tuple",
        "dict",
        "dataclass",
    ],
)
def test_the_head_of_a_network_however_made(opened, make, X, head, width):
    module = make()
    network = opened(module, X)
    assert_head(network, module, X, head, width)


@pytest.mark.parametrize(
    ("make", "X"),
    [
        (lambda: torch.jit.script(Small()), PICTURES),
        (lambda: torch.jit.trace(Small().eval(), torch.rand(2, 3, 9, 9)), PICTURES),
        (lambda: torch.jit.script(perceptron(bias=False)), TABLE),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(Small())), PICTURES),
    ],
    ids=["scripted", "traced", "scripted without bias", "scripted part"],
)
def test_torchscript_gives_its_logits_alone(opened, make, X):
    module = make()
    network = opened(module, X)
    assert network.head is None
    logits = torch.cat([logits for _, (_, logits, _) in forward_rows(network, as_rows(X))])
    with torch.no_grad():
        expected = module.eval()(network.batcher(as_rows(X))).double()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scripted",
    [torch.jit.script, lambda module: torch.jit.trace(module, torch.as_tensor(TABLE).float())],
    ids=["script", "trace"],
)
def test_a_script_of_a_dynamically_quantized_network_scores_row_by_row(scripted):
    detector = SparseEnergyOODDetector(scripted(quantized(perceptron())), max_epochs=0)
    with pytest.warns(SlowScoringWarning, match="dynamically quantized layers.*one by one"):
        detector.fit(np.tile(TABLE, (10, 1)))
    company = np.concatenate([TABLE[:3], 30 * TABLE[3:6]])
    alone = [detector.score_samples(row[None])[0] for row in TABLE[:3]]
    np.testing.assert_array_equal(detector.score_samples(company)[:3], alone)


def test_a_dynamically_quantized_network_scores_row_by_row(opened):
    module = quantized(perceptron())
    with pytest.warns(SlowScoringWarning, match="dynamically quantized layers.*one by one"):
        network = opened(module, TABLE)
    assert_head(network, module, TABLE, "2", 8)
    together = np.concatenate(
        [logits.numpy() for _, (_, logits, _) in forward_rows(network, as_rows(TABLE))]
    )
    for row, expected in zip(TABLE, together, strict=True):
        ((_, (_, alone, _)),) = forward_rows(network, as_rows(row[None]))
        np.testing.assert_array_equal(alone[0].numpy(), expected)


# Transformers


class ModelOutput(dict):
    """What transformers return: a dict whose values are attributes too."""

    __getattr__ = dict.__getitem__


class Encoder(nn.Module):
    """A transformer on token ids, its head on the first position, or on all with one picked."""

    def __init__(self, every_position=False):
        super().__init__()
        self.embeddings = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(16, 5)
        self.every_position = every_position

    def forward(self, input_ids=None, attention_mask=None):
        hidden = self.encoder(self.embeddings(input_ids))
        if self.every_position:
            return ModelOutput(logits=self.classifier(hidden)[:, -1], hidden=hidden)
        return ModelOutput(logits=self.classifier(self.dropout(hidden[:, 0])), hidden=hidden)


TOKENS = np.random.RandomState(0).randint(0, 20, (12, 7))


def test_the_head_of_a_transformer_on_tokens(opened):
    module = Encoder()
    network = opened(module, TOKENS, preprocess=torch.Tensor.long)
    assert_head(network, module, TOKENS, "classifier", 16)


def test_tokens_that_were_cast_to_float_are_explained(opened):
    with pytest.raises(RuntimeError, match="indices") as raised:
        opened(Encoder(), TOKENS)
    (note,) = raised.value.__notes__
    assert "integers are cast to float32" in note
    assert "preprocess=torch.Tensor.long" in note


def test_a_head_on_every_position_is_refused_with_the_reason_and_the_remedy(opened):
    message = (
        r"the linear layer 'classifier' is applied at every position, \(8, 7, 16\) to "
        r"\(8, 7, 5\), so a row has no single vector of features\. Wrap the network in a module "
        r"that first picks .* head\(hidden\[:, -1\]\)"
    )
    with pytest.raises(ValueError, match=message):
        opened(Encoder(every_position=True), TOKENS, preprocess=torch.Tensor.long)
