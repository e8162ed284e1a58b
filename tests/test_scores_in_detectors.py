"""Every score in a detector, around a network that is fine-tuned or used as it is."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.model_selection import GridSearchCV
from torch import nn

from skood import SparseEnergyOODDetector
from skood.engine.training import Training
from skood.scores import (
    SCORES,
    Dice,
    Energy,
    Head,
    Knn,
    Odin,
    Outputs,
    ReAct,
    Scale,
    TwoViews,
    fit_score,
    get_score,
    list_scores,
)
from skood.scores.protocol import uses_layers

OF_LAYERS = [name for name in list_scores() if uses_layers(get_score(name))]
HOLDING_ROWS_OUT = ["two_views", "three_views"]
NEEDING_A_HEAD = [name for name in list_scores() if getattr(SCORES[name](), "uses_head", False)]


def quiet_fit(detector, X, y=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


def untrained(module, score, **parameters):
    """A detector that uses the network as it is, and all rows for the statistics."""
    parameters = {"max_epochs": 0, "calibration_size": None, "random_state": 0} | parameters
    return SparseEnergyOODDetector(module, score_function=score, **parameters)


@pytest.fixture(scope="module")
def scored(digits):
    """Detectors by the name of their score, calibrated on their training rows."""
    return {
        name: quiet_fit(untrained(digits.module, name), digits.X, digits.y).calibrate(digits.X)
        for name in list_scores()
    }


@pytest.fixture
def no_epoch(monkeypatch):
    """Nothing may be trained."""
    monkeypatch.setattr(Training, "_epoch", lambda *_: pytest.fail("an epoch ran"))


def outputs_of(module, X):
    with torch.no_grad():
        features = module[:-1](torch.tensor(X, dtype=torch.float32))
        return features.double(), module[-1](features).double()


# What a detector gives


@pytest.mark.parametrize("name", sorted({*list_scores()} - {"odin", *OF_LAYERS}))
def test_the_score_is_that_of_features_and_logits(scored, digits, name):
    features, logits = outputs_of(digits.module, digits.X)
    linear = digits.module[-1]
    head = Head(linear.weight.detach().double(), linear.bias.detach().double())
    score = get_score(name)
    outputs = [Outputs(features, logits, torch.tensor(digits.y))]
    fit_score(score, outputs, lambda: head, lambda: outputs)
    expected = score(*outputs_of(digits.module, digits.X_test)).numpy()
    found = scored[name].score_samples(digits.X_test)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_odin_scores_inputs_moved_along_the_gradient(scored, digits):
    batch = torch.tensor(digits.X_test, dtype=torch.float32, requires_grad=True)
    confidence = torch.log_softmax(digits.module(batch).double() / 1000, dim=1).amax(dim=1).sum()
    (gradient,) = torch.autograd.grad(confidence, batch)
    with torch.no_grad():
        logits = digits.module(batch + 0.0014 * gradient.sign()).double()
    expected = torch.softmax(logits / 1000, dim=1).amax(dim=1).numpy()
    found = scored["odin"].score_samples(digits.X_test)
    # All are near 1 / K: what is above tells.
    np.testing.assert_allclose(found - 0.1, expected - 0.1, rtol=1e-4)


@pytest.mark.parametrize("name", list_scores())
def test_a_name_and_an_object_are_the_same(scored, digits, name):
    given = SCORES[name]()
    by_object = quiet_fit(untrained(digits.module, given), digits.X, digits.y)
    expected = scored[name].score_samples(digits.X_test)
    assert np.array_equal(by_object.score_samples(digits.X_test), expected)
    assert by_object.offset_ == scored[name].offset_
    # What the user holds stays as it is.
    assert vars(given) == given.get_params()
    assert type(by_object.score_function_) is SCORES[name]


@pytest.mark.parametrize("name", list_scores())
def test_a_row_is_scored_alone(scored, digits, name):
    whole = scored[name].score_samples(digits.X_test)
    order = np.random.RandomState(0).permutation(len(whole))
    for rows in (order, order[:40], np.arange(300), [5], [5, 5, 3]):
        assert np.array_equal(scored[name].score_samples(digits.X_test[rows]), whole[rows])


@pytest.mark.parametrize("name", list_scores())
def test_few_images_score_as_among_many(digits, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    images = digits.X.reshape(-1, 1, 8, 8).astype(np.float32)
    detector = quiet_fit(untrained(module, name), images[:300], digits.y[:300])
    whole = detector.score_samples(images[:100])
    for rows in (slice(3), slice(50, 51)):
        np.testing.assert_allclose(detector.score_samples(images[rows]), whole[rows], rtol=1e-5)


@pytest.mark.parametrize("magnitude", [0.0014, 10.0])
def test_the_class_is_that_of_the_input_as_it_is(scored, digits, magnitude):
    odin = quiet_fit(untrained(digits.module, Odin(magnitude=magnitude)), digits.X, digits.y)
    odin.calibrate(digits.X)
    plain = scored["energy"]
    for method in ("predict_class", "predict_class_proba", "features"):
        found, expected = (getattr(d, method)(digits.X_test) for d in (odin, plain))
        assert np.array_equal(found, expected)
    rejecting = odin.predict_class(digits.X_test, reject_label=-1)
    kept = odin.predict(digits.X_test) == 1
    assert np.array_equal(rejecting[kept], plain.predict_class(digits.X_test)[kept])
    assert odin.id_accuracy_ == plain.id_accuracy_


@pytest.mark.parametrize("name", list_scores())
def test_a_detector_travels_with_its_statistics(scored, digits, name):
    loaded = pickle.loads(pickle.dumps(scored[name]))
    expected = scored[name].score_samples(digits.X_test)
    assert np.array_equal(loaded.score_samples(digits.X_test), expected)
    assert np.array_equal(loaded.p_values(digits.X_test), scored[name].p_values(digits.X_test))


@pytest.mark.parametrize("name", list_scores())
def test_scoring_leaves_weights_and_gradients_alone(scored, digits, name):
    module = scored[name].module_
    assert all(parameter.requires_grad for parameter in module.parameters())
    tensors = [*module.state_dict().values(), *(p.grad for p in module.parameters())]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    scored[name].score_samples(digits.X_test)
    after = [*module.state_dict().values(), *(p.grad for p in module.parameters())]
    for own, other in zip(after, before, strict=True):
        assert own is other is None or torch.equal(own, other)


def test_a_score_sees_the_fine_tuned_network(digits):
    detector = untrained(digits.module, "react", max_epochs=3, learning_rate=0.05)
    quiet_fit(detector, digits.X, digits.y)
    expected = np.percentile(detector.features(digits.X), 90)
    assert detector.score_function_.threshold_ == pytest.approx(expected, rel=1e-5)
    before, _ = outputs_of(digits.module, digits.X)
    assert detector.score_function_.threshold_ != pytest.approx(np.percentile(before, 90), rel=1e-2)


def test_statistics_are_those_of_the_training_rows_alone(digits):
    detector = untrained(digits.module, Knn(5), calibration_size=200)
    quiet_fit(detector, digits.X, digits.y)
    assert len(detector.score_function_.bank_) == 800
    # A row of the bank is its own nearest neighbour.
    nearest = untrained(digits.module, Knn(1), calibration_size=200)
    scores = quiet_fit(nearest, digits.X, digits.y).score_samples(digits.X)
    assert (scores > -1e-3).sum() == pytest.approx(800, abs=10)


def test_known_outliers_are_no_part_of_the_statistics(digits):
    y = digits.y.copy()
    y[y == 9] = -1
    detector = untrained(digits.module, Knn(5), ood_label=-1)
    quiet_fit(detector, digits.X, y)
    assert len(detector.score_function_.bank_) == (y != -1).sum()


def test_a_network_of_our_own_takes_any_score(digits):
    for name in list_scores():
        detector = SparseEnergyOODDetector(
            score_function=name, pretrain_epochs=1, max_epochs=1, random_state=0
        )
        quiet_fit(detector, digits.X[:300], digits.y[:300])
        assert np.isfinite(detector.score_samples(digits.X_test)).all()


def test_double_precision_takes_any_score(digits):
    module = nn.Sequential(*digits.module).double()
    try:
        for name in list_scores():
            detector = quiet_fit(untrained(module, name), digits.X[:300], digits.y[:300])
            assert np.isfinite(detector.score_samples(digits.X_test)).all()
    finally:
        module.float()


# A score of one's own


class Centre:
    """Minus the distance to the mean of the features."""

    def fit(self, outputs, head):
        total = n_rows = 0
        for features, _, _ in outputs:
            total, n_rows = total + features.sum(dim=0), n_rows + len(features)
        self.centre = total / n_rows

    def __call__(self, features, logits):
        return -torch.linalg.vector_norm(features - self.centre, dim=1)


def test_a_score_of_ones_own_is_fitted(digits):
    given = Centre()
    detector = quiet_fit(untrained(digits.module, given), digits.X, digits.y)
    centre = detector.features(digits.X).mean(axis=0)
    expected = -np.linalg.norm(detector.features(digits.X_test) - centre, axis=1)
    np.testing.assert_allclose(detector.score_samples(digits.X_test), expected, rtol=1e-5)
    assert not hasattr(given, "centre")


# Searching


def test_scores_share_one_training(digits, tmp_path, monkeypatch):
    epochs, run = [], Training.run

    def counted(training, resume, after_epoch):
        epochs.append(training.recipe.epochs - (0 if resume is None else len(resume.history)))
        return run(training, resume, after_epoch)

    monkeypatch.setattr(Training, "run", counted)
    names = [name for name in list_scores() if name not in HOLDING_ROWS_OUT]
    for name in names:
        one = SparseEnergyOODDetector(
            digits.module, score_function=name, max_epochs=2, memory=tmp_path, random_state=0
        )
        quiet_fit(one, digits.X[:300], digits.y[:300])
    assert epochs == [2] + [0] * (len(names) - 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_searches_choose_among_scores(digits):
    grid = {"score_function": [Energy(), "msp", Knn(10), ReAct(80), Dice(0.5), Odin()]}
    search = GridSearchCV(untrained(digits.module, "energy"), grid, cv=2, error_score="raise")
    search.fit(digits.X[:300], digits.y[:300])
    assert len(search.cv_results_["params"]) == 6
    assert len(set(search.cv_results_["mean_test_score"])) > 3
    assert np.isfinite(search.score_samples(digits.X_test)).all()


@pytest.mark.parametrize(
    ("score", "parameter", "values"),
    [
        (Energy(), "temperature", [0.5, 1.0, 100.0]),
        (Knn(), "n_neighbors", [1, 10, 100]),
        (Odin(), "temperature", [1.0, 1000.0]),
        (Scale(), "percentile", [50, 85]),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_searches_set_parameters_of_scores(digits, score, parameter, values):
    name = f"score_function__{parameter}"
    search = GridSearchCV(untrained(digits.module, score), {name: values}, cv=2)
    search.set_params(error_score="raise").fit(digits.X[:300], digits.y[:300])
    best = search.best_estimator_
    assert best.get_params()[name] == getattr(best.score_function_, parameter)
    assert len(set(search.cv_results_["mean_test_score"])) == len(values)
    # Those of the object passed stay as they are.
    assert score.get_params() == type(score)().get_params()


def test_clones_carry_the_score_and_not_its_statistics(scored, digits):
    one = untrained(digits.module, Knn(7))
    copied = clone(quiet_fit(one, digits.X[:100], digits.y[:100]))
    assert copied.score_function.n_neighbors == 7
    assert not hasattr(copied.score_function, "bank_")
    assert not hasattr(copied, "score_function_")


# What is refused, before anything is trained


class Cosine(nn.Module):
    """A head that normalises its features."""

    def __init__(self, width, n_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, width))

    def forward(self, x):
        return 10 * nn.functional.linear(
            nn.functional.normalize(x), nn.functional.normalize(self.weight)
        )


def with_head(head, body=None):
    module = nn.Sequential(body or nn.Sequential(nn.Linear(64, 32), nn.ReLU()), head)
    return module.eval()


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize("name", NEEDING_A_HEAD)
@pytest.mark.parametrize("head", [Cosine(32, 10), nn.Sequential(nn.Linear(32, 16), nn.Tanh(),
                                                                nn.Linear(16, 10))])  # fmt: skip
def test_a_head_that_is_not_affine_is_refused(digits, name, head):
    detector = untrained(with_head(head), name, max_epochs=5, head="1")
    with pytest.raises(ValueError, match=r"head, '1' .* is not affine .* or another score"):
        quiet_fit(detector, digits.X, digits.y)


@pytest.mark.parametrize("name", sorted({*list_scores()} - {*NEEDING_A_HEAD}))
def test_other_scores_take_any_head(digits, name):
    detector = untrained(with_head(Cosine(32, 10)), name, head="1")
    quiet_fit(detector, digits.X, digits.y)
    assert np.isfinite(detector.score_samples(digits.X_test)).all()


def test_which_scores_need_an_affine_head():
    assert NEEDING_A_HEAD == ["dice", "react", "scale", "vim"]


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.Identity()])
def test_scale_refuses_features_below_zero(digits, activation):
    body = nn.Sequential(nn.Linear(64, 32), activation)
    detector = untrained(with_head(nn.Linear(32, 10), body), "scale", max_epochs=5)
    with pytest.raises(ValueError, match=r'"scale" .* at least 0'):
        quiet_fit(detector, digits.X, digits.y)


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize(
    "score", [Energy(-1), Odin(magnitude=0), Dice(2), ReAct(100), Scale(0), Knn(0), Knn(500)]
)
def test_parameters_out_of_range_are_refused(digits, score):
    detector = untrained(digits.module, score, max_epochs=5)
    with pytest.raises(ValueError, match=rf"parameter of {type(score).__name__} must be"):
        quiet_fit(detector, digits.X[:400], digits.y[:400])
    assert not hasattr(detector, "score_function_")


class Tokens(nn.Module):
    """A classifier of sequences of token numbers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.relu(self.embedding(x.long()).mean(dim=1)))


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize("kind", ["integers", "floats that become integers"])
def test_odin_refuses_token_numbers(digits, kind):
    X = (digits.X * 16).astype(np.int64)
    preprocess = (lambda batch: batch) if kind == "integers" else None
    detector = untrained(Tokens().eval(), "odin", max_epochs=5, preprocess=preprocess)
    with pytest.raises(ValueError, match=r"gradient.* Pass another score"):
        quiet_fit(detector, X, digits.y)


