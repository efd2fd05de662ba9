"""One prediction run: from what was asked to the finished file."""

from __future__ import annotations

import hashlib
import itertools
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import msgspec

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.errors import Interrupted, UsageError
from serve.items import Item
from serve.labelled import count_labels
from serve.pipeline import Chunk, Classifier, chunks, run_pipeline
from serve.progress import Progress, Report
from serve.rows import OK, Row, assemble, encode, format_of
from serve.shards import Parts, Request, Settings, ShardRecord, count, hash_names, open_parts, parts_folder
from serve.sources import Reading, check_inputs, count_inputs, read_inputs
from serve.summary import Totals, screen, summarise, summary_path, write_summary
from serve.tuning import SMALL_RUN, choose_settings


@dataclass(frozen=True)
class Job:
    """What ffl-predict was asked to do; the fields are its flags. None: decide by the bundle, the file name or a measurement."""

    bundle: str
    inputs: list[str]
    out: Path
    format: str | None = None
    variant: str | None = None
    runtime: str | None = None
    top_k: int = 5
    columns: list[str] = field(default_factory=list)  # of rows.OPTIONAL_COLUMNS
    column: str | None = None
    label_column: str | None = None
    follow_links: bool = False
    batch_size: int | None = None
    threads: int | None = None
    shard_size: int = 1024
    resume: bool = False
    engine: Literal["local", "ray"] = "local"
    report: Report = "screen"


def run_job(job: Job) -> int:
    """Run it and -> the number of rows with an error.

    Raises UsageError (nothing to classify, unusable flags), CheckError (bundle), Interrupted, OSError (disk).
    """
    bundle = load_bundle(job.bundle)
    request = make_request(job, bundle)
    if job.resume and not parts_folder(job.out).exists() and job.out.is_file():
        return _already_finished(job, request)
    reading = Reading(frozenset(bundle.classes), job.column, job.label_column, job.follow_links)
    check_inputs(job.inputs, reading)
    first, items = peek(read_inputs(job.inputs, reading), SMALL_RUN)
    if not first:
        found = f" (skipped: {reading.skipped})" if reading.skipped.reasons else ""
        raise UsageError(
            f"there is nothing to classify in {', '.join(job.inputs)}{found}; name image files or a folder that holds some."
        )
    started = time.perf_counter()

    def settings() -> Settings:
        return choose_settings(bundle, job, small=len(first) < SMALL_RUN and not first[-1].bound)

    with stop_signals(job.out), open_parts(job.out, request, settings, job.resume) as parts:
        totals = Totals()
        session = bundle.session(job.variant, job.runtime, threads=parts.manifest.settings.threads)
        classifier = Classifier(session, bundle.classes, job.top_k, job.columns)
        with Progress(job.report, lambda: count_inputs(job.inputs, reading)) as progress:
            shards = predict_shards(items, parts, classifier, bundle, totals, progress)
        assemble((parts.data_path(index) for index in range(shards)), job.out, request.format, job.columns)
        summary = summarise(totals, parts.manifest, job.out, reading.skipped, time.perf_counter() - started)
        write_summary(job.out, summary)
        parts.remove()
    show(job.report, summary)
    return totals.errors


