"""What to ship: every target and variant of an export side by side, the Pareto front, and one recommendation.

Everything is read from the bundles' manifests, so a report can be written again, under other limits,
without a new export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from export.publish.cost import multiply_adds
from export.publish.undecided import behind
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import write_atomically, write_json
from ffl_deploy.manifest import DEFAULT_VARIANT, MANIFEST, AccuracyRecord, Variant
from ffl_deploy.markdown import NOT_MEASURED, fill, megabytes, percent, table, within
from ffl_deploy.report import PICTURE, REPORT, Artefact, ArtefactLimits, Recommendation, Refusal, Report
from ffl_deploy.statistics import Interval

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
EMPTY: Mapping[str, AccuracyRecord] = MappingProxyType({})
SAME_LATENCY = 1.1
"""Medians of windows on a shared machine differ by this much, run to run."""
NEAR_BEST = 0.005
"""Accuracy that may be given up for speed: half a point, which the int8 gate also allows."""


def write_report(folder: Path, limits: ArtefactLimits, refused: Sequence[Refusal] | None = None) -> Report:
    """Write `report.md`, `report.json` and `report.png` into `folder`, over the bundles inside it.

    refused: targets of this export that have no bundle; None takes those of the report that is there. What
    single variants were refused for is in the bundles. Raises UsageError where there is no bundle. Nothing is
    raised where no artefact keeps the limits: see `require`.
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
    records = {
        f"{bundle.manifest.target}/{variant.name}": variant.accuracy
        for bundle in bundles
        for variant in bundle.manifest.variants
        if variant.accuracy
    }
    if refused is None:
        refused = refused_before(folder)
    listed = [refusal for bundle in bundles for refusal in refused_variants(bundle)]
    names = {bundle.manifest.target for bundle in bundles}
    listed += [refusal for refusal in refused if refusal.target not in names]
    report = Report(rows, limits, recommend(rows, limits, records), machine, listed or msgspec.UNSET)
    write_json(folder / REPORT, report)
    write_atomically(folder / "report.md", markdown(report))
    from export.publish.plot import draw_report

    draw_report(report, folder / PICTURE)
    return report


def refused_variants(bundle: Bundle) -> list[Refusal]:
    """-> the variants that were asked for and did not pass."""
    return [
        Refusal(bundle.manifest.target, variant.name, variant.reason)
        for variant in bundle.manifest.refused or []
    ]


def refused_before(folder: Path) -> list[Refusal]:
    """-> what the report in `folder` says was refused."""
    try:
        report = msgspec.json.decode((folder / REPORT).read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError):
        return []
    return report.refused or []


def require(report: Report) -> None:
    """Raises CheckError where no artefact keeps the limits that were given."""
    if report.recommendation.artefact is None:
        raise CheckError(report.recommendation.reason)


def bundle_rows(bundle: Bundle) -> list[Artefact]:
    """-> one Artefact per variant."""
    manifest = bundle.manifest
    cost = multiply_adds(bundle.checked_file(bundle.variant(DEFAULT_VARIANT).file))
    return [_row(manifest.target, manifest.source.parameters, cost, variant) for variant in manifest.variants]


def _row(target: str, parameters: int, cost: int, variant: Variant) -> Artefact:
    accuracy, latency, parity = variant.accuracy, variant.latency, variant.parity
    return Artefact(
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
        images=accuracy.n if accuracy else None,
    )


def mark_pareto(rows: Sequence[Artefact]) -> list[Artefact]:
    """-> the rows, those marked than which no other is both faster (p50) and at least as accurate,
    or the reverse."""

    points = [(_latency(row), -_accuracy(row)) for row in rows if row.measured]  # smaller is better in both

    def dominated(row: Artefact) -> bool:
        own = (_latency(row), -_accuracy(row))
        return any(point != own and point[0] <= own[0] and point[1] <= own[1] for point in points)

    return [msgspec.structs.replace(row, pareto=row.measured and not dominated(row)) for row in rows]


