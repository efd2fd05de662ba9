"""The outermost middleware: counts, times and logs every request,
and ends connections while the server closes."""

from __future__ import annotations

import itertools
import os
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.server.service import Phase, Service

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def route_of(path: str) -> str:
    """-> the label of a path: one of a few, so that no client can grow the metrics."""
    if path.endswith("/infer"):
        return "infer"
    if path.startswith("/v2/health"):
        return "health"
    if path == "/v2" or path.startswith("/v2/"):
        return "v2"
    return path[1:] if path in ("/metrics", "/classify") else "demo"


def short_and_plain(given: str) -> bool:
    """-> whether a client's own request id is repeated."""
    return 0 < len(given) <= 64 and _ID_CHARACTERS.issuperset(given)


class Tracking:
    """Every response carries `x-request-id` (the client's own, if it is short and plain),
    which the log lines repeat."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._numbers = itertools.count(1)
        self._prefix = os.urandom(4).hex()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # who asks, and when
        metrics = self.service.metrics
        began = time.perf_counter()
        request_id = self._request_id(scope)
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
            seconds = time.perf_counter() - began
            route = route_of(scope["path"])
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(seconds)
            if self.service.settings.access_log or (status >= 400 and route != "health"):
                self.service.log.log(
                    30 if status >= 400 else 20,
                    "request",
                    extra={
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "milliseconds": round(seconds * 1000, 2),
                        "client": (scope.get("client") or ("",))[0],
                        "request_id": request_id,
                    },
                )
        return None

    def _request_id(self, scope: Scope) -> str:
        given = Headers(scope=scope).get("x-request-id")
        if short_and_plain(given or ""):
            return str(given)
        return f"{self._prefix}-{next(self._numbers)}"
