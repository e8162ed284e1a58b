"""Every public function gives the right value or an error that names the argument."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.ensemble import IsolationForest

import skood
import skood.datasets
from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.monitoring import DriftMonitor
from skood.plotting import DriftDisplay
from skood.reporting import report
from skood.scores import Head, LayeredOutputs, Outputs

MODULES = [
    "skood.penalties",
    "skood.scores",
    "skood.calibration",
    "skood.metrics",
    "skood.model_selection",
    "skood.monitoring",
    "skood.networks",
    "skood.datasets",
    "skood.plotting",
    "skood.reporting",
]

RANDOM = np.random.RandomState(0)
TABLE = RANDOM.standard_normal((60, 3))
LABELS = np.arange(60) % 3
FEATURES = torch.from_numpy(RANDOM.random_sample((40, 4)))
HEAD = Head(torch.eye(3, 4).double(), torch.zeros(3).double())
OUTPUTS = [Outputs(FEATURES, HEAD(FEATURES), torch.arange(40) % 3)]
LAYERS = torch.stack([FEATURES, FEATURES.abs() + 0.1], dim=1)
LAYERED = [LayeredOutputs(*OUTPUTS[0], LAYERS)]
ALL_SEEN = {"features": FEATURES, "logits": HEAD(FEATURES), "layers": LAYERS}
DETECTOR = skood.SparseEnergyOODDetector(
    torch.nn.Linear(3, 3), max_epochs=0, calibration_size=20, tpr=0.9, random_state=0
).fit(TABLE)
FOREST = IsolationForest(n_estimators=2, random_state=0).fit(TABLE)
SCORES = {"score_id": [3.0, 2.0, 1.0], "score_ood": [1.5, 0.0]}
# Rows, which the estimator judges.
ROWS = {"X_id": TABLE, "X_ood": TABLE + 5}
FOLDER = Path(tempfile.mkdtemp())
for colour in range(3):
    Image.new("RGB", (4, 4), (80 * colour, 0, 0)).save(FOLDER / f"{colour}.png")
CV_RESULTS = {
    "params": [{"sparsity_weight": 0.0}, {"sparsity_weight": 0.1}],
    "mean_test_auroc": [0.5, 0.9],
    "std_test_auroc": [0.1, 0.1],
    "mean_test_accuracy_change": [0.0, -0.001],
    "std_test_accuracy_change": [0.0, 0.0],
}


def fitted(score):
    return score().fit(OUTPUTS, HEAD)


def pixels_of(image):
    return torch.tensor(np.array(image)).movedim(-1, 0)


def call(score):
    return lambda features, logits: score(features, logits)


# For each public name, the calls to try, each with right arguments.
CALLS = {
    "l1": [(None, {"features": FEATURES})],
    "l1_over_l2": [(None, {"features": FEATURES})],
    "hoyer_index": [(None, {"features": FEATURES})],
    "get_penalty": [(None, {"penalty": "l1"})],
    "fit_penalty": [
        (None, {"penalty": skood.penalties.l1, "features": lambda: FEATURES}),
        (None, {"penalty": skood.penalties.PENALTIES["relative_l1"], "features": lambda: FEATURES}),
    ],
    "Relative": [
        (None, {"penalty": skood.penalties.l1, "unit": 2.0}),
        (skood.penalties.Relative(skood.penalties.l1), {"features": FEATURES}),
        (skood.penalties.Relative(skood.penalties.l1).fit, {"features": FEATURES}),
    ],
    "Head": [
        (None, {"weight": HEAD.weight, "bias": HEAD.bias}),
        (HEAD, {"features": FEATURES}),
    ],
    "Outputs": [],
    "LayeredOutputs": [],
    "list_scores": [],
    "get_score": [(None, {"score": "energy"})],
    "fit_score": [
        (None, {"score": skood.scores.Vim(), "outputs": OUTPUTS, "head": lambda: HEAD}),
        (
            None,
            {
                "score": skood.scores.TwoViews(),
                "outputs": OUTPUTS,
                "head": lambda: HEAD,
                "held_out": lambda: OUTPUTS,
            },
        ),
    ],
    "apply_score": [
        (None, {"score": skood.scores.Energy(), "features": None, "logits": FEATURES}),
    ],
    **{
        type(score).__name__: [(call(score), {"features": None, "logits": FEATURES})]
        for score in (
            skood.scores.Energy(),
            skood.scores.Gen(),
            skood.scores.MaxLogit(),
            skood.scores.MaxSoftmax(),
            skood.scores.Odin(),
        )
    },
    **{
        score.__name__: [
            (call(fitted(score)), {"features": FEATURES, "logits": HEAD(FEATURES)}),
            (score().fit, {"outputs": OUTPUTS, "head": HEAD}),
        ]
        for score in (
            skood.scores.Dice,
            skood.scores.DirectionLength,
            skood.scores.Knn,
            skood.scores.Mahalanobis,
            skood.scores.MahalanobisPlusPlus,
            skood.scores.ReAct,
            skood.scores.Scale,
            skood.scores.Vim,
        )
        if score is not skood.scores.Knn
    },
    "Knn": [
        (call(skood.scores.Knn(3).fit(OUTPUTS)), {"features": FEATURES, "logits": FEATURES}),
        (skood.scores.Knn(3).fit, {"outputs": OUTPUTS}),
    ],
    "TwoViews": [
        (
            call(skood.scores.TwoViews().fit(OUTPUTS, None, OUTPUTS)),
            {"features": FEATURES, "logits": FEATURES},
        ),
        (skood.scores.TwoViews().fit, {"outputs": OUTPUTS, "head": HEAD, "held_out": OUTPUTS}),
    ],
    "LayerMoments": [
        (call(skood.scores.LayerMoments().fit(LAYERED)), ALL_SEEN),
        (skood.scores.LayerMoments().fit, {"outputs": LAYERED}),
    ],
    "ThreeViews": [
        (call(skood.scores.ThreeViews().fit(LAYERED, None, LAYERED)), ALL_SEEN),
        (skood.scores.ThreeViews().fit, {"outputs": LAYERED, "head": HEAD, "held_out": LAYERED}),
    ],
    "calibration_rank": [(None, {"n_rows": 19, "tpr": 0.95})],
    "minimum_rows": [(None, {"rank": 1, "tpr": 0.95})],
    "place_threshold": [(None, {"calibration_scores": np.arange(39.0), "tpr": 0.95})],
    "place_class_thresholds": [
        (
            None,
            {
                "calibration_scores": [3.0, 2.0, 1.0, 0.0],
                "classes": [0, 0, 1, 1],
                "n_classes": 2,
                "tpr": 0.5,
            },
        )
    ],
    "tpr_by_cost": [
        (None, SCORES | {"cost_of_keeping": 2.0}),
        (None, {"score_id": [3.0, 2.0], "score_new": [1.0, 2.5], "ood_share": 0.5}),
    ],
    "conformal_p_values": [
        (None, {"scores": [0.5], "calibration_scores": np.arange(39.0), "tpr": 0.95})
    ],
    "calibration_split": [
        (
            None,
            {"labels": LABELS, "size": 0.5, "tpr": 0.9, "random_state": RANDOM},
        )
    ],
    "outliers_at_fdr": [(None, {"p_values": [0.01, 0.5], "fdr": 0.1})],
    "BatchCheck": [],
    "DriftReport": [],
    "DriftMonitor": [
        (
            None,
            {"detector": DETECTOR, "false_alarm": 0.1, "window": 50, "random_state": 0},
        ),
        ("from_state", {"detector": DETECTOR, "state": DriftMonitor(DETECTOR).get_state()}),
    ],
    "DetectorReport": [
        (report(DETECTOR, TABLE).save, {"path": "report.md"}),
    ],
    "report": [
        (None, {"detector": DETECTOR, **ROWS, "y_id": LABELS}),
    ],
    "fpr_at_tpr": [(None, SCORES | {"tpr": 0.95, "positive": "id", "method": "at_least"})],
    **{
        name: [(None, SCORES | {"positive": "id"})] for name in ("auroc", "aupr", "detection_error")
    },
    **{
        name: [(None, {"scores": [3.0, 2.0], "correct": [True, False]})]
        for name in ("aurc", "risk_coverage_curve")
    },
    "detection_report": [
        (
            None,
            SCORES
            | {
                "tpr": 0.95,
                "positive": "id",
                "n_bootstrap": 2,
                "confidence": 0.9,
                "random_state": 0,
            },
        )
    ],
    "DetectionReport": [],
    "InDistributionKFold": [
        (None, {"n_splits": 2, "ood_label": -1, "shuffle": True, "random_state": 0}),
        (
            lambda X, y: list(InDistributionKFold(2, ood_label=2).split(X, y)),
            {"X": TABLE, "y": LABELS},
        ),
    ],
    "AccuracyGuard": [
        (None, {"metric": "auroc", "tolerance": 0.01}),
        (AccuracyGuard(), {"cv_results": CV_RESULTS}),
        *(
            (
                lambda auroc, name=name: AccuracyGuard()(CV_RESULTS | {name: auroc}),
                {"auroc": CV_RESULTS[name]},
            )
            for name in ("mean_test_auroc",)
        ),
    ],
    "make_ood_scorer": [
        (None, {"metric": "auroc", "X_ood": TABLE, "ood_label": -1, "positive": "id"}),
        (
            make_ood_scorer("auroc", X_ood=TABLE + 5, ood_label=-1),
            {"estimator": FOREST, "X": TABLE, "y": LABELS},
        ),
    ],
    "ImageFiles": [],
    "find_images": [(None, {"folder": FOLDER, "on_error": "raise"})],
    "LoadImages": [
        (None, {"transform": pixels_of}),
        (skood.datasets.LoadImages(pixels_of), {"paths": sorted(FOLDER.iterdir())}),
    ],
    "surrogate_outliers": [
        (None, {"X": TABLE, "y": LABELS, "kind": "mixture", "random_state": 0}),
        (None, {"X": TABLE, "kind": "auto", "random_state": 0}),
    ],
    "default_network": [
        (None, {"input_shape": (3,), "n_classes": 2, "mean": [0, 0, 0], "std": [1, 1, 1]})
    ],
    "Standardize": [
        (None, {"mean": [0.0], "std": [1.0]}),
        (skood.networks.Standardize([0.0], [1.0]), {"x": torch.ones(2, 1)}),
    ],
    "NormalizeImages": [
        (None, {"mean": [0.0], "std": [1.0]}),
        (skood.networks.NormalizeImages(), {"images": torch.ones(2, 3, 8, 8, dtype=torch.uint8)}),
    ],
    "CifarResNet": [(None, {"depth": 8, "n_classes": 2})],
    "CifarDenseNet": [(None, {"depth": 10, "growth": 2, "n_classes": 2})],
    "WideResNet": [(None, {"depth": 10, "widen_factor": 1, "dropout": 0.1, "n_classes": 2})],
    "ScoreDistributionDisplay": [
        (None, SCORES | {"threshold": 1.0, "score_name": "score"}),
        ("from_predictions", SCORES | {"threshold": 1.0, "ax": None}),
        ("from_estimator", {"estimator": FOREST, **ROWS, "ax": None}),
    ],
    "ImageGridDisplay": [
        (None, {"images": {"a": np.ones((1, 2, 2))}, "captions": {"a": ["b"]}}),
        ("from_predictions", {"score": [1.0], "X": np.ones((1, 2, 2)), "n_images": 1, "ax": None}),
        ("from_estimator", {"estimator": None, "X": np.ones((1, 2, 2)), "n_images": 1}),
    ],
    "RejectionConfusionDisplay": [
        (None, {"y_true": [0, 1], "y_pred": [0, -1], "reject_label": -1}),
        ("from_predictions", {"y_true": [0, 1], "y_pred": [0, -1], "ax": None}),
        ("from_estimator", {"estimator": None, "X": TABLE, "y": LABELS}),
    ],
    "RiskCoverageDisplay": [
        (None, {"scores": [3.0, 2.0], "correct": [True, False], "threshold": 1.0}),
        ("from_predictions", {"scores": [3.0, 2.0], "correct": [True, False], "ax": None}),
        ("from_estimator", {"estimator": DETECTOR, "X": TABLE, "y": LABELS, "ax": None}),
    ],
    "ClassCoverageDisplay": [
        (None, {"y_true": [0, 1], "kept": [True, False], "target": 0.9}),
        ("from_predictions", {"y_true": [0, 1], "kept": [True, False], "ax": None}),
        ("from_estimator", {"estimator": DETECTOR, "X": TABLE, "y": LABELS, "ax": None}),
    ],
    "DetectionRocDisplay": [
        (None, SCORES | {"threshold": 1.0}),
        ("from_predictions", SCORES | {"threshold": 1.0, "ax": None}),
        ("from_estimator", {"estimator": FOREST, **ROWS, "ax": None}),
    ],
    "FeatureActivityDisplay": [
        ("from_predictions", {"features_id": TABLE, "features_ood": TABLE, "ax": None}),
        ("from_estimator", {"estimator": None, **ROWS}),
    ],
    "SelectionDisplay": [
        (None, {"cv_results": CV_RESULTS, "metric": "auroc", "tolerance": 0.01, "chosen": 0}),
        ("from_cv_results", {"cv_results": CV_RESULTS, "ax": None}),
        ("from_estimator", {"search": None}),
    ],
    "DriftDisplay": [
        (
            None,
            {
                "history": [[50, -0.2, 0.04, 0.6]],
                "false_alarm": 0.01,
                "expected": [0.0, 0.1],
                "alarm_row": 3,
                "change_row": 2,
            },
        ),
        ("from_monitor", {"monitor": None}),
        (
            DriftDisplay(history=np.ones((2, 4)), false_alarm=0.1).plot,
            {"ax": None},
        ),
    ],
    "DetectionTableDisplay": [
        (
            None,
            {
                "values": [[1.0, 2.0]],
                "methods": ["a"],
                "columns": ["b", "c"],
                "spread": [[0.0, 1.0]],
                "lower_is_better": True,
                "label": "label",
            },
        ),
        (
            "from_predictions",
            {
                "score_id": {"a": [1.0]},
                "score_ood": {"a": {"b": [1.0]}},
                "metric": "fpr95",
                "ax": None,
            },
        ),
        ("from_estimator", {"estimators": {"a": FOREST}, **ROWS, "metric": "fpr95", "ax": None}),
    ],
}

NONSENSE = {
    "None": lambda: None,
    "object": object,
    "string": lambda: "nonsense",
    "empty string": lambda: "",
    "True": lambda: True,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "-1": lambda: -1,
    "0": lambda: 0,
    "1.5": lambda: 1.5,
    "huge": lambda: 10**400,
    "fraction": lambda: Fraction(10**400, 3),
    "complex": lambda: 1j,
    "empty": list,
    "dict": dict,
    "generator": lambda: (i for i in range(3)),
    "set": lambda: {1, 2},
    "bytes": lambda: b"123",
    "NaNs": lambda: [float("nan"), 1.0],
    "infinities": lambda: np.array([np.inf, 1.0, -np.inf]),
    "strings": lambda: ["1", "2", "3"],
    "Nones": lambda: [None, 1, 2],
    "ragged": lambda: [[1, 2], [3]],
    "nested": lambda: np.ones((2, 3, 4, 5, 6)),
    "scalar array": lambda: np.array(3.0),
    "complex array": lambda: np.ones(3, dtype=complex),
    "object array": lambda: np.array([1, "a", None], dtype=object),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "structured": lambda: np.zeros(3, dtype=[("a", int)]),
    "masked": lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    "complex tensor": lambda: torch.ones(3, dtype=torch.complex64),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "meta tensor": lambda: torch.ones(3, dtype=torch.uint8, device="meta"),
    "empty tensor": lambda: torch.empty(0, 4),
    "no columns": lambda: torch.empty(4, 0),
    "wide tensor": lambda: torch.ones(5, 17),
    "int tensor": lambda: torch.ones(3, 4, dtype=torch.int64),
    "nan tensor": lambda: torch.full((3,), torch.nan),
    "class": lambda: dict,
    "module": lambda: np,
}


def callables():
    for module in MODULES:
        public = importlib.import_module(module)
        for name in public.__all__:
            for target, arguments in CALLS.get(name, []):
                owner = getattr(public, name)
                function = owner if target is None else target
                if isinstance(target, str):
                    function = getattr(owner, target)
                suffix = target if isinstance(target, str) else "" if target is None else "()"
                for argument in [name for name in arguments if name not in ROWS]:
                    yield pytest.param(
                        function, arguments, argument, id=f"{name}.{suffix}-{argument}"
                    )


def test_every_public_callable_is_tried():
    for module in MODULES:
        public = importlib.import_module(module)
        names = [name for name in public.__all__ if callable(getattr(public, name))]
        assert set(names) <= set(CALLS), module


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize(("function", "arguments", "argument"), callables())
def test_nonsense_gives_no_other_error_than_one_that_names_the_argument(
    function, arguments, argument
):
    wrong = []
    for kind, make in NONSENSE.items():
        value = make()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                function(**arguments | {argument: value})
        except (TypeError, ValueError) as error:
            if not any(name in str(error) for name in arguments):
                wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:150]}")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, "\n".join(wrong)


# Right values where a cast would lose them


@pytest.mark.parametrize(
    ("higher", "lower"),
    [
        (np.array([2**53 + 1]), np.array([2.0**53])),
        (np.array([2**63 + 1], dtype=np.uint64), np.array([2**63 - 1])),
        (np.array([-(2**53)]), np.array([-(2.0**53) - 2])),
        (np.array([2**53 + 1]), np.array([1.0])),
        (torch.tensor([2**53 + 1]), torch.tensor([2**53])),
        (torch.ones(1, requires_grad=True), torch.zeros(1, dtype=torch.bfloat16)),
        (torch.tensor([1.0], dtype=torch.float16), [False]),
    ],
)
def test_scores_compare_as_they_are(higher, lower):
    assert skood.metrics.auroc(higher, lower) == 1
    assert skood.metrics.fpr_at_tpr(higher, lower) == 0
    assert skood.calibration.conformal_p_values(lower, higher, 0.4) == 0.5
    assert skood.calibration.conformal_p_values(higher, lower, 0.4) == 1


def test_a_threshold_is_the_score_itself():
    scores = np.array([2**53 + 1, 2**53 + 3, 2**53 + 5])
    assert skood.calibration.place_threshold(scores, 0.5) == 2**53 + 3
    assert type(skood.calibration.place_threshold(np.arange(3), 0.5)) is float


def test_a_list_that_numpy_would_round_is_refused():
    with pytest.raises(ValueError, match=r"score_id mixes integers beyond 2\*\*53"):
        skood.metrics.auroc([2**53 + 1, 0.5], [0.0])


@pytest.mark.parametrize("tpr", [0.5, 0.95, 1 - 1e-12, 1 - 2**-53])
@pytest.mark.parametrize("rank", [1, 7, 1000])
def test_the_minimum_of_rows_is_the_first_that_reaches_the_rank(rank, tpr):
    n_rows = skood.calibration.minimum_rows(rank, tpr)
    assert skood.calibration.calibration_rank(n_rows, tpr) >= rank
    assert skood.calibration.calibration_rank(n_rows - 1, tpr) < rank


@pytest.mark.parametrize(
    "X",
    [
        np.ones((4, 3)),
        np.c_[np.arange(9.0), np.ones(9)],
        np.ones((4, 8, 8)),
        np.where(np.eye(4) > 0, np.nan, 1.0),
        np.where(np.eye(4) > 0, np.inf, 1.0),
    ],
)
def test_no_surrogates_are_made_that_would_be_rows(X):
    with pytest.raises(ValueError, match="X"):
        skood.model_selection.surrogate_outliers(X, random_state=0)


def test_a_guard_takes_no_candidate_with_infinite_scores():
    guard = AccuracyGuard()
    results = {"mean_test_auroc": [0.5, np.inf], "mean_test_accuracy_change": [0.0, 0.0]}
    assert guard(results) == 0
    results = {"mean_test_auroc": [np.inf, -np.inf], "mean_test_accuracy_change": [0.0, np.nan]}
    with pytest.raises(ValueError, match="All 2 candidates have NaN or infinity"):
        guard(results)


@pytest.mark.parametrize("name", ["FPR95", "fpr95", "fpr_at_tpr", "neg_fpr_at_tpr"])
def test_errors_know_the_names_that_a_metric_has_elsewhere(name):
    if name != "neg_fpr_at_tpr":
        with pytest.raises(ValueError, match="'neg_fpr_at_tpr'"):
            make_ood_scorer(name)
    if name != "fpr95":
        with pytest.raises(ValueError, match="named 'fpr95' here"):
            skood.plotting.DetectionTableDisplay.from_predictions(
                {"a": [1.0]}, {"a": [1.0]}, metric=name
            )
