"""Shards made in another process than the one that writes them: what travels there, what comes back, and the
maker.

The engines `ray` (an actor on any node) and `gpus` (a process for each GPU of this machine) share it, so
their rows are those of the engine `local`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import msgspec

from ffl_deploy.bundle import load_bundle
from ffl_deploy.errors import UNUSABLE_INPUT, CheckError, FflError, UsageError
from ffl_deploy.images import ImageError
from serve.inputs.items import Item, read_file, refuse
from serve.pipeline import chunks, run_pipeline
from serve.predict.job import PredictRun
from serve.predict.local import classifier_for, encode_shard
from serve.predict.shards import InputsHash, InputsHasher, ShardRecord, ShardsManifest
from serve.rows import Row


class ShardMaker:
    """Opens the bundle once, which checks it where this runs, then makes shards.

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
            self.classifier = classifier_for(self.bundle, session, request)
        except FflError as error:
            self.refused = self._refused(error)

    def make(self, shard: PlainShard) -> bytes:
        """-> the answer: the shard's bytes, record and timings, or why there are none."""
        if self.refused is not None:
            return msgspec.msgpack.encode(self.refused)
        try:
            return msgspec.msgpack.encode(self._made(shard))
        except FflError as error:  # the GPU failed, for one; a bad image is a row
            return msgspec.msgpack.encode(self._refused(error))

    def _made(self, shard: PlainShard) -> MadeShard:
        settings = self.manifest.settings
        items = msgspec.json.decode(shard.items, type=list[PlainItem])
        rows: list[Row] = []
        labels: list[str | None] = []
        decode_seconds: list[float] = []
        infer_seconds: list[float] = []
        work = chunks(map(item_of, items), shard.number, settings.batch_size)
        for done in run_pipeline(work, self.classifier, self.bundle.preprocessing, settings):
            rows += done.rows
            labels += done.labels
            decode_seconds += done.decode_seconds
            infer_seconds.append(done.infer_seconds)
        inputs = InputsHash(shard.sha256, shard.each)
        data, record = encode_shard(rows, labels, self.manifest.request, self.bundle.classes, inputs)
        return MadeShard(shard.number, data, record, decode_seconds, infer_seconds)

    @staticmethod
    def _refused(error: FflError) -> Refused:
        return Refused(f"worker on {platform.node()}: {error}", error.exit_code)


class PlainShard(NamedTuple):
    """A shard as data, for whoever makes it. items: a list of PlainItem as JSON; sha256, each: of its
    InputsHash."""

    number: int
    items: bytes
    sha256: str
    each: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> PlainShard:
        """-> what a row of Ray Data says, in NumPy's types."""
        return cls(int(row["number"]), bytes(row["items"]), str(row["sha256"]), str(row["each"]))


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


def described(
    number: int, shard: Iterable[Item], guard: Callable[[int, Item], Item] = lambda position, item: item
) -> PlainShard:
    """-> a shard as data. guard: (position, item) -> the item to send in its place."""
    hasher = InputsHasher()
    items = [plain(guard(position, item)) for position, item in enumerate(hasher.passing(shard))]
    return PlainShard(number, msgspec.json.encode(items), *hasher.result())


def accepted(answer: bytes) -> MadeShard:
    """-> what a ShardMaker made. Raises CheckError and UsageError for what it refused."""
    made: MadeShard | Refused = msgspec.msgpack.decode(answer, type=MadeShard | Refused)
    if isinstance(made, Refused):
        raise (UsageError if made.exit_code == UNUSABLE_INPUT else CheckError)(made.message)
    return made


def commit(run: PredictRun, made: MadeShard) -> None:
    """Write a shard that came back, and count it."""
    run.shards.commit(made.index, made.data, made.record)
    run.totals.add_record(made.index, made.record, resumed=False)
    run.totals.add_timing(made.decode_seconds, made.infer_seconds)
    run.progress.advance(made.record.rows, made.record.rows - made.record.statuses.get("ok", 0))


def constructor_arguments(run: PredictRun) -> tuple[str, str | None, str | None, bytes]:
    """-> of ShardMaker, for another process."""
    job = run.job
    return (os.path.abspath(job.bundle), job.variant, job.runtime, msgspec.json.encode(run.shards.manifest))
