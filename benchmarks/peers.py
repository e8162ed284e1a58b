"""The contestants of speed.py: skood, bare loops of torch, the authors' loop and other libraries.

Each is a function that prepares what a task asks for and returns the work, which may be done any
number of times. Libraries that skood does not need are imported where they are used.
"""

from __future__ import annotations

import copy
import math
import pickle
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from environment import import_torchvision
from images import NORMALISATIONS, make_network, read_id
from numpy.typing import NDArray
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from skood import SparseEnergyOODDetector
from skood.engine.hardware import has_native_bfloat16, resolve_device
from skood.model_selection import InDistributionKFold, make_ood_scorer

T = TypeVar("T")

NORMALISE = NORMALISATIONS["cifar"]
MEAN, STD = NORMALISE.mean.tolist(), NORMALISE.std.tolist()
N_CLASSES = 10
IMAGE = (32, 32, 3)

BATCH = 128
PENALTY_WEIGHT = 0.02
SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
FINAL_RATE = 1e-6

ROWS_TO_FIT = 256
"""Rows on which a detector is fitted that does not train."""

LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
FORWARD_ROWS = {"cpu": (64, 128, 256), "cuda": (256, 1024, 4096)}
SLICE_ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HOPELESS = 3
"""Times the least so far at which a choice is tried no more; bfloat16 may be emulated."""

TRIAL_STEPS = {"cpu": 3, "cuda": 20}
TRIAL_ROWS = 65536
PRODUCTS = 10


@dataclass(frozen=True)
class Task:
    """What a contestant is to do; it travels to its process as JSON."""

    network: str = "resnet20"
    id: str | None = None
    train_rows: int = 6400
    test_rows: int = 10_000
    table_rows: int = 1_000_000
    device: str = "cpu"
    precision: str = "float32"
    epochs: int = 1
    workers: int = 2
    calls: int = 50
    compile: bool = False
    folder: str | None = None
    scores: tuple[str, ...] = ()
    shared: bool = False

    @property
    def where(self) -> torch.device:
        return resolve_device(self.device)


@dataclass(frozen=True)
class Answer:
    """Seconds that some work took, what it made, and facts that a table wants."""

    seconds: float
    result: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


Work = Callable[[], Answer]


# What all of them share


def train_data(task: Task, extra: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels to train on, and some more; a short file is read again from its start."""
    n_rows = task.train_rows + extra
    if task.id is None:
        random = np.random.default_rng(0)
        return random_images(random, n_rows), random.integers(N_CLASSES, size=n_rows)
    arrays = read_id(Path(task.id))
    rows = np.arange(n_rows) % len(arrays["x_train"])
    return arrays["x_train"][rows], arrays["y_train"][rows].astype(np.int64)


def test_images(task: Task) -> NDArray[np.uint8]:
    if task.id is None:
        return random_images(np.random.default_rng(1), task.test_rows)
    x_test = read_id(Path(task.id))["x_test"]
    return x_test[np.arange(task.test_rows) % len(x_test)]


def random_images(random: np.random.Generator, n_rows: int) -> NDArray[np.uint8]:
    return random.integers(256, size=(n_rows, *IMAGE), dtype=np.uint8)


def fresh_network(task: Task) -> nn.Module:
    """The same weights for all; they are not trained, as speed does not depend on them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_network(task.network, N_CLASSES).eval()


class WithFeatures(nn.Module):
    """A network in two parts, which gives its logits and its features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        name = "fc" if hasattr(network, "fc") else "linear"
        self.head = getattr(network, name)
        setattr(network, name, nn.Identity())
        self.body = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


def penalised(loss: Tensor, features: Tensor) -> Tensor:
    """The paper's loss, from the cross-entropy."""
    return loss + PENALTY_WEIGHT * features.abs().sum(dim=1).mean()


def share_of_rate(step: int, steps: int) -> float:
    """Half a cosine, as a share of the initial learning rate."""
    low = FINAL_RATE / SGD["lr"]
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / steps))


def timed(call: Callable[[], T], device: torch.device, **facts: Any) -> Answer:
    """What a call takes until its last kernel is done."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return Answer(time.perf_counter() - start, result, facts)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(choices: Iterable[T], call: Callable[[T], object], device: torch.device) -> T:
    """The choice with which a call is fastest, of two after a first one."""
    best, least = None, math.inf
    for choice in choices:
        trial = partial(timed, partial(call, choice), device)
        seconds = trial().seconds
        if seconds < HOPELESS * least:
            seconds = min(trial().seconds, trial().seconds)
        if seconds < least:
            best, least = choice, seconds
    return best


def quietly(call: Callable[[], T]) -> T:
    """Without the warnings that fit has about a network that was never trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


