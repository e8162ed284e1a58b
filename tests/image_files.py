"""Files as the benchmarks on images take them: small sets, and a network trained on one of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from skood.networks import CifarResNet

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def images(n_rows, seed):
    """Noise of two classes, dark above or dark below."""
    random = np.random.RandomState(seed)
    y = random.randint(2, size=n_rows)
    x = random.randint(128, size=(n_rows, 8, 8, 3)).astype(np.uint8)
    x[y == 0, :4] += 90
    x[y == 1, 4:] += 90
    return x, y


def logits(module, x):
    """Without the package: normalised as the published ResNets were."""
    return module(torch.from_numpy(((x / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float())


def trained_network():
    x, y = images(300, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CifarResNet(8, n_classes=2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        for _ in range(12):
            loss = F.cross_entropy(logits(module, x), torch.from_numpy(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()


def write_files(module):
    """One ID set, two OOD sets, outliers, and the network, in the current folder."""
    (x_train, y_train), (x_test, y_test) = images(300, seed=0), images(200, seed=1)
    np.savez("id.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    random = np.random.RandomState(2)
    np.savez("noise.npz", x=random.randint(256, size=(90, 8, 8, 3)).astype(np.uint8))
    np.savez("intel_scenes.npz", x=np.repeat(x_test[:80, :, :1], 8, axis=2))
    outliers = np.random.RandomState(5).randint(200, size=(60, 8, 8, 3), dtype=np.uint8)
    np.savez("outliers.npz", x=outliers)
    torch.save(module.state_dict(), "net.pt")
