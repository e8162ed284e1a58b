"""Why a threshold may not keep its promise, said when it is first used."""

from __future__ import annotations

from typing import Any

from .exceptions import ThresholdWarning
from .notices import warn_user

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

    def warn(self) -> None:
        """Say what is wrong with the threshold, once."""
        if self._said:
            return
        self._said = True
        for reason in self.reasons:
            warn_user(str(reason), type(reason))

    def __getstate__(self) -> dict[str, Any]:
        return {"reasons": self.reasons, "_said": False}
