"""Scores of a batch from its features and logits: higher means more in-distribution.

A score is called as ``score(features, logits)``, with float64 features of shape (n, d) and logits
of shape (n, K), and returns one value per row, shape (n,). The scores here are scikit-learn
estimators, so a search can set their parameters (``score_function__temperature``). A score with
statistics also has a method ``fit(outputs, head)``, which reads the training rows once, piece by
piece. A score with ``uses_layers`` gets moments of inner layers besides, in both. A score with
``uses_gradient`` gets the logits of inputs that were moved along the gradient of the network.

To add a score, write its class under the decorator that names it, and list it in the ``__all__`` of
its module.
"""

# ruff: noqa: F403 (the names that each module lists in __all__)
from . import activations, composed, distances, logits, protocol
from .activations import *
from .composed import *
from .distances import *
from .logits import *
from .protocol import *

__all__ = [
    *activations.__all__,
    *composed.__all__,
    *distances.__all__,
    *logits.__all__,
    *protocol.__all__,
]
