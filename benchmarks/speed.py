"""How fast skood is, beside loops of torch's own, the paper's authors' loop and other libraries.

Every figure of comparison is a ratio of medians that were taken in one run. Each contestant runs in
a process of its own, which prepares once; then one works at a time, in turn A B C A B C, so that
whatever slows the machine slows all of them. The first round does not count. Tables go to stdout in
Markdown and, as they come, to a JSON file; progress goes to stderr. README.md describes the groups.
"""

from __future__ import annotations

import argparse
import ctypes.util
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import environment
import memory
import peers
import torch
from images import count, read_id
from peers import BATCH, IMAGE, Task, write_images
from tables import Table

from skood.engine.hardware import has_native_bfloat16, resolve_device

TITLE = "Speed"

INSTALL = {
    "skorch": "pip install skorch==1.4.0",
    "oodeel": "pip install --no-deps oodeel==0.4.0, as it asks for a numpy below 2",
    "faiss": "pip install faiss-cpu",
    "pytorch_ood": "pip install 'pytorch-ood>=0.4,<0.5'",
    "torchvision": "pip install torchvision",
    "PIL": "pip install pillow",
}
"""Libraries that a contestant may need, and how they come."""

NETWORKS = {"resnet20": "ResNet-20", "wrn16_2_dropout0.3": "WideResNet-16-2"}
COMPILED_NETWORKS = NETWORKS | {"densenet100_12": "DenseNet-BC-100-12"}
COMPILED_EPOCHS = 3
WITHOUT_CACHES = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
DEVICE_NETWORK = "wrn40_2_dropout0.3"
"""WideResNet-40-2, of the paper."""

DEVICE_EPOCHS = {"cuda": 10, "cpu": 2}
PRECISIONS = ["float32", "bfloat16"]
WORKERS_OF_AUTHORS = 2
WORKERS_OF_PYTORCH_OOD = 12
SEARCH_EPOCHS = 10
"""Of the detector's defaults."""

OTHER_SCORES = (
    *("msp", "max_logit", "gen", "react", "dice", "scale"),
    *("knn", "direction_length", "mahalanobis++"),
)
"""Scores that train on the same rows as the energy."""

CALLS = {"default": 500, "resnet20": 50}
IMPORTS = 10
FILES = 2000
MEMORY_ROWS = (1, 10)
BYTES_OF_A_ROW = 4 * memory.N_COLUMNS
MB = 1e6

KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
JEMALLOC = (
    "/usr/lib/*/libjemalloc.so.2",
    "/usr/lib*/libjemalloc.so.2",
    "/usr/local/lib/libj*.so.2",
)

IMPORT = """
import time
start = time.perf_counter()
import torch, sklearn
middle = time.perf_counter()
import skood
print(middle - start, time.perf_counter() - middle)
"""

RATIOS = ["work", "contestant", "seconds", "a second", "skood's speed / its", "target", "met"]
NO_FIGURE = ""

Settings = argparse.Namespace


# Contestants and their processes


@dataclass(frozen=True)
class Contestant:
    """Who does what: a function of peers.py, its task, and the libraries that it needs."""

    name: str
    work: str
    task: Task
    libraries: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.libraries if importlib.util.find_spec(name) is None]


@dataclass
class Result:
    """What a contestant answered, round by round, or why it did not."""

    contestant: Contestant
    answers: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def finished(self) -> bool:
        return self.error is None

    def values(self, fact: str = "seconds") -> list[float]:
        return [answer[fact] for answer in self.answers]

    def median(self, fact: str = "seconds") -> float:
        return median(self.values(fact))

    @property
    def remark(self) -> str | None:
        """What a reader of the table should know of it."""
        if self.error is not None:
            return f"{self.name} {self.error}"
        detail = self.answers[0].get("detail")
        return f"{self.name}: {detail}" if detail else None


