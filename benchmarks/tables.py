"""Tables and figures from the files that paper.py leaves, results.csv and run.json.

Values in results.csv are fractions, one row for each seed, detector, score and OOD set; tables show
percent.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kinds import SUMMARIES, by_kind, kind_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

WORDS = ("id", "network", "checkpoint", "detector", "penalty", "score", "ood_set")
COUNTS = ("train_rows", "epochs", "seed")
METRICS = ("fpr95", "fpr95_nearest", "auroc", "aupr")
SHARES = (
    *METRICS,
    "accuracy",
    "l1_of_control",
    "kept_training",
    "kept_fresh",
    "hoyer",
    "surrogate_auroc",
)
COLUMNS = (
    *("id", "network", "checkpoint", "train_rows", "epochs", "seed"),
    *("detector", "penalty", "weight", "outlier_weight"),
    *("distillation_weight", "learning_rate", "sum_of_rates", "score", "ood_set"),
    *METRICS,
    *("accuracy", "kept_training", "kept_fresh"),
    *("mean_l1", "l1_of_control", "hoyer", "surrogate_auroc", "energy_id", "energy_ood"),
)

MEANS = ("mean", "mean_apart")
"""Means over OOD sets, which tables show beside them."""
CHANGES = ("worst_change", "worst_change_same_score")

UNTOUCHED, CONTROL, SROE = "untouched", "control", "sroe"
MAIN_SCORE = "energy"
"""The paper's score, by which detectors are compared."""

TITLES = {
    "fpr95": "FPR95",
    "auroc": "AUROC",
    "aupr": "AUPR",
    "fpr95_nearest": "FPR95, nearest",
    "accuracy": "ID accuracy",
    "kept_training": "kept, training rows",
    "kept_fresh": "kept, fresh rows",
    "mean_l1": "mean L1",
    "l1_of_control": "mean L1, of the control's",
    "sum_of_rates": "sum of rates",
    "hoyer": "Hoyer index",
    "surrogate_auroc": "AUROC, surrogates",
    "energy_id": "energy, ID",
    "energy_ood": "energy, OOD",
    "mean": "mean",
    "mean_apart": "mean, outliers' source apart",
    "mean_kinds": "mean over kinds",
    "worst_change": "worst change of a kind",
    "worst_change_same_score": "the same, under the same score",
}


def write_results(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = (row[name] for name in COLUMNS)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def read_results(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: parsed(name, value) for name, value in r.items()} for r in csv.DictReader(file)
        ]


def parsed(name: str, value: str) -> Any:
    return value if name in WORDS else int(value) if name in COUNTS else float(value)


# Tables


