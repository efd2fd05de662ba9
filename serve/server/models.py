"""The models a server holds: opened, verified, each behind its micro-batcher."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import check_files
from ffl_deploy.bundle_files import AUTO
from ffl_deploy.decisions import Decisions
from ffl_deploy.errors import DeviceLost, UsageError
from ffl_deploy.host import available_cores
from ffl_deploy.images import Decoded, ImageError, decode, prepare
from ffl_deploy.manifest import Variant
from ffl_deploy.preprocessing import Pixels
from ffl_deploy.runtime import Outputs, Session, require_gpu_runtime, runtime_named
from ffl_deploy.selfcheck import require_golden
from serve.server.batcher import MicroBatcher, Overloaded
from serve.server.noted import step
from serve.server.protocol import Signature
from serve.server.settings import Limits, ModelSpec, Settings
from serve.server.statistics import ModelStatistics

T = TypeVar("T")

ObserveBatch = Callable[[str, int, float], None]
"""Called after each run with (model name, images, seconds)."""


ObserveExit = Callable[[str, str, int], None]
"""Called after each run of a cascade with (model name, a classifier, images that it answered)."""


DeviceFailed = Callable[[DeviceLost], None]
"""Called when a GPU failed in a way that only a new process comes back from."""


class NonFinite(Exception):
    """The model gave NaN or infinity: there is no answer for this image."""


@dataclass(frozen=True)
class ServedModel:
    """One bundle's variant under the name that clients use."""

    name: str
    bundle: Bundle
    variant: Variant
    session: Session
    batcher: MicroBatcher
    signature: Signature
    why: str = ""  # this variant, where the machine chose it
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    decisions: Decisions = field(default_factory=Decisions)  # --sets is among them

    def results(self, outputs: Outputs) -> dict[str, np.ndarray]:
        """-> each output of the protocol by its name: the graph's, and what is decided by them."""
        return named_results(outputs, self.decisions)

    async def infer(self, images: np.ndarray) -> Outputs:
        """uint8 [n, height, width, 3] -> Outputs. Raises NonFinite, Overloaded."""
        outputs = await self.batcher.infer(images)
        if not outputs.all_finite:
            raise NonFinite(f"{self.name} gave NaN or infinite values for {_bad_rows(outputs.finite)}")
        return outputs


def named_results(outputs: Outputs, decisions: Decisions) -> dict[str, np.ndarray]:
    """-> what `ServedModel.results` says of `outputs`."""
    named = {name: values for name, values in outputs._asdict().items() if values is not None}
    return named | decisions.tensors(outputs)


def _bad_rows(finite: np.ndarray) -> str:
    rows = np.flatnonzero(~finite)
    return f"image {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {len(finite)} images"


class Decoders:
    """Decodes image files on a few threads; a file that cannot be decoded fails its own request before it
    meets a batch.

    Requests take turns, a file at a time: one with 64 large pictures holds nobody else up for longer than one
    of them takes. Used from one event loop.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = available_cores()
        self._threads = ThreadPoolExecutor(self._free, thread_name_prefix="decode")
        self._requests: deque[deque[_Job]] = deque()
        self._waiting = 0

    async def decode(self, data: bytes) -> Decoded:
        """-> the decoded image. Raises ImageError, Overloaded."""
        return await self.run(lambda: decode(data, self._limits.pixels, apart=False))

    async def prepare(self, files: Sequence[bytes], model: ServedModel) -> np.ndarray:
        """-> uint8 [n, height, width, 3]: what `model` is fed. Raises ImageError, Overloaded."""
        preprocessing = model.bundle.preprocessing
        left = self._limits.request_pixels

        def one(data: bytes) -> Pixels:
            nonlocal left
            if left <= 0:
                most = self._limits.request_pixels // 1_000_000
                raise ImageError(
                    "too_large", f"the images of this request have more than {most} megapixels together"
                )
            pixels = decode(data, self._limits.pixels, apart=False).pixels
            left -= pixels.shape[0] * pixels.shape[1]
            return prepare(pixels, preprocessing)

        with step("decode", len(files)):
            return np.stack(await self._run([partial(one, data) for data in files]))

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """-> what `function` gives on one of the threads. Raises what it raises, Overloaded."""
        return (await self._run([partial(function, *arguments)]))[0]

    async def _run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """-> the results of one request's jobs; of none of them, where one fails."""
        if self._waiting + len(functions) > self._limits.queued_decodes:
            raise Overloaded
        loop = asyncio.get_running_loop()
        jobs = deque(_Job(function, loop.create_future()) for function in functions)
        futures = [job.future for job in jobs]
        self._waiting += len(jobs)
        self._requests.append(jobs)
        self._start()
        try:
            return await asyncio.gather(*futures)
        finally:
            self._waiting -= len(functions)
            jobs.clear()  # what has not begun never does
            # An exception holds this frame, and a future its exception: in that circle a refused request's
            # files would stay until the collector comes.
            while futures:
                futures.pop().cancel()

    def _start(self) -> None:
        """Give the free threads work, one file of each request after the other."""
        while self._free and self._requests:
            jobs = self._requests.popleft()
            if not jobs:
                continue
            job = jobs.popleft()
            self._requests.append(jobs)
            self._free -= 1
            running = asyncio.get_running_loop().run_in_executor(self._threads, job.function)
            running.add_done_callback(partial(self._done, job))

    def _done(self, job: _Job, running: asyncio.Future[Any]) -> None:
        self._free += 1
        self._start()
        failure = running.exception() if not running.cancelled() else None
        if job.future.done():
            return
        if running.cancelled():
            job.future.cancel()
        elif failure:
            job.future.set_exception(failure)
        else:
            job.future.set_result(running.result())

    def close(self) -> None:
        self._requests = deque()
        self._threads.shutdown(cancel_futures=True)


