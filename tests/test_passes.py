from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from joblib import Memory
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from skood import SparseEnergyOODDetector
from skood.caching import DiskMemory, outputs_key
from skood.engine import inference
from skood.engine.inference import forward_rows, passes_from, score_rows
from skood.exceptions import AnotherScaleWarning, MemoryEntryWarning, NonFiniteLogitsError
from skood.model_selection import InDistributionKFold, make_ood_scorer
from skood.passes import KeptPasses, passes_shared
from skood.rows import as_rows
from skood.scores import list_scores

N_CLASSES = 3
X = np.random.RandomState(0).randn(330, 1, 6, 6).astype(np.float32)
Y = np.arange(len(X)) % N_CLASSES
X[np.arange(len(X)), 0, Y, Y] += 4


def classifier(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, N_CLASSES),
        ).eval()


CLASSIFIER = classifier()


def detector(memory=None, **parameters):
    defaults = {"max_epochs": 1, "batch_size": 50, "calibration_size": 60, "random_state": 0}
    return SparseEnergyOODDetector(CLASSIFIER, memory=memory, **defaults | parameters)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Passes of small networks are kept, too."""
    monkeypatch.setattr("skood.passes.SECONDS_WORTH_KEEPING", 0)


@pytest.fixture
def rows_passed(monkeypatch):
    """A list that grows by the number of rows of each batch that a network gets to score."""
    sizes = []
    forward = inference._forward

    def counting(network, batch, *rest):
        sizes.append(len(batch))
        return forward(network, batch, *rest)

    monkeypatch.setattr(inference, "_forward", counting)
    return sizes


def entries(folder):
    return sorted(folder.rglob("*.outputs"))


@pytest.fixture(autouse=True)
def quiet():
    """Small sets of rows bring warnings that are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", MemoryEntryWarning)
        yield


def test_a_fit_that_differs_in_its_score_alone_passes_no_rows_again(tmp_path, rows_passed):
    detector(tmp_path, score_function="knn").fit(X, Y)
    assert sum(rows_passed) > len(X)
    rows_passed.clear()
    for other in ({"score_function": "vim"}, {"score_function": "energy", "tpr": 0.9}):
        detector(tmp_path, **other).fit(X, Y)
    assert rows_passed == []


@pytest.mark.parametrize("score", sorted(list_scores()))
def test_scores_and_thresholds_are_the_same_to_the_last_bit(tmp_path, score):
    fresh = detector(score_function=score).fit(X, Y)
    scorer = make_ood_scorer(["auroc", "accuracy_change", "mean_l1"])
    expected = scorer(fresh, X, Y)
    for _ in range(2):
        shared = detector(tmp_path, score_function=score).fit(X, Y)
        np.testing.assert_array_equal(shared.calibration_scores_, fresh.calibration_scores_)
        assert shared.offset_ == fresh.offset_
        assert shared.id_accuracy_ == fresh.id_accuracy_
        assert scorer(shared, X, Y) == expected
        np.testing.assert_array_equal(shared.score_samples(X), fresh.score_samples(X))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 300])
def test_pieces_are_those_of_a_pass(tmp_path, opened, precision, n_rows):
    network, rows = opened(CLASSIFIER, X, precision=precision), as_rows(X[:n_rows])
    with passes_shared(DiskMemory(tmp_path)):
        found = [list(forward_rows(network, rows, features=True)) for _ in range(2)]
    expected = list(forward_rows(network, rows, features=True))
    assert len(entries(tmp_path)) == 1
    for pieces in found:
        assert len(pieces) == len(expected)
        for (piece, seen), (place, own) in zip(pieces, expected, strict=True):
            assert piece == place
            assert seen.features.dtype == own.features.dtype
            assert torch.equal(seen.features, own.features)
            assert torch.equal(seen.logits, own.logits)


@pytest.mark.parametrize("features", [False, True])
def test_a_score_gets_what_it_gets_without_a_memory(tmp_path, opened, features):
    network, rows, seen = opened(CLASSIFIER, X), as_rows(X[:21]), []

    def score(hidden, logits, layers):
        seen.append((hidden, logits))
        return logits[:, 0]

    list(score_rows(network, rows, score, features=features))
    expected, *more = seen
    assert not more
    with passes_shared(DiskMemory(tmp_path)):
        list(score_rows(network, rows, score, features=features))
    assert len(seen) == 2
    assert len(expected[1]) > len(rows)  # padded
    for values, of_memory in zip(expected, seen[1], strict=True):
        assert (values is None) == (of_memory is None)
        assert values is None or torch.equal(values, of_memory)


