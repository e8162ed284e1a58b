"""Small networks that the tests bring, and what they check of each."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.utils import shuffle
from torch import Tensor, nn

from skood.engine.outputs import logits_of
from skood.rows import as_rows


class WidthAgnostic(nn.Module):
    """A classifier for tables of any width, from the mean and the spread of each row."""

    def __init__(self, n_classes: int = 10, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = nn.Parameter(torch.randn(2, width, generator=generator))
        self.head = nn.Linear(width, n_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(n_classes, width, generator=generator))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.stack([x.mean(dim=1), x.std(dim=1, unbiased=False)], dim=1)
        return self.head(torch.relu(torch.tanh(summary) @ self.body))

    def __reduce__(self):
        # joblib.hash, by which scikit-learn sees whether fit changed a parameter, differs between
        # equal tensors; it agrees on equal arrays.
        return _width_agnostic, ({name: t.numpy() for name, t in self.state_dict().items()},)


def _width_agnostic(weights: dict[str, np.ndarray]) -> WidthAgnostic:
    module = WidthAgnostic(n_classes=len(weights["head.bias"]), width=weights["body"].shape[1])
    module.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in weights.items()})
    return module


def trained_mlp(X: np.ndarray, y: np.ndarray, *, epochs: int = 60, seed: int = 0) -> nn.Module:
    """A multilayer perceptron with batch-norm and dropout, trained in a plain loop."""
    X, y = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Linear(X.shape[1], 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, int(y.max()) + 1),
        )
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(X)).split(128):
                loss = nn.functional.cross_entropy(module(X[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return module.eval()


def digit_images() -> tuple[np.ndarray, np.ndarray, nn.Module]:
    """Digits as images of one channel, their classes, and a classifier trained on others."""
    X, y = shuffle(*load_digits(return_X_y=True), random_state=0)
    X = (X / 16).astype(np.float32)
    module = nn.Sequential(nn.Flatten(), trained_mlp(X[800:], y[800:]))
    return X[:800].reshape(-1, 1, 8, 8), y[:800], module


HARM = {"sparsity_weight": 10.0, "learning_rate": 0.01, "max_epochs": 10, "calibration_size": 200}
"""Settings with which fine-tuning lets more outliers in by that classifier."""


def mlp(n_classes=4, bias=True, dtype=torch.float64):
    """A multilayer perceptron on six columns, with what behaves otherwise in training."""
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, n_classes, bias=bias),
    ).to(dtype)


class Body(nn.Module):
    """A classifier on six columns with a body and a head, to be varied."""

    def __init__(self, head=None):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = head or nn.Linear(8, 4)
        self.double()

    def features(self, x):
        return torch.relu(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


class InPlace(nn.Module):
    """Writes into its input, where the first layer is frozen so that it may."""

    def __init__(self, layers, in_place):
        super().__init__()
        self.layers, self.in_place = layers, in_place
        layers[0].requires_grad_(False)

    def forward(self, x):
        return self.layers(x.sub_(0.5) if self.in_place else x - 0.5)


def assert_head_gives_the_logits(network, rows):
    """head(features) equals the logits, which equal what the untouched module returns."""
    batch = network.batcher(as_rows(rows, network.batcher.preprocess))
    with torch.no_grad():
        features, logits = network.trained(batch)
        torch.testing.assert_close(logits, logits_of(network.module(batch)), rtol=0, atol=0)
        scored = network.seen(batch)[:2]  # with batch-norms folded
        torch.testing.assert_close(scored, (features, logits), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(network.logits(batch), scored[1], rtol=0, atol=0)
        head = network.module.get_submodule(network.head)
        torch.testing.assert_close(head(features), logits, rtol=1e-6, atol=1e-6)
    assert features.ndim == 2
    assert logits.shape == (len(rows), network.n_logits)
    return features


def hooks_of(module):
    """All hooks on a module and its parts."""
    return [
        hook
        for part in module.modules()
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        for hook in hooks
    ]
