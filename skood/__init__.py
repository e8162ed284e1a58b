"""skood: a trained PyTorch classifier learns to say that it has not seen anything like this."""

__version__ = "0.1.0"

from .detector import SparseEnergyOODDetector
from .rejection import RejectingClassifier

__all__ = ["RejectingClassifier", "SparseEnergyOODDetector"]
