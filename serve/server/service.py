"""What one server process is doing: its models, its phase, its counters.
Created once and handed to every part."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING

from ffl_deploy.errors import DeviceLost
from ffl_deploy.runtime.gpu import memory
from serve.server.limits import Room
from serve.server.logs import LOGGER
from serve.server.metrics import Metrics
from serve.server.models import Decoders, ServedModel, open_model
from serve.server.settings import ModelSpec, Settings

if TYPE_CHECKING:
    from serve.server.tracing import Traces


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # not ready any more, still answering everybody
    CLOSING = "closing"  # the port is closed; every answer ends its connection


class Service:
    """`models` is complete in phase READY: a model is listed once it is verified,
    the service is ready once all are."""

    def __init__(self, settings: Settings, stop: Callable[[], None] = lambda: None) -> None:
        """stop: ends the server; may be called from any thread."""
        self.settings, self.stop = settings, stop
        self.metrics = Metrics()
        self.decoders = Decoders(settings.limits)
        self.room = Room(settings.limits)
        self.traces: Traces | None = None
        if settings.otlp is not None:
            from serve.server import tracing  # an extra

            self.traces = tracing.Traces(tracing.exporter_to(settings.otlp))
        self.models: dict[str, ServedModel] = {}
        self._names = [spec.name for spec in settings.models]
        self.phase = Phase.STARTING
        self.failure: Exception | None = None  # why loading, or serving, ended; the command raises it
        self.url = ""  # where it listens, once it does
        self.grpc_port: int | None = None  # on which, once it does
        # called to end the streams that would never end by themselves
        self.endless: list[Callable[[], None]] = []
        self.endings: list[Callable[[], None]] = []  # called when no request is left
        self.changed: list[Callable[[], Awaitable[None]]] = []  # called when a bundle was replaced
        self._started = time.monotonic()
        self.log = logging.getLogger(LOGGER)

    async def load_models(self) -> None:
        """Open and verify every bundle, one after the other: each already uses all cores. Raises CheckError,
        UsageError."""
        for spec in self.settings.models:
            await self.load_model(spec)

    async def load_model(self, spec: ModelSpec) -> None:
        """Open and verify one bundle, and only then let it answer in the place of what had its name. What was
        asked of that is still answered by it. Raises CheckError, UsageError."""
        model = await asyncio.to_thread(
            open_model,
            spec,
            self.settings,
            self.metrics.observe_batch,
            self.lose,
            self.metrics.observe_exit,
        )
        held = {**self.models, spec.name: model}
        self.models = {name: held[name] for name in self._names if name in held}
        self.metrics.watch_queue(spec.name, lambda batcher=model.batcher: batcher.waiting_images)  # type: ignore[misc]
        identity = {
            "variant": model.variant.name,
            "runtime": model.session.runtime,
            "bundle_sha256": model.bundle.sha256,
        }
        if model.session.gpu:
            self.metrics.watch_gpu(model.session.gpu, memory)
        self.metrics.model_info.labels(spec.name).info(identity)
        chosen = {"why": model.why} if model.why else {}
        self.log.info(
            "model verified", extra={"model": spec.name, "folder": str(spec.folder), **identity, **chosen}
        )
        try:
            for tell in self.changed:
                await tell()
        except Exception:  # a page that shows old texts is no reason to say that the model was not loaded
            self.log.exception("what is shown of the models could not be renewed")

    def unload_model(self, name: str) -> None:
        """Let a model answer nothing more; what was asked of it is still answered."""
        self.models = {other: model for other, model in self.models.items() if other != name}
        self.metrics.forget_model(name)
        self.log.info("model unloaded", extra={"model": name})

    def lose(self, error: DeviceLost) -> None:
        """A GPU failed for good: no answer can come from this process any more. It is not ready from now on,
        and ends with the reason, so that whoever started it starts another. Called from a batcher's
        thread."""
        if self.failure is None:
            self.failure = error
            self.become(Phase.DRAINING)
            self.log.error("the GPU failed", extra={"reason": str(error)})
            self.stop()

    def become(self, phase: Phase) -> None:
        """Enter `phase`, never going back: a draining server does not become ready again."""
        if list(Phase).index(phase) < list(Phase).index(self.phase):
            return
        self.phase = phase
        self.metrics.ready.set(phase is Phase.READY)
        if phase is Phase.CLOSING:
            for end in self.endless:
                end()

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    @property
    def ending(self) -> bool:
        """-> whether no new request should come any more."""
        return self.phase in (Phase.DRAINING, Phase.CLOSING)

    def log_ready(self) -> None:
        seconds = round(time.monotonic() - self._started, 2)
        grpc = {} if self.grpc_port is None else {"grpc_port": self.grpc_port}
        self.log.info(
            "ready", extra={"url": self.url, **grpc, "models": sorted(self.models), "seconds": seconds}
        )
        if self.settings.demo and self.settings.log_format == "text":
            self.log.info(f"open {self.url} in a browser; Ctrl-C ends the server")

    def close(self) -> None:
        """Stop the threads; called when no request is left."""
        for model in self.models.values():
            model.batcher.close()
        for end in self.endings:
            end()
        if self.traces is not None:
            self.traces.close()
        self.decoders.close()
