"""What does scoring in bfloat16 cost in detection quality?

Fine-tunes one classifier in float32, scores the same images with the same network in float32 and in
bfloat16, each with a threshold placed in its own precision, and reports what changes: AUROC, FPR95,
decisions, scores. Also with the head in float32, on features in bfloat16. README.md describes the
columns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import machine, versions
from images import (
    NORMALISATIONS,
    Data,
    add_data_options,
    check_available,
    complete,
    count,
    draw,
    number,
    quietly_fitted,
    read_data,
    read_network,
    untrained,
)
from kinds import STAND_INS
from numpy.typing import NDArray
from paper import a_seed
from tables import CONTROL, UNTOUCHED, Table
from torch import Tensor, nn

from skood import SparseEnergyOODDetector
from skood.engine.hardware import has_native_bfloat16
from skood.metrics import auroc, fpr_at_tpr

ID = "id_test"
"""Name of the ID rows beside the OOD sets, none of which may have it."""

FEW_ROWS = 100
"""Rows for a fit that trains nothing."""

FLOAT32, BFLOAT16, MIXED = "float32", "bfloat16", "bfloat16, head in float32"


@dataclass(frozen=True)
class Judged:
    """Scores of one detector in one precision and whether it keeps the rows, by set of rows."""

    scores: dict[str, NDArray[np.float64]]
    kept: dict[str, NDArray[np.bool_]]

    @property
    def ood(self) -> list[str]:
        return [name for name in self.scores if name != ID]

    def auroc(self) -> dict[str, float]:
        """By OOD set, percent."""
        return {n: 100 * auroc(self.scores[ID], self.scores[n], positive="id") for n in self.ood}

    def fpr95(self) -> dict[str, float]:
        """By OOD set, percent."""
        ids = self.scores[ID]
        return {n: 100 * fpr_at_tpr(ids, self.scores[n], positive="id") for n in self.ood}


Runs = dict[str, dict[str, Judged]]
"""By detector, then by how it scores."""


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, score and report, seed by seed."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        data = read_data(options.id, options.ood)
        check_available("--train-rows", options.train_rows, len(data.x_train), options.id)
        check_available("--test-rows", options.test_rows, len(data.x_test), options.id)
        module = read_network(options, data.n_classes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    runs = {UNTOUCHED: judge(module, options, data)}
    for seed in dict.fromkeys(options.seeds):
        for weight in (0.0, options.weight):
            name = f"weight {weight:g}" if weight else CONTROL
            tuned = fine_tuned(module, weight, seed, options, data)
            runs[f"{name}, seed {seed}"] = judge(tuned, options, data)
        result = report(runs, options, argv)
        write(options.out, result)
    print(markdown(result))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--weight", type=number, default=0.02, help="beside the control's, 0 (default: 0.02)")
    add("--seeds", type=a_seed, nargs="+", default=[0, 1], help="default: 0 1")
    add("--epochs", type=count, default=2, help="of fine-tuning (default: 2)")
    add("--train-rows", type=count, default=4000, help="drawn by each seed (default: 4000)")
    add("--test-rows", type=count, default=4000, help="half of them calibrate (default: 4000)")
    add("--ood-rows", type=count, default=1000, help="of each set, at most (default: 1000)")
    add("--out", type=Path, metavar="FILE.json", help="for the tables, anew after each seed")
    options = parser.parse_args(argv)
    complete(options)
    return options


# Scoring


def fine_tuned(
    module: nn.Module, weight: float, seed: int, options: argparse.Namespace, data: Data
) -> nn.Module:
    """The classifier after fine-tuning in float32."""
    rows = draw(len(data.x_train), options.train_rows, seed)
    detector = SparseEnergyOODDetector(
        module,
        sparsity_weight=weight,
        penalty="l1",
        max_epochs=options.epochs,
        calibration_size=0.01,  # the threshold plays no part
        preprocess=NORMALISATIONS[options.normalise],
        augment="flip",
        precision="float32",
        random_state=seed,
    )
    return quietly_fitted(detector, data, rows).module_


def judge(module: nn.Module, options: argparse.Namespace, data: Data) -> dict[str, Judged]:
    """The same network, scored in each way."""
    exact = untrained(module, options, data, FEW_ROWS, precision="float32")
    head = exact.module_.get_submodule(exact.head_)
    ways = {
        FLOAT32: exact,
        BFLOAT16: untrained(module, options, data, FEW_ROWS, precision="bfloat16"),
        MIXED: untrained(
            module,
            options,
            data,
            FEW_ROWS,
            precision="bfloat16",
            score_function=energy_through(head),
        ),
    }
    return {name: scored(detector, name, options, data) for name, detector in ways.items()}


def energy_through(head: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The negative energy, of logits that a head in float32 makes of the features."""

    def energy(features: Tensor, logits: Tensor) -> Tensor:
        return torch.logsumexp(head(features.float()).double(), dim=1)

    return energy


