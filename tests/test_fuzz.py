"""Random search for input that is neither taken nor answered as documented."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine.training import DivergenceError
from skood.scores import list_scores

NUMBERS_OF = ["float16", "float32", "float64", "int8", "uint8", "int64", "bool", ">f4"]
OTHERS = ["longdouble", "complex64", "U3", "object", "datetime64[s]"]
DTYPES = st.sampled_from([*NUMBERS_OF, *OTHERS])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40)


class AnyShape(nn.Module):
    """A classifier for rows of any shape."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = x.flatten(1).nan_to_num()
        return self.head(self.scale * torch.stack([x.mean(1), x.amax(1)], 1))


@st.composite
def rows(draw):
    dtype, shape = draw(DTYPES), draw(SHAPES)
    if dtype in ("float16", "float32", "float64", ">f4", "longdouble"):
        extreme = draw(st.booleans())
        values = st.floats(width=16, allow_nan=extreme, allow_infinity=extreme)
        return draw(hnp.arrays(np.float64, shape, elements=values)).astype(dtype)
    if dtype == "object":
        return draw(hnp.arrays(object, shape, elements=st.none() | st.integers() | st.text()))
    X = draw(hnp.arrays(dtype, shape))
    return X.tolist() if draw(st.booleans()) else X


LABELS = st.one_of(
    st.none(),
    st.lists(st.integers(-2, 5), max_size=40),
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=40),
    st.lists(st.booleans(), max_size=40),
    st.lists(st.floats(), max_size=40),
    hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, max_side=40), elements=st.integers(0, 3)),
)
NUMBERS = st.floats() | st.integers(-3, 3) | st.none() | st.text(max_size=3)
PARAMETERS = st.fixed_dictionaries(
    {"max_epochs": st.integers(0, 1), "random_state": st.integers(0, 3)},
    optional={
        "sparsity_weight": NUMBERS,
        "tpr": NUMBERS,
        "calibration_size": NUMBERS | st.just("auto"),
        "batch_size": NUMBERS,
        "learning_rate": NUMBERS,
        "momentum": NUMBERS,
        "weight_decay": NUMBERS,
        "outlier_weight": NUMBERS,
        "distillation_weight": NUMBERS,
        "ood_label": st.integers(0, 3) | st.booleans() | st.sampled_from(["a", "z"]),
        "penalty": st.sampled_from(["l1", "l1_over_l2", "relative_l1", "l3"]),
        "score_function": st.sampled_from([*list_scores(), "odd"]),
        "augment": st.sampled_from([None, "flip", "flip-crop", "turn"]),
        "precision": st.sampled_from(["auto", "float32", "bfloat16", "int8"]),
    },
)
DOCUMENTED = (ValueError, TypeError, DivergenceError)


@given(X=rows(), y=LABELS, fitting=st.booleans(), given=st.booleans(), parameters=PARAMETERS)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@pytest.mark.filterwarnings("ignore")
def test_only_documented_errors_come_out(X, y, fitting, given, parameters):
    if fitting and y is not None:  # labels that often fit
        y = (list(y) * 40)[: np.shape(X)[0] if np.ndim(X) else 0]
    module = AnyShape() if given else None
    before = None if module is None else {k: v.clone() for k, v in module.state_dict().items()}
    if not given:
        parameters = {"pretrain_epochs": 1, **parameters}
    detector = SparseEnergyOODDetector(module, **parameters)
    attributes = vars(detector).copy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = detector.fit(X, y).score_samples(X)
    except DOCUMENTED:
        if not hasattr(detector, "offset_"):
            assert vars(detector) == attributes
    else:
        assert scores.shape == (len(X),)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert np.isfinite(detector.offset_)
        assert set(detector.predict(X)) <= {-1, 1}
    if module is not None:
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])


@given(X=rows())
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@pytest.mark.filterwarnings("ignore")
def test_scoring_takes_rows_or_answers(fitted, X):
    for method in ("score_samples", "predict_class", "features", "p_values"):
        try:
            values = getattr(fitted, method)(X)
        except DOCUMENTED:
            continue
        assert len(values) == len(X)
