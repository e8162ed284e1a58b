from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skood.engine.training import Recipe, _cosine
from skood.penalties import l1

ROWS = 24
"""Images that are scored."""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    peers = importlib.import_module("peers")
    for module in (peers, importlib.import_module("speed")):
        monkeypatch.setattr(module, "BATCH", 32)
    monkeypatch.setattr(peers, "TRIAL_STEPS", {"cpu": 1})
    return peers


@pytest.fixture
def speed(peers, monkeypatch):
    """Without its processes: a contestant works in this one."""
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "say", lambda text: None)
    monkeypatch.setattr(speed, "NETWORKS", {"resnet8": "ResNet-8"})
    monkeypatch.setattr(speed, "DEVICE_NETWORK", "wrn10_1")
    monkeypatch.setattr(speed, "WORKERS_OF_AUTHORS", 0)
    monkeypatch.setattr(speed, "WORKERS_OF_PYTORCH_OOD", 0)
    monkeypatch.setattr(speed, "CALLS", {"default": 3, "resnet20": 2})
    return speed


@pytest.fixture
def small(peers):
    return peers.Task(
        network="resnet8", train_rows=2 * peers.BATCH, test_rows=ROWS, workers=0, calls=2
    )


@pytest.fixture
def in_process(speed, monkeypatch):
    """Contestants as they are asked, in the order of their work."""
    asked = []

    class InProcess:
        def __init__(self, contestant):
            self.contestant = contestant

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append((self.contestant.name, "ended"))

        def prepared(self):
            work = getattr(speed.peers, self.contestant.work)
            self.work_once = work(self.contestant.task)
            return {}

        def work(self):
            asked.append(self.contestant.name)
            answer = self.work_once()
            return {"seconds": answer.seconds, **answer.facts}

    monkeypatch.setattr(speed.measure, "__defaults__", (InProcess,))
    return asked


def scripted(answers):
    """A worker that gives the answers written for each contestant, the first to being prepared."""
    asked = []

    class Scripted:
        def __init__(self, contestant):
            self.name, self.answers = contestant.name, iter(answers[contestant.name])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def prepared(self):
            return next(self.answers)

        def work(self):
            asked.append(self.name)
            return next(self.answers)

    return Scripted, asked


def contestants(speed, *names):
    return [speed.Contestant(name, "none", speed.Task()) for name in names]


# What the contestants compute


