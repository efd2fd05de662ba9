"""One prediction run: from what was asked to the finished file."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_files import AUTO
from ffl_deploy.decisions import Decisions
from ffl_deploy.errors import CheckError, DeviceLost, Interrupted, UsageError
from ffl_deploy.files import sha256_of
from ffl_deploy.manifest import FileRecord
from ffl_deploy.runtime import require_gpu_runtime, runtime_named
from ffl_deploy.runtime.gpu import identity as gpu_identity
from serve.inputs.items import Item, displayed
from serve.inputs.sources import Reading, check_inputs, count_inputs, is_pattern, matches, read_inputs
from serve.pipeline import WorkSettings
from serve.predict import local
from serve.predict.job import Job, PredictRun
from serve.predict.labelled_report import report_path
from serve.predict.part_file import part_path, write_part
from serve.predict.parts import Listing
from serve.predict.progress import Progress
from serve.predict.shards import (
    MANIFEST,
    InputsHasher,
    PredictRequest,
    ShardsFolder,
    open_shards,
    shards_folder,
)
from serve.predict.summary import (
    Totals,
    inputs_digest,
    read_summary,
    require_own_files,
    screen,
    summarize,
    summary_path,
    with_report,
    write_summary,
)
from serve.predict.tuning import SMALL_RUN, choose_settings
from serve.rows import OF_SETS, assemble, format_of, piece

if TYPE_CHECKING:
    from ffl_deploy.fastest import Choice


def run_job(job: Job) -> int:
    """Run it and -> the number of rows with an error.

    Raises UsageError (nothing to classify, unusable flags), CheckError (bundle), Interrupted, OSError (disk).
    """
    with remarks(job):
        return _run_job(job)


def _run_job(job: Job) -> int:
    # the bundle, and whether there is anything to do
    check_output(job)
    bundle = load_bundle(job.bundle, job.public_key)
    finished = job.resume and not shards_folder(job.out).exists() and job.out.is_file()
    reading = Reading(frozenset(bundle.classes), job.column, job.label_column, job.follow_links)
    if not finished:
        check_inputs(job.inputs, reading)
    choice = None
    if job.variant == AUTO and job.part is not None:
        raise UsageError("--variant auto may choose another variant on each machine; name one beside --part.")
    if job.variant == AUTO:
        job, choice = with_fastest(job, bundle)
    job = replace(job, columns=[*job.columns, *Decisions.of(bundle.variant(job.variant)).columns])
    request = make_request(job, bundle)
    check_gpu(job, request.runtime)
    if finished:
        return _already_finished(job, request, reading)

    # the inputs
    first, items = peek(read_inputs(job.inputs, reading), SMALL_RUN)
    if not first:
        found = f" (skipped: {reading.skipped})" if reading.skipped.reasons else ""
        raise UsageError(
            f"nothing to classify in {', '.join(job.inputs)}{found}; name image files or a folder that "
            "holds some."
        )
    started = time.perf_counter()

    # the shards that are not finished yet
    def settings() -> WorkSettings:
        return choose_settings(bundle, job, small=len(first) < SMALL_RUN and not first[-1].bound)

    resume = job.resume or job.recovery.restarted
    with (
        stop_signals(job.out),
        full_disks(job.out),
        kept_on_a_lost_gpu(job.out),
        open_shards(job.out, request, settings, resume) as shards,
    ):
        check_overrides(job, shards)
        totals = Totals()
        listing = Listing()
        with Progress(job.display, lambda: count_own(job, reading, shards)) as progress:
            run = PredictRun(job, bundle, shards, totals, progress)
            engine_of(job)(run, listing.passing(items) if job.part else items)

        # one file of all shards, what it amounts to, and only then the shards may go
        if job.out.exists():
            logging.getLogger("ffl_deploy").warning("%s was there already; its rows are replaced", job.out)
        pieces = (piece(shards.data_path(index), request.format) for index in totals.shards)
        assemble(pieces, job.out, request.format, job.columns)
        summary = summarize(totals, shards.manifest, job.out, reading.skipped, time.perf_counter() - started)
        summary.output = FileRecord(sha256_of(job.out), job.out.stat().st_size)
        summary.inputs_sha256 = inputs_digest(totals.inputs[index] for index in totals.shards)
        if choice is not None:
            summary.auto = choice
        report = with_report(job.out, summary, totals, bundle.classes)
        if job.part is not None:
            write_part(job.out, job.part, bundle.classes, shards, listing, summary)
        write_summary(job.out, summary)
        shards.remove()

    if job.display == "json":
        print(msgspec.json.encode(summary).decode())
    elif job.display == "screen":
        print(screen(summary, report))
    return totals.errors


@contextmanager
def remarks(job: Job) -> Iterator[None]:
    """Put what the packages below remark (an engine is being built) on standard error as the job's display
    has it: a line, an event among the events, nothing."""
    handler, log = logging.StreamHandler(), logging.getLogger("ffl_deploy")
    handler.setFormatter(Event() if job.display == "json" else logging.Formatter("ffl-predict: %(message)s"))
    before = log.propagate, log.level
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.ERROR if job.quiet else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate, log.level = before


class Event(logging.Formatter):
    """A remark as one of the JSON lines of --json."""

    def format(self, record: logging.LogRecord) -> str:
        return msgspec.json.encode({"event": "remark", "message": record.getMessage()}).decode()


def with_fastest(job: Job, bundle: Bundle) -> tuple[Job, Choice | None]:
    """-> the job with the variant and runtime that `auto` stands for, and how they were found;
    a resume keeps its run's."""
    earlier = _earlier_request(job.out) if job.resume or job.recovery.restarted else None
    if earlier is not None and earlier.bundle_sha256 == bundle.sha256:
        return replace(job, variant=earlier.variant, runtime=job.runtime or earlier.runtime), None
    choice = bundle.fastest(job.runtime, job.threads)
    if job.display == "json":
        event = {"event": "variant", "variant": choice.variant, "runtime": choice.runtime, "why": choice.why}
        print(msgspec.json.encode(event).decode(), file=sys.stderr)
    elif not job.quiet:
        print(f"ffl-predict: {choice.why}", file=sys.stderr)
    return replace(job, variant=choice.variant, runtime=choice.runtime), choice


