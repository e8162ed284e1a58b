"""Small networks that the tests bring to the detector."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


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