def recommend(
    rows: Sequence[Artefact], limits: ArtefactLimits, records: Mapping[str, AccuracyRecord] = EMPTY
) -> Recommendation:
    """-> what to ship of what keeps the limits, and why.

    The fastest of those whose accuracy is that of the most accurate: within half a point of it, or so near
    that the test images cannot tell them apart; of equally fast ones the smallest. records: Artefact.name ->
    accuracy, of the same images.
    """
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

    # the most accurate, and what may be taken in its place
    best = max(fitting, key=lambda row: (_accuracy(row), -_latency(row)))
    intervals = {row.name: behind(records.get(best.name), records.get(row.name)) for row in fitting}
    undecided = [row for row in fitting if (found := intervals[row.name]) is not None and found.low <= 0]
    near = [row for row in fitting if row in undecided or _accuracy(row) >= _accuracy(best) - NEAR_BEST]

    # the fastest of these; a tenth of a latency is noise, and then size decides
    fastest = min(map(_latency, near))
    chosen = min(
        (row for row in near if _latency(row) <= SAME_LATENCY * fastest),
        key=lambda row: (row.bytes, _latency(row), -_accuracy(row)),
    )
    reason = f"{chosen.name} ({_facts(chosen)}) {_why(chosen, best, limits, intervals[chosen.name])}"
    names = [row.name for row in undecided] if len(undecided) > 1 else []
    if names and best.images:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        reason += f"; {best.images:,} test images cannot tell {shown} apart, more of them would"
    return Recommendation(chosen.name, f"{reason}{_caveat(chosen)}.", names)


def _why(chosen: Artefact, best: Artefact, limits: ArtefactLimits, interval: Interval | None) -> str:
    """-> what makes `chosen` the one to ship, beside `best`, the most accurate."""
    under = "of those that keep the limits" if limits != ArtefactLimits() else "of all"
    if chosen == best:
        return f"is the most accurate {under}, and none near it is faster"
    points = 100 * (_accuracy(best) - _accuracy(chosen))
    times = _latency(best) / _latency(chosen)
    gain = (
        f"{times:.1f} times as fast"
        if times >= SAME_LATENCY
        else f"{best.bytes / chosen.bytes:.1f} times as small"
    )
    if points > 100 * NEAR_BEST and interval is not None:
        return (
            f"is the fastest {under} that the test images cannot tell from the most accurate, {best.name} "
            f"({_facts(best)}; {points:.1f} points more, 95 % interval {100 * interval.low:+.1f} to "
            f"{100 * interval.high:+.1f}), and {gain}"
        )
    return (
        f"is the fastest {under} within half a point of the most accurate, {best.name} ({_facts(best)}): "
        f"{gain} for {points:.2f} points"
    )


def _caveat(row: Artefact) -> str:
    return (
        f"; whether its accuracy held is {row.accuracy_gate}"
        if row.accuracy_gate.startswith("inconclusive")
        else ""
    )


def _accuracy(row: Artefact) -> float:
    assert row.accuracy is not None
    return row.accuracy


def _latency(row: Artefact) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def _facts(row: Artefact) -> str:
    return f"{percent(_accuracy(row))}, {_latency(row):.2f} ms, {megabytes(row.bytes)} MB"


def markdown(report: Report) -> str:
    """-> report.md: the recommendation, the table, the picture."""
    return fill(PAGE, body=body(report).rstrip())


def body(report: Report) -> str:
    """-> the recommendation, then the table, the most accurate first; `*` marks the Pareto front of accuracy
    and latency, `~` what the test images cannot tell from the most accurate."""
    recommended = "Recommended" if report.recommendation.artefact else "Nothing to recommend"
    return fill(
        BODY,
        advice=f"{recommended}: {report.recommendation.reason}",
        artefacts=table(COLUMNS, [_cells(row, report.recommendation) for row in best_first(report.rows)]),
        machine=report.machine or "nothing",
        refused=_refused(report.refused or []),
    )


def _refused(refused: Sequence[Refusal]) -> str:
    """-> the section that names what was asked for and is in no bundle; nothing where all passed."""
    if not refused:
        return ""
    lines = [f"- {one.target}/{one.variant}: {one.reason}" for one in refused]
    return "\n".join(
        ["## Refused", "", "Asked for, and in no bundle, since a gate did not hold:", "", *lines]
    )


def best_first(rows: Sequence[Artefact]) -> list[Artefact]:
    """-> the most accurate first; what was not measured comes last."""
    return sorted(rows, key=lambda row: (not row.measured, -(row.accuracy or 0), row.p50_ms or 0))


def _cells(row: Artefact, advice: Recommendation) -> list[str]:
    """-> the cells of an artefact, under COLUMNS; what was not measured is a dash."""
    marks = [
        " `*`" if row.pareto else "",
        " `~`" if row.name in advice.undecided else "",
        " **recommended**" if row.name == advice.artefact else "",
    ]
    interval = "" if row.accuracy is None else f" ({within(row.accuracy_low, row.accuracy_high)})"
    return [
        row.target,
        f"{row.variant} ({row.runtime}){''.join(marks)}",
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
