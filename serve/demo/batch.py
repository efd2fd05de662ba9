"""Many files in the demo: the rows that ffl-predict would write, with progress,
through the same micro-batcher."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ffl_deploy.images import ImageError
from ffl_deploy.preprocessing import Pixels
from ffl_deploy.runtime import Outputs, Session
from serve.inputs import archives
from serve.inputs.items import Item, Skipped, file_item
from serve.pipeline import Classifier, Prepared, prepare_item
from serve.rows import OK, Format, Row, assemble, encode, piece
from serve.server.batcher import Overloaded
from serve.server.models import ServedModel
from serve.server.service import Service

CHUNK, CHUNK_BYTES = 32, 128 * 2**20
MAX_DIRECTORY_BYTES = 8 * 2**20  # of an uploaded zip: some 80,000 members
UNCERTAIN = 12  # images in the gallery
PATIENCE_SECONDS = 60.0

T = TypeVar("T")


class BatcherSession(Session):
    """A session whose runs queue behind the micro-batcher, among everybody's requests. For threads,
    not for the event loop."""

    def __init__(self, model: ServedModel, loop: asyncio.AbstractEventLoop) -> None:
        self.runtime, self.variant = model.session.runtime, model.variant.name
        self._model, self._loop = model, loop

    def run(self, images: np.ndarray) -> Outputs:
        return asyncio.run_coroutine_threadsafe(
            patiently(lambda: self._model.batcher.infer(images)), self._loop
        ).result()


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """A batch has time: where a single request would be refused it waits for room, up to PATIENCE_SECONDS.
    Raises Overloaded."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await attempt()
        except Overloaded:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Uncertain:
    """An image whose answer has little probability;
    ordered so that the most certain one leaves a full heap first."""

    row: Row
    pixels: Pixels


@dataclass
class BatchState:
    """What a batch has come to. `total` counts the files that were given, not the members of archives."""

    rows: list[Row] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)
    limited: bool = False
    _heap: list[tuple[float, int, Uncertain]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(row.status != OK for row in self.rows)

    @property
    def uncertain(self) -> list[Uncertain]:
        """-> the least certain images, least certain first."""
        return [entry for _, _, entry in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]

    def add(self, rows: Sequence[Row], prepared: Sequence[Prepared]) -> None:
        for row, item in zip(rows, prepared, strict=True):
            self.rows.append(row)
            if row.confidence is not None and item.pixels is not None:
                entry = (-row.confidence, len(self.rows), Uncertain(row, item.pixels))
                (heapq.heappush if len(self._heap) < UNCERTAIN else heapq.heappushpop)(self._heap, entry)


def take(items: Iterator[Item], count: int) -> list[Item]:
    """-> the next items, with their bytes: an archive is closed once its last member has been asked for.

    At most `count`, and no more after CHUNK_BYTES, so that a zip of large members cannot fill the memory.
    """
    chunk: list[Item] = []
    held = 0
    while len(chunk) < count and held < CHUNK_BYTES and (item := next(items, None)):
        try:
            data = item.read()
        except ImageError:
            chunk.append(item.loaded())
            continue
        held += len(data)
        chunk.append(item._replace(read=partial(bytes, data)))
    return chunk


def read_files(paths: Sequence[str], skipped: Skipped) -> Iterator[Item]:
    """Uploaded files and the image members of uploaded zip files -> items
    that show the name the person gave."""
    for path in paths:
        folder = f"{Path(path).parent}/"
        found = (
            archives.members(path, frozenset(), skipped, MAX_DIRECTORY_BYTES)
            if path.lower().endswith(archives.ZIP_SUFFIXES)
            else [file_item(path)]
        )
        for item in found:
            yield item._replace(path=item.path.removeprefix(folder))


async def classify_files(
    service: Service, model: ServedModel, paths: Sequence[str]
) -> AsyncIterator[BatchState]:
    """Yield the growing state after every chunk; one row for each input, in order."""
    loop = asyncio.get_running_loop()
    classifier = Classifier(BatcherSession(model, loop), model.bundle.classes, 5, (), model.decisions)
    state = BatchState()
    items = read_files(paths, state.skipped)
    preprocessing = model.bundle.preprocessing
    limit = service.settings.limits.batch_images
    while chunk := await asyncio.to_thread(take, items, min(CHUNK, limit + 1 - len(state.rows))):
        if len(state.rows) + len(chunk) > limit:
            state.limited, chunk = True, chunk[: limit - len(state.rows)]
        one = partial(service.decoders.run, partial(prepare_item, preprocessing=preprocessing, apart=False))
        prepared = await asyncio.gather(*[patiently(partial(one, item)) for item in chunk])
        state.add(await asyncio.to_thread(classifier.rows, prepared), prepared)
        yield state
        if state.limited:
            return


def write_table(rows: Sequence[Row], folder: Path, format: Format) -> Path:
    """-> predictions.FORMAT in `folder`, exactly as ffl-predict writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / f"shard.{format}"
    shard.write_bytes(encode(rows, format, ()))
    out = folder / f"predictions.{format}"
    assemble([piece(shard, format)], out, format, ())
    shard.unlink()
    return out