class PilImages(Dataset[Any]):
    """Images one by one, as torchvision's CIFAR10 gives them: a picture, transformed, and a label.

    Parameters
    ----------
    x : ndarray of shape (n, h, w, 3), uint8
        Images.
    y : ndarray of shape (n,)
        Labels.
    transform : callable
        From a PIL image to a tensor.
    """

    def __init__(self, x: NDArray[Any], y: NDArray[Any], transform: Callable[[Any], Any]) -> None:
        self.x, self.y, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[row])), int(self.y[row])


# Training: one epoch


def train_skood(task: Task) -> Work:
    extra = task.train_rows // 10
    x, y = train_data(task, extra)
    network = fresh_network(task)

    def work() -> Answer:
        detector = SparseEnergyOODDetector(
            network,
            penalty="l1",
            sparsity_weight=0.02,
            max_epochs=task.epochs,
            batch_size=BATCH,
            preprocess=NORMALISE,
            augment="flip",
            calibration_size=extra,
            device=task.device,
            random_state=0,
        )
        whole = timed(lambda: quietly(lambda: detector.fit(x, y)), task.where).seconds
        epochs = sum(record["seconds"] for record in detector.history_)
        by_graphs = ", by CUDA graphs" if detector.execution_["cuda_graphs"] else ""
        detail = f"trains in {detector.precision_['training']}{by_graphs}"
        facts = {"whole": whole, "detail": detail}
        return Answer(epochs, detector, facts)

    return work


