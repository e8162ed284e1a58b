"""Passes of rows through a network, kept on disk, so that what needs the same one shares it.

Candidates of a search that differ in their score, in `tpr` or in how they are calibrated have the
same network, and it gives of the same rows what it gave before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from .caching import DiskMemory, outputs_key
from .engine.inference import passes_from, see, whole_pass
from .engine.network import Network
from .engine.outputs import Seen
from .engine.rows import Rows
from .engine.surroundings import undisturbed
from .storage import UnusableError, from_bytes, to_bytes

__all__ = ["KeptPasses", "passes_shared"]

KIND = "outputs"

MOST_OF_A_PASS = 256 * 2**20
"""Bytes that the outputs of one pass take, at most, if they are kept."""

MOST_OF_ALL = 2 * 2**30
"""Bytes that the outputs of all passes in a folder take, at most; the oldest make room."""

BYTES_OF_A_VALUE = 8
"""Of the widest dtype."""

SECONDS_WORTH_KEEPING = 0.05
"""Seconds that a pass takes, at least, if it is kept."""


@contextmanager
def passes_shared(memory: DiskMemory | None) -> Iterator[None]:
    """Inside, a pass that is in a memory is not made again; None makes all of them."""
    usable = None if memory is None or memory.folder is None else KeptPasses(memory)
    with passes_from(usable):
        yield


class KeptPasses:
    """What networks give of rows, as far as a memory has it; the rest is computed and kept."""

    def __init__(self, memory: DiskMemory) -> None:
        self._memory = memory

    def __call__(self, network: Network, rows: Rows) -> Seen | None:
        """What is seen of rows; None if there are none or too many, or without a key.

        The surroundings are those of a pass, as what preprocess makes of rows may depend on them.
        """
        if len(rows) == 0 or self._takes_too_much(network, rows):
            return None
        own = network.device, network.default_dtype
        key = self._memory.key(
            partial(undisturbed, partial(outputs_key, network, rows), *own),
            "keeps nothing, as it cannot tell what decides what the network gives",
        )
        if key is None:
            return None
        kept = self._load(key)
        if kept is None:
            return self._pass(network, rows, key)
        undisturbed(partial(see, network, rows), *own)
        return kept

    def _takes_too_much(self, network: Network, rows: Rows) -> bool:
        """Whether the outputs of rows take too much, as those of one row show where it is near."""
        most = MOST_OF_A_PASS // len(rows)
        if BYTES_OF_A_VALUE * (network.widest + network.n_logits) <= most:
            return False
        one = rows.pick(np.arange(1))
        one.watch = None
        return sum(x.nbytes for x in whole_pass(network, one) if x is not None) > most

    def _load(self, key: str) -> Seen | None:
        def read(entry: bytes) -> Seen:
            content, tensors = from_bytes(KIND, entry)
            if content["key"] != key:
                raise UnusableError("the entry is of other rows")
            return Seen(tensors.get("features"), tensors["logits"], tensors.get("layers"))

        return self._memory.load(name_of(key), read)

    def _pass(self, network: Network, rows: Rows, key: str) -> Seen:
        """Pass rows through the network, and keep what that gives if it took long.

        Not if memory ran out meanwhile, as it is of another shape then.
        """
        start, shapes = time.perf_counter(), network.shapes
        found = whole_pass(network, rows)
        if network.shapes == shapes:
            took_long = time.perf_counter() - start >= SECONDS_WORTH_KEEPING
            if took_long or self._memory.has(name_of(key)):  # which is of no use
                self._memory.save(name_of(key), lambda: packed(found, key))
                self._make_room()
        return found

    def _make_room(self) -> None:
        """Remove the passes that were kept first, until the rest is small enough."""
        files = []
        for path in self._memory.entries(f"*.{KIND}"):
            with suppress(OSError):  # another process may have removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        size = sum(n_bytes for _, n_bytes, _ in files)
        for _, n_bytes, path in sorted(files):
            if size <= MOST_OF_ALL:
                return
            with suppress(OSError):
                path.unlink()
                size -= n_bytes


def name_of(key: str) -> str:
    """Name of the entry with a key."""
    return f"{key}.{KIND}"


def packed(found: Seen, key: str) -> bytes:
    """What is seen of rows, as bytes without code."""
    tensors = {name: values for name, values in found._asdict().items() if values is not None}
    return to_bytes(KIND, {"key": key}, tensors)
