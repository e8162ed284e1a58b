from __future__ import annotations

import csv
import importlib
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from skood.networks import CifarResNet

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def script(monkeypatch):
    """A function that imports a benchmark by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def real_images(script):
    return script("real_images")


@pytest.fixture
def memory(script):
    return script("memory")


def images(n_rows, seed):
    """Noise of two classes, dark above or dark below."""
    random = np.random.RandomState(seed)
    y = random.randint(2, size=n_rows)
    x = random.randint(128, size=(n_rows, 8, 8, 3)).astype(np.uint8)
    x[y == 0, :4] += 90
    x[y == 1, 4:] += 90
    return x, y


def logits(module, x):
    """Without the package: normalised as the published ResNets were."""
    batch = torch.from_numpy(((x / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    return module(batch)


@pytest.fixture(scope="module")
def module():
    x, y = images(300, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CifarResNet(8, n_classes=2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        for _ in range(12):
            loss = F.cross_entropy(logits(module, x), torch.from_numpy(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()


@pytest.fixture
def files(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x_train, y_train = images(300, seed=0)
    x_test, y_test = images(200, seed=1)
    np.savez("id.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    random = np.random.RandomState(2)
    np.savez("noise.npz", x=random.randint(256, size=(90, 8, 8, 3)).astype(np.uint8))
    np.savez("intel_scenes.npz", x=np.repeat(x_test[:80, :, :1], 8, axis=2))
    torch.save(module.state_dict(), "net.pt")
    return tmp_path


def arguments(**changed):
    """Command line, with some options changed, or left out where None."""
    options = {
        "id": "id.npz",
        "ood": ["noise.npz", "intel_scenes.npz"],
        "network": "resnet8",
        "checkpoint": "net.pt",
        "weights": ["0.01"],
        "seeds": ["0", "1"],
        "epochs": "1",
        "train_rows": "200",
        "test_rows": "160",
        "csv": "results.csv",
    } | changed
    line = []
    for name, value in options.items():
        if value is not None:
            line += ["--" + name.replace("_", "-"), *([value] if isinstance(value, str) else value)]
    return line


def results():
    with open("results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_end_to_end(real_images, files, module, capsys):
    real_images.main(arguments())
    output = capsys.readouterr().out
    rows = results()
    assert [(row["seed"], row["method"], row["weight"], row["epochs"]) for row in rows] == [
        (seed, *method)
        for seed in "01"
        for method in (
            ("untouched", "0.0", "0"),
            ("control, weight 0", "0.0", "1"),
            ("l1, weight 0.01", "0.01", "1"),
        )
    ]
    lines = [line for line in output.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [r["method"] for r in rows[:3]]
    assert len({line.count("|") for line in lines}) == 1
    assert "200 of 300 training rows, 160 of 200 test rows" in output
    assert "noise (90 rows)" in output
    assert "intel_scenes stands in for iSUN" in output
    assert "mean FPR95 (not the paper's)" in lines[0]

    # The untouched classifier, from its logits alone.
    x, y = images(200, seed=1)
    picks = np.random.RandomState(0).permutation(200)[:160]
    with torch.no_grad():
        z = logits(module, x[picks]).double()
        ood = {
            name: torch.logsumexp(logits(module, np.load(f"{name}.npz")["x"]).double(), 1).numpy()
            for name in ("noise", "intel_scenes")
        }
    score_id = torch.logsumexp(z, 1).numpy()
    threshold = np.sort(score_id)[160 - 152]  # 152 of 160 are 95 %
    fpr = {name: np.mean(scores >= threshold) for name, scores in ood.items()}
    for row in (rows[0], rows[3]):
        assert float(row["accuracy"]) == np.mean(z.argmax(1).numpy() == y[picks])
        for name in ood:
            assert float(row[f"fpr95 {name}"]) == fpr[name]
        assert float(row["fpr95"]) == np.mean(list(fpr.values()))
        pairs = [np.mean(score_id[:, None] > scores) for scores in ood.values()]
        assert float(row["auroc"]) == pytest.approx(np.mean(pairs), abs=1e-9)
        # Calibrated on 80 test rows at rank 4 = floor(0.05 * 81), counted in the other 80.
        order = np.random.RandomState(int(row["seed"])).permutation(160)
        fresh = np.sort(score_id[order[:80]])[3]
        assert float(row["kept_fresh"]) == np.mean(score_id[order[80:]] >= fresh)
    # Fine-tuning did something, and the weight something else.
    assert len({row["fpr95"] + row["auroc"] for row in rows[:3]}) == 3


def test_resumes_where_it_was_interrupted(real_images, files, monkeypatch, capsys):
    measured = []

    def measure(detector, data, settings):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append((settings["method"], settings["seed"]))
        return dict.fromkeys([*real_images.metric_names(data), "seconds"], 0.1 * len(measured))

    monkeypatch.setattr(real_images, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        real_images.main(arguments())
    first = list(measured)
    assert [(row["method"], int(row["seed"])) for row in results()] == first
    measured.clear()
    real_images.main(arguments())
    assert len(measured) == 2
    assert len({*first, *measured}) == 6
    capsys.readouterr()
    measured.clear()
    real_images.main(arguments())
    assert measured == []
    # Control, seeds 0 and 1: 0.2 and 0.1, the first of the second run.
    assert "| control, weight 0 | 15.0 ± 7.1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "n_measured"),
    [
        ({"weights": ["0.01", "0.05"]}, 1),
        ({"penalty": "l1_over_l2"}, 1),
        ({"epochs": "2"}, 2),
        ({"train_rows": "150"}, 3),
        ({"test_rows": None}, 3),
        ({"normalise": "cifar"}, 3),
        ({"seeds": ["0", "7"]}, 3),
    ],
)
def test_other_settings_are_measured_again(
    real_images, files, monkeypatch, capsys, changed, n_measured
):
    measured = []

    def measure(detector, data, settings):
        measured.append(settings)
        return dict.fromkeys([*real_images.metric_names(data), "seconds"], 0.5)

    monkeypatch.setattr(real_images, "measure", measure)
    real_images.main(arguments(seeds=["0"]))
    measured.clear()
    real_images.main(arguments(**({"seeds": ["0"]} | changed)))
    assert len(measured) == n_measured


def test_other_data_under_the_same_names_are_measured_again(
    real_images, files, monkeypatch, capsys
):
    measured = []

    def measure(detector, data, settings):
        measured.append(settings)
        return dict.fromkeys([*real_images.metric_names(data), "seconds"], 0.5)

    monkeypatch.setattr(real_images, "measure", measure)
    real_images.main(arguments())
    np.savez("noise.npz", x=np.zeros((5, 8, 8, 3), np.uint8))
    real_images.main(arguments())
    assert len(measured) == 12


@pytest.mark.parametrize(
    ("network", "expected"),
    [("resnet20", "imagenet"), ("resnet56", "imagenet"), ("wrn40_2", "cifar")],
)
def test_each_network_has_its_normalisation(real_images, network, expected):
    assert real_images.parse(arguments(network=network)).normalise == expected
    options = real_images.parse(arguments(network=network, normalise="cifar"))
    assert options.normalise == "cifar"


def test_normalisations_are_those_of_the_published_networks(real_images):
    x, _ = images(3, seed=0)
    imagenet = real_images.NORMALISATIONS["imagenet"](torch.from_numpy(x))
    expected = ((x / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(imagenet.numpy(), expected, atol=1e-6)
    white = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    cifar = real_images.NORMALISATIONS["cifar"](white)[0, :, 0, 0]
    np.testing.assert_allclose(cifar, [129.7 / 63, 132 / 62.1, 141.1 / 66.7], rtol=1e-6)


def change(name, **arrays):
    with np.load(name) as old:
        np.savez(name, **{**old, **arrays})


@pytest.mark.parametrize(
    ("damage", "changed", "message"),
    [
        (None, {"id": "absent.npz"}, "absent.npz: no such file"),
        (None, {"ood": ["absent.npz"]}, "absent.npz: no such file"),
        (None, {"checkpoint": "absent.pt"}, "absent.pt: no such file"),
        (lambda: Path("noise.npz").write_text("x"), {}, "noise.npz: not an .npz file"),
        (lambda: np.savez("noise.npz", images=0), {}, "noise.npz: lacks x; .* got images"),
        (lambda: change("id.npz", x_test=0), {}, r"x_test has shape \(\) .* \(n, h, w, 3\)"),
        (
            lambda: change("noise.npz", x=np.zeros((9, 8, 8, 3))),
            {},
            "noise.npz: x has .* dtype float64; expected .* uint8",
        ),
        (
            lambda: change("noise.npz", x=np.zeros((9, 16, 16, 3), np.uint8)),
            {},
            r"noise.npz: x has images of \(16, 16, 3\), but x_train of \(8, 8, 3\)",
        ),
        (lambda: change("id.npz", y_train=np.zeros(3, int)), {}, r"y_train has shape \(3,\)"),
        (lambda: change("id.npz", y_test=np.full(200, 5)), {}, "up to class 5, y_train to 1"),
        (
            lambda: change("noise.npz", x=images(200, seed=1)[0]),
            {},
            "noise.npz: 100% of its images are also in id.npz",
        ),
        (None, {"ood": ["noise.npz", "./noise.npz"]}, "named noise, noise after"),
        (None, {"network": "resnet9"}, "depth.* 9"),
        (None, {"network": "vgg"}, "--network vgg is unknown; expected resnet<depth>"),
        (None, {"network": "wrn10_1"}, "net.pt does not fit wrn10_1 with 2 classes"),
        (None, {"network": "resnet14"}, "net.pt does not fit resnet14 .* Missing key"),
        (
            lambda: Path("net.pt").write_text("x"),
            {},
            "net.pt does not fit resnet8 .* expected its plain state_dict",
        ),
        (None, {"train_rows": "301"}, "--train-rows 301 exceeds the 300 rows of id.npz"),
        (None, {"csv": "absent/results.csv"}, "absent/results.csv cannot be written"),
        (lambda: Path("results.csv").write_text("a,b\n"), {}, "results.csv has other columns"),
    ],
)
def test_refuses_bad_input_before_it_trains(
    real_images, files, monkeypatch, damage, changed, message
):
    def fit(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(real_images.SparseEnergyOODDetector, "fit", fit)
    if damage is not None:
        damage()
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        real_images.main(arguments(**changed))


@pytest.mark.parametrize(
    "changed",
    [{"weights": ["-1"]}, {"weights": ["nan"]}, {"epochs": "0"}, {"penalty": "l7"}, {"id": None}],
)
def test_refuses_bad_options(real_images, files, capsys, changed):
    with pytest.raises(SystemExit) as raised:
        real_images.parse(arguments(**changed))
    assert raised.value.code == 2
    assert f"--{next(iter(changed))}" in capsys.readouterr().err


# Memory


def test_memory_of_scoring_is_a_small_part_of_the_rows(memory, tmp_path, monkeypatch, capsys):
    assert memory.METHODS == ("score_samples", "predict", "decision_function")
    monkeypatch.setattr(memory, "METHODS", ("predict",))  # which calls the others
    monkeypatch.setattr(memory, "TRAINING_ROWS", 200)
    memory.main(["--rows", "300000", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "`python benchmarks/memory.py --rows 300000`" in output
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in output.splitlines()
        if line.startswith("|")
    ]
    assert lines[0] == list(memory.COLUMNS)
    (case,) = lines[2:]
    assert case[:3] == ["predict", "300000", "38.4"]
    _, before, peak, above, vector, rest = map(float, case[2:])
    assert above == pytest.approx(peak - before, abs=0.11)
    assert vector == 2.4
    assert rest == pytest.approx(above - vector, abs=0.11)
    # Some is held for each row; a copy of X would be 38.4.
    assert 1.2 < above < 19.2


def test_memory_is_seen_while_a_call_holds_it(memory):
    def call():
        block = np.ones(8_000_000)
        time.sleep(0.1)
        return len(block)

    before = memory.anonymous_memory()
    assert memory.peak_memory(call) - before > 60_000_000


def test_memory_is_measured_on_linux_alone(memory, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SystemExit, match=r"error: .* Linux"):
        memory.main([])


def test_memory_refuses_no_rows(memory, capsys):
    with pytest.raises(SystemExit):
        memory.main(["--rows", "0"])
    assert "0 is not at least 1" in capsys.readouterr().err


# Surrogates


def surrogate_arguments(**changed):
    options = {"csv": None, "test_rows": None, "weights": ["0", "0.01", "20"], "rows": "90"}
    extra = {"ood_rows": "80", "surrogate_rows": "60", "folder": "kept", "train_rows": "200"}
    return arguments(**(options | extra | changed))


def test_surrogates_end_to_end(script, files, capsys, monkeypatch):
    surrogates = script("surrogates")
    monkeypatch.setattr(surrogates, "RESAMPLINGS", 5)
    surrogates.main(surrogate_arguments())
    first = capsys.readouterr()
    assert len(list(Path("kept").glob("*.npz"))) == 8
    weights = [line.split("|")[1].strip() for line in first.out.splitlines()[4:8]]
    assert weights == ["untouched", "0.0", "0.01", "20.0"]
    kinds = [line.split(" | ")[0].strip("| ") for line in first.out.splitlines()[-8:]]
    assert kinds == list(surrogates.KINDS)
    # What is there is not done again.
    monkeypatch.setattr(surrogates, "make_detector", None)
    surrogates.main(surrogate_arguments())
    assert capsys.readouterr() == (first.out, "")


def test_regret_is_that_of_the_weight_chosen_among_the_accurate(script):
    surrogates = script("surrogates")

    def judged(right, real, surrogate):
        ids = np.linspace(0, 1, 101)
        return {
            "held-out": ids,
            "test": ids,
            "right held-out": np.arange(100) < right,
            "real a": np.repeat([0.0, 1.0], [100 - real, real]),
            "surrogate auto": np.repeat([0.0, 1.0], [100 - surrogate, surrogate]),
        }

    by_weight = {
        "untouched": judged(90, 60, 60),
        0.0: judged(90, 50, 50),
        0.1: judged(89, 30, 40),
        0.2: judged(89, 40, 20),
        0.5: judged(50, 10, 10),
    }
    allowed = surrogates.accurate(by_weight, 0.01)
    assert allowed == [0.0, 0.1, 0.2]
    correlation, regret = surrogates.correlation_and_regret(by_weight, "auto", allowed)
    assert regret == pytest.approx(10)  # 0.2 is chosen, 0.1 is best
    assert correlation == pytest.approx(0.8)


def test_penalty_scale_end_to_end(script, capsys, monkeypatch):
    penalty_scale = script("penalty_scale")
    monkeypatch.setattr(penalty_scale, "WIDTHS", (8, 32))
    monkeypatch.setattr(penalty_scale, "WEIGHTS", {"l1": (0.02, 1e4), "relative_l1": (0.5,)})
    penalty_scale.main(["--seeds", "0", "--epochs", "5"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = {(row[0].strip(), row[1].strip()): row[2:] for row in rows[2:]}
    shares = {
        name: [float(cell.split("/")[0]) for cell in row]
        for name, row in cells.items()
        if "collapses" not in row[0]
    }
    assert shares["none", "0"] == pytest.approx([100, 100], abs=15)
    assert shares["l1", "0.02"][1] < shares["none", "0"][1]
    assert "collapses" in "".join(cells["l1", "10000"])
