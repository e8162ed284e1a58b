"""Pictures of a detector, like scikit-learn's displays.

Drawing needs matplotlib; without it, an ImportError says what to install. For a sharp file, give it
a resolution: ``display.figure_.savefig("picture.png", dpi=200)``.
"""

# ruff: noqa: F403 (the names that each module lists in __all__)
from . import confusion, coverage, distributions, drift, features, images, roc, selection, table
from .confusion import *
from .coverage import *
from .distributions import *
from .drift import *
from .features import *
from .images import *
from .roc import *
from .selection import *
from .table import *

__all__ = [
    *confusion.__all__,
    *coverage.__all__,
    *distributions.__all__,
    *drift.__all__,
    *features.__all__,
    *images.__all__,
    *roc.__all__,
    *selection.__all__,
    *table.__all__,
]
