"""The page of results, written from the files in benchmarks/results: new ones need no line here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from tables import Results, read_results  # noqa: E402

INTRODUCTION = """\
What the detectors do on real images. ``benchmarks/paper.py`` makes every figure here, by the
command that stands above it, from images and checkpoints that you bring; ``benchmarks/README.md``
says which. Three kinds of network stand in each table: the classifier **untouched**; the
**control**, fine-tuned at sparsity weight 0, as fine-tuning alone moves the numbers a long way; and
the sparse detectors, named by penalty and weight. **sroe** is sparse and trained with auxiliary
outliers. Only the difference to the control is the penalty's doing, and accuracy is what pays for
it."""

NOTHING = "There are no results in ``benchmarks/results`` yet."


def section(name: str, results: Results, folder: Path) -> Iterator[str]:
    """One run: its facts, tables and figures."""
    run = results.run
    title = f"{run['id']}, {run['network']}"
    yield f"{title}\n{'-' * len(title)}"
    yield f"Values: ``benchmarks/results/{name}.csv``."
    yield f".. code-block:: text\n\n   {run['command']}"
    yield "\n".join(f"- {line}" for line in results.header())
    yield from results.notes()
    results.heat_table().savefig(folder / f"{name}-fpr95.png", dpi=100)
    results.front().savefig(folder / f"{name}-front.png", dpi=100)
    yield image(f"{name}-fpr95.png", f"FPR95 of methods on OOD sets, {title}")
    yield image(f"{name}-front.png", f"mean FPR95 against ID accuracy, {title}")
    metrics = ("fpr95", "auroc", "aupr", "fpr95_nearest")
    yield from (results.of_main_score(metric).rst() for metric in metrics)
    if len(results.scores) > 1:
        yield from (results.by_score(metric).rst() for metric in ("fpr95", "auroc"))
    yield results.sweep().rst()
    yield results.note_of_differences()
    yield results.differences().rst()
    yield results.realised().rst()


def image(path: str, description: str) -> str:
    return f".. image:: {path}\n   :alt: {description}"


def write(folder: Path, source: Path = BENCHMARKS / "results") -> None:
    """Write the page and its figures into a folder."""
    folder.mkdir(exist_ok=True)
    title = "Results on real images"
    parts = [f"{title}\n{'=' * len(title)}", INTRODUCTION]
    paths = sorted(source.glob("*.csv"))
    for path in paths:
        run = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        parts += section(path.stem, Results(read_results(path), run), folder)
    parts += [] if paths else [NOTHING]
    (folder / "index.rst").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
