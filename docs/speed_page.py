"""The page of speed: tables from the files in benchmarks/results/speed.

A new file needs no line here. The text of the page is in `_templates/speed.rst`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from tables import Table  # noqa: E402
from templates import heading, write_page  # noqa: E402


def section(name: str, run: dict[str, Any]) -> Iterator[str]:
    """One run: its facts and tables."""
    yield heading(f"{escaped(run['title'])} ({escaped(name)})", "-")
    yield f".. code-block:: text\n\n   {run['command']}"
    yield f"- machine: {escaped(run['machine'])}\n- versions: {escaped(run['versions'])}"
    for entry in run["tables"]:
        title = escaped(entry["title"])
        columns = [escaped(text) for text in entry["columns"]]
        lines = [[escaped(text) for text in line] for line in entry["lines"]]
        # A table without a body is an error.
        yield Table(title, columns, lines).rst() if lines else f"{title}: no figures."
        yield note(entry["note"])


def note(text: str) -> str:
    """A paragraph, or a list of lines that begin with a dash."""
    lines = [line.partition("- ") for line in text.splitlines()]
    if all(dash and not before for before, dash, _ in lines):
        return "\n".join(f"- {escaped(line)}" for *_, line in lines)
    return escaped(text)


def escaped(text: str) -> str:
    """Text that reads as it is written; a cell of nothing but a dash would be a list."""
    text = re.sub(r"([\\*`|_])", r"\\\1", " ".join(text.split()))
    return f"\\{text}" if re.match(r"[-+•]( |$)", text) else text


def write(folder: Path, source: Path = BENCHMARKS / "results" / "speed") -> None:
    """Write the page into a folder."""
    paths = sorted(source.glob("*.json"))
    if not paths:
        write_page(folder, "speed_missing")
        return
    runs = [
        part
        for path in paths
        for part in section(path.stem, json.loads(path.read_text(encoding="utf-8")))
    ]
    write_page(folder, "speed", runs="\n\n".join(runs))
