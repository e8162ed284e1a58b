"""Pictures of a detector, in the manner of scikit-learn's displays; they need matplotlib."""

from .distributions import ScoreDistributionDisplay
from .features import FeatureActivityDisplay
from .roc import DetectionRocDisplay
from .selection import SelectionDisplay
from .table import DetectionTableDisplay

__all__ = [
    "DetectionRocDisplay",
    "DetectionTableDisplay",
    "FeatureActivityDisplay",
    "ScoreDistributionDisplay",
    "SelectionDisplay",
]
