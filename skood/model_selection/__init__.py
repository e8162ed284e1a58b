"""Choosing a detector with scikit-learn's own searches, with or without outliers at hand."""

from .folds import InDistributionKFold
from .guard import AccuracyGuard
from .scorers import make_ood_scorer
from .surrogates import surrogate_outliers

__all__ = [
    "AccuracyGuard",
    "InDistributionKFold",
    "make_ood_scorer",
    "surrogate_outliers",
]
