"""skood: a trained PyTorch classifier learns to say that it has not seen anything like this."""

from .detector import SparseEnergyOODDetector
from .rejection import RejectingClassifier

__all__ = ["RejectingClassifier", "SparseEnergyOODDetector"]

__version__ = "0.1.0"
