"""Data sets and loading functions that the tests bring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

N = 100
TABLE = np.random.RandomState(0).randn(N, 3)
PATHS = np.array([Path(f"{row}.png") for row in range(N)])


class Listed(Dataset):
    """A map-style data set over a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class AtOnce(Listed):
    """A data set that gives several items at once, in torch's protocol."""

    def __getitem__(self, row):
        raise AssertionError("items are asked for at once")

    def __getitems__(self, rows):
        return [self.items[row] for row in rows]


def from_table(rows):
    """Rows of the table by their numbers."""
    return torch.from_numpy(TABLE[rows.astype(int)])


def from_names(names):
    """Rows of the table by the names of files."""
    return from_table(np.array([int(Path(name).stem) for name in names]))