class Worker:
    """A process that prepares a contestant's work, and does it when asked."""

    def __init__(self, contestant: Contestant) -> None:
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed on exit
        spec = {"work": contestant.work, "task": dataclasses.asdict(contestant.task)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | contestant.environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def prepared(self) -> dict[str, Any]:
        return self._answer()

    def work(self) -> dict[str, Any]:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is told below
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        return {"error": f"its process ended with {self.process.wait()}: {last}"}


def serve(text: str) -> None:
    """What a worker does: prepare, and at each line of stdin work and answer with a line."""
    spec = json.loads(text)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(call: Callable[[], dict[str, Any]]) -> bool:
        try:
            line = call()
        except Exception as error:
            line = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(line), file=answers, flush=True)
        return "error" not in line

    work: Any = None

    def prepare() -> dict[str, Any]:
        nonlocal work
        work = getattr(peers, spec["work"])(Task(**spec["task"]))
        return {}

    def compete() -> dict[str, Any]:
        done = work()
        return {"seconds": done.seconds, **done.facts}

    if answer(prepare):
        for _ in sys.stdin:
            answer(compete)


def measure(
    contestants: Sequence[Contestant], repeats: int, worker: Callable[[Contestant], Any] = Worker
) -> list[Result]:
    """Let the contestants work in turn, one round more than counts."""
    results = [Result(contestant) for contestant in contestants]
    with ExitStack() as stack:
        running = []
        for result in results:
            if missing := result.contestant.missing:
                how = " and ".join(INSTALL.get(name, f"pip install {name}") for name in missing)
                result.error = f"left out, it needs {' and '.join(missing)}: {how}"
                say(result.remark)
                continue
            process = stack.enter_context(worker(result.contestant))
            running.append((result, process))
            note(result, process.prepared())
        for turn in range(repeats + 1):
            for result, process in running:
                if result.finished:
                    answer = process.work()
                    if turn > 0 or "error" in answer:
                        note(result, answer)
            say(f"round {turn} of {repeats} done" if turn else "warm-up done")
    return results


def note(result: Result, answer: dict[str, Any]) -> None:
    """Keep an answer of the rounds, or an error."""
    if "error" in answer:
        result.error = f"failed, {answer['error']}"
        say(result.remark)
    elif "seconds" in answer:
        result.answers.append(answer)


def say(text: str | None) -> None:
    print(text, file=sys.stderr, flush=True)


# Tables


class Target(NamedTuple):
    """A bound on a figure; where it does not apply here, why."""

    bound: float
    at_most: bool = False
    unit: str = ""
    void: str = ""

    def cells(self, value: float) -> list[str]:
        """The target, and whether the value meets it."""
        text = f"{'at most' if self.at_most else 'at least'} {self.bound:g}{self.unit}"
        if self.void:
            return [text, self.void]
        met = value <= self.bound if self.at_most else value >= self.bound
        return [text, "yes" if met else "no"]


NO_TARGET = ["", ""]


@dataclass(frozen=True)
class Section:
    """A table and what to know of it."""

    table: Table
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        table = dataclasses.asdict(self.table)
        return {**table, "note": self.note}

    def markdown(self) -> str:
        parts = [f"## {self.table.title}", self.table.markdown(), self.note]
        return "\n\n".join(part for part in parts if part)


def ratios(
    work: str,
    results: Sequence[Result],
    targets: dict[str, Target],
    rows: int | None = None,
    scale: float = 1,
) -> list[list[str]]:
    """Lines of a table in which the first result, skood, is compared with each."""
    ours, lines = results[0], []
    for result in results:
        if not result.finished:
            continue
        speed, cells = NO_FIGURE, NO_TARGET
        if result is not ours and ours.finished:
            value = speed_ratio(ours, result)
            speed = digits(value)
            if result.name in targets:
                cells = targets[result.name].cells(value)
        rate = NO_FIGURE if rows is None else f"{rows / result.median():,.0f}"
        seconds = spread(result.values(), scale)
        lines.append([work, result.name, seconds, rate, speed, *cells])
    return lines


def speed_ratio(ours: Result, other: Result) -> float:
    """How many times as fast as another we are, by the medians."""
    return other.median() / ours.median()


def spread(values: Sequence[float], scale: float = 1) -> str:
    """Median, and least to most."""
    middle, least, most = (digits(scale * f(values)) for f in (median, min, max))
    return f"{middle} ({least} to {most})"


