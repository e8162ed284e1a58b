"""By what rows detection is judged, and what is told of it."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from judged_fits import correlated_table, fit, judged_fit
from modules import HARM, digit_images, trained_mlp
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from skood import SparseEnergyOODDetector, evidence, path
from skood.calibration import place_threshold
from skood.engine.training import Training
from skood.exceptions import DetectionDropWarning, SelectionWarning
from skood.model_selection import make_ood_scorer, surrogate_outliers, surrogates
from skood.scores import Odin, list_scores


@pytest.fixture(scope="module")
def table():
    return correlated_table()


def test_surrogates_judge_each_kind_of_images(digits):
    X, y = digits.X[:400].reshape(-1, 8, 8), digits.y[:400]
    module = nn.Sequential(nn.Flatten(), digits.module)
    detector = fit((X, y, module), max_epochs=1)
    kinds = [name for name in detector.path_[0] if name.startswith("auroc_")]
    drawn = ["strokes", "silhouettes", "shapes", "glyphs"]
    expected = ["patches", "blur", "contrast", "edges", *drawn]
    assert kinds == [f"auroc_{kind}" for kind in expected]
    for record in detector.path_:
        assert record["auroc"] == pytest.approx(np.mean([record[kind] for kind in kinds]))


def assert_judge_as_they_are(judged, X):
    run, judges = judged
    index = run.judging.rows.index
    np.testing.assert_array_equal(judges.inliers.in_memory(None), X[index])


@pytest.fixture
def pictures(digits):
    X, y = digits.X[:400].reshape(-1, 8, 8), digits.y[:400]
    return X, y, nn.Sequential(nn.Flatten(), digits.module)


def test_images_that_judge_beside_surrogates_stand_for_new_ones(pictures, monkeypatch):
    X, y, module = pictures
    run, judges = judged_fit(pictures, monkeypatch)
    originals = X[run.judging.rows.index]
    turned = judges.inliers.in_memory(None)
    assert turned.shape == originals.shape
    moved = np.abs(turned - originals).mean(axis=(1, 2))
    assert (moved > 0).all()
    assert moved.mean() < np.abs(originals - originals[::-1]).mean() / 2
    # Accuracy is judged by what they are.
    np.testing.assert_array_equal(run.judging.rows.in_memory(None), X[run.judging.rows.index])
    # Beside known outliers they are what they are.
    X, y = np.append(X, 1 - X[:20], axis=0), np.append(y, np.full(20, 99))
    assert_judge_as_they_are(judged_fit((X, y, module), monkeypatch, ood_label=99), X)


def test_images_are_new_to_a_network_that_fit_trains(pictures, monkeypatch):
    X, y, module = pictures
    for network in (None, module):
        assert_judge_as_they_are(judged_fit((X, y, network), monkeypatch, pretrain_epochs=2), X)


def test_what_is_no_picture_is_not_turned(monkeypatch):
    """Classes that differ in the order of three channels, which a turn mixes."""
    random = np.random.RandomState(0)
    y = random.randint(3, size=300)
    steps = np.arange(60)
    frequency = np.array([[0.1, 0.3, 0.5], [0.3, 0.5, 0.1], [0.5, 0.1, 0.3]])[y]
    X = np.sin(frequency[:, :, None] * steps).astype(np.float32)
    module = nn.Sequential(nn.Flatten(), trained_mlp(X.reshape(300, -1), y))
    assert_judge_as_they_are(judged_fit((X, y, module), monkeypatch), X)


def test_rows_of_a_table_judge_as_they_are(table, monkeypatch):
    assert_judge_as_they_are(judged_fit(table, monkeypatch), table[0])


def test_detection_is_judged_by_what_stands_for_new_rows(pictures, monkeypatch):
    settings = {"sparsity_weight": 0.3, "score_function": "auto", "max_epochs": 0}
    plain = fit(pictures, **settings).path_
    as_new = surrogates.as_new

    def unlike(X, random):
        turned = as_new(X, random)
        turned[::4] = random.rand(*turned[::4].shape)  # few enough to be still pictures
        return turned

    monkeypatch.setattr(surrogates, "as_new", unlike)
    changed = fit(pictures, **settings).path_
    for before, after in zip(plain, changed, strict=True):
        assert before["accuracy_after"] == after["accuracy_after"]
        assert before["mean_l1"] == after["mean_l1"]
        if before["score_function"] in ("energy", "two_views"):
            assert after["auroc"] < before["auroc"]


def test_rows_with_nan_that_preprocess_fills_do_not_judge(pictures, monkeypatch):
    X, y, module = pictures
    X = X.copy()
    X[::10, 2, 2] = np.nan
    X[5::10, 2, 2] = np.inf
    run, judges = judged_fit((X, y, module), monkeypatch, preprocess=zeros_for_nan)
    index = run.judging.rows.index
    whole = X[index[np.isfinite(X[index]).all(axis=(1, 2))]]
    turned = judges.inliers.in_memory(None)
    assert turned.shape == whole.shape
    assert 0 < np.abs(turned - whole).mean() < np.abs(whole - whole[::-1]).mean() / 2
    assert all(np.isfinite(rows.in_memory(None)).all() for rows in judges.outliers.values())
    X[:, 2, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"cannot: Every row of X has NaN or infinity\. Label known"
    ):
        judged_fit((X, y, module), monkeypatch, preprocess=zeros_for_nan)


def zeros_for_nan(batch):
    return torch.nan_to_num(batch, posinf=0)


def test_known_outliers_judge_in_place_of_surrogates(table):
    X, y, module = table
    outliers = surrogate_outliers(X[:90], kind="scale", random_state=0)
    known = np.concatenate([X, outliers]), np.concatenate([y, np.full(90, 7)]), module
    detector = fit(known, ood_label=7)
    assert [name for name in detector.path_[0] if name.startswith("auroc_")] == ["auroc_outliers"]


def test_known_outliers_that_are_trained_on_do_not_judge(table, monkeypatch):
    X, y, module = table
    known = np.concatenate([X, X[:9]]), np.concatenate([y, np.full(9, 7)]), module
    for weight, trained in ((0.0, 0), (0.5, 5)):
        settings = {"ood_label": 7, "outlier_weight": weight, "sparsity_weight": 1.0}
        run, judges = judged_fit(known, monkeypatch, **settings)
        assert len(run.trained_outliers) == trained
        assert len(judges.outliers["outliers"]) == 9 - trained
        assert not set(run.trained_outliers) & set(judges.outliers["outliers"].index)


def test_rows_without_surrogates_are_refused_before_training(table, monkeypatch):
    X, y, _ = table
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("has trained"))
    with pytest.raises(ValueError, match="judges by outliers that it makes of X, and cannot"):
        fit((X[:, :1], y, None))


def test_a_score_of_the_gradient_is_fitted_to_be_judged(table):
    class Scaled(Odin):
        """ODIN in units of the largest logit."""

        def fit(self, outputs, head):
            self.unit_ = max(float(some.logits.max()) for some in outputs)
            return self

        def __call__(self, features, logits):
            return super().__call__(features, logits) / self.unit_

    detector = fit(table, score_function=Scaled(), max_epochs=0)
    assert (
        detector.path_[0]["auroc"]
        == fit(table, score_function="odin", max_epochs=0).path_[0]["auroc"]
    )


@pytest.mark.parametrize(
    ("n_rows", "let_in", "shut_out", "expected"),
    [
        (100, 14, 2, True),  # 12 > 10, and 12 > 2 sqrt(16) = 8
        (100, 30, 18, False),  # 12 < 2 sqrt(48) = 13.9
        (100, 2, 14, False),
        (1000, 95, 0, False),  # fewer than ten in a hundred
        (1000, 105, 0, True),
        (11, 2, 0, False),  # some rows more of few may be chance
        (11, 0, 0, False),
    ],
)
def test_more_outliers_kept_are_clear_beyond_two_errors(n_rows, let_in, shut_out, expected):
    before, after = np.zeros(n_rows, dtype=bool), np.zeros(n_rows, dtype=bool)
    after[:let_in] = before[let_in : let_in + shut_out] = True
    before[-1:] = after[-1:] = n_rows > let_in + shut_out  # kept as before
    assert evidence.is_clearly_worse(before, after) is expected


def test_kinds_are_compared_with_the_network_before(table, monkeypatch):
    seen = []

    def is_clearly_worse(before, after):
        seen.append((before, after))
        return before is not after

    monkeypatch.setattr(evidence, "is_clearly_worse", is_clearly_worse)
    detector = fit(table, verbose=1)
    assert detector.sparsity_weight_ is None
    assert [r["worse"] for r in detector.path_] == [""] + ["columns"] * (len(detector.path_) - 1)
    assert all(before is seen[0][1] for before, _ in seen)
    assert 0 < seen[0][1].mean() < 1


# The check of a weight that is given


def warnings_of_fit(X, y, module, **parameters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector = SparseEnergyOODDetector(module, **({"random_state": 0} | HARM | parameters))
        detector.fit(X, y)
    told = [str(w.message) for w in caught if w.category is DetectionDropWarning]
    return detector, told


@pytest.mark.parametrize(
    ("score", "size"),
    [("energy", 200), ("energy", None), ("two_views", 200), ("two_views", None), ("auto", 200)],
)
def test_fine_tuning_that_lets_more_outliers_in_is_told(score, size, monkeypatch):
    seen = [name for name in list_scores() if name != "three_views"]  # which lets in no more
    monkeypatch.setattr("skood.parameters.list_scores", lambda: seen)
    detector, (told,) = warnings_of_fit(
        *digit_images(), score_function=score, calibration_size=size
    )
    if score != "auto":
        assert detector.path_ == []
    shares = re.findall(r"(\d+)% of (\w+) \((\d+)% before\)", told)
    assert 1 <= len(shares) <= 3
    assert all(int(after) > int(before) + 10 for after, _, before in shares)
    assert {kind for _, kind, _ in shares} < set(surrogates.AUTO[False])
    if score == "auto":
        (chosen,) = (record for record in detector.path_ if record["chosen"])
        assert chosen["worse"].split(", ")[: len(shares)] == [kind for _, kind, _ in shares]


@pytest.mark.parametrize(
    "harmless",
    [
        {"sparsity_weight": "auto"},
        {"sparsity_weight": 0.0, "learning_rate": 1e-3},
        {"max_epochs": 0},
    ],
    ids=str,
)
def test_what_lets_no_more_in_is_not_told(harmless):
    assert warnings_of_fit(*digit_images(), **harmless)[1] == []


def test_the_shares_told_are_those_of_the_detectors_themselves(monkeypatch):
    """Of the same outliers, the detector and the network as it was keep what the warning says."""
    X, y, module = digit_images()
    seen = {}

    class Judge(path.Judge):
        def __init__(self, run, judges, data):
            super().__init__(run, judges, data)
            seen.update({name: rows.in_memory(None) for name, rows in self.rows.items()})

    monkeypatch.setattr(path, "Judge", Judge)
    after, (told,) = warnings_of_fit(X, y, module)
    before, _ = warnings_of_fit(X, y, module, max_epochs=0)
    for share_after, kind, share_before in re.findall(r"(\d+)% of (\w+) \((\d+)% before", told):
        for detector, share in ((after, share_after), (before, share_before)):
            inliers = np.sort(detector.score_samples(seen[evidence.INLIERS]))
            threshold = inliers[int(0.05 * (len(inliers) + 1)) - 1]
            kept = np.mean(detector.score_samples(seen[kind]) >= threshold)
            assert round(100 * kept) == int(share)


@pytest.mark.parametrize("tpr", [0.8, 0.9, 0.95])
def test_outliers_are_kept_as_a_detector_keeps_them(tpr):
    for n_rows in range(20, 140):
        inliers = np.random.RandomState(n_rows).randn(n_rows)
        found = evidence.Detection.of({evidence.INLIERS: inliers, "same": inliers}, tpr)
        threshold = place_threshold(inliers, tpr)
        np.testing.assert_array_equal(found.kept["same"], inliers >= threshold)


class Positions(nn.Module):
    """Adds what an embedding has of each position, or of each value, to patches of images."""

    def __init__(self, of_values):
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 3)
        self.places, self.of_values = nn.Embedding(16, 8), of_values

    def forward(self, x):
        patches = self.patches(x.float()[:, None]).flatten(2).transpose(1, 2)
        places = x.flatten(1)[:, :4].long() if self.of_values else torch.arange(4)
        return self.head((patches + self.places(places)).mean(dim=1))


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("of_values", [False, True])
def test_outliers_are_made_of_images_and_not_of_indices(dtype, of_values):
    random = np.random.RandomState(0)
    X, y = random.randint(0, 16, (200, 8, 8)).astype(dtype), np.arange(200) % 3
    detector = SparseEnergyOODDetector(Positions(of_values), max_epochs=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = make_pipeline(FunctionTransformer(), clone(detector)).fit(X, y)
        detector.set_params(score_function="auto")
        if of_values:
            with pytest.raises(ValueError, match="X holds indices for the embedding 'places'"):
                detector.fit(X, y)
            with pytest.raises(ValueError, match="X holds indices for the embedding 'places'"):
                make_ood_scorer()(pipe, X, y)
        else:
            detector.fit(X, y)
            assert 0 <= make_ood_scorer()(pipe, X, y) <= 1


def few_known(n_known, **parameters):
    """A fit of a table with a few known outliers, and whether it warns of them."""
    X, y, module = correlated_table()
    labels = np.concatenate([np.full(n_known, -1), y[n_known:]])
    settings = {"score_function": "auto", "max_epochs": 1, "ood_label": -1, "random_state": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SparseEnergyOODDetector(module, **settings | parameters).fit(X, labels)
    return [str(w.message) for w in caught if w.category is SelectionWarning]


def test_few_known_outliers_that_judge_are_told_of():
    (told,) = few_known(19)
    assert "19 known outlier(s) of y" in told
    assert "Label at least 20;" in told
    assert few_known(20) == []
    (told,) = few_known(38, outlier_weight=0.1)
    assert "19 known outlier(s) of y" in told
    assert "Label at least 40;" in told
    assert few_known(40, outlier_weight=0.1) == []
    nothing_to_choose = {"score_function": "msp", "sparsity_weight": "auto", "max_epochs": 0}
    assert few_known(5, **nothing_to_choose) == []


def test_a_score_is_refused_before_training_if_nothing_can_judge_it(digits, monkeypatch):
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = digits.module

        def forward(self, x):
            if (x.flatten(1).mean(dim=1) > 0.45).any():
                raise IndexError("index out of range")
            return self.inner(x.flatten(1))

    X, y = digits.X[:400].reshape(-1, 8, 8), digits.y[:400]
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match=r"of the kind '\w+' \(index out of range\)"):
        SparseEnergyOODDetector(Bright(), score_function="auto", random_state=0).fit(X, y)


def test_the_check_leaves_no_mark(monkeypatch):
    X, y, module = digit_images()
    checked, _ = warnings_of_fit(X, y, module)
    monkeypatch.setattr(evidence, "ROWS_OF_A_CHECK", 10**6)
    plain, told = warnings_of_fit(X, y, module)
    assert told == []
    assert checked.offset_ == plain.offset_
    assert checked.score_samples(X).tolist() == plain.score_samples(X).tolist()
    assert checked.history_[-1]["loss"] == plain.history_[-1]["loss"]


def test_few_rows_short_trainings_tables_and_own_networks_are_not_checked(monkeypatch):
    X, y, module = digit_images()
    made = []
    kinds = surrogates.surrogates_by_kind
    monkeypatch.setattr(
        surrogates, "surrogates_by_kind", lambda *given: made.append(1) or kinds(*given)
    )
    mild = {"sparsity_weight": 1.0, "learning_rate": 1e-3}
    warnings_of_fit(X, y, module, **mild, calibration_size=99)
    warnings_of_fit(X, y, module, **mild, max_epochs=5)
    warnings_of_fit(X, y, module, **mild, pretrain_epochs=1)
    warnings_of_fit(X, y, None, **mild, pretrain_epochs=1)
    warnings_of_fit(X.reshape(len(X), -1), y, module, **mild)
    assert made == []
    warnings_of_fit(X, y, module, **mild)
    assert made == [1]


def test_rows_of_which_no_outliers_can_be_made_are_not_checked():
    X, y, module = digit_images()
    flat = np.broadcast_to(X[:, :, :1, :1], X.shape).copy()
    _, told = warnings_of_fit(flat, y, module, sparsity_weight=0.0, learning_rate=1e-3)
    assert told == []


def sixteen_greys(x):
    """Which images are as they were, not turned."""
    return ((16 * x) == (16 * x).round()).flatten(1).all(dim=1)


def low_contrast(x):
    """Which images may be digits; few glyphs are like that."""
    return x.flatten(1).std(dim=1) < 0.46


class Particular(nn.Module):
    """A network that takes only what it expects."""

    def __init__(self, module, expects, error):
        super().__init__()
        self.module, self.expects, self.error = module, expects, error

    def forward(self, x):
        known = self.expects(x)
        if self.error is not None and not known.all():
            raise self.error("cannot be taken")
        return torch.where(known[:, None], self.module(x), torch.nan)


@pytest.mark.parametrize("error", [None, ValueError, IndexError, RuntimeError, AssertionError])
@pytest.mark.parametrize("expects", [sixteen_greys, low_contrast])
def test_a_network_that_cannot_take_the_outliers_is_not_checked(expects, error):
    X, y, module = digit_images()
    tame = X.reshape(len(X), -1).std(axis=1) < 0.46
    _, told = warnings_of_fit(X[tame], y[tame], Particular(module, expects, error))
    assert told == []


def test_a_preprocess_that_cannot_take_the_outliers_is_not_checked():
    X, y, module = digit_images()

    def preprocess(x):
        if sixteen_greys(x).all():
            return x
        raise RuntimeError("cannot be taken")

    assert warnings_of_fit(X, y, module, preprocess=preprocess)[1] == []


class OfIndices(nn.Module):
    """A network of indices, which an embedding turns into greys."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.greys = nn.Embedding.from_pretrained(torch.arange(17)[:, None] / 16)

    def forward(self, x):
        return self.module(self.greys(x.long())[..., 0])


