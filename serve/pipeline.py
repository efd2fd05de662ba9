"""Items -> rows: decoding in some threads, inference in others,
with bounded queues between and the order kept.

Batches are cut by position (the same items always share a batch), so a row's last bit does not depend on
timing: a resumed run repeats the bytes of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from ffl_deploy.decisions import Decisions
from ffl_deploy.errors import DeviceLost
from ffl_deploy.familiarity import UNFAMILIAR
from ffl_deploy.images import ImageError, decode, prepare
from ffl_deploy.preprocessing import Pixels, Preprocessing
from ffl_deploy.runtime import Outputs, Session
from serve.inputs.items import Item
from serve.rows import OF_DECISIONS, OK, Row

# items a decoding thread takes at a time: hand-over costs 30 us, a small image decodes in 50
DECODE_CHUNK = 16
HELD_BYTES = 64 << 20  # of encoded members of archives and tables, which are in memory until they are decoded
ANIMATED = "animated: only the first frame was classified"

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class WorkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it is computed: chosen at the start, repeated by a resume because the last bit
    of a float depends on it."""

    batch_size: int
    shard_size: int
    streams: int  # batches in inference at the same time
    threads: int  # of each inference
    decoders: int  # decoding threads; does not touch the bytes


class Prepared(NamedTuple):
    """A decoded item: the network's input, or the status and error of its row."""

    path: str
    label: str | None
    pixels: Pixels | None  # uint8 [height, width, 3]
    width: int | None = None
    height: int | None = None
    status: str = OK
    error: str | None = None
    seconds: float = 0.0  # spent reading, decoding, resizing


class Chunk(NamedTuple):
    """Items that one thread decodes. The flags say what ends with it."""

    shard: int
    items: list[Item]
    ends_batch: bool
    ends_shard: bool
    bytes: int = 0  # of encoded images that it holds


class BatchRows(NamedTuple):
    """One batch's rows, in order, with the true label of each where it is known."""

    shard: int
    rows: list[Row]
    labels: list[str | None]
    ends_shard: bool
    decode_seconds: list[float]  # each item's
    infer_seconds: float


class Classifier:
    """Runs batches through a session and makes rows of the answers."""

    def __init__(
        self,
        session: Session,
        classes: Sequence[str],
        top_k: int,
        columns: Sequence[str] = (),
        decisions: Decisions | None = None,
    ) -> None:
        """columns: which of rows.OPTIONAL_COLUMNS to fill, those of `decisions` besides."""
        self.session, self.classes = session, list(classes)
        self.top_k, self.decisions = min(top_k, len(self.classes)), decisions or Decisions()
        self.columns = [name for name in columns if name not in OF_DECISIONS]

    def rows(self, prepared: Sequence[Prepared]) -> list[Row]:
        """-> one row for each, in order; the decoded ones go through the network as one batch."""
        good = [item for item in prepared if item.pixels is not None]
        answers = iter(self._classified(good)) if good else iter(())
        return [
            next(answers) if item.pixels is not None else failed_row(item, item.status, item.error)
            for item in prepared
        ]

    def _classified(self, good: Sequence[Prepared]) -> list[Row]:
        try:
            outputs = self.session.run(np.stack([item.pixels for item in good if item.pixels is not None]))
        except DeviceLost:  # no image's fault, and no later batch can do better
            raise
        except Exception as error:  # every runtime has its own classes; none of them may cost the other rows
            if len(good) > 1:  # out of memory, mostly: smaller batches may do
                half = len(good) // 2
                return self._classified(good[:half]) + self._classified(good[half:])
            item = good[0]
            status = "out_of_memory" if isinstance(error, MemoryError) else "inference_failed"
            return [failed_row(item, status, f"the model could not be run ({str(error).strip()})")]
        return self._answered(good, outputs)

    def _answered(self, good: Sequence[Prepared], outputs: Outputs) -> list[Row]:
        finite = outputs.finite
        numbers = outputs._replace(probabilities=np.nan_to_num(outputs.probabilities))
        decided = self.decisions.each(numbers, self.classes)
        # equal values keep class order
        order = np.argsort(-outputs.probabilities, axis=1, kind="stable")[:, : self.top_k]
        confidences = np.take_along_axis(outputs.probabilities, order, axis=1).tolist()
        rows = []
        for index, (item, ids, values) in enumerate(zip(good, order.tolist(), confidences, strict=True)):
            if not finite[index]:
                message = "the model's output is not a finite number"
                rows.append(failed_row(item, "nonfinite", message))
                continue
            labels = [self.classes[i] for i in ids]
            extra = {name: getattr(outputs, name)[index] for name in self.columns}
            said = decided[index]
            remarks = [item.error, UNFAMILIAR if said.pop("unfamiliar", False) else None]
            if "set" in said:
                said["set_labels"] = said.pop("set")
            rows.append(
                Row(
                    item.path,
                    OK,
                    "; ".join(filter(None, remarks)) or None,
                    labels[0],
                    ids[0],
                    values[0],
                    labels,
                    values,
                    item.width,
                    item.height,
                    **extra,
                    **said,
                )
            )
        return rows


