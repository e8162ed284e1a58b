"""Every remedy that a message prints is followed to the letter, and then the call works.

A case is a mistake, a few words of the message that answers it, and what the message says to do.
Where that is code, it is taken out of the message: ``told("X.reshape(-1, 1)", X=...)`` says that
the message quotes this, and gives its value. The last tests read the package: each of its messages
has a case here, or a reason in `ELSEWHERE`.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from remedies import (
    common,
    copies,
    exporting,
    forwards,
    heads,
    images,
    labels,
    layers,
    outputs,
    pictures,
    rows,
    saved,
    scores,
    selection,
    silence,
    training,
    watching,
)
from remedies.common import Told, answer_to, works
from sklearn.frozen import FrozenEstimator

import skood
from skood import RejectingClassifier
from skood.metrics import detection_report
from skood.model_selection import AccuracyGuard, InDistributionKFold, make_ood_scorer
from skood.monitoring import DriftMonitor
from skood.networks import default_network
from skood.plotting import ScoreDistributionDisplay
from skood.randomness import random_generator

ROOMS = {
    "rows": rows,
    "labels": labels,
    "outputs": outputs,
    "heads": heads,
    "forwards": forwards,
    "copies": copies,
    "training": training,
    "scores": scores,
    "selection": selection,
    "pictures": pictures,
    "layers": layers,
    "silence": silence,
    "saved": saved,
    "exporting": exporting,
    "watching": watching,
    "images": images,
}

CASES = [
    pytest.param(mistake, id=f"{name}: {mistake.words}")
    for name, room in ROOMS.items()
    for mistake in room.CASES
]

LONGEST = 400
"""Characters of a message."""

PACKAGE = Path(skood.__file__).parent


@pytest.fixture(autouse=True)
def _where_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the folder of memory=
    of_numpy = np.random.get_state()
    np.random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    np.random.set_state(of_numpy)
    plt.close("all")


@pytest.mark.parametrize("mistake", CASES)
def test_what_the_answer_to_a_mistake_says_works(mistake):
    told = Told(answer_to(mistake.wrong))
    told.says(mistake.words)
    assert max(map(len, told.message.splitlines())) <= LONGEST, told.message
    for remedy in mistake.remedies:
        works(functools.partial(remedy, told))


# Values that are long

LONG = [f"a class with a long name, {number}" for number in range(1000)]
MANY = {name: [0.0] for name in LONG}


class Long:
    """A function with a long repr."""

    def __call__(self, *arguments):
        return None

    def __repr__(self):
        return "Long(\n" + 1000 * "  option=value,\n" + ")"


def labelled(labels):
    """A detector that knows other labels."""
    other = copy.deepcopy(common.fitted())
    other.classes_ = np.array(labels)
    return other


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: common.fit(common.network(), y=np.resize(LONG, common.N)),
        lambda: common.fit(common.Changed(lambda z: dict.fromkeys(LONG, z))),
        lambda: common.fit(common.Changed(lambda z: [{}] * 1000)),
        lambda: common.fit(common.network(), penalty=Long()),
        lambda: common.fit(common.network(), score_function=Long()),
        lambda: common.fit(common.network(), ood_label=LONG[0] * 99, y=common.Y),
        lambda: common.fit(common.network(), device=LONG[0] * 99),
        lambda: common.fit(common.network(), head=LONG[0] * 99),
        lambda: labelled(LONG).predict_class(common.X, reject_label=LONG[0]),
        lambda: labelled(LONG[:3]).id_accuracy(common.X, np.resize(LONG, common.N)),
        lambda: RejectingClassifier(common.detector(), reject_label=LONG[0]).fit(
            common.X, np.resize(LONG, common.N)
        ),
        lambda: RejectingClassifier(FrozenEstimator(labelled(LONG[:3]))).fit(
            common.X, np.resize(LONG, common.N)
        ),
        lambda: list(InDistributionKFold(ood_label="ood").split(common.X, LONG[: common.N])),
        lambda: list(InDistributionKFold().split(common.X, LONG[: common.N])),
        lambda: make_ood_scorer()(labelled(LONG[:3]), common.X, LONG[: common.N]),
        lambda: make_ood_scorer(["auroc"], {}, ood_label=-1),
        lambda: make_ood_scorer(LONG, ood_label=-1),
        lambda: make_ood_scorer([Long(), Long()], MANY),
        lambda: make_ood_scorer("auroc", MANY, ood_label=-1)(common.fitted(), common.X, None),
        lambda: AccuracyGuard()({f"mean_test_{name}": [0.0] for name in LONG}),
        lambda: pictures.draw({"params": [{name: 1 for name in LONG}]}),
        lambda: pictures.draw(common.LISTS | {"params": [{"sparsity_weight": LONG}] * 3}),
        lambda: pictures.draw(
            common.LISTS | {f"mean_test_{name}": [0.0] for name in LONG}, metric="mean_l1"
        ),
        lambda: pictures.table(MANY, {}),
        lambda: pictures.table(ood_scores={"a": MANY, "b": {}}),
        lambda: pictures.cells(columns=LONG),
        lambda: ScoreDistributionDisplay.from_estimator(Long(), common.X, common.X),
        lambda: default_network((1000,), 2, mean=np.zeros(1000), std=-np.ones(1000)),
        lambda: default_network(LONG, 2),
        lambda: random_generator(Long()),
        lambda: DriftMonitor(Long()),
        lambda: DriftMonitor.from_state(common.fitted(), MANY),
    ],
)
def test_what_is_long_is_cut(mistake):
    message = answer_to(mistake)
    assert message
    assert len(message) <= LONGEST, message


# Packages that are not installed


def test_what_needs_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    told = Told(answer_to(pictures.draw))
    assert told.says("run `pip install 'skood[plot]'`")
    extras = importlib.metadata.metadata("skood").get_all("Requires-Dist")
    assert any(re.fullmatch(r"matplotlib; extra == .plot.", extra) for extra in extras)


def test_what_needs_pandas_says_how_to_install_it_and_what_needs_none(monkeypatch):
    report = detection_report([1.0, 2.0], [0.0])
    monkeypatch.setitem(sys.modules, "pandas", None)
    told = Told(answer_to(report.to_frame))
    assert told.says("run `pip install pandas`", "or use to_dict")
    assert report.to_dict()["ood"]["auroc"] == 1


# Every message is met

FILES = "rows on both sides, and files: tests/test_exporting.py"
FORM = "the form that is expected: tests/test_public_functions.py"
REPORT = "a sentence of a report: tests/test_reporting.py"

ELSEWHERE = {
    "predicted classes have too few calibration": "a report: tests/test_reporting.py",
    "is a device or a pipe": FILES,
    "it now computes on the CPU": "nothing to do: it computes elsewhere",
    "has no memory for a forward of": "nothing to do: it goes on with fewer rows",
    "Drawing needs matplotlib": "a test above, without matplotlib",
    "to_frame needs pandas": "a test above, without pandas",
    "predict_frame needs pandas": "as to_frame; tests/test_detector.py",
    "Reading images needs Pillow": "tests/test_datasets.py, without Pillow",
    "lost the others of its torch.distributed group": "processes: tests/test_torchrun.py",
    "calls fit with another": "processes: tests/test_torchrun.py",
    "processes without rows": "processes: tests/test_torchrun.py",
    "processes without any": "processes: tests/test_torchrun.py",
    "trains on one process, and there are": "processes: tests/test_torchrun.py",
    "The score refuses the network after fine-tuning": "tests/test_path.py",
    "The logits are NaN or infinite after fine-tuning": "tests/test_path.py, by a judge",
    "so there is nothing to fine-tune": "met before by what carries no gradient",
    "memory= {}: {}. {}.": "its kinds: tests/test_caching.py",
    "needs more than 2**62 rows": FORM,
    "{} is a {}; expected {}.": FORM,
    "{} is {}, {}, of shape {}; expected {}.": FORM,
    "candidates with {} and {} with accuracy_change": FORM,
    "x is {}; expected a tensor of rows": FORM,
    "pass an object to be called": FORM,
    "expected axes of matplotlib": FORM,
    "{} has shape {}; expected ({}).": FORM,
    "expected a dict from names to estimators": FORM,
    "expected a list of names": FORM,
    "logits has {} rows and features": FORM,
    "bias has {} values and weight": FORM,
    "expected Outputs in a list": FORM,
    "expected Outputs(features, logits, labels)": FORM,
    "labels is no tensor of int64": FORM,
    "outputs has features of {} rows": FORM,
    "labels must be within 0..{}, the logits": FORM,
    "outputs is empty": FORM,
    "expected a Head.": FORM,
    "columns; expected {}, as in fit.": FORM,
    "expected an array, a data frame or another sequence of rows": FORM,
    "expected the cv_results_ of a search": FORM,
    "mixes integers beyond 2**53": FORM,
    "cannot be trained with float32 weights instead": "tests/engine/test_precision.py",
    "The network cannot be trained in bfloat16": "tests/engine/test_precision.py",
    "X changed while it was read": "nothing to do with a single thread",
    "It is named {} here": "a hint: tests/test_metrics.py",
    "The estimator around RejectingClassifier": "tests/test_rejection.py",
    "is not there: make it first": FILES,
    "pass the name of a file": FILES,
    "{} needs {}, which is not installed": FILES,
    "The graph takes more than a file": FILES,
    "onnxruntime cannot run the graph": FILES,
    "torch.onnx cannot translate the graph": FILES,
    "The file was not written": FILES,
    "The detector cannot score the rows that the file": FILES,
    "No row was found that is clearly": FILES,
    "rows that are lists or arrays. Pass a list": "rows of several lengths: tests/test_rows.py",
    "Pass references like those of fit": "rows of several lengths: tests/test_rows.py",
    "If rows have several lengths": "rows of several lengths: tests/test_rows.py",
    "in-distribution rows; the threshold was placed to keep": REPORT,
    "Before fine-tuning: {}.": REPORT,
    "In brackets: where the share of all such rows lies": REPORT,
    "rejected: the share that the detector's own threshold rejects": REPORT,
    "the share kept by a threshold that keeps": REPORT,
    "AUROC: the chance that an in-distribution row scores higher": REPORT,
    "No share is promised for a single class": REPORT,
    "Each predicted class has its threshold": REPORT,
    "The shares of outliers hold for sets like the": REPORT,
    "No outliers were tried": REPORT,
    "This holds for rows drawn like the calibration rows": REPORT,
    "A row that is kept may still get the wrong class": REPORT,
}
"""Messages without a case: words of each, and why."""


def sentences(code: ast.AST) -> Iterator[str]:
    """Strings of a program that read as sentences, with {} for what is put in; no docstrings."""
    if isinstance(code, ast.Expr) and isinstance(code.value, ast.Constant):
        return
    parts = code.values if isinstance(code, ast.JoinedStr) else [code]
    text = "".join(
        str(part.value) if isinstance(part, ast.Constant) else "{}"
        for part in parts
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )
    if len(text.split()) > 3 and text.endswith("."):
        yield text
    for child in ast.iter_child_nodes(code):
        if not (isinstance(code, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from sentences(child)


MESSAGES = {
    text: path.relative_to(PACKAGE)
    for path in sorted(PACKAGE.rglob("*.py"))
    for text in sentences(ast.parse(path.read_text()))
}


def test_each_message_has_a_case_or_a_reason_to_have_none():
    met = [mistake.words for room in ROOMS.values() for mistake in room.CASES]
    known = [*met, *ELSEWHERE]
    unmet = {text: path for text, path in MESSAGES.items() if not any(w in text for w in known)}
    assert not unmet


def test_no_reason_is_left_of_a_message_that_is_gone():
    assert [words for words in ELSEWHERE if not any(words in text for text in MESSAGES)] == []
