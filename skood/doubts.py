"""Why a threshold may not keep its promise, said when it is first used."""

from __future__ import annotations

import warnings
from typing import Any

from .exceptions import ThresholdWarning

__all__ = ["Doubts"]


class Doubts:
    """Warnings that are due at the first use of a threshold, in each process that uses it.

    ``fit`` places a threshold that ``calibrate`` may move right afterwards. So what is wrong with
    it matters only if it is used.

    Examples
    --------
    >>> from skood.doubts import Doubts
    >>> from skood.exceptions import ThresholdWarning
    >>> doubts = Doubts(ThresholdWarning("placed on seen rows"))
    >>> doubts.warn()  # doctest: +SKIP
    ThresholdWarning: placed on seen rows
    """

    def __init__(self, *reasons: ThresholdWarning) -> None:
        self.reasons = reasons
        self._said = False

    def warn(self, stacklevel: int = 2) -> None:
        """Say what is wrong with the threshold, once; at `stacklevel` 2 it names the caller."""
        if self._said:
            return
        self._said = True
        for reason in self.reasons:
            warnings.warn(reason, stacklevel=stacklevel + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {"reasons": self.reasons, "_said": False}