def failed_row(item: Prepared, status: str, error: str | None) -> Row:
    return Row(item.path, status, error, width=item.width, height=item.height)


def prepare_item(item: Item, preprocessing: Preprocessing, apart: bool = True) -> Prepared:
    """Read, decode and resize one item; whatever is wrong with it becomes a status. apart: as `decode` has
    it."""
    started = time.perf_counter()

    def failed(status: str, error: str) -> Prepared:
        return Prepared(
            item.path, item.label, None, status=status, error=error, seconds=time.perf_counter() - started
        )

    try:
        decoded = decode(item.read(), apart=apart)
        pixels = prepare(decoded.pixels, preprocessing)
    except ImageError as error:
        return failed(error.code, str(error))
    except MemoryError:
        return failed("out_of_memory", "the image does not fit into memory; classify it on a larger machine")
    except Exception as error:  # a fault of ours may cost this row, not the other million
        return failed("internal_error", f"{type(error).__name__}: {error}")
    remark = ANIMATED if decoded.animated else None
    seconds = time.perf_counter() - started
    return Prepared(
        item.path, item.label, pixels, decoded.width, decoded.height, error=remark, seconds=seconds
    )


def chunks(items: Iterable[Item], shard: int, batch_size: int) -> Iterator[Chunk]:
    """Cut one shard's items into batches of `batch_size` by position,
    and those into chunks for the decoding threads."""
    chunk: list[Item] = []
    in_batch = held = 0
    ahead: Item | None = None
    for item in items:
        if ahead is not None:
            chunk.append(ahead)
            in_batch += 1
            held += ahead.held
            if in_batch == batch_size or len(chunk) == DECODE_CHUNK or held >= HELD_BYTES:
                yield Chunk(shard, chunk, in_batch == batch_size, False, held)
                chunk, in_batch, held = [], in_batch % batch_size, 0
        ahead = item.loaded() if item.bound else item
    if ahead is not None:
        yield Chunk(shard, [*chunk, ahead], True, True, held + ahead.held)


def run_pipeline(
    work: Iterable[Chunk], classifier: Classifier, preprocessing: Preprocessing, settings: WorkSettings
) -> Iterator[BatchRows]:
    """Yield each batch's rows in order, while later batches are decoded and classified.

    Of the settings it needs the batch size, the decoding threads and the streams.
    At most about `decoders` + 2 batches of decoded, resized images are held, however many items there are.
    """

    # decode: chunks, whose batches are then put together in the order of the work
    ahead = settings.decoders + 2 * -(-settings.batch_size // DECODE_CHUNK)  # chunks

    def decode_chunk(chunk: Chunk) -> tuple[Chunk, list[Prepared]]:
        return chunk, [prepare_item(item, preprocessing) for item in chunk.items]

    def batches() -> Iterator[tuple[Chunk, list[Prepared]]]:
        batch: list[Prepared] = []
        for chunk, prepared in ordered_map(decode_chunk, work, decoding, ahead, lambda chunk: chunk.bytes):
            batch += prepared
            if chunk.ends_batch:
                yield chunk, batch
                batch = []

    # classify: whole batches
    def classify(batch: tuple[Chunk, list[Prepared]]) -> BatchRows:
        chunk, prepared = batch
        started = time.perf_counter()
        rows = classifier.rows(prepared)
        seconds = time.perf_counter() - started
        return BatchRows(
            chunk.shard,
            rows,
            [item.label for item in prepared],
            chunk.ends_shard,
            [item.seconds for item in prepared],
            seconds,
        )

    # both at once; where the consumer stops, nothing further is begun
    with ExitStack() as stack:
        decoding = ThreadPoolExecutor(settings.decoders, "decode")
        inferring = ThreadPoolExecutor(settings.streams, "infer")
        stack.callback(decoding.shutdown, cancel_futures=True)
        stack.callback(inferring.shutdown, cancel_futures=True)
        yield from ordered_map(classify, batches(), inferring, settings.streams + 1)


def ordered_map(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    executor: ThreadPoolExecutor,
    window: int,
    size: Callable[[Argument], int] = lambda argument: 0,
) -> Iterator[Result]:
    """Like `map` on an executor, with at most `window` arguments taken and not yet yielded,
    fewer where their `size` is large.

    size: bytes that an argument holds; from HELD_BYTES on no further one is taken.
    """
    pending: deque[tuple[Future[Result], int]] = deque()
    held = 0
    for argument in arguments:
        pending.append((executor.submit(function, argument), size(argument)))
        held += pending[-1][1]
        while pending and (len(pending) >= window or held >= HELD_BYTES):
            future, freed = pending.popleft()
            held -= freed
            yield future.result()
    while pending:
        yield pending.popleft()[0].result()
