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
from ffl_deploy.report import (
    PICTURE,
    REPORT,
    SMALL,
    Artefact,
    ArtefactLimits,
    Recommendation,
    Refusal,
    Report,
    Timing,
    ratio_interval,
)
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
UNTIMED: Mapping[str, Timing] = MappingProxyType({})
SAME_LATENCY = 1.1
"""Medians of windows on a shared machine differ by this much, run to run."""
NEAR_BEST = 0.005
"""Accuracy that may be given up for speed: half a point, which the int8 gate also allows."""


def bundles_in(folder: Path) -> list[Bundle]:
    """-> the bundles that a report over `folder` is about. Raises UsageError where there is none."""
    bundles = [load_bundle(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not bundles:
        raise UsageError(
            f"{folder} holds no bundles to report on; export some first: ffl-export --target all --out "
            f"{folder}"
        )
    return bundles


def write_report(
    folder: Path,
    limits: ArtefactLimits,
    refused: Sequence[Refusal] | None = None,
    timings: Sequence[Timing] | None = None,
) -> Report:
    """Write `report.md`, `report.json` and `report.png` into `folder`, over the bundles inside it.

    refused: targets of this export that have no bundle; timings: of the files side by side. None takes those
    of the report that is there, where they are of the same files. What single variants were refused for is in
    the bundles. Raises UsageError where there is no bundle. Nothing is raised where no artefact keeps the
    limits: see `require`.
    """
    bundles = bundles_in(folder)
    before = report_before(folder)
    timed = {one.name: one for one in timings} if timings is not None else known_timings(folder, bundles)
    rows = [with_timing(row, timed) for bundle in bundles for row in bundle_rows(bundle)]
    rows = mark_pareto(rows)
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
        refused = before.refused or [] if before else []
    listed = [refusal for bundle in bundles for refusal in refused_variants(bundle)]
    names = {bundle.manifest.target for bundle in bundles}
    listed += [refusal for refusal in refused if refusal.target not in names]
    report = Report(
        rows,
        limits,
        recommend(rows, limits, records, timed),
        machine,
        listed or msgspec.UNSET,
        list(timed.values()) or msgspec.UNSET,
    )
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


def report_before(folder: Path) -> Report | None:
    """-> the report that lies in `folder`, None where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / REPORT).read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError):
        return None


def require(report: Report) -> None:
    """Raises CheckError where no artefact keeps the limits that were given."""
    if report.recommendation.artefact is None:
        raise CheckError(report.recommendation.reason)


def bundle_rows(bundle: Bundle) -> list[Artefact]:
    """-> one Artefact per variant."""
    manifest, path = bundle.manifest, bundle.checked_file(bundle.variant(DEFAULT_VARIANT).file)
    rows = []
    for variant in manifest.variants:
        cascade = variant.details.cascade
        cost = multiply_adds(path, cascade.deferred if cascade else 1.0)
        row = _row(manifest.target, manifest.source.parameters, cost, variant)
        if cascade:  # a median tells which exit most images leave by: the mean is what an image takes
            means = [one.cascade_ms for one in cascade.times if one.batch == 1]
            row = msgspec.structs.replace(
                row, p50_ms=means[0] if means else row.p50_ms, deferred=cascade.deferred
            )
        rows.append(row)
    return rows


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


def known_timings(folder: Path, bundles: Sequence[Bundle]) -> dict[str, Timing]:
    """-> Artefact.name -> what the report in `folder` says of the files that are in the bundles now."""
    before = report_before(folder)
    hashes = {
        f"{bundle.manifest.target}/{variant.name}": variant.sha256
        for bundle in bundles
        for variant in bundle.manifest.variants
    }
    known = before.timings or [] if before else []
    return {one.name: one for one in known if hashes.get(one.name) == one.sha256}


def with_timing(row: Artefact, timed: Mapping[str, Timing]) -> Artefact:
    """-> the row with the latency that was measured side by side, where there is one."""
    timing = timed.get(row.name)
    if timing is None or row.p50_ms is None:
        return row
    return msgspec.structs.replace(
        row,
        p50_ms=timing.p50_ms,
        p95_ms=timing.p95_ms,
        p50_low_ms=timing.interval.low,
        p50_high_ms=timing.interval.high,
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
    rows: Sequence[Artefact],
    limits: ArtefactLimits,
    records: Mapping[str, AccuracyRecord] = EMPTY,
    timed: Mapping[str, Timing] = UNTIMED,
) -> Recommendation:
    """-> what to ship of what keeps the limits, and why.

    The fastest of those whose accuracy is that of the most accurate: within half a point of it, or so near
    that the test images cannot tell them apart; of equally fast ones the smallest. records: Artefact.name ->
    accuracy, of the same images; timed: Artefact.name -> its windows, in the same rounds.
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
    fastest = min(near, key=_latency)
    chosen = min(
        (row for row in near if _as_fast(row, fastest, timed)),
        key=lambda row: (row.bytes, _latency(row), -_accuracy(row)),
    )
    reason = f"{chosen.name} ({_facts(chosen)}) {_why(chosen, best, limits, intervals[chosen.name])}"
    names = [row.name for row in undecided] if len(undecided) > 1 else []
    if names and best.images:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        reason += f"; {best.images:,} test images cannot tell {shown} apart, more of them would"
    return Recommendation(
        chosen.name, f"{reason}{_caveat(chosen)}{_unsteady(near, chosen, limits, timed)}.", names
    )


def _as_fast(row: Artefact, fastest: Artefact, timed: Mapping[str, Timing]) -> bool:
    """-> whether `row` is no slower than noise: a tenth, or what the rounds cannot tell from a tenth."""
    if row.name in timed and fastest.name in timed:
        return ratio_interval(timed[row.name].windows_ms, timed[fastest.name].windows_ms).low <= SAME_LATENCY
    return _latency(row) <= SAME_LATENCY * _latency(fastest)


def _unsteady(
    rows: Sequence[Artefact], chosen: Artefact, limits: ArtefactLimits, timed: Mapping[str, Timing]
) -> str:
    """-> that a latency is not known well which the choice among `rows` hangs on: by a limit, or since the
    rounds cannot tell another of them from `chosen`."""

    def open_question(row: Artefact) -> bool:
        if limits.max_latency_ms is not None or row == chosen:
            return limits.max_latency_ms is not None
        ratio = ratio_interval(timed[row.name].windows_ms, timed[chosen.name].windows_ms)
        return ratio.low < 1 < ratio.high

    known = [row for row in rows if row.name in timed and chosen.name in timed]
    wide = [timed[row.name] for row in known if timed[row.name].wide and open_question(row)]
    if not wide:
        return ""
    worst = max(wide, key=lambda one: (one.interval.high - one.interval.low) / one.p50_ms)
    return (
        f"; this machine was too busy to time them well ({worst.name} took {worst.interval.low:.2f} to "
        f"{worst.interval.high:.2f} ms), so export again on a quiet one where speed decides"
    )


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
        latency=" ".join(filter(None, [_how_timed(report.timings or []), _of_cascades(report.rows)])),
        refused=_refused(report.refused or []),
    )


def _how_timed(timings: Sequence[Timing]) -> str:
    """-> what the latencies are worth."""
    if not timings:
        return (
            "A latency is one window of 0.3 s: on a shared machine two identical graphs can differ by a "
            "third, so time the candidates again, side by side, before a decision hangs on less."
        )
    wide = [one.name for one in timings if one.wide]
    rounds = len(timings[0].windows_ms)
    reached = (
        f"to within {100 * SMALL:.0f} %"
        if not wide
        else f"and wider than {100 * SMALL:.0f} % of it for {', '.join(wide)}: this machine was busy"
    )
    return (
        f"A latency is the median of {rounds} windows, the files in turns, with its 95 % interval, {reached}."
        " The throughputs are one window of 0.3 s each."
    )


def _of_cascades(rows: Sequence[Artefact]) -> str:
    """-> what is meant by the numbers of a cascade; nothing where there is none."""
    named = [f"{row.name} {percent(row.deferred)}" for row in rows if isinstance(row.deferred, float)]
    if not named:
        return ""
    return (
        "Latency and multiply-adds of a cascade are those of an image on average, at the share of the test "
        f"images that it deferred ({', '.join(named)})."
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
        _latencies(row),
        f"{row.images_per_second:.0f} ({row.best_batch})" if row.measured else NOT_MEASURED,
    ]


def _latencies(row: Artefact) -> str:
    """-> p50, with its interval where there is one, and p95, in ms."""
    if not row.measured:
        return NOT_MEASURED
    low, high = row.p50_low_ms, row.p50_high_ms
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{row.p50_ms:.2f}{interval} / {row.p95_ms:.2f}"
