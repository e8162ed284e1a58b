"""How many streams without a change raise an alarm, and how soon a change raises one.

Streams of scores of a classifier on real images, through `skood.monitoring` and through what other
libraries have: MAPIE (`pip install mapie`), river (`pip install river`), and nonconform, which
needs Python 3.12 and so an interpreter of its own (`--nonconform PYTHON`). What is not installed is
left out. Scores are kept in `--scores`, as they take longest. Prints Markdown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from environment import command_line, machine, versions
from images import add_data_options, complete, draw, read_data, read_network, untrained
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from skood.exchangeability import Martingale, OnlinePValues, payoffs

Scores = NDArray[np.float64]
Watch = Callable[[list[Scores], list[Scores]], NDArray[np.int64]]

NEVER = np.iinfo(np.int64).max
CALIBRATION_ROWS = (39, 100, 300, 2500)
CLEAN_ROWS = 500
DRIFT_ROWS = 2000
BLOCK = 500


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_options(parser)
    add = parser.add_argument
    add("--rows", type=int, default=4000, help="images that drift (default: 4000)")
    add("--streams", type=int, default=1000, help="streams without a change (default: 1000)")
    add("--length", type=int, default=10_000, help="rows of each of them (default: 10000)")
    add("--peer-streams", type=int, default=100, help="of other libraries (default: 100)")
    add("--peer-length", type=int, default=2000, help="rows of each of them (default: 2000)")
    add("--repeats", type=int, default=100, help="streams with a change (default: 100)")
    add("--false-alarm", type=float, default=0.01, help="chosen for all (default: 0.01)")
    add("--nonconform", metavar="PYTHON", help="an interpreter that has nonconform")
    add("--scores", type=Path, metavar="FILE.npz", help="where scores are kept")
    options = parser.parse_args(arguments)
    complete(options)
    scores = scored(options)
    watches = dict(all_watches(options))
    print(f"- command: `{command_line('benchmarks/monitoring.py', arguments)}`")
    print(f"- versions: {versions()}\n- machine: {machine()}\n")
    false_alarms(options, watches)
    delays(options, watches, scores)


# Scores


def scored(options: argparse.Namespace) -> dict[str, Scores]:
    if options.scores is not None and options.scores.is_file():
        with np.load(options.scores) as kept:
            return dict(kept)
    data = read_data(options.id, options.ood)
    module = read_network(options, data.n_classes)
    detector = untrained(module, options, data, n_rows=2000)
    order = draw(len(data.x_test), None, 0)
    drifting, clean = data.x_test[order[: options.rows]], data.x_test[order[options.rows :]]
    sets = kinds(drifting) | {name: x[: options.rows] for name, x in data.ood.items()}
    sets = {"clean": clean, "unchanged": drifting} | sets
    scores = {name: detector.score_samples(x) for name, x in sets.items()}
    if options.scores is not None:
        np.savez(options.scores, **scores)
    return scores


def kinds(x: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """The same images, changed."""
    values = x.astype(np.float32)

    def blurred(width: float) -> NDArray[np.float32]:
        return gaussian_filter(values, (0, width, width, 0))

    changed = {
        "blur 0.5": blurred(0.5),
        "blur 0.7": blurred(0.7),
        "blur 1.0": blurred(1.0),
        "darker by 20 %": 0.8 * values,
        "darker by 40 %": 0.6 * values,
        "darker by 60 %": 0.4 * values,
        "scale 0..127": values / 2,
        "contrast 1.3": (values - 128) * 1.3 + 128,
    }
    return {name: np.clip(v.round(), 0, 255).astype(np.uint8) for name, v in changed.items()}


# What watches: first rows at which there is an alarm, for streams after their calibration rows


def all_watches(options: argparse.Namespace) -> Iterator[tuple[str, Watch]]:
    level = options.false_alarm
    yield "skood", lambda calibration, streams: of_skood(calibration, streams, level)
    yield "calibration rows alone", lambda c, s: of_skood(c, s, level, alone=True)
    try:
        import mapie.exchangeability_testing  # noqa: F401

        yield "MAPIE", lambda calibration, streams: of_mapie(calibration, streams, level)
    except ImportError as error:
        print(f"- without MAPIE: {error}")
    try:
        import river.drift  # noqa: F401

        yield "ADWIN", lambda calibration, streams: of_adwin(calibration, streams, level)
    except ImportError as error:
        print(f"- without river: {error}")
    if options.nonconform:
        yield "nonconform", lambda c, s: of_nonconform(c, s, level, options.nonconform)


def of_skood(
    calibration: list[Scores], streams: list[Scores], level: float, alone: bool = False
) -> NDArray[np.int64]:
    """The monitor's martingale; `alone` takes p-values against the calibration rows alone."""
    watched = [OnlinePValues(c, seed) for seed, c in enumerate(calibration)]
    if alone:
        uniforms = np.random.default_rng(0)
        ordered = [np.sort(c) for c in calibration]
    martingale, first = Martingale((len(streams),)), np.full(len(streams), NEVER)
    for start in range(0, len(streams[0]), BLOCK):
        pieces = [stream[start : start + BLOCK] for stream in streams]
        if alone:
            p_values = [
                (np.searchsorted(c, piece) + uniforms.random(len(piece))) / (len(c) + 1)
                for c, piece in zip(ordered, pieces, strict=True)
            ]
        else:
            p_values = [w.update(piece) for w, piece in zip(watched, pieces, strict=True)]
        path = martingale.update(payoffs(np.clip(np.transpose(p_values), 1e-300, 1)))
        above = path >= -np.log(level)
        found = above.any(axis=0) & (first == NEVER)
        first[found] = start + above.argmax(axis=0)[found]
    return first


