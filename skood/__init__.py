"""skood: a trained PyTorch classifier learns to say that it has not seen anything like this."""

from .detector import SparseEnergyOODDetector

__all__ = ["SparseEnergyOODDetector"]

__version__ = "0.1.0"
