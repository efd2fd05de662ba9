"""`report.json`, which ffl-export writes over a folder of bundles and the demo shows:
every variant of every target."""

from __future__ import annotations

import math

import msgspec

REPORT = "report.json"
PICTURE = "report.png"


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
    """`report.json`. refused: of the exports that the bundles come from; absent where nothing was."""

    rows: list[Artefact]
    limits: ArtefactLimits
    recommendation: Recommendation
    machine: str = ""
    refused: list[Refusal] | msgspec.UnsetType = msgspec.UNSET