def expected_scores(peers, task):
    """Negative energies, image by image, without the package's normalization."""
    x = peers.test_images(task) / 255
    mean, std = np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255
    batch = torch.from_numpy(((x - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return torch.logsumexp(peers.fresh_network(task)(batch), dim=1).numpy()


@pytest.mark.parametrize(
    ("work", "sign", "library"),
    [
        ("score_skood", 1, None),
        ("score_bare", 1, None),
        ("score_bare_folded", 1, None),
        ("score_pytorch_ood", -1, "pytorch_ood"),
        ("score_oodeel", -1, "oodeel"),
        ("score_skorch", 1, "skorch"),
    ],
)
def test_all_score_alike(peers, small, work, sign, library):
    if library:
        pytest.importorskip(library)
    answer = getattr(peers, work)(small)()
    scores = np.asarray(answer.result)
    assert scores.shape == (ROWS,)
    assert np.ptp(scores) > 0.01
    np.testing.assert_allclose(sign * scores, expected_scores(peers, small), atol=1e-4)
    assert answer.seconds > 0
    json.dumps(answer.facts)


def test_the_folded_module_has_no_batch_norms(peers, small, monkeypatch):
    scored = []
    monkeypatch.setattr(peers, "scoring_of", lambda network, task: scored.append(network))
    peers.score_bare_folded(small)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in scored[0].modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in peers.fresh_network(small).modules())


def test_bfloat16_is_coarser_and_named(peers, small, monkeypatch):
    monkeypatch.setattr(peers, "LAYOUTS", {"channels last": torch.channels_last})
    coarse = replace(small, precision="bfloat16", test_rows=4)
    skood, bare = peers.score_skood(coarse)(), peers.score_bare(coarse)()
    exact = expected_scores(peers, coarse)
    for answer in (skood, bare):
        assert 1e-4 < np.abs(answer.result - exact).max() < 0.1
        assert "bfloat16" in answer.facts["detail"]


def mean_loss(peers, classifier, x, y):
    """Of the network in evaluation mode, with the penalty as the package has it."""
    with torch.no_grad():
        logits, features = classifier.eval()(torch.from_numpy(peers.normalised(x)))
        loss = F.cross_entropy(logits, torch.from_numpy(y)) + 0.02 * l1(features).mean()
    return loss.item()


def test_the_loops_train_what_skood_trains(peers, small, monkeypatch):
    monkeypatch.setitem(peers.SGD, "lr", 0.01)  # so that an epoch is felt
    monkeypatch.setattr(
        peers,
        "SparseEnergyOODDetector",
        lambda *args, **options: detector(*args, learning_rate=0.01, **options),
    )
    from skood import SparseEnergyOODDetector as detector

    task = replace(small, train_rows=8 * peers.BATCH)
    x, y = peers.train_data(task)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        skood = peers.train_skood(task)()
        bare = peers.train_bare(task)()
        classifier = peers.WithFeatures(peers.fresh_network(task)).train()
        loader = peers.shuffled_images(x, y, 0)
        authors = peers.authors_epoch(classifier, loader, torch.device("cpu"))
    before = mean_loss(peers, peers.WithFeatures(peers.fresh_network(task)).train(), x, y)
    losses = [skood.result.history_[-1]["loss"], bare.result, authors]
    assert losses == pytest.approx(3 * [losses[0]], rel=0.03)
    ours = peers.WithFeatures(skood.result.module_)
    after = [mean_loss(peers, network, x, y) for network in (ours, classifier)]
    assert max(after) < before
    assert after[0] == pytest.approx(after[1], rel=0.05)
    assert skood.facts["whole"] > skood.seconds > 0
    # A tenth more than are trained on.
    assert len(skood.result.calibration_scores_) == task.train_rows // 10


def test_skorch_trains_with_the_penalty(peers, small, monkeypatch):
    pytest.importorskip("skorch")
    bare = peers.train_bare(small)()
    skorch = peers.train_skorch(small)()
    assert skorch.result.history[-1]["train_loss"] == pytest.approx(bare.result, rel=0.05)
    rates = [batch["event_lr"] for batch in skorch.result.history[-1]["batches"]]
    steps = [peers.SGD["lr"] * peers.share_of_rate(step, 2) for step in range(2)]
    assert rates == pytest.approx(steps, rel=1e-3)
    assert {p.shape for p in skorch.result.module_.parameters()} == {
        p.shape for p in peers.fresh_network(small).parameters()
    }


def test_the_rate_falls_as_that_of_skood(peers):
    recipe = Recipe(1, peers.BATCH, peers.SGD["lr"], momentum=0.9, weight_decay=5e-4)
    ours = [peers.SGD["lr"] * peers.share_of_rate(step, 7) for step in range(7)]
    assert ours == pytest.approx(_cosine(recipe, 7, 1))


def test_the_authors_loader_gives_every_row_once(peers, small):
    x, _ = peers.train_data(small)
    batches = list(peers.shuffled_images(x, np.arange(len(x)), 0))
    assert [len(labels) for _, labels in batches] == [32, 32]
    images, rows = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    assert sorted(rows.tolist()) == list(range(len(x)))
    assert rows.tolist() != sorted(rows.tolist())
    expected = torch.from_numpy(peers.normalised(x))[rows]
    same = torch.isclose(images, expected, atol=1e-5).flatten(1).all(dim=1)
    mirrored = torch.isclose(images, expected.flip(-1), atol=1e-5).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7


def test_a_short_file_is_read_again(peers, tmp_path):
    images = peers.random_images(np.random.default_rng(0), 30)
    labels = np.arange(30) % 10
    path = tmp_path / "id.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:7], y_test=labels[:7])
    task = peers.Task(id=str(path), train_rows=64, test_rows=10)
    x, y = peers.train_data(task, extra=6)
    assert len(x) == len(y) == 70
    assert (x[30:60] == images).all()
    assert (peers.test_images(task)[7:] == images[:3]).all()


def test_of_a_table_both_give_the_energies(peers, speed, tmp_path, monkeypatch):
    monkeypatch.setattr(speed.memory, "TRAINING_ROWS", 200)
    speed.memory.prepare(tmp_path, 1000)
    monkeypatch.setattr(peers, "SLICE_ROWS", (64, 300))
    task = peers.Task(table_rows=1000, folder=str(tmp_path))
    skood, bare = peers.table_skood(task)(), peers.table_bare(task)()
    assert bare.result.dtype == np.float64
    np.testing.assert_allclose(skood.result, bare.result, atol=1e-4)
    assert len(np.unique(bare.result)) > 900


@pytest.mark.parametrize("network", ["default", "resnet8"])
def test_of_one_row_both_give_the_energy(peers, small, network):
    task = replace(small, network=network)
    skood, bare = peers.row_skood(task)(), peers.row_bare(task)()
    detector, _ = peers.single(task)
    np.testing.assert_allclose(skood.result + detector.offset_, bare.result, atol=1e-4)
    assert skood.result.shape == (1,)


def test_files_are_scored_as_what_they_hold(peers, small, tmp_path):
    peers.write_images(tmp_path, 40)
    task = replace(small, folder=str(tmp_path))
    images = peers.random_images(np.random.default_rng(2), 40)
    expected = peers.bare_scores(
        peers.fresh_network(task), torch.from_numpy(peers.normalised(images)), 8
    )
    np.testing.assert_allclose(peers.score_files(task)().result, expected, atol=1e-4)


def test_the_fastest_choice_is_taken(peers, monkeypatch):
    times = {"a": iter([9.0, 3.0, 3.0]), "b": iter([4.0, 2.0, 5.0]), "c": iter([7.0])}
    monkeypatch.setattr(peers, "timed", lambda call, device: peers.Answer(next(times[call()])))
    assert peers.fastest("abc", lambda choice: choice, torch.device("cpu")) == "b"


def test_arithmetic_of_an_image_is_counted(peers, small):
    facts = peers.multiply_matrices(small)().facts
    images = torch.zeros(1, 3, 32, 32)
    counts = []

    def count(module, inputs, output):
        counts.append(2 * output[0].numel() * module.weight[0].numel())

    network = peers.fresh_network(small)
    for module in network.modules():
        if hasattr(module, "weight") and not hasattr(module, "running_mean"):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(images)
    assert facts["of_an_image"] == sum(counts)
    assert facts["per_second"] > 0


# Rounds


def test_contestants_take_turns_and_the_first_round_does_not_count(speed):
    worker, asked = scripted(
        {
            "skood": [{}, *({"seconds": s} for s in (99, 1, 2, 6))],
            "other": [{}, *({"seconds": s} for s in (99, 4, 5, 30))],
        }
    )
    ours, other = speed.measure(contestants(speed, "skood", "other"), 3, worker)
    assert asked == ["skood", "other"] * 4
    assert ours.values() == [1, 2, 6]
    assert (ours.median(), other.median()) == (2, 5)
    assert speed.speed_ratio(ours, other) == 2.5


def test_one_that_fails_is_named_and_the_rest_go_on(speed):
    good = [{"seconds": 1.0}] * 3
    worker, asked = scripted(
        {
            "skood": [{}, *good],
            "unready": [{"error": "ValueError: no"}],
            "later": [{}, good[0], {"error": "RuntimeError: gone"}],
            "last": [{}, *good],
        }
    )
    names = ["skood", "unready", "later", "last"]
    found = speed.measure(contestants(speed, *names), 2, worker)
    assert asked == ["skood", "later", "last"] * 2 + ["skood", "last"]
    assert [result.finished for result in found] == [True, False, False, True]
    lines = speed.ratios("work", found, {})
    assert [line[1] for line in lines] == ["skood", "last"]
    note = speed.remarks(found)
    assert "- unready failed, ValueError: no" in note
    assert "- later failed, RuntimeError: gone" in note


def test_without_skood_the_others_are_still_shown(speed):
    worker, _ = scripted({"skood": [{"error": "no"}], "other": [{}, *[{"seconds": 2.0}] * 2]})
    found = speed.measure(contestants(speed, "skood", "other"), 1, worker)
    targets = {"other": speed.Target(3)}
    assert speed.ratios("work", found, targets) == [
        ["work", "other", "2.00 (2.00 to 2.00)", "", "", "", ""]
    ]
    assert speed.whole_fit("work", found[0]) == []


def test_what_is_missing_is_left_out_with_how_to_install_it(speed, in_process):
    missing = speed.Contestant("peer", "score_peer", speed.Task(), ("no_such_library", "numpy"))
    (result,) = speed.measure([missing], 1)
    assert result.remark == ("peer left out, it needs no_such_library: pip install no_such_library")
    assert in_process == []
    assert "skorch==1.4.0" in speed.INSTALL["skorch"]


@pytest.mark.slow
def test_processes_work_and_fail_on_their_own(speed, small):
    task = replace(small, test_rows=4, calls=1)
    with (
        speed.Worker(speed.Contestant("good", "row_bare", task)) as good,
        speed.Worker(speed.Contestant("bad", "table_bare", task)) as bad,
    ):
        assert good.prepared() == {}
        assert "TypeError" in bad.prepared()["error"]
        assert bad.process.wait() == 0
        answer = good.work()
        assert answer["seconds"] > 0
        good.process.kill()
        good.process.wait()
        assert "its process ended with -9" in good.work()["error"]


# Tables


@pytest.mark.parametrize(
    ("target", "value", "cells"),
    [
        ((3.0,), 3.01, ["at least 3", "yes"]),
        ((0.95,), 0.949, ["at least 0.95", "no"]),
        ((1.15, True, " of its epoch"), 1.1, ["at most 1.15 of its epoch", "yes"]),
        ((200, True, " MB"), 201, ["at most 200 MB", "no"]),
        ((3.0, False, "", "needs it"), 9.0, ["at least 3", "needs it"]),
    ],
)
def test_targets_are_met_or_missed(speed, target, value, cells):
    assert speed.Target(*target).cells(value) == cells


def test_lines_hold_medians_spreads_and_ratios(speed):
    ours, other = (speed.Result(c) for c in contestants(speed, "skood", "other"))
    ours.answers = [{"seconds": s, "whole": 2 * s} for s in (2.0, 4.0, 3.0)]
    other.answers = [{"seconds": s} for s in (1.0, 2.85, 90.0)]
    assert speed.ratios("work", [ours, other], {"other": speed.Target(0.95)}, rows=6000) == [
        ["work", "skood", "3.00 (2.00 to 4.00)", "2,000", "", "", ""],
        ["work", "other", "2.85 (1.00 to 90.0)", "2,105", "0.950", "at least 0.95", "yes"],
    ]
    (line,) = speed.whole_fit("work", ours)
    assert line[2:5] == ["6.00 (4.00 to 8.00)", "", "2.00 of its epoch"]
    assert line[5:] == ["at most 1.12 of its epoch", "no"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0012345, "0.00123"), (12.345, "12.3"), (123456.7, "123,457"), (0, "0")]
)
def test_figures_have_three_digits(speed, value, text):
    assert speed.digits(value) == text


