"""The pages of results: tables and figures from the files in benchmarks/results.

A new file needs no line here. The text of the pages is in `_templates`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from kinds import SIX, by_kind, kind_row  # noqa: E402
from tables import CONTROL, MAIN_SCORE, UNTOUCHED, Results, Table, read_results  # noqa: E402
from templates import heading, write_page  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150

VIEWS = "two_views"
COMPARED = {
    f"untouched, {MAIN_SCORE}": (UNTOUCHED, MAIN_SCORE),
    f"control, {MAIN_SCORE}": (CONTROL, MAIN_SCORE),
    f"weight 1, {MAIN_SCORE}": ("relative_l1:1", MAIN_SCORE),
    f"weight 3, {MAIN_SCORE}": ("relative_l1:3", MAIN_SCORE),
    f"untouched, {VIEWS}": (UNTOUCHED, VIEWS),
    f"control, {VIEWS}": (CONTROL, VIEWS),
    f"weight 0.3, {VIEWS}": ("relative_l1:0.3", VIEWS),
}
"""Detectors and scores on the first page, by the words for them."""
NOT_RUN = "not run"

FAMILIES = {
    "cifar": "CIFAR-",
    "densenet": "DenseNet-",
    "efficientnet_lite": "EfficientNet-lite",
    "resnet": "ResNet-",
    "wrn": "WideResNet-",
}
"""As papers write them; numbers follow, with hyphens between them."""


def write(folder: Path, source: Path = BENCHMARKS / "results") -> None:
    """Write the pages and their figures into a folder."""
    folder.mkdir(exist_ok=True)
    runs = {
        path.stem: Results(
            read_results(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        )
        for path in sorted(source.glob("*.csv"))
    }
    if not runs:
        write_page(folder, "results_missing")
        return
    for name, run in runs.items():
        text = "\n\n".join(run_page(name, run, folder))
        (folder / f"{name}.rst").write_text(text, encoding="utf-8")
    write_page(folder, "results_values", "values", summary=summary(runs).rst())
    write_page(
        folder,
        "results",
        comparison="\n\n".join(comparison(list(runs.values()), folder)),
        runs="\n".join(f"- {link(name, run)}: {in_a_line(run)}" for name, run in runs.items()),
        names="\n   ".join(f"{title(run)} <{name}>" for name, run in runs.items()),
    )


def network(run: Results) -> str:
    return f"{written(run.run['network'])}, {written(run.run['id'])}"


def written(name: str) -> str:
    """The name of a network or a data set, as papers write it."""
    family, numbers = re.fullmatch(r"(\D*)(.*)", name).groups()
    if family not in FAMILIES:
        return name
    return FAMILIES[family] + numbers.replace("_", "-")


def title(run: Results) -> str:
    """The network, and what its detectors are compared by."""
    if {*run.kinds} - {*map(kind_row, by_kind(SIX))}:
        subject = "kinds of outliers"
    elif run.run["outliers"]:
        subject = "auxiliary outliers"
    else:
        subject = "scores" if len(run.scores) > len(run.detectors) else "weights"
    others = [score for score in run.scores if score != MAIN_SCORE]
    return f"{network(run)}: {subject}" + (f", by {others[0]}" if len(others) == 1 else "")


def link(name: str, run: Results) -> str:
    return f":doc:`{title(run)} <{name}>`"


def image(path: str, description: str) -> str:
    return f".. image:: {path}\n   :alt: {description}"


# The first page


def comparison(runs: Sequence[Results], folder: Path) -> Iterator[str]:
    """The chart and the table, of the runs that have both scores."""
    with_both = [run for run in runs if {MAIN_SCORE, VIEWS} <= {*run.scores}]
    if with_both:
        with_both.sort(key=lambda run: run.run["id"])
        bars(with_both).savefig(folder / "comparison.png", dpi=DPI)
        yield image("comparison.png", "The FPR95 of the table below as bars")
        yield compared(with_both).rst()


def compared(runs: Sequence[Results]) -> Table:
    """FPR95, the mean over kinds, and the ID accuracy."""

    def cell(run: Results, detector: str, score: str) -> str:
        if not run.has(detector, score):
            return NOT_RUN
        accuracy = 100 * run.values("accuracy", detector, score).mean()
        return f"{run.cell('fpr95', detector, score, 'mean_kinds')} / {accuracy:.1f}"

    lines = [[words, *(cell(run, *of) for run in runs)] for words, of in COMPARED.items()]
    caption = "FPR95, mean over kinds of outliers / ID accuracy, percent"
    return Table(caption, ["detector, score", *map(network, runs)], lines)


def bars(runs: Sequence[Results]) -> Figure:
    """The same FPR95, a panel for each network."""
    from matplotlib.figure import Figure

    from skood.plotting.shared import COLOURS

    figure = Figure(figsize=(2 + 2.2 * len(runs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for ax, run in zip(panels, runs, strict=True):
        for row, (detector, score) in enumerate(COMPARED.values()):
            if run.has(detector, score):
                value = 100 * run.values("fpr95", detector, score, "mean_kinds").mean()
                bar = ax.barh(row, value, color=COLOURS[score == VIEWS])
                ax.bar_label(bar, fmt="%.1f", padding=2)
            else:
                ax.text(1, row, NOT_RUN, verticalalignment="center")
        ax.set(title=network(run).replace(", ", ",\n"), xlabel="FPR95, %")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(COMPARED)), [*COMPARED])
    panels[0].invert_yaxis()
    panels[0].margins(x=0.2)
    return figure


def in_a_line(run: Results) -> str:
    """What a run compares."""
    counts = {
        "kinds of outliers": run.kinds,
        "detectors": run.detectors,
        "scores": run.scores,
        "seeds": run.run["seeds"],
    }
    return ", ".join(f"{noun}: {len(of)}" for noun, of in counts.items())


# The other pages


def summary(runs: dict[str, Results]) -> Table:
    """Each detector of each run by the energy, beside the untouched classifier and the control.

    Those that outliers from the source of a set spoil are in parentheses.
    """
    lines = []
    for name, run in runs.items():
        for detector in run.detectors:
            texts = [link(name, run), detector]
            for metric in ("fpr95", "accuracy"):
                own, *others = (
                    100 * run.values(metric, d).mean() for d in (detector, UNTOUCHED, CONTROL)
                )
                numbers = [f"{own:.1f}", *(f"{own - other:+.1f}" for other in others)]
                apart = metric == "fpr95" and not run.counts(detector, "mean")
                texts += [f"({text})" if apart else text for text in numbers]
            of_kinds = ("mean_kinds", "worst_change")
            texts += [run.cell("fpr95", detector, ood_set=name) for name in of_kinds]
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


def run_page(name: str, run: Results, folder: Path) -> Iterator[str]:
    """One run: its facts, tables and figures."""
    yield heading(title(run), "=")
    yield f"Values: ``benchmarks/results/{name}.csv``. :doc:`values` says how to read the tables."
    yield f".. code-block:: text\n\n   {run.run['command']}"
    yield "\n".join(f"- {line}" for line in run.header())
    yield from run.notes()
    run.front().savefig(folder / f"{name}-front.png", dpi=DPI)
    yield image(f"{name}-front.png", f"mean FPR95 against ID accuracy, {title(run)}")
    yield heading("Sets", "-")
    run.heat_table().savefig(folder / f"{name}-fpr95.png", dpi=DPI)
    yield image(f"{name}-fpr95.png", f"FPR95 of methods on OOD sets, {title(run)}")
    metrics = ("fpr95", "auroc", "aupr", "fpr95_nearest")
    yield from (run.of_main_score(metric).rst() for metric in metrics)
    yield heading("Kinds of outliers", "-")
    yield from (run.by_kind(metric).rst() for metric in ("fpr95", "auroc"))
    if len(run.scores) > 1:
        yield heading("Scores", "-")
        yield from (run.by_score(metric).rst() for metric in ("fpr95", "auroc"))
    yield heading("Weights", "-")
    yield run.sweep().rst()
    yield run.differences().rst()
    yield heading("Thresholds", "-")
    yield run.realised().rst()
