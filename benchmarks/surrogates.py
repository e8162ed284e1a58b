"""Do outliers made from in-distribution rows rank detectors as real outliers do?

Fine-tunes one classifier at several weights, judges each detector on surrogates of held-out rows
and on real outliers of several kinds, and reports the rank correlation between the two judgements
and the regret of the choice: the FPR95 of the weight that the surrogates choose, less that of the
weight that is best on this kind, both among the weights that lose at most ``--tolerance`` of the
accuracy. README.md describes the files and the columns.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    quietly_fitted,
    read_data,
    read_network,
)
from kinds import means_by_kind, noise_sets
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tables import header, line
from torch import nn

from skood import SparseEnergyOODDetector
from skood.metrics import auroc, fpr_at_tpr
from skood.model_selection import surrogate_outliers
from skood.scores import list_scores

SCENES = ("patches", "blur", "contrast")
SHAPES = ("edges", "strokes", "silhouettes", "shapes", "glyphs")
AUTO = (*SCENES, *SHAPES)
KINDS = (*AUTO, "frequencies", "mixture", "noise", "colours")
MIXTURES = {
    "auto": AUTO,
    " + ".join(SCENES): SCENES,
    " + ".join(SHAPES): SHAPES,
    **{f"auto without {kind}": tuple(k for k in AUTO if k != kind) for kind in AUTO},
    **{kind: (kind,) for kind in KINDS},
}
"""Kinds of surrogates that choose together, as "auto" does."""

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
            for weight in (UNTOUCHED, *options.weights)
        }
        for seed in options.seeds
    }
    print("\n".join(report(judged, options)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add(
        "--weights",
        type=weights,
        nargs="+",
        required=True,
        metavar="WEIGHT[:DISTILLATION_WEIGHT]",
        help="at least 3",
    )
    add("--learning-rate", type=number, default=1e-3, help="default: 0.001")
    add("--score", choices=list_scores(), default="energy", help="default: energy")
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


def weights(text: str) -> str:
    """A sparsity weight, and perhaps that of distillation, such as 0.02 or 0.2:1."""
    values = [number(value) for value in text.split(":")]
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"{text} is not one or two numbers, such as 0.2:1")
    return ":".join(f"{value:g}" for value in values)


def judge(
    module: nn.Module, weight: str, seed: int, options: argparse.Namespace, data: Data
) -> Judged:
    """Scores of a detector on all sets, read from the folder where it has them."""
    name = f"{options.network}_{seed}_{weight.replace(':', '_')}"
    path = options.folder / f"{name}_{options.score}.npz"
    if not path.exists():
        order = draw(len(data.x_train), len(data.x_train), seed)
        training = order[: options.train_rows]
        held_out = order[options.train_rows :][: options.rows]
        detector = make_detector(module, weight, seed, options)
        if weight == UNTOUCHED:
            detector = quietly_fitted(detector, data, training[: options.rows])
        else:
            tuned = options.folder / f"{name}.pt"
            if not tuned.exists():
                detector = quietly_fitted(detector, data, training)
                torch.save({"state": detector.module_.state_dict()}, tuned)
            copied = copy.deepcopy(module)
            copied.load_state_dict(torch.load(tuned, weights_only=False)["state"])
            detector = make_detector(copied, UNTOUCHED, seed, options)
            detector = quietly_fitted(detector, data, training[: options.rows])
        np.savez(path, **scores_of(detector, data, held_out, options))
        print(path.name, file=sys.stderr, flush=True)
    with np.load(path) as arrays:
        return dict(arrays)


def make_detector(
    module: nn.Module, weight: str, seed: int, options: argparse.Namespace
) -> SparseEnergyOODDetector:
    sparsity, _, distillation = ("0" if weight == UNTOUCHED else weight).partition(":")
    return SparseEnergyOODDetector(
        module,
        sparsity_weight=float(sparsity),
        penalty="l1",
        distillation_weight=float(distillation or 0),
        learning_rate=options.learning_rate,
        score_function=options.score,
        max_epochs=0 if weight == UNTOUCHED else options.epochs,
        calibration_size=0.01,  # the threshold plays no part
        preprocess=NORMALISATIONS[options.normalise],
        augment="flip",
        random_state=seed,
    )


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
    for name, x in (data.ood | noise_sets(data.x_test.shape[1:])).items():
        judged[f"real {name}"] = detector.score_samples(x[: options.ood_rows])
    x, y = (part[: options.surrogate_rows] for part in rows["held-out"])
    for kind in KINDS:
        outliers = surrogate_outliers(x, y, kind=kind, random_state=0)
        judged[f"surrogate {kind}"] = detector.score_samples(outliers)
    return judged


# Judging the judgement


class Judgement(NamedTuple):
    """What is known of one detector, shares in percent."""

    accuracy: float
    held_out: float
    """Accuracy on the held-out rows."""

    real: dict[str, float]
    """FPR95 by kind of real outliers, a mean over the sets of a kind."""

    surrogate: dict[str, float]
    """AUROC by kind of surrogates."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.real.values())))

    def by(self, mixture: str) -> float:
        """AUROC against several kinds of surrogates, in equal shares."""
        return float(np.mean([self.surrogate[kind] for kind in MIXTURES[mixture]]))