def test_indices_are_no_images():
    X, y, module = digit_images()
    indices = (16 * X).astype(np.int64)
    assert warnings_of_fit(indices, y, OfIndices(module))[1] == []


@pytest.mark.parametrize("form", ["bytes", "references", "data set"])
def test_images_in_other_forms_are_checked(form):
    X, y, module = digit_images()
    forms = {
        "bytes": ((16 * X).astype(np.uint8), lambda x: x.float() / 16),
        "references": (
            [f"row {i}" for i in range(len(X))],
            lambda names: torch.from_numpy(X[[int(name.split()[1]) for name in names]]),
        ),
        "data set": (torch.utils.data.TensorDataset(torch.from_numpy(X)), None),
    }
    rows, preprocess = forms[form]
    _, told = warnings_of_fit(rows, y, module, preprocess=preprocess, num_workers=0)
    assert len(told) == 1
    if form != "bytes":  # whose outliers are rounded
        assert told == warnings_of_fit(X, y, module)[1]


def test_a_handful_of_rows_without_nan_is_not_enough():
    X, y, module = digit_images()
    X[20:, 0, 0, 0] = np.nan
    _, told = warnings_of_fit(X, y, module, preprocess=torch.nan_to_num)
    assert told == []


def test_the_mean_over_kinds_is_told_if_no_kind_is_clearly_worse():
    kept = {"a": np.ones(50, bool), "b": np.ones(50, bool), "c": np.ones(50, bool)}
    before = evidence.Detection({"a": 0.7, "b": 0.8, "c": 0.75}, kept)
    worse = evidence.Detection({"a": 0.65, "b": 0.74, "c": 0.71}, kept)
    assert worse.told_if_worse_than(before, 0.95) == (
        "the mean AUROC over 3 kinds is 0.700, 0.750 before"
    )
    mixed = evidence.Detection({"a": 0.55, "b": 0.82, "c": 0.76}, kept)
    assert mixed.told_if_worse_than(before, 0.95) == ""
    assert before.told_if_worse_than(worse, 0.95) == ""
    little = evidence.Detection({kind: value - 0.019 for kind, value in before.auroc.items()}, kept)
    assert little.told_if_worse_than(before, 0.95) == ""
    one = evidence.Detection({"a": 0.5}, {"a": kept["a"]})
    assert one.told_if_worse_than(evidence.Detection({"a": 0.9}, {"a": kept["a"]}), 0.95) == ""


