from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skood.rows import as_rows, warn_if_unscaled

TABLE = np.arange(12.0).reshape(6, 2)


class Rows(Dataset):
    def __len__(self):
        return len(TABLE)

    def __getitem__(self, row):
        return TABLE[row]


@pytest.mark.parametrize("with_preprocess", [False, True])
@pytest.mark.parametrize(
    "X",
    [
        TABLE,
        TABLE.tolist(),
        TABLE.astype(np.int16),
        pd.DataFrame(TABLE),
        pl.DataFrame(TABLE),
        torch.from_numpy(TABLE),
        list(torch.from_numpy(TABLE)),
        list(TABLE),
        TensorDataset(torch.from_numpy(TABLE)),
    ],
    ids=lambda X: type(X).__name__,
)
def test_numbers(X, with_preprocess):
    np.testing.assert_array_equal(as_rows(X, with_preprocess=with_preprocess), TABLE)


def test_arrays_tensors_and_data_sets_are_not_copied():
    data = Rows()
    assert as_rows(data, with_preprocess=False) is data
    assert np.shares_memory(as_rows(TABLE, with_preprocess=False), TABLE)
    tensor = torch.from_numpy(TABLE)
    assert as_rows(tensor, with_preprocess=False).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "X",
    [np.arange(3), range(3), ["a", "b", "c"], pd.Series(["a", "b", "c"]), torch.arange(3)],
    ids=lambda X: type(X).__name__,
)
def test_references_need_preprocess(X):
    assert as_rows(X, with_preprocess=True).shape == (3,)
    with pytest.raises(ValueError, match=r"preprocess=|Reshape your data"):
        as_rows(X, with_preprocess=False)


def test_a_frame_of_several_kinds_goes_to_preprocess_as_objects():
    frame = pd.DataFrame({"path": ["a", "b"], "scale": [1.0, 2.0]})
    assert as_rows(frame, with_preprocess=True).tolist() == [["a", 1.0], ["b", 2.0]]


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (DataLoader(Rows()), TypeError, r"DataLoader.*pass its data set, X\.dataset"),
        (["a.png", "b.png"], ValueError, r"2 values such as \['a.png'\].*preprocess="),
        (np.array([["a", "b"]]), ValueError, "could not convert|numeric"),
        (scipy.sparse.csr_matrix(TABLE), TypeError, "dense"),
        (TABLE + 1j, ValueError, "Complex data not supported"),
        (np.zeros((0, 3)), ValueError, r"0 sample\(s\)"),
        (np.zeros((3, 0)), ValueError, r"0 feature\(s\)"),
        (torch.zeros(0, 3), ValueError, "Reshape your data"),
        (np.zeros(3), ValueError, "Reshape your data"),
        (None, ValueError, "Expected 2D array, got scalar array"),
        ([], ValueError, "Expected 2D array"),
    ],
)
@pytest.mark.parametrize("with_preprocess", [False, True])
def test_what_cannot_be_rows_is_refused(X, error, message, with_preprocess):
    if with_preprocess and isinstance(X, list | np.ndarray) and np.ndim(X) == 1 and len(X):
        return  # references
    if with_preprocess and np.asarray(X).dtype.kind == "U":
        return
    with pytest.raises(error, match=message):
        as_rows(X, with_preprocess=with_preprocess)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_images_of_bytes_warn(make, recwarn):
    dtype = {np.zeros: np.uint8, torch.zeros: torch.uint8}[make]
    warn_if_unscaled(make((2, 3, 8, 8)))
    warn_if_unscaled(make((2, 8), dtype=dtype))
    warn_if_unscaled(Rows())
    assert not recwarn
    with pytest.warns(UserWarning, match=r"preprocess=NormalizeImages\(mean, std\)"):
        warn_if_unscaled(make((2, 3, 8, 8), dtype=dtype))
