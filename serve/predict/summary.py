"""What a run ends with: counts and rates, as JSON beside the output and as one screen."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from ffl_deploy.command import printable
from ffl_deploy.errors import UsageError
from ffl_deploy.fastest import Choice
from ffl_deploy.files import write_json
from ffl_deploy.manifest import FileRecord
from serve.inputs.items import Skipped, displayed
from serve.pipeline import WorkSettings
from serve.predict.labelled import LabelCounts
from serve.predict.labelled_report import (
    LabelledNumbers,
    LabelledReport,
    drawing_path,
    make_report,
    report_path,
    report_screen,
    write_report,
)
from serve.predict.shards import PredictRequest, ShardRecord, ShardsManifest, shards_folder
from serve.rows import OK

SHOWN_LABELS = 10


class Histogram:
    """Durations in 1 % wide steps from 1 us to 3 h: percentiles of any number of values in 20 kB."""

    _STEP = 1.01
    _FIRST = 1e-6

    def __init__(self) -> None:
        self._counts = np.zeros(2400, np.int64)
        self.total = 0.0  # seconds

    def add(self, seconds: float) -> None:
        index = int(np.log(max(seconds, self._FIRST) / self._FIRST) / np.log(self._STEP))
        self._counts[min(index, len(self._counts) - 1)] += 1
        self.total += seconds

    def percentile(self, percent: float) -> float | None:
        """-> seconds, within 1 %; None where nothing was added."""
        count = int(self._counts.sum())
        if count == 0:
            return None
        index = int(np.searchsorted(np.cumsum(self._counts), max(1.0, percent / 100 * count)))
        return float(self._FIRST * self._STEP ** (index + 0.5))


@dataclass
class Totals:
    """Everything the summary counts; memory does not grow with the number of rows."""

    rows: int = 0
    resumed_rows: int = 0  # of them from shards that an earlier, interrupted run finished
    statuses: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    labelled: LabelCounts = field(default_factory=LabelCounts)
    inputs: dict[int, str] = field(default_factory=dict)  # shard -> hash of its inputs
    decode: Histogram = field(default_factory=Histogram)  # of an image, in its thread
    infer: Histogram = field(default_factory=Histogram)  # of a batch

    def add_record(self, index: int, record: ShardRecord, resumed: bool) -> None:
        self.rows += record.rows
        self.resumed_rows += record.rows if resumed else 0
        self.statuses.update(record.statuses)
        self.labels.update(record.labels)
        self.remarks.update(record.remarks)
        self.labelled.add(record.labelled)
        self.inputs[index] = record.inputs_sha256

    def add_timing(self, decode_seconds: Sequence[float], infer_seconds: Sequence[float]) -> None:
        """decode_seconds: of images; infer_seconds: of batches."""
        for seconds in decode_seconds:
            self.decode.add(seconds)
        for seconds in infer_seconds:
            self.infer.add(seconds)

    @property
    def shards(self) -> list[int]:
        """-> the numbers of the shards, in order: all of them, or those of a part."""
        return sorted(self.inputs)

    @property
    def errors(self) -> int:
        return self.rows - self.statuses[OK]


class Percentiles(msgspec.Struct, frozen=True):
    """In milliseconds; None where nothing was measured."""

    p50: float | None
    p95: float | None


class Summary(msgspec.Struct):
    """FILE.summary.json. Times are this session's; counts are the whole run's."""

    out: str
    rows: int
    ok: int
    errors: int
    resumed_rows: int
    seconds: float
    images_per_second: float | None
    decode_share: float | None  # of the time that threads spent working; 0..1, with `infer_share` 1
    infer_share: float | None
    decode_ms_per_image: Percentiles
    infer_ms_per_batch: Percentiles
    statuses: dict[str, int]
    labels: dict[str, int]  # of the first place, most frequent first
    remarks: dict[str, int]
    skipped: dict[str, int]  # what folders and archives held that is no input
    request: PredictRequest
    settings: WorkSettings
    # what `--resume` of the finished run looks at; absent from earlier versions' summaries
    output: FileRecord | msgspec.UnsetType = msgspec.UNSET
    inputs_sha256: str | msgspec.UnsetType = msgspec.UNSET
    # what --variant auto came to, if this session asked for it
    auto: Choice | msgspec.UnsetType = msgspec.UNSET
    labelled: LabelledNumbers | msgspec.UnsetType = msgspec.UNSET  # absent unless some inputs have a label


def summarize(
    totals: Totals, manifest: ShardsManifest, out: Path, skipped: Skipped, seconds: float
) -> Summary:
    """-> the summary of a run. seconds: of this session."""
    session_rows = totals.rows - totals.resumed_rows
    busy = totals.decode.total + totals.infer.total
    return Summary(
        out=displayed(str(out)),
        rows=totals.rows,
        ok=totals.statuses[OK],
        errors=totals.errors,
        resumed_rows=totals.resumed_rows,
        seconds=round(seconds, 3),
        images_per_second=round(session_rows / seconds, 2) if seconds > 0 else None,
        decode_share=round(totals.decode.total / busy, 4) if busy else None,
        infer_share=round(totals.infer.total / busy, 4) if busy else None,
        decode_ms_per_image=_percentiles(totals.decode),
        infer_ms_per_batch=_percentiles(totals.infer),
        statuses=dict(sorted(totals.statuses.items())),
        labels=dict(totals.labels.most_common()),
        remarks=dict(totals.remarks),
        skipped=dict(sorted(skipped.reasons.items())),
        request=manifest.request,
        settings=manifest.settings,
    )


def inputs_digest(shards: Iterable[str]) -> str:
    """-> one hash of those of all shards' inputs."""
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()


