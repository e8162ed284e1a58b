"""The paper's table on real images: detectors and scores against OOD sets.

Fine-tunes one classifier several ways, scores the same images with each network and each score,
and writes results.csv, run.json, table.md and two figures. What is finished is kept in the folder,
keyed by all that produced it, and not computed again. README.md describes files and columns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from environment import command_line, machine, versions
from images import (
    NORMALISATIONS,
    Data,
    Images,
    add_data_options,
    add_precision_option,
    check_available,
    complete,
    count,
    draw,
    number,
    read_data,
    read_network,
)
from kinds import STAND_INS, by_kind, kind_row, noise_sets, of_the_six
from numpy.typing import NDArray
from tables import CONTROL, MAIN_SCORE, SROE, UNTOUCHED, Results, Row, write_results
from torch import Tensor, nn

import skood
from skood import SparseEnergyOODDetector
from skood.calibration import calibration_split, place_threshold
from skood.engine.inference import forward_rows
from skood.engine.outputs import Seen
from skood.engine.training import Recipe
from skood.exceptions import DivergenceError
from skood.fingerprints import fingerprint
from skood.metrics import aupr, auroc, fpr_at_tpr
from skood.model_selection import surrogate_outliers
from skood.penalties import PENALTIES, hoyer_index, l1
from skood.randomness import random_generator
from skood.rows import as_rows
from skood.scores import (
    Head,
    LayeredOutputs,
    Outputs,
    apply_score,
    fit_score,
    get_score,
    list_scores,
)
from skood.scores.protocol import labelled, uses_gradient, uses_layers

Key = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

SAME_SOURCE = {"outliers": ("tinyimagenet_crop", "tinyimagenet_resize")}
"""OOD sets from the source of a set of outliers, whose results beside it do not count."""

TPR = 0.95
OUTLIER = -1
"""Label of the outliers among the training rows."""

PIECE = 1024
"""Rows scored at a time."""

RESAMPLINGS = 1000

PAPERS_RATE = 1e-3


@dataclass(frozen=True)
class Method:
    """How a network is made from the one given."""

    name: str
    penalty: str = ""
    weight: float = 0.0
    outlier_weight: float = 0.0
    distillation_weight: float = 0.0


SPARSE_WITH_OUTLIERS = Method(SROE, "l1", 0.02, 0.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, then fine-tune, score and report, seed by seed."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        study = Study(options, command_line("benchmarks/paper.py", argv))
        make_folder(options.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    runs = []
    for seed in dict.fromkeys(options.seeds):
        runs.append(run_seed(study, seed))
        results = report(study, runs)
    print(results.markdown(), end="")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--outliers", type=Path, metavar="FILE.npz", help="x; adds the row of SROE")
    add(
        "--detectors",
        type=sparse_method,
        nargs="+",
        default=[sparse_method("l1:0.02")],
        metavar="PENALTY:WEIGHT[:DISTILLATION_WEIGHT]",
        help="beside the untouched network and the control (default: l1:0.02)",
    )
    add(
        "--scores",
        choices=list_scores(),
        nargs="+",
        default=list_scores(),
        help=f"beside {MAIN_SCORE} (default: all)",
    )
    add("--seeds", type=a_seed, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--epochs", type=count, default=10, help="of fine-tuning (default: 10)")
    add("--learning-rate", type=rate, default=PAPERS_RATE, help=f"default: {PAPERS_RATE:g}")
    add("--layers", choices=["all", "last"], default="all", help="fine-tuned (default: all)")
    add("--train-rows", type=count, help="drawn anew by each seed (default: all)")
    add("--test-rows", type=count, help="the same for all seeds (default: all)")
    add("--ood-rows", type=count, help="of each OOD set, at most (default: all)")
    add("--fit-rows", type=count, help="of the training rows, for scores that are fitted")
    add_precision_option(parser)
    add("--folder", type=Path, required=True, help="where everything goes, and is found again")
    options = parser.parse_args(argv)
    complete(options)
    options.scores = list(dict.fromkeys([MAIN_SCORE, *options.scores]))
    return options


def a_seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**32 - 1")
    return value


def rate(text: str) -> float:
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 trains nothing")
    return value


def sparse_method(text: str) -> Method:
    """A penalty, its weight, and perhaps that of distillation, such as l1:0.02 or l1:0.2:1."""
    penalty, *weights = text.split(":")
    try:
        values = [number(weight) for weight in weights]
    except (ValueError, argparse.ArgumentTypeError):
        values = []
    if penalty not in PENALTIES or len(values) not in (1, 2) or values[-1] == 0:
        raise argparse.ArgumentTypeError(
            f"{text} is not one of {', '.join(sorted(PENALTIES))}, a colon and a weight above 0, "
            "such as l1:0.02, and perhaps another colon and the weight of distillation, such as "
            "l1:0.2:1 (the control, of weight 0, is always there)"
        )
    sparsity, distillation = (*values, 0.0)[:2]
    name = ":".join([penalty if sparsity else CONTROL, *(f"{v:g}" for v in values if v)])
    return Method(name, penalty if sparsity else "", sparsity, distillation_weight=distillation)


def make_folder(folder: Path) -> None:
    try:
        for part in ("networks", "cells"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--folder {folder} cannot be written: {error}") from error


class Study:
    """What all networks of a run share: data, options, and the network they start from."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.data: Data = read_data(options.id, options.ood, options.outliers)
        n_train, n_test = len(self.data.x_train), len(self.data.x_test)
        check_available("--train-rows", options.train_rows, n_train, options.id)
        check_available("--test-rows", options.test_rows, n_test, options.id)
        self.train_rows: int = options.train_rows or n_train
        # The same test rows for every seed: what is left is the spread due to fine-tuning.
        testing = draw(n_test, options.test_rows, seed=0)
        self.x_test, self.y_test = self.data.x_test[testing], self.data.y_test[testing]
        ood_sets = self.data.ood | noise_sets(self.x_test.shape[1:])
        self.ood: dict[str, Images] = {
            name: x[draw(len(x), options.ood_rows, seed=0)] for name, x in ood_sets.items()
        }
        if not self.apart:
            raise ValueError(
                "the mean would be over no set, as the images of "
                f"{' and '.join(self.related)} come from the source of {options.outliers}. Give "
                "another of the paper's sets as well, such as svhn.npz."
            )
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"--detectors has weights too near to tell apart: {', '.join(names)}. Give each "
                "once, with at most 6 digits."
            )
        n_fit = len(rows_of(self, options.seeds[0]).training[: options.fit_rows])
        for name in options.scores:
            if (n_neighbors := getattr(get_score(name), "n_neighbors", 0)) > n_fit:
                raise ValueError(
                    f"--scores {name} takes the distance to neighbour {n_neighbors}, but is fitted "
                    f"on {n_fit} rows. Raise --train-rows or --fit-rows, or leave it out."
                )
        self.module: nn.Module = read_network(options, self.data.n_classes)
        self.trial = opened(self, self.module)  # early, to see that the network takes the images
        self.checkpoint = hashlib.sha256(options.checkpoint.read_bytes()).hexdigest()[:12]
        self.digests = {name: digest(x) for name, x in {"id_test": self.x_test, **self.ood}.items()}
        self.scores = {name: score_key(name) for name in options.scores}
        self.made_by: Key = {
            "training": digest(self.data.x_train, self.data.y_train),
            "train_rows": self.train_rows,
            "network": options.network,
            "checkpoint": self.checkpoint,
            "normalise": options.normalise,
            "skood": f"{skood.__version__}, code {code_digest()}",
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "device": self.trial.device_.type,
            "precision": self.trial.precision_,
        }

    @property
    def learning_rate(self) -> float:
        return float(self.options.learning_rate)

    @property
    def methods(self) -> list[Method]:
        sparse = list(dict.fromkeys(self.options.detectors))
        sroe = [] if self.data.outliers is None else [SPARSE_WITH_OUTLIERS]
        return [Method(UNTOUCHED), Method(CONTROL), *sparse, *sroe]

    @property
    def related(self) -> list[str]:
        """OOD sets from the source of the outliers."""
        if self.options.outliers is None:
            return []
        sources = SAME_SOURCE.get(self.options.outliers.stem, ())
        return [name for name in self.ood if name in sources]

    @property
    def apart(self) -> list[str]:
        """OOD sets of the mean by which all detectors compare."""
        return [name for name in of_the_six(self.ood) if name not in self.related]

    def epochs(self, method: Method) -> int:
        return 0 if method.name == UNTOUCHED else int(self.options.epochs)

    def detector(self, module: nn.Module, seed: int, **parameters: Any) -> SparseEnergyOODDetector:
        return SparseEnergyOODDetector(
            module,
            preprocess=NORMALISATIONS[self.options.normalise],
            precision=self.options.precision,
            random_state=seed,
            **parameters,
        )


