"""Passes of rows through a network, kept on disk, so that what needs the same one shares it.

Candidates of a search that differ in their score, in `tpr` or in how they are calibrated have the
same network, and it gives of the same rows what it gave before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .caching import DiskMemory, outputs_key
from .engine.inference import Both, outputs_within, passes_from
from .engine.network import Network
from .engine.rows import Rows
from .fingerprints import UnreadableError
from .storage import UnusableError, from_bytes, to_bytes

__all__ = ["KeptPasses", "passes_shared"]

KIND = "outputs"

MOST_OF_A_PASS = 256 * 2**20
"""Bytes that the outputs of one pass take, at most, if they are kept."""

MOST_OF_ALL = 2 * 2**30
"""Bytes that the outputs of all passes in a folder take, at most; the oldest make room."""

SECONDS_WORTH_KEEPING = 0.05
"""Seconds that a pass takes, at least, if it is kept."""


@contextmanager
def passes_shared(memory: DiskMemory | None) -> Iterator[None]:
    """Inside, a pass that is in a memory is not made again; None makes all of them."""
    with passes_from(None if memory is None else KeptPasses(memory)):
        yield


class KeptPasses:
    """What networks give of rows, as far as a memory has it; the rest is computed and kept."""

    def __init__(self, memory: DiskMemory) -> None:
        self._memory = memory

    def __call__(self, network: Network, rows: Rows) -> Both | None:
        """Features and logits of rows; None if they are too large, or their key cannot be told."""
        if 4 * network.n_logits * len(rows) > MOST_OF_A_PASS:  # in whatever dtype
            return None
        try:
            key = outputs_key(network, rows)
        except UnreadableError:
            return None  # which the training says, if there is one
        name = f"{key}.{KIND}"

        def read(entry: bytes) -> Both:
            content, tensors = from_bytes(KIND, entry)
            if content["key"] != key:
                raise UnusableError("the entry is of other rows")
            return tensors.get("features"), tensors["logits"]

        kept = self._memory.load(name, read)
        if kept is not None:
            return kept
        start = time.perf_counter()
        found = outputs_within(network, rows, MOST_OF_A_PASS)
        if found is not None and time.perf_counter() - start >= SECONDS_WORTH_KEEPING:
            self._memory.save(name, lambda: _packed(found, key))
            self._make_room()
        return found

    def _make_room(self) -> None:
        """Remove the passes that were kept first, until the rest is small enough."""
        folder = self._memory.folder
        assert folder is not None  # as something was kept
        with suppress(OSError):  # another process may do the same
            files = [(path.stat(), path) for path in folder.glob(f"*.{KIND}")]
            files.sort(key=lambda file: file[0].st_mtime_ns)
            size = sum(status.st_size for status, _ in files)
            for status, path in files:
                if size > MOST_OF_ALL:
                    path.unlink()
                    size -= status.st_size


def _packed(found: Both, key: str) -> bytes:
    """Outputs of rows as bytes without code."""
    features, logits = found
    tensors = {"logits": logits} if features is None else {"features": features, "logits": logits}
    return to_bytes(KIND, {"key": key}, tensors)
