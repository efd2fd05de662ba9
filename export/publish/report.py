"""What to ship: every target and variant of an export side by side, the Pareto front, and one recommendation.

Everything is read from the bundles' manifests, so a report can be written again, under other limits,
without a new export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.publish.cost import multiply_adds
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import write_atomically, write_json
from ffl_deploy.manifest import DEFAULT_VARIANT, MANIFEST, Variant
from ffl_deploy.markdown import NOT_MEASURED, fill, megabytes, percent, table, within
from ffl_deploy.report import PICTURE, REPORT, Limits, Recommendation, Report, Row

PAGE, BODY = (Path(__file__).with_name(name) for name in ("report.md", "report_body.md"))
COLUMNS = (
    "target",
    "variant (runtime)",
    "precision stored / computed",
    "parameters",
    "multiply-adds",
    "MB",
    "accuracy (95 % interval)",
    "ECE",
    "parity",
    "accuracy gate",
    "p50 / p95 ms",
    "images/s (batch)",
)
NEAR_BEST = 0.005
"""Accuracy that may be given up for speed: half a point, which the int8 gate also allows."""


def write_report(folder: Path, limits: Limits) -> Report:
    """Write `report.md`, `report.json` and `report.png` into `folder`, over the bundles inside it.

    Raises UsageError where there is no bundle. Nothing is raised where no artefact keeps the limits:
    see `require`.
    """
    bundles = [load_bundle(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not bundles:
        raise UsageError(
            f"{folder} holds no bundles to report on; export some first: ffl-export --target all --out "
            f"{folder}"
        )
    rows = mark_pareto([row for bundle in bundles for row in bundle_rows(bundle)])
    latencies = [
        variant.latency for bundle in bundles for variant in bundle.manifest.variants if variant.latency
    ]
    machine = "; ".join(sorted({latency.where for latency in latencies}))
    report = Report(rows, limits, recommend(rows, limits), machine)
    write_json(folder / REPORT, report)
    write_atomically(folder / "report.md", markdown(report))
    from export.publish.plot import draw_report

    draw_report(report, folder / PICTURE)
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
    return Row(
        target=target,
        variant=variant.name,
        runtime=variant.runtime,
        file=variant.file,
        bytes=variant.bytes,
        precision=f"{variant.precision.stored} / {variant.precision.computed}",
        parameters=parameters,
        multiply_adds=cost,
        accuracy=accuracy.value if accuracy else None,
        accuracy_low=accuracy.interval.low if accuracy else None,
        accuracy_high=accuracy.interval.high if accuracy else None,
        calibration_error=accuracy.calibration_error if accuracy else None,
        parity=parity.verdict.status if parity else "not verified here",
        accuracy_gate=accuracy.verdict.summary if accuracy else "not verified here",
        p50_ms=latency.p50_ms if latency else None,
        p95_ms=latency.p95_ms if latency else None,
        images_per_second=latency.best_images_per_second if latency else None,
        best_batch=latency.best_batch if latency else None,
    )


def mark_pareto(rows: Sequence[Row]) -> list[Row]:
    """-> the rows, those marked than which no other is both faster (p50) and at least as accurate,
    or the reverse."""

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
        reason = (
            f"{chosen.name} ({_facts(chosen)}) is the most accurate {under}, and none near it is "
            f"faster{_caveat(chosen)}."
        )
        return Recommendation(chosen.name, reason)
    faster, points = _latency(best) / _latency(chosen), 100 * (_accuracy(best) - _accuracy(chosen))
    return Recommendation(
        chosen.name,
        f"{chosen.name} ({_facts(chosen)}) is the fastest {under} within half a point of the most accurate, "
        f"{best.name} ({_facts(best)}): {faster:.1f} times as fast for {points:.2f} points{_caveat(chosen)}.",
    )


def _caveat(row: Row) -> str:
    return (
        f"; whether its accuracy held is {row.accuracy_gate}"
        if row.accuracy_gate.startswith("inconclusive")
        else ""
    )


def _accuracy(row: Row) -> float:
    assert row.accuracy is not None
    return row.accuracy


def _latency(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def _facts(row: Row) -> str:
    return f"{percent(_accuracy(row))}, {_latency(row):.2f} ms, {megabytes(row.bytes)} MB"


def markdown(report: Report) -> str:
    """-> report.md: the recommendation, the table, the picture."""
    return fill(PAGE, body=body(report).rstrip())


def body(report: Report) -> str:
    """-> the recommendation, then the table, in which `*` marks the Pareto front of accuracy and latency."""
    recommended = "Recommended" if report.recommendation.artefact else "Nothing to recommend"
    return fill(
        BODY,
        advice=f"{recommended}: {report.recommendation.reason}",
        artefacts=table(COLUMNS, map(_cells, report.rows)),
        machine=report.machine or "nothing",
    )


def _cells(row: Row) -> list[str]:
    """-> the cells of an artefact, under COLUMNS; what was not measured is a dash."""
    interval = "" if row.accuracy is None else f" ({within(row.accuracy_low, row.accuracy_high)})"
    return [
        row.target,
        f"{row.variant} ({row.runtime}){' `*`' if row.pareto else ''}",
        row.precision,
        f"{row.parameters:,}",
        f"{row.multiply_adds / 1e6:.1f} M",
        megabytes(row.bytes),
        percent(row.accuracy) + interval,
        NOT_MEASURED if row.calibration_error is None else f"{row.calibration_error:.4f}",
        row.parity,
        row.accuracy_gate,
        f"{row.p50_ms:.2f} / {row.p95_ms:.2f}" if row.measured else NOT_MEASURED,
        f"{row.images_per_second:.0f} ({row.best_batch})" if row.measured else NOT_MEASURED,
    ]
