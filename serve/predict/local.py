"""The engine `local`: every shard that is not finished yet, through one pipeline in this process."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from ffl_deploy.bundle import Bundle
from ffl_deploy.decisions import Decisions
from ffl_deploy.errors import UsageError
from ffl_deploy.runtime import Session
from serve.inputs.items import Item, displayed
from serve.pipeline import Chunk, Classifier, chunks, run_pipeline
from serve.predict.job import PredictRun
from serve.predict.labelled import count_labels
from serve.predict.shards import InputsHash, InputsHasher, PredictRequest, ShardRecord, changed_item, count
from serve.predict.supervise import CarefulShardDone
from serve.rows import OK, Row, encode


def predict_shards(run: PredictRun, items: Iterator[Item]) -> None:
    """Make every shard that is not finished yet."""
    settings, recovery = run.shards.manifest.settings, run.job.recovery
    session = run.bundle.session(run.job.variant, run.job.runtime, threads=settings.threads)
    classifier = classifier_for(run.bundle, session, run.shards.manifest.request)

    hashers: dict[int, InputsHasher] = {}

    def work() -> Iterator[Chunk]:
        for index, shard in unfinished(run, items):
            first, hashers[index] = index * settings.shard_size, InputsHasher()
            passing = enumerate(hashers[index].passing(shard))
            guarded = (recovery.guarded(item, index, first + position) for position, item in passing)
            yield from chunks(guarded, index, settings.batch_size)

    rows: list[Row] = []
    labels: list[str | None] = []
    for batch in run_pipeline(work(), classifier, run.bundle.preprocessing, settings):
        rows += batch.rows
        labels += batch.labels
        run.totals.add_timing(batch.decode_seconds, [batch.infer_seconds])
        run.progress.advance(len(batch.rows), sum(row.status != OK for row in batch.rows))
        if batch.ends_shard:
            inputs = hashers.pop(batch.shard).result()
            data, record = encode_shard(rows, labels, run.shards.manifest.request, run.bundle.classes, inputs)
            run.shards.commit(batch.shard, data, record)
            run.totals.add_record(batch.shard, record, resumed=False)
            recovery.marker.finished(run.job.own.next_from(batch.shard + 1))
            if batch.shard == recovery.careful:
                raise CarefulShardDone
            rows, labels = [], []


def classifier_for(bundle: Bundle, session: Session, request: PredictRequest) -> Classifier:
    """-> what makes the rows that `request` asks for. Raises UsageError for sets that the bundle has not."""
    variant = bundle.variant(request.variant)
    decisions = Decisions.of(variant, None if request.sets is msgspec.UNSET else request.sets)
    return Classifier(session, bundle.classes, request.top_k, request.columns, decisions)


def unfinished(run: PredictRun, items: Iterator[Item]) -> Iterator[tuple[int, Iterator[Item]]]:
    """Yield (index, items) of each shard to make; check and count those that an earlier session finished;
    pass over those of other parts.

    Each shard's items must be used up before the next shard is asked for.
    """
    shards, own, marker = run.shards, run.job.own, run.job.recovery.marker
    marker.finished(max(marker.get()[0], own.next_from(0)))
    index = 0
    for index, shard in enumerate(cut(items, shards.manifest.settings.shard_size)):
        if not own.owns(index):
            deque(shard, maxlen=0)
            continue
        record = shards.record(index)
        if record is None:
            yield index, shard
            continue
        if record.inputs_each is msgspec.UNSET:
            raise UsageError(
                f"{run.shards.folder} was begun by an earlier version, which did not record its inputs' "
                "sizes and times; remove that folder and start again."
            )
        changed = changed_item(shard, InputsHash(record.inputs_sha256, record.inputs_each))
        if changed:
            raise inputs_changed(run, index, changed)
        run.totals.add_record(index, record, resumed=True)
        marker.finished(own.next_from(index + 1))
        run.progress.advance(record.rows, record.rows - record.statuses.get(OK, 0))
    if shards.record(own.next_from(index + 1)) is not None:
        raise inputs_changed(run, own.next_from(index + 1), "one that is gone now")


def inputs_changed(run: PredictRun, index: int, first: str) -> UsageError:
    return UsageError(
        f"the inputs changed since shard {index} of {run.shards.folder} was finished (a file was added, "
        f"removed, renamed or written to, or a label changed; first: {displayed(first)}); bring them back to "
        "what they were, or remove that folder and start again."
    )


def cut(items: Iterator[Item], size: int) -> Iterator[Iterator[Item]]:
    """-> consecutive runs of `size` items; each must be used up before the next is asked for."""
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))


def encode_shard(
    rows: Sequence[Row],
    labels: Iterable[str | None],
    request: PredictRequest,
    classes: Sequence[str],
    inputs: InputsHash,
) -> tuple[bytes, ShardRecord]:
    """-> one shard's bytes and its record."""
    data = encode(rows, request.format, request.columns)
    return data, ShardRecord(
        rows=len(rows),
        sha256=hashlib.sha256(data).hexdigest(),
        inputs_sha256=inputs.sha256,
        inputs_each=inputs.each,
        statuses=count(row.status for row in rows),
        labels=count(row.label for row in rows if row.label is not None),
        remarks=count(row.error for row in rows if row.status == OK and row.error),
        labelled=count_labels(rows, list(labels), classes),
    )
