"""How fast an exported detector is, beside the detector itself.

Latency of one row and throughput of a batch, on one thread. The contestants work in turn, A B C D A
B C D, so that whatever slows the machine slows all of them; the figures are medians, and the first
rounds do not count. The detector gives decisions alone (`predict`), the others all four outputs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits

from skood import SparseEnergyOODDetector
from skood.networks import CifarResNet, NormalizeImages

SECONDS = 0.2
"""How long a contestant repeats a call in one turn, at least."""


def detectors() -> dict[str, tuple[SparseEnergyOODDetector, np.ndarray]]:
    """Detectors by name, each with rows."""
    X, y = load_digits(return_X_y=True)
    X = X.astype(np.float32)
    columns = SparseEnergyOODDetector(random_state=0, pretrain_epochs=5, max_epochs=1).fit(X, y)
    images = np.random.RandomState(0).randint(256, size=(400, 32, 32, 3)).astype(np.uint8)
    torch.manual_seed(0)
    network = CifarResNet(20)
    normalize = NormalizeImages([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    resnet = SparseEnergyOODDetector(
        network, preprocess=normalize, max_epochs=0, random_state=0
    ).fit(images)
    return {"64 columns, built network": (columns, X), "ResNet-20, bytes": (resnet, images)}


def contestants(detector: SparseEnergyOODDetector, X: Any) -> dict[str, Callable[[Any], Any]]:
    """Ways to judge rows, by name."""
    module = detector.as_module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        for name in ("detector.onnx", "detector.pt2"):
            detector.export(Path(folder) / name, X)
        session = onnxruntime.InferenceSession(Path(folder) / "detector.onnx", options)
        loaded = torch.export.load(Path(folder) / "detector.pt2").module()

    def run(graph: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def judged(rows: Any) -> Any:
            with torch.inference_mode():
                return graph(torch.from_numpy(rows))

        return judged

    return {
        "detector": detector.predict,
        "as_module()": run(module),
        ".pt2": run(loaded),
        ".onnx": lambda rows: session.run(None, {"rows": rows}),
    }


def seconds(call: Callable[[Any], Any], rows: Any) -> float:
    """Median time of one call in one turn."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < SECONDS:
        before = time.perf_counter()
        call(rows)
        times.append(time.perf_counter() - before)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| detector | run by | one row | beside the detector | rows a second | beside it |")
    print("|---|---|---|---|---|---|")
    for name, (detector, X) in detectors().items():
        calls = contestants(detector, X)
        times: dict[tuple[str, int], list[float]] = {}
        for turn in range(options.rounds + 1):
            for size in (1, options.batch):
                for kind, call in calls.items():
                    taken = seconds(call, X[:size])
                    if turn:
                        times.setdefault((kind, size), []).append(taken)
        medians = {key: median(taken) for key, taken in times.items()}
        for kind in calls:
            one, many = medians[kind, 1], medians[kind, options.batch]
            ratios = medians["detector", 1] / one, medians["detector", options.batch] / many
            print(
                f"| {name} | {kind} | {1e3 * one:.2f} ms | {ratios[0]:.1f} x | "
                f"{options.batch / many:,.0f} | {ratios[1]:.1f} x |"
            )


if __name__ == "__main__":
    main()