def n_steps(n_rows: int, batch_size: int) -> int:
    """Steps of an epoch; a last batch of a single row is left out."""
    return max(1, -(-(n_rows - 1) // batch_size))


def sum_of_rates(steps: int, learning_rate: float) -> float:
    """Down half a cosine: the cosines of all steps but the first cancel each other."""
    low = min(Recipe.final_learning_rate, learning_rate)
    return steps * low + (learning_rate - low) * (steps + 1) / 2 if steps else 0.0


def opened(study: Study, module: nn.Module, **parameters: Any) -> SparseEnergyOODDetector:
    """A detector around a network as it is."""
    rows = draw(len(study.data.x_train), 100, seed=0)
    detector = study.detector(module, seed=0, max_epochs=0, **parameters)
    return quietly_fitted(detector, study.data.x_train[rows], study.data.y_train[rows])


def quietly_fitted(
    detector: SparseEnergyOODDetector, x: Images, y: NDArray[np.int64]
) -> SparseEnergyOODDetector:
    # It warns of accuracy lost and of rows seen before, which the tables show, and with verbose=1
    # prints to stdout, where the tables go.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        return detector.fit(x, y)


# Keeping


def digest(*arrays: NDArray[Any]) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:12]


def score_key(name: str) -> Key:
    score = get_score(name)
    code = hashlib.sha256(fingerprint(score)).hexdigest()[:12]
    return {"score": name, "parameters": repr(score), "code": code}


def code_digest() -> str:
    """Digest of the code that decides what a network becomes and what it gives."""
    package = Path(skood.__file__).parent
    files = [*package.glob("engine/*.py")]
    names = ("calibration", "detector", "fitting", "networks", "penalties", "rows")
    files += [package / f"{name}.py" for name in names]
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def kept(folder: Path, name: str, key: Key, make: Callable[[], Arrays]) -> Arrays:
    """Arrays from a file, or made and then kept there; a damaged file counts as none."""
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
    with (
        contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile),
        np.load(path) as file,
    ):
        return {name: array for name, array in file.items() if name != "key"}
    arrays = make()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
        np.savez(part, **{"key": np.array(text), **arrays})  # type: ignore[arg-type]
    os.replace(part.name, path)
    return arrays


