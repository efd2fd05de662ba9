"""The report of a labelled run: accuracy, a table of the classes, the confusion matrix, calibration."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from ffl_deploy.command import printable
from ffl_deploy.files import write_atomically, write_json
from serve.predict.labelled import BINS, LabelCounts

TICKS = 40  # classes whose names still fit beside the matrix
NUMBERED = 12  # classes, up to which the confusion matrix shows its counts


class ClassNumbers(msgspec.Struct, frozen=True):
    """One class. None: a ratio without anything to divide by."""

    name: str = msgspec.field(name="class")
    rows: int  # with this true class and a prediction
    without_prediction: int
    recall: float | None
    precision: float | None
    f1: float | None


class CalibrationBin(msgspec.Struct, frozen=True):
    """The rows whose confidence lies in [low, high)."""

    low: float = msgspec.field(name="from")
    high: float = msgspec.field(name="to")
    rows: int
    confidence: float | None  # mean
    accuracy: float | None


class LabelledNumbers(msgspec.Struct, frozen=True):
    """What the summary repeats of the report. Ratios are 0..1, None where there is nothing to divide by.

    `accuracy` is over the labelled rows that have a prediction, `accuracy_all` counts rows without one as
    wrong. `expected_calibration_error` is the mean |accuracy - confidence| of 15 equal bins, weighted by rows
    (Guo et al. 2017, arXiv:1706.04599).
    """

    labelled_rows: int
    rows_without_prediction: int
    rows_with_unknown_label: int
    accuracy: float | None
    accuracy_all: float | None
    top_k: int
    top_k_accuracy: float | None
    expected_calibration_error: float | None
    mean_confidence: float | None


class LabelledReport(LabelledNumbers, frozen=True):
    """FILE.report.json."""

    classes: list[ClassNumbers]
    confusion: dict[str, dict[str, int]]  # true class -> predicted class -> rows
    calibration: list[CalibrationBin]

    def numbers(self) -> LabelledNumbers:
        return LabelledNumbers(*(getattr(self, name) for name in LabelledNumbers.__struct_fields__))


def make_report(counts: LabelCounts, classes: Sequence[str], top_k: int) -> LabelledReport:
    """-> the report of a run's counts."""
    matrix = confusion_matrix(counts, classes)
    hits, true, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows, failed = int(matrix.sum()), sum(counts.failed.values())
    sums = list(zip(counts.bin_rows, counts.bin_confidence, counts.bin_correct, strict=True))
    return LabelledReport(
        # the whole
        labelled_rows=rows + failed,
        rows_without_prediction=failed,
        rows_with_unknown_label=counts.unknown,
        accuracy=_ratio(hits.sum(), rows),
        accuracy_all=_ratio(hits.sum(), rows + failed),
        top_k=top_k,
        top_k_accuracy=_ratio(counts.top_k, rows),
        expected_calibration_error=_ratio(
            sum(abs(correct - confidence) for _, confidence, correct in sums), rows
        ),
        mean_confidence=_ratio(sum(counts.bin_confidence), rows),
        # each class
        classes=[
            ClassNumbers(
                name=name,
                rows=int(true[i]),
                without_prediction=counts.failed.get(name, 0),
                recall=_ratio(hits[i], true[i]),
                precision=_ratio(hits[i], predicted[i]),
                f1=_ratio(2 * hits[i], true[i] + predicted[i]),
            )
            for i, name in enumerate(classes)
        ],
        confusion=counts.confusion,
        # each bin of confidence
        calibration=[
            CalibrationBin(
                low=index / BINS,
                high=(index + 1) / BINS,
                rows=n,
                confidence=confidence / n if n else None,
                accuracy=correct / n if n else None,
            )
            for index, (n, confidence, correct) in enumerate(sums)
        ],
    )


