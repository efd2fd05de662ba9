"""OpenTelemetry traces of requests (`--otlp`): one span for each, and in it what decoding, waiting for the
model and running it have taken. Importing this imports the SDK, which only --otlp does.

A client's trace goes on where its `traceparent` says so (https://www.w3.org/TR/trace-context/). Names follow
https://opentelemetry.io/docs/specs/semconv/http/http-spans/ and .../rpc/grpc/. OpenTelemetry's own variables
hold, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import ffl_deploy
from serve.server.noted import Step

PATH = "/v1/traces"
TIMEOUT_SECONDS = 5  # of one delivery; at its end the server waits no longer for a collector
LONGEST_STATE = 512
"""Characters of `tracestate`, which has no bound of its own: as many as everybody has to hand on."""

_EPOCH = time.time_ns() - time.perf_counter_ns()


def exporter_to(endpoint: str) -> SpanExporter:
    """-> what sends spans to a collector's address for OTLP over HTTP, such as http://localhost:4318."""
    parts = urlsplit(endpoint)
    path = parts.path if parts.path.endswith(PATH) else parts.path.rstrip("/") + PATH
    return OTLPSpanExporter(urlunsplit(parts._replace(path=path)), timeout=TIMEOUT_SECONDS)


class Traces:
    """Makes spans of requests that have their answer. Called from any thread; a collector that does not
    answer costs spans, never a request."""

    def __init__(self, exporter: SpanExporter) -> None:
        own = Resource({SERVICE_NAME: "ffl-serve", SERVICE_VERSION: ffl_deploy.__version__})
        self._provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("serve.server", ffl_deploy.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(
        self,
        name: str,
        began: float,
        seconds: float,
        attributes: Mapping[str, str | int],
        *,
        fault: str,
        steps: Sequence[Step],
        parent: Mapping[str, str],
    ) -> str:
        """Make the spans of one request; -> its trace's id in hexadecimal, "" where it is not sampled.

        Args: began: of time.perf_counter; fault: what failed here, "" where nothing did; parent: the
        client's headers, of which traceparent and tracestate are taken.
        """
        span = self._tracer.start_span(
            name, self._context(parent), SpanKind.SERVER, dict(attributes), start_time=_nanoseconds(began)
        )
        inside = set_span_in_context(span, Context())
        for step in steps:
            images = {"ffl.images": step.images} if step.images else None
            child = self._tracer.start_span(
                step.name, inside, attributes=images, start_time=_nanoseconds(step.began)
            )
            child.end(_nanoseconds(step.ended))
        if fault:
            span.set_status(Status(StatusCode.ERROR, fault))
        span.end(_nanoseconds(began + seconds))
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else ""

    def _context(self, headers: Mapping[str, str]) -> Context:
        """-> what the client's headers say; a new trace where they say nothing that can be read."""
        state = headers.get("tracestate", "")
        carrier = {"traceparent": headers.get("traceparent", "")}
        if len(state) <= LONGEST_STATE:
            carrier["tracestate"] = state
        return self._propagator.extract(carrier, Context())

    def close(self) -> None:
        """Deliver what is left; a collector that does not take it in time does not hold up the end."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(TIMEOUT_SECONDS)


def _nanoseconds(moment: float) -> int:
    """-> since 1970, of a moment of time.perf_counter."""
    return _EPOCH + round(moment * 1e9)