# The first stage: networks


@dataclass(frozen=True)
class Rows:
    """Training rows that a seed draws, as the detector splits them, and what is made of them."""

    drawn: NDArray[np.intp]
    training: NDArray[np.intp]
    held_out: NDArray[np.intp]
    surrogates: Images
    """Outliers made from the rows held out: by them a user without outliers would choose."""


def rows_of(study: Study, seed: int) -> Rows:
    drawn = draw(len(study.data.x_train), study.train_rows, seed)
    # The detector's own split: what it fine-tunes on, and what it places its threshold with. Its
    # seed is the first number that the detector draws.
    random = np.random.RandomState(random_generator(seed).randint(np.iinfo(np.int32).max))
    training, held_out = calibration_split(study.data.y_train[drawn], "auto", TPR, random)
    surrogates = surrogate_outliers(study.data.x_train[drawn[held_out]], random_state=0)
    return Rows(drawn, drawn[training], drawn[held_out], surrogates)


def network_key(study: Study, method: Method, seed: int) -> Key:
    key: Key = {
        **study.made_by,
        "epochs": study.epochs(method),
        "seed": seed,
        "penalty": method.penalty,
        "weight": method.weight,
        "outlier_weight": method.outlier_weight,
        "distillation_weight": method.distillation_weight,
        "learning_rate": study.learning_rate,
        "layers": study.options.layers,
    }
    if method.outlier_weight and study.data.outliers is not None:
        key["outliers"] = digest(study.data.outliers)
    return key


def file_name(study: Study, method: Method, seed: int) -> str:
    return f"{study.options.network}-{method.name.replace(':', '_')}-seed{seed}"


