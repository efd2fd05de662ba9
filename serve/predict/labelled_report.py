"""The report of a labelled run: accuracy, a table of the classes, the confusion matrix, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ffl_deploy.files import write_atomically
from serve.predict.labelled import BINS, LabelCounts

TICKS = 40  # classes whose names still fit beside the matrix


def make_report(counts: LabelCounts, classes: Sequence[str], top_k: int) -> dict[str, Any]:
    """-> the report as plain data.

    `accuracy` is over the labelled rows that have a prediction, `accuracy_all` counts rows without one as wrong.
    `expected_calibration_error` is the mean |accuracy - confidence| of 15 equal bins, weighted by rows (Guo et al. 2017).
    """
    matrix = confusion_matrix(counts, classes)
    hits, true, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows, failed = int(matrix.sum()), sum(counts.failed.values())
    bins = [
        {
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "rows": n,
            "confidence": confidence / n if n else None,
            "accuracy": correct / n if n else None,
        }
        for index, (n, confidence, correct) in enumerate(
            zip(counts.bin_rows, counts.bin_confidence, counts.bin_correct, strict=True)
        )
    ]
    gap = sum(abs(correct - sum_) for correct, sum_ in zip(counts.bin_correct, counts.bin_confidence, strict=True))
    return {
        "labelled_rows": rows + failed,
        "rows_without_prediction": failed,
        "rows_with_unknown_label": counts.unknown,
        "accuracy": _ratio(hits.sum(), rows),
        "accuracy_all": _ratio(hits.sum(), rows + failed),
        "top_k": top_k,
        "top_k_accuracy": _ratio(counts.top_k, rows),
        "expected_calibration_error": _ratio(gap, rows),
        "mean_confidence": _ratio(sum(counts.bin_confidence), rows),
        "classes": [
            {
                "class": name,
                "rows": int(true[i]),
                "without_prediction": counts.failed.get(name, 0),
                "recall": _ratio(hits[i], true[i]),
                "precision": _ratio(hits[i], predicted[i]),
                "f1": _ratio(2 * hits[i], true[i] + predicted[i]),
            }
            for i, name in enumerate(classes)
        ],
        "confusion": counts.confusion,
        "calibration": bins,
    }


def confusion_matrix(counts: LabelCounts, classes: Sequence[str]) -> np.ndarray:
    """-> int64 [true class, predicted class]."""
    index = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for true, row in counts.confusion.items():
        for predicted, n in row.items():
            matrix[index[true], index[predicted]] += n
    return matrix


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def write_report(out: Path, report: dict[str, Any], counts: LabelCounts, classes: Sequence[str]) -> None:
    """Write FILE.report.json and, where matplotlib is installed, FILE.report.png."""
    write_atomically(report_path(out), msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if report["accuracy"] is None:  # nothing could be classified
        return
    try:
        image = plotted(report, confusion_matrix(counts, classes), classes)
    except ImportError:
        return  # the numbers are all in the JSON; ffl-deploy[predict] brings matplotlib
    write_atomically(report_path(out).with_suffix(".png"), image)


def plotted(report: dict[str, Any], matrix: np.ndarray, classes: Sequence[str]) -> bytes:
    """-> a PNG: the confusion matrix, each row divided by its sum, and the reliability diagram."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = FigureCanvasAgg(figure).figure.subplots(1, 2)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = left.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(shown, ax=left, label="share of the true class's rows")
    left.set(xlabel="predicted", ylabel="true", title=f"Confusion, accuracy {report['accuracy']:.2%}")
    if len(classes) <= TICKS:
        left.set_xticks(range(len(classes)), classes, rotation=90)
        left.set_yticks(range(len(classes)), classes)
    bins = [b for b in report["calibration"] if b["rows"]]
    right.plot([0, 1], [0, 1], linestyle=":", color="gray", label="perfect")
    right.bar([b["from"] for b in bins], [b["accuracy"] for b in bins], width=1 / BINS, align="edge", alpha=0.5, edgecolor="C0")
    right.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o", color="C1", label="mean confidence of a bin")
    error = report["expected_calibration_error"]
    right.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"Calibration, expected error {error:.3f}")
    right.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def report_screen(report: dict[str, Any]) -> str:
    """-> the report as some lines for people: the whole, and the classes that are worst."""
    if report["accuracy"] is None:
        return f"  labelled rows: {report['labelled_rows']}, none of them with a prediction"
    lines = [
        f"  accuracy {report['accuracy']:.2%} over {report['labelled_rows'] - report['rows_without_prediction']} labelled rows, "
        f"top-{report['top_k']} {report['top_k_accuracy']:.2%}, calibration error {report['expected_calibration_error']:.3f}"
    ]
    seen = sorted((c for c in report["classes"] if c["rows"]), key=lambda c: (c["recall"], c["class"]))
    lines.append("  lowest recall: " + ", ".join(f"{c['class']} {c['recall']:.1%} of {c['rows']}" for c in seen[:5]))
    if report["rows_with_unknown_label"]:
        lines.append(f"  {report['rows_with_unknown_label']} rows have a label that is no class of the bundle")
    return "\n".join(lines)
