"""A classifier of few images, from a network that others trained on ImageNet.

Loads published weights of EfficientNet-lite0 and trains on some training rows: first a new head on
the features as they are, then the last two stages with it. The other rows go to a file of their
own, so that a detector can be fitted on rows that the classifier has never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from environment import command_line, machine, versions
from images import (
    NORMALISATIONS,
    Data,
    check_available,
    complete,
    count,
    draw,
    existing,
    make_network,
    number,
    quietly_fitted,
    read_id,
)
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from skood import SparseEnergyOODDetector

BATCH = 250
DECAY = 1e-3


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test, and keep the classifier and the rows that it has not seen."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        arrays = read_id(options.id)
        data = Data(**arrays, ood={})
        check_available("--train-rows", options.train_rows, len(data.x_train), options.id)
        torch.manual_seed(options.seed)  # of the new head
        module = make_network(options.network, data.n_classes)
        copy_weights(torch.load(existing(options.weights), weights_only=True), module)
        options.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    order = draw(len(data.x_train), None, options.seed)
    rows, others = order[: options.train_rows], np.sort(order[options.train_rows :])
    preprocess = NORMALISATIONS[options.normalise]
    fit_head(module, preprocess(torch.from_numpy(data.x_train[rows])), data.y_train[rows])
    # Fine-tuning at weight 0 is training by the cross-entropy alone.
    detector = SparseEnergyOODDetector(
        module,
        sparsity_weight=0,
        max_epochs=options.epochs,
        learning_rate=options.learning_rate,
        augment="flip-crop",
        preprocess=preprocess,
        precision="float32",  # on a CPU, bfloat16 slows the convolutions of one channel each
        random_state=options.seed,
        verbose=1,
    )
    quietly_fitted(detector, data, rows)
    name = f"{options.id.stem}_{options.network}"
    torch.save(detector.module_.state_dict(), options.folder / f"{name}.pt")
    unseen = {key: arrays[key][others] for key in ("x_train", "y_train")}
    np.savez(options.folder / f"{options.id.stem}.npz", **{**arrays, **unseen})
    record = {
        "command": command_line("benchmarks/transfer.py", argv),
        "versions": versions(),
        "machine": machine(),
    }
    (options.folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--id", type=Path, required=True, metavar="FILE.npz", help="x_train, y_train, x_test ...")
    add("--network", default="efficientnet_lite0_80", help="default: efficientnet_lite0_80")
    add("--weights", type=Path, required=True, metavar="FILE.pth", help="published state_dict")
    add("--train-rows", type=count, default=6000, help="default: 6000")
    add("--epochs", type=count, default=2, help="default: 2")
    add("--learning-rate", type=number, default=1e-3, help="default: 0.001")
    add("--seed", type=int, default=0, help="of the rows, the head and the order (default: 0)")
    add("--folder", type=Path, required=True, help="where the classifier and the other rows go")
    options = parser.parse_args(argv, argparse.Namespace(normalise=None))
    complete(options)
    return options


def copy_weights(published: dict[str, Tensor], module: nn.Module) -> None:
    """Copy all but the head; the same arrays in the same order, whatever their names."""
    state = module.state_dict()
    own = list(state.items())[:-2]
    theirs = list(published.values())[:-2]
    if [value.shape for _, value in own] != [value.shape for value in theirs]:
        raise ValueError(
            f"the weights are {len(theirs) + 2} arrays that do not fit the network's "
            f"{len(state)}; expected those of EfficientNet-lite0."
        )
    module.load_state_dict(
        state | {name: value for (name, _), value in zip(own, theirs, strict=True)}
    )


def fit_head(module: nn.Module, x: Tensor, y: NDArray[np.int64]) -> None:
    """Fit the last layer to features of images, by the cross-entropy with a little decay."""
    head = module.network.classifier
    module.network.classifier = nn.Identity()
    with torch.no_grad():
        features = torch.cat([module.eval()(images) for images in x.split(BATCH)])
    module.network.classifier = head
    labels = torch.from_numpy(y).long()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


if __name__ == "__main__":
    main()
