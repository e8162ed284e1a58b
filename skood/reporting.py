"""A report of a detector in one call, for whoever signs it off: Markdown, or one HTML file.

It says what the detector is, what it keeps and rejects of the rows that you pass, and what it
cannot promise. It needs neither pandas nor matplotlib; with matplotlib, the HTML file has pictures.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.utils._param_validation import validate_parameter_constraints

from .calibration import _has_threshold, calibration_rank
from .detector import SparseEnergyOODDetector
from .engine.inference import forward_rows
from .exchangeability import COVERAGE
from .judging import (
    Judgement,
    Share,
    fitted_detector,
    judged,
    known_labels,
    shares_by_class,
)
from .labels import labels_named
from .metrics import METRICS, aurc, detection_report
from .model_selection.steps import seen_by_last_step
from .monitoring import _check_new_scores
from .notices import quoted
from .parameters import n_workers
from .plotting.coverage import ClassCoverageDisplay, RiskCoverageDisplay
from .plotting.distributions import ScoreDistributionDisplay
from .plotting.roc import DetectionRocDisplay
from .plotting.shared import Display, as_png, sets_by_name
from .scores import SCORES
from .versions import version_lines

__all__ = ["DetectorReport", "report"]

MOST_CLASSES = 20
"""In the table of classes; `DetectorReport.classes` has all."""

FALSE_ALARM = 0.01
"""Chance that rows like the calibration rows are called unlike them."""

TITLE = "Detector report"

MARKUP = r"[\\`*<>\[\]|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
"""What Markdown takes for markup. It leaves alone an underscore within a word."""

# Captions, which name the pictures.
BY_CLASS = "Share kept of each true class"
BY_COVERAGE = "Wrong classes among the rows kept, at each share of rows kept"
BY_SCORE = "Scores minus the threshold, of in-distribution rows (ID) and of each set"
BY_THRESHOLD = "In-distribution rows kept against outliers kept, at each threshold"

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem;
       color: #1a1a1a; background: white; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
div { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 1.2rem 0.3rem 0; border-bottom: 1px solid #d0d0d0; text-align: left;
         vertical-align: top; }
td:first-child { min-width: 7rem; }
figure { margin: 1.5rem 0; } img { width: 40rem; max-width: 100%; height: auto; }
"""