# Groups


def arguments(group, *more):
    sizes = ["--train-rows", "64", "--test-rows", str(ROWS), "--repeats", "1"]
    return ["--only", *group.split(), "--device", "cpu", *sizes, *more]


def cells(table, n_names=2):
    return [line[:n_names] for line in table["lines"]]


def test_what_is_done_is_written_after_each_group(speed, in_process, tmp_path, monkeypatch, capsys):
    path = tmp_path / "speed.json"
    seen = []

    def first(settings):
        table = speed.Table("first", ["a", "b"], [["1", "2"]])
        yield speed.Section(table, "- a note")

    def second(settings):
        seen.append(json.loads(path.read_text())["tables"])
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(speed, "GROUPS", {"training": first, "scoring": second})
    with pytest.raises(KeyboardInterrupt):
        speed.main([*arguments("training scoring"), "--out", str(path)])
    written = json.loads(path.read_text())
    assert set(written) == {"title", "command", "machine", "versions", "tables"}
    assert written["command"].startswith("python benchmarks/speed.py --only training scoring")
    assert "bfloat16" in written["machine"]
    assert f"torch {torch.__version__}" in written["versions"]
    assert (written["tables"],) == tuple(seen)
    assert written["tables"] == [
        {
            "title": "first",
            "columns": ["a", "b"],
            "lines": [["1", "2"]],
            "n_names": 1,
            "note": "- a note",
        }
    ]
    assert list(tmp_path.iterdir()) == [path]
    output = capsys.readouterr().out
    assert "## first\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n- a note" in output


