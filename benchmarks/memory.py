"""Memory that scoring takes, by the number of rows.

A file of random rows is mapped read-only and scored by a detector with the default network, each
method and number of rows in a process of its own. Its resident anonymous memory (RssAnon in
/proc/self/status, so on Linux alone) is sampled all the while. The table goes to stdout in
Markdown, progress to stderr. README.md describes the columns.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import machine, versions
from numpy.typing import NDArray

from skood import SparseEnergyOODDetector

METHODS = ("score_samples", "predict", "decision_function")
COLUMNS = (
    "method",
    "rows",
    "X, MB",
    "after the imports, MB",
    "peak, MB",
    "above, MB",
    "8 bytes a row, MB",
    "above, less 8 bytes a row, MB",
)
N_COLUMNS = 32
TRAINING_ROWS = 4000
CHUNK = 100_000
INTERVAL = 0.002
MB = 1e6

Case = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case in a process of its own."""
    options = parse(argv)
    if sys.platform != "linux":
        sys.exit("error: RssAnon is in /proc of Linux alone; run this there.")
    if options.case:
        method, n_rows, folder = options.case
        print(json.dumps(measure(method, int(n_rows), Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prepare(Path(folder), max(options.rows))
        print(header(options), flush=True)
        print(table([run(method, n, folder) for method in METHODS for n in options.rows]))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows",
        type=count,
        nargs="+",
        default=[256, 1_000_000, 10_000_000],
        help="to score (default: 256, a single batch, 1000000 and 10000000)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help=f"for the file, {4 * N_COLUMNS} bytes a row; it is deleted (default: a temporary one)",
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # what a process measures
    return parser.parse_args(argv)


def count(text: str) -> int:
    """A number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


# Preparing


def prepare(folder: Path, n_rows: int) -> None:
    """Write the rows, and a detector fitted on others like them."""
    random = np.random.default_rng(0)
    X = rows(random, TRAINING_ROWS)
    y = (X[:, 0] > 0) + 2 * (X[:, 1] > 0)
    detector = SparseEnergyOODDetector(random_state=0, device="cpu").fit(X, y)
    (folder / "detector.pickle").write_bytes(pickle.dumps(detector))
    with (folder / "X").open("wb") as file:
        for start in range(0, n_rows, CHUNK):
            rows(random, min(CHUNK, n_rows - start)).tofile(file)


def rows(random: np.random.Generator, n_rows: int) -> NDArray[np.float32]:
    return random.standard_normal((n_rows, N_COLUMNS), dtype=np.float32)


# Measuring


def run(method: str, n_rows: int, folder: str) -> Case:
    """Measure a case in a fresh process."""
    command = [sys.executable, __file__, "--case", method, str(n_rows), folder]
    case = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{method}, {n_rows} rows: {case['seconds']:.0f} s", file=sys.stderr, flush=True)
    return case


def measure(method: str, n_rows: int, folder: Path) -> Case:
    before = anonymous_memory()
    detector = pickle.loads((folder / "detector.pickle").read_bytes())
    X = np.memmap(folder / "X", dtype=np.float32, mode="r", shape=(n_rows, N_COLUMNS))
    start = time.perf_counter()
    peak = peak_memory(lambda: getattr(detector, method)(X))
    seconds = time.perf_counter() - start
    return {
        "method": method,
        "rows": n_rows,
        "X": X.nbytes,
        "before": before,
        "peak": peak,
        "seconds": seconds,
    }


def peak_memory(call: Callable[[], object]) -> int:
    """Most anonymous memory that was seen during a call, its result included."""
    peak, done = anonymous_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, anonymous_memory())
        del result
    finally:
        done.set()
        watcher.join()
    return peak


def anonymous_memory() -> int:
    """Bytes of resident memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^RssAnon:\s+(\d+) kB$", status, re.M)[1])


# Reporting


def header(options: argparse.Namespace) -> str:
    command = ["python", "benchmarks/memory.py", "--rows", *map(str, options.rows)]
    return "\n".join(
        [
            "# Memory of scoring",
            "",
            f"- command: `{shlex.join(command)}`",
            f"- rows: {N_COLUMNS} columns of float32, in a file that is mapped read-only; the "
            f"default network, fitted on {TRAINING_ROWS} others",
            f"- versions: {versions()}",
            f"- machine: {machine()}, Linux, {' '.join(platform.libc_ver())}",
            "",
        ]
    )


def table(cases: list[Case]) -> str:
    lines = [COLUMNS, ["---", *["---:" for _ in COLUMNS[1:]]]]
    for case in cases:
        above, vector = case["peak"] - case["before"], 8 * case["rows"]
        sizes = (case["X"], case["before"], case["peak"], above, vector, above - vector)
        megabytes = [f"{size / MB:.1f}" for size in sizes]
        lines.append([case["method"], str(case["rows"]), *megabytes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