class _Section(NamedTuple):
    """A part of the page, whatever it is written in."""

    title: str
    sentences: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    """Its first row is the header."""
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class DetectorReport:
    """What a detector is, and what it does with the rows of a test; made by `report`.

    ``str(report)`` is the Markdown. All shares in attributes are fractions, all intervals, which
    end in "_low" and "_high", are those of Clopper and Pearson, of 95 %.

    Parameters
    ----------
    created : str
        Date and time, in UTC.
    detector : dict
        What the detector is: "network", "parameters", "features" (None if TorchScript hides them),
        "classes", "score", "penalty", "sparsity_weight" (None if it was not fine-tuned),
        "epochs" of fine-tuning, the "learning_rate" of the last (None if there were none), "tpr",
        "threshold" (one, or a list of those of the classes), "calibration_rows", and "doubts", what
        `fit` had against its threshold.
    in_distribution : dict
        The number of "rows", the share "kept" with its interval, whether they are like the
        calibration rows ("verdict"), and with labels "accuracy_before" and "accuracy_after"
        fine-tuning, "accuracy_kept" of the rows kept (None if there are none) and "aurc".
    classes : dict
        By true class the number of "rows" and the share "kept" with its interval, the lowest first.
        Empty without labels.
    outliers : dict
        By set the number of "rows", the share "rejected" at the detector's own threshold with its
        interval, and the metrics of `skood.metrics.detection_report`, the highest FPR first.
    limits : list of str
        What the detector cannot promise.
    versions : list of str
        What `skood.show_versions` prints.
    scores : dict
        Score minus threshold of each row: those of "id", those of "ood" by set, and with labels
        "y_true" and whether the classes are "correct". The pictures are drawn from them.
    """

    created: str
    detector: dict[str, Any]
    in_distribution: dict[str, Any]
    classes: dict[Any, dict[str, Any]]
    outliers: dict[str, dict[str, Any]]
    limits: list[str]
    versions: list[str]
    scores: dict[str, Any]

    def to_markdown(self) -> str:
        """Write the report as Markdown, without pictures.

        Returns
        -------
        str
            The text.
        """
        lines = [f"# {TITLE}", "", self.created, ""]
        for section in self._sections():
            lines += [f"## {section.title}", ""]
            lines += [f"- {_markdown(sentence)}" for sentence in section.sentences]
            lines += [""] * bool(section.sentences)
            if section.table:
                header, *rows = [[_markdown(cell) for cell in row] for row in section.table]
                for cells in (header, ["---"] * len(header), *rows):
                    lines.append(f"| {' | '.join(cells)} |")
                lines.append("")
        return "\n".join(lines)

    def to_html(self) -> str:
        """Write the report as one HTML page, with pictures if matplotlib is installed.

        Returns
        -------
        str
            The page. It loads nothing.
        """
        can_draw = importlib.util.find_spec("matplotlib") is not None
        body = [f"<h1>{TITLE}</h1>", f"<p>{self.created}</p>"]
        for section in self._sections():
            body.append(f"<h2>{section.title}</h2>")
            if section.sentences:
                items = [f"<li>{_html(sentence)}</li>" for sentence in section.sentences]
                body += ["<ul>", *items, "</ul>"]
            if section.table:
                body.append(_html_table(section.table))
            for caption in section.pictures if can_draw else ():
                data = base64.b64encode(as_png(self._picture(caption))).decode()
                body.append(
                    f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
        return "\n".join(
            [
                '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{TITLE}, {self.created}</title><style>{STYLE}</style></head><body>",
                *body,
                "</body></html>\n",
            ]
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the report to a file.

        Parameters
        ----------
        path : str or path
            Name of the file, which ends in ".md" or ".html". A file of that name is replaced.

        Raises
        ------
        ValueError
            If the name ends otherwise.
        OSError
            If the file cannot be written.
        """
        validate_parameter_constraints(
            {"path": [str, PathLike]}, {"path": path}, caller_name="save"
        )
        writers = {".md": self.to_markdown, ".html": self.to_html}
        suffix = Path(path).suffix.lower()
        if suffix not in writers:
            raise ValueError(
                f"path={quoted(str(path))} ends in {quoted(suffix)}; expected the name of a file "
                "that ends in .md or .html."
            )
        Path(path).write_text(writers[suffix](), encoding="utf-8")

    def __str__(self) -> str:
        return self.to_markdown()

    __repr__ = __str__

    def _sections(self) -> Iterator[_Section]:
        yield _Section("In short", self._summary())
        yield _Section("What it is", table=self._facts())
        yield _Section("In-distribution rows", table=self._measures())
        if self.classes:
            yield self._by_class()
        if self.outliers:
            yield self._by_set()
        yield _Section("What it cannot promise", self.limits)
        yield _Section("Versions", self.versions)

    def _summary(self) -> list[str]:
        rows, target = self.in_distribution, self.detector["tpr"]
        lines = [f"The threshold is doubtful: {doubt}" for doubt in self.detector["doubts"]]
        lines.append(
            f"It keeps {_share(rows, 'kept')} of {rows['rows']:,} in-distribution rows; the "
            f"threshold was placed to keep {_target(target)}. The rows are {rows['verdict']}."
        )
        if "accuracy_after" in rows:
            line = f"Its classes are right for {_percent(rows['accuracy_after'])} of these rows"
            if rows["accuracy_kept"] is not None:
                line += f", and for {_percent(rows['accuracy_kept'])} of those that it keeps"
            lines.append(f"{line}. Before fine-tuning: {_percent(rows['accuracy_before'])}.")
        by_share = sorted(self.outliers, key=lambda name: self.outliers[name]["rejected"])
        if by_share:
            shares = {name: _share(self.outliers[name], "rejected") for name in by_share}
            line = f"It rejects {shares[by_share[0]]} of the outliers {quoted(by_share[0])}"
            if len(by_share) > 1:
                line += f", the fewest of {len(by_share)} sets, and {shares[by_share[-1]]} of "
                line += f"{quoted(by_share[-1])}, the most"
            lines.append(f"{line}.")
        return [
            *lines,
            "In brackets: where the share of all such rows lies, at a confidence of 95 %.",
        ]

    def _facts(self) -> list[list[str]]:
        facts = self.detector
        weight, rate = facts["sparsity_weight"], facts["learning_rate"]
        shown = {
            "network": facts["network"],
            "parameters": f"{facts['parameters']:,}",
            "features": "hidden" if facts["features"] is None else f"{facts['features']:,}",
            "classes": f"{facts['classes']:,}",
            "score": facts["score"],
            "epochs of fine-tuning": f"{facts['epochs']}",
            "learning rate": "none" if rate is None else f"{rate:g}",
            "penalty": facts["penalty"],
            "sparsity weight": "none, not fine-tuned" if weight is None else f"{weight:g}",
            "share to keep": _target(facts["tpr"]),
            "threshold": _threshold(facts["threshold"]),
            "calibration rows": f"{facts['calibration_rows']:,}, "
            + ("doubtful" if facts["doubts"] else "no sign that the network has seen them"),
        }
        return [["property", "value"], *([name, value] for name, value in shown.items())]

    def _measures(self) -> list[list[str]]:
        rows = self.in_distribution
        shown = {"rows": f"{rows['rows']:,}", "kept": _share(rows, "kept")}
        if "accuracy_after" in rows:
            kept = rows["accuracy_kept"]
            shown |= {
                "accuracy before fine-tuning": _percent(rows["accuracy_before"]),
                "accuracy": _percent(rows["accuracy_after"]),
                "accuracy on the rows kept": "none kept" if kept is None else _percent(kept),
                "area under the risk-coverage curve": f"{rows['aurc']:.3g}",
            }
        return [["measure", "value"], *([name, value] for name, value in shown.items())]

    def _by_class(self) -> _Section:
        lowest = list(self.classes.items())[:MOST_CLASSES]
        few = f", the {len(lowest)} lowest of {len(self.classes):,}"
        return _Section(
            "Share kept by true class" + few * (len(lowest) < len(self.classes)),
            table=[
                ["class", "rows", "kept"],
                *(
                    [str(label), f"{each['rows']:,}", _share(each, "kept")]
                    for label, each in lowest
                ),
            ],
            pictures=(BY_CLASS, BY_COVERAGE),
        )

    def _by_set(self) -> _Section:
        fpr = next(name for name in next(iter(self.outliers.values())) if name.startswith("fpr"))
        return _Section(
            "Outliers, the worst set first",
            [
                "rejected: the share that the detector's own threshold rejects.",
                f"{fpr.upper()}: the share kept by a threshold that keeps "
                f"{_target(self.detector['tpr'])} of these in-distribution rows.",
                "AUROC: the chance that an in-distribution row scores higher than an outlier.",
            ],
            [
                ["set", "rows", "rejected", fpr.upper(), "AUROC"],
                *(
                    [
                        str(name),
                        f"{each['rows']:,}",
                        _share(each, "rejected"),
                        _percent(each[fpr]),
                        _percent(each["auroc"]),
                    ]
                    for name, each in self.outliers.items()
                ),
            ],
            (BY_SCORE, BY_THRESHOLD),
        )

    def _picture(self, caption: str) -> Display:
        """The picture under a caption, not drawn yet."""
        kept, sets = self.scores["id"] >= 0, {"score_id": self.scores["id"]}
        if caption == BY_CLASS:
            target = self.detector["tpr"]
            return ClassCoverageDisplay(y_true=self.scores["y_true"], kept=kept, target=target)
        if caption == BY_COVERAGE:
            correct = self.scores["correct"]
            return RiskCoverageDisplay(scores=self.scores["id"], correct=correct, threshold=0)
        sets["score_ood"] = {name: self.scores["ood"][name] for name in self.outliers}
        if caption == BY_SCORE:
            return ScoreDistributionDisplay(**sets, threshold=0, score_name="score minus threshold")
        return DetectionRocDisplay(**sets, threshold=0)


def report(
    detector: Any,
    X_id: Any,
    y_id: ArrayLike | None = None,
    X_ood: Any = None,
) -> DetectorReport:
    """Report on a fitted detector: what it is, what it keeps and rejects, what it cannot promise.

    Parameters
    ----------
    detector : estimator
        A fitted `SparseEnergyOODDetector`, or a pipeline, a search or a `RejectingClassifier`
        around one.
    X_id : array-like of shape (n_id, ...)
        In-distribution (ID) rows that it was neither trained nor calibrated on.
    y_id : array-like of shape (n_id,), default=None
        True classes. None takes those of `X_id`, if it is a data set with labels. Without any, the
        report says nothing about accuracy and single classes.
    X_ood : array-like of shape (n_ood, ...), or dict of str to array-like, default=None
        Out-of-distribution (OOD) rows of one set, or of several by name: the kinds that are to be
        rejected. Take rows that played no part in the choice of the detector.

    Returns
    -------
    DetectorReport
        The report: ``print`` it, or ``save`` it to a file.

    Raises
    ------
    TypeError
        If `detector` holds no detector.
    ValueError
        If rows do not look like those of `fit`, `y_id` has labels of no class, or `X_ood` is an
        empty dict.

    Warns
    -----
    SeenRowsWarning
        If `X_id` are probably the calibration rows.
    ThresholdWarning
        If the threshold of ``fit`` is doubtful; ``calibrate`` clears that.

    Notes
    -----
    Each set is scored in one pass. If there are labels and the network was fine-tuned, `X_id`
    passes through the network before fine-tuning, too.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from skood import SparseEnergyOODDetector
    >>> from skood.reporting import report
    >>> X, y = load_digits(return_X_y=True)
    >>> detector = SparseEnergyOODDetector(random_state=0).fit(X[:1000], y[:1000])
    >>> detector = detector.calibrate(X[1000:1400])
    >>> noise = np.random.default_rng(0).uniform(0, 16, size=(200, 64))
    >>> signed_off = report(detector, X[1400:], y[1400:], {"noise": noise})
    >>> bool(signed_off.outliers["noise"]["rejected"] > 0.5)
    True
    >>> print(signed_off)
    # Detector report
    ...
    """
    fitted = fitted_detector(detector, "detector")
    sets = {} if X_ood is None else sets_by_name(X_ood, "X_ood")
    X_id = seen_by_last_step(detector, X_id)
    labels = _labels(fitted, X_id, y_id)
    of_id = judged(fitted, X_id)
    of_sets = {name: judged(detector, rows).margins for name, rows in sets.items()}
    scores: dict[str, Any] = {"id": of_id.margins, "ood": of_sets}
    if labels is not None:
        scores |= {"y_true": labels, "correct": of_id.classes == labels}
    return DetectorReport(
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        detector=_described(fitted, X_id),
        in_distribution=_in_distribution(fitted, X_id, of_id, labels),
        classes={} if labels is None else _of_classes(labels, of_id.kept),
        outliers=_of_sets(of_id.margins, of_sets, fitted.tpr_),
        limits=_limits(fitted, sets),
        versions=version_lines(),
        scores=scores,
    )


def _labels(detector: SparseEnergyOODDetector, X: Any, y: ArrayLike | None) -> NDArray[Any] | None:
    """True classes of the rows, given or brought along; None if there are none."""
    rows = detector._rows(X)
    y = rows.labels(n_workers(detector)) if y is None else y
    if y is None:
        return None
    labels = labels_named(y, "y_id", len(rows))
    known_labels(labels, detector, "y_id", outliers=False)
    return labels


def _described(detector: SparseEnergyOODDetector, X: Any) -> dict[str, Any]:
    score, penalty = detector.score_function_, detector.penalty
    epochs = [record for record in detector.history_ if record["phase"] == "fine-tune"]
    # What an earlier version has saved lacks the rate of its epochs.
    rate = epochs[-1].get("learning_rate", detector.learning_rate) if epochs else None
    names: dict[Any, str] = {kind: name for name, kind in SCORES.items()}
    offsets = detector.class_offsets_
    own = ", built by skood" if detector.module is None else ""
    return {
        "network": type(detector.module_).__name__ + own,
        "parameters": sum(each.numel() for each in detector.module_.parameters()),
        "features": _n_features(detector, X),
        "classes": len(detector.classes_),
        "score": names.get(type(score), _name(score)),
        "penalty": penalty if isinstance(penalty, str) else _name(penalty),
        "sparsity_weight": detector.sparsity_weight_,
        "epochs": len(epochs),
        "learning_rate": rate,
        "tpr": detector.tpr_,
        "threshold": detector.offset_ if offsets is None else offsets.tolist(),
        "calibration_rows": len(detector.calibration_scores_),
        "doubts": [message for message, _ in detector._doubts.notices],
    }


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _n_features(detector: SparseEnergyOODDetector, X: Any) -> int | None:
    if detector.head_ is None:
        return None
    first = detector._rows(X).pick(np.arange(1))
    ((_, seen),) = forward_rows(detector._network, first, features=True)
    return None if seen.features is None else seen.features.shape[1]


def _in_distribution(
    detector: SparseEnergyOODDetector, X: Any, of_rows: Judgement, labels: NDArray[Any] | None
) -> dict[str, Any]:
    kept = of_rows.kept
    check = _check_new_scores(of_rows.scores, ~kept, detector, FALSE_ALARM)
    found = _counted(Share.of(kept), "kept") | {"verdict": check.verdict}
    if labels is not None:
        correct = of_rows.classes == labels
        before = detector._classes_before(detector._rows(X), of_rows.classes)
        found["accuracy_before"] = float(np.mean(before == labels))
        found["accuracy_after"] = float(correct.mean())
        found["accuracy_kept"] = float(correct[kept].mean()) if kept.any() else None
        found["aurc"] = aurc(of_rows.margins, correct)
    return found


def _of_classes(labels: NDArray[Any], kept: NDArray[np.bool_]) -> dict[Any, dict[str, Any]]:
    found = {
        label: _counted(share, "kept") for label, share in shares_by_class(labels, kept).items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["kept"]))


def _of_sets(
    margins: NDArray[np.float64], sets: Mapping[str, NDArray[np.float64]], tpr: float
) -> dict[str, dict[str, Any]]:
    found = {
        name: _counted(Share.of(of_set < 0), "rejected")
        | detection_report(margins, of_set, tpr=tpr).rows["ood"]
        for name, of_set in sets.items()
    }
    # The first of the metrics is the FPR.
    fpr = METRICS[0].name_at(tpr)
    return dict(sorted(found.items(), key=lambda item: (-item[1][fpr], item[1]["auroc"])))


def _counted(share: Share, name: str) -> dict[str, Any]:
    low, high = share.interval
    return {"rows": share.n_rows, name: share.value, f"{name}_low": low, f"{name}_high": high}


def _limits(detector: SparseEnergyOODDetector, sets: Mapping[str, Any]) -> list[str]:
    """What no test of a detector shows, in plain sentences."""
    n_rows, tpr = len(detector.calibration_scores_), detector.tpr_
    kept = min(tpr, n_rows / (n_rows + 1))  # by the smallest score, if rows are too few for tpr
    share = _target(tpr) if kept == tpr else _percent(kept)
    promise = (
        f"The threshold keeps {share} of in-distribution rows on average over draws of calibration "
        "rows"
    )
    if detector.class_offsets_ is None:
        rank = max(calibration_rank(n_rows, tpr), 1)
        tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
        low, high = stats.beta.ppf(tails, n_rows + 1 - rank, rank)
        promise += (
            f". One draw keeps more or less: of {n_rows:,} calibration rows, {_percent(low)} to "
            f"{_percent(high)} in 95 of 100 cases"
        )
        classes = (
            "No share is promised for a single class; calibrate(X, per_class=True) places a "
            "threshold for each predicted class."
        )
    else:
        winners = cast(NDArray[np.int64], detector._calibration_classes)
        has_own = _has_threshold(winners, len(detector.classes_), tpr)
        if has_own.all():
            promise += ", in each predicted class"
            classes = (
                "Each predicted class has its threshold; no share is promised for a true class."
            )
        else:
            promise += f", in each of {has_own.sum()} predicted classes" if has_own.any() else ""
            classes = (
                f"{np.sum(~has_own)} of {len(has_own)} predicted classes have too few calibration "
                "rows for a threshold of their own, and share one. No share is promised for a true "
                "class."
            )
    outliers = (
        f"The shares of outliers hold for sets like the {len(sets)} tried. Others may be kept more "
        "often, above all those that look like a class."
        if sets
        else "No outliers were tried, so nothing is known about which ones it rejects."
    )
    return [
        f"{promise}.",
        "This holds for rows drawn like the calibration rows, and ends when the data change. "
        "skood.monitoring.DriftMonitor raises an alarm then.",
        classes,
        outliers,
        "A row that is kept may still get the wrong class.",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _target(share: float) -> str:
    return f"{100 * share:.4g} %"


def _share(found: Mapping[str, Any], name: str) -> str:
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{_percent(found[name])} ({100 * low:.1f} to {100 * high:.1f})"


def _threshold(offsets: float | list[float]) -> str:
    if isinstance(offsets, list):
        return f"{len(offsets):,}, one a predicted class: {min(offsets):.4g} to {max(offsets):.4g}"
    return f"{offsets:.6g}"


def _markdown(text: str) -> str:
    """A text in which nothing is markup."""
    return re.sub(MARKUP, r"\\\g<0>", " ".join(text.split()))


def _html(text: str) -> str:
    """A text in which nothing is markup, and no number is parted from its unit."""
    return html.escape(text).replace(" %", "&nbsp;%")


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for kind, row in zip(["th", *["td"] * len(rows)], rows, strict=False):
        lines.append("<tr>" + "".join(f"<{kind}>{_html(cell)}</{kind}>" for cell in row) + "</tr>")
    return "\n".join(["<div><table>", *lines, "</table></div>"])
