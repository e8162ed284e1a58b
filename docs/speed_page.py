"""The page of speed, from the files in benchmarks/results/speed: new ones need no line here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from tables import Table  # noqa: E402

INTRODUCTION = """\
What training and scoring take, and what skood does about it. ``benchmarks/speed.py`` and
``benchmarks/precision.py`` make the figures here, by the command that stands above them. How fast
skood is depends on the machine and on what else runs there, so a comparison is a ratio: of the
medians of two things that were timed in turn, in one run. Compare ratios across machines, not
times."""

CHOICES = """\
What skood does to be fast
--------------------------

- **Rows are sliced**, a batch at a time, from the array, memory map or tensor that they are in. No
  row takes a Python call of its own, unless it must be loaded, as those of data sets and
  references are, ahead of their use by worker processes.
- **Scoring runs on shapes of its own**, apart from the training batch. The largest is chosen for
  throughput: as many rows as make the largest tensor of the network fill the cache of a CPU, or
  keep a GPU busy. Fewer rows are padded to a smaller one of a ladder of shapes, of which those are
  kept that give the same bits on trial rows. (A single image may run unpadded, and agrees to 1e-5.)
- **Images are in channels_last**, in the network and in its batches, the layout in which
  convolutions are fastest.
- **Networks with convolutions train in bfloat16** where the CPU or GPU has it in hardware. They
  score in their own precision.
- **Freed memory is kept** for the next batch, on a CPU with glibc, so that the system need not
  clear new pages for each.
- **The data move to a GPU once**, for all epochs of ``fit``, where they take at most a quarter of
  its free memory. Otherwise, and in scoring, each batch moves while that before it is in use.
- **Training on a GPU replays CUDA graphs**, in trainings of at least 50 steps: the kernels of a
  forward pass are launched at once, and so are those of a backward pass, as Python cannot launch
  them as fast as the GPU is done with them. A graph repeats what Python did when it was recorded.
  So a network is watched in one step first: where it draws random numbers on the host, changes an
  attribute of its own or reads a value from the GPU, it trains without graphs. So it does where a
  graph, tried with other weights, gives anything else than the network. (What a forward does to
  variables outside the network, or by the clock, is not seen.) Batches of another size, fits in a
  thread or on several processes, and TorchScript run without graphs.

``verbose=1`` prints what was picked before training, and the fitted attributes ``device_``,
``precision_`` and ``execution_`` hold it. ``device``, ``precision`` and ``compile`` change it."""

PRECISION = """\
Scoring in bfloat16
-------------------

Scoring is in bfloat16 where you ask for it, with ``precision="bfloat16"``, and never by itself.
bfloat16 has 8 significant bits, so scores move by some thousandths, and rows near the threshold
change sides. The tables "Scored in bfloat16, less float32" below say what that costs in detection.
A threshold belongs to the precision that placed it: calibrate in the one that scores. On a machine
without bfloat16 in hardware it is also several times slower than float32."""

COMPILE = """\
compile=True
------------

``compile=True`` runs training and scoring through torch.compile. The first batch waits for the
compiler, so it pays for long trainings and for many rows. Scoring then has one shape, as each would
be compiled by itself: a few rows take as long as a full batch. A CPU needs a C++ compiler for it,
and training on several processes refuses it. Training that can replay CUDA graphs leaves the
compiler out. Try it before you rely on it: for ResNet-20 on two cores it gained nothing (the
tables of cpu_tips below)."""

TIPS = """\
Tips
----

- Pass many rows in one call. A call of ``score_samples`` has a price of its own, which a thousand
  calls pay a thousand times.
- Pass images as files have them, in uint8, with ``preprocess=NormalizeImages(mean, std)``: a
  quarter of the bytes of float32 to hold, read and move.
- Give each process a thread for each core that it has to itself (``OMP_NUM_THREADS``). Two threads
  on two cores made scoring 1.7 and training 1.6 times as fast as one (cpu_tips). But give each
  worker of a search one: threads that wait for each other on a busy machine take longer than one.
- Leave the allocator as it is. Telling glibc to keep more memory made scoring 1.03 and training
  1.07 times as fast, and transparent huge pages nothing clear, both within the noise; jemalloc with
  its defaults made them slower, 0.7 and 0.8 times as fast (cpu_tips).
- Load files in this process (``num_workers=0``) where loading is quick beside the network, as of
  small PNG files: workers take the cores that it needs, and made scoring 0.75 times as fast on two
  of them (cpu_tips). They are for what takes long to decode, and for GPUs.
