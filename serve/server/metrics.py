"""Prometheus metrics of one server, in a registry of its own: no globals,
so tests may run several servers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ffl_deploy.runtime.gpu import Memory

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms; the label values are few by construction (routes, not paths)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ffl_requests", "Answered requests.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "ffl_request_seconds",
            "From the request's header to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "ffl_requests_in_flight", "Requests that are being read or answered.", registry=registry
        )
        self.images = Counter("ffl_images", "Images that a model has answered.", ["model"], registry=registry)
        self.batch_images = Histogram(
            "ffl_batch_images", "Images in one run.", ["model"], buckets=_BATCH_SIZES, registry=registry
        )
        self.run_seconds = Histogram(
            "ffl_run_seconds", "One run of a model.", ["model"], buckets=_SECONDS, registry=registry
        )
        self.exits = Counter(
            "ffl_exit_images",
            "Images that a cascade's classifier has answered; the last exit's are those that were deferred.",
            ["model", "exit"],
            registry=registry,
        )
        self.queue = Gauge("ffl_queue_images", "Images that wait for a model.", ["model"], registry=registry)
        self.ready = Gauge(
            "ffl_ready",
            "1 when every bundle has loaded and verified and the server is not draining.",
            registry=registry,
        )
        self.model_info = Info("ffl_model", "What is served.", ["model"], registry=registry)
        self.gpu_memory: Gauge | None = None  # where no model computes on a GPU

    def observe_batch(self, model: str, images: int, seconds: float) -> None:
        """A model has run; called from its batcher's thread."""
        self.images.labels(model).inc(images)
        self.batch_images.labels(model).observe(images)
        self.run_seconds.labels(model).observe(seconds)

    def observe_exit(self, model: str, exit: str, images: int) -> None:
        """A cascade has answered so many images by that classifier."""
        self.exits.labels(model, exit).inc(images)

    def watch_queue(self, model: str, waiting: Callable[[], int]) -> None:
        """Let the gauge of `model` call `waiting` when it is scraped."""
        self.queue.labels(model).set_function(waiting)

    def forget_model(self, model: str) -> None:
        """Show nothing more of a model that was unloaded but what it has counted."""
        self.queue.remove(model)
        self.model_info.remove(model)

    def watch_gpu(self, name: str, memory: Callable[[], Memory | None]) -> None:
        """Show the memory of the GPU that models compute on; it is asked for when it is scraped."""

        def bytes_of(kind: str) -> float:
            found = memory()
            return float("nan") if found is None else float(getattr(found, kind))

        if self.gpu_memory is None:
            self.gpu_memory = Gauge(
                "ffl_gpu_memory_bytes",
                "Of the GPU's own memory: all of it, and what is used by any process.",
                ["gpu", "kind"],
                registry=self.registry,
            )
        for kind in Memory._fields:
            self.gpu_memory.labels(name, kind).set_function(partial(bytes_of, kind))

    def text(self) -> bytes:
        """-> the exposition format of all metrics."""
        return generate_latest(self.registry)
