"""Do outliers made from in-distribution rows rank detectors as real outliers do?

Fine-tunes one classifier at several sparsity weights, judges each detector on surrogates of
held-out rows and on real outliers, and reports the rank correlation between the two judgements and
the regret of the choice: the mean FPR95 of the weight that the surrogates choose, less that of the
best weight, both among the weights that lose at most ``--tolerance`` of the accuracy. README.md
describes the files and the columns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import (
    NORMALISATIONS,
    Data,
    add_data_options,
    check_available,
    complete,
    count,
    draw,
    number,
    read_data,
    read_network,
)
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from skood import SparseEnergyOODDetector
from skood.metrics import auroc, fpr_at_tpr
from skood.model_selection import surrogate_outliers

KINDS = ("auto", "patches", "blur", "contrast", "frequencies", "mixture", "noise", "colours")
RESAMPLINGS = 200
UNTOUCHED = "untouched"

Judged = dict[str, NDArray[Any]]
"""Scores of one detector by set of rows, and whether its classes are right."""


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, judge, and report; what is done already is read from the folder."""
    options = parse(argv)
    try:
        data = read_data(options.id, options.ood)
        check_available("--train-rows", options.train_rows, len(data.x_train), options.id)
        module = read_network(options, data.n_classes)
    except ValueError as error:
        sys.exit(f"error: {error}")
    options.folder.mkdir(parents=True, exist_ok=True)
    judged = {
        seed: {
            weight: judge(module, weight, seed, options, data)
            for weight in (UNTOUCHED, *sorted(options.weights))
        }
        for seed in options.seeds
    }
    print("\n".join(report(judged, options)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--weights", type=number, nargs="+", required=True, help="at least 3")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    add("--epochs", type=count, default=3, help="of fine-tuning (default: 3)")
    add("--train-rows", type=count, default=20_000, help="drawn by each seed (default: 20000)")
    add("--rows", type=count, default=2000, help="held-out and test rows (default: 2000)")
    add("--ood-rows", type=count, default=1000, help="of each set (default: 1000)")
    add("--surrogate-rows", type=count, default=600, help="of each kind (default: 600)")
    add("--tolerance", type=number, default=0.01, help="of accuracy (default: 0.01)")
    add("--folder", type=Path, required=True, help="for networks and scores, to go on from")
    options = parser.parse_args(argv)
    complete(options)
    return options


def judge(
    module: nn.Module, weight: float | str, seed: int, options: argparse.Namespace, data: Data
) -> Judged:
    """Scores of a detector on all sets, read from the folder where it has them."""
    name = f"{options.network}_{seed}_{weight}"
    path = options.folder / f"{name}.npz"
    if not path.exists():
        order = draw(len(data.x_train), len(data.x_train), seed)
        training = order[: options.train_rows]
        held_out = order[options.train_rows :][: options.rows]
        detector = make_detector(module, weight, seed, options)
        if weight == UNTOUCHED:
            detector = fitted(detector, data, held_out)
        else:
            tuned = options.folder / f"{name}.pt"
            if not tuned.exists():
                detector = fitted(detector, data, training)
                torch.save({"state": detector.module_.state_dict()}, tuned)
            copied = copy.deepcopy(module)
            copied.load_state_dict(torch.load(tuned, weights_only=False)["state"])
            detector = fitted(make_detector(copied, UNTOUCHED, seed, options), data, held_out)
        np.savez(path, **scores_of(detector, data, held_out, options))
        print(path.name, file=sys.stderr, flush=True)
    with np.load(path) as arrays:
        return dict(arrays)


def make_detector(
    module: nn.Module, weight: float | str, seed: int, options: argparse.Namespace
) -> SparseEnergyOODDetector:
    return SparseEnergyOODDetector(
        module,
        sparsity_weight=0 if weight == UNTOUCHED else weight,
        max_epochs=0 if weight == UNTOUCHED else options.epochs,
        calibration_size=0.01,  # the threshold plays no part
        preprocess=NORMALISATIONS[options.normalise],
        augment="flip",
        random_state=seed,
    )


def fitted(
    detector: SparseEnergyOODDetector, data: Data, rows: NDArray[np.intp]
) -> SparseEnergyOODDetector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of accuracy lost, which the report shows
        return detector.fit(data.x_train[rows], data.y_train[rows])


def scores_of(
    detector: SparseEnergyOODDetector,
    data: Data,
    held_out: NDArray[np.intp],
    options: argparse.Namespace,
) -> Judged:
    testing = draw(len(data.x_test), options.rows, seed=0)
    rows = {
        "held-out": (data.x_train[held_out], data.y_train[held_out]),
        "test": (data.x_test[testing], data.y_test[testing]),
    }
    judged = {name: detector.score_samples(x) for name, (x, _) in rows.items()}
    for name, (x, y) in rows.items():
        judged[f"right {name}"] = detector.predict_class(x) == y
    for name, x in data.ood.items():
        judged[f"real {name}"] = detector.score_samples(x[: options.ood_rows])
    x, y = (part[: options.surrogate_rows] for part in rows["held-out"])
    for kind in KINDS:
        outliers = surrogate_outliers(x, y, kind=kind, random_state=0)
        judged[f"surrogate {kind}"] = detector.score_samples(outliers)
    return judged


# Judging the judgement


def mean_fpr95(judged: Judged) -> float:
    sets = [scores for name, scores in judged.items() if name.startswith("real ")]
    return 100 * float(np.mean([fpr_at_tpr(judged["test"], scores) for scores in sets]))


def criterion(judged: Judged, kind: str) -> float:
    return auroc(judged["held-out"], judged[f"surrogate {kind}"])


def accurate(by_weight: dict[Any, Judged], tolerance: float) -> list[float]:
    """Weights that lose little accuracy on held-out rows, by the rule of `AccuracyGuard`."""
    least = by_weight[UNTOUCHED]["right held-out"].mean() - tolerance
    weights = [weight for weight in by_weight if weight != UNTOUCHED]
    return [w for w in weights if by_weight[w]["right held-out"].mean() >= least - 1e-9]


def correlation_and_regret(
    by_weight: dict[Any, Judged], kind: str, allowed: list[float]
) -> tuple[float, float]:
    weights = [weight for weight in by_weight if weight != UNTOUCHED]
    real = {weight: mean_fpr95(by_weight[weight]) for weight in weights}
    surrogate = {weight: criterion(by_weight[weight], kind) for weight in weights}
    correlation = spearmanr([surrogate[w] for w in weights], [-real[w] for w in weights])[0]
    chosen = max(allowed, key=surrogate.__getitem__)
    return float(correlation), real[chosen] - min(real[w] for w in allowed)


def resampled(by_weight: dict[Any, Judged], random: np.random.Generator) -> dict[Any, Judged]:
    """The same images drawn with replacement for all weights, so that their noise is shared."""
    picks = {
        name: random.integers(len(scores), size=len(scores))
        for name, scores in by_weight[UNTOUCHED].items()
    }
    for name in ("held-out", "test"):
        picks[f"right {name}"] = picks[name]
    return {
        weight: {name: scores[picks[name]] for name, scores in judged.items()}
        for weight, judged in by_weight.items()
    }


def report(judged: dict[int, dict[Any, Judged]], options: argparse.Namespace) -> Iterator[str]:
    """Markdown: each weight, then each kind of surrogate."""
    weights = [UNTOUCHED, *sorted(options.weights)]
    yield f"{options.network}, mean over the seeds {options.seeds}, percent."
    yield ""
    yield "| weight | ID accuracy, test | ID accuracy, held-out | mean FPR95 | AUROC, surrogates |"
    yield "|---|---|---|---|---|"
    for weight in weights:
        runs = [judged[seed][weight] for seed in options.seeds]
        values = (
            [100 * run["right test"].mean() for run in runs],
            [100 * run["right held-out"].mean() for run in runs],
            [mean_fpr95(run) for run in runs],
            [100 * criterion(run, "auto") for run in runs],
        )
        yield f"| {weight} | " + " | ".join(f"{np.mean(v):.1f}" for v in values) + " |"
    yield ""
    yield "| surrogates | rank correlation | 95 % interval | regret | 95 % interval |"
    yield "|---|---|---|---|---|"
    allowed = {seed: accurate(judged[seed], options.tolerance) for seed in options.seeds}
    random = np.random.default_rng(0)
    samples = [
        {seed: resampled(judged[seed], random) for seed in options.seeds}
        for _ in range(RESAMPLINGS)
    ]
    for kind in KINDS:
        found = np.array(
            [
                np.mean(
                    [
                        correlation_and_regret(sample[seed], kind, allowed[seed])
                        for seed in options.seeds
                    ],
                    axis=0,
                )
                for sample in (judged, *samples)
            ]
        )
        low, high = np.quantile(found[1:], [0.025, 0.975], axis=0)
        yield (
            f"| {kind} | {found[0, 0]:.2f} | {low[0]:.2f} to {high[0]:.2f} "
            f"| {found[0, 1]:.1f} | {low[1]:.1f} to {high[1]:.1f} |"
        )


if __name__ == "__main__":
    main()