@pytest.mark.slow
def test_groups_of_images(speed, in_process, tmp_path, monkeypatch):
    path = tmp_path / "speed.json"
    monkeypatch.setattr(speed.Contestant, "missing", property(lambda c: [*c.libraries][:1]))
    monkeypatch.setattr(speed, "base_task", small_task(speed))
    monkeypatch.setattr(speed.peers, "LAYOUTS", {"channels last": torch.channels_last})
    speed.main([*arguments("training scoring one-row"), "--out", str(path)])
    tables = json.loads(path.read_text())["tables"]
    assert cells(tables[0]) == [
        ["ResNet-8", "skood"],
        ["ResNet-8", "bare loop"],
        ["ResNet-8", "skood, whole fit"],
    ]
    assert "skorch left out, it needs skorch: pip install skorch==1.4.0" in tables[0]["note"]
    assert [cells(table) for table in tables[1:3]] == [
        [[f"energies, {precision}", name] for name in speed.OWN_SCORING]
        for precision in ("float32", "bfloat16")
    ]
    assert "oodeel left out" in tables[1]["note"]
    assert cells(tables[3])[::2] == [["default MLP", "skood"], ["ResNet-20", "skood"]]
    assert tables[3]["lines"][1][-2] == "at most 0.3 ms more"
    assert tables[3]["lines"][3][-2] == "at most 1.3 times its time"
    assert all(len(line) == len(table["columns"]) for table in tables for line in table["lines"])


