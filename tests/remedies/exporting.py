"""Detectors as modules and files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .common import NAMES_OF_ROWS, X, case, fit, fitted, from_names, network, says, scripted
from .forwards import quantized_dynamically

NAMED_ROWS = np.array(NAMES_OF_ROWS)


def loading() -> Any:
    return fit(network(), NAMED_ROWS, preprocess=from_names)


def through_numpy(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.tanh(rows.numpy()))


def exported(path: str = "detector.pt2", **parameters: Any) -> Any:
    detector = fit(network(), **parameters) if parameters else fitted()
    return detector.export(path, X)


MODULES = [
    case(
        "is TorchScript, whose features and operations no graph can take",
        lambda: fit(scripted(network()), max_epochs=0).as_module(),
        says("Fit a detector on the nn.Module", lambda: fit(network()).as_module()),
    ),
    case(
        "The detector scores rows one by one, and a graph would not",
        lambda: fit(quantized_dynamically(), max_epochs=0).as_module(),
        says("the network before quantization", lambda: fit(network()).as_module()),
    ),
    case(
        "needs the gradient of the network, which is not in a graph",
        lambda: fit(network(), score_function="odin").as_module(),
        says('such as "energy"', lambda: fit(network(), score_function="energy").as_module()),
    ),
    case(
        "preprocess loads rows by references",
        lambda: loading().as_module(),
        lambda told: loading().as_module(**told.keywords("preprocess=False"))(torch.from_numpy(X)),
    ),
    case(
        "; expected a tensor of shape (n, ",
        lambda: fitted().as_module()(X),
        says("a tensor", lambda: fitted().as_module()(torch.from_numpy(X))),
    ),
]

FILES = [
    case(
        "What the graph takes is not known",
        lambda: loading().export("detector.pt2", preprocess=False),
        says(
            "export(path, X)",
            lambda: loading().export("detector.pt2", NAMED_ROWS, preprocess=False),
        ),
    ),
    case(
        "torch.export cannot trace ",
        lambda: exported(preprocess=through_numpy),
        lambda told: fit(network(), preprocess=through_numpy).export(
            "detector.pt2", X, **told.keywords("preprocess=False")
        ),
    ),
    case(
        "path ends in ",
        lambda: exported("detector.pickle"),
        says("'.pt2'", exported),
    ),
]

CASES = [*MODULES, *FILES]