def fine_tuned(study: Study, method: Method, seed: int, rows: Rows) -> Arrays:
    """State of a fine-tuned network, and how it came about; or why it failed."""
    folder, key = study.options.folder / "networks", network_key(study, method, seed)
    name = file_name(study, method, seed)
    # What is left of an interrupted training, until the network is finished.
    epochs = folder / f"{name}-epochs"

    def make() -> Arrays:
        x, y = study.data.x_train[rows.drawn], study.data.y_train[rows.drawn]
        if method.outlier_weight and study.data.outliers is not None:
            x = np.concatenate([x, study.data.outliers])
            y = np.concatenate([y, np.full(len(study.data.outliers), OUTLIER)])
        detector = study.detector(
            study.module,
            seed,
            sparsity_weight=method.weight,
            penalty=method.penalty or "l1",
            max_epochs=study.epochs(method),
            augment="flip",
            ood_label=OUTLIER if method.outlier_weight else None,
            outlier_weight=method.outlier_weight,
            distillation_weight=method.distillation_weight,
            learning_rate=study.learning_rate,
            layers=study.options.layers,
            memory=epochs,
            verbose=1,
        )
        try:
            quietly_fitted(detector, x, y)
        except DivergenceError as error:
            return {"failure": np.array(str(error))}
        record = {
            "id_accuracy": detector.id_accuracy_,
            "offset": detector.offset_,
            "history": detector.history_,
        }
        state = detector.module_.state_dict()
        return {
            "record": np.array(json.dumps(record)),
            "calibration_scores": detector.calibration_scores_,
            **{f"state/{name}": value.cpu().numpy() for name, value in state.items()},
        }

    arrays = kept(folder, name, key, make)
    shutil.rmtree(epochs, ignore_errors=True)
    return arrays


# The second stage: scores


class Scorer:
    """A network that scores sets of rows, each of which passes through it at most once."""

    def __init__(self, study: Study, module: nn.Module, rows: Rows) -> None:
        self.study, self.module, self.rows = study, module, rows
        self._seen: dict[str, Seen] = {}
        self._fitted: dict[str, Any] = {}

    @cached_property
    def detector(self) -> SparseEnergyOODDetector:
        """One that looks at inner layers, if a score does."""
        of_layers = any(uses_layers(get_score(name)) for name in self.study.options.scores)
        score = "layer_moments" if of_layers else "energy"
        return opened(self.study, self.module, score_function=score)

    @property
    def fit_rows(self) -> NDArray[np.intp]:
        """In random order, as the seed drew them before the detector split them."""
        return self.rows.training[: self.study.options.fit_rows]

    def images(self, name: str) -> Images:
        data = self.study.data
        if name == "id_fit":
            return data.x_train[self.fit_rows]
        if name == "id_held_out":
            return data.x_train[self.rows.held_out]
        if name == "surrogates":
            return self.rows.surrogates
        return self.study.x_test if name == "id_test" else self.study.ood[name]

    def seen(self, name: str) -> Seen:
        """What scores see, logits in float64 and the rest in float32."""
        if name not in self._seen:
            network, rows = self.detector._network, as_rows(self.images(name))
            pieces = [seen for _, seen in forward_rows(network, rows, features=True)]
            found = Seen.joined(pieces).each(Tensor.cpu)
            self._seen[name] = found.each(Tensor.float)._replace(logits=found.logits)
        return self._seen[name]

    def pieces(self, name: str) -> Iterator[Seen]:
        seen = self.seen(name)
        for start in range(0, len(seen.logits), PIECE):
            yield seen.each(lambda values, start=start: values[start : start + PIECE].double())

    def scores(self, score: str, name: str) -> NDArray[np.float64]:
        if uses_gradient(get_score(score)):
            if score not in self._fitted:
                self._fitted[score] = opened(self.study, self.module, score_function=score)
            return self._fitted[score].score_samples(self.images(name))
        if score not in self._fitted:
            self._fitted[score] = self.fitted(get_score(score))
        values = [apply_score(self._fitted[score], *piece) for piece in self.pieces(name)]
        return torch.cat(values).numpy()

    def cell(self, score: str, name: str) -> Arrays:
        return {"scores": self.scores(score, name)}

    def fitted(self, score: Any) -> Any:
        """The score with its statistics, of the rows that the network was fine-tuned on."""
        return fit_score(
            score,
            self.labelled("id_fit", self.fit_rows),
            self.head,
            lambda: self.labelled("id_held_out", self.rows.held_out),
        )

    def labelled(self, name: str, rows: NDArray[np.intp]) -> list[Outputs | LayeredOutputs]:
        """Outputs of some training rows, piece by piece."""
        labels = torch.from_numpy(self.study.data.y_train[rows].astype(np.int64)).split(PIECE)
        return [
            labelled(features, logits, of, layers)
            for (features, logits, layers), of in zip(self.pieces(name), labels, strict=True)
        ]

    def head(self) -> Head:
        linear: Any = self.detector.module_.get_submodule(self.detector.head_)
        return Head(linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double())

    def description(self) -> Arrays:
        """Class, L1 norm and Hoyer index of each ID test row."""
        features, logits, _ = self.seen("id_test")
        return {
            "classes": logits.argmax(dim=1).numpy(),
            "l1": l1(features.double()).numpy(),
            "hoyer": hoyer_index(features.double()).numpy(),
        }


