from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("monitoring")


def test_it_prints_false_alarms_and_delays_of_scores_that_were_kept(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    scores = {"clean": rng.normal(size=3100), "unchanged": rng.normal(size=200)}
    changes = {f"change {i}": rng.normal(-3, size=50) for i in range(3)}
    np.savez(tmp_path / "kept.npz", **scores, **changes)
    script.main(
        [
            *("--id", "id.npz", "--ood", "a.npz", "--network", "resnet8", "--checkpoint", "net.pt"),
            *("--scores", str(tmp_path / "kept.npz"), "--streams", "3", "--length", "20"),
            *("--peer-streams", "1", "--peer-length", "20", "--repeats", "2"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| skood ")]
    assert len(table) == 1
    assert table[0].startswith("| skood | 3 | 20 | ")
    delays = [line for line in lines if line.startswith("| change 0 |")]
    assert len(delays) == 2
    for line in delays:
        median = line.split("|")[3].split()[0]
        assert 1 <= int(median) <= 60


def test_a_delay_counts_from_the_change_and_leaves_out_earlier_alarms(script):
    first = np.array([3, 500, 509, 519, script.NEVER])
    assert script.delay(first) == "20 (> 2000)"