def small_task(speed):
    """Of ResNet-8 where a group wants ResNet-20."""
    whole = speed.base_task

    def base_task(settings, **changes):
        task = whole(settings, **changes)
        return replace(task, network=task.network.replace("resnet20", "resnet8"))

    return base_task


@pytest.mark.slow
def test_a_group_on_the_device(speed, in_process, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    path = tmp_path / "speed.json"
    speed.main([*arguments("device"), "--out", str(path)])
    table, whole = json.loads(path.read_text())["tables"]
    assert cells(table) == [
        ["one epoch", "skood"],
        ["one epoch", "bare loop"],
        ["one epoch", "authors' loop"],
        ["one epoch", "arithmetic limit"],
        ["scoring", "skood"],
        ["scoring", "bare module"],
        ["scoring", "arithmetic limit"],
    ]
    assert table["lines"][4][-2:] == ["at least 100000 a second", "needs a GPU"]
    assert all(float(table["lines"][i][4]) > 0 for i in (3, 6))
    ((epochs, _, _, *target),) = whole["lines"]
    assert [epochs, *target] == ["2", "at most 30 s", "needs a GPU"]


def test_the_limit_is_arithmetic_over_the_speed_of_the_hardware(speed):
    arithmetic, ours = (speed.Result(c) for c in contestants(speed, "product", "skood"))
    arithmetic.answers = [{"seconds": 1.0, "per_second": 1e9, "of_an_image": 1e6}]
    ours.answers = [{"seconds": 1.2}]
    # Three forwards of 100 images are 3e8 operations.
    assert speed.limit("work", arithmetic, ours, 300, 100) == [
        ["work", "arithmetic limit", "0.300", "333", "0.250", "", ""]
    ]
    ours.error = "failed"
    assert speed.limit("work", arithmetic, ours, 300, 100) == []


@pytest.mark.slow
def test_a_group_of_the_compiler(speed, in_process, tmp_path, monkeypatch):
    path = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "COMPILED_NETWORKS", {"resnet8": "ResNet-8"})
    monkeypatch.setattr(torch, "compile", partial(torch_compiled, torch.compile))
    speed.main([*arguments("compile"), "--train-rows", "128", "--out", str(path)])
    (table,) = json.loads(path.read_text())["tables"]
    ((name, plain, compiled, ratio, *_),) = table["lines"]
    assert name == "ResNet-8"
    assert float(plain.split()[0]) > 0
    assert float(compiled.split()[0]) > 0
    assert float(ratio) > 0


def torch_compiled(compile_, forward, **options):
    """The compiler's capture without its code generator, which needs a C++ compiler."""
    return compile_(forward, dynamic=False, backend="aot_eager")