# What the evidence is made of


def outliers_of(X, n_outliers, run):
    """Outliers of all kinds, as they are made of rows."""
    random = np.random.RandomState(run.seeds.judging)
    return surrogates.surrogates_by_kind(X, n_outliers, random)


def assert_same_outliers(found, expected):
    assert list(found) == list(expected)
    for kind, rows in found.items():
        np.testing.assert_array_equal(rows.in_memory(None), expected[kind])


def test_two_outliers_are_made_for_each_row_held_out_to_judge(table, monkeypatch):
    """Rows held out for the scores judge beside them, and make no more."""
    run, judges = judged_fit(table, monkeypatch)
    judging = table[0][run.judging.rows.index]
    assert_same_outliers(judges.outliers, outliers_of(judging, 2 * len(run.parts.judging), run))


def test_of_a_handful_that_judges_outliers_are_made_of_all_rows(table, monkeypatch):
    X, y, module = (some[:60] if some is not table[2] else some for some in table)
    run, judges = judged_fit((X, y, module), monkeypatch)
    assert len(run.parts.judging) < 39
    assert_same_outliers(judges.outliers, outliers_of(X, 2 * len(run.parts.judging), run))


def test_fine_tuning_is_checked_by_rows_that_place_the_threshold(monkeypatch):
    X, y, module = digit_images()
    settings = {"score_function": "energy", "sparsity_weight": 1.0, "max_epochs": 20}
    run, judges = judged_fit((X, y, module), monkeypatch, calibration_size=150, **settings)
    originals = X[run.parts.threshold[np.arange(150)]]
    assert_same_outliers(judges.outliers, outliers_of(originals, 2 * 150, run))


class Damaged(torch.utils.data.Dataset):
    """A table of which a row cannot be read."""

    def __init__(self, X, y, damaged):
        self.X, self.y, self.damaged = X, y, damaged

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        if i == self.damaged:
            raise ValueError(f"row {i} is damaged")
        return torch.from_numpy(self.X[i]), int(self.y[i])


def test_a_row_that_cannot_be_read_is_no_want_of_outliers(table, monkeypatch):
    run, _ = judged_fit(table, monkeypatch)
    X, y, module = table
    damaged = int(run.judging.rows.index[0])
    rows = Damaged(X, y, damaged)
    with pytest.raises(ValueError, match=rf"row {damaged} is damaged") as raised:
        fit((rows, y, module), score_function="auto", num_workers=0, max_epochs=0)
    assert "outliers" not in str(raised.value)