def judgement(judged: Judged) -> Judgement:
    real = {
        name.removeprefix("real "): 100 * fpr_at_tpr(judged["test"], scores)
        for name, scores in judged.items()
        if name.startswith("real ")
    }
    surrogate = {
        name.removeprefix("surrogate "): 100 * auroc(judged["held-out"], scores)
        for name, scores in judged.items()
        if name.startswith("surrogate ")
    }
    return Judgement(
        100 * judged["right test"].mean(),
        100 * judged["right held-out"].mean(),
        means_by_kind(real),
        surrogate,
    )


def accurate(by_weight: dict[str, Judgement], tolerance: float) -> list[str]:
    """Weights that lose little accuracy on held-out rows, by the rule of `AccuracyGuard`."""
    accuracy = {weight: judged.held_out for weight, judged in by_weight.items()}
    least = accuracy.pop(UNTOUCHED) - 100 * tolerance
    enough = [weight for weight in accuracy if accuracy[weight] >= least - 1e-7]
    return enough or [max(accuracy, key=accuracy.__getitem__)]


def correlation(by_weight: dict[str, Judgement], mixture: str) -> float:
    """Of the judgement by surrogates and of that by real outliers, over the fine-tuned networks."""
    tuned = [judged for weight, judged in by_weight.items() if weight != UNTOUCHED]
    return float(spearmanr([each.by(mixture) for each in tuned], [-each.mean for each in tuned])[0])


def choose(by_weight: dict[str, Judgement], mixture: str, allowed: list[str]) -> str:
    return max(allowed, key=lambda weight: by_weight[weight].by(mixture))


def regret(by_weight: dict[str, Judgement], chosen: str, allowed: list[str]) -> NDArray[Any]:
    """Of a choice: on each kind, and on the mean over kinds."""
    found = np.array([[*by_weight[w].real.values(), by_weight[w].mean] for w in allowed])
    return found[allowed.index(chosen)] - found.min(axis=0)


def resampled(by_weight: dict[str, Judged], random: np.random.Generator) -> dict[str, Judgement]:
    """The same images drawn with replacement for all weights, so that their noise is shared."""
    picks = {
        name: random.integers(len(scores), size=len(scores))
        for name, scores in by_weight[UNTOUCHED].items()
    }
    for name in ("held-out", "test"):
        picks[f"right {name}"] = picks[name]
    return {
        weight: judgement({name: scores[picks[name]] for name, scores in judged.items()})
        for weight, judged in by_weight.items()
    }


def report(judged: dict[int, dict[str, Judged]], options: argparse.Namespace) -> Iterator[str]:
    """Markdown: each weight, then each mixture of surrogates."""
    found = {
        seed: {weight: judgement(each) for weight, each in by_weight.items()}
        for seed, by_weight in judged.items()
    }
    kinds = list(found[options.seeds[0]][UNTOUCHED].real)
    yield (
        f"{options.network} by {options.score}, mean over the seeds {options.seeds}, percent; "
        "FPR95 by kind of outliers."
    )
    yield ""
    yield from header(
        "weight", "accuracy", "held-out", *kinds, "mean of kinds", "AUROC, surrogates"
    )
    for weight in (UNTOUCHED, *options.weights):
        each = [found[seed][weight] for seed in options.seeds]
        values = [(e.accuracy, e.held_out, *e.real.values(), e.mean, e.by("auto")) for e in each]
        yield line(weight, *np.mean(values, axis=0))
    yield ""
    yield "Rank correlation with the mean of kinds, and regret of the choice:"
    yield ""
    columns = ("correlation", "95 % interval", *kinds, "mean of kinds", "95 % interval")
    yield from header("chosen by", "chosen", *columns)
    allowed = {seed: accurate(found[seed], options.tolerance) for seed in options.seeds}
    for name, find in BESTS.items():
        chosen = {seed: find(found[seed], allowed[seed]) for seed in options.seeds}
        yield line(
            name, ", ".join(chosen.values()), "", "", *mean_regret(found, chosen, allowed), ""
        )
    random = np.random.default_rng(0)
    samples = [
        {seed: resampled(judged[seed], random) for seed in options.seeds}
        for _ in range(RESAMPLINGS)
    ]
    for mixture in MIXTURES:
        values, choices = [], []
        for sample in (found, *samples):
            chosen = {seed: choose(sample[seed], mixture, allowed[seed]) for seed in options.seeds}
            correlations = [correlation(sample[seed], mixture) for seed in options.seeds]
            values.append([np.mean(correlations), *mean_regret(sample, chosen, allowed)])
            choices.append(", ".join(chosen.values()))
        low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
        yield line(
            mixture,
            choices[0],
            f"{values[0][0]:.2f}",
            f"{low[0]:.2f} to {high[0]:.2f}",
            *values[0][1:],
            f"{low[-1]:.1f} to {high[-1]:.1f}",
        )


def best_mean(by_weight: dict[str, Judgement], allowed: list[str]) -> str:
    return min(allowed, key=lambda weight: by_weight[weight].mean)


def least_worst(by_weight: dict[str, Judgement], allowed: list[str]) -> str:
    return min(allowed, key=lambda weight: regret(by_weight, weight, allowed)[:-1].max())


BESTS = {"best mean": best_mean, "least worst": least_worst}
"""The best that any choice can do, which takes real outliers to know."""


def mean_regret(
    found: dict[int, dict[str, Judgement]], chosen: dict[int, str], allowed: dict[int, list[str]]
) -> NDArray[Any]:
    return np.mean([regret(found[seed], chosen[seed], allowed[seed]) for seed in chosen], axis=0)


if __name__ == "__main__":
    main()