def _earlier_request(out: Path) -> PredictRequest | None:
    """-> what the unfinished or the finished run of `out` was asked for, None where that cannot be read."""
    for path in (shards_folder(out) / MANIFEST, summary_path(out)):
        with suppress(
            OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, KeyError, TypeError
        ):
            return msgspec.convert(msgspec.json.decode(path.read_bytes())["request"], PredictRequest)
    return None


def count_own(job: Job, reading: Reading, shards: ShardsFolder) -> int | None:
    """-> how many rows there will be, None where only reading everything would tell."""
    total = count_inputs(job.inputs, reading)
    return None if total is None else job.own.items_of(total, shards.manifest.settings.shard_size)


def check_output(job: Job) -> None:
    """Raise UsageError where writing the output would replace an input, what is no file, or a file of the
    user's."""
    if job.out.exists() and not job.out.is_file():
        raise UsageError(
            f"{job.out} is a device or a pipe, which a file would replace; leave --out away to print the "
            "rows."
        )
    written = {
        os.path.realpath(path)
        for path in (job.out, summary_path(job.out), report_path(job.out), part_path(job.out))
        if path.exists()
    }
    for argument in job.inputs if written else ():
        if os.path.realpath(argument) in written or (
            is_pattern(argument) and written & set(map(os.path.realpath, matches(argument)))
        ):
            raise UsageError(f"--out {job.out} would replace an input ({argument}); choose another file.")
    require_own_files(job.out, *([part_path(job.out)] if job.part is not None else ()))


def check_gpu(job: Job, runtime: str) -> None:
    """Raise UsageError where --gpu names one that nothing would compute on."""
    if job.gpu is None:
        return
    require_gpu_runtime(runtime)
    if job.engine == "ray":
        raise UsageError(
            "--gpu is about this machine, and Ray gives each worker a GPU of its own; leave --gpu away, or "
            "--engine ray."
        )


def engine_of(job: Job) -> Callable[[PredictRun, Iterator[Item]], None]:
    """-> what makes the shards; Ray is imported only where it is asked for."""
    if job.engine == "ray":
        from serve.predict import ray_engine

        return ray_engine.predict_shards
    if job.gpu == "all":
        from serve.predict import gpus

        return gpus.predict_shards
    return local.predict_shards


def check_overrides(job: Job, shards: ShardsFolder) -> None:
    """Raise UsageError where a flag contradicts what the interrupted run was computed with."""
    settings = shards.manifest.settings
    stored = {
        "batch_size": settings.batch_size,
        "shard_size": settings.shard_size,
        "threads": settings.threads * settings.streams,
    }
    for name, value in stored.items():
        asked = getattr(job, name)
        if asked is not None and asked != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{shards.folder} was computed with {flag} {value}, not {asked}; leave {flag} away to "
                "resume it."
            )


