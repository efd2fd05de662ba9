"""Batches are cut by position, order is kept, queues are bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from ffl_deploy.bundle import Bundle
from serve import pipeline
from serve.inputs.items import Item, failed_item
from serve.pipeline import DECODE_CHUNK, Chunk, Classifier, WorkSettings, chunks, ordered_map, run_pipeline
from serve.predict.supervise import Recovery


def items(count: int) -> Iterator[Item]:
    return (failed_item(str(index), "empty", "nothing") for index in range(count))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40, 64, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 40])
def test_batches_end_by_position_and_the_shard_at_its_last_item(count: int, batch_size: int) -> None:
    seen, ends = 0, []
    for chunk in chunks(items(count), 3, batch_size):
        assert 1 <= len(chunk.items) <= DECODE_CHUNK
        assert [item.path for item in chunk.items] == [str(i) for i in range(seen, seen + len(chunk.items))]
        seen += len(chunk.items)
        assert chunk.shard == 3
        assert chunk.ends_batch == (seen % batch_size == 0 or seen == count)
        ends.append(chunk.ends_shard)
    assert seen == count
    assert ends == [False] * (len(ends) - 1) + [True]


def test_bound_items_are_read_before_the_next_one_is_asked_for() -> None:
    asked: list[int] = []

    def stream() -> Iterator[Item]:
        for index in range(40):
            asked.append(index)

            def read(index: int = index) -> bytes:
                assert asked[-1] == index, "the stream has moved on"
                return b"%d" % index

            yield Item(str(index), read, bound=True)

    read = [item.read() for chunk in chunks(stream(), 0, 16) for item in chunk.items]
    assert read == [b"%d" % index for index in range(40)]


def test_ordered_map_keeps_order_within_its_window() -> None:
    lock = threading.Lock()
    taken, given = 0, 0
    ahead = []

    def arguments() -> Iterator[int]:
        nonlocal taken
        for index in range(60):
            with lock:
                taken += 1
                ahead.append(taken - given)
            yield index

    def slow(index: int) -> int:
        time.sleep(0.002 if index % 3 else 0.006)
        return index

    results = []
    with ThreadPoolExecutor(4) as pool:
        for result in ordered_map(slow, arguments(), pool, window=5):
            given += 1
            results.append(result)
    assert results == list(range(60))
    assert max(ahead) == 5


def test_an_unexpected_fault_costs_one_row(tiny_bundle: Bundle) -> None:
    def fault() -> bytes:
        raise SystemError("not an image's fault")

    work, before = chunks([*items(5), Item("x", fault)], 0, 4), set(threading.enumerate())
    classifier = Classifier(tiny_bundle.session(), tiny_bundle.classes, 5)
    settings = WorkSettings(batch_size=4, shard_size=100, streams=2, threads=1, decoders=2)
    finished = list(run_pipeline(work, classifier, tiny_bundle.preprocessing, settings))
    assert [row.status for part in finished for row in part.rows] == ["empty"] * 5 + ["internal_error"]
    assert [part.ends_shard for part in finished] == [False, True]
    assert "SystemError" in str(finished[-1].rows[-1].error)
    assert set(threading.enumerate()) <= before, "the pools are gone"


def test_images_that_are_in_memory_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of archives and tables, however well they are compressed."""
    monkeypatch.setattr(pipeline, "HELD_BYTES", 1000)
    tried = Recovery(careful=0).guarded(Item("x", partial(bytes, 400), bound=True), 0, 0)
    assert tried.held == 400, "also where images are tried one at a time"
    members = (Item(str(index), partial(bytes, 400), bound=True) for index in range(40))
    cut = list(chunks(members, 0, 64))
    assert [len(chunk.items) for chunk in cut] == [3] * 13 + [1]
    assert {chunk.bytes for chunk in cut[:-1]} == {1200}
    held, most = 0, 0

    def taken() -> Iterator[Chunk]:
        nonlocal held, most
        for chunk in cut:
            held += chunk.bytes
            most = max(most, held)
            yield chunk

    with ThreadPoolExecutor(1) as executor:
        for chunk in ordered_map(lambda chunk: chunk, taken(), executor, 10, lambda chunk: chunk.bytes):
            held -= chunk.bytes
    assert most <= 2 * 1200