- Leave ``precision="auto"``: it trains in bfloat16 where that is faster, and scores in the
  network's own precision.
- Mind what a score takes: "energy", "msp" and "max_logit" one forward; those with statistics also a
  pass over the training rows in ``fit``; "odin" two forwards and a backward.
- Pass ``memory=`` and a ``random_state`` where fits repeat: one that was made before is loaded."""

FINDINGS = """\
Findings
--------

The tables below hold what was measured, a section for each run: on two cores without bfloat16 in
hardware, and on a GPU (H200). Nothing yet shows what bfloat16 gives on a CPU that has it. Lines
that miss their target say so.

- Scoring images runs as fast as the bare module, and 1.4 to 2.0 times as fast as the other
  libraries in float32; the target is 2. Convolutions take nearly all of the time, so there is
  little more to gain without lower precision.
- Scoring a mapped file of a million rows runs as fast as a bare loop, in 25 MB of memory, and in
  102 MB for ten million rows, of which 80 MB are the scores.
- A row alone takes 0.2 ms more than a bare forward of the default network, and an image 1.1 times
  as long as one of ResNet-20.
- Training in float32 is bound by arithmetic, so all loops are near each other: skood's runs at
  0.95 to 0.97 of the bare loop's speed, is 1.15 to 1.3 times as fast as the authors' and 1.1
  times as fast as skorch's. The target of 3 is for bfloat16. The whole fit takes 1.06 to 1.11 of
  its one epoch, for trials and calibration.
- On an H200, WideResNet-40-2 trains on 24,000 images a second, 2.4 times as fast as a loop of the
  same steps without graphs, and 3.8 times as fast as the authors'; ten epochs of CIFAR-10's size
  take 21 s. It scores 150,000 images a second from the host's memory in bfloat16, 0.88 of what
  the bare module does with images that are on the GPU and normalised already. Both are far from
  the limit of the arithmetic, as layers this narrow are bound by memory. (These figures were taken
  before graphs were compared with their network, which costs a training some ten steps.)
- Scoring in bfloat16 moved no AUROC of ResNet-20 by more than 0.08 points and no FPR95 by more
  than 0.62, on any of six sets, untouched and fine-tuned with two seeds: less than the sampling
  error of a set. In a table nobody would notice; in single rows one would, as up to 0.7 % of the
  decisions on outliers flip, and scores move by 0.4 % at the median and by up to 4.5 %. So it stays
  a choice.
- The head in float32 hardly helps, as the features that enter it are rounded already."""

NOTHING = "There are no measurements in ``benchmarks/results/speed`` yet."


def section(name: str, run: dict[str, Any]) -> Iterator[str]:
    """One run: its facts and tables."""
    yield heading(f"{escaped(run['title'])} ({escaped(name)})", "-")
    yield f".. code-block:: text\n\n   {run['command']}"
    yield f"- machine: {escaped(run['machine'])}\n- versions: {escaped(run['versions'])}"
    for entry in run["tables"]:
        title = escaped(entry["title"])
        columns = [escaped(text) for text in entry["columns"]]
        lines = [[escaped(text) for text in line] for line in entry["lines"]]
        # A table without a body is an error.
        yield Table(title, columns, lines).rst() if lines else f"{title}: no figures."
        yield note(entry["note"])


def note(text: str) -> str:
    """A paragraph, or a list of lines that begin with a dash."""
    lines = [line.partition("- ") for line in text.splitlines()]
    if all(dash and not before for before, dash, _ in lines):
        return "\n".join(f"- {escaped(line)}" for *_, line in lines)
    return escaped(text)


def heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}"


def escaped(text: str) -> str:
    """Text that reads as it is written; a cell of nothing but a dash would be a list."""
    text = re.sub(r"([\\*`|_])", r"\\\1", " ".join(text.split()))
    return f"\\{text}" if re.match(r"[-+•]( |$)", text) else text


def write(folder: Path, source: Path = BENCHMARKS / "results" / "speed") -> None:
    """Write the page into a folder."""
    folder.mkdir(exist_ok=True)
    parts = [heading("Speed", "="), INTRODUCTION, CHOICES, PRECISION, COMPILE, TIPS]
    paths = sorted(source.glob("*.json"))
    parts += [FINDINGS] if paths else [NOTHING]
    for path in paths:
        parts += section(path.stem, json.loads(path.read_text(encoding="utf-8")))
    (folder / "index.rst").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