def of_mapie(calibration: list[Scores], streams: list[Scores], level: float) -> NDArray[np.int64]:
    """Its jumper, with the energy for a conformity score, after the calibration rows."""
    from mapie.exchangeability_testing import OnlineMartingaleTest

    class OfScores(OnlineMartingaleTest):
        def _compute_non_conformity_scores(self, X: Scores, y: Scores) -> Scores:
            return X[:, 0]

    first = []
    for seed, (before, stream) in enumerate(zip(calibration, streams, strict=True)):
        test = OfScores(
            task="regression", test_level=level, warn=False, burn_in=1, random_state=seed
        )
        test.conformity_score_history = before.tolist()
        first.append(NEVER)
        for start in range(0, len(stream), 100):
            piece = stream[start : start + 100]
            test.update(piece[:, None], piece)
            values = np.array(test.martingale_value_history)
            if (values >= 1 / level).any():
                first[-1] = int((values >= 1 / level).argmax())
                break
    return np.array(first)


def of_adwin(calibration: list[Scores], streams: list[Scores], level: float) -> NDArray[np.int64]:
    """ADWIN with delta = `level`, which bounds the false alarms of one step."""
    from river.drift import ADWIN

    first = []
    for before, stream in zip(calibration, streams, strict=True):
        low, high = before.min(), before.max()
        adwin = ADWIN(delta=level)
        alarms = []
        for value in np.clip((np.concatenate([before, stream]) - low) / (high - low), 0, 1):
            adwin.update(value)
            alarms.append(adwin.drift_detected)
        after = alarms[len(before) :]
        first.append(after.index(True) if True in after else NEVER)
    return np.array(first)


def of_nonconform(
    calibration: list[Scores], streams: list[Scores], level: float, interpreter: str
) -> NDArray[np.int64]:
    """Its Simple Jumper with restarts, in another interpreter."""
    script = Path(__file__).with_name("monitoring_nonconform.py")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npy"
        np.savez(given, calibration=calibration, streams=streams, level=level)
        subprocess.run([interpreter, script, given, found], check=True)
        first = np.load(found)
    return np.where(first < 0, NEVER, first)


# Tables


def false_alarms(options: argparse.Namespace, watches: dict[str, Watch]) -> None:
    """Uniform scores stand for all continuous ones, as only their order counts."""
    rng = np.random.default_rng(0)
    print(f"Streams without a change that raise an alarm, chosen: {options.false_alarm:.1%}\n")
    print("| | streams | rows | " + " | ".join(f"m = {m}" for m in CALIBRATION_ROWS) + " |")
    print("|---|---" + "|---" * (1 + len(CALIBRATION_ROWS)) + "|")
    for name, watch in watches.items():
        ours = name in {"skood", "calibration rows alone"}
        n_streams = options.streams if ours else options.peer_streams
        length = options.length if ours else options.peer_length
        cells = []
        for m in CALIBRATION_ROWS:
            calibration, streams = list(rng.random((n_streams, m))), rng.random((n_streams, length))
            cells.append(f"{np.mean(watch(calibration, list(streams)) < NEVER):.1%}")
        print(f"| {name} | {n_streams} | {length} | " + " | ".join(cells) + " |", flush=True)


def delays(
    options: argparse.Namespace, watches: dict[str, Watch], scores: dict[str, Scores]
) -> None:
    rng = np.random.default_rng(1)
    clean = scores["clean"]
    for m in (300, 2500):
        print(f"\nRows until the alarm, m = {m}, after {CLEAN_ROWS} rows without a change: median")
        print("(and the nine tenths that were quicker), of those that raised none before it\n")
        print("| change | rejected | " + " | ".join(watches) + " |")
        print("|---|---" + "|---" * len(watches) + "|")
        offset = np.quantile(clean, 0.05)
        for name, drifting in drifts(scores).items():
            calibration, streams = [], []
            for _ in range(options.repeats):
                rows = clean[rng.permutation(len(clean))[: m + CLEAN_ROWS]]
                calibration.append(rows[:m])
                streams.append(np.concatenate([rows[m:], drifting(rng)]))
            share = f"{np.mean([stream[CLEAN_ROWS:] < offset for stream in streams]):.1%}"
            cells = [delay(watch(calibration, streams)) for watch in watches.values()]
            print(f"| {name} | {share} | " + " | ".join(cells) + " |", flush=True)


def drifts(
    scores: dict[str, Scores],
) -> dict[str, Callable[[np.random.Generator], Scores]]:
    """Rows after the change, by its name: all of them changed, one in ten, or more and more."""

    def mixed(name: str, shares: Scores) -> Callable[[np.random.Generator], Scores]:
        def rows(rng: np.random.Generator) -> Scores:
            old, new = (rng.choice(scores[n], len(shares)) for n in ("unchanged", name))
            return np.where(rng.random(len(shares)) < shares, new, old)

        return rows

    changes = [name for name in scores if name not in {"clean", "unchanged"}]
    found = {name: mixed(name, np.ones(DRIFT_ROWS)) for name in changes}
    found |= {f"{n}, one row in ten": mixed(n, np.full(DRIFT_ROWS, 0.1)) for n in changes[-2:]}
    slowly = np.linspace(0, 1, DRIFT_ROWS)
    return found | {f"{changes[2]}, more and more": mixed(changes[2], slowly)}


def delay(first: NDArray[np.int64]) -> str:
    late = np.where(first == NEVER, np.inf, first - CLEAN_ROWS + 1.0)[first >= CLEAN_ROWS]
    shown = [
        f"> {DRIFT_ROWS}" if np.isinf(value) else f"{value:.0f}"
        for value in (np.quantile(late, q, method="higher") for q in (0.5, 0.9))
    ]
    return f"{shown[0]} ({shown[1]})"


if __name__ == "__main__":
    main()
