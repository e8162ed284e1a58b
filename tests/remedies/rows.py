"""X: arrays, tensors, data sets and references."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from data_sets import Listed
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from skood.model_selection import make_ood_scorer, surrogate_outliers

from .common import (
    BYTES,
    FLAT,
    IMAGES,
    KNOWN,
    KNOWN_Y,
    NAMES_OF_ROWS,
    OUTLIERS,
    D,
    N,
    Told,
    X,
    Y,
    case,
    convolutions,
    fit,
    fitted,
    from_names,
    network,
    says,
)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


class FirstTwo(Dataset):
    """What the message on tuples of three says."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        item = self.items[row]
        x, y = item[0], item[1]
        return x, y


def from_dates(dates: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(dates.astype("datetime64[D]").astype(np.float32) / 100)


def with_value(value: float) -> np.ndarray:
    rows = X.astype(np.float64)
    rows[7, 1] = value
    return rows


MASKED = np.ma.masked_less(X, -2)
DATES = np.datetime64("2020-01-01") + (100 * np.abs(X)).astype(int)
TRIPLES = [(x, int(y), row) for row, (x, y) in enumerate(zip(X, Y, strict=True))]
COMPLEX = torch.from_numpy(X[:, :3] + 1j * X[:, 3:])
SIZES = [torch.ones(D + row % 2) * torch.rand(1) for row in range(N)]


def impute(told: Told, rows: np.ndarray) -> np.ndarray:
    told.says("sklearn.impute.SimpleImputer")
    from sklearn.impute import SimpleImputer

    return SimpleImputer().fit_transform(rows)


QUANTIZED = torch.quantize_per_tensor(torch.from_numpy(X), 0.02, 0, torch.qint8)
NESTED = torch.nested.nested_tensor(list(torch.from_numpy(X)), layout=torch.jagged)

CASES = [
    case(
        "X is a masked array",
        lambda: fit(network(), MASKED),
        lambda told: fit(network(), told("X.filled(value)", X=MASKED, value=-2.0)),
        says("leave such rows out", lambda: fit(network(), MASKED[~MASKED.mask.any(axis=1)])),
    ),
    case(
        "X is a DataLoader",
        lambda: fit(network(), DataLoader(TensorDataset(torch.from_numpy(X)))),
        lambda told: fit(
            network(), told("X.dataset", X=DataLoader(TensorDataset(torch.from_numpy(X))))
        ),
    ),
    case(
        "which are no rows of numbers",
        lambda: fit(network(), NAMES_OF_ROWS),
        says(
            "preprocess=",
            "an array of them into a tensor with as many rows",
            lambda: fit(network(), NAMES_OF_ROWS, preprocess=from_names),
        ),
    ),
    case(
        "X has rows of shape",
        lambda: fit(convolutions(), IMAGES).score_samples(FLAT),
        says(
            "an array of shape (n, 3, 8, 8)",
            lambda: fit(convolutions(), IMAGES).score_samples(FLAT.reshape(-1, 3, 8, 8)),
        ),
    ),
    case(
        "of which no surrogate outliers are made",
        lambda: surrogate_outliers(Listed(list(X))),
        says("in an array", lambda: surrogate_outliers(np.stack(Listed(list(X)).items))),
        says(
            "make_ood_scorer(X_ood=...)",
            lambda: make_ood_scorer(X_ood=OUTLIERS)(fitted(), Listed(list(X))),
        ),
        says(
            "rows that y labels ood_label",
            lambda: (
                copy.deepcopy(fitted()).set_params(ood_label=-1).score(Listed(list(KNOWN)), KNOWN_Y)
            ),
        ),
    ),
    case(
        "which holds no numbers",
        lambda: fit(network(), DATES),
        says(
            "Convert it to numbers",
            lambda: fit(network(), (DATES - DATES.min()).astype(np.float32) / 100),
        ),
        says("preprocess=", lambda: fit(network(), DATES, preprocess=from_dates)),
    ),
    case(
        "so its rows are empty",
        lambda: fit(nn.Sequential(nn.Flatten(), network()), X.reshape(N, 2, 3)[:, :, :0]),
        says(
            "at least one value in each",
            lambda: fit(nn.Sequential(nn.Flatten(), network(3, 4)), X.reshape(N, 2, 3)[:, :, :2]),
        ),
    ),
    case(
        "X holds images in uint8",
        lambda: fit(convolutions(), BYTES),
        lambda told: fit(
            convolutions(),
            BYTES,
            **told.keywords("preprocess=NormalizeImages(mean, std)", mean=[0.5] * 3, std=[0.2] * 3),
        ),
        lambda told: fit(convolutions(), BYTES, **told.keywords("preprocess=torch.Tensor.float")),
    ),
    case(
        "which is no tensor",
        lambda: fit(network(), Listed(NAMES_OF_ROWS)),
        says("preprocess=", lambda: fit(network(), Listed(NAMES_OF_ROWS), preprocess=from_names)),
    ),
    case(
        "without __len__ and __getitem__",
        lambda: fit(network(), Stream()),
        says(
            "map-style data set",
            "torch.utils.data.Dataset with both methods",
            lambda: fit(network(), Listed(list(Stream()))),
        ),
        says("the rows themselves in an array", lambda: fit(network(), np.stack(list(Stream())))),
    ),
    case(
        "with 0 rows",
        lambda: fit(network(), Listed([])),
        says("one with items", lambda: fit(network(), Listed(list(X)))),
    ),
    case(
        "X is a nested tensor",
        lambda: fit(network(), NESTED),
        lambda told: fit(network(), told("X.to_padded_tensor(0.0)", X=NESTED)),
        lambda told: fit(
            network(), told("list(X.unbind())", X=NESTED), preprocess=lambda x: torch.stack([*x])
        ),
    ),
    case(
        "X is a tensor of shape",
        lambda: fit(network(width=1), torch.from_numpy(X[:, 0])),
        lambda told: fit(network(width=1), told("X.reshape(-1, 1)", X=torch.from_numpy(X[:, 0]))),
        lambda told: fitted().score_samples(told("X.reshape(1, -1)", X=torch.from_numpy(X[0]))),
        lambda told: fit(network(), told("X.to_dense()", X=torch.from_numpy(X).to_sparse())),
    ),
    case(
        "expected one with plain values",
        lambda: fit(network(), torch.from_numpy(X).to("meta")),
        says("the rows themselves", lambda: fit(network(), torch.from_numpy(X))),
    ),
    case(
        "expected one with plain values",
        lambda: fit(network(), QUANTIZED),
        lambda told: fit(network(), told("X.dequantize()", X=QUANTIZED)),
    ),
    *(
        case(
            "Input X contains NaN",
            lambda value=value: fit(network(), with_value(value)),
            says(
                "in row 7",
                "Remove such rows",
                lambda: fit(network(), np.delete(with_value(0), 7, axis=0)),
            ),
            remedy,
        )
        for value, remedy in [
            (np.nan, lambda told: fit(network(), impute(told, with_value(np.nan)))),
            (
                np.inf,
                lambda told: fit(
                    network(), told("X.clip(low, high)", X=with_value(np.inf), low=-4, high=4)
                ),
            ),
            (
                1e300,
                lambda told: fit(
                    network(), told("X.clip(low, high)", X=with_value(1e300), low=-4, high=4)
                ),
            ),
        ]
    ),
    case(
        "The items of X are tuples of",
        lambda: fit(network(), Listed(TRIPLES)),
        says("x, y = item[0], item[1]", lambda: fit(network(), FirstTwo(Listed(TRIPLES)))),
    ),
    case(
        "it must return a torch tensor",
        lambda: fit(network(), preprocess=lambda batch: batch.numpy()),
        says(
            "with the same number of rows",
            lambda: fit(network(), preprocess=lambda batch: torch.from_numpy(batch.numpy())),
        ),
    ),
    case(
        "the number of rows must stay the same",
        lambda: fit(network(), preprocess=lambda row: row[None].flatten(1)),
        says(
            "called on whole batches",
            lambda: fit(network(), preprocess=lambda batch: batch.flatten(1)),
        ),
    ),
    case(
        "called on whole batches, not on single rows",
        lambda: fit(network(), preprocess=lambda row: row.reshape(D)),
        says(
            "called on whole batches",
            "(8, 6)",
            lambda: fit(network(), preprocess=lambda batch: batch.reshape(-1, D)),
        ),
    ),
    case(
        "the items of X are complex",
        lambda: fit(network(), Listed(list(COMPLEX))),
        says(
            "real and imaginary parts side by side",
            lambda: fit(
                network(), Listed([torch.cat([z.real, z.imag]) for z in COMPLEX]), num_workers=0
            ),
        ),
    ),
    case(
        "The items of X have several shapes",
        lambda: fit(network(), Listed(SIZES)),
        says("resize, crop or pad", lambda: fit(network(), Listed([x[:D] for x in SIZES]))),
    ),
]
