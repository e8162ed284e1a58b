"""Warnings that name the user's line, however deep they arise, or that wait until they matter."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

__all__ = ["Doubts", "first_line", "held_back", "is_called_from", "quoted", "warn_user"]

QUOTED = 50
"""Characters that a message shows of a value that may be long."""

# Long values are not spelt out before they are cut.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxfrozenset = _repr.maxdict = 20
_repr.maxstring = _repr.maxother = _repr.maxlong = 2 * QUOTED

NOT_THE_USERS = {
    __name__.partition(".")[0],
    *("concurrent", "contextlib", "joblib", "sklearn", "threading", "torch"),
}
"""Packages that may lie between a warning and the user's line."""

Notice = tuple[str, type[Warning]]


class _Held:
    """The kind of warnings that wait in this thread or task, and those that do."""

    now: ContextVar[tuple[type[Warning], list[Notice]] | None] = ContextVar("held", default=None)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line of the user's, or later, inside `held_back`."""
    waiting = _Held.now.get()
    if waiting is not None and issubclass(category, waiting[0]):
        waiting[1].append((message, category))
        return
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def is_called_from(*modules: str) -> bool:
    """Whether a function of one of these modules, or of one inside them, is running."""
    frame: FrameType | None = sys._getframe()
    while frame:
        name = frame.f_globals.get("__name__", "")
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return True
        frame = frame.f_back
    return False


def first_line(error: BaseException) -> str:
    """The first line of what an error says, as messages quote it; empty if it says nothing."""
    return (str(error).splitlines() or [""])[0]


def quoted(value: Any) -> str:
    """A value of the user's as a message shows it: in one line, and cut if it is long.

    Examples
    --------
    >>> from skood.notices import quoted
    >>> quoted(["cat", "dog"])
    "['cat', 'dog']"
    """
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


@contextmanager
def held_back(category: type[Warning]) -> Iterator[list[Notice]]:
    """Collect warnings of a kind that arise inside, instead of showing them."""
    notices: list[Notice] = []
    token = _Held.now.set((category, notices))
    try:
        yield notices
    finally:
        _Held.now.reset(token)


class Doubts:
    """Warnings about a threshold that are shown when it is first used, once in each process.

    ``fit`` places a threshold that ``calibrate`` may move right afterwards. So what is wrong with
    it matters only if it is used.

    Examples
    --------
    >>> from skood.exceptions import ThresholdWarning
    >>> from skood.notices import Doubts, held_back, warn_user
    >>> with held_back(ThresholdWarning) as notices:
    ...     warn_user("placed on seen rows", ThresholdWarning)
    >>> Doubts(notices).warn()  # doctest: +SKIP
    ThresholdWarning: placed on seen rows
    """

    def __init__(self, notices: list[Notice]) -> None:
        self.notices = tuple(notices)
        self._unsaid = list(notices)

    def warn(self) -> None:
        """Say what is wrong with the threshold, unless that was said before."""
        while self._unsaid:
            warn_user(*self._unsaid.pop(0))

    def __getstate__(self) -> dict[str, Any]:
        return {"notices": self.notices, "_unsaid": list(self.notices)}