@pytest.mark.slow
def test_a_group_of_tips(speed, in_process, tmp_path, monkeypatch):
    path = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "base_task", small_task(speed))
    variants = {"default": {}, "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}}
    monkeypatch.setattr(speed, "environments", lambda: (variants, ["jemalloc left out"]))
    monkeypatch.setattr(speed.peers, "fitted", uncompiled(speed.peers.fitted))
    speed.main([*arguments("tips"), "--out", str(path)])
    tables = json.loads(path.read_text())["tables"]
    assert [cells(table, 1) for table in tables] == [
        [["default"], ["OMP_NUM_THREADS=1"], ["compile=True"]],
        [["default"], ["OMP_NUM_THREADS=1"]],
        [[f"num_workers={n}"] for n in (0, 1, 2)],
    ]
    assert all(table["lines"][0][-1] == "1.00" for table in tables)
    assert "jemalloc left out" in tables[0]["note"]


def uncompiled(fitted):
    """A compiler takes long, and loading processes are tested elsewhere."""
    return lambda task, X, y, **options: fitted(
        replace(task, compile=False), X, y, **(options | {"num_workers": 0})
    )


def test_environments_are_named_by_their_variables(speed, monkeypatch):
    monkeypatch.setattr(speed, "find_jemalloc", lambda: "/somewhere/libjemalloc.so.2")
    found, left_out = speed.environments()
    assert left_out == []
    assert found["LD_PRELOAD=libjemalloc.so.2"] == {"LD_PRELOAD": "/somewhere/libjemalloc.so.2"}
    assert next(iter(found)) == "default"
    assert len(found) == 6
    monkeypatch.setattr(speed, "find_jemalloc", lambda: None)
    found, left_out = speed.environments()
    assert len(found) == 5
    assert "jemalloc" in left_out[0]


def test_a_group_of_the_table_with_its_memory(speed, in_process, tmp_path, monkeypatch):
    cases = []

    def run(method, n_rows, folder):
        cases.append((method, n_rows))
        return {"X": 128 * n_rows, "before": 10_000_000, "peak": 10_000_000 + 8_000 * n_rows}

    monkeypatch.setattr(speed.memory, "run", run)
    monkeypatch.setattr(speed.memory, "TRAINING_ROWS", 200)
    monkeypatch.setattr(speed.sys, "platform", "linux")
    path = tmp_path / "speed.json"
    speed.main([*arguments("table"), "--table-rows", "3000", "--out", str(path)])
    times, memory = json.loads(path.read_text())["tables"]
    assert cells(times) == [["energies, float32", name] for name in ("skood", "bare loop")]
    assert times["lines"][1][-2] == "at least 0.9"
    assert cases == [("score_samples", 3000), ("score_samples", 30000)]
    assert [line[2:] for line in memory["lines"]] == [
        ["24.0", "at most 200 MB", "yes"],
        ["240.0", "at most 200 MB", "no"],
    ]
    section = speed.memory_section(tmp_path, 3000, room=False)
    assert "30000 rows left out: no room" in section.note


def test_a_group_that_fails_ends_in_an_error_after_the_rest(speed, monkeypatch, tmp_path):
    def broken(settings):
        raise OSError("no space")
        yield

    def whole(settings):
        yield speed.Section(speed.Table("whole", ["a"], [["1"]]))

    monkeypatch.setattr(speed, "GROUPS", {"table": broken, "import": whole})
    path = tmp_path / "speed.json"
    with pytest.raises(SystemExit, match="error: table failed, OSError: no space"):
        speed.main([*arguments("table import"), "--out", str(path)])
    assert [table["title"] for table in json.loads(path.read_text())["tables"]] == ["whole"]


@pytest.mark.slow
def test_a_group_of_imports(speed, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "IMPORTS", 1)
    path = tmp_path / "speed.json"
    speed.main([*arguments("import"), "--out", str(path)])
    (table,) = json.loads(path.read_text())["tables"]
    (_, before, *_), (_, ours, target, _) = table["lines"]
    assert float(before.split()[0]) > 0
    assert float(ours.split()[0]) > 0
    assert target == "at most 0.2 s"


# Options


def test_the_device_has_its_turn_where_it_is_a_gpu(speed):
    assert speed.parse(["--device", "cpu"]).only == [g for g in speed.GROUPS if g != "device"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--train-rows", "100"], "--train-rows 100 is not a multiple of the batch, 32"),
        (["--train-rows", "0"], "0 is not at least 1"),
        (["--repeats", "0"], "0 is not at least 1"),
        (["--test-rows", "-1"], "-1 is not at least 1"),
        (["--only", "sleeping"], "invalid choice: 'sleeping'"),
        (["--device", "tpu0"], "device='tpu0' cannot be used here"),
        (["--id", "absent.npz"], "absent.npz: no such file"),
    ],
)
def test_refuses_bad_options(speed, capsys, changed, message):
    with pytest.raises(SystemExit) as raised:
        speed.parse(changed)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_images_of_another_shape(speed, tmp_path, capsys):
    path = tmp_path / "id.npz"
    images, labels = np.zeros((4, 8, 8, 3), dtype=np.uint8), np.arange(4)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(SystemExit):
        speed.parse(["--id", str(path)])
    assert "has images of (8, 8, 3) in 4 classes; expected (32, 32, 3)" in capsys.readouterr().err


def test_refuses_a_file_that_it_cannot_write_before_it_starts(speed, tmp_path):
    path = tmp_path / "absent" / "speed.json"
    with pytest.raises(SystemExit, match=r"error: --out .* cannot be written"):
        speed.main([*arguments("training"), "--out", str(path)])
