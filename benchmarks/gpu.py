"""All that waits for a GPU, in one command: the most important first, within a time limit.

The tests that need a GPU; the paper's network, trained by its recipe on both CIFARs; the paper's
table on it and on the published DenseNets, the energy first; the speed. Each step is another
script, which resumes where it was interrupted. README.md describes what it leaves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from environment import command_line
from images import number, read_id
from kinds import KINDS, SIX

HERE = Path(__file__).resolve().parent

PUBLISHED = "densenet100_12"
"""The network whose checkpoints are given."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    id_sets: tuple[str, ...]
    network: str
    """To be trained first."""

    pretraining: tuple[str, ...]
    table: tuple[str, ...]
    detectors: tuple[str, ...]
    seeds: tuple[str, ...]
    scores: tuple[str, ...]
    """Beside the energy; none stands for all."""

    speed: tuple[str, ...]


FULL = Size(
    id_sets=("cifar100", "cifar10"),
    network="wrn40_2_dropout0.3",
    pretraining=(),
    table=(),
    detectors=("l1:0.02", "l1:0.05", "l1:0.1", "relative_l1:0.3"),
    seeds=("0", "1", "2"),
    scores=(),
    speed=(
        *("--only", "device", "--device", "cuda"),
        *("--train-rows", "49920", "--repeats", "3"),
    ),
)
TOY = Size(
    id_sets=("cifar10",),
    network="wrn10_1_dropout0.3",
    pretraining=("--epochs", "1"),
    table=("--epochs", "1", "--ood-rows", "5"),
    detectors=("l1:0.02",),
    seeds=("0",),
    scores=("--scores", "msp"),
    speed=("--only", "one-row", "--repeats", "1"),
)
TOY_ROWS = {"train": 60, "test": 40}


@dataclass(frozen=True)
class Step:
    """One script, what it needs, and what of its files is a result, under which name."""

    name: str
    script: str
    arguments: tuple[str, ...]
    needs: tuple[Path, ...] = ()
    results: tuple[tuple[Path, str], ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, *self.script.split(), *self.arguments]


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is not done yet, until the time is up."""
    options = parse(argv)
    deadline = time.monotonic() + 60 * options.minutes
    size, data = (TOY, options.folder / "data") if options.toy else (FULL, options.data)
    for folder in (options.folder / "results", options.folder / "done", data):
        folder.mkdir(parents=True, exist_ok=True)
    if options.toy:
        make_small(options.data, data, size.id_sets)
    left, failed = [], []
    for step in steps(size, data, options):
        mark = options.folder / "done" / step.name
        if mark.exists() and mark.read_text() == "\n".join(step.command):
            continue
        if missing := [path.name for path in step.needs if not path.exists()]:
            left.append(f"{step.name} (needs {', '.join(missing)})")
            continue
        seconds = deadline - time.monotonic()
        status = run(step, options.folder / "results", seconds) if seconds > 0 else None
        if status == 0:
            mark.write_text("\n".join(step.command))
        elif status is None:
            left.append(step.name)
        else:
            failed.append(f"{step.name} (status {status}, see results/{step.name}.log)")
    for what, names in (("failed", failed), ("left", left)):
        for name in names:
            print(f"{what}: {name}")
    if left:
        print("The same command goes on from here.")
    if failed:
        sys.exit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the image sets, one NAME.npz each")
    add("--checkpoints", type=Path, required=True, help=f"folder of ID_{PUBLISHED}.pt")
    add("--folder", type=Path, required=True, help="where everything goes, and is found again")
    add("--minutes", type=number, default=20.0, help="after which it ends (default: 20)")
    add("--toy", action="store_true", help="little of everything, to try it on a CPU")
    options = parser.parse_args(argv)
    for name in ("data", "checkpoints", "folder"):
        setattr(options, name, getattr(options, name).resolve())
    if not (options.toy or torch.cuda.is_available()):
        parser.error("torch finds no GPU; --toy does little of everything on a CPU")
    return options


# The list


def steps(size: Size, data: Path, options: argparse.Namespace) -> Iterator[Step]:
    """All steps, the most important first; what is there decides what each is given."""
    trained = options.folder / "checkpoints"
    yield Step("test_cuda", "-m pytest tests/engine/test_cuda.py", ("-q", "-rs"))
    for id_name in size.id_sets:
        made = trained / f"{id_name}_{size.network}_seed0.pt"
        arguments = ("--network", size.network, "--folder", str(trained), *size.pretraining)
        yield Step(
            f"pretrain_{id_name}",
            "benchmarks/pretrain.py",
            ("--id", str(data / f"{id_name}.npz"), *arguments),
            needs=(data / f"{id_name}.npz",),
            results=tuple((path, path.name) for path in (made, made.with_suffix(".json"))),
        )
    networks = [
        (id_name, network, folder / f"{id_name}_{network}{suffix}.pt")
        for network, folder, suffix in (
            (size.network, trained, "_seed0"),
            (PUBLISHED, options.checkpoints, ""),
        )
        for id_name in size.id_sets
    ]
    # One seed of all says more than all seeds of one.
    for seeds in dict.fromkeys((size.seeds[:1], size.seeds)):
        for network in networks:
            yield table(
                size,
                data,
                options,
                *network,
                seeds,
                ("--scores", "energy", "two_views", "three_views"),
                "",
            )
    for network in networks:
        yield table(size, data, options, *network, size.seeds, size.scores, "_scores")
    out = options.folder / "results" / "speed.json"
    yield Step("speed", "benchmarks/speed.py", (*size.speed, "--out", str(out)))


def table(
    size: Size,
    data: Path,
    options: argparse.Namespace,
    id_name: str,
    network: str,
    checkpoint: Path,
    seeds: tuple[str, ...],
    scores: tuple[str, ...],
    suffix: str,
) -> Step:
    """The paper's table on one network, against those sets of the panel that are there."""
    source, name = data / f"{id_name}.npz", f"{id_name}_{network}"
    folder = options.folder / "tables" / name
    arguments = [
        *("--id", str(source), "--ood", *map(str, panel(options.data, id_name))),
        *("--network", network, "--checkpoint", str(checkpoint)),
        *("--detectors", *size.detectors, *scores, "--seeds", *seeds),
        *(*size.table, "--folder", str(folder)),
    ]
    endings = {"results.csv": "csv", "run.json": "json", "table.md": "md"}
    return Step(
        f"{name}{suffix}_seeds{'_'.join(seeds)}",
        "benchmarks/paper.py",
        tuple(arguments),
        needs=(source, checkpoint),
        results=tuple((folder / of, f"{name}{suffix}.{end}") for of, end in endings.items()),
    )


