"""The page of results, written from the files in benchmarks/results: new ones need no line here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from tables import CONTROL, MAIN_SCORE, UNTOUCHED, Results, Table, read_results  # noqa: E402

INTRODUCTION = """\
What the detectors do on real images. ``benchmarks/paper.py`` makes every figure here, by the
command that stands above it, from images and checkpoints that you bring; ``benchmarks/README.md``
says which. Three kinds of network stand in each table: the classifier **untouched**; the
**control**, fine-tuned at sparsity weight 0, as fine-tuning alone moves the numbers a long way; and
the sparse detectors, named by penalty and weight. **sroe** is sparse and trained with auxiliary
outliers. Only the difference to the control is the penalty's doing, and accuracy is what pays for
it."""

FINDINGS = """\
What the tables say of the claim:

- The published reduction, 15 points against the untouched classifier, mixes two things. Fine-tuning
  without the penalty gives a large part of it. The published weight, 0.02, adds one or two points
  to that on the ResNets, with schedules as short as these; larger weights add more, until they cost
  accuracy.
- Distillation (``distillation_weight``, the third part of a name) holds the accuracy, so that ten
  times the weight can be afforded, which without it costs ResNet-20 three points of accuracy. On
  the three networks for CIFAR-10 that is more than the published reduction against the untouched
  classifier, and more than ten points below the control, at about its accuracy, which is a point or
  less below that of the untouched classifier. (WideResNet-40-2: one seed, few rows, and a learning
  rate of 3e-3 to make up for few steps, its control included.) The setting was chosen by
  outliers made from in-distribution rows (the column "AUROC, surrogates" shows what such a choice
  sees), among some twenty variants on ResNet-20, with these six sets in view: the other networks
  test the choice, the sets do not.
- On CIFAR-100, with a small WideResNet and one seed, fine-tuning gains some five points and neither
  penalty nor distillation more than one beyond it.
- The score matters as much. On ResNet-20 the distances of "knn" do more for the untouched
  classifier than fine-tuning does for the energy, on SVHN and textures above all. Gains do not add
  up: on the sparse network "react" and "odin" gain with the energy, while "knn" gains nothing and
  "mahalanobis" and "vim" lose.
- Features of in-distribution rows get smaller, and sparser by degrees (mean L1 norm, Hoyer index).
  The energies of both kinds of rows come nearer to zero, and overlap less.
- Auxiliary outliers (sroe) cost several points of accuracy on schedules as short as these, probably
  as batch-norm comes to see two kinds of rows."""

PUBLISHED = """\
Published for WideResNet-40-2, with LSUN-C, LSUN-R and iSUN among the six sets, and without a
control: CIFAR-10 31.3 (untouched) to 16.3, CIFAR-100 71.3 to 55.8, accuracy within 0.1 point. The
networks here are others, and so are three of the sets."""

NOTHING = "There are no results in ``benchmarks/results`` yet."


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
    if len(results.scores) > 1:
        yield from (results.by_score(metric).rst() for metric in ("fpr95", "auroc"))
    yield results.sweep().rst()
    yield results.note_of_differences()
    yield results.differences().rst()
    yield results.realised().rst()


def summary(all_results: dict[str, Results]) -> Table:
    """Each detector of each run by the energy, beside the untouched classifier and the control.

    Means are over all sets; those that outliers from the source of a set spoil are in parentheses.
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
            lines.append(texts)
    less = ["less untouched", "less control"]
    return Table(
        f"All detectors by {MAIN_SCORE}: means over sets and seeds, percent and points",
        ["run", "detector", "FPR95, mean", *less, "ID accuracy", *less],
        lines,
        n_names=2,
    )


def image(path: str, description: str) -> str:
    return f".. image:: {path}\n   :alt: {description}"


def write(folder: Path, source: Path = BENCHMARKS / "results") -> None:
    """Write the page and its figures into a folder."""
    folder.mkdir(exist_ok=True)
    title = "Results on real images"
    parts = [f"{title}\n{'=' * len(title)}", INTRODUCTION]
    all_results = {
        path.stem: Results(
            read_results(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        )
        for path in sorted(source.glob("*.csv"))
    }
    if all_results:
        parts += [FINDINGS, summary(all_results).rst(), PUBLISHED]
    for name, results in all_results.items():
        parts += section(name, results, folder)
    parts += [] if all_results else [NOTHING]
    (folder / "index.rst").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
