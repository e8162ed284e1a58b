from __future__ import annotations

import importlib
import json
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import MEAN, STD, images, logits, trained_network, write_files

from skood import SparseEnergyOODDetector
from skood.networks import NormalizeImages

ROOT = Path(__file__).parents[1]
LINE = shlex.split(
    "--id id.npz --ood noise.npz intel_scenes.npz --network resnet8 --checkpoint net.pt "
    "--epochs 1 --train-rows 200 --test-rows 160 --ood-rows 60 --seeds 0 --out kept/net.json"
)


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("precision")


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("speed_page")


@pytest.fixture(scope="module")
def module():
    return trained_network()


@pytest.fixture
def files(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(module)


# The arithmetic


@pytest.fixture
def pair(precision):
    """Scores before and after, with thresholds at 2 and at 3."""
    ids = np.arange(1.0, 21)
    before = {"id_test": ids, "a": [0.5, 1.5, 2.5, 3.5], "b": [0.5, 0.5, 0.5, 0.5]}
    moved = np.where(ids == 2, 2.75, ids)
    after = {"id_test": moved, "a": before["a"], "b": [0.5, 0.5, 0.5, 1.0]}
    return [
        precision.Judged(
            {name: np.array(s, dtype=float) for name, s in scores.items()},
            {name: np.array(s) >= threshold for name, s in scores.items()},
        )
        for scores, threshold in ((before, 2), (after, 3))
    ]


def test_metrics_are_those_counted_by_hand(pair):
    before, after = pair
    # Of the 20 rows, 19 are at 2 or above, later at 2.75.
    assert before.fpr95() == {"a": 50, "b": 0}
    assert after.fpr95() == {"a": 25, "b": 0}
    # Pairs of 80: rows of a are beaten by 20, 19, 18 (later 19) and 17; b ties once later.
    assert before.auroc() == pytest.approx({"a": 100 * 74 / 80, "b": 100})
    assert after.auroc() == pytest.approx({"a": 100 * 75 / 80, "b": 100 * 79.5 / 80})


def test_a_line_holds_changes_with_their_sets(precision, pair):
    assert precision.comparison(*pair) == [
        *("+1.25 (a)", "+0.31"),  # 1.25 and -0.625
        *("-25.00 (a)", "-12.50"),
        "5.00",  # the row at 2.75, of 20
        "12.50",  # the row at 2.5, of 8
        *("100.00", "0.00"),  # from 0.5 to 1
    ]
    assert precision.comparison(pair[0], pair[0]) == ["0.00"] * 8


def test_the_largest_change_may_be_either_way(precision):
    assert precision.largest({"a": 0.5, "b": -0.75, "c": 0.0}) == "-0.75 (b)"
    assert precision.largest({"a": 0.5, "b": -0.25}) == "+0.50 (a)"
    assert precision.points(-0.001) == precision.points(0.0) == "0.00"


def test_scores_change_by_shares_of_what_they_were(precision):
    def judged(ids, oods):
        return precision.Judged({"id_test": np.array(ids), "a": np.array(oods)}, {})

    found = precision.relative_changes(judged([4.0, -2.0], [8.0]), judged([5.0, -2.0], [7.0]))
    np.testing.assert_allclose(found, [25, 0, 12.5])


# The script


def cells(result, table):
    """Cells by detector and column."""
    entry = result["tables"][table]
    return {line[0]: dict(zip(entry["columns"], line, strict=True)) for line in entry["lines"]}


def test_end_to_end(precision, files, module, capsys):
    precision.main(LINE)
    output = capsys.readouterr().out
    result = json.loads(Path("kept/net.json").read_text(encoding="utf-8"))
    assert set(result) == {"title", "command", "machine", "versions", "tables"}
    assert result["command"].startswith(
        "python benchmarks/precision.py --id id.npz --ood noise.npz"
    )
    assert result["command"].endswith("--out net.json")
    assert "intel_scenes stands in for iSUN" in output
    names = ["untouched", "control, seed 0", "weight 0.02, seed 0"]
    for entry in result["tables"]:
        assert set(entry) == {"title", "columns", "lines", "n_names", "note"}
        assert [line[0] for line in entry["lines"]] == names
        for line in (entry["columns"], *entry["lines"]):
            assert f"| {' | '.join(line)} |" in output
    assert len(set(map(tuple, (line[1:] for line in result["tables"][0]["lines"])))) > 1

    # The untouched classifier: its logits alone, then detectors in the ordinary way.
    x, _ = images(200, seed=1)
    testing = np.random.RandomState(0).permutation(200)[:160]
    fresh, ids = x[testing[:80]], x[testing[80:]]
    oods = []
    for name in ("noise", "intel_scenes"):
        every = np.load(f"{name}.npz")["x"]
        oods.append(every[np.random.RandomState(0).permutation(len(every))[:60]])
    with torch.inference_mode():
        scores = [torch.logsumexp(logits(module, rows).double(), 1) for rows in (ids, *oods)]
    areas = [np.mean((scores[0][:, None] > s).numpy()) for s in scores[1:]]
    threshold = np.sort(scores[0])[80 - 76]  # 76 of 80 are 95 %
    rates = [np.mean((s >= threshold).numpy()) for s in scores[1:]]
    exact = cells(result, 0)["untouched"]
    assert exact["AUROC, mean"] == f"{100 * np.mean(areas):.2f}"
    assert exact["FPR95, mean"] == f"{100 * np.mean(rates):.2f}"

    kept, found = {}, {}
    for dtype in ("float32", "bfloat16"):
        detector = SparseEnergyOODDetector(
            module,
            max_epochs=0,
            preprocess=NormalizeImages(MEAN, STD),
            precision=dtype,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(*images(300, seed=0)).calibrate(fresh)
        kept[dtype] = [detector.predict(rows) for rows in (ids, *oods)]
        found[dtype] = np.concatenate([detector.score_samples(rows) for rows in (ids, *oods)])
    flips = [100 * (a != b) for a, b in zip(kept["float32"], kept["bfloat16"], strict=True)]
    line = cells(result, 1)["untouched"]
    assert line["ID decisions that flip, %"] == f"{flips[0].mean():.2f}"
    assert line["OOD decisions that flip, %"] == f"{np.concatenate(flips[1:]).mean():.2f}"
    change = 100 * np.abs(found["bfloat16"] / found["float32"] - 1)
    assert line["score, largest change, %"] == f"{change.max():.2f}"
    assert line["score, median change, %"] == f"{np.median(change):.2f}"
    assert exact["ID kept"] == f"{100 * np.mean(kept['float32'][0] == 1):.1f}"
    assert exact["ID kept, scored in bfloat16"] == f"{100 * np.mean(kept['bfloat16'][0] == 1):.1f}"
    assert change.max() > 0.01


def test_a_head_in_float32_takes_the_features_as_they_are(precision, module):
    features = torch.from_numpy(
        np.random.RandomState(0).normal(size=(5, module.linear.in_features))
    ).bfloat16()
    energy = precision.energy_through(module.linear)
    with torch.inference_mode():
        found = energy(features.double(), torch.zeros(5, 2).double())
    weight, bias = (p.detach().double() for p in (module.linear.weight, module.linear.bias))
    expected = torch.logsumexp(features.double() @ weight.T + bias, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_file_holds_the_seeds_that_are_done(precision, pair, files, monkeypatch, capsys):
    def interrupted(module, weight, seed, options, data):
        if seed == 1:
            raise KeyboardInterrupt
        return module

    ways = dict(zip((precision.FLOAT32, precision.BFLOAT16), pair, strict=True))
    monkeypatch.setattr(precision, "fine_tuned", interrupted)
    monkeypatch.setattr(precision, "judge", lambda *_: ways | {precision.MIXED: pair[1]})
    with pytest.raises(KeyboardInterrupt):
        precision.main([*LINE, "--seeds", "0", "1"])
    result = json.loads(Path("kept/net.json").read_text(encoding="utf-8"))
    assert list(cells(result, 1)) == ["untouched", "control, seed 0", "weight 0.02, seed 0"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--id", "absent.npz", "absent.npz: no such file"),
        ("--train-rows", "301", "--train-rows 301 exceeds the 300 rows of id.npz"),
        ("--test-rows", "201", "--test-rows 201 exceeds the 200 rows of id.npz"),
        ("--network", "vgg", "--network vgg is unknown"),
    ],
)
def test_refuses_bad_input(precision, files, option, value, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        precision.main([*LINE, option, value])


# The page


def rendered(page, folder, *source):
    """What a reader sees, where docutils warns of nothing."""
    core = pytest.importorskip("docutils.core")
    page.write(folder, *source)
    text = (folder / "index.rst").read_text(encoding="utf-8")
    settings = {"halt_level": 2, "report_level": 2, "syntax_highlight": "none"}
    return core.publish_doctree(text, settings_overrides=settings)


def test_the_page_shows_each_run(page, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    assert "There are no measurements" in rendered(page, tmp_path / "empty", source).astext()
    tables = [
        {
            "title": "One epoch, `score_samples`",
            "columns": ["work", "device_", "seconds"],
            "lines": [["a*b", "|x|", "1.5 (1.4 to 1.6)"], ["-", "- 2", "-0.25"], ["", "c", ""]],
            "n_names": 2,
            "note": "- left out: x_ (pip install 'a*b')\n- bfloat16 not in hardware",
        },
        {
            "title": "Another",
            "columns": ["a", "b"],
            "lines": [["7", "8"]],
            "n_names": 1,
            "note": "A *note*.",
        },
        {"title": "A third", "columns": ["a", "b"], "lines": [], "n_names": 1, "note": ""},
    ]
    run = {"title": "Speed", "machine": "x86_64, 2 cores", "versions": "torch 2.0+cpu"}
    for name in ("gpu", "cpu_"):
        facts = {"command": f"python benchmarks/speed.py --out {name}.json", "tables": tables}
        (source / f"{name}.json").write_text(json.dumps(run | facts), encoding="utf-8")
    tree = rendered(page, tmp_path / "page", source)
    titles = [node.astext() for node in tree.findall() if node.tagname == "title"]
    assert titles[-6:] == [
        *("Speed (cpu_)", "One epoch, `score_samples`", "Another"),
        *("Speed (gpu)", "One epoch, `score_samples`", "Another"),
    ]
    first = next(node for node in tree.findall() if node.tagname == "table")
    entries = [node.astext() for node in first.findall() if node.tagname == "entry"]
    expected = tables[0]
    assert entries == [*expected["columns"], *(cell for line in expected["lines"] for cell in line)]
    blocks = [node.astext() for node in tree.findall() if node.tagname == "literal_block"]
    assert blocks == [f"python benchmarks/speed.py --out {name}.json" for name in ("cpu_", "gpu")]
    items = [node.astext() for node in tree.findall() if node.tagname == "list_item"]
    assert "left out: x_ (pip install 'a*b')" in items
    assert "machine: x86_64, 2 cores" in items
    assert "versions: torch 2.0+cpu" in items
    paragraphs = [node.astext() for node in tree.findall() if node.tagname == "paragraph"]
    assert {"A *note*.", "A third: no figures."} <= set(paragraphs)


def test_the_files_of_the_repository_make_the_page(page, tmp_path):
    text = rendered(page, tmp_path / "page").astext()
    for path in (ROOT / "benchmarks" / "results" / "speed").glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["command"] in text
        for entry in run["tables"]:
            assert all(len(line) == len(entry["columns"]) for line in entry["lines"])
            assert entry["title"] in text
