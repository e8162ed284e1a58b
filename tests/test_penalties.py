from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from skood import SparseEnergyOODDetector
from skood.engine.training import Training
from skood.penalties import (
    PENALTIES,
    Relative,
    fit_penalty,
    get_penalty,
    hoyer_index,
    l1,
    l1_over_l2,
)

DTYPES = [torch.float32, torch.float64]


def random_features(n_rows=7, width=5):
    return np.random.RandomState(0).randn(n_rows, width)


def gradient(function, features):
    features = torch.tensor(features, requires_grad=True)
    function(features).sum().backward()
    return features.grad.numpy()


def test_l1_sums_absolute_values_over_the_features_of_each_row():
    features = random_features()
    expected = [sum(abs(value) for value in row) for row in features]
    assert l1(torch.tensor(features)).numpy() == pytest.approx(expected, rel=1e-12)


def test_l1_gradient_is_the_sign():
    features = random_features()
    assert (gradient(l1, features) == np.sign(features)).all()


def test_l1_over_l2_is_the_ratio_of_the_norms():
    features = random_features()
    expected = [np.abs(row).sum() / np.sqrt((row**2).sum()) for row in features]
    assert l1_over_l2(torch.tensor(features)).numpy() == pytest.approx(expected, rel=1e-12)


def test_l1_over_l2_gradient_follows_its_closed_form():
    features = random_features()
    norm1 = np.abs(features).sum(axis=1, keepdims=True)
    norm2 = np.sqrt((features**2).sum(axis=1, keepdims=True))
    expected = np.sign(features) / norm2 - norm1 * features / norm2**3
    np.testing.assert_allclose(gradient(l1_over_l2, features), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_l1_over_l2_ignores_scale(scale):
    features = torch.tensor(random_features(), dtype=torch.float32)
    torch.testing.assert_close(
        l1_over_l2(features * scale), l1_over_l2(features), rtol=1e-5, atol=0
    )


def test_l1_over_l2_ignores_the_scale_of_each_row_on_its_own():
    features = torch.tensor(random_features(), dtype=torch.float32)
    scales = torch.logspace(-30, 30, len(features))[:, None]
    torch.testing.assert_close(
        l1_over_l2(features * scales), l1_over_l2(features), rtol=1e-5, atol=0
    )


def test_l1_over_l2_lies_between_one_and_the_root_of_the_width():
    features = torch.eye(9, dtype=torch.float64)[:1].repeat(2, 1)
    features[1] = -3.0
    assert l1_over_l2(features).tolist() == pytest.approx([1.0, 3.0], rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_every_penalty_is_zero_and_flat_at_rows_of_zeros(name, dtype):
    features = torch.tensor([[0.0, 0.0], [3.0, -4.0]], dtype=dtype, requires_grad=True)
    values = PENALTIES[name](features)
    values.sum().backward()
    assert values[0] == 0
    assert (features.grad[0] == 0).all()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_every_penalty_gives_one_non_negative_value_a_row_from_that_row_alone(name, dtype):
    features = torch.tensor(random_features(), dtype=dtype)
    values = PENALTIES[name](features)
    assert values.shape == (len(features),)
    assert values.dtype == dtype
    assert (values >= 0).all()
    alone = torch.cat([PENALTIES[name](row[None]) for row in features])
    torch.testing.assert_close(values, alone)


def test_a_relative_penalty_has_mean_one_where_it_was_measured():
    features = torch.tensor(random_features(), dtype=torch.float32)
    relative = Relative(l1).fit(features)
    assert relative(features).mean().item() == pytest.approx(1, rel=1e-6)
    assert relative.unit == pytest.approx(np.abs(random_features()).sum(axis=1).mean(), rel=1e-6)


def test_a_relative_penalty_is_free_of_width_and_scale():
    features = torch.tensor(random_features())
    wide = 50 * features.repeat(1, 7)
    expected = Relative(l1).fit(features)(features / 2)
    torch.testing.assert_close(Relative(l1).fit(wide)(wide / 2), expected, rtol=1e-6, atol=0)
    assert l1(wide).mean() == pytest.approx(350 * l1(features).mean())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_penalty_without_a_unit_is_refused(value):
    with pytest.raises(ValueError, match=f"mean before fine-tuning is {value:g}"):
        Relative(l1).fit(torch.full((2, 3), value))


def test_hoyer_index_follows_its_definition():
    features = random_features(width=4)
    expected = [(2 - np.abs(row).sum() / np.sqrt((row**2).sum())) / (2 - 1) for row in features]
    assert hoyer_index(torch.tensor(features)).numpy() == pytest.approx(expected, rel=1e-12)


def test_hoyer_index_is_one_for_the_sparsest_rows_and_zero_for_the_densest():
    features = torch.tensor([[0.0, -5.0, 0.0], [0.0, 0.0, 0.0], [2.0, -2.0, 2.0]])
    assert hoyer_index(features).tolist() == pytest.approx([1, 1, 0], abs=1e-6)


def test_hoyer_index_of_a_single_feature_is_one():
    assert hoyer_index(torch.tensor([[3.0], [0.0]])).tolist() == [1, 1]


def test_penalties_are_found_by_name_and_callables_taken_as_they_are():
    def custom(features):
        return features[:, 0]

    assert get_penalty("l1") is l1
    assert get_penalty("l1_over_l2") is l1_over_l2
    assert get_penalty(custom) is custom


def test_unknown_penalty_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"penalty='l2' is unknown; pass one of \[.*'l1'"):
        get_penalty("l2")


def test_penalty_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"penalty=0\.5 is a float"):
        get_penalty(0.5)


