"""What to ship: every target and variant of an export side by side, the Pareto front, and one recommendation.

Everything is read from the bundles' manifests, so a report can be written again, under other limits, without a new export.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.publish.cost import multiply_adds
from ffl_deploy.bundle import DEFAULT_VARIANT, MANIFEST, Bundle, Variant, load_bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import write_atomically, write_json

NEAR_BEST = 0.005
"""Accuracy that may be given up for speed: half a point, which the int8 gate also allows."""


class Row(msgspec.Struct, frozen=True):
    """One artefact: a variant of a target. None where it was not measured here (an engine without its GPU)."""

    target: str
    variant: str
    runtime: str
    file: str
    bytes: int
    precision: str  # stored / computed
    parameters: int
    multiply_adds: int
    accuracy: float | None
    accuracy_low: float | None  # 95 % Wilson interval
    accuracy_high: float | None
    calibration_error: float | None
    parity: str
    accuracy_gate: str
    p50_ms: float | None
    p95_ms: float | None
    images_per_second: float | None
    best_batch: int | None
    pareto: bool = False

    @property
    def name(self) -> str:
        return f"{self.target}/{self.variant}"

    @property
    def measured(self) -> bool:
        return self.accuracy is not None and self.p50_ms is not None


class Limits(msgspec.Struct, frozen=True):
    """What an artefact has to keep: p50 latency of one image in ms, accuracy as a share of 1, size in bytes."""

    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    max_bytes: int | None = None

    def broken_by(self, row: Row) -> dict[str, float]:
        """-> limit in words -> by which share of it `row` breaks it; what was not measured keeps no limit."""
        broken = {}
        if self.max_latency_ms is not None and not (row.p50_ms is not None and row.p50_ms <= self.max_latency_ms):
            broken[f"--max-latency-ms {self.max_latency_ms:g}"] = (row.p50_ms or math.inf) / self.max_latency_ms - 1
        if self.min_accuracy is not None and not (row.accuracy is not None and row.accuracy >= self.min_accuracy):
            broken[f"--min-accuracy {self.min_accuracy:g}"] = 1 - (row.accuracy or 0) / self.min_accuracy
        if self.max_bytes is not None and row.bytes > self.max_bytes:
            broken[f"--max-bytes {self.max_bytes}"] = row.bytes / self.max_bytes - 1
        return broken


class Recommendation(msgspec.Struct, frozen=True):
    """artefact: TARGET/VARIANT, or None where nothing keeps the limits; reason: one sentence."""

    artefact: str | None
    reason: str


class Report(msgspec.Struct, frozen=True):
    """`report.json`."""

    rows: list[Row]
    limits: Limits
    recommendation: Recommendation
    machine: str


def write_report(folder: Path, limits: Limits) -> Report:
    """Write `report.md`, `report.json` and `report.png` into `folder`, over the bundles inside it.

    Raises UsageError where there is no bundle. Nothing is raised where no artefact keeps the limits: see `require`.
    """
    bundles = [load_bundle(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not bundles:
        raise UsageError(f"{folder} holds no bundles to report on; export some first: ffl-export --target all --out {folder}")
    rows = mark_pareto([row for bundle in bundles for row in bundle_rows(bundle)])
    latencies = [variant.latency for bundle in bundles for variant in bundle.manifest.variants if variant.latency]
    machine = "; ".join(sorted({f"{latency['threads']} threads of {latency['machine']}" for latency in latencies}))
    report = Report(rows, limits, recommend(rows, limits), machine)
    write_json(folder / "report.json", report)
    write_atomically(folder / "report.md", markdown(report))
    from export.publish.plot import draw_report

    draw_report(report, folder / "report.png")
    return report


def require(report: Report) -> None:
    """Raises CheckError where no artefact keeps the limits that were given."""
    if report.recommendation.artefact is None:
        raise CheckError(report.recommendation.reason)


def bundle_rows(bundle: Bundle) -> list[Row]:
    """-> one Row per variant."""
    manifest = bundle.manifest
    cost = multiply_adds(bundle.checked_file(bundle.variant(DEFAULT_VARIANT).file))
    return [_row(manifest.target, manifest.source.parameters, cost, variant) for variant in manifest.variants]


def _row(target: str, parameters: int, cost: int, variant: Variant) -> Row:
    accuracy, latency, parity = variant.accuracy, variant.latency, variant.parity
    best = latency["best_batch"] if latency else None
    return Row(
        target=target,
        variant=variant.name,
        runtime=variant.runtime,
        file=variant.file,
        bytes=variant.bytes,
        precision=f"{variant.precision.stored} / {variant.precision.computed}",
        parameters=parameters,
        multiply_adds=cost,
        accuracy=accuracy["value"] if accuracy else None,
        accuracy_low=accuracy["interval"]["low"] if accuracy else None,
        accuracy_high=accuracy["interval"]["high"] if accuracy else None,
        calibration_error=accuracy["calibration_error"] if accuracy else None,
        parity=parity["verdict"]["status"] if parity else "not run here",
        accuracy_gate=(accuracy["verdict"]["note"] or accuracy["verdict"]["status"]) if accuracy else "not run here",
        p50_ms=latency["p50_ms"] if latency else None,
        p95_ms=latency["p95_ms"] if latency else None,
        images_per_second=latency["images_per_second"][str(best)] if latency else None,
        best_batch=best,
    )


def mark_pareto(rows: Sequence[Row]) -> list[Row]:
    """-> the rows, those marked than which no other is both faster (p50) and at least as accurate, or the reverse."""

    points = [(_latency(row), -_accuracy(row)) for row in rows if row.measured]  # smaller is better in both

    def dominated(row: Row) -> bool:
        own = (_latency(row), -_accuracy(row))
        return any(point != own and point[0] <= own[0] and point[1] <= own[1] for point in points)

    return [msgspec.structs.replace(row, pareto=row.measured and not dominated(row)) for row in rows]


def recommend(rows: Sequence[Row], limits: Limits) -> Recommendation:
    """-> the fastest artefact within half a point of the most accurate one that keeps the limits, and why."""
    measured = [row for row in rows if row.measured]
    fitting = [row for row in measured if not limits.broken_by(row)]
    if not measured:
        return Recommendation(None, "no artefact was measured on this machine, so none can be recommended.")
    if not fitting:
        nearest = min(measured, key=lambda row: sum(limits.broken_by(row).values()))
        return Recommendation(
            None,
            f"no artefact keeps the limits; {nearest.name} comes nearest ({_facts(nearest)}) and breaks "
            f"{' and '.join(limits.broken_by(nearest))}: relax that, or train another network.",
        )
    best = max(fitting, key=lambda row: (_accuracy(row), -_latency(row)))
    near = [row for row in fitting if _accuracy(row) >= _accuracy(best) - NEAR_BEST]
    chosen = min(near, key=lambda row: (_latency(row), -_accuracy(row), row.bytes))
    under = "of those that keep the limits" if limits != Limits() else "of all"
    if chosen == best:
        reason = f"{chosen.name} ({_facts(chosen)}) is the most accurate {under}, and none near it is faster{_caveat(chosen)}."
        return Recommendation(chosen.name, reason)
    faster, points = _latency(best) / _latency(chosen), 100 * (_accuracy(best) - _accuracy(chosen))
    return Recommendation(
        chosen.name,
        f"{chosen.name} ({_facts(chosen)}) is the fastest {under} within half a point of the most accurate, {best.name} "
        f"({_facts(best)}): {faster:.1f} times as fast for {points:.2f} points{_caveat(chosen)}.",
    )


def _caveat(row: Row) -> str:
    return f"; whether its accuracy held is {row.accuracy_gate}" if row.accuracy_gate.startswith("inconclusive") else ""


def _accuracy(row: Row) -> float:
    assert row.accuracy is not None
    return row.accuracy


def _latency(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def _facts(row: Row) -> str:
    return f"{100 * _accuracy(row):.2f} %, {_latency(row):.2f} ms, {row.bytes / 1e6:.2f} MB"


def markdown(report: Report) -> str:
    """-> report.md: the recommendation, then the table; `*` marks the Pareto front of accuracy and latency."""
    lines = [
        "# What to ship",
        "",
        f"{'Recommended' if report.recommendation.artefact else 'Nothing to recommend'}: {report.recommendation.reason}",
        "",
        "The default of every bundle stays its fp32 variant on ONNX Runtime; choose another with `--variant`.",
        "",
        "| target | variant (runtime) | precision stored / computed | parameters | multiply-adds | MB | accuracy (95 % interval) "
        "| ECE | parity | accuracy gate | p50 / p95 ms | images/s (batch) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_markdown_row(row) for row in report.rows),
        "",
        f"`*`: on the Pareto front of accuracy and batch-1 latency. Measured with {report.machine or 'nothing'}.",
        "",
        "A latency is one window of 0.3 s: on a shared machine two identical graphs can differ by a third, so time the "
        "candidates again, side by side, before a decision hangs on less. "
        "The recommendation looks at accuracy on the test split.",
        "",
        "![accuracy against latency](report.png)",
        "",
    ]
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    cells = [
        row.target,
        f"{row.variant} ({row.runtime}){' `*`' if row.pareto else ''}",
        row.precision,
        f"{row.parameters:,}",
        f"{row.multiply_adds / 1e6:.1f} M",
        f"{row.bytes / 1e6:.2f}",
        f"{100 * row.accuracy:.2f} % ({100 * (row.accuracy_low or 0):.2f} to {100 * (row.accuracy_high or 0):.2f})"
        if row.accuracy is not None
        else "-",
        f"{row.calibration_error:.4f}" if row.calibration_error is not None else "-",
        row.parity,
        row.accuracy_gate,
        f"{row.p50_ms:.2f} / {row.p95_ms:.2f}" if row.measured else "-",
        f"{row.images_per_second:.0f} ({row.best_batch})" if row.measured else "-",
    ]
    return f"| {' | '.join(cells)} |"
