"""Which candidate of a search to take."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils._param_validation import validate_parameter_constraints

from ..accuracy import TOLERATED_DROP, accurate_enough
from ..exceptions import SelectionWarning
from ..notices import quoted, warn_user
from ..validation import Number, check_results, valid_array

__all__ = ["AccuracyGuard"]

TOLERANCE = [Number(Real, 0, None, closed="both")]


class AccuracyGuard:
    """Refit rule: the best detector among those that still classify well.

    A larger sparsity weight may detect better and classify worse. As ``refit=`` of a search, this
    drops the candidates whose accuracy on in-distribution rows is more than `tolerance` below that
    of the untouched classifier. Of the rest it takes the one with the best mean score, the first if
    there are several.

    Parameters
    ----------
    metric : str, default="auroc"
        Score to maximise: a name from `make_ood_scorer`, or ``<metric>_<set>`` for one named set.
    tolerance : float, default=0.01
        Accuracy that may be lost, as a fraction: 0.01 is one point. At least 0.

    Raises
    ------
    TypeError, ValueError
        If `metric` is not a string, or `tolerance` is not a number of at least 0.

    Examples
    --------
    >>> from skood.model_selection import AccuracyGuard
    >>> cv_results = {
    ...     "mean_test_auroc": [0.80, 0.90, 0.95],
    ...     "mean_test_accuracy_change": [0.0, -0.005, -0.1],
    ... }
    >>> AccuracyGuard("auroc")(cv_results)
    1

    In a search, with the scores that it needs:

    >>> from sklearn.model_selection import GridSearchCV
    >>> from skood import SparseEnergyOODDetector
    >>> from skood.model_selection import InDistributionKFold, make_ood_scorer
    >>> search = GridSearchCV(
    ...     SparseEnergyOODDetector(ood_label=-1, random_state=0),
    ...     {"sparsity_weight": [0.0, 1.0, 4.0]},
    ...     cv=InDistributionKFold(ood_label=-1, random_state=0),
    ...     scoring=make_ood_scorer(["auroc", "accuracy_change"], ood_label=-1),
    ...     refit=AccuracyGuard("auroc"),
    ... )
    """

    def __init__(self, metric: str = "auroc", *, tolerance: float = TOLERATED_DROP) -> None:
        validate_parameter_constraints(
            {"metric": [str], "tolerance": TOLERANCE},
            {"metric": metric, "tolerance": tolerance},
            caller_name="AccuracyGuard",
        )
        self.metric = metric
        self.tolerance = tolerance

    def __repr__(self) -> str:
        return f"AccuracyGuard({self.metric!r}, tolerance={self.tolerance!r})"

    # A search that refits by a rule looks the rule up among the names of its scores, in `score`.
    def __eq__(self, other: object) -> bool:
        return (
            vars(self) == vars(other) if isinstance(other, AccuracyGuard) else self.metric == other
        )

    def __hash__(self) -> int:
        return hash(self.metric)

    def __call__(self, cv_results: Mapping[str, Any]) -> int:
        """Index of the candidate to take.

        Parameters
        ----------
        cv_results : dict of str to array-like of shape (n_candidates,)
            ``cv_results_`` of a search, with "mean_test_<metric>" and "mean_test_accuracy_change".

        Returns
        -------
        int
            Position in `cv_results`, never of a candidate that has a score that is NaN or infinite.

        Raises
        ------
        TypeError, ValueError
            If `cv_results` is no dict, if a column is missing or does not hold one number for each
            candidate, or if all candidates have NaN or infinite scores.

        Warns
        -----
        SelectionWarning
            If no candidate is accurate enough. The one that loses least is taken.
        """
        score = self._column(cv_results, self.metric)
        change = self._column(cv_results, "accuracy_change")
        if len(score) != len(change):
            raise ValueError(
                f"cv_results has {len(score)} candidates with {self.metric} and {len(change)} with "
                "accuracy_change; expected as many of both."
            )
        scored = np.isfinite(score) & np.isfinite(change)
        if not scored.any():
            raise ValueError(
                f"All {len(score)} candidates have NaN or infinity as {self.metric} or "
                "accuracy_change: fitting or scoring failed. The warnings of the search say why; "
                "error_score='raise' stops it at the first failure."
            )
        accurate = scored & accurate_enough(change, self.tolerance)
        if accurate.any():
            return int(np.argmax(np.where(accurate, score, -np.inf)))
        least = int(np.argmax(np.where(scored, change, -np.inf)))
        warn_user(
            f"Every candidate loses more than tolerance={self.tolerance:g} of the accuracy on "
            f"in-distribution rows. The one that loses least, {-change[least]:.4f}, is taken. "
            "Search smaller values of sparsity_weight, learning_rate or max_epochs, or raise the "
            "tolerance.",
            SelectionWarning,
        )
        return least

    def _column(self, cv_results: Mapping[str, Any], metric: str) -> NDArray[np.float64]:
        check_results(cv_results)
        column = f"mean_test_{metric}"
        if column not in cv_results:
            found = [name[10:] for name in map(str, cv_results) if name.startswith("mean_test_")]
            raise ValueError(
                f"cv_results_ has no scores named {metric!r}, only {quoted(found)}. {self!r} needs "
                f"scoring=make_ood_scorer([{self.metric!r}, 'accuracy_change'], ...). If that "
                "failed in every fold, 'score' is all there is: error_score='raise' shows why."
            )
        name = f"cv_results[{column!r}]"
        return valid_array(cv_results[column], name, ("n_candidates",), missing=True).astype(float)
