"""What sparsity adds on real images: the untouched classifier, the control, the sparse detector.

Fine-tuning alone, at sparsity weight 0, already moves the numbers a long way, so it stands in the
table as the control. The table goes to stdout in Markdown, progress to stderr. README.md describes
the files and the columns.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import pickle
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import machine, versions
from numpy.typing import NDArray
from torch import nn

import skood
from skood import SparseEnergyOODDetector
from skood.metrics import detection_report
from skood.networks import CifarResNet, NormalizeImages, WideResNet
from skood.penalties import PENALTIES

STAND_INS = {"tinyimagenet_crop": "LSUN-C", "tinyimagenet_resize": "LSUN-R", "intel_scenes": "iSUN"}
"""OOD sets that take the place of those in the paper."""

SETTINGS = (
    "id",
    "data",
    "network",
    "checkpoint",
    "normalise",
    "skood",
    "train_rows",
    "test_rows",
    "method",
    "penalty",
    "weight",
    "epochs",
    "seed",
)
"""Columns that tell one result from another; "data" digests all files."""

Row = dict[str, Any]


NORMALISATIONS = {
    "imagenet": NormalizeImages((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": NormalizeImages(
        (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
    ),
}


@dataclass(frozen=True)
class Data:
    """One ID set, OOD sets by name, and a digest of all files, the checkpoint's included."""

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    ood: dict[str, NDArray[np.uint8]]
    digest: str