@dataclass
class Measured:
    """What one network says of all rows: scores by score and set, and of the ID test rows more."""

    method: Method
    seed: int
    scores: dict[str, Arrays]
    description: Arrays
    right: NDArray[np.bool_]


def measured(study: Study, method: Method, seed: int, rows: Rows, network: Arrays) -> Measured:
    module = copy.deepcopy(study.module)
    module.load_state_dict(
        {
            name.removeprefix("state/"): torch.from_numpy(np.asarray(value))
            for name, value in network.items()
            if name.startswith("state/")
        }
    )
    scorer = Scorer(study, module, rows)
    key, prefix = network_key(study, method, seed), file_name(study, method, seed)
    digests = study.digests | {
        name: digest(scorer.images(name)) for name in ("id_held_out", "surrogates")
    }

    def cell(name: str, of: str, settings: Key, make: Callable[[], Arrays]) -> Arrays:
        return kept(
            study.options.folder / "cells",
            f"{prefix}-{name}-{of}",
            {**key, **settings, "rows": digests[of]},
            make,
        )

    scores: dict[str, Arrays] = {}
    for name in study.options.scores:
        settings = dict(study.scores[name])
        if hasattr(get_score(name), "fit"):
            settings["fit_rows"] = len(scorer.fit_rows)
        scores[name] = {
            of: cell(name, of, settings, partial(scorer.cell, name, of))["scores"]
            for of in digests
            if of != "surrogates" or name == MAIN_SCORE
        }
    description = cell("features", "id_test", {"score": None}, scorer.description)
    return Measured(method, seed, scores, description, description["classes"] == study.y_test)


@dataclass
class SeedRun:
    """All networks of one seed, and what failed."""

    seed: int
    n_training: int
    """Rows that the networks were fine-tuned on."""

    measured: list[Measured]
    failures: dict[str, str]


def run_seed(study: Study, seed: int) -> SeedRun:
    rows = rows_of(study, seed)
    run = SeedRun(seed, len(rows.training), [], {})
    for method in study.methods:
        start = time.perf_counter()
        network = fine_tuned(study, method, seed, rows)
        after = time.perf_counter()
        if "failure" in network:
            run.failures[f"{method.name}, seed {seed}"] = str(network["failure"])
            say(f"seed {seed}, {method.name}: failed, {network['failure']}")
            continue
        of_one = measured(study, method, seed, rows, network)
        run.measured.append(of_one)
        say(
            f"seed {seed}, {method.name}: accuracy {100 * of_one.right.mean():.1f}; network "
            f"{after - start:.0f} s, scores {time.perf_counter() - after:.0f} s"
        )
    return run


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# From scores to results


Metrics = dict[str, float]


def result_rows(study: Study, run: SeedRun) -> Iterator[Row]:
    """Rows of results.csv, for each network, score and OOD set, and for what sums them up."""
    judged = {
        (one.method.name, score): judged_sets(study, one, score)
        for one in run.measured
        for score in one.scores
    }
    l1_norms = {one.method.name: float(one.description["l1"].mean()) for one in run.measured}
    for one in run.measured:
        method = one.method
        energies = one.scores[MAIN_SCORE]
        steps = study.epochs(method) * n_steps(run.n_training, study.trial.batch_size)
        common = {
            "id": study.options.id.stem,
            "network": study.options.network,
            "checkpoint": study.checkpoint,
            "train_rows": study.train_rows,
            "epochs": study.epochs(method),
            "seed": run.seed,
            "detector": method.name,
            "penalty": method.penalty,
            "weight": method.weight,
            "outlier_weight": method.outlier_weight,
            "distillation_weight": method.distillation_weight,
            "learning_rate": study.learning_rate,
            "sum_of_rates": sum_of_rates(steps, study.learning_rate),
            "accuracy": float(one.right.mean()),
            "mean_l1": l1_norms[method.name],
            "l1_of_control": l1_norms[method.name] / l1_norms.get(CONTROL, np.nan),
            "hoyer": float(one.description["hoyer"].mean()),
            "surrogate_auroc": auroc(energies["id_held_out"], energies["surrogates"]),
            "energy_id": -float(energies["id_test"].mean()),
        }
        for score, by_set in one.scores.items():
            own = judged[method.name, score]
            before = (judged[UNTOUCHED, MAIN_SCORE], judged[UNTOUCHED, score])
            summaries = summed_up(study, own, *before)
            kept = kept_shares(by_set["id_test"], by_set["id_held_out"], run.seed)
            for name, metrics in {**own, **summaries}.items():
                yield {**common, **kept, "score": score, "ood_set": name, **metrics}


