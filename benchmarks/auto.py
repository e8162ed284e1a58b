"""What does ``sparsity_weight="auto"`` choose, and what does the choice cost?

Fits one classifier with "auto" for the weight and the score, keeps the network of every rung, and
judges each on real outliers of several kinds by every score. So it knows the regret of the choice:
the FPR95 of what was chosen, less that of the best that could have been. With ``--time`` it also
fits with only the weight chosen and with a fixed weight, to compare times; with ``--search`` it
fits scikit-learn's grid search over the same weights.
README.md describes the files and the columns.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from environment import command_line
from images import (
    NORMALISATIONS,
    Data,
    add_data_options,
    add_precision_option,
    check_available,
    complete,
    count,
    count_or_zero,
    draw,
    number,
    read_data,
    read_network,
)
from kinds import KINDS, means_by_kind, noise_sets, of_the_six
from sklearn.model_selection import GridSearchCV
from tables import header, line
from torch import nn

from skood import SparseEnergyOODDetector, path
from skood.engine.augmentation import AUGMENTATIONS
from skood.engine.network import Network
from skood.engine.outputs import Seen
from skood.engine.rows import Rows, as_array
from skood.engine.training import TrainingData
from skood.evidence import Evidence, Pieces
from skood.fitting import Fit
from skood.metrics import fpr_at_tpr
from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.rows import as_rows
from skood.scores import apply_score, fit_score, get_score
from skood.scoring import LabelledRows, seen_of_all

SCORES = ("energy", "two_views", "three_views")
"""Scores that are shown beside the one that "auto" chooses."""

GROUPS = ("kinds of the panel", "other kinds")
"""Means over kinds that are shown beside that over all."""

FOLDS = 3

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and judge, seed by seed; what is done already is read from the folder."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        data = read_data(options.id, options.ood)
        check_available("--train-rows", options.train_rows, len(data.x_train), options.id)
        module = read_network(options, data.n_classes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [row for seed in options.seeds for row in of_seed(module, seed, options, data)]
    print(command_line("benchmarks/auto.py", argv))
    print("\n".join(report(rows)))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--learning-rate", type=number, default=1e-3, help="default: 0.001")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--epochs", type=count_or_zero, default=3, help="0 tries scores alone (default: 3)")
    add("--train-rows", type=count, default=8000, help="drawn by each seed (default: 8000)")
    add("--augment", choices=sorted(AUGMENTATIONS), default="flip", help="default: flip")
    add("--new-rows", action="store_true", help="fit test rows that are new to the network")
    add("--test-rows", type=count, default=1500, help="default: 1500")
    add("--ood-rows", type=count, default=300, help="of each set (default: 300)")
    add("--time", action="store_true", help="compare with fits by one score and a fixed weight")
    add("--search", action="store_true", help="compare with a grid search, by energy")
    add_precision_option(parser)
    add("--folder", type=Path, required=True, help="for the results, to go on from")
    options = parser.parse_args(argv)
    complete(options)
    return options


def of_seed(
    module: nn.Module, seed: int, options: argparse.Namespace, data: Data
) -> list[dict[str, str]]:
    """Rows of one seed: rungs by score, a plain fit, and the search."""
    file = options.folder / f"{options.network}_{options.id.stem}_{seed}.csv"
    if not file.exists():
        rows = list(measured(module, seed, options, data))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def measured(module: nn.Module, seed: int, options: argparse.Namespace, data: Data) -> list[Row]:
    panel = Panel(options, data)
    x, y = (panel.x_new, panel.y_new) if options.new_rows else (data.x_train, data.y_train)
    drawn = draw(len(x), options.train_rows, seed)
    x, y = x[drawn], y[drawn]

    def detector(**parameters: Any) -> SparseEnergyOODDetector:
        return SparseEnergyOODDetector(
            module,
            learning_rate=options.learning_rate,
            max_epochs=options.epochs,
            preprocess=NORMALISATIONS[options.normalise],
            precision=options.precision,
            augment=options.augment,
            random_state=seed,
            **parameters,
        )

    common = {"seed": seed, "network": options.network, "id": options.id.stem}
    taken, rungs = walked(detector(sparsity_weight="auto", score_function="auto"), x, y, panel)
    rows = [{**common, "method": "rung", **rung} for rung in rungs]
    rows.append({**common, "method": "auto", "score": "auto", "seconds": taken})
    for score in SCORES if options.time else ():
        seconds, _ = timed(detector(sparsity_weight="auto", score_function=score), x, y)
        rows.append({**common, "method": "auto", "score": score, "seconds": seconds})
        seconds, _ = timed(detector(score_function=score), x, y)
        rows.append({**common, "method": "plain", "score": score, "seconds": seconds})
    if options.search:
        search = GridSearchCV(
            detector(),
            {"sparsity_weight": sorted({row["weight"] for row in rungs} - {"untouched"})},
            cv=InDistributionKFold(FOLDS, random_state=seed),
            scoring=make_ood_scorer(["auroc", "accuracy_change"]),
            refit=AccuracyGuard("auroc"),
        )
        seconds, found = timed(search, x, y)
        best = found.best_estimator_
        judged = panel.judged(
            best.score_samples(panel.x_test),
            {name: best.score_samples(rows) for name, rows in panel.ood.items()},
            best.predict_class(panel.x_test),
        )
        chosen = found.best_params_["sparsity_weight"]
        rows.append(
            {**common, "method": "search", "score": "energy", "weight": chosen, **judged}
            | {"seconds": seconds}
        )
    return rows


class Panel:
    """Test rows, and real outliers of several kinds."""

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        testing = draw(len(data.x_test), options.test_rows, seed=0)
        self.x_test, self.y_test = data.x_test[testing], data.y_test[testing]
        new = np.setdiff1d(np.arange(len(data.x_test)), testing)
        self.x_new, self.y_new = data.x_test[new], data.y_test[new]
        sets = data.ood | noise_sets(self.x_test.shape[1:])
        self.ood = {name: x[draw(len(x), options.ood_rows, seed=0)] for name, x in sets.items()}

    def judged(self, score_id: Any, score_ood: dict[str, Any], classes: Any) -> Row:
        """FPR95 in percent: of the six, over kinds and of each kind; and the accuracy."""
        fpr = {name: 100 * fpr_at_tpr(score_id, scores) for name, scores in score_ood.items()}
        kinds = means_by_kind(fpr)
        return {
            "accuracy": 100 * float(np.mean(classes == self.y_test)),
            "six": float(np.mean([fpr[name] for name in of_the_six(fpr)])),
            "kinds": float(np.mean(list(kinds.values()))),
            **{f"kind:{kind}": value for kind, value in kinds.items()},
        }


def walked(
    detector: SparseEnergyOODDetector, x: Any, y: Any, panel: Panel
) -> tuple[float, list[Row]]:
    """Seconds of a fit with "auto", and what each rung and score is worth on the panel."""
    rungs: list[Row] = []
    aside = 0.0

    class Keeping(path.Judge):
        """Judges as it does, and on the panel besides."""

        def __init__(self, run: Fit, evidence: Evidence, data: TrainingData) -> None:
            super().__init__(run, evidence, data)
            self.training = LabelledRows(data.rows, data.labels)

        def __call__(self, network: Network, *trained_by: Any) -> list[dict[str, Any]]:
            nonlocal aside
            records = super().__call__(network, *trained_by)
            begun = time.process_time()
            pieces = Pieces(self.run, network, self.training)
            rungs.extend(on_panel(pieces, records, panel))
            aside += time.process_time() - begun
            return records

    with patch.object(path, "Judge", Keeping):
        seconds, _ = timed(detector, x, y)
    return seconds - aside, rungs


def on_panel(pieces: Pieces, records: list[dict[str, Any]], panel: Panel) -> list[Row]:
    def seen(rows: Rows) -> Seen:
        return seen_of_all(pieces.network, rows)

    of_test = seen(as_rows(panel.x_test))
    of_ood = {name: seen(as_rows(x)) for name, x in panel.ood.items()}
    classes = as_array(of_test.logits.argmax(dim=1))
    rows = []
    for record in records:
        score = get_score(record["score_function"])
        fit_score(score, pieces.training, pieces.head, lambda: pieces.held_out)
        judged = panel.judged(
            as_array(apply_score(score, *of_test)),
            {name: as_array(apply_score(score, *one)) for name, one in of_ood.items()},
            classes,
        )
        weight = record["sparsity_weight"]
        rows.append(
            {
                "weight": "untouched" if weight is None else weight,
                "score": record["score_function"],
                **judged,
                # Of all surrogates, and by kind.
                **{f"judged_{of}": value for of, value in record.items() if of.startswith("auroc")},
                "judged_change": path.accuracy_change(record),
                "judged_worse": record["worse"],
            }
        )
    return rows


def timed(estimator: Any, x: Any, y: Any) -> tuple[float, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of accuracy lost, which the report shows
        start = time.process_time()
        estimator.fit(x, y)
        return time.process_time() - start, estimator


# The report


def report(rows: list[dict[str, str]]) -> list[str]:
    """Markdown: every rung; what is chosen, and its regret; the time."""
    seeds = sorted({row["seed"] for row in rows})
    rungs = [with_groups(row) for row in rows if row["method"] == "rung"]
    kinds = [column for column in rows[0] if column.startswith("kind:")]
    shown = ["accuracy", "six", *GROUPS, "kinds", *kinds]
    lines = [*header("score", "weight", *shown, "AUROC of the judge")]
    for score in SCORES:
        of_score = [row for row in rungs if row["score"] == score]
        for weight in dict.fromkeys(row["weight"] for row in of_score):
            each = [row for row in of_score if row["weight"] == weight]
            auroc = f"{mean(each, 'judged_auroc'):.4f}"
            lines.append(line(score, weight, *means(each, shown), auroc))
    worst = "worst change of a kind"
    summary = ["accuracy", "six", *GROUPS, "kinds"]
    lines += ["", *header("score", "chosen", *summary, "regret, six", "regret, kinds", worst)]
    for score in (*SCORES, "auto"):
        choices = [choice([r for r in rungs if r["seed"] == seed], score) for seed in seeds]
        names = [" ".join(c["chosen"][of] for of in ("weight", "score")) for c in choices]
        regrets = [np.mean([c[name] for c in choices]) for name in ("six", "kinds", "worst")]
        chosen = [c["chosen"] for c in choices]
        lines.append(line(score, ", ".join(names), *means(chosen, summary), *regrets))
    for row in rows:
        if row["method"] == "search":
            of_row = means([with_groups(row)], summary)
            lines.append(line("energy", f"search: {row['weight']}", *of_row, "", "", ""))
    lines += ["", *header("fit", "score", "seconds", "times as long as with a fixed weight")]
    for method, score in dict.fromkeys((row["method"], row["score"]) for row in rows):
        if method != "rung":
            lines.append(line(method, score, *times(rows, method, score)))
    return lines


def with_groups(row: dict[str, str]) -> dict[str, Any]:
    """A row, and its means over the kinds of the panel and over others, if it has such."""
    values = {
        kind: float(value)
        for column, value in row.items()
        if (kind := column.removeprefix("kind:")) != column and value
    }
    of_panel = [value for kind, value in values.items() if kind in KINDS]
    others = [value for kind, value in values.items() if kind not in KINDS]
    of_groups = [np.mean(group) if group else math.nan for group in (of_panel, others)]
    return row | dict(zip(GROUPS, of_groups, strict=True))


def choice(rungs: list[dict[str, str]], score: str) -> dict[str, Any]:
    """What the judge takes of one seed by a score, or of all, and its regret."""
    open_to = [row for row in rungs if score in ("auto", row["score"])]
    records = [record_of(row) for row in open_to]
    best = path.best_of(records)
    chosen = next(row for row, record in zip(open_to, records, strict=True) if record is best)
    untouched = next(
        row for row in rungs if (row["weight"], row["score"]) == ("untouched", chosen["score"])
    )
    allowed = [
        row for row, record in zip(open_to, records, strict=True) if path.is_accurate(record)
    ]
    kinds = [column for column in chosen if column.startswith("kind:")]
    return {
        "chosen": chosen,
        **{
            name: float(chosen[name]) - min(float(row[name]) for row in allowed)
            for name in ("six", "kinds")
        },
        "worst": max(float(chosen[kind]) - float(untouched[kind]) for kind in kinds),
    }


def record_of(row: dict[str, str]) -> dict[str, Any]:
    """What the path of the detector says of a rung and a score."""
    judged = {
        name.removeprefix("judged_"): float(value)
        for name, value in row.items()
        if name.startswith("judged_") and name != "judged_worse"
    }
    return {
        **judged,
        "worse": row.get("judged_worse", ""),  # files of before the rule have none
        "sparsity_weight": None if row["weight"] == "untouched" else float(row["weight"]),
        "score_function": row["score"],
        "accuracy_before": 0.0,
        "accuracy_after": judged["change"],
    }


def seconds_of(rows: list[dict[str, str]], method: str, score: str) -> dict[str, float]:
    """Seconds of a kind of fit, by seed."""
    found = [row for row in rows if (row["method"], row["score"]) == (method, score)]
    return {row["seed"]: float(row["seconds"]) for row in found}


def times(rows: list[dict[str, str]], method: str, score: str) -> tuple[float, float | str]:
    """Medians over seeds: seconds, and their ratio to a plain fit's of the same seed, if timed."""
    taken = seconds_of(rows, method, score)
    plain = seconds_of(rows, "plain", score if score in SCORES else "two_views")
    ratios = [seconds / plain[seed] for seed, seconds in taken.items() if seed in plain]
    return float(np.median(list(taken.values()))), float(np.median(ratios)) if ratios else ""


def mean(rows: list[dict[str, str]], column: str) -> float:
    return float(np.mean([float(row[column]) for row in rows]))


def means(rows: list[dict[str, str]], columns: list[str]) -> list[float]:
    return [mean(rows, column) for column in columns]


if __name__ == "__main__":
    main()