def panel(data: Path, id_name: str) -> list[Path]:
    """Files of the sets that are there, the paper's first."""
    others = (name for members in KINDS.values() for name in members)
    names = [name for name in dict.fromkeys((*SIX, *others)) if name != id_name]
    return [path for name in names if (path := data / f"{name}.npz").exists()]


def make_small(source: Path, folder: Path, names: Sequence[str]) -> None:
    """ID sets of few rows, evenly spaced, so that each class is there."""
    for path in (source / f"{name}.npz" for name in names):
        if path.exists() and not (folder / path.name).exists():
            arrays = read_id(path)
            for part, n_rows in TOY_ROWS.items():
                labels = arrays[f"y_{part}"]
                rows = np.argsort(labels, kind="stable")[:: max(1, len(labels) // n_rows)]
                arrays |= {name: arrays[name][rows] for name in (f"x_{part}", f"y_{part}")}
            np.savez(folder / path.name, **arrays)


# One step


def run(step: Step, folder: Path, seconds: float) -> int | None:
    """The exit status of a step, or None if the time was up; its results are kept either way."""
    print(f"{step.name} ...", flush=True)
    start, began = time.time(), time.monotonic()
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with (folder / f"{step.name}.log").open("w") as log:
        log.write(command_line(step.script, step.arguments) + "\n\n")
        log.flush()
        process = subprocess.Popen(
            step.command,
            cwd=HERE.parent,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    for path, name in step.results:
        if path.exists() and path.stat().st_mtime >= start:
            shutil.copyfile(path, folder / name)
    print(f"{step.name}: {ending(status)}, {time.monotonic() - began:.0f} s", flush=True)
    return status


def ending(status: int | None) -> str:
    return {None: "the time was up", 0: "done"}.get(status, f"failed with status {status}")


if __name__ == "__main__":
    main()