def judged_sets(study: Study, of_one: Measured, score: str) -> dict[str, Metrics]:
    by_set, energies = of_one.scores[score], of_one.scores[MAIN_SCORE]
    score_id = by_set["id_test"]
    return {
        name: {
            "fpr95": fpr_at_tpr(score_id, by_set[name], TPR),
            "fpr95_nearest": fpr_at_tpr(score_id, by_set[name], TPR, method="nearest"),
            "auroc": auroc(score_id, by_set[name]),
            "aupr": aupr(score_id, by_set[name]),
            "energy_ood": -float(energies[name].mean()),
        }
        for name in study.ood
    }


def summed_up(
    study: Study,
    by_set: dict[str, Metrics],
    untouched: dict[str, Metrics],
    untouched_same_score: dict[str, Metrics],
) -> dict[str, Metrics]:
    """The paper's mean, the mean of each kind and over kinds, and the worst change of a kind."""
    means = {"mean": mean_of(by_set, of_the_six(study.ood))}
    if study.related:
        means["mean_apart"] = mean_of(by_set, study.apart)
    kinds = of_kinds(by_set)
    return {
        **means,
        **{kind_row(kind): metrics for kind, metrics in kinds.items()},
        "mean_kinds": mean_of(kinds, kinds),
        "worst_change": worst_change(kinds, of_kinds(untouched)),
        "worst_change_same_score": worst_change(kinds, of_kinds(untouched_same_score)),
    }


def of_kinds(by_set: dict[str, Metrics]) -> dict[str, Metrics]:
    return {kind: mean_of(by_set, members) for kind, members in by_kind(by_set).items()}


def mean_of(of_each: dict[str, Metrics], names: Iterable[str]) -> Metrics:
    chosen = [of_each[name] for name in names]
    return {metric: float(np.mean([one[metric] for one in chosen])) for metric in chosen[0]}


def worst_change(kinds: dict[str, Metrics], before: dict[str, Metrics]) -> Metrics:
    """By each metric, the change of the kind that fares worst beside the untouched network."""
    worst = {"fpr95": max, "fpr95_nearest": max, "auroc": min, "aupr": min}
    changes = {
        metric: float(of_all(kinds[kind][metric] - before[kind][metric] for kind in kinds))
        for metric, of_all in worst.items()
    }
    return {**changes, "energy_ood": float("nan")}