def make_request(job: Job, bundle: Bundle) -> Request:
    """-> everything the output's bytes depend on but the settings. Raises UsageError for what the bundle cannot give."""
    variant = bundle.variant(job.variant)
    given = [output.name for output in bundle.manifest.outputs]
    for column in job.columns:
        if column not in given:
            raise UsageError(
                f"{bundle.folder} has no output {column!r} (it has {', '.join(given)}); "
                f"export the target with that output, or leave --{column} away."
            )
    return Request(
        bundle_sha256=bundle.sha256,
        variant=variant.name,
        runtime=job.runtime or variant.runtime,
        format=format_of(job.out, job.format),
        top_k=job.top_k,
        columns=job.columns,
        inputs=job.inputs,
        options={"column": job.column, "label_column": job.label_column, "follow_links": job.follow_links},
        toolchain={name: found for name in ("onnxruntime", "openvino", "pillow", "pyarrow") if (found := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _already_finished(job: Job, request: Request) -> int:
    """The output is there and no unfinished run is: say so, unless it came from another request."""
    try:
        before = msgspec.convert(msgspec.json.decode(summary_path(job.out).read_bytes())["request"], Request)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError):
        before = None  # no summary beside it: nothing to compare
    if before is not None and before != request:
        raise UsageError(
            f"{job.out} is complete, but from another command; leave --resume away to replace it, or choose another --out."
        )
    if job.report == "screen":
        print(f"{job.out} is already complete.")
    return 0


def peek(items: Iterator[Item], limit: int) -> tuple[list[Item], Iterator[Item]]:
    """-> (up to `limit` of the first items, an iterator over all of them). A bound item ends the look."""
    seen: list[Item] = []
    for item in items:
        seen.append(item.loaded() if item.bound else item)  # a bound one may not be readable later
        if item.bound or len(seen) == limit:
            break
    return seen, itertools.chain(seen, items)


def predict_shards(
    items: Iterator[Item], parts: Parts, classifier: Classifier, bundle: Bundle, totals: Totals, progress: Progress
) -> int:
    """Make every shard that is not finished yet; -> the number of shards."""
    settings = parts.manifest.settings
    shards = 0

    def work() -> Iterator[Chunk]:
        nonlocal shards
        for index, shard in enumerate(cut(items, settings.shard_size)):
            shards = index + 1
            record = parts.record(index)
            if record is None:
                yield from chunks(shard, index, settings.batch_size)
            else:
                check_unchanged(record, shard, parts, index)
                totals.add_record(record, resumed=True)
                progress.advance(record.rows, record.rows - record.statuses.get(OK, 0))

    rows: list[Row] = []
    labels: list[str | None] = []
    for finished in run_pipeline(
        work(),
        classifier,
        bundle.preprocessing,
        batch_size=settings.batch_size,
        decoders=settings.decoders,
        streams=settings.streams,
    ):
        rows += finished.rows
        labels += finished.labels
        totals.add_timing(finished)
        progress.advance(len(finished.rows), sum(row.status != OK for row in finished.rows))
        if finished.ends_shard:
            totals.add_record(commit(parts, finished.shard, rows, labels, bundle.classes), resumed=False)
            rows, labels = [], []
    return shards


def cut(items: Iterator[Item], size: int) -> Iterator[Iterator[Item]]:
    """-> consecutive runs of `size` items; each must be used up before the next is asked for."""
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))


def check_unchanged(record: ShardRecord, shard: Iterable[Item], parts: Parts, index: int) -> None:
    """Raise UsageError unless the shard's inputs are still the ones its rows were made from."""
    if hash_names(item.path for item in shard) != record.inputs_sha256:
        raise UsageError(
            f"the inputs changed since shard {index} of {parts.folder} was finished (a file was added, removed or renamed); "
            "bring them back to what they were, or remove that folder and start again."
        )


def commit(parts: Parts, index: int, rows: list[Row], labels: list[str | None], classes: list[str]) -> ShardRecord:
    """Write one shard; -> its record."""
    request = parts.manifest.request
    data = encode(rows, request.format, request.columns)
    record = ShardRecord(
        rows=len(rows),
        sha256=hashlib.sha256(data).hexdigest(),
        inputs_sha256=hash_names(row.path for row in rows),
        statuses=count(row.status for row in rows),
        labels=count(row.label for row in rows if row.label is not None),
        remarks=count(row.error for row in rows if row.status == OK and row.error),
        labelled=count_labels(rows, labels, classes),
    )
    parts.commit(index, data, record)
    return record


def show(report: Report, summary: dict[str, Any]) -> None:
    """Print the summary to standard output, in the form that was asked for."""
    if report == "json":
        print(msgspec.json.encode(summary).decode())
    elif report == "screen":
        print(screen(summary))


@contextmanager
def stop_signals(out: Path) -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise Interrupted: finished shards are safe, a resume makes the rest."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"interrupted; the finished part is in {parts_folder(out)}: the same command with --resume goes on.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