def test_a_search_over_scores_and_levels_passes_each_row_once(tmp_path, rows_passed):
    def search(grid, folder):
        rows_passed.clear()
        folds = InDistributionKFold(2, random_state=0)
        scoring = make_ood_scorer(["auroc", "accuracy_change"])
        estimator = make_pipeline(FunctionTransformer(), detector(folder))
        found = GridSearchCV(
            estimator, grid, scoring=scoring, cv=folds, refit=False, error_score="raise"
        ).fit(X, Y)
        return sum(rows_passed), found.cv_results_["mean_test_auroc"]

    step = "sparseenergyooddetector__"
    few, _ = search({f"{step}score_function": ["knn"]}, tmp_path / "one")
    grid = {f"{step}score_function": ["knn", "vim", "energy"], f"{step}tpr": [0.9, 0.95]}
    many, aurocs = search(grid, tmp_path / "many")
    alone, expected = search(grid, None)
    assert many == few
    assert alone > 4 * few
    np.testing.assert_array_equal(aurocs, expected)


def test_what_a_detector_scores_in_use_is_not_kept(tmp_path, rows_passed):
    fitted = detector(tmp_path).fit(X, Y)
    kept = entries(tmp_path)
    assert kept
    rows_passed.clear()
    for _ in range(2):
        fitted.predict(X)
    fitted.calibrate(X)
    assert entries(tmp_path) == kept
    assert sum(rows_passed) >= 3 * len(X)


def test_what_a_network_gives_between_epochs_is_not_kept(tmp_path):
    folders = [tmp_path / "one", tmp_path / "three"]
    for epochs, folder in zip((1, 3), folders, strict=True):
        detector(folder, max_epochs=epochs).fit(X, Y)
    one, three = map(entries, folders)
    assert len(one) == len(three) > 0


def test_without_a_seed_nothing_is_kept(tmp_path):
    with pytest.warns(MemoryEntryWarning, match="random_state"):
        fitted = detector(tmp_path, random_state=None).fit(X, Y)
    make_ood_scorer()(fitted, X, Y)
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"X": X[::-1]},
        {"X": X + 1e-6},
        {"preprocess": lambda batch: batch * 2},
        {"seed": 1},
        {"precision": "bfloat16"},
        {"fold_batch_norm": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_outputs_keeps_passes_apart(tmp_path, opened, change):
    change = {"X": X, "seed": 0} | change
    rows = as_rows(change.pop("X"))
    other = opened(classifier(change.pop("seed")), X, **change)
    with passes_shared(DiskMemory(tmp_path)):
        list(forward_rows(opened(CLASSIFIER, X), as_rows(X)))
        found = torch.cat([logits for _, (_, logits, _) in forward_rows(other, rows)])
    assert len(entries(tmp_path)) == 2
    expected = torch.cat([logits for _, (_, logits, _) in forward_rows(other, rows)])
    assert torch.equal(found, expected)


def test_other_numbers_of_rows_in_a_forward_are_another_computation(opened):
    network, rows = opened(CLASSIFIER, X), as_rows(X)
    key = outputs_key(network, rows)
    network.without_shape(network.shapes.ladder[-1])
    assert outputs_key(network, rows) != key


def test_a_network_that_goes_on_training_is_another(tmp_path, opened):
    network, rows = opened(CLASSIFIER, X), as_rows(X)
    with passes_shared(DiskMemory(tmp_path)):
        (_, (_, before, _)), *_ = forward_rows(network, rows)
        with torch.no_grad():
            network.module[-1].bias += 1
        (_, (_, after, _)), *_ = forward_rows(network, rows)
    torch.testing.assert_close(after, before + 1)


@pytest.mark.parametrize("damage", ["cut", "other", "bit"])
def test_a_damaged_pass_is_computed_again_and_that_is_said(tmp_path, damage):
    expected = detector(tmp_path).fit(X, Y).offset_
    kept = entries(tmp_path)
    contents = [path.read_bytes() for path in kept]
    for path, content, other in zip(kept, contents, contents[1:] + contents[:1], strict=True):
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"cut": content[:-9], "other": other, "bit": flipped}[damage])
    reason = "of other rows" if damage == "other" else "damaged"
    with pytest.warns(MemoryEntryWarning, match=f"so it is computed again.*{reason}"):
        found = detector(tmp_path).fit(X, Y).offset_
    assert found == expected
    assert detector(tmp_path).fit(X, Y).offset_ == expected


def test_a_pass_that_is_too_large_is_made_each_time(tmp_path, monkeypatch, opened):
    read = []

    def reading(batch):
        read.append(len(batch))
        return batch

    network, rows = opened(CLASSIFIER, X, preprocess=reading), as_rows(X)
    read.clear()
    list(forward_rows(network, rows))
    usual, n_bytes = sum(read), 4 * (128 + N_CLASSES) * len(X)
    for most, kept in ((n_bytes - 1, 0), (n_bytes, 1)):
        monkeypatch.setattr("skood.passes.MOST_OF_A_PASS", most)
        read.clear()
        with passes_shared(DiskMemory(tmp_path)):
            assert len(torch.cat([z for _, (_, z, _) in forward_rows(network, rows)])) == len(X)
        assert len(entries(tmp_path)) == kept
        assert kept or 0 < sum(read) - usual < usual  # a row in some shape