# Penalties with statistics


class InUnits:
    """L1 of features, each in units of its own mean, which `fit` measures."""

    def __init__(self, power=1.0):
        self.power = power

    def fit(self, features):
        self.units_ = features.abs().mean(dim=0) + 0.1

    def __call__(self, features):
        return (features.abs() / self.units_).pow(self.power).mean(dim=1)


class Returned(InUnits):
    """The same, whose `fit` returns what is fitted, as most do."""

    def fit(self, features):
        super().fit(features)
        return self


def quiet_fit(detector, X, y=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector.fit(X, y)


def tuned(digits, penalty, **parameters):
    settings = {"sparsity_weight": 0.1, "max_epochs": 1, "random_state": 0} | parameters
    return SparseEnergyOODDetector(digits.module, penalty=penalty, **settings)


@pytest.mark.parametrize("penalty", [InUnits(), Returned(), Relative(l1)])
def test_a_copy_of_a_penalty_is_fitted(penalty):
    before, features = vars(penalty).copy(), torch.tensor(random_features())
    fitted = fit_penalty(penalty, lambda: features)
    assert type(fitted) is type(penalty)
    assert fitted is not penalty
    assert vars(penalty) == before
    assert vars(fitted) != before
    assert fitted(features).shape == (len(features),)


def test_features_are_asked_for_only_by_a_penalty_that_is_fitted():
    assert fit_penalty(l1, lambda: pytest.fail("features were computed")) is l1


@pytest.mark.parametrize("kind", [InUnits, Returned])
def test_the_penalty_of_the_user_is_as_it_was(digits, kind):
    penalty = kind()
    first, second = tuned(digits, penalty), tuned(digits, penalty, calibration_size=500)
    scores = quiet_fit(first, digits.X, digits.y).score_samples(digits.X_test)
    quiet_fit(second, digits.X, digits.y)
    assert first.penalty is second.penalty is penalty
    assert vars(penalty) == {"power": 1.0}
    assert np.array_equal(first.score_samples(digits.X_test), scores)
    again = quiet_fit(clone(first), digits.X, digits.y)
    assert np.array_equal(again.score_samples(digits.X_test), scores)
    loaded = pickle.loads(pickle.dumps(first))
    assert np.array_equal(loaded.score_samples(digits.X_test), scores)


def test_it_is_fitted_to_the_features_before_fine_tuning(digits):
    seen = []

    class Watched(InUnits):
        def fit(self, features):
            seen.append(features)
            super().fit(features)

    detector = quiet_fit(tuned(digits, Watched(), calibration_size=200), digits.X, digits.y)
    (features,) = seen
    assert features.shape == (800, 64)
    with torch.no_grad():
        before = digits.module[:-1](torch.as_tensor(digits.X, dtype=torch.float32))
    exactly = "donot_use_mm_for_euclid_dist"
    assert torch.cdist(features, before, compute_mode=exactly).amin(dim=1).max() < 1e-3
    assert detector.history_[0]["penalty"] == pytest.approx(1, abs=0.2)


def test_a_search_chooses_among_penalties_with_statistics(digits):
    given = [InUnits(1.0), InUnits(2.0), "relative_l1", l1]
    search = GridSearchCV(
        tuned(digits, "l1", max_epochs=2, learning_rate=0.02),
        {"penalty": given},
        cv=2,
        error_score="raise",
    )
    quiet_fit(search, digits.X[:300], digits.y[:300])
    assert len(set(search.cv_results_["mean_test_score"])) == len(given)
    assert all(not hasattr(penalty, "units_") for penalty in given)


def test_memory_knows_a_penalty_by_what_it_does(digits, tmp_path, monkeypatch):
    epochs, run = [], Training._epoch

    def counted(training, number):
        epochs.append(number)
        return run(training, number)

    monkeypatch.setattr(Training, "_epoch", counted)

    def epochs_of(penalty, n_rows=300):
        epochs.clear()
        detector = tuned(digits, penalty, memory=str(tmp_path))
        scores = quiet_fit(detector, digits.X[:n_rows], digits.y[:n_rows]).score_samples(
            digits.X_test
        )
        return len(epochs), scores

    ran, scores = epochs_of(InUnits())
    assert ran == 1
    ran, again = epochs_of(InUnits())
    assert ran == 0
    assert np.array_equal(again, scores)
    assert epochs_of(InUnits(2.0))[0] == 1
    assert epochs_of(Returned())[0] == 1
    assert epochs_of(InUnits(), n_rows=290)[0] == 1


def test_a_penalty_whose_fit_returns_no_penalty_is_refused():
    class Wrong:
        def __call__(self, features):
            return features.sum(dim=1)

        def fit(self, features):
            return 3

    with pytest.raises(TypeError, match="returned a int; it must return nothing or the fitted"):
        fit_penalty(Wrong(), lambda: torch.ones(2, 3))
