"""Each error and warning that has a class of its own, met as a user meets it."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from modules import HARM, digit_images, mlp
from PIL import Image
from sklearn.ensemble import VotingClassifier
from torch import distributed, nn

from skood import RejectingClassifier, SparseEnergyOODDetector, exceptions
from skood.datasets import LoadImages, find_images
from skood.exceptions import (
    AccuracyDropWarning,
    AnotherScaleWarning,
    DetectionDropWarning,
    DeviceWarning,
    DivergenceError,
    DivergenceWarning,
    ExportError,
    FewCalibrationRowsWarning,
    FewTrainingRowsWarning,
    HeadNotFoundError,
    LabelOrderWarning,
    LostRankError,
    LostRejectionWarning,
    MemoryEntryWarning,
    NearChanceWarning,
    NonFiniteLogitsError,
    PenaltyWithoutEffectWarning,
    PrecisionWarning,
    RandomScoresWarning,
    RoundedValuesWarning,
    SavedFileError,
    SavedFileWarning,
    SeenRowsWarning,
    SelectionWarning,
    SkoodWarning,
    SlowScoringWarning,
    StaleValuesWarning,
    ThresholdWarning,
    TiedScoresWarning,
    UnreadableImagesError,
    UnreadableImagesWarning,
    UnscaledImagesWarning,
)
from skood.model_selection import make_ood_scorer

N = 60
X = np.random.RandomState(0).randn(N, 6)
Y = np.arange(N) % 4
IMAGES = np.random.RandomState(0).randint(256, size=(N, 3, 8, 8)).astype(np.uint8)


def network(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp(**options)


def detector_of(module=None, **parameters):
    settings = {"max_epochs": 0, "random_state": 0} | parameters
    return SparseEnergyOODDetector(module or network(), **settings)


def fitted(module=None, **parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector_of(module, **parameters).fit(X, Y)


# Errors


def diverge():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector_of(max_epochs=5, learning_rate=1e30).fit(X, Y)


def overflow():
    module = network()
    with torch.no_grad():
        module[-1].bias.fill_(float("inf"))
    detector_of(module).fit(X, Y)


def hide_the_head():
    detector_of(nn.Flatten()).fit(X, Y)


def load_what_save_has_not_written():
    SparseEnergyOODDetector.load(__file__)


def load_what_is_no_image():
    LoadImages(np.asarray)([__file__])


@pytest.mark.parametrize(
    ("fail", "error", "builtin"),
    [
        (load_what_is_no_image, UnreadableImagesError, ValueError),
        (load_what_save_has_not_written, SavedFileError, ValueError),
        (diverge, DivergenceError, RuntimeError),
        (overflow, NonFiniteLogitsError, ValueError),
        (hide_the_head, HeadNotFoundError, ValueError),
        (lambda: fitted(score_function="odin").as_module(), ExportError, ValueError),
    ],
)
def test_an_error_has_its_class_and_is_the_builtin_it_was(fail, error, builtin):
    with pytest.raises(error) as caught:
        fail()
    assert caught.type is error
    assert issubclass(error, builtin)


def fit_on_rank_0_alone():
    if distributed.get_rank() == 0:
        detector_of().fit(X, Y)


def test_a_lost_process_has_a_class_that_travels(mortal_group):
    error, _ = mortal_group(fit_on_rank_0_alone)
    assert type(error) is LostRankError
    assert issubclass(LostRankError, RuntimeError)


# Warnings


def use_a_threshold_of_training_rows():
    fitted(calibration_size=None).predict(X)


def calibrate_on_few_rows():
    fitted().calibrate(X[:5])


def lose_accuracy():
    module = network()
    with torch.no_grad():
        labels = module.eval()(torch.from_numpy(X)).argmax(dim=1).numpy()
    parameters = {"max_epochs": 5, "learning_rate": 0.02, "sparsity_weight": 1.0}
    detector_of(module, **parameters, calibration_size=None).fit(X, labels)


def diverge_by_a_penalty():
    def penalty(features):  # without a gradient where a feature is 0
        return features.abs().sqrt().sum(dim=1)

    settings = {"sparsity_weight": "auto", "penalty": penalty, "max_epochs": 1}
    detector_of(**settings, calibration_size=None).fit(X, Y)


def let_outliers_in():
    images, labels, module = digit_images()
    detector_of(module, **HARM).fit(images, labels)


def permute_labels():
    module = network()
    with torch.no_grad():
        labels = module.eval()(torch.from_numpy(X)).argmax(dim=1).numpy()
    detector_of(module, calibration_size=None).fit(X, (labels + 1) % 4)


def pass_an_untrained_network():
    labels = np.random.RandomState(1).randint(4, size=len(X))
    detector_of(network(), calibration_size=None).fit(X, labels)


def saturate():
    module = network()
    with torch.no_grad():
        module[-1].weight.mul_(1e6)
    detector_of(module, score_function="msp", max_epochs=0).fit(X).calibrate(X)


def pass_bytes():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    detector_of(module, calibration_size=None).fit(IMAGES)


def score_another_scale():
    fitted().score_samples(1000 * X)


def pass_large_integers():
    module = network(dtype=torch.float32)
    detector_of(module, calibration_size=None).fit((X * 2**30).astype(np.int64))


def freeze_the_body():
    module = network()
    module[:-1].requires_grad_(False)
    detector_of(module, max_epochs=1, calibration_size=None).fit(X)


class Keeping(nn.Module):
    """Keeps weights that it has read in evaluation mode."""

    kept = None

    def __init__(self):
        super().__init__()
        self.inner = network(dtype=torch.float32)
        self.mixing = nn.Parameter(torch.eye(6))

    def forward(self, x):
        if not self.training and self.kept is None:
            self.kept = self.mixing.detach().clone()
        return self.inner(x @ (self.mixing if self.training else self.kept))


def keep_weights_from_before():
    settings = {"sparsity_weight": 0, "learning_rate": 0.5, "batch_size": 4, "max_epochs": 2}
    detector_of(Keeping(), calibration_size=None, **settings).fit(X)


def fit_covariances_to_few_rows():
    detector_of(score_function="mahalanobis", calibration_size=None).fit(X[:10], Y[:10])


def score_row_by_row():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves these layers elsewhere
        module = torch.ao.quantization.quantize_dynamic(network(dtype=torch.float32), {nn.Linear})
    detector_of(module, calibration_size=None).fit(X)


def travel_to_a_machine_without_the_device():
    detector = fitted()
    network = detector._network
    network.batcher = dataclasses.replace(network.batcher, device=torch.device("cuda:7"))
    pickle.loads(pickle.dumps(detector))


def read_a_pickle_of_another_version():
    with mock.patch("skood.detector.__version__", "0.0.1"):
        content = pickle.dumps(fitted())
    pickle.loads(content)


def keep_what_is_drawn_afresh():
    detector_of(random_state=None, memory="unused", calibration_size=None).fit(X)


def vote_with_one_that_rejects():
    detector = detector_of(network(), calibration_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NearChanceWarning)
        VotingClassifier([("one", RejectingClassifier(detector))]).fit(X, Y)


def score_without_outliers():
    fitted(ood_label=-1).score(X, Y)


def search_with_two_labels_of_outliers():
    scorer = make_ood_scorer("auroc", ood_label=-1)
    scorer(fitted(), X, np.where(Y == 0, -1, Y))


def check_the_calibration_rows():
    fitted().calibrate(X).check_batch(X)


def draw_without_effect():
    def score(features, logits):
        return logits.logsumexp(dim=1) + 0 * torch.rand(len(logits))

    detector_of(score_function=score, calibration_size=None).fit(X)


def scatter_into_float32():
    class Scattering(nn.Module):
        def forward(self, x):
            out = torch.zeros(x.shape)
            out[x > 0] = x[x > 0]
            return out

    module = nn.Sequential(nn.Conv2d(3, 4, 3), Scattering(), nn.Flatten(), nn.Linear(144, 4))
    with mock.patch("skood.engine.hardware.has_native_bfloat16", return_value=True):
        detector_of(module, max_epochs=1, calibration_size=None).fit(IMAGES / 255)


def skip_a_damaged_image():
    with TemporaryDirectory() as folder:
        Image.new("RGB", (4, 4)).save(Path(folder) / "1.png")
        (Path(folder) / "2.png").touch()
        find_images(folder, on_error="skip")


WARNINGS = [
    (draw_without_effect, RandomScoresWarning),
    (scatter_into_float32, PrecisionWarning),
    (use_a_threshold_of_training_rows, ThresholdWarning),
    (calibrate_on_few_rows, FewCalibrationRowsWarning),
    (lose_accuracy, AccuracyDropWarning),
    (let_outliers_in, DetectionDropWarning),
    (diverge_by_a_penalty, DivergenceWarning),
    (permute_labels, LabelOrderWarning),
    (pass_an_untrained_network, NearChanceWarning),
    (saturate, TiedScoresWarning),
    (pass_bytes, UnscaledImagesWarning),
    (score_another_scale, AnotherScaleWarning),
    (pass_large_integers, RoundedValuesWarning),
    (freeze_the_body, PenaltyWithoutEffectWarning),
    (keep_weights_from_before, StaleValuesWarning),
    (fit_covariances_to_few_rows, FewTrainingRowsWarning),
    (score_row_by_row, SlowScoringWarning),
    (travel_to_a_machine_without_the_device, DeviceWarning),
    (keep_what_is_drawn_afresh, MemoryEntryWarning),
    (read_a_pickle_of_another_version, SavedFileWarning),
    (vote_with_one_that_rejects, LostRejectionWarning),
    (score_without_outliers, SelectionWarning),
    (search_with_two_labels_of_outliers, SelectionWarning),
    (check_the_calibration_rows, SeenRowsWarning),
    (skip_a_damaged_image, UnreadableImagesWarning),
]


def ours(caught):
    return [w for w in caught if "skood" in str(w.category) or w.filename == __file__]


@pytest.mark.parametrize(("do", "category"), WARNINGS, ids=[do.__name__ for do, _ in WARNINGS])
def test_a_warning_has_its_class_and_names_the_line_of_the_user(do, category):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    found = ours(caught)
    assert category in [w.category for w in found]
    assert all(issubclass(w.category, SkoodWarning) for w in found)
    assert {w.filename for w in found} == {__file__}


@pytest.mark.parametrize(("do", "category"), WARNINGS, ids=[do.__name__ for do, _ in WARNINGS])
def test_a_warning_is_silenced_by_its_class_and_by_that_of_all(do, category):
    for silenced in (category, SkoodWarning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", silenced)
            do()
        assert category not in [w.category for w in caught]


def test_the_classes_are_the_builtins_that_they_were():
    for name in exceptions.__all__:
        kind = getattr(exceptions, name)
        if name.endswith("Warning"):
            assert issubclass(kind, UserWarning)
            assert issubclass(kind, SkoodWarning)
        else:
            assert issubclass(kind, RuntimeError | ValueError)
        assert kind.__doc__


def test_every_class_is_met_here():
    met = {DivergenceError, NonFiniteLogitsError, HeadNotFoundError, LostRankError, SkoodWarning}
    met |= {ExportError, SavedFileError, UnreadableImagesError}
    met |= {category for _, category in WARNINGS}
    assert {kind.__name__ for kind in met} == set(exceptions.__all__)


def test_few_calibration_rows_are_a_kind_of_doubt():
    assert issubclass(FewCalibrationRowsWarning, ThresholdWarning)
