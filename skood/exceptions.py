"""Errors that you may want to catch, and warnings that you may want to silence, by their class.

Each is a kind of the built-in class that its name suggests, so ``except ValueError`` catches a
`NonFiniteLogitsError`. To silence one warning and no other:

    warnings.simplefilter("ignore", ThresholdWarning)
"""

from __future__ import annotations

__all__ = [
    "AccuracyDropWarning",
    "AnotherScaleWarning",
    "DetectionDropWarning",
    "DeviceWarning",
    "DivergenceError",
    "DivergenceWarning",
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
    """Training failed: the loss became NaN or infinite, or all scores the same or refused."""


class NonFiniteLogitsError(ValueError):
    """The network gave NaN or infinite logits for finite rows."""


class HeadNotFoundError(ValueError):
    """The network has no last layer that turns features into logits, or hides it."""


class ExportError(ValueError):
    """A detector or a part of it cannot be exported, or the file would give different results."""


class LostRankError(RuntimeError):
    """Another process of the torch.distributed group ended, or did not answer in time."""


class SavedFileError(ValueError):
    """A file cannot be loaded as a detector, or a detector cannot be saved to one."""


class UnreadableImagesError(ValueError):
    """Files of images are damaged, missing or of another kind."""


class SkoodWarning(UserWarning):
    """Any warning that skood gives."""


class ThresholdWarning(SkoodWarning):
    """The threshold may keep fewer in-distribution rows than it promises."""


class FewCalibrationRowsWarning(ThresholdWarning):
    """There are too few calibration rows for the share of rows to keep."""


class TiedScoresWarning(ThresholdWarning):
    """So many calibration rows score the same that the threshold separates little."""


class AccuracyDropWarning(SkoodWarning):
    """Fine-tuning made the classifier less accurate."""


class DetectionDropWarning(SkoodWarning):
    """Fine-tuning lets clearly more outliers of a kind in, as far as made ones show it."""


class DivergenceWarning(SkoodWarning):
    """Training failed at every weight above 0 that "auto" tries."""


class NearChanceWarning(SkoodWarning):
    """The given network classifies hardly better than chance."""


class LabelOrderWarning(SkoodWarning):
    """The labels seem to be in a different order from the logits of the given network."""


class LostRejectionWarning(SkoodWarning):
    """An estimator around a `RejectingClassifier` does not reject."""


class UnreadableImagesWarning(SkoodWarning):
    """Files of images cannot be read and are left out."""


class UnscaledImagesWarning(SkoodWarning):
    """Images reach the network as they are in files, with values from 0 to 255."""


class AnotherScaleWarning(SkoodWarning):
    """Rows to score are on another scale than those of fit, such as 0 to 255 after 0 to 1."""


class RoundedValuesWarning(SkoodWarning):
    """Values of X differ by less than the rounding in the cast to the network's dtype."""


class SeenRowsWarning(SkoodWarning):
    """Rows that are compared with the calibration rows are probably these rows themselves."""


class PenaltyWithoutEffectWarning(SkoodWarning):
    """The penalty has no effect, because the features cannot be trained."""


class PrecisionWarning(SkoodWarning):
    """The network cannot be trained in the precision that would be fastest."""


class RandomScoresWarning(SkoodWarning):
    """Scores may change between calls, because something draws random numbers in computing them."""


class StaleValuesWarning(SkoodWarning):
    """After training, a network still uses what it computed from its earlier weights."""


class FewTrainingRowsWarning(SkoodWarning):
    """A score was fitted to too few training rows."""


class SlowScoringWarning(SkoodWarning):
    """Rows are scored in smaller batches than usual, or one by one."""


class DeviceWarning(SkoodWarning):
    """The device of the detector is not available here."""


class MemoryEntryWarning(SkoodWarning):
    """``memory=`` keeps nothing, or what it kept cannot be used."""


class SavedFileWarning(SkoodWarning):
    """A detector that was saved may not score as it did."""


class SelectionWarning(SkoodWarning):
    """A search or a score may not compare detectors as you expect."""