def scored(
    detector: SparseEnergyOODDetector, name: str, options: argparse.Namespace, data: Data
) -> Judged:
    """Calibrated on half of the test rows, judged on the others and the OOD sets."""
    testing = draw(len(data.x_test), options.test_rows, seed=0)
    fresh, others = np.array_split(testing, 2)
    detector.calibrate(data.x_test[fresh])
    sets = {ID: data.x_test[others]}
    for ood, x in data.ood.items():
        sets[ood] = x[draw(len(x), options.ood_rows, seed=0)]
    scores = {key: detector.score_samples(x) for key, x in sets.items()}
    print(f"scored in {name}", file=sys.stderr, flush=True)
    # What predict says, without another forward.
    return Judged(scores, {key: s - detector.offset_ >= 0 for key, s in scores.items()})


# Comparing


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before}


def largest(changes: dict[str, float]) -> str:
    """The change that is largest either way, and where."""
    name = max(changes, key=lambda name: abs(changes[name]))
    text = points(changes[name])
    return f"{text} ({name})" if float(text) else text


def points(value: float) -> str:
    text = f"{value:+.2f}"
    return text if float(text) else "0.00"


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def flips(before: Judged, after: Judged, names: Sequence[str]) -> float:
    """Percent of the rows of all these sets that one keeps and the other does not."""
    return 100 * float(np.mean(np.concatenate([before.kept[n] != after.kept[n] for n in names])))


def relative_changes(before: Judged, after: Judged) -> NDArray[np.float64]:
    """Of each score, percent."""
    old, new = (np.concatenate(list(judged.scores.values())) for judged in (before, after))
    return 100 * np.abs(new - old) / np.abs(old)


def comparison(before: Judged, after: Judged) -> list[str]:
    """Cells of a line."""
    areas = difference(after.auroc(), before.auroc())
    rates = difference(after.fpr95(), before.fpr95())
    changes = relative_changes(before, after)
    return [
        largest(areas),
        points(mean(areas)),
        largest(rates),
        points(mean(rates)),
        f"{flips(before, after, [ID]):.2f}",
        f"{flips(before, after, before.ood):.2f}",
        f"{changes.max():.2f}",
        f"{np.median(changes):.2f}",
    ]


# Reporting


def report(runs: Runs, options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the file holds."""
    tables = [(levels(runs), note_of_levels(options))]
    tables += [(changes(runs, way), note_of_changes(way)) for way in (BFLOAT16, MIXED)]
    return {
        "title": f"Scoring in bfloat16: {options.id.stem}, {options.network}",
        "command": command(argv),
        "machine": machine(),
        "versions": versions(),
        "tables": [asdict(table) | {"note": note} for table, note in tables],
    }


def levels(runs: Runs) -> Table:
    """What the changes are to be held against."""
    lines = []
    for name, ways in runs.items():
        exact = ways[FLOAT32]
        kept = (f"{100 * ways[way].kept[ID].mean():.1f}" for way in (FLOAT32, BFLOAT16))
        lines.append([name, f"{mean(exact.auroc()):.2f}", f"{mean(exact.fpr95()):.2f}", *kept])
    return Table(
        "Detection in float32, percent",
        ["detector", "AUROC, mean", "FPR95, mean", "ID kept", "ID kept, scored in bfloat16"],
        lines,
    )


def changes(runs: Runs, way: str) -> Table:
    lines = [[name, *comparison(ways[FLOAT32], ways[way])] for name, ways in runs.items()]
    return Table(
        f"Scored in {way}, less float32",
        [
            "detector",
            "AUROC, largest change, points",
            "AUROC, mean, points",
            "FPR95, largest change, points",
            "FPR95, mean, points",
            "ID decisions that flip, %",
            "OOD decisions that flip, %",
            "score, largest change, %",
            "score, median change, %",
        ],
        lines,
    )


def note_of_levels(options: argparse.Namespace) -> str:
    half = options.test_rows // 2
    rows = (
        f"{options.test_rows} ID test rows, of which {options.test_rows - half} calibrate and "
        f"{half} are judged, and at most {options.ood_rows} of each OOD set, the same for all. "
        f"Fine-tuned in float32 on {options.train_rows} rows, epochs {options.epochs}."
    )
    names = [path.stem for path in options.ood]
    replaced = [f"{n} stands in for {STAND_INS[n]}" for n in names if n in STAND_INS]
    return f"{rows} The mean is not the paper's: {', '.join(replaced)}." if replaced else rows


def note_of_changes(way: str) -> str:
    where = {
        BFLOAT16: "The whole network runs under autocast, its head included.",
        MIXED: "The features come from bfloat16, the logits from a head in float32.",
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = "has" if has_native_bfloat16(device) else "does not have"
    return (
        f"{where[way]} Each precision has a threshold of its own, on the same calibration rows. ID "
        f"is the positive class. The machine {native} bfloat16 in hardware."
    )


def command(argv: Sequence[str]) -> str:
    """The command line, files without their folders."""
    words = [Path(word).name if os.sep in word else word for word in argv]
    return shlex.join(["python", "benchmarks/precision.py", *words])


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    parts = [f"# {result['title']}", f"    {result['command']}"]
    parts.append(f"- machine: {result['machine']}\n- versions: {result['versions']}")
    for entry in result["tables"]:
        table = Table(**{name: value for name, value in entry.items() if name != "note"})
        parts += [f"## {table.title}", table.markdown(), entry["note"]]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