class Frozen(nn.Module):
    """A classifier that cuts the gradient, of all or before its head."""

    def __init__(self, everything):
        super().__init__()
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.everything = everything

    def forward(self, x):
        with torch.no_grad():
            features = torch.relu(self.body(x))
            if self.everything:
                return self.head(features)
        return self.head(features)


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize("everything", [True, False])
def test_odin_refuses_a_network_without_a_gradient(digits, everything):
    detector = untrained(Frozen(everything).eval(), "odin", max_epochs=5)
    with pytest.raises(ValueError, match=r"gradient.* torch\.no_grad.* Pass another score"):
        quiet_fit(detector, digits.X, digits.y)


def test_odin_takes_a_network_with_frozen_weights(digits):
    module = with_head(nn.Linear(32, 10)).requires_grad_(False)
    detector = quiet_fit(untrained(module, "odin"), digits.X, digits.y)
    with torch.inference_mode():
        scores = detector.score_samples(digits.X_test)
    assert np.array_equal(scores, detector.score_samples(digits.X_test))
    assert len(np.unique(scores)) > 100


def test_odin_refuses_inputs_that_round_its_step_away(digits):
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).bfloat16()
    with pytest.raises(ValueError, match=r"steps of 0.0014, which inputs of torch.bfloat16 round"):
        quiet_fit(untrained(module, "odin"), digits.X, digits.y)