def summary_path(out: Path) -> Path:
    return out.with_name(out.name + ".summary.json")


def read_summary(out: Path) -> Summary | None:
    """-> the summary of the run that wrote `out`, if there is one."""
    try:
        return msgspec.json.decode(summary_path(out).read_bytes(), type=Summary)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def require_own_files(out: Path, *further: Path) -> None:
    """Raise UsageError where writing `out`, what stands beside it and these would replace a file that no run
    of ffl-predict is known to have written."""
    if shards_folder(out).exists() or read_summary(out) is not None:
        return
    for path in (out, summary_path(out), report_path(out), drawing_path(out), *further):
        if path.is_file() and path.stat().st_size:
            raise UsageError(
                f"{path} is there already, and no {summary_path(out).name} says that ffl-predict wrote it; "
                "choose another --out, or remove it."
            )


def write_summary(out: Path, summary: Summary) -> None:
    write_json(summary_path(out), summary)


def with_report(out: Path, summary: Summary, totals: Totals, classes: Sequence[str]) -> LabelledReport:
    """Write the report where inputs have labels, and what the summary repeats of it; -> the report."""
    report = make_report(totals.labelled, classes, min(summary.request.top_k, len(classes)))
    if report.labelled_rows:
        write_report(out, report, totals.labelled, classes)
    if report.labelled_rows or report.rows_with_unknown_label:
        summary.labelled = report.numbers()
    return report


def screen(summary: Summary, report: LabelledReport) -> str:
    """-> the summary, and of labelled inputs the report, as lines for people."""
    # how many, and how fast
    lines = [f"{summary.rows} rows in {summary.out}: {summary.ok} ok, {summary.errors} with an error"]
    if summary.resumed_rows:
        lines.append(f"  {summary.resumed_rows} of them were finished before this session")
    if summary.images_per_second is not None:
        lines.append(f"  {summary.images_per_second:g} images/s over {summary.seconds:g} s")
    if summary.decode_share is not None:
        decode, infer = summary.decode_ms_per_image, summary.infer_ms_per_batch
        lines.append(
            f"  decode {summary.decode_share:.0%} (an image p50 {decode.p50:g} ms, p95 {decode.p95:g} ms), "
            f"inference {summary.infer_share:.0%} (a batch p50 {infer.p50:g} ms, p95 {infer.p95:g} ms)"
        )

    # what the rows say, the most frequent first
    for title, counts in (
        ("errors", _without_ok(summary.statuses)),
        ("remarks", summary.remarks),
        ("labels", summary.labels),
    ):
        if counts:
            shown = [f"{name} {count}" for name, count in list(counts.items())[:SHOWN_LABELS]]
            more = f", and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
            lines.append(f"  {title}: {', '.join(shown)}{more}")
    if summary.skipped:
        lines.append(
            "  skipped, not inputs: " + ", ".join(f"{n} {reason}" for reason, n in summary.skipped.items())
        )
    lines = list(map(printable, lines))
    if summary.labelled is not msgspec.UNSET and (told := report_screen(report)):
        lines.append(told)
    return "\n".join(lines)


def _without_ok(statuses: dict[str, int]) -> dict[str, int]:
    return {status: count for status, count in statuses.items() if status != OK}


def _percentiles(times: Histogram) -> Percentiles:
    def milliseconds(percent: float) -> float | None:
        value = times.percentile(percent)
        return None if value is None else round(value * 1e3, 3)

    return Percentiles(milliseconds(50), milliseconds(95))
