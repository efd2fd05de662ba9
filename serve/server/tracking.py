"""The outermost middleware: counts, times and logs every request,
and ends connections while the server closes."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.server import noted
from serve.server.headers import header
from serve.server.noted import Notes
from serve.server.service import Phase, Service

_ID_CHARACTERS = frozenset(map(chr, range(0x21, 0x7F)))  # what a header can hold anywhere, without spaces
REQUEST_ID = "ffl.request_id"  # of a scope
LONGEST_PATH = 1024  # characters of a path that a log line repeats


def route_of(path: str) -> str:
    """-> the label of a path: one of a few, so that no client can grow the metrics."""
    if path.endswith("/infer"):
        return "infer"
    if path.startswith("/v2/health"):
        return "health"
    if path == "/v2" or path.startswith("/v2/"):
        return "v2"
    return path[1:] if path in ("/metrics", "/classify") else "demo"


ROUTES = {
    "infer": "/v2/models/{model}/infer",
    "health": "/v2/health",
    "v2": "/v2",
    "metrics": "/metrics",
    "classify": "/classify",
    "demo": "/",
}
"""What `route_of` gives -> a path with its variable part named."""


def short_and_plain(given: str) -> bool:
    """-> whether a client's own request id is repeated."""
    return 0 < len(given) <= noted.LONGEST and _ID_CHARACTERS.issuperset(given)


class RequestIds:
    """-> the client's own id of a request, where it is short and plain, else one of this server's."""

    def __init__(self) -> None:
        self._numbers, self._prefix = itertools.count(1), os.urandom(4).hex()

    def __call__(self, given: str, said: dict[str, str]) -> str:
        """said: of its log line, which repeats the beginning of an id that cannot be the request's."""
        if short_and_plain(given):
            return given
        if given:
            said["sent_request_id"] = given[: noted.LONGEST]
        return f"{self._prefix}-{next(self._numbers)}"


class Asked(NamedTuple):
    """A request, for its log line and its trace. notes: the method, over HTTP the path, and what became known
    of it; probe: whether failing is the answer that was asked for; headers: with its `traceparent`."""

    notes: Notes
    client: str
    request_id: str
    probe: bool
    headers: Mapping[str, str]
    began: float  # of time.perf_counter


class Span(NamedTuple):
    """What OpenTelemetry's conventions say of a request that has its answer. fault: of this server."""

    name: str
    attributes: dict[str, str | int]
    fault: str = ""


def record(
    service: Service,
    asked: Asked,
    route: str,
    status: int | str,
    described: Callable[[], Span],
    *,
    failed: bool,
) -> None:
    """Count, time and trace a request that has its answer, and log it where somebody may have to know.
    described: -> its span, asked for where there are traces."""
    seconds, said = time.perf_counter() - asked.began, asked.notes.said
    if service.traces is not None and not asked.probe and route != "metrics":
        span, known = described(), {f"ffl.{name}": said[name] for name in ("model", "id") if name in said}
        ids: dict[str, str | int] = {"client.address": asked.client, "ffl.request_id": asked.request_id}
        trace = service.traces.request(
            span.name,
            asked.began,
            seconds,
            {**span.attributes, **ids, **known},
            fault=span.fault,
            steps=asked.notes.steps,
            parent=asked.headers,
        )
        if trace:
            said["trace_id"] = trace
    service.metrics.requests.labels(route, str(status)).inc()
    service.metrics.request_seconds.labels(route).observe(seconds)
    if service.settings.access_log or (failed and not asked.probe):
        service.log.log(
            logging.WARNING if failed else logging.INFO,
            "request",
            extra={
                **said,
                "status": status,
                "milliseconds": round(seconds * 1000, 2),
                "client": asked.client,
                "request_id": asked.request_id,
            },
        )


class Tracking:
    """Every response carries `x-request-id` (the client's own, if it is short and plain), which the log line
    repeats, together with the `id` of an inference request's body."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._ids = RequestIds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # who asks, and when
        metrics = self.service.metrics
        began = time.perf_counter()
        said = {"method": scope["method"], "path": scope["path"][:LONGEST_PATH]}
        scope[REQUEST_ID] = request_id = self._ids(header(scope, b"x-request-id") or "", said)
        notes = noted.begin(said)
        status = 499  # nginx's number for a client that left before its answer

        # the answer, on its way out
        async def tracked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = headers = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
                if self.service.phase is Phase.CLOSING:
                    headers.append((b"connection", b"close"))
            await send(message)

        # the request; whatever becomes of it is counted, and logged where somebody may have to know
        metrics.in_flight.inc()
        try:
            await self.app(scope, receive, tracked_send)
        except Exception:
            status = 500
            raise
        finally:
            metrics.in_flight.dec()
            route = route_of(scope["path"])
            client = (scope.get("client") or ("",))[0]
            asked = Asked(notes, client, request_id, route == "health", Headers(scope=scope), began)
            span = partial(_http_span, said, route, status)
            record(self.service, asked, route, status, span, failed=status >= 400)
        return None


def _http_span(said: Mapping[str, str], route: str, status: int) -> Span:
    """https://opentelemetry.io/docs/specs/semconv/http/http-spans/: named by the route, of which there are
    few."""
    route = ROUTES[route]
    attributes: dict[str, str | int] = {
        "http.request.method": said["method"],
        "http.route": route,
        "url.path": said["path"],
        "http.response.status_code": status,
    }
    return Span(f"{said['method']} {route}", attributes, str(status) if status >= 500 else "")
