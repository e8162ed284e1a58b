"""Errors that you may want to catch, and warnings that you may want to silence, by their class.

Each is a kind of the built-in class that its name suggests, so ``except ValueError`` catches a
`NonFiniteLogitsError`. To silence one warning and no other:

    warnings.simplefilter("ignore", ThresholdWarning)
"""

from __future__ import annotations

__all__ = [
    "AccuracyDropWarning",
    "AnotherScaleWarning",
    "DeviceWarning",
    "DivergenceError",
    "ExportError",
    "FewCalibrationRowsWarning",
    "FewTrainingRowsWarning",
    "HeadNotFoundError",
    "LabelOrderWarning",
    "LostRankError",
    "LostRejectionWarning",
    "MemoryEntryWarning",
    "NearChanceWarning",
    "NonFiniteLogitsError",
    "PenaltyWithoutEffectWarning",
    "PrecisionWarning",
    "RandomScoresWarning",
    "RoundedValuesWarning",
    "SavedFileError",
    "SavedFileWarning",
    "SeenRowsWarning",
    "SelectionWarning",
    "SkoodWarning",
    "SlowScoringWarning",
    "StaleValuesWarning",
    "ThresholdWarning",
    "TiedScoresWarning",
    "UnreadableImagesError",
    "UnreadableImagesWarning",
    "UnscaledImagesWarning",
]


class DivergenceError(RuntimeError):
    """Training failed: the loss became NaN or infinite, or all scores became the same."""


class NonFiniteLogitsError(ValueError):
    """The network gave NaN or infinite logits for finite rows."""


class HeadNotFoundError(ValueError):
    """The network has no last layer that turns features into logits, or hides it."""


class ExportError(ValueError):
    """A detector, or a part of it, cannot be exported, or the file would say something else."""


class LostRankError(RuntimeError):
    """Another process of the torch.distributed group ended, or did not answer in time."""


class SavedFileError(ValueError):
    """A file is not one that can be loaded as a detector, or a detector cannot be kept in one."""


class UnreadableImagesError(ValueError):
    """Files of images are damaged, missing or of another kind."""


class SkoodWarning(UserWarning):
    """Any warning of skood's."""


class ThresholdWarning(SkoodWarning):
    """The threshold may keep fewer in-distribution rows than it promises."""


class FewCalibrationRowsWarning(ThresholdWarning):
    """There are too few calibration rows for the share of rows to keep."""


class TiedScoresWarning(ThresholdWarning):
    """So many calibration rows score the same that the threshold tells little apart."""


class AccuracyDropWarning(SkoodWarning):
    """Fine-tuning made the classifier less accurate."""


class NearChanceWarning(SkoodWarning):
    """The given network classifies hardly better than chance."""


class LabelOrderWarning(SkoodWarning):
    """The labels seem to be in another order than the logits of the given network."""


class LostRejectionWarning(SkoodWarning):
    """An estimator around a `RejectingClassifier` does not reject."""


class UnreadableImagesWarning(SkoodWarning):
    """Files of images cannot be read and are left out."""


class UnscaledImagesWarning(SkoodWarning):
    """Images reach the network as they are in files, with values from 0 to 255."""


class AnotherScaleWarning(SkoodWarning):
    """Rows to score are on another scale than those of fit, as 0 to 255 after 0 to 1."""


class RoundedValuesWarning(SkoodWarning):
    """Values of X are rounded in the cast to the network's dtype, and differ less than that."""


class SeenRowsWarning(SkoodWarning):
    """Rows that are compared with the calibration rows are probably these rows themselves."""


class PenaltyWithoutEffectWarning(SkoodWarning):
    """The penalty can change nothing, because the features cannot be trained."""


class PrecisionWarning(SkoodWarning):
    """The network cannot be trained in the precision that would be fastest."""


class RandomScoresWarning(SkoodWarning):
    """Something draws random numbers where scores are computed, so they may change with calls."""


class StaleValuesWarning(SkoodWarning):
    """A network goes on, after training, with what it computed from its weights before."""


class FewTrainingRowsWarning(SkoodWarning):
    """A score was fitted to too few training rows."""


class SlowScoringWarning(SkoodWarning):
    """Rows are scored in smaller batches than usual, or one by one."""


class DeviceWarning(SkoodWarning):
    """The device of the detector is not available here."""


class MemoryEntryWarning(SkoodWarning):
    """``memory=`` keeps nothing, or what it kept cannot be used."""


class SavedFileWarning(SkoodWarning):
    """A detector that was kept may not score as it did."""


class SelectionWarning(SkoodWarning):
    """A search or a score may not compare detectors as you expect."""