@dataclass(frozen=True)
class Table:
    """Cells of text under column titles; the first `n_names` columns name the row."""

    title: str
    columns: list[str]
    lines: list[list[str]]
    n_names: int = 1

    def markdown(self) -> str:
        rule = ["---" if i < self.n_names else "---:" for i in range(len(self.columns))]
        lines = [self.columns, rule, *self.lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def rst(self) -> str:
        rows = []
        for line in (self.columns, *self.lines):
            rows += [f"   {'-' if i else '* -'} {text}".rstrip() for i, text in enumerate(line)]
            rows[-len(line) + 1 :] = ["  " + text for text in rows[-len(line) + 1 :]]
        return "\n".join([f".. list-table:: {self.title}", "   :header-rows: 1", "", *rows, ""])


def header(*columns: str) -> Iterator[str]:
    """The first two lines of a table in Markdown that is printed as it grows."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"


def line(*cells: Any) -> str:
    """A further line; numbers have one decimal."""
    written = [cell if isinstance(cell, str) else f"{cell:.1f}" for cell in cells]
    return f"| {' | '.join(written)} |"


class Results:
    """Rows of one results.csv, and what its run.json says of them."""

    def __init__(self, rows: Sequence[Row], run: dict[str, Any]) -> None:
        self.run = run
        self.detectors = list(dict.fromkeys(row["detector"] for row in rows))
        self.scores = list(dict.fromkeys(row["score"] for row in rows))
        names = dict.fromkeys(row["ood_set"] for row in rows)
        self.kinds = [name for name in names if name.startswith(kind_row(""))]
        self.sets = [
            name for name in names if name in MEANS or name not in [*self.kinds, *SUMMARIES]
        ]
        self.settings = {row["detector"]: row for row in rows}
        self.related: list[str] = run["related"]
        self._cells: dict[tuple[str, str, str], list[Row]] = {}
        for row in rows:
            key = row["detector"], row["score"], row["ood_set"]
            self._cells.setdefault(key, []).append(row)

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        return ((d, s) for d in self.detectors for s in self.scores if self.has(d, s))

    @property
    def fair_mean(self) -> str:
        """The mean by which all detectors compare."""
        return "mean_apart" if self.related else "mean"

    def has(self, detector: str, score: str = MAIN_SCORE) -> bool:
        return (detector, score, "mean") in self._cells

    def counts(self, detector: str, ood_set: str) -> bool:
        """Whether a result counts: not where the outliers come from the set's own source."""
        kinds = [kind_row(kind) for kind in by_kind(self.related)]
        spoiled = [*self.related, *kinds, *(name for name in SUMMARIES if name != "mean_apart")]
        return detector != SROE or not self.related or ood_set not in spoiled

    def values(
        self, metric: str, detector: str, score: str = MAIN_SCORE, ood_set: str = "mean"
    ) -> np.ndarray:
        """One value a seed."""
        return np.array([row[metric] for row in self._cells[detector, score, ood_set]])

    def cell(
        self, metric: str, detector: str, score: str = MAIN_SCORE, ood_set: str = "mean"
    ) -> str:
        values = self.values(metric, detector, score, ood_set)
        sign = "+" if ood_set in CHANGES else ""
        scale, digits = (100, 1) if metric in SHARES else (1, 2)
        text = spread(scale * values, digits, sign)
        of_the_set = metric in (*METRICS, "energy_ood")
        return f"({text})" if of_the_set and not self.counts(detector, ood_set) else text

    def set_title(self, ood_set: str) -> str:
        title = TITLES.get(ood_set, ood_set)
        return f"{title} (not the paper's)" if ood_set in MEANS and self.run["stand_ins"] else title

    # The tables

    def by_set(self, metric: str) -> Table:
        """Detectors and scores against OOD sets."""
        return Table(
            f"{TITLES[metric]}, percent",
            ["detector", "score", *map(self.set_title, self.sets)],
            [[d, s, *(self.cell(metric, d, s, o) for o in self.sets)] for d, s in self.pairs],
            n_names=2,
        )

    def of_main_score(self, metric: str) -> Table:
        """Detectors against OOD sets, by the paper's score, with the ID accuracy."""
        return Table(
            f"{TITLES[metric]} by {MAIN_SCORE}, percent",
            ["detector", *map(self.set_title, self.sets), TITLES["accuracy"]],
            [
                [
                    d,
                    *(self.cell(metric, d, ood_set=o) for o in self.sets),
                    self.cell("accuracy", d),
                ]
                for d in self.detectors
            ],
        )

    def by_score(self, metric: str) -> Table:
        """Detectors against scores, the mean over the OOD sets."""
        return Table(
            f"{TITLES[metric]}, {self.set_title(self.fair_mean)}, percent",
            ["detector", *self.scores],
            [
                [d, *(self.cell(metric, d, s, self.fair_mean) for s in self.scores)]
                for d in self.detectors
            ],
        )

    def by_kind(self, metric: str) -> Table:
        """Detectors and scores against kinds of outliers, and their changes."""
        columns = [self.fair_mean, *self.kinds, "mean_kinds", *CHANGES]
        titles = [self.set_title(name).removeprefix(kind_row("")) for name in columns]
        return Table(
            f"{TITLES[metric]} by kind, percent; changes from the {UNTOUCHED} network, points",
            ["detector", "score", *titles, "worst kind"],
            [
                [
                    d,
                    s,
                    *(self.cell(metric, d, s, name) for name in columns),
                    self.worst(metric, d, s),
                ]
                for d, s in self.pairs
            ],
            n_names=2,
        )

    def worst(self, metric: str, detector: str, score: str) -> str:
        """The kind that fares worst beside the untouched network under the paper's score."""
        if (detector, score) == (UNTOUCHED, MAIN_SCORE):
            return ""
        changes = {
            kind: self.values(metric, detector, score, kind).mean()
            - self.values(metric, UNTOUCHED, ood_set=kind).mean()
            for kind in self.kinds
        }
        of_all = max if metric.startswith("fpr") else min
        return of_all(changes, key=lambda kind: changes[kind]).removeprefix(kind_row(""))

    def realised(self) -> Table:
        """What thresholds keep of the ID test rows."""
        metrics = ("kept_training", "kept_fresh")
        return Table(
            "ID test rows kept by a threshold meant to keep 95 %, percent",
            ["detector", "score", *(TITLES[name] for name in metrics)],
            [[d, s, *(self.cell(name, d, s) for name in metrics)] for d, s in self.pairs],
            n_names=2,
        )

    def sweep(self) -> Table:
        """What each weight does to detection, accuracy, features and energies."""
        means = ["mean", "mean_apart"] if self.related else ["mean"]
        others = [
            "accuracy",
            "surrogate_auroc",
            "sum_of_rates",
            "mean_l1",
            "l1_of_control",
            "hoyer",
        ]
        others += ["energy_id", "energy_ood"]
        lines = []
        for detector in self.detectors:
            settings = self.settings[detector]
            lines.append(
                [
                    detector,
                    settings["penalty"] or "none",
                    f"{settings['weight']:g}",
                    f"{settings['distillation_weight']:g}",
                    *(self.cell("fpr95", detector, ood_set=name) for name in means),
                    *(self.cell(name, detector) for name in others),
                ]
            )
        return Table(
            f"The sweep, by {MAIN_SCORE}",
            ["detector", "penalty", "weight", "distillation"]
            + [f"FPR95, {self.set_title(name)}, %" for name in means]
            + [TITLES[name] + (", %" if name in SHARES else "") for name in others],
            lines,
            n_names=2,
        )

    def differences(self) -> Table:
        """Each detector less the control, with intervals."""
        lines = []
        for entry in self.run["differences"]:
            texts = [entry["detector"]]
            for metric in ("fpr95", "accuracy"):
                mean, low, high = (100 * entry[metric][end] for end in ("mean", "low", "high"))
                texts += [f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            lines.append(texts)
        interval = "95 % interval"
        return Table(
            f"Detector less control by {MAIN_SCORE}, points; intervals from "
            f"{self.run['resamplings']} bootstrap draws",
            [
                "detector",
                f"FPR95, {self.set_title(self.fair_mean)}",
                interval,
                "ID accuracy",
                interval,
            ],
            lines,
        )

    # What the tables mean

    def header(self) -> list[str]:
        """What was run on what, one fact a line."""
        run = self.run
        seeds = ", ".join(map(str, run["seeds"]))
        ood = ", ".join(f"{name} ({n_rows} rows)" for name, n_rows in run["ood"].items())
        kinds = "; ".join(f"{kind}: {', '.join(of)}" for kind, of in run["kinds"].items())
        train, test = (
            f"{run[f'{part}_rows']} of {run[f'all_{part}_rows']}" for part in ("train", "test")
        )
        lines = [
            f"ID: {run['id']}, {run['n_classes']} classes, {train} training rows, drawn by each "
            f"seed; {test} test rows, the same for all seeds",
            f"OOD: {ood}; the mean is over {', '.join(run['mean_of'])}",
            f"kinds of OOD: {kinds}",
            f"network: {run['network']}, {run['checkpoint']} (SHA-256 {run['checkpoint_digest']}"
            f"...), normalised as {run['normalise']}",
            f"fine-tuning: {run.get('layers', 'all')} layers, epochs {run['epochs']}, learning "
            f"rate {run['learning_rate']:g}, flips, seeds {seeds}; a tenth of the training rows is "
            "held out for the threshold",
        ]
        if run["outliers"]:
            lines.append(
                f"{SROE}: l1, weight {run['sroe_weight']:g}, outlier weight "
                f"{run['outlier_weight']:g}, {run['outlier_rows']} rows of {run['outliers']}"
            )
        if run["fit_rows"]:
            lines.append(f"scores with statistics: fitted on at most {run['fit_rows']} rows")
        lines += [f"versions: {run['versions']}", f"machine: {run['machine']}"]
        return [*lines, *(f"failed: {name}: {why}" for name, why in run["failures"].items())]

    def notes(self) -> list[str]:
        """What holds for this run alone."""
        n_seeds = len(self.run["seeds"])
        notes = [
            (f"Mean ± standard deviation over {n_seeds} fine-tuning seeds. " if n_seeds > 1 else "")
            + "There is one checkpoint: the spread holds for it alone."
        ]
        if self.run["stand_ins"]:
            stand_ins = ", ".join(
                f"{name} stands in for {other}" for name, other in self.run["stand_ins"].items()
            )
            notes.append(f"The mean is not the paper's: {stand_ins}.")
        if self.related:
            notes.append(
                f"In parentheses: results that do not count, because the outliers of {SROE} come "
                f"from the same source as {' and '.join(self.related)}. The second mean leaves "
                "these sets out for all detectors."
            )
        return notes

    def markdown(self) -> str:
        parts = [f"# {self.run['id']}, {self.run['network']}"]
        parts.append("\n".join(f"- {line}" for line in self.header()))
        parts.append(f"    {self.run['command']}")
        parts += [*self.notes(), 'What the columns mean: benchmarks/README.md, "Columns".']
        tables = [self.by_set(metric) for metric in ("fpr95", "auroc", "aupr", "fpr95_nearest")]
        tables += [self.by_kind(metric) for metric in ("fpr95", "auroc")]
        for table in (*tables, self.by_score("fpr95"), self.realised(), self.sweep()):
            parts += [f"## {table.title}", table.markdown()]
        table = self.differences()
        parts += [f"## {table.title}", table.markdown()]
        return "\n\n".join(parts) + "\n"

    # Figures

    def heat_table(self) -> Figure:
        """FPR95 of all detectors by all scores, the paper's first.

        Where outliers come from the source of some sets, the detector that was trained with them
        stands in a second table, without these sets.
        """
        from matplotlib.figure import Figure

        from skood.plotting import DetectionTableDisplay

        pairs = [(d, s) for s in self.scores for d in self.detectors]
        tables = [(pairs, [name for name in self.sets if name != "mean_apart"])]
        if self.related and self.has(SROE):
            sets = [name for name in self.sets if name not in [*self.related, "mean"]]
            tables = [
                ([(d, s) for d, s in pairs if d != SROE], tables[0][1]),
                ([(d, s) for d, s in pairs if s == MAIN_SCORE], sets),
            ]
        heights = [1 + 0.3 * len(pairs) for pairs, _ in tables]
        figure = Figure(figsize=(4 + 1.2 * len(self.sets), sum(heights)), layout="constrained")
        axes = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
        for ax, (pairs, sets) in zip(axes, tables, strict=True):
            values = np.array([[self.values("fpr95", d, s, o) for o in sets] for d, s in pairs])
            DetectionTableDisplay(
                100 * values.mean(axis=2),
                methods=[f"{d} + {s}" for d, s in pairs],
                columns=[self.set_title(name).replace(" (", "\n(") for name in sets],
                spread=100 * values.std(axis=2, ddof=1) if values.shape[2] > 1 else None,
                lower_is_better=True,
                label="FPR95, %",
            ).plot(ax=ax)
        return figure

    def front(self) -> Figure:
        """Mean FPR95 against ID accuracy: what is gained, and what it costs."""
        from matplotlib.figure import Figure

        from skood.plotting.shared import COLOURS, MARKERS

        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        ax = figure.subplots()
        families = {UNTOUCHED: [UNTOUCHED], CONTROL: [CONTROL]}
        for detector in self.detectors:
            if detector not in families:
                settings = self.settings[detector]
                family = SROE if detector == SROE else settings["penalty"] or CONTROL
                if settings["distillation_weight"]:
                    family = f"{family}, distilled"
                families.setdefault(family, []).append(detector)
        looks = zip(families.items(), cycle(MARKERS), cycle(COLOURS), strict=False)
        for (family, members), marker, colour in looks:
            detectors = sorted(members, key=lambda name: self.settings[name]["weight"])
            x, y = (
                100 * np.array([self.values(metric, d, ood_set=self.fair_mean) for d in detectors])
                for metric in ("accuracy", "fpr95")
            )
            errors = [v.std(axis=1, ddof=1) if v.shape[1] > 1 else None for v in (x, y)]
            ax.errorbar(
                *(x.mean(axis=1), y.mean(axis=1)),
                *(errors[1], errors[0]),
                color=colour,
                marker=marker,
                linestyle="-" if len(detectors) > 1 else "none",
                linewidth=1,
                capsize=2,
                label=family,
            )
            if family not in (UNTOUCHED, CONTROL, SROE):
                for detector, x_one, y_one in zip(
                    detectors, x.mean(axis=1), y.mean(axis=1), strict=True
                ):
                    weight = f"{self.settings[detector]['weight']:g}"
                    ax.annotate(
                        weight,
                        (x_one, y_one),
                        xytext=(5, 4 if marker in MARKERS[::2] else -10),
                        textcoords="offset points",
                        fontsize=8,
                    )
        ax.set(
            title="Towards the lower right is better. Numbers: sparsity weight"
            + ("; bars: sd over seeds" if len(self.run["seeds"]) > 1 else ""),
            xlabel="ID accuracy, %",
            ylabel=f"FPR95, {self.set_title(self.fair_mean)}, %",
        )
        ax.title.set_fontsize(9)
        ax.legend()
        return figure


def spread(values: np.ndarray, digits: int, sign: str = "") -> str:
    text = f"{values.mean():{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.{digits}f}"
