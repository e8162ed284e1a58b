"""skood: a trained PyTorch classifier learns to say that it has not seen anything like this."""

__version__ = "0.2.0"

from .detector import SparseEnergyOODDetector
from .rejection import RejectingClassifier
from .versions import show_versions

__all__ = ["RejectingClassifier", "SparseEnergyOODDetector", "show_versions"]