@dataclass(frozen=True)
class Method:
    """A row of the table; without a weight, the penalty has no name and no effect."""

    method: str
    penalty: str
    weight: float
    epochs: int


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, then compare."""
    options = parse(argv)
    try:
        data = read_data(options)
        module = read_network(options, int(data.y_train.max()) + 1)
        done = read_results(options.csv, columns(data)) if options.csv else []
        detector = trial(module, options, data)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(header(options, data, detector), flush=True)
    print(table(list(compare(module, options, data, done)), data))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--penalty", choices=sorted(PENALTIES), default="l1", help="default: l1")
    add("--weights", type=number, nargs="+", default=[0.02], help="default: 0.02")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--epochs", type=count, default=10, help="of fine-tuning (default: 10)")
    add("--train-rows", type=count, help="drawn anew by each seed (default: all)")
    add("--test-rows", type=count, help="the same for all seeds (default: all)")
    add("--csv", type=Path, help="append results here as they come, and skip those that it holds")
    options = parser.parse_args(argv)
    complete(options)
    return options


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The files, and how the network takes their images."""
    add = parser.add_argument
    add("--id", type=Path, required=True, metavar="FILE.npz", help="x_train, y_train, x_test ...")
    add("--ood", type=Path, required=True, nargs="+", metavar="FILE.npz", help="x, one set a file")
    add("--network", required=True, help="resnet20, resnet56, wrn40_2, ...")
    add("--checkpoint", type=Path, required=True, metavar="FILE.pt", help="its state_dict")
    add(
        "--normalise",
        choices=sorted(NORMALISATIONS),
        help="mean and std that the network was trained with "
        "(default: imagenet for a resnet, cifar for a wrn)",
    )


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the network."""
    if options.normalise is None:
        options.normalise = "imagenet" if options.network.startswith("resnet") else "cifar"


def number(text: str) -> float:
    """A number that is at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def count(text: str) -> int:
    """A number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


# Reading and checking


def read_data(options: argparse.Namespace) -> Data:
    arrays = read_id(options)
    ood = read_ood(options, arrays)
    digest = hashlib.sha256(existing(options.checkpoint).read_bytes())
    for array in (*arrays.values(), *ood.values()):
        digest.update(array.tobytes())
    return Data(**arrays, ood=ood, digest=digest.hexdigest()[:12])


def read_id(options: argparse.Namespace) -> dict[str, NDArray[Any]]:
    arrays = read_arrays(options.id, ["x_train", "y_train", "x_test", "y_test"])
    x_train, y_train, x_test, y_test = arrays.values()
    check_images(x_train, f"{options.id}: x_train")
    check_images(x_test, f"{options.id}: x_test", x_train.shape[1:])
    check_labels(y_train, len(x_train), f"{options.id}: y_train")
    check_labels(y_test, len(x_test), f"{options.id}: y_test")
    if y_test.max() > y_train.max():
        raise ValueError(
            f"{options.id}: y_test goes up to class {y_test.max()}, y_train to {y_train.max()}; "
            "expected the same classes."
        )
    for option, wanted, available in (
        ("--train-rows", options.train_rows, len(x_train)),
        ("--test-rows", options.test_rows, len(x_test)),
    ):
        if wanted is not None and wanted > available:
            raise ValueError(f"{option} {wanted} exceeds the {available} rows of {options.id}.")
    return arrays


def read_ood(
    options: argparse.Namespace, arrays: dict[str, NDArray[Any]]
) -> dict[str, NDArray[np.uint8]]:
    names = [path.stem for path in options.ood]
    if len(set(names)) < len(names) or "mean" in names:
        raise ValueError(
            f"the OOD sets are named {', '.join(names)} after their files; give them names that "
            'differ, none of them "mean".'
        )
    known = image_hashes(arrays["x_train"]) | image_hashes(arrays["x_test"])
    ood = {}
    for name, path in zip(names, options.ood, strict=True):
        ood[name] = read_arrays(path, ["x"])["x"]
        check_images(ood[name], f"{path}: x", arrays["x_train"].shape[1:])
        images = image_hashes(ood[name])
        if len(images & known) > len(images) / 2:
            raise ValueError(
                f"{path}: {len(images & known) / len(images):.0%} of its images are also in "
                f"{options.id}, so they are in-distribution. Give another set."
            )
    return ood


def existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    return path


def read_arrays(path: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(existing(path)):
        raise ValueError(f"{path}: not an .npz file; write it with numpy.savez.")
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays.files]
        if missing:
            raise ValueError(
                f"{path}: lacks {', '.join(missing)}; expected the arrays {', '.join(names)}, got "
                f"{', '.join(arrays.files)}."
            )
        try:
            return {name: arrays[name] for name in names}
        except ValueError as error:  # pickled objects
            raise ValueError(f"{path}: {error}") from error


def check_images(x: NDArray[Any], name: str, shape: tuple[int, ...] | None = None) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or len(x) == 0:
        raise ValueError(
            f"{name} has shape {x.shape} and dtype {x.dtype}; expected RGB images (n, h, w, 3) "
            "of uint8."
        )
    if shape is not None and x.shape[1:] != shape:
        raise ValueError(
            f"{name} has images of {x.shape[1:]}, but x_train of {shape}; resize them to that."
        )


def check_labels(y: NDArray[Any], n_rows: int, name: str) -> None:
    if y.shape != (n_rows,) or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(
            f"{name} has shape {y.shape} and dtype {y.dtype}; expected one class a row, ({n_rows},)"
            ", of integers from 0 on."
        )


def image_hashes(x: NDArray[np.uint8]) -> set[int]:
    return {hash(image.tobytes()) for image in x}


def read_network(options: argparse.Namespace, n_classes: int) -> nn.Module:
    if match := re.fullmatch(r"resnet(\d+)", options.network):
        module: nn.Module = CifarResNet(int(match[1]), n_classes=n_classes)
    elif match := re.fullmatch(r"wrn(\d+)_(\d+)", options.network):
        # Dropout belongs to how a network was trained, and these checkpoints had none.
        module = WideResNet(int(match[1]), int(match[2]), dropout=0, n_classes=n_classes)
    else:
        raise ValueError(
            f"--network {options.network} is unknown; expected resnet<depth> or "
            "wrn<depth>_<width>, such as resnet20 or wrn40_2."
        )
    try:
        module.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{options.checkpoint} does not fit {options.network} with {n_classes} classes; "
            f"expected its plain state_dict. {shortened(str(error))}"
        ) from error
    return module


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def read_results(path: Path, names: list[str]) -> list[Row]:
    """Rows that an earlier run left; creates the file, so that a bad path shows at once."""
    try:
        if not path.exists():
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(names)
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise ValueError(
                    f"{path} has other columns, from other OOD sets or another version; expected "
                    f"{', '.join(names)}. Give another --csv."
                )
            return list(reader)
    except OSError as error:
        raise ValueError(f"--csv {path} cannot be written: {error}") from error


# Measuring


def methods(options: argparse.Namespace) -> list[Method]:
    return [
        Method("untouched", "", 0.0, 0),
        Method("control, weight 0", "", 0.0, options.epochs),
        *(
            Method(f"{options.penalty}, weight {w:g}", options.penalty, w, options.epochs)
            for w in sorted({*options.weights} - {0.0})
        ),
    ]


def make_detector(
    module: nn.Module, options: argparse.Namespace, method: Method, seed: int
) -> SparseEnergyOODDetector:
    return SparseEnergyOODDetector(
        module,
        sparsity_weight=method.weight,
        penalty=method.penalty or "l1",
        max_epochs=method.epochs,
        preprocess=NORMALISATIONS[options.normalise],
        augment="flip",
        random_state=seed,
    )


def trial(module: nn.Module, options: argparse.Namespace, data: Data) -> SparseEnergyOODDetector:
    """A detector on a few rows, to see early that the network takes them, and how it computes."""
    rows = draw(len(data.x_train), 100, seed=0)
    detector = make_detector(module, options, methods(options)[0], seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the comparison gives those that matter
        return detector.fit(data.x_train[rows], data.y_train[rows])


def compare(
    module: nn.Module, options: argparse.Namespace, data: Data, done: list[Row]
) -> Iterator[Row]:
    """Results of all seeds and methods, each one read from `done`, or measured and appended."""
    known = {tuple(row[name] for name in SETTINGS): row for row in done}
    for seed in dict.fromkeys(options.seeds):
        for method in methods(options):
            settings = {
                "id": options.id.stem,
                "data": data.digest,
                "network": options.network,
                "checkpoint": options.checkpoint.name,
                "normalise": options.normalise,
                "skood": skood.__version__,
                "train_rows": options.train_rows or len(data.x_train),
                "test_rows": options.test_rows or len(data.x_test),
                **vars(method),
                "seed": seed,
            }
            row = known.get(tuple(str(settings[name]) for name in SETTINGS))
            if row is None:
                detector = make_detector(module, options, method, seed)
                row = settings | measure(detector, data, settings)
                if options.csv:
                    with options.csv.open("a", newline="") as file:
                        csv.DictWriter(file, columns(data)).writerow(row)
            print(
                f"seed {seed}, {method.method}: mean FPR95 {100 * float(row['fpr95']):.1f}, "
                f"{float(row['seconds']):.0f} s",
                file=sys.stderr,
                flush=True,
            )
            yield row


def measure(detector: SparseEnergyOODDetector, data: Data, settings: Row) -> Row:
    start = time.perf_counter()
    training = draw(len(data.x_train), settings["train_rows"], settings["seed"])
    # The same test rows for every seed: what is left is the spread due to training.
    testing = draw(len(data.x_test), settings["test_rows"], seed=0)
    x_test, y_test = data.x_test[testing], data.y_test[testing]
    detector.fit(data.x_train[training], data.y_train[training])
    score_id = detector.score_samples(x_test)
    score_ood = {name: detector.score_samples(x) for name, x in data.ood.items()}
    report = detection_report(score_id, score_ood).to_dict()
    result = {
        **{f"fpr95 {name}": report[name]["fpr95"] for name in data.ood},
        "fpr95": report["mean"]["fpr95"],
        "auroc": report["mean"]["auroc"],
        "accuracy": np.mean(detector.predict_class(x_test) == y_test),
        "kept_training": np.mean(score_id >= detector.offset_),
    }
    fresh, rest = np.array_split(draw(len(x_test), len(x_test), settings["seed"]), 2)
    detector.calibrate(x_test[fresh])
    result["kept_fresh"] = np.mean(score_id[rest] >= detector.offset_)
    result["seconds"] = time.perf_counter() - start
    return {name: float(value) for name, value in result.items()}


def draw(n_rows: int, size: int, seed: int) -> NDArray[np.intp]:
    return np.random.RandomState(seed).permutation(n_rows)[:size]


def columns(data: Data) -> list[str]:
    return [*SETTINGS, *metric_names(data), "seconds"]


def metric_names(data: Data) -> list[str]:
    """Columns of the table, in its order."""
    sets = [f"fpr95 {name}" for name in data.ood]
    return [*sets, "fpr95", "auroc", "accuracy", "kept_training", "kept_fresh"]


# Reporting


def header(options: argparse.Namespace, data: Data, detector: SparseEnergyOODDetector) -> str:
    train_rows = options.train_rows or len(data.x_train)
    test_rows = options.test_rows or len(data.x_test)
    training = detector.precision_["training"]
    native = "native bfloat16" if training == "bfloat16" else "no native bfloat16"
    lines = [
        f"# {options.id.stem}, {options.network}",
        "",
        f"- ID: {options.id.stem}, {data.y_train.max() + 1} classes, {train_rows} of "
        f"{len(data.x_train)} training rows, {test_rows} of {len(data.x_test)} test rows",
        f"- OOD: {', '.join(f'{name} ({len(x)} rows)' for name, x in data.ood.items())}",
        f"- network: {options.checkpoint.name}, normalised as {options.normalise}",
        f"- fine-tuning: epochs {options.epochs}, flips, seeds "
        f"{', '.join(map(str, options.seeds))}",
        f"- versions: {versions()}",
        f"- machine: {machine()}, device {detector.device_}; {native}, so it trains in "
        f"{training} and scores in {detector.precision_['scoring']}",
        "",
    ]
    return "\n".join(lines)


def table(rows: list[Row], data: Data) -> str:
    n_seeds = len({row["seed"] for row in rows})
    notes = [
        ("Percent" if n_seeds == 1 else f"Percent, mean ± standard deviation over {n_seeds} seeds")
        + ". FPR95: share of OOD rows kept where 95 % of the ID test rows are (ID is positive). "
        "AUROC: mean over the OOD sets. Kept: share of ID test rows at or above the threshold; "
        "placed with training rows, which the network given has seen, or with half of the test "
        "rows, and then counted in the other half."
    ]
    mean = "mean FPR95"
    if stand_ins := [name for name in data.ood if name in STAND_INS]:
        mean += " (not the paper's)"
        notes.append(
            "The mean is not the paper's: "
            + ", ".join(f"{name} stands in for {STAND_INS[name]}" for name in stand_ins)
            + "."
        )
    titles = [
        *(f"FPR95 {name}" for name in data.ood),
        mean,
        "mean AUROC",
        "ID accuracy",
        "kept (training rows)",
        "kept (fresh rows)",
    ]
    lines = [["", *titles], ["---", *["---:" for _ in titles]]]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        lines.append(
            [method, *(cell([float(r[name]) for r in group]) for name in metric_names(data))]
        )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", "\n\n".join(notes)])


def cell(values: list[float]) -> str:
    text = f"{100 * np.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {100 * np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    main()