def kept_shares(
    score_id: NDArray[np.float64], held_out: NDArray[np.float64], seed: int
) -> dict[str, float]:
    """Share of ID test rows kept by thresholds from pre-training rows and from fresh ones."""
    order = draw(len(score_id), None, seed)
    fresh, rest = np.array_split(score_id[order], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows too few for a promise
        return {
            "kept_training": float(np.mean(score_id >= place_threshold(held_out, TPR))),
            "kept_fresh": float(np.mean(rest >= place_threshold(fresh, TPR))),
        }


def differences(study: Study, runs: Sequence[SeedRun]) -> list[Row]:
    """Mean FPR95 and accuracy of each method less those of the control of the same seed.

    The draws of seeds and rows are shared by all methods, so that their noise cancels.
    """
    random = np.random.default_rng(0)
    sets = study.apart
    by_name = [{one.method.name: one for one in run.measured} for run in runs]
    names = common_names(runs)
    if CONTROL not in names:
        return []
    sizes = [len(study.x_test), *(len(study.ood[name]) for name in sets)]

    def values(picks: Sequence[Any]) -> NDArray[np.float64]:
        """Of shape (names, seeds, 2): mean FPR95 and accuracy, less the control's."""
        of_all = np.array(
            [[resampled(methods[name], sets, picks) for methods in by_name] for name in names]
        )
        return of_all - of_all[names.index(CONTROL)]

    estimate = values([slice(None)] * len(sizes)).mean(axis=1)
    replicates = []
    for _ in range(RESAMPLINGS):
        seeds = random.integers(len(runs), size=len(runs))
        drawn = values([random.integers(size, size=size) for size in sizes])
        replicates.append(drawn[:, seeds].mean(axis=1))
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    return [
        {
            "detector": name,
            **{
                metric: {
                    "mean": float(estimate[i, j]),
                    "low": float(low[i, j]),
                    "high": float(high[i, j]),
                }
                for j, metric in enumerate(("fpr95", "accuracy"))
            },
        }
        for i, name in enumerate(names)
        if name != CONTROL
    ]


def common_names(runs: Sequence[SeedRun]) -> list[str]:
    """Methods that failed at no seed; the others would have means over fewer."""
    names = [{one.method.name for one in run.measured} for run in runs]
    return [one.method.name for one in runs[0].measured if all(one.method.name in n for n in names)]


def resampled(of_one: Measured, sets: Sequence[str], picks: Sequence[Any]) -> tuple[float, float]:
    """Mean FPR95 and accuracy on the rows picked."""
    scores = of_one.scores[MAIN_SCORE]
    threshold = threshold_at_least(scores["id_test"][picks[0]])
    fpr = [
        np.mean(scores[name][some] >= threshold) for name, some in zip(sets, picks[1:], strict=True)
    ]
    return float(np.mean(fpr)), float(of_one.right[picks[0]].mean())


def threshold_at_least(score_id: NDArray[np.float64]) -> float:
    """The strictest that keeps 95 % of the rows, by one selection: `fpr_at_tpr` sorts."""
    rank = len(score_id) - int(np.ceil(TPR * len(score_id) - 1e-9))
    return float(np.partition(score_id, rank)[rank])


# Reporting


def report(study: Study, runs: Sequence[SeedRun]) -> Results:
    """Write everything that is known after these seeds."""
    folder = study.options.folder
    names = common_names(runs)
    rows = [row for run in runs for row in result_rows(study, run) if row["detector"] in names]
    results = Results(rows, description_of_run(study, runs))
    write_results(folder / "results.csv", rows)
    text = json.dumps(results.run, indent=2, ensure_ascii=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(results.markdown(), encoding="utf-8")
    try:
        results.heat_table().savefig(folder / "figure.png", dpi=150)
        results.front().savefig(folder / "front.png", dpi=150)
    except ImportError as error:
        say(f"no figures: {error}")
    return results


def description_of_run(study: Study, runs: Sequence[SeedRun]) -> dict[str, Any]:
    options, data = study.options, study.data
    native = study.trial.precision_
    return {
        "command": study.command,
        "versions": versions(),
        "machine": f"{machine()}, device {study.trial.device_}; trains in {native['training']}, "
        f"scores in {native['scoring']}",
        "id": options.id.stem,
        "n_classes": data.n_classes,
        "train_rows": study.train_rows,
        "all_train_rows": len(data.x_train),
        "test_rows": len(study.x_test),
        "all_test_rows": len(data.x_test),
        "ood": {name: len(x) for name, x in study.ood.items()},
        "network": options.network,
        "checkpoint": options.checkpoint.name,
        "checkpoint_digest": study.checkpoint,
        "normalise": options.normalise,
        "epochs": options.epochs,
        "learning_rate": study.learning_rate,
        "layers": options.layers,
        "seeds": [run.seed for run in runs],
        "fit_rows": options.fit_rows,
        "outliers": options.outliers and options.outliers.stem,
        "outlier_rows": 0 if data.outliers is None else len(data.outliers),
        "outlier_weight": SPARSE_WITH_OUTLIERS.outlier_weight,
        "sroe_weight": SPARSE_WITH_OUTLIERS.weight,
        "mean_of": of_the_six(study.ood),
        "kinds": by_kind(study.ood),
        "stand_ins": {name: other for name, other in STAND_INS.items() if name in study.ood},
        "related": study.related,
        "failures": joined(run.failures for run in runs),
        "resamplings": RESAMPLINGS,
        "differences": differences(study, runs),
    }


def joined(parts: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in part.items()}


if __name__ == "__main__":
    main()
