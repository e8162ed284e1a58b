"""What `SparseEnergyOODDetector.as_module` and `SparseEnergyOODDetector.export` make of a detector.

Both have the same outputs: from raw rows to logits, score, decision and p-value.
"""

from .module import DetectorModule

__all__ = ["DetectorModule"]
