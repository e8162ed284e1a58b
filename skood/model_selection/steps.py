"""The detector inside a search, a frozen estimator or a pipeline, and the rows that it sees."""

from __future__ import annotations

from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

__all__ = ["last_step", "seen_by_last_step", "unwrapped"]


def last_step(estimator: Any) -> Any:
    """The detector in a fitted search, a `FrozenEstimator` or a `Pipeline`."""
    estimator = unwrapped(estimator)
    return last_step(estimator[-1]) if isinstance(estimator, Pipeline) else estimator


def seen_by_last_step(estimator: Any, X: Any) -> Any:
    """X after all steps of a pipeline but the last."""
    estimator = unwrapped(estimator)
    if not isinstance(estimator, Pipeline):
        return X
    steps = estimator[:-1]
    return seen_by_last_step(estimator[-1], steps.transform(X) if len(steps) else X)


def unwrapped(estimator: Any) -> Any:
    """The estimator in a fitted search or a `FrozenEstimator`."""
    if isinstance(estimator, FrozenEstimator):
        return unwrapped(estimator.estimator)
    if hasattr(estimator, "best_estimator_"):
        return unwrapped(estimator.best_estimator_)
    return estimator