def confusion_matrix(counts: LabelCounts, classes: Sequence[str]) -> np.ndarray:
    """-> int64 [true class, predicted class]."""
    index = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for true, row in counts.confusion.items():
        for predicted, n in row.items():
            matrix[index[true], index[predicted]] += n
    return matrix


def _ratio(count: float, of: float) -> float | None:
    return float(count) / float(of) if of else None


def report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def drawing_path(out: Path) -> Path:
    return report_path(out).with_suffix(".png")


def write_report(out: Path, report: LabelledReport, counts: LabelCounts, classes: Sequence[str]) -> None:
    """Write FILE.report.json and, where matplotlib is installed, FILE.report.png."""
    write_json(report_path(out), report)
    if report.accuracy is None:  # nothing could be classified
        return
    try:
        image = plotted(report, confusion_matrix(counts, classes), classes)
    except ImportError:
        return  # the numbers are all in the JSON; ffl-deploy[predict] brings matplotlib
    write_atomically(drawing_path(out), image)


def plotted(report: LabelledReport, matrix: np.ndarray, classes: Sequence[str]) -> bytes:
    """-> a PNG: the confusion matrix, each row divided by its sum, and the reliability diagram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = FigureCanvasAgg(figure).figure.subplots(1, 2)

    # the confusion matrix
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = left.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(shown, ax=left, label="share of the true class's rows")
    left.set(xlabel="predicted", ylabel="true", title=f"Confusion, accuracy {report.accuracy:.2%}")
    if len(classes) <= TICKS:
        # a class's name is text, whatever dollar signs are in it
        left.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
        left.set_yticks(range(len(classes)), classes, parse_math=False)

    if len(classes) <= NUMBERED:  # few enough to read how many they are
        for (true, predicted), count in np.ndenumerate(matrix):
            shade = "white" if shares[true, predicted] > 0.5 else "black"
            left.text(predicted, true, f"{count:,}", ha="center", va="center", color=shade)

    # the reliability diagram
    bins = [b for b in report.calibration if b.rows]
    right.plot([0, 1], [0, 1], linestyle=":", color="gray", label="perfect")
    lows, accuracies = [b.low for b in bins], [b.accuracy for b in bins]
    right.bar(lows, accuracies, width=1 / BINS, align="edge", alpha=0.5, edgecolor="C0")
    confidences = [b.confidence for b in bins]
    right.plot(confidences, accuracies, "o", color="C1", label="mean confidence of a bin")
    title = f"Calibration, expected error {report.expected_calibration_error:.3f}"
    right.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=title)
    right.legend()

    image = io.BytesIO()
    with warnings.catch_warnings():  # of glyphs that no installed font has: the names are in the JSON
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def report_screen(report: LabelledReport) -> str:
    """-> the report as some lines for people: the whole, the classes that are worst, labels that are none."""
    unknown = []
    if report.rows_with_unknown_label:
        names = ", ".join(one.name for one in report.classes[:3])
        unknown.append(
            f"  {report.rows_with_unknown_label} rows have a label that is no class of the bundle "
            f"(its classes: {names}{', ...' if len(report.classes) > 3 else ''})"
        )
    if report.accuracy is None:
        found = f"  labelled rows: {report.labelled_rows}, none of them with a prediction"
        return "\n".join(map(printable, ([found] if report.labelled_rows else []) + unknown))
    predicted = report.labelled_rows - report.rows_without_prediction
    lines = [
        f"  accuracy {report.accuracy:.2%} over {predicted} labelled rows, "
        f"top-{report.top_k} {report.top_k_accuracy:.2%}, calibration error "
        f"{report.expected_calibration_error:.3f}"
    ]
    worst = sorted((c.recall, c.name, c.rows) for c in report.classes if c.recall is not None)[:5]
    lines.append(
        "  lowest recall: " + ", ".join(f"{name} {recall:.1%} of {rows}" for recall, name, rows in worst)
    )
    return "\n".join(map(printable, lines + unknown))