def test_odin_computes_in_the_precision_of_the_network(scored, digits):
    half = quiet_fit(untrained(digits.module, "odin", precision="bfloat16"), digits.X, digits.y)
    expected = scored["odin"].score_samples(digits.X_test)
    np.testing.assert_array_equal(half.score_samples(digits.X_test), expected)


# The trial before training


def test_what_few_rows_cannot_fit_is_fitted_to_all(digits, monkeypatch):
    # Eight rows, each of a class of its own: nothing varies within classes.
    monkeypatch.setattr("skood.fitting.ROWS_OF_A_TRIAL", 8)
    order = np.argsort(digits.y, kind="stable")
    score = quiet_fit(
        untrained(digits.module, "mahalanobis"), digits.X[order], digits.y[order]
    ).score_function_
    assert len(score.means_) == 10


def test_a_fit_of_statistics_draws_from_the_seed_alone(digits, generator_states):
    class Drawn(Energy):
        def fit(self, outputs, head):
            self.noise_ = torch.rand(1)
            return self

    before = generator_states()
    noise = [
        quiet_fit(untrained(digits.module, Drawn()), digits.X, digits.y).score_function_.noise_
        for _ in range(2)
    ]
    assert generator_states() == before
    assert torch.equal(*noise)


@pytest.mark.parametrize("name", NEEDING_A_HEAD)
def test_statistics_are_those_outside_of_autocast(scored, digits, name):
    with torch.autocast("cpu", torch.bfloat16):
        fitted = quiet_fit(untrained(digits.module, name), digits.X, digits.y)
    expected = scored[name].score_samples(digits.X_test)
    np.testing.assert_array_equal(fitted.score_samples(digits.X_test), expected)


