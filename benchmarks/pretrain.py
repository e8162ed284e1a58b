"""Train the classifier that a table starts from, by the paper's recipe.

100 epochs of SGD with Nesterov momentum 0.9, learning rate 0.1 falling along a cosine step by
step, weight decay 5e-4, batches of 128, crops with a border of 4 and flips. Images lie on the
device once; on a GPU it trains in bfloat16, compiled. After each epoch the state is kept,
and a run that was interrupted goes on from there. What comes out is the plain state_dict that
paper.py takes as --checkpoint, in bfloat16, and a file of what it is worth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import machine, versions
from images import NORMALISATIONS, Images, count, make_network, read_id
from torch import Tensor, nn
from torch.nn import functional as F

from skood.engine.augmentation import flip_crop

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BATCH = 0.1, 0.9, 5e-4, 128
TEST_BATCH = 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Train, keep, test."""
    options = parse(argv)
    try:
        arrays = read_id(options.id)
        n_classes = int(arrays["y_train"].max()) + 1
        torch.manual_seed(options.seed)
        module = make_network(options.network, n_classes)
        options.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    device = torch.device(options.device)
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = on_device(arrays["x_train"], arrays["y_train"], device)
    name = f"{options.id.stem}_{options.network}_seed{options.seed}"
    training = Training(module, images, labels, options, options.folder / f"{name}.resume.pt")
    start = time.perf_counter()
    training.run()
    seconds = time.perf_counter() - start
    state = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }
    # As it will be loaded: with the weights that bfloat16 can hold.
    module.load_state_dict(state)
    accuracy = tested(module, *on_device(arrays["x_test"], arrays["y_test"], device))
    torch.save({key: value.cpu() for key, value in state.items()}, options.folder / f"{name}.pt")
    record = {
        "id": options.id.stem,
        "network": options.network,
        "epochs": options.epochs,
        "seed": options.seed,
        "accuracy": accuracy,
        "seconds_of_this_run": seconds,
        "versions": versions(),
        "machine": f"{machine()}, device {device_name(device)}",
    }
    (options.folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--id", type=Path, required=True, metavar="FILE.npz", help="x_train, y_train, x_test ...")
    add(
        "--network",
        default="wrn40_2_dropout0.3",
        help="resnet20, wrn16_2, ... (default: wrn40_2_dropout0.3)",
    )
    add("--epochs", type=count, default=100, help="default: 100")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help=f"default here: {default}")
    add("--folder", type=Path, required=True, help="where the checkpoint goes")
    return parser.parse_args(argv)


def on_device(x: Images, y: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(x).to(device), torch.from_numpy(y).long().to(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Training:
    """A network on its way through the recipe."""

    def __init__(
        self,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        options: argparse.Namespace,
        path: Path,
    ) -> None:
        self.module, self.images, self.labels = module, images, labels
        self.epochs, self.seed, self.path = options.epochs, options.seed, path
        self.steps = math.ceil(len(images) / BATCH)
        self.optimizer = torch.optim.SGD(
            module.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        on_gpu = images.device.type == "cuda"
        self.forward = (
            torch.compile(module, mode="max-autotune-no-cudagraphs") if on_gpu else module
        )
        self.precision = torch.bfloat16 if on_gpu else None
        self.done = 0
        if path.exists():
            kept = torch.load(path, map_location=images.device, weights_only=True)
            if kept["epochs"] == self.epochs:
                module.load_state_dict(kept["module"])
                self.optimizer.load_state_dict(kept["optimizer"])
                self.done = kept["done"]

    def run(self) -> None:
        while self.done < self.epochs:
            start = time.perf_counter()
            loss = self.epoch()
            self.done += 1
            self.keep()
            print(
                f"epoch {self.done} of {self.epochs}: loss {loss:.3f}, "
                f"{time.perf_counter() - start:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def epoch(self) -> float:
        torch.manual_seed(self.seed * 10_000 + self.done)  # of the dropout
        draws = torch.Generator().manual_seed(self.seed * 10_000 + self.done)
        order = torch.randperm(len(self.images), generator=draws).to(self.images.device)
        self.module.train()
        losses = []
        for step, rows in enumerate(order.split(BATCH)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.done * self.steps + step)
            batch, _ = flip_crop(normalised(self.images[rows]), draws)
            batch = batch.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                loss = F.cross_entropy(self.forward(batch), self.labels[rows])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def autocast(self) -> torch.autocast:
        device = self.images.device.type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision is not None)

    def rate(self, step: int) -> float:
        return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / (self.steps * self.epochs)))

    def keep(self) -> None:
        kept = {
            "epochs": self.epochs,
            "done": self.done,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = self.path.with_suffix(".part")
        torch.save(kept, part)
        os.replace(part, self.path)


def normalised(images: Tensor) -> Tensor:
    return NORMALISATIONS["cifar"](images)


def tested(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in evaluation mode, in float32."""
    module.eval()
    with torch.inference_mode():
        right = [
            (module(normalised(some)).argmax(dim=1) == truth).float()
            for some, truth in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True)
        ]
    return float(torch.cat(right).mean())


if __name__ == "__main__":
    main()