def test_the_oldest_passes_make_room(tmp_path, monkeypatch, opened):
    network = opened(CLASSIFIER, X)

    def keep(rows):
        with passes_shared(DiskMemory(tmp_path)):
            list(forward_rows(network, as_rows(rows)))
        return set(entries(tmp_path))

    (first,) = keep(X[:100])
    monkeypatch.setattr("skood.passes.MOST_OF_ALL", int(2.5 * first.stat().st_size))
    assert len(keep(X[100:200])) == 2
    assert first in keep(X[:100])  # it is read
    assert first not in keep(X[200:300])
    assert len(entries(tmp_path)) == 2


def test_a_pass_that_takes_no_time_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("skood.passes.SECONDS_WORTH_KEEPING", 1e9)
    detector(tmp_path).fit(X, Y)
    assert not entries(tmp_path)


def test_no_rows_are_no_obstacle(tmp_path, opened):
    with passes_shared(DiskMemory(tmp_path)):
        assert not list(forward_rows(opened(CLASSIFIER, X), as_rows(X).pick(np.arange(0))))


def test_rows_that_overflow_are_named(tmp_path, opened):
    wild = X.copy()
    wild[200] = 3e38
    module = classifier()
    module[-1].weight.data *= 1e6
    network = opened(module, X)
    for _ in range(2):
        with (
            passes_shared(DiskMemory(tmp_path)),
            pytest.raises(NonFiniteLogitsError, match="row 200"),
        ):
            list(forward_rows(network, as_rows(wild)))
    assert not entries(tmp_path)


def test_rows_on_another_scale_are_still_told(tmp_path):
    scorer = make_ood_scorer(X_ood=1000 * X)
    for _ in range(2):
        fitted = detector(tmp_path).fit(X, Y)
        with pytest.warns(AnotherScaleWarning):
            scorer(fitted, X, Y)


def test_rows_are_compared_with_those_of_fit_once_a_request(tmp_path, opened):
    class Counting:
        seen = 0

        def see(self, *_):
            self.seen += 1

    network, rows = opened(CLASSIFIER, X), as_rows(X)
    rows.watch = watch = Counting()
    for number in range(1, 4):
        with passes_shared(DiskMemory(tmp_path)):
            list(forward_rows(network, rows))
        assert watch.seen == number


@pytest.mark.parametrize("memory", [Memory(None), "", "nul\0"])
def test_a_memory_without_a_folder_keeps_nothing(memory, rows_passed):
    warnings.simplefilter("ignore")
    fitted = detector(memory).fit(X, Y)
    rows_passed.clear()
    assert make_ood_scorer()(fitted, X, Y) == make_ood_scorer()(detector().fit(X, Y), X, Y)
    assert rows_passed


class Laid(nn.Module):
    """Features and logits that lie in memory column by column, or with gaps."""

    def __init__(self, gaps):
        super().__init__()
        self.gaps = gaps
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(36, 32), nn.Linear(32, N_CLASSES)

    def forward(self, x):
        hidden = self.body(x.flatten(1)).relu()
        if self.gaps:
            hidden = torch.stack([hidden, hidden + 1, hidden + 2], 2)[:, :, 0]
        else:
            hidden = hidden.T.contiguous().T
        return self.head(hidden).T.contiguous().T