def make_request(job: Job, bundle: Bundle) -> PredictRequest:
    """-> everything the output's bytes depend on but the settings.
    Raises UsageError for what the bundle cannot give."""
    variant = bundle.variant(job.variant)
    given = [output.name for output in bundle.manifest.outputs]
    for column in job.columns:
        if column not in given and column not in OF_SETS:
            raise UsageError(
                f"{bundle.folder} has no output {column!r} (it has {', '.join(given)}); "
                f"export the target with that output, or leave --{column} away."
            )
    if job.sets is not None:
        variant.sets(job.sets)
    return PredictRequest(
        bundle_sha256=bundle.sha256,
        variant=variant.name,
        runtime=job.runtime or variant.runtime,
        format=format_of(job.out, job.format),
        top_k=job.top_k,
        columns=job.columns,
        inputs=[displayed(argument) for argument in job.inputs],
        options={"column": job.column, "label_column": job.label_column, "follow_links": job.follow_links},
        toolchain=_toolchain(job, job.runtime or variant.runtime),
        sets=job.sets or msgspec.UNSET,
        part=msgspec.UNSET if job.part is None else str(job.part),
    )


def _toolchain(job: Job, runtime: str) -> dict[str, str]:
    """-> the versions of what decides the last bits; and the GPU, where this machine's computes."""
    row = runtime_named(runtime)
    names = dict.fromkeys(("onnxruntime", "openvino", *row.packages, "pillow", "pyarrow"))
    versions = {name: found for name in names if (found := _version(name))}
    return versions | (gpu_identity() if row.gpu and job.engine == "local" else {})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _already_finished(job: Job, request: PredictRequest, reading: Reading) -> int:
    """The output is there and no unfinished run is: say so, unless output, request or inputs are not what
    they were; -> the number of rows with an error."""
    summary = read_summary(job.out)
    assert summary is not None  # check_output has seen it
    otherwise = ""
    if summary.request != request:
        otherwise = "is complete, but from another command"
    elif summary.output is not msgspec.UNSET and (
        job.out.stat().st_size != summary.output.bytes or sha256_of(job.out) != summary.output.sha256
    ):
        otherwise = "was changed since it was written"
    elif summary.inputs_sha256 is not msgspec.UNSET and summary.inputs_sha256 != _inputs_now(
        job, reading, summary.settings
    ):
        otherwise = (
            "is complete, but its inputs changed since (a file was added, removed, renamed or written to)"
        )
    if otherwise:
        raise UsageError(
            f"{job.out} {otherwise}; leave --resume away to replace it, or choose another --out."
        )
    if job.display == "screen":
        print(f"{job.out} is already complete.")
    elif job.display == "json":
        print(msgspec.json.encode(summary).decode())
    return summary.errors


def _inputs_now(job: Job, reading: Reading, settings: WorkSettings) -> str:
    """-> the hash of all inputs as they are now; no image is read."""
    hashes = []
    for index, shard in enumerate(local.cut(read_inputs(job.inputs, reading), settings.shard_size)):
        hasher, own = InputsHasher(), job.own.owns(index)
        for _ in hasher.passing(shard) if own else shard:
            pass
        if own:
            hashes.append(hasher.result().sha256)
    return inputs_digest(hashes)


def peek(items: Iterator[Item], limit: int) -> tuple[list[Item], Iterator[Item]]:
    """-> (up to `limit` of the first items, an iterator over all of them). A bound item ends the look."""
    seen: list[Item] = []
    for item in items:
        seen.append(item.loaded() if item.bound else item)  # a bound one may not be readable later
        if item.bound or len(seen) == limit:
            break
    return seen, itertools.chain(seen, items)


@contextmanager
def full_disks(out: Path) -> Iterator[None]:
    """Say of a full disk, a quota or a size limit that nothing finished is lost. Raises CheckError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckError(
            f"the disk is full ({error.filename or out}); free some space and run the same command with "
            "--resume, the finished part is kept."
        ) from error


@contextmanager
def kept_on_a_lost_gpu(out: Path) -> Iterator[None]:
    """Say of a GPU that failed for good that nothing finished is lost. Raises CheckError."""
    try:
        yield
    except DeviceLost as error:
        raise CheckError(
            f"{str(error).removesuffix('; start the command again.')}; the finished part is in "
            f"{shards_folder(out)}: the same command with --resume goes on."
        ) from error


@contextmanager
def stop_signals(out: Path) -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise Interrupted: finished shards are safe,
    a resume makes the rest."""

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:  # the first one is already unwinding
            return
        stopped = True
        raise Interrupted(
            f"interrupted; the finished part is in {shards_folder(out)}: the same command with --resume "
            "goes on."
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
