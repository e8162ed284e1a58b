"""Scores of a batch from its features and logits: higher means more in-distribution.

A score is called as ``score(features, logits)`` with float64 logits of shape (n, K) and features of
shape (n, d), and returns one value per row, shape (n,). Those here are scikit-learn estimators, so
that a search can set their parameters (``score_function__temperature``). A score with statistics
has a method ``fit(outputs, head)`` as well, which reads the training rows once, piece by piece;
one with ``uses_gradient`` is handed the logits of inputs moved along the network's gradient. To add
one, write the class under the decorator that names it.
"""

from .activations import Dice, ReAct, Scale
from .distances import Knn, Mahalanobis, Vim
from .logits import Energy, MaxLogit, MaxSoftmax, Odin
from .protocol import SCORES, Head, Outputs, apply_score, fit_score, get_score, list_scores

__all__ = [
    "SCORES",
    "Dice",
    "Energy",
    "Head",
    "Knn",
    "Mahalanobis",
    "MaxLogit",
    "MaxSoftmax",
    "Odin",
    "Outputs",
    "ReAct",
    "Scale",
    "Vim",
    "apply_score",
    "fit_score",
    "get_score",
    "list_scores",
]
