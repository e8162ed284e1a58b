"""The page of results: tables and figures from the files in benchmarks/results.

A new file needs no line here. The text of the page is in `_templates/results.rst`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from tables import CONTROL, MAIN_SCORE, UNTOUCHED, Results, Table, read_results  # noqa: E402
from templates import write_page  # noqa: E402


def section(name: str, results: Results, folder: Path) -> Iterator[str]:
    """One run: its facts, tables and figures."""
    run = results.run
    title = f"{run['id']}, {run['network']} ({name})"
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
    yield from (results.by_kind(metric).rst() for metric in ("fpr95", "auroc"))
    if len(results.scores) > 1:
        yield from (results.by_score(metric).rst() for metric in ("fpr95", "auroc"))
    yield results.sweep().rst()
    yield results.differences().rst()
    yield results.realised().rst()


def summary(all_results: dict[str, Results]) -> Table:
    """Each detector of each run by the energy, beside the untouched classifier and the control.

    Those that outliers from the source of a set spoil are in parentheses.
    """
    lines = []
    for name, results in all_results.items():
        for detector in results.detectors:
            texts = [name, detector]
            for metric in ("fpr95", "accuracy"):
                own, *others = (
                    100 * results.values(metric, d).mean() for d in (detector, UNTOUCHED, CONTROL)
                )
                numbers = [f"{own:.1f}", *(f"{own - other:+.1f}" for other in others)]
                apart = metric == "fpr95" and not results.counts(detector, "mean")
                texts += [f"({text})" if apart else text for text in numbers]
            of_kinds = ("mean_kinds", "worst_change")
            texts += [results.cell("fpr95", detector, ood_set=name) for name in of_kinds]
            lines.append(texts)
    less = ["less untouched", "less control"]
    return Table(
        f"All detectors by {MAIN_SCORE}: means over seeds, percent and points",
        [
            *("run", "detector", "FPR95, mean", *less, "ID accuracy", *less),
            *("FPR95, mean over kinds", "worst change of a kind"),
        ],
        lines,
        n_names=2,
    )


def image(path: str, description: str) -> str:
    return f".. image:: {path}\n   :alt: {description}"


def write(folder: Path, source: Path = BENCHMARKS / "results") -> None:
    """Write the page and its figures into a folder."""
    folder.mkdir(exist_ok=True)
    all_results = {
        path.stem: Results(
            read_results(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        )
        for path in sorted(source.glob("*.csv"))
    }
    if not all_results:
        write_page(folder, "results_missing")
        return
    runs = [
        part for name, results in all_results.items() for part in section(name, results, folder)
    ]
    write_page(folder, "results", summary=summary(all_results).rst(), runs="\n\n".join(runs))