def train_steps(task: Task) -> Work:
    """Seconds of a step; of the first epoch, what it took longer than a later one: the compiler."""
    x, y = train_data(task)
    settings = {"batch_size": BATCH, "preprocess": NORMALISE, "calibration_size": None}

    def work() -> Answer:
        torch.compiler.reset()
        detector = fitted(task, x, y, precision="auto", max_epochs=task.epochs, **settings)
        first, *later = (record["seconds"] for record in detector.history_)
        a_step = median(later) / (task.train_rows // BATCH)
        facts = {"compiler": first - median(later), "detail": detector.precision_["training"]}
        return Answer(a_step, detector, facts)

    return work


def train_bare(task: Task) -> Work:
    """Whole batches, no hooks, no value read before the end; the better of two layouts."""
    x, y = (torch.from_numpy(values).to(task.where) for values in train_data(task))
    initial = WithFeatures(fresh_network(task)).train().to(task.where)
    some = TRIAL_STEPS.get(task.where.type, TRIAL_STEPS["cpu"]) * BATCH

    def epoch(name: str, n_rows: int) -> Callable[[], float]:
        layout = LAYOUTS[name]
        classifier = copy.deepcopy(initial).to(memory_format=layout)
        rows = x if name == "channels last" else x.movedim(3, 1).contiguous()
        return lambda: bare_epoch(classifier, rows[:n_rows], y[:n_rows], name)

    best = fastest(LAYOUTS, lambda name: epoch(name, some)(), task.where)

    def work() -> Answer:
        return timed(epoch(best, len(x)), task.where, detail=best)

    return work


def bare_epoch(classifier: WithFeatures, x: Tensor, y: Tensor, layout: str) -> float:
    """One epoch on images that lie as the layout has them; gives the mean loss."""
    device, is_last = x.device, layout == "channels last"
    shape, width = ((1, 1, 1, 3), 2) if is_last else ((1, 3, 1, 1), 3)
    mean, std = (torch.tensor(values, device=device).view(shape) for values in (MEAN, STD))
    scale, shift = 1 / (255 * std), -mean / std
    optimizer = torch.optim.SGD(classifier.parameters(), fused=True, **SGD)
    total, batches = torch.zeros((), device=device), torch.randperm(len(x)).split(BATCH)
    for step, picks in enumerate(batches):
        optimizer.param_groups[0]["lr"] = SGD["lr"] * share_of_rate(step, len(batches))
        picks = picks.to(device)
        images = x[picks]
        mirrored = torch.rand(len(picks), 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(width), images).float().mul_(scale).add_(shift)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_native_bfloat16(device)):
            logits, features = classifier(images.movedim(3, 1) if is_last else images)
        loss = penalised(F.cross_entropy(logits.float(), y[picks]), features.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(picks)
    return float(total) / len(x)


def train_authors(task: Task) -> Work:
    """As the paper's authors train: images one by one, in float32, the loss read at each step."""
    x, y = train_data(task)
    initial = WithFeatures(fresh_network(task)).train().to(task.where)
    loader = shuffled_images(x, y, task.workers)
    detail = f"float32, {task.workers} loading processes"

    def work() -> Answer:
        classifier = copy.deepcopy(initial)
        return timed(
            lambda: authors_epoch(classifier, loader, task.where), task.where, detail=detail
        )

    return work


def shuffled_images(x: NDArray[Any], y: NDArray[Any], workers: int) -> DataLoader[Any]:
    import_torchvision()
    from torchvision import transforms

    steps = [transforms.ToTensor(), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    rows = PilImages(x, y, transform)
    return DataLoader(rows, batch_size=BATCH, shuffle=True, num_workers=workers)


def authors_epoch(classifier: WithFeatures, loader: DataLoader[Any], device: torch.device) -> float:
    optimizer = torch.optim.SGD(classifier.parameters(), **SGD)
    steps = len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: share_of_rate(i, steps))
    classifier.train()
    total = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits, features = classifier(images)
        loss = penalised(F.cross_entropy(logits, labels), features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item() * len(labels)
    return total / len(loader.dataset)


def train_skorch(task: Task) -> Work:
    """A float32 array, as skorch's documentation has it, flipped row by row in its data set."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import LRScheduler
    from skorch.dataset import Dataset as Rows

    class Flipped(Rows):
        def transform(self, X: Any, y: Any) -> Any:
            flipped = X[..., ::-1].copy() if np.random.random() < 0.5 else X  # noqa: NPY002
            return super().transform(flipped, y)

    class Net(NeuralNetClassifier):
        def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> Tensor:
            logits, features = y_pred
            return penalised(super().get_loss(logits, y_true, *args, **kwargs), features)

    x, y = train_data(task)
    X = normalised(x)
    initial = WithFeatures(fresh_network(task))
    scheduler = LRScheduler(
        policy="CosineAnnealingLR",
        step_every="batch",
        T_max=math.ceil(len(X) / BATCH),
        eta_min=FINAL_RATE,
    )

    def work() -> Answer:
        net = Net(
            copy.deepcopy(initial),
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.SGD,
            **{f"optimizer__{name}": value for name, value in SGD.items()},
            batch_size=BATCH,
            max_epochs=task.epochs,
            iterator_train__shuffle=True,
            dataset=Flipped,
            train_split=None,
            callbacks=[("rate", scheduler)],
            device=task.device,
            verbose=0,
        )
        net.fit(X, y)
        epochs = sum(net.history[:, "dur"])
        return Answer(epochs, net, {"detail": "float32, flips image by image"})

    return work


def normalised(x: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images as the network takes them, ready in memory."""
    return np.ascontiguousarray(NORMALISE(torch.from_numpy(x)).numpy())


# Scoring images


def score_skood(task: Task) -> Work:
    detector = fitted(task, *train_data(few(task)), preprocess=NORMALISE)
    X = test_images(task)
    detail = f"scores in {detector.precision_['scoring']}"

    def work() -> Answer:
        return timed(lambda: detector.score_samples(X), task.where, detail=detail)

    return work


def search_skood(task: Task) -> Work:
    """A search over scores, two folds, without a refit; what is kept begins empty each time."""
    x, y = train_data(task)
    network = fresh_network(task)

    def work() -> Answer:
        with TemporaryDirectory() as folder:
            detector = SparseEnergyOODDetector(
                network,
                max_epochs=task.epochs,
                preprocess=NORMALISE,
                device=task.device,
                memory=folder if task.shared else None,
                random_state=0,
            )
            search = GridSearchCV(
                detector,
                {"score_function": list(task.scores)},
                scoring=make_ood_scorer(),
                cv=InDistributionKFold(2, random_state=0),
                refit=False,
                error_score="raise",
            )
            return timed(lambda: quietly(lambda: search.fit(x, y)), task.where)

    return work


def few(task: Task) -> Task:
    return Task(task.network, task.id, train_rows=ROWS_TO_FIT)


def fitted(task: Task, X: Any, y: Any, **options: Any) -> SparseEnergyOODDetector:
    """A detector around the network as it is, unless the options train it."""
    settings = {
        "max_epochs": 0,
        "precision": task.precision,
        "compile": task.compile,
        "device": task.device,
        "random_state": 0,
    }
    detector = SparseEnergyOODDetector(fresh_network(task), **(settings | options))
    return quietly(lambda: detector.fit(X, y))


def score_bare(task: Task) -> Work:
    """The module on tensors that are ready in its best layout and number of rows."""
    return scoring_of(fresh_network(task), task)


def score_bare_folded(task: Task) -> Work:
    """The same, after torch.fx has put the batch-norms into the convolutions before them."""
    from torch.fx.experimental.optimization import fuse

    return scoring_of(fuse(fresh_network(task)), task)


def scoring_of(network: nn.Module, task: Task) -> Work:
    network = network.to(task.where)
    x = torch.from_numpy(normalised(test_images(task))).to(task.where)
    precision = torch.bfloat16 if task.precision == "bfloat16" else None
    by_layout = {}
    for name, layout in LAYOUTS.items():
        module = copy.deepcopy(network).to(memory_format=layout)
        by_layout[name] = module, x.contiguous(memory_format=layout)

    def score(layout: str, size: int, n_rows: int | None = None) -> NDArray[np.float32]:
        module, rows = by_layout[layout]
        return bare_scores(module, rows[:n_rows], size, precision)

    sizes = FORWARD_ROWS.get(x.device.type, FORWARD_ROWS["cpu"])
    layout = fastest(LAYOUTS, lambda name: score(name, sizes[0], sizes[0]), x.device)
    size = fastest(sizes, lambda size: score(layout, size, max(sizes)), x.device)
    detail = f"{precision_name(precision)}, {layout}, {size} at a time"

    def work() -> Answer:
        return timed(lambda: score(layout, size), task.where, detail=detail)

    return work


def precision_name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def bare_scores(
    module: nn.Module, x: Tensor, size: int, precision: torch.dtype | None = None
) -> NDArray[np.float32]:
    with torch.inference_mode(), torch.autocast(x.device.type, precision, precision is not None):
        scores = [torch.logsumexp(module(rows).float(), dim=1) for rows in x.split(size)]
        return torch.cat(scores).cpu().numpy()


def score_pytorch_ood(task: Task) -> Work:
    """Its README and benchmarks: pictures through a transform, 128 at a time, many processes."""
    import_torchvision()
    from pytorch_ood.detector import EnergyBased
    from torchvision import transforms

    x = test_images(task)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    rows = PilImages(x, np.zeros(len(x), dtype=int), transform)
    loader = DataLoader(rows, batch_size=BATCH, num_workers=task.workers)
    detector = EnergyBased(fresh_network(task).to(task.where))

    def score() -> NDArray[np.float32]:
        # Its README leaves gradients on, which would only be to its disadvantage.
        with torch.no_grad():
            return (
                torch.cat([detector(images.to(task.where)) for images, _ in loader]).cpu().numpy()
            )

    return lambda: timed(score, task.where, detail=f"float32, {task.workers} loading processes")


def score_oodeel(task: Task) -> Work:
    """Its README: a data set prepared with a function for each image, in this process."""
    import_torchvision()
    if "datasets" not in sys.modules:
        try:
            import datasets  # noqa: F401
        except ImportError:
            # oodeel imports it for sets of the Hugging Face hub alone.
            sys.modules["datasets"] = types.ModuleType("datasets")
            sys.modules["datasets"].load_dataset = None
    from oodeel.datasets import load_data_handler
    from oodeel.methods import Energy
    from torchvision import transforms

    normalise = transforms.Normalize(MEAN, STD)

    def preprocess(item: dict[str, Any]) -> dict[str, Any]:
        return item | {"input": normalise(item["input"])}

    x, handler = test_images(task), load_data_handler("torch")
    rows = PilImages(x, np.zeros(len(x), dtype=int), transforms.ToTensor())
    loader = handler.prepare(
        handler.load_dataset(rows, columns=["input", "label"]),
        BATCH,
        preprocess,
        columns=["input", "label"],
    )
    energy = Energy()
    energy.fit(fresh_network(task).to(task.where))
    return lambda: timed(lambda: energy.score(loader)[0], task.where, detail="float32")


def score_skorch(task: Task) -> Work:
    """A float32 array through forward, whose batches are skorch's 128."""
    from skorch import NeuralNetClassifier

    X = normalised(test_images(task))
    net = NeuralNetClassifier(
        fresh_network(task), criterion=nn.CrossEntropyLoss, device=task.device
    ).initialize()
    return lambda: timed(
        lambda: torch.logsumexp(net.forward(X), dim=1).numpy(), task.where, detail="float32"
    )


# Scoring a table


def table_skood(task: Task) -> Work:
    detector, X = table(task, mode="r")
    return lambda: timed(lambda: detector.score_samples(X), torch.device("cpu"))


def table_bare(task: Task) -> Work:
    """The module on slices of the best size, into an array of float64."""
    # Copy-on-write, as torch warns of memory that it could not write to.
    detector, X = table(task, mode="c")
    module = detector.module_

    def score(size: int, n_rows: int = len(X)) -> NDArray[np.float64]:
        energies = np.empty(n_rows)
        with torch.inference_mode():
            for start in range(0, n_rows, size):
                piece = slice(start, min(start + size, n_rows))
                energies[piece] = torch.logsumexp(module(torch.from_numpy(X[piece])), dim=1).numpy()
        return energies

    some = min(len(X), TRIAL_ROWS)
    best = fastest(SLICE_ROWS, lambda size: score(size, some), torch.device("cpu"))
    return lambda: timed(lambda: score(best), torch.device("cpu"), detail=f"{best} rows at a time")


def table(task: Task, mode: str) -> tuple[SparseEnergyOODDetector, NDArray[np.float32]]:
    """Detector and rows that memory.prepare left in the task's folder."""
    from memory import N_COLUMNS

    folder = Path(task.folder)
    shape = (task.table_rows, N_COLUMNS)
    X = np.memmap(folder / "X", dtype=np.float32, mode=mode, shape=shape)
    return pickle.loads((folder / "detector.pickle").read_bytes()), X


# One row


def row_skood(task: Task) -> Work:
    detector, row = single(task)
    return lambda: median_of_calls(lambda: detector.decision_function(row), task)


def row_bare(task: Task) -> Work:
    detector, row = single(task)
    module, device = detector.module_, detector.device_

    def score() -> NDArray[np.float32]:
        with torch.inference_mode():
            logits = module(torch.from_numpy(row).to(device))
            return torch.logsumexp(logits, dim=1).cpu().numpy()

    return lambda: median_of_calls(score, task)


def single(task: Task) -> tuple[SparseEnergyOODDetector, NDArray[np.float32]]:
    """A detector, with the default network or the task's, and one row of what it was fitted on."""
    if task.network == "default":
        X = np.random.default_rng(0).standard_normal((1000, 32), dtype=np.float32)
        y = (X[:, 0] > 0).astype(int)
        detector = SparseEnergyOODDetector(
            max_epochs=0, pretrain_epochs=1, device=task.device, random_state=0
        )
        return quietly(lambda: detector.fit(X, y)), X[:1]
    x, y = train_data(few(task))
    X = normalised(x)
    return fitted(task, X, y), X[:1]


def median_of_calls(call: Callable[[], T], task: Task) -> Answer:
    answers = [timed(call, task.where) for _ in range(task.calls)]
    return Answer(median(answer.seconds for answer in answers), answers[-1].result)


# Loading files


def score_files(task: Task) -> Work:
    """Paths of images as X, which preprocess loads in worker processes."""
    X = np.array(sorted(map(str, Path(task.folder).glob("*.png"))))
    y = np.arange(len(X)) % N_CLASSES
    detector = fitted(
        task,
        X[:ROWS_TO_FIT],
        y[:ROWS_TO_FIT],
        preprocess=load_images,
        num_workers=task.workers,
    )
    return lambda: timed(lambda: detector.score_samples(X), task.where)


def write_images(folder: Path, n_rows: int) -> None:
    from PIL import Image

    for i, image in enumerate(random_images(np.random.default_rng(2), n_rows)):
        Image.fromarray(image).save(folder / f"{i:06}.png")


def load_images(paths: NDArray[Any]) -> Tensor:
    from PIL import Image

    return NORMALISE(torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])))


# What the hardware could do


def multiply_matrices(task: Task) -> Work:
    """A large product of matrices, for the most operations a second, and those of one image."""
    device = task.where
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    a = torch.randn(size, size, dtype=dtype, device=device)
    network, image = fresh_network(task), torch.zeros(1, IMAGE[2], *IMAGE[:2])
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(image)
    of_an_image = counter.get_total_flops()
    timed(lambda: a @ a, device)  # the first takes longer

    def work() -> Answer:
        seconds = min(timed(lambda: a @ a, device).seconds for _ in range(PRODUCTS))
        facts = {
            "per_second": 2 * size**3 / seconds,
            "of_an_image": of_an_image,
            "detail": f"{size} by {size}, {precision_name(dtype)}",
        }
        return Answer(seconds, None, facts)

    return work
