from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        y = {part: np.repeat(np.arange(5), n) for part, n in (("train", 100), ("test", 20))}
        x = {part: np.zeros((len(labels), 2, 2, 3), np.uint8) for part, labels in y.items()}
        Path("data").mkdir(exist_ok=True)
        arrays = {f"x_{part}": x[part] for part in x} | {f"y_{part}": y[part] for part in y}
        np.savez(f"data/{name}.npz", **arrays)
    for name in ("svhn", "mnist", "other"):
        np.savez(f"data/{name}.npz", x=np.zeros((1, 2, 2, 3), np.uint8))
    return importlib.import_module("gpu")


def line(*more):
    return ["--data", "data", "--checkpoints", "checkpoints", "--folder", "out", "--toy", *more]


def writes(gpu, name, code, **fields):
    """A step of one line of Python."""
    return gpu.Step(name, "-c", (code,), **fields)


def test_the_most_important_comes_first(gpu):
    options = gpu.parse(line())
    found = list(gpu.steps(gpu.FULL, options.data, options))
    wide, dense = gpu.FULL.network, gpu.PUBLISHED
    networks = [f"{of}_{network}" for network in (wide, dense) for of in ("cifar100", "cifar10")]
    assert [step.name for step in found] == [
        *("test_cuda", "pretrain_cifar100", "pretrain_cifar10"),
        *(f"{name}_seeds0" for name in networks),
        *(f"{name}_seeds0_1_2" for name in networks),
        *(f"{name}_scores_seeds0_1_2" for name in networks),
        "speed",
    ]
    for step in found[3:]:
        if step.name != "speed":
            paper = importlib.import_module("paper").parse(step.arguments)
            other = {"cifar10": "cifar100", "cifar100": "cifar10"}[paper.id.stem]
            assert [path.stem for path in paper.ood] == ["svhn", other, "mnist"]
            assert (paper.epochs, paper.train_rows, paper.test_rows) == (10, None, None)
            assert len(paper.scores) == 3 or "_scores_" in step.name
            assert paper.checkpoint in step.needs
    made = {path for step in found[1:3] for path, _ in step.results}
    assert {found[3].needs[1], found[4].needs[1]} <= made


def test_what_is_done_is_not_done_again(gpu, monkeypatch, capsys):
    made = Path("made").resolve()
    code = f"print(7); open(r'{made}', 'w').write('1')"
    steps = [
        writes(gpu, "first", code, results=((made, "first.csv"),)),
        writes(gpu, "broken", "raise SystemExit(3)"),
        writes(gpu, "waits", "", needs=(Path("absent.pt"),)),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *arguments: iter(steps))
    with pytest.raises(SystemExit) as raised:
        gpu.main(line())
    assert raised.value.code == 1
    output = capsys.readouterr().out
    assert "failed: broken (status 3, see results/broken.log)" in output
    assert "left: waits (needs absent.pt)" in output
    assert Path("out/results/first.csv").read_text() == "1"
    assert Path("out/results/first.log").read_text().splitlines()[-1] == "7"
    steps[1:] = [writes(gpu, "broken", "print(8)")]
    gpu.main(line())
    output = capsys.readouterr().out
    assert "first" not in output
    assert output.startswith("broken ...\nbroken: done")


def test_it_ends_when_the_time_is_up(gpu, monkeypatch, capsys):
    made, old = Path("made").resolve(), Path("old").resolve()
    old.write_text("of a step before")
    os.utime(old, (1, 1))
    code = f"open(r'{made}', 'w').write('half'); import time; time.sleep(60)"
    steps = [
        writes(gpu, "long", code, results=((made, "long.csv"), (old, "old.csv"))),
        writes(gpu, "next", "print(7)"),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *arguments: iter(steps))
    gpu.main(line("--minutes", "0.03"))
    output = capsys.readouterr().out.splitlines()
    assert output[-3:] == ["left: long", "left: next", "The same command goes on from here."]
    assert Path("out/results/long.csv").read_text() == "half"
    assert {path.name for path in Path("out/results").iterdir()} == {"long.csv", "long.log"}


def test_the_small_sets_have_all_classes(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "steps", lambda *arguments: iter(()))
    gpu.main(line())
    assert [path.name for path in Path("out/data").iterdir()] == ["cifar10.npz"]
    with np.load("out/data/cifar10.npz") as arrays:
        assert np.bincount(arrays["y_train"]).min() >= 10
        assert np.bincount(arrays["y_test"]).min() >= 8
        assert len(arrays["x_train"]) == len(arrays["y_train"])


def test_the_whole_needs_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(line()[:-1])
    assert "--toy" in capsys.readouterr().err
