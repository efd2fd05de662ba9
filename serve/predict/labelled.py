"""Runs over labelled images: what to count while rows pass, and the report made of the counts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import msgspec

from serve.rows import OK, Row

BINS = 15  # of confidence, as in Guo et al. 2017 (arXiv:1706.04599)


class LabelCounts(msgspec.Struct):
    """Additive counts over labelled rows; sums of shards are the counts of the run."""

    confusion: dict[str, dict[str, int]] = {}  # true class -> predicted class -> rows
    failed: dict[str, int] = {}  # true class -> rows without a prediction
    top_k: int = 0  # rows whose true class is among the top k
    unknown: int = 0  # rows whose label is no class of the bundle
    bin_rows: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    bin_confidence: list[float] = msgspec.field(default_factory=lambda: [0.0] * BINS)  # sums
    bin_correct: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)

    def add(self, other: LabelCounts) -> None:
        for true, row in other.confusion.items():
            self.confusion[true] = dict(Counter(self.confusion.get(true, {})) + Counter(row))
        self.failed = dict(Counter(self.failed) + Counter(other.failed))
        self.top_k += other.top_k
        self.unknown += other.unknown
        self.bin_rows = [a + b for a, b in zip(self.bin_rows, other.bin_rows, strict=True)]
        self.bin_confidence = [a + b for a, b in zip(self.bin_confidence, other.bin_confidence, strict=True)]
        self.bin_correct = [a + b for a, b in zip(self.bin_correct, other.bin_correct, strict=True)]

    @property
    def predicted(self) -> int:
        return sum(self.bin_rows)


def count_labels(rows: Sequence[Row], labels: Sequence[str | None], classes: Sequence[str]) -> LabelCounts:
    """-> counts over the rows that have a label. A label is a class name,
    or a class number where no class is called so."""
    known = set(classes)
    counts = LabelCounts()
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    failed: Counter[str] = Counter()
    for row, label in zip(rows, labels, strict=True):
        if label is None:
            continue
        true = label if label in known else _by_number(label, classes)
        if true is None:
            counts.unknown += 1
        elif row.status != OK or row.label is None or row.confidence is None:
            failed[true] += 1
        else:
            correct = row.label == true
            confusion[true][row.label] += 1
            counts.top_k += true in (row.top_k_labels or ())
            # (k/BINS, (k+1)/BINS], as the manifest's calibration error has them
            index = min(max(math.ceil(row.confidence * BINS) - 1, 0), BINS - 1)
            counts.bin_rows[index] += 1
            counts.bin_confidence[index] += row.confidence
            counts.bin_correct[index] += correct
    counts.confusion = {true: dict(row) for true, row in confusion.items()}
    counts.failed = dict(failed)
    return counts


def _by_number(label: str, classes: Sequence[str]) -> str | None:
    # Nine digits are more than any number of classes, and int() refuses some thousands of them.
    return (
        classes[int(label)] if label.isdecimal() and len(label) < 10 and int(label) < len(classes) else None
    )
