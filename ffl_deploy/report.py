"""`report.json`, which ffl-export writes over a folder of bundles and the demo shows:
every variant of every target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from ffl_deploy.statistics import Interval, median_interval

REPORT = "report.json"
PICTURE = "report.png"


SMALL = 0.1
"""An interval of a latency that is within this share of its median is small."""


class Timing(msgspec.Struct, frozen=True):
    """How long an artefact takes for one image, measured side by side with others.

    name: TARGET/VARIANT; sha256: of its file; windows_ms: the median call of each window, in ms. The k-th
    windows of all artefacts lie in the same round, so their ratios are paired.
    """

    name: str
    sha256: str
    windows_ms: list[float]
    p95_ms: float  # of all calls

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.windows_ms)

    @property
    def interval(self) -> Interval:
        """-> the 95 % interval of `p50_ms`, in ms."""
        return median_interval(self.windows_ms)

    @property
    def wide(self) -> bool:
        """-> whether the machine was too busy to tell it to within SMALL."""
        return is_wide(self.windows_ms)


def is_wide(windows_ms: Sequence[float]) -> bool:
    """-> whether the interval of these windows' median is wider than SMALL allows."""
    interval = median_interval(windows_ms)
    return interval.high - interval.low > SMALL * statistics.median(windows_ms)


def ratio_interval(slower: Sequence[float], faster: Sequence[float]) -> Interval:
    """-> the 95 % interval of how many times as long `slower` takes, of windows in the same rounds."""
    return median_interval([one / other for one, other in zip(slower, faster, strict=True)])


class Artefact(msgspec.Struct, frozen=True):
    """One artefact: a variant of a target. None where it was not measured here
    (an engine without its GPU)."""

    target: str
    variant: str
    runtime: str
    file: str
    bytes: int
    precision: str  # stored / computed
    parameters: int
    multiply_adds: int
    accuracy: float | None = None  # share of 1
    accuracy_low: float | None = None  # 95 % Wilson interval
    accuracy_high: float | None = None
    calibration_error: float | None = None
    parity: str = "not verified here"
    accuracy_gate: str = "not verified here"
    p50_ms: float | None = None
    p95_ms: float | None = None
    images_per_second: float | None = None
    best_batch: int | None = None
    pareto: bool = False
    images: int | None = None  # that the accuracy is of
    p50_low_ms: float | None = None  # 95 % interval, where it was timed side by side
    p50_high_ms: float | None = None
    deferred: float | msgspec.UnsetType = msgspec.UNSET  # of a cascade: share of the test images

    @property
    def name(self) -> str:
        return f"{self.target}/{self.variant}"

    @property
    def measured(self) -> bool:
        return self.accuracy is not None and self.p50_ms is not None


class ArtefactLimits(msgspec.Struct, frozen=True):
    """What an artefact has to keep: p50 latency of one image in ms, accuracy as a share of 1,
    size in bytes."""

    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    max_bytes: int | None = None

    def broken_by(self, row: Artefact) -> dict[str, float]:
        """-> limit in words -> by which share of it `row` breaks it; what was not measured keeps no limit."""
        broken = {}
        if self.max_latency_ms is not None and not (
            row.p50_ms is not None and row.p50_ms <= self.max_latency_ms
        ):
            broken[f"--max-latency-ms {self.max_latency_ms:g}"] = (
                row.p50_ms or math.inf
            ) / self.max_latency_ms - 1
        if self.min_accuracy is not None and not (
            row.accuracy is not None and row.accuracy >= self.min_accuracy
        ):
            broken[f"--min-accuracy {self.min_accuracy:g}"] = 1 - (row.accuracy or 0) / self.min_accuracy
        if self.max_bytes is not None and row.bytes > self.max_bytes:
            broken[f"--max-bytes {self.max_bytes}"] = row.bytes / self.max_bytes - 1
        return broken


class Recommendation(msgspec.Struct, frozen=True):
    """artefact: TARGET/VARIANT, or None where nothing keeps the limits; reason: one sentence.

    undecided: the artefacts, this one among them, that the test images cannot tell from the most accurate.
    """

    artefact: str | None
    reason: str
    undecided: list[str] = []


class Refusal(msgspec.Struct, frozen=True):
    """What was asked for and is in no bundle. variant: a precision, or a variant of it; reason: the metric,
    the limit and, where it was found, the layer."""

    target: str
    variant: str
    reason: str

    def __str__(self) -> str:
        return f"{self.target}/{self.variant}: {self.reason}"


class Report(msgspec.Struct, frozen=True):
    """`report.json`. refused: of the exports that the bundles come from; absent where nothing was.
    timings: side by side, of the files that could be run; absent where none was timed so."""

    rows: list[Artefact]
    limits: ArtefactLimits
    recommendation: Recommendation
    machine: str = ""
    refused: list[Refusal] | msgspec.UnsetType = msgspec.UNSET
    timings: list[Timing] | msgspec.UnsetType = msgspec.UNSET
