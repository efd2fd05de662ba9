"""Promises of the micro-batcher: right rows to the right caller, faults stay with their owner,
bounded queue, freed places."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest

from ffl_deploy.runtime import Outputs
from serve.server.batcher import Closed, MicroBatcher, Overloaded


class Model:
    """Answers with each image's first pixel; `gate` holds runs back; pixel 255 fails the whole batch,
    as a bad kernel would."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, images: np.ndarray) -> Outputs:
        self.entered.set()
        assert self.gate.wait(60)
        self.batches.append(len(images))
        if (images == 255).any():
            raise ValueError("bad image")
        value = images[:, 0, 0, :1].astype(np.float32)
        return Outputs(value, value * 2)


def image(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


def run(body: Callable[[MicroBatcher, Model], object], **options: int) -> None:
    model = Model()
    batcher = MicroBatcher(model, **{"max_batch": 8, "max_queue": 16, **options})

    async def main() -> None:
        await body(batcher, model)  # type: ignore[misc]

    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        model.gate.set()
        batcher.close()


async def held(batcher: MicroBatcher, model: Model) -> asyncio.Task[Outputs]:
    """A first request that occupies the model, so that what follows waits together."""
    model.gate.clear()
    model.entered.clear()
    task = asyncio.create_task(batcher.infer(image(0)))
    await until(model.entered.is_set)
    return task


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop and the batcher's threads go on until the condition holds;
    `run` ends a test in which it never does."""
    while not condition():
        await asyncio.sleep(0.001)


def test_waiting_requests_run_together_and_each_gets_its_own_rows() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        tasks = [
            asyncio.create_task(batcher.infer(image(value, count)))
            for value, count in [(1, 1), (2, 3), (3, 2)]
        ]
        await until(lambda: batcher.waiting_images == 6)
        model.gate.set()
        answers = await asyncio.gather(first, *tasks)
        assert [answer.logits.ravel().tolist() for answer in answers] == [[0], [1], [2, 2, 2], [3, 3]]
        assert answers[2].probabilities.ravel().tolist() == [4, 4, 4]
        assert model.batches == [1, 6]
        assert batcher.waiting_images == 0

    run(body)


def test_batches_never_exceed_the_limit_and_a_large_request_runs_in_pieces() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        tasks = [
            asyncio.create_task(batcher.infer(image(value, count)))
            for value, count in [(1, 3), (2, 2), (3, 10)]
        ]
        await until(lambda: batcher.waiting_images == 15)
        model.gate.set()
        answers = await asyncio.gather(first, *tasks)
        assert [len(answer.logits) for answer in answers] == [1, 3, 2, 10]
        assert model.batches == [1, 3, 2, 4, 4, 2]

    run(body, max_batch=4)


def test_a_failing_image_fails_its_own_request_only() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        tasks = [asyncio.create_task(batcher.infer(image(value))) for value in (7, 255, 9)]
        await until(lambda: batcher.waiting_images == 3)
        model.gate.set()
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert isinstance(answers[2], ValueError)
        assert [answers[i].logits.item() for i in (0, 1, 3)] == [0, 7, 9]  # type: ignore[union-attr]

    run(body)


def test_a_full_queue_refuses_exactly_the_excess() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        tasks = [asyncio.create_task(batcher.infer(image(1))) for _ in range(20)]
        await until(lambda: sum(task.done() for task in tasks) == 4 and batcher.waiting_images == 16)
        model.gate.set()
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert sum(isinstance(answer, Overloaded) for answer in answers) == 4
        assert sum(isinstance(answer, Outputs) for answer in answers) == 17

    run(body)


def test_a_cancelled_request_frees_its_place_and_is_never_run() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        gone = asyncio.create_task(batcher.infer(image(255, 16)))
        await until(lambda: batcher.waiting_images == 16)
        gone.cancel()
        await until(lambda: batcher.waiting_images == 0)
        other = asyncio.create_task(batcher.infer(image(5)))
        await until(lambda: batcher.waiting_images == 1)
        model.gate.set()
        assert (await other).logits.item() == 5
        await first
        assert model.batches == [1, 1]

    run(body)


def test_a_request_cancelled_while_it_runs_disturbs_nobody() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        first.cancel()
        other = asyncio.create_task(batcher.infer(image(5)))
        await until(lambda: first.done() and batcher.waiting_images == 1)
        model.gate.set()
        assert (await other).logits.item() == 5

    run(body)


def test_closing_fails_what_waits_instead_of_leaving_it_hanging() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        first = await held(batcher, model)
        waiting = asyncio.create_task(batcher.infer(image(1)))
        await until(lambda: batcher.waiting_images == 1)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        # the model still runs; let go earlier, it would take the waiting image
        await until(lambda: batcher._closed)
        model.gate.set()
        await closing
        assert (await first).logits.item() == 0
        with pytest.raises(Closed):
            await waiting
        with pytest.raises(Closed):
            await batcher.infer(image(1))

    run(body)


def test_two_workers_run_two_batches_at_a_time_and_both_end() -> None:
    async def body(batcher: MicroBatcher, model: Model) -> None:
        model.gate.clear()
        tasks = [asyncio.create_task(batcher.infer(image(value, 8))) for value in (1, 2, 3)]
        await until(lambda: batcher.waiting_images == 8)
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.logits[0].item() for answer in answers] == [1, 2, 3]

    run(body, workers=2, max_queue=64)


def test_workers_share_what_waits_instead_of_one_taking_it_all() -> None:
    """Both workers are held with an image each while 8 more arrive:
    of 8 or 9 outstanding images nobody takes more than 5."""

    async def body(batcher: MicroBatcher, model: Model) -> None:
        model.gate.clear()
        first = [asyncio.create_task(batcher.infer(image(value))) for value in (1, 2)]
        while batcher.waiting_images or not model.entered.is_set():
            await asyncio.sleep(0.001)
        tasks = [asyncio.create_task(batcher.infer(image(value))) for value in range(3, 11)]
        await asyncio.sleep(0.01)
        assert batcher.waiting_images == 8
        model.gate.set()
        answers = await asyncio.gather(*first, *tasks)
        assert [answer.logits.item() for answer in answers] == list(range(1, 11))
        assert model.batches.count(1) >= 2
        assert max(model.batches) <= 5

    run(body, workers=2)
