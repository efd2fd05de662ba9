"""Micro-batching: requests that arrive while the model is busy run together as its next batch.

There is no timer to tune. An idle model starts at once, so a lone request pays no waiting time; under load
the batch grows by itself to what arrived during the previous run. Several workers share what there is: one
that took all of it would leave the others, and their cores, without work. Images come in decoded and checked,
so that nothing one request contains can fail another's.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ffl_deploy.runtime import Outputs
from serve.server.noted import took

RunModel = Callable[[np.ndarray], Outputs]
"""uint8 [n, height, width, 3] -> Outputs with n rows; blocks."""

Observe = Callable[[int, float], None]
"""Called after every run of the model with (images, seconds)."""

Waited = Callable[[float], None]
"""Called with the seconds that a request has waited for its run."""


class Overloaded(Exception):
    """The queue is full; the client should come back later."""


class Closed(Exception):
    """The batcher was closed before it ran this request."""


@dataclass(eq=False)
class _Job:
    images: np.ndarray
    future: asyncio.Future[Outputs]
    loop: asyncio.AbstractEventLoop = field(repr=False)
    queued_at: float = field(default_factory=time.perf_counter)
    began_at: float = 0.0  # its run
    ended_at: float = 0.0
    together: int = 0  # images of its run


class MicroBatcher:
    """Runs one model for many concurrent callers, on threads of its own.

    Args:
        run: the model.
        max_batch: images in one run. A larger request runs in pieces of this size.
        workers: runs at a time. Several, of sessions with one thread each, give more images per second on
            small models than one run that is split over all cores, and a lone request takes longer.
        max_queue: images that may wait; beyond it `infer` raises Overloaded at once.
    """

    def __init__(
        self,
        run: RunModel,
        *,
        max_batch: int,
        max_queue: int,
        workers: int = 1,
        observe: Observe | None = None,
        waited: Waited | None = None,
        name: str = "model",
    ) -> None:
        self._run, self._observe, self._waited = run, observe, waited
        self._max_batch, self._max_queue = max_batch, max_queue
        self._jobs: deque[_Job] = deque()
        self._waiting_images = self._running_images = 0
        self._changed = threading.Condition()
        self._closed = False
        names = [f"batcher-{name}-{number}" for number in range(workers)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def waiting_images(self) -> int:
        """Images that wait for a run."""
        return self._waiting_images

    async def infer(self, images: np.ndarray) -> Outputs:
        """uint8 [n, height, width, 3] -> Outputs of these n images.
        Cancelling it frees its place in the queue.

        Raises Overloaded, Closed, and whatever the model raises.
        """
        loop = asyncio.get_running_loop()
        job = _Job(images, loop.create_future(), loop)
        with self._changed:
            if self._closed:
                raise Closed
            # A request larger than the queue still runs when nothing else waits.
            if self._waiting_images and self._waiting_images + len(images) > self._max_queue:
                raise Overloaded
            self._jobs.append(job)
            self._waiting_images += len(images)
            self._changed.notify()
        try:
            outputs = await job.future
            took("queue", job.queued_at, job.began_at, len(images))
            took("run", job.began_at, job.ended_at, job.together)
            return outputs
        except asyncio.CancelledError:
            self._forget(job)
            raise
        finally:
            del job  # a future holds its exception, which holds this frame: see Decoders

    def close(self) -> None:
        """Let the current run end, fail what still waits with Closed, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._waiting_images -= len(job.images)

    def _work(self) -> None:
        while jobs := self._take():
            began, together = time.perf_counter(), sum(len(job.images) for job in jobs)
            if self._waited:
                for job in jobs:
                    self._waited(began - job.queued_at)
            results = self._run_together(jobs)
            ended = time.perf_counter()
            for job in jobs:
                job.began_at, job.ended_at, job.together = began, ended, together
            with self._changed:
                self._running_images -= together
            # All jobs of one batch nearly always share a loop: one wake-up answers them all.
            for loop in {job.loop for job in jobs}:
                answers = [
                    (job, result) for job, result in zip(jobs, results, strict=True) if job.loop is loop
                ]
                _call_in(loop, _resolve, answers)

    def _take(self) -> list[_Job]:
        """-> the jobs of the next batch, waiting for one; [] when closed.

        At most this worker's share of all images that wait or run, rounded up: with 32 clients that
        each wait for their answer, a worker that took all 32 would have the others wait for the next
        ones until it is done.
        """
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            if self._closed:
                for job in self._jobs:
                    _call_in(job.loop, _resolve, [(job, Closed())])
                return []
            share = -(-(self._waiting_images + self._running_images) // len(self._threads))
            jobs = [self._jobs.popleft()]
            images = len(jobs[0].images)
            while self._jobs and images + len(self._jobs[0].images) <= min(self._max_batch, share):
                jobs.append(self._jobs.popleft())
                images += len(jobs[-1].images)
            self._waiting_images -= images
            self._running_images += images
            return jobs

    def _run_together(self, jobs: list[_Job]) -> list[Outputs | Exception]:
        """-> one result for each job. When the batch fails each job is tried alone,
        so the fault stays with its owner."""
        try:
            outputs = self._run_in_pieces(
                jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
            )
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [self._run_together([job])[0] for job in jobs]
        results: list[Outputs | Exception] = []
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.images))
            results.append(outputs.rows(rows))
            start = rows.stop
        return results

    def _run_in_pieces(self, images: np.ndarray) -> Outputs:
        pieces = []
        for start in range(0, len(images), self._max_batch):
            piece = images[start : start + self._max_batch]
            began = time.perf_counter()
            outputs = self._run(piece)
            if len(outputs.logits) != len(piece):
                raise RuntimeError(f"the model gave {len(outputs.logits)} rows for {len(piece)} images")
            if self._observe:
                self._observe(len(piece), time.perf_counter() - began)
            pieces.append(outputs)
        if len(pieces) == 1:
            return pieces[0]
        return Outputs.joined(pieces)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Schedule in `loop`; a loop that was closed meanwhile has nobody left to answer."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)


def _resolve(results: list[tuple[_Job, Outputs | Exception]]) -> None:
    for job, result in results:
        if job.future.done():  # its client went away
            continue
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