@pytest.mark.parametrize("score", ["energy", "knn", "mahalanobis++", "two_views", "vim"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layout_of_outputs_changes_no_bit(tmp_path, score, gaps, dtype):
    module = Laid(gaps).to(dtype).eval()
    scores = [
        SparseEnergyOODDetector(
            module, memory=memory, score_function=score, max_epochs=0, random_state=0
        )
        .fit(X, Y)
        .calibration_scores_
        for memory in (None, tmp_path, tmp_path)
    ]
    assert entries(tmp_path)
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


EYE = torch.eye(36)


def multiplied(batch):
    return (batch.flatten(1) @ EYE).float().view(-1, 1, 6, 6)


def test_the_autocast_of_a_caller_reaches_no_key(tmp_path):
    """To bfloat16, both sets are the same."""
    sets = [np.full((9, 1, 6, 6), value, np.float32) for value in (1, 1.0001)]

    def energies(memory, rows):
        fitted = detector(memory, preprocess=multiplied, max_epochs=0).fit(X, Y)
        with torch.autocast("cpu", torch.bfloat16):
            return make_ood_scorer(lambda _, of: float(of.sum()), X_ood=rows)(fitted, X, Y)

    expected = [energies(None, rows) for rows in sets]
    assert expected[0] != expected[1]
    assert [energies(tmp_path, rows) for rows in sets] == expected


def test_rows_that_overflow_are_compared_first(tmp_path):
    module = classifier()
    module[-1].weight.data *= 1e6
    fitted = SparseEnergyOODDetector(module, max_epochs=0, memory=tmp_path, random_state=0)
    fitted.fit(X, Y)
    with pytest.warns(AnotherScaleWarning), pytest.raises(NonFiniteLogitsError):
        make_ood_scorer(X_ood=np.full_like(X, 3e38))(fitted, X, Y)


def test_a_pass_that_ran_out_of_memory_is_not_kept(tmp_path, opened, monkeypatch):
    network = opened(CLASSIFIER, X)
    forward = inference._forward

    def narrow(network, batch, *rest):
        if len(batch) > 100:
            raise torch.OutOfMemoryError
        return forward(network, batch, *rest)

    monkeypatch.setattr(inference, "_forward", narrow)
    with passes_shared(DiskMemory(tmp_path)):
        assert list(forward_rows(network, as_rows(X)))
    assert not entries(tmp_path)


def test_an_entry_of_no_use_is_replaced_though_the_pass_is_fast(tmp_path, monkeypatch):
    detector(tmp_path).fit(X, Y)
    for path in entries(tmp_path):
        path.write_bytes(b"x")
    monkeypatch.setattr("skood.passes.SECONDS_WORTH_KEEPING", 1e9)
    with pytest.warns(MemoryEntryWarning):
        detector(tmp_path).fit(X, Y)
    detector(tmp_path).fit(X, Y)


def test_a_folder_among_the_entries_stops_no_clearing(tmp_path, monkeypatch, opened):
    (tmp_path / "joblib" / "skood" / "old.outputs").mkdir(parents=True)
    monkeypatch.setattr("skood.passes.MOST_OF_ALL", 0)
    with passes_shared(DiskMemory(tmp_path)):
        list(forward_rows(opened(CLASSIFIER, X), as_rows(X)))
    assert [path.name for path in entries(tmp_path)] == ["old.outputs"]


def test_a_scorer_makes_no_folder(tmp_path):
    fitted = detector(tmp_path / "gone").fit(X, Y)
    shutil.rmtree(tmp_path / "gone")
    make_ood_scorer()(fitted, X, Y)
    assert not (tmp_path / "gone").exists()


def test_a_source_serves_its_own_context_alone(opened):
    network, rows, asked = opened(CLASSIFIER, X), as_rows(X), []
    with passes_from(lambda *of: asked.append(of)):
        list(forward_rows(network, rows))
    list(forward_rows(network, rows))
    assert len(asked) == 1


def test_a_network_without_features_has_logits_alone(tmp_path, opened):
    network, rows = opened(CLASSIFIER, X), as_rows(X)
    (_, (_, expected, _)), *_ = forward_rows(network, rows)
    network.head = None
    for _ in range(2):
        with passes_shared(DiskMemory(tmp_path)):
            (_, (features, logits, _)), *_ = forward_rows(network, rows)
        assert features is None
        assert torch.equal(logits, expected)
    assert len(entries(tmp_path)) == 1


def test_a_torchscript_network_is_passed_each_time(tmp_path):
    script = torch.jit.script(CLASSIFIER)
    plain, shared = (
        SparseEnergyOODDetector(script, max_epochs=0, memory=memory, random_state=0)
        for memory in (None, tmp_path)
    )
    with pytest.warns(MemoryEntryWarning, match="keeps nothing"):
        shared.fit(X, Y)
    assert shared.offset_ == plain.fit(X, Y).offset_
    assert not entries(tmp_path)


@pytest.mark.parametrize("score", ["energy", "knn", "three_views", "auto"])
def test_a_memory_that_cannot_be_used_is_told_of_with_any_score(tmp_path, score):
    file = tmp_path / "file"
    file.touch()
    detector = SparseEnergyOODDetector(
        CLASSIFIER, score_function=score, max_epochs=1, memory=file, random_state=0
    )
    with pytest.warns(MemoryEntryWarning):
        detector.fit(X, Y)


def test_what_cannot_be_told_is_not_kept_and_that_is_said(tmp_path, opened):
    network = opened(CLASSIFIER, X)
    network.public.handle = (tmp_path / "file").open("w")
    with network.public.handle, pytest.warns(MemoryEntryWarning, match="keeps nothing.*handle"):
        assert KeptPasses(DiskMemory(tmp_path))(network, as_rows(X)) is None