# Scores of one's own


def test_scale_refuses_features_that_turn_negative_later():
    rows = Outputs(torch.ones(4, 3).double(), torch.zeros(4, 2).double(), torch.arange(4) % 2)
    score = Scale().fit([rows], Head(torch.ones(2, 3).double(), torch.zeros(2).double()))
    with pytest.raises(ValueError, match="these go down to -1"):
        score(-torch.ones(4, 3).double(), torch.zeros(4, 2).double())


def test_a_registered_score_is_known_by_its_name(digits, monkeypatch):
    monkeypatch.setitem(SCORES, "mine", Energy)
    fitted = quiet_fit(untrained(digits.module, "mine"), digits.X, digits.y)
    assert type(fitted.score_function_) is Energy


class Moving(Energy):
    uses_gradient = True


class MovingOneColumn(Moving):
    def perturbation(self, logits, batch):
        return batch[:, :1]


@pytest.mark.usefixtures("no_epoch")
@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (Moving(), TypeError, r"has no method perturbation\(logits, batch\)"),
        (MovingOneColumn(), ValueError, r"shape \(4, 1\) for a batch of \(4, 64\)"),
    ],
)
def test_a_perturbation_fits_the_batch(digits, score, error, message):
    with pytest.raises(error, match=message):
        quiet_fit(untrained(digits.module, score, max_epochs=1), digits.X, digits.y)


