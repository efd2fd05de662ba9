"""The engine `ray`: the same shards, each made by an actor of Ray Data,
written by this process in the same order.

The rows, shard files and manifest are those of the engine `local`: a run begun on a cluster can be resumed on
one machine. Ray replaces an actor that dies and makes its shard again; when the cluster gives up, the
finished shards are kept.
"""

from __future__ import annotations

import logging
import os
import platform
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec

from ffl_deploy.bundle import load_bundle
from ffl_deploy.errors import UNUSABLE_INPUT, CheckError, FflError, UsageError
from ffl_deploy.images import ImageError
from ffl_deploy.installed import missing
from serve.inputs.items import Item, read_file, refuse
from serve.pipeline import Classifier, chunks, run_pipeline
from serve.predict.job import Job, PredictRun
from serve.predict.local import encode_shard, unfinished
from serve.predict.shards import InputsHash, InputsHasher, ShardRecord, ShardsManifest
from serve.rows import Row

WINDOW = 1024  # shards in one Ray Data job
# of them: names of files, and the images themselves where they are members of archives or tables
WINDOW_BYTES = 256 << 20
RETRIES = 2  # of a shard whose actor died; Ray Data's own default is to try for ever


class ShardMaker:
    """An actor: opens the bundle once, which checks it on this node, then makes shards.

    What the bundle is refused for travels back as data: Ray would try a constructor that fails again,
    and hand on its traceback.
    """

    def __init__(self, bundle: str, variant: str | None, runtime: str | None, manifest: bytes) -> None:
        self.manifest = msgspec.json.decode(manifest, type=ShardsManifest)
        request, settings = self.manifest.request, self.manifest.settings
        self.refused: Refused | None = None
        try:
            self.bundle = load_bundle(bundle)
            if self.bundle.sha256 != request.bundle_sha256:
                raise CheckError(f"{bundle} is another bundle on this node; give every node the same files.")
            session = self.bundle.session(variant, runtime, threads=settings.threads)
            self.classifier = Classifier(session, self.bundle.classes, request.top_k, request.columns)
        except FflError as error:
            self.refused = Refused(f"worker on {platform.node()}: {error}", error.exit_code)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """batch: one shard, as `described` gives it -> its index, bytes, record and timings,
        or why there are none."""
        if self.refused is not None:
            return {"made": [msgspec.msgpack.encode(self.refused)]}
        settings = self.manifest.settings
        index, items = int(batch["index"][0]), msgspec.json.decode(batch["items"][0], type=list[PlainItem])
        rows: list[Row] = []
        labels: list[str | None] = []
        decode_seconds: list[float] = []
        infer_seconds: list[float] = []
        work = chunks(map(item_of, items), index, settings.batch_size)
        for done in run_pipeline(work, self.classifier, self.bundle.preprocessing, settings):
            rows += done.rows
            labels += done.labels
            decode_seconds += done.decode_seconds
            infer_seconds.append(done.infer_seconds)
        inputs = InputsHash(str(batch["sha256"][0]), str(batch["each"][0]))
        data, record = encode_shard(rows, labels, self.manifest.request, self.bundle.classes, inputs)
        result = MadeShard(index, data, record, decode_seconds, infer_seconds)
        return {"made": [msgspec.msgpack.encode(result)]}


class PlainItem(msgspec.Struct, frozen=True, array_like=True):
    """An item as data: the name of a file, or the bytes or the error of what was read from a stream."""

    path: str
    label: str | None
    file: bytes | None = None
    data: bytes | None = None
    code: str | None = None
    message: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What an actor sends back where the bundle must not answer on its node."""

    message: str
    exit_code: int


class MadeShard(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What an actor sends back for a shard."""

    index: int
    data: bytes
    record: ShardRecord
    decode_seconds: list[float]
    infer_seconds: list[float]