class _Job(NamedTuple):
    function: Callable[[], Any]
    future: asyncio.Future[Any]


def check_specs(specs: Iterable[ModelSpec], public_key: Path | None = None) -> None:
    """Refuse unusable bundles before a port is opened: manifests, variants, names. Raises UsageError,
    CheckError."""
    names: set[str] = set()
    for spec in specs:
        bundle = load_bundle(spec.folder, public_key)
        if spec.variant != AUTO:
            bundle.variant(spec.variant)
        if spec.name in names:
            raise UsageError(f"two bundles are called {spec.name!r}; rename one: OTHER={spec.folder}")
        names.add(spec.name)


def open_model(
    spec: ModelSpec,
    settings: Settings,
    observe: ObserveBatch,
    lost: DeviceFailed = lambda error: None,
    left: ObserveExit = lambda model, exit, images: None,
) -> ServedModel:
    """Load and verify one bundle: every file's hash,
    then the golden samples through the session that will serve.

    Raises CheckError, UsageError.
    """
    bundle = load_bundle(spec.folder, settings.public_key)
    check_files(bundle)
    _, threads = workers_and_threads(settings, settings.runtime)
    choice = bundle.fastest(settings.runtime, threads) if spec.variant == AUTO else None
    variant = bundle.variant(choice.variant if choice else spec.variant)
    runtime = choice.runtime if choice else settings.runtime or variant.runtime
    if settings.gpu is not None:
        require_gpu_runtime(runtime)
    decisions = Decisions.of(variant, settings.sets)
    workers, threads = workers_and_threads(settings, runtime)
    session = bundle.session(variant.name, runtime, threads, check=False)
    outputs = verify(bundle, variant, session, settings.max_batch, threads)
    preprocessing = bundle.preprocessing
    shapes = {name: values.shape[1:] for name, values in named_results(outputs, decisions).items()}
    signature = Signature(
        spec.name,
        preprocessing.height,
        preprocessing.width,
        bundle.classes,
        shapes,
        settings.limits.images_per_request,
        platform=f"{session.runtime}_{session.computed or variant.precision.computed}",
    )

    def run(images: np.ndarray) -> Outputs:
        try:
            outputs = session.run(images)
        except DeviceLost as error:
            lost(error)
            raise
        if outputs.exit is not None:
            for number, name in enumerate(variant.exits):
                left(spec.name, name, int((outputs.exit == number).sum()))
        return outputs

    statistics = ModelStatistics()

    def ran(images: int, seconds: float) -> None:
        observe(spec.name, images, seconds)
        statistics.ran(images, seconds)

    batcher = MicroBatcher(
        run,
        max_batch=settings.max_batch,
        workers=workers,
        max_queue=settings.limits.queued_images,
        observe=ran,
        waited=statistics.waited,
        name=spec.name,
    )
    why = choice.why if choice else ""
    model = ServedModel(spec.name, bundle, variant, session, batcher, signature, why, statistics, decisions)
    # One that was replaced or unloaded ends when the last request that holds it has its answer. In a thread:
    # a run whose client went away may still take its time.
    weakref.finalize(model, lambda: Thread(target=batcher.close, daemon=True).start()).atexit = False
    return model


def workers_and_threads(settings: Settings, runtime: str | None) -> tuple[int, int]:
    """-> (runs of one model at a time, cores of each).

    Two runs share the cores of a processor; of a GPU they would halve the batches and take turns.
    """
    on_gpu = runtime is not None and runtime_named(runtime).gpu
    workers = min(settings.workers or (1 if on_gpu else 2), available_cores())
    return workers, settings.threads or max(1, available_cores() // workers)


def verify(
    bundle: Bundle, variant: Variant, session: Session, max_batch: int, threads: int | None = None
) -> Outputs:
    """Compare the session with the golden samples by the gate of the variant's precision;
    -> its outputs for the first one.

    It also is the warm-up: the largest and the smallest batch have run before the first request.
    Raises CheckError.
    """
    require_golden(bundle, variant, session, threads, batches=[1, max_batch])
    images = bundle.golden().images
    for size in session.warm_up_sizes(max_batch):
        session.run(np.resize(images, (size, *images.shape[1:])))
    return session.run(images[:1])


async def timed_infer(model: ServedModel, images: np.ndarray) -> tuple[Outputs, float]:
    """-> (outputs, seconds in the queue and the model)."""
    began = time.perf_counter()
    return await model.infer(images), time.perf_counter() - began