def digits(value: float) -> str:
    """Three digits, or all that stand before the point."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def remarks(results: Sequence[Result], *others: str) -> str:
    """The note below a table."""
    lines = [*others, *dict.fromkeys(result.remark for result in results if result.remark)]
    return "\n".join(f"- {line}" for line in lines)


# Groups


def training(settings: Settings) -> Iterator[Section]:
    """One epoch."""
    lines, results = [], []
    native = has_native_bfloat16(settings.device)
    void = "" if native else "needs bfloat16 in hardware"
    targets = {
        "authors' loop": Target(2.5, void=void),
        "bare loop": Target(0.95),
        "skorch": Target(2, void=void),
    }
    for network, title in NETWORKS.items():
        task = base_task(settings, network=network)
        found = measure(
            [
                Contestant("skood", "train_skood", task),
                authors(task),
                Contestant("bare loop", "train_bare", task),
                Contestant("skorch", "train_skorch", task, ("skorch",)),
            ],
            settings.repeats,
        )
        lines += ratios(title, found, targets, settings.train_rows) + whole_fit(title, found[0])
        results += found
    yield Section(
        Table(f"Training, one epoch on {settings.train_rows} images", RATIOS, lines, n_names=2),
        remarks(
            results,
            f"The whole fit also tries the network, calibrates on {settings.train_rows // 10} more "
            "images, and compares predictions before and after; its ratio is to its epoch.",
        ),
    )


def authors(task: Task) -> Contestant:
    task = dataclasses.replace(task, workers=WORKERS_OF_AUTHORS)
    return Contestant("authors' loop", "train_authors", task, ("torchvision", "PIL"))


def whole_fit(work: str, result: Result) -> list[list[str]]:
    """The line of a fit from end to end, beside its epochs."""
    if not result.finished:
        return []
    value = result.median("whole") / result.median()
    seconds = spread(result.values("whole"))
    cells = Target(1.12, at_most=True, unit=" of its epoch").cells(value)
    return [[work, "skood, whole fit", seconds, "", f"{digits(value)} of its epoch", *cells]]


OWN_SCORING = {
    "skood": "score_skood",
    "bare module": "score_bare",
    "bare module, folded": "score_bare_folded",
}


def scoring(settings: Settings) -> Iterator[Section]:
    """Energies of images, in two precisions; the other libraries know float32 alone."""
    task = base_task(settings)
    pytorch_ood = dataclasses.replace(task, workers=min(WORKERS_OF_PYTORCH_OOD, cores()))
    own = [
        Contestant(name, work, dataclasses.replace(task, precision=precision))
        for precision in settings.precisions
        for name, work in OWN_SCORING.items()
    ]
    others = [
        Contestant("pytorch-ood", "score_pytorch_ood", pytorch_ood, ("pytorch_ood", "torchvision")),
        Contestant("oodeel", "score_oodeel", task, ("oodeel", "faiss", "torchvision")),
        Contestant("skorch", "score_skorch", task, ("skorch",)),
    ]
    found = measure([*own, *others], settings.repeats)
    native = has_native_bfloat16(settings.device)
    for i, precision in enumerate(settings.precisions):
        fast = precision == "bfloat16"
        void = "needs bfloat16 in hardware" if fast and not native else ""
        targets = {other.name: Target(3 if fast else 1.6, void=void) for other in others}
        targets["bare module"] = Target(0.95 if fast else 1.2, void=void)
        targets["bare module, folded"] = Target(0.95, void=void)
        results = [*found[i * len(OWN_SCORING) : (i + 1) * len(OWN_SCORING)], *found[len(own) :]]
        yield Section(
            Table(
                f"Scoring {settings.test_rows} images in {precision}, ResNet-20",
                RATIOS,
                ratios(f"energies, {precision}", results, targets, settings.test_rows),
                n_names=2,
            ),
            remarks(results),
        )


def scoring_a_table(settings: Settings) -> Iterator[Section]:
    """Energies of a mapped file, and the memory that they take."""
    rows = settings.table_rows
    with temporary_folder() as folder:
        most = max(MEMORY_ROWS) * rows
        room = shutil.disk_usage(folder).free > most * BYTES_OF_A_ROW
        memory.prepare(folder, most if room else rows)
        task = Task(table_rows=rows, folder=str(folder))
        found = measure(
            [
                Contestant("skood", "table_skood", task),
                Contestant("bare loop", "table_bare", task),
            ],
            settings.repeats,
        )
        targets = {"bare loop": Target(0.9)}
        yield Section(
            Table(
                f"Scoring a mapped file of {rows} rows with the default network",
                RATIOS,
                ratios("energies, float32", found, targets, rows),
                n_names=2,
            ),
            remarks(found, f"{memory.N_COLUMNS} columns of float32, on the CPU."),
        )
        yield memory_section(folder, rows, room)


def memory_section(folder: Path, rows: int, room: bool) -> Section:
    """RssAnon above that after the imports, as memory.py measures it."""
    lines, left_out = [], []
    for times in MEMORY_ROWS:
        if sys.platform != "linux":
            left_out.append(f"{times * rows} rows left out: RssAnon is in /proc of Linux alone")
        elif times > 1 and not room:
            left_out.append(f"{times * rows} rows left out: no room for their file on the disk")
        else:
            case = memory.run("score_samples", times * rows, str(folder))
            above = (case["peak"] - case["before"]) / MB
            cells = Target(200, at_most=True, unit=" MB").cells(above)
            lines.append([str(times * rows), f"{case['X'] / MB:.1f}", f"{above:.1f}", *cells])
    columns = ["rows", "X, MB", "peak above the imports, MB", "target", "met"]
    title = "Memory of skood scoring a mapped file"
    return Section(Table(title, columns, lines), "\n".join(f"- {line}" for line in left_out))


def one_row(settings: Settings) -> Iterator[Section]:
    """A call of decision_function on one row."""
    lines, results = [], []
    for network, title in {"default": "default MLP", "resnet20": "ResNet-20"}.items():
        task = base_task(settings, network=network, calls=CALLS[network])
        found = measure(
            [Contestant("skood", "row_skood", task), Contestant("bare forward", "row_bare", task)],
            settings.repeats,
        )
        lines += ratios(title, found, {}, rows=1, scale=1e3)
        if all(result.finished for result in found):
            skood, bare = (result.median() for result in found)
            value, target = skood / bare, Target(1.3, at_most=True, unit=" times its time")
            if network == "default":
                value, target = 1e3 * (skood - bare), Target(0.3, at_most=True, unit=" ms more")
            lines[-1][-2:] = target.cells(value)
        results += found
    columns = [*RATIOS[:2], "ms", *RATIOS[3:]]
    calls = f"Medians of {CALLS['default']} calls (MLP) and {CALLS['resnet20']} (ResNet-20)."
    yield Section(
        Table("decision_function on one row", columns, lines, n_names=2), remarks(results, calls)
    )


def importing(settings: Settings) -> Iterator[Section]:
    """Importing skood once torch and scikit-learn are there, in fresh interpreters."""

    def interpreter() -> list[float]:
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return list(map(float, done.stdout.split()))

    interpreter()
    n_times = max(IMPORTS, settings.repeats)
    before, ours = zip(*[interpreter() for _ in range(n_times)], strict=True)
    lines = [
        ["torch, sklearn", spread(before), *NO_TARGET],
        ["skood, after these", spread(ours), *Target(0.2, True, " s").cells(median(ours))],
    ]
    columns = ["import", "seconds", "target", "met"]
    yield Section(Table(f"Importing skood, {n_times} interpreters", columns, lines))


def searching(settings: Settings) -> Iterator[Section]:
    """A search over scores beside a search of one candidate, which trains as often."""
    task = base_task(settings, epochs=SEARCH_EPOCHS, shared=True)
    alone, others = ("energy",), ("energy", *OTHER_SCORES)

    def of(name: str, scores: tuple[str, ...], **changes: Any) -> Contestant:
        return Contestant(name, "search_skood", dataclasses.replace(task, scores=scores, **changes))

    found = measure(
        [
            of("one score", alone),
            of(f"{len(others)} scores", others),
            of("the same, and two_views", (*others, "two_views")),
            of("one score, memory=None", alone, shared=False),
        ],
        settings.repeats,
    )
    work, first = f"{SEARCH_EPOCHS} epochs, 2 folds", found[0]
    lines = []
    for result in found:
        if result.finished and first.finished:
            ratio = result.median() / first.median()
            target = Target(1.5, at_most=True, unit=" times")
            cells = target.cells(ratio) if result is found[1] else NO_TARGET
            lines.append([work, result.name, spread(result.values()), digits(ratio), *cells])
    columns = ["work", "searched", "seconds", "its time / that of one score", "target", "met"]
    title = f"GridSearchCV over scores, ResNet-20, {settings.train_rows} images"
    note = "two_views holds rows out of training, so its candidate is trained apart."
    yield Section(Table(title, columns, lines, n_names=2), remarks(found, note))


def compiling(settings: Settings) -> Iterator[Section]:
    """What the compiler takes, what a step saves by it, and from how many steps on that pays."""
    lines, all_found = [], []
    for network, name in COMPILED_NETWORKS.items():
        task = base_task(settings, network=network, epochs=COMPILED_EPOCHS)
        plain, compiled = found = measure(
            [
                Contestant(name, "train_steps", task),
                Contestant(
                    f"{name}, compile=True",
                    "train_steps",
                    dataclasses.replace(task, compile=True),
                    environment=WITHOUT_CACHES,
                ),
            ],
            settings.repeats,
        )
        all_found += found
        if plain.finished and compiled.finished:
            saved, wait = plain.median() - compiled.median(), compiled.median("compiler")
            steps = f"{math.ceil(wait / saved):,}" if saved > 0 else "never"
            ratio = digits(compiled.median() / plain.median())
            seconds = [spread(result.values()) for result in found]
            lines.append([name, *seconds, ratio, spread(compiled.values("compiler")), steps])
    columns = [
        "network",
        "a step, s",
        "compiled",
        "ratio",
        "the compiler took, s",
        "pays from, steps",
    ]
    yield Section(
        Table("Training with compile=True, steps of 128 images", columns, lines), remarks(all_found)
    )


def on_a_device(settings: Settings) -> Iterator[Section]:
    """What a GPU is for: absolute times, beside what its arithmetic would allow."""
    native = has_native_bfloat16(settings.device)
    task = base_task(settings, network=DEVICE_NETWORK)
    scored = dataclasses.replace(task, precision="bfloat16" if native else "float32")
    arithmetic, *found = measure(
        [
            Contestant("matrix product", "multiply_matrices", task),
            Contestant("skood", "train_skood", task),
            Contestant("bare loop", "train_bare", task),
            authors(task),
            Contestant("skood", "score_skood", scored),
            Contestant("bare module", "score_bare", scored),
        ],
        settings.repeats,
    )
    epoch, scores = found[:3], found[3:]
    lines = ratios("one epoch", epoch, {}, settings.train_rows)
    lines += limit("one epoch", arithmetic, epoch[0], 3 * settings.train_rows, settings.train_rows)
    void = "" if settings.device.type == "cuda" else "needs a GPU"
    scoring_lines = ratios("scoring", scores, {}, settings.test_rows)
    if scores[0].finished:
        rate = settings.test_rows / scores[0].median()
        scoring_lines[0][-2:] = Target(100_000, unit=" a second", void=void).cells(rate)
    lines += scoring_lines
    lines += limit("scoring", arithmetic, scores[0], settings.test_rows, settings.test_rows)
    what = f"training on {settings.train_rows} images, scoring {settings.test_rows}"
    yield Section(
        Table(f"WideResNet-40-2 on {settings.device.type}: {what}", RATIOS, lines, n_names=2),
        remarks(
            [arithmetic, *found],
            "The limit is the arithmetic of a forward, three times that in training, at the speed "
            "of the matrix product.",
        ),
    )
    epochs = DEVICE_EPOCHS.get(settings.device.type, DEVICE_EPOCHS["cpu"])
    long = dataclasses.replace(task, epochs=epochs)
    (whole,) = measure([Contestant("skood", "train_skood", long)], settings.repeats)
    if whole.finished:
        seconds = whole.values("whole")
        cells = Target(30, at_most=True, unit=" s", void=void).cells(median(seconds))
        rate = f"{settings.train_rows * epochs / median(seconds):,.0f}"
        title = f"WideResNet-40-2 on {settings.device.type}: a whole fit"
        columns = ["epochs", "seconds", "images a second", "target", "met"]
        yield Section(
            Table(title, columns, [[str(epochs), spread(seconds), rate, *cells]]), remarks([whole])
        )


def limit(work: str, arithmetic: Result, ours: Result, forwards: int, rows: int) -> list[list[str]]:
    """The line of what the hardware could do, and the share of it that is reached."""
    if not (arithmetic.finished and ours.finished):
        return []
    seconds = forwards * arithmetic.median("of_an_image") / max(arithmetic.values("per_second"))
    share = digits(seconds / ours.median())
    return [[work, "arithmetic limit", digits(seconds), f"{rows / seconds:,.0f}", share, "", ""]]


def tips(settings: Settings) -> Iterator[Section]:
    """What settings of the environment do to skood alone."""
    task = base_task(settings)
    variants, left_out = environments()
    for title, work, rows in (
        (f"Scoring {settings.test_rows} images", "score_skood", settings.test_rows),
        (
            f"Training, one epoch on {settings.train_rows} images",
            "train_skood",
            settings.train_rows,
        ),
    ):
        contestants = [
            Contestant(name, work, task, environment=variables)
            for name, variables in variants.items()
        ]
        if work == "score_skood":
            compiled = dataclasses.replace(task, compile=True)
            contestants.append(Contestant("compile=True", work, compiled))
        found = measure(contestants, settings.repeats)
        yield compared(f"{title}, ResNet-20, by environment", found, rows, left_out)
    with temporary_folder() as folder:
        n_files = min(FILES, settings.test_rows)
        if importlib.util.find_spec("PIL") is not None:
            write_images(folder, n_files)
        found = measure(
            [
                Contestant(
                    f"num_workers={workers}",
                    "score_files",
                    dataclasses.replace(task, folder=str(folder), workers=workers),
                    ("PIL",),
                )
                for workers in (0, 1, 2)
            ],
            settings.repeats,
        )
        yield compared(f"Scoring {n_files} PNG files, ResNet-20", found, n_files, [])


def environments() -> tuple[dict[str, dict[str, str]], list[str]]:
    """Variables by what they are called in the tables, and what is not to be had here."""
    found = {
        "default": {},
        " ".join(f"{name}={value}" for name, value in KEPT_MEMORY.items()): KEPT_MEMORY,
        "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
        f"OMP_NUM_THREADS={cores()}": {"OMP_NUM_THREADS": str(cores())},
        "THP_MEM_ALLOC_ENABLE=1": {"THP_MEM_ALLOC_ENABLE": "1"},
    }
    library = find_jemalloc()
    if library is None:
        return found, ["jemalloc left out, no libjemalloc.so.2 was found: install libjemalloc2"]
    return found | {f"LD_PRELOAD={Path(library).name}": {"LD_PRELOAD": library}}, []


def find_jemalloc() -> str | None:
    paths = [str(path) for pattern in JEMALLOC for path in sorted(Path("/").glob(pattern[1:]))]
    return paths[0] if paths else ctypes.util.find_library("jemalloc")


def compared(title: str, found: Sequence[Result], rows: int, left_out: list[str]) -> Section:
    """A table of settings against the first of them."""
    first, lines = found[0], []
    for result in found:
        if result.finished:
            figures = [spread(result.values()), f"{rows / result.median():,.0f}"]
            speed = digits(speed_ratio(result, first)) if first.finished else NO_FIGURE
            lines.append([result.name, *figures, speed])
    columns = ["setting", "seconds", "a second", "its speed / the first's"]
    return Section(
        Table(title, columns, lines), remarks([r for r in found if not r.finished], *left_out)
    )


GROUPS: dict[str, Callable[[Settings], Iterator[Section]]] = {
    "training": training,
    "scoring": scoring,
    "table": scoring_a_table,
    "one-row": one_row,
    "import": importing,
    "search": searching,
    "compile": compiling,
    "device": on_a_device,
    "tips": tips,
}


def base_task(settings: Settings, **changes: Any) -> Task:
    return Task(
        id=None if settings.id is None else str(settings.id),
        train_rows=settings.train_rows,
        test_rows=settings.test_rows,
        device=str(settings.device),
        **changes,
    )


def cores() -> int:
    return os.cpu_count() or 1


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# The script


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the groups that are asked for, and write each as it is done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        serve(argv[1])
        return
    settings = parse(argv)
    command = environment.command_line("benchmarks/speed.py", argv)
    facts = {"command": command, "machine": machine(settings.device), "versions": versions()}
    sections: list[Section] = []
    try:
        write(settings.out, facts, sections)
    except OSError as error:
        sys.exit(f"error: --out {settings.out} cannot be written: {error.strerror}.")
    data = "random images" if settings.id is None else settings.id.name
    print(f"# {TITLE}\n", *(f"- {name}: {fact}" for name, fact in facts.items()), sep="\n")
    print(f"- images: {data}\n- rounds: {settings.repeats}, after one that does not count\n")
    failures: list[str] = []
    for name in settings.only:
        say(f"{name} ...")
        try:
            for section in GROUPS[name](settings):
                print(section.markdown(), end="\n\n", flush=True)
                sections.append(section)
                write(settings.out, facts, sections)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{name} failed, {type(error).__name__}: {error}")
            say(failures[-1])
    if failures:
        sys.exit(f"error: {'; '.join(failures)}")


def parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=list(GROUPS),
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)} (default: all, device where there is a GPU)",
    )
    add(
        "--id",
        type=Path,
        metavar="FILE.npz",
        help="images of 32 by 32, as paper.py takes them; a short file is read again from its "
        "start (default: random ones, as speed does not depend on the values)",
    )
    add("--train-rows", type=count, default=6400, help=f"a multiple of {BATCH} (default: 6400)")
    add("--test-rows", type=count, default=10_000, help="images to score (default: 10000)")
    add("--table-rows", type=count, default=1_000_000, help="of the file (default: 1000000)")
    add(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=PRECISIONS,
        help="to score in (default: both; bfloat16 takes long where it is not in hardware)",
    )
    add("--repeats", type=count, default=5, help="rounds that count (default: 5)")
    add("--device", default="auto", help="of all but the file of rows (default: auto)")
    add("--out", type=Path, metavar="FILE.json", help="where to keep the tables")
    settings = parser.parse_args(argv)
    if settings.train_rows % BATCH:
        parser.error(f"--train-rows {settings.train_rows} is not a multiple of the batch, {BATCH}")
    try:
        settings.device = resolve_device(settings.device)
        if settings.id is not None:
            check_images(settings.id)
    except ValueError as error:
        parser.error(str(error))
    if settings.only is None:
        settings.only = [g for g in GROUPS if g != "device" or settings.device.type == "cuda"]
    return settings


def check_images(path: Path) -> None:
    arrays = read_id(path)
    shape = arrays["x_train"].shape[1:]
    if shape != IMAGE or arrays["y_train"].max() >= peers.N_CLASSES:
        raise ValueError(
            f"--id {path} has images of {shape} in {arrays['y_train'].max() + 1} classes; expected "
            f"{IMAGE} and at most {peers.N_CLASSES}, as those of CIFAR-10."
        )


def machine(device: torch.device) -> str:
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.processor()
    facts = [name or "unknown processor", environment.machine()]
    if device.type == "cuda":
        facts.append(torch.cuda.get_device_name(device))
    native = "in" if has_native_bfloat16(device) else "not in"
    return ", ".join([*facts, f"bfloat16 {native} hardware on {device.type}"])


def versions() -> str:
    others = []
    for name in ("torchvision", "pytorch-ood", "oodeel", "skorch"):
        try:
            others.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            others.append(f"no {name}")
    return ", ".join([environment.versions(), *others])


def write(path: Path | None, facts: dict[str, str], sections: Sequence[Section]) -> None:
    """The tables so far; the file is whole at any time."""
    if path is None:
        return
    content = {"title": TITLE, **facts, "tables": [section.as_json() for section in sections]}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