def plain(item: Item) -> PlainItem:
    """-> the item without what lives in this process only. Files are read by the actors,
    members of streams here."""
    if item.file is not None:
        return PlainItem(item.path, item.label, file=os.fsencode(os.path.abspath(item.file)))
    try:
        return PlainItem(item.path, item.label, data=item.read())
    except ImageError as error:
        return PlainItem(item.path, item.label, code=error.code, message=str(error))


def item_of(plain: PlainItem) -> Item:
    if plain.file is not None:
        return Item(plain.path, partial(read_file, os.fsdecode(plain.file)), plain.label)
    if plain.data is not None:
        return Item(plain.path, partial(bytes, plain.data), plain.label, held=len(plain.data))
    return Item(plain.path, partial(refuse, plain.code or "unreadable", plain.message), plain.label)


def predict_shards(run: PredictRun, items: Iterator[Item]) -> None:
    """Make every shard that is not finished yet. Raises UsageError without Ray,
    CheckError when the cluster gives up."""
    ray = start_ray()
    try:
        described = (described_shard(index, shard) for index, shard in unfinished(run, items))
        while window := next_window(described):
            for finished in mapped(ray, window, run):
                run.shards.commit(finished.index, finished.data, finished.record)
                run.totals.add_record(finished.index, finished.record, resumed=False)
                run.totals.add_timing(finished.decode_seconds, finished.infer_seconds)
                run.progress.advance(
                    finished.record.rows, finished.record.rows - finished.record.statuses.get("ok", 0)
                )
    except ray.exceptions.RayError as error:
        raise CheckError(
            f"the cluster gave up a shard ({str(error).strip().splitlines()[0]}); the finished ones are "
            "kept: the same command with --resume goes on, and with --engine local it also finds the image "
            "that kills workers."
        ) from error
    finally:
        ray.shutdown()


def described_shard(index: int, shard: Iterator[Item]) -> dict[str, Any]:
    """-> a shard as data, for whichever node makes it."""
    hasher = InputsHasher()
    items = msgspec.json.encode([plain(item) for item in hasher.passing(shard)])
    return {"index": index, "items": items, **hasher.result()._asdict()}


def next_window(described: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """-> the next shards that this process holds at a time: at most WINDOW, and about WINDOW_BYTES."""
    window: list[dict[str, Any]] = []
    held = 0
    for shard in described:
        window.append(shard)
        held += len(shard["items"])
        if len(window) == WINDOW or held >= WINDOW_BYTES:
            break
    return window


def start_ray() -> Any:
    """-> the module ray, connected to the cluster of RAY_ADDRESS or to a local one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong arrives here as an exception
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise missing("ray", "leave --engine ray away") from error
    if not ray.is_initialized():
        local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    # its tracebacks; the error itself is raised here
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray


def mapped(ray: Any, window: list[dict[str, Any]], run: PredictRun) -> Iterator[MadeShard]:
    """Yield the shards of `window`, made, in order. Raises CheckError,
    UsageError where a node must not make any."""
    settings, job = run.shards.manifest.settings, run.job
    cores = settings.threads * settings.streams
    actors = max(1, min(len(window), int(ray.cluster_resources().get("CPU", 1)) // cores))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a successor to ray_remote_args_fn that Ray does not have yet
        dataset = ray.data.from_items(window, override_num_blocks=len(window)).map_batches(
            ShardMaker,
            fn_constructor_args=constructor_arguments(job, run),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors),
            num_cpus=cores,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": RETRIES},
        )
    for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
        answer: MadeShard | Refused = msgspec.msgpack.decode(batch["made"][0], type=MadeShard | Refused)
        if isinstance(answer, Refused):
            raise (UsageError if answer.exit_code == UNUSABLE_INPUT else CheckError)(answer.message)
        yield answer


def constructor_arguments(job: Job, run: PredictRun) -> tuple[Any, ...]:
    return (os.path.abspath(job.bundle), job.variant, job.runtime, msgspec.json.encode(run.shards.manifest))