# Far away


@pytest.mark.filterwarnings("ignore::skood.exceptions.AnotherScaleWarning")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("score", ["two_views", "direction_length"])
def test_rows_of_a_table_that_lie_far_away_are_rejected_in_every_direction(score, seed):
    centers = [[-2, 0], [2, 0], [0, 3]]
    blobs, kinds = make_blobs(600, centers=centers, cluster_std=0.6, random_state=seed)
    detector = SparseEnergyOODDetector(
        score_function=score, pretrain_epochs=30, max_epochs=2, random_state=seed
    ).fit(blobs, kinds)
    angle = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    circle = np.c_[np.cos(angle), np.sin(angle)]
    for radius in (20, 1e3, 1e6):
        assert (detector.predict(radius * circle) == -1).all()
    assert (detector.predict(blobs) == 1).mean() > 0.9


# Rows held out for a score


def test_two_views_keep_as_many_fresh_rows_as_promised():
    # Standardised on the rows that place the threshold, it would keep a point less.
    random = np.random.RandomState(0)
    X = random.randn(4000, 6).astype(np.float32)
    y = (X @ random.randn(6, 3)).argmax(axis=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    kept = []
    for seed in range(40):
        rows = random.permutation(len(X))
        detector = SparseEnergyOODDetector(
            module, score_function="two_views", max_epochs=0, calibration_size=39, random_state=seed
        )
        quiet_fit(detector, X[rows[:200]], y[rows[:200]])
        kept.append((detector.predict(X[rows[200:1200]]) == 1).mean())
    assert np.mean(kept) > 0.945
    assert len(detector.calibration_scores_) == 39


def test_rows_of_the_scale_are_neither_trained_on_nor_place_the_threshold(digits):
    seen = []

    class Watching(TwoViews):
        def fit(self, outputs, head=None, held_out=()):
            seen.append([len(torch.cat([part.labels for part in p])) for p in (outputs, held_out)])
            return super().fit(outputs, head, held_out)

    detector = SparseEnergyOODDetector(
        digits.module, score_function=Watching(), max_epochs=0, calibration_size=60, random_state=0
    )
    n = len(digits.X)
    quiet_fit(detector, digits.X, digits.y)
    apart = (n - 60) // 10
    assert seen[-1] == [n - 60 - apart, apart]
    assert len(detector.calibration_scores_) == 60
