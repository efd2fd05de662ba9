"""What a connection may cost before its request is known: bytes of headers, seconds until they are complete,
and how many connections may wait at all.

uvicorn's protocol has no limit on headers, and counts connections that send nothing as requests: a megabyte
of header lines took 24 times its size, and a thousand silent connections turned everybody away (vLLM's
GHSA-rxc4-3w6r-4v47 is the first of the two). A connection waits from its opening, or from its last answer,
to the last byte of its next request's headers. Where too many wait, those that have waited longest are
closed; a request that is being answered never is.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.server.settings import Limits

REFUSALS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}
PIPELINED = 16
"""Requests that one connection may send before the first is answered; clients hardly ever send two."""


class Waiting:
    """The connections that wait for a request, in the order in which they began to; those that have never
    sent one are counted by address."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all: dict[BoundedProtocol, None] = {}
        self._silent: dict[str, dict[BoundedProtocol, None]] = {}

    def add(self, connection: BoundedProtocol) -> None:
        """Note that it waits from now on, and close what is too much."""
        self._all[connection] = None
        if connection.silent:
            of_address = self._silent.setdefault(connection.address, {})
            of_address[connection] = None
            if len(of_address) > self._limits.silent_connections:
                next(iter(of_address)).abandon()
        if len(connection.connections) >= self._limits.connections:
            next(iter(self._all)).abandon()

    def discard(self, connection: BoundedProtocol) -> None:
        self._all.pop(connection, None)
        of_address = self._silent.get(connection.address, {})
        of_address.pop(connection, None)
        if not of_address:
            self._silent.pop(connection.address, None)


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with `limits`. Made by `bounded`."""

    limits: Limits
    waiting: Waiting

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.silent = True  # has not sent a request yet
        self.address = self.client[0] if self.client else ""
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal = 400
        self._received = self._body = self._fields = 0
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self.cycle is not None and self.cycle.response_complete:
            self._await_headers()  # the next request of a connection that was kept
        self._received += len(data)
        super().data_received(data)
        # Whatever is not body: headers, trailers, and the sizes of chunks, which may be as small as a byte.
        overhead = self._received - self._body
        if self.parser is not None and overhead > self.limits.header_bytes + len(data) + 8 * self._body:
            self.refuse(431)

    # ---- the parser's callbacks; an exception in one of them ends as `send_400_response`

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._received = self._body = self._fields = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= PIPELINED:
            raise ValueError
        self._stop_waiting()
        self.silent = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:  # idle, and nothing of the next request is here yet
            self.waiting.add(self)

    # ---- what ends it

    def refuse(self, status: int) -> None:
        """Answer `status` and close, as nothing that follows could be told apart any more."""
        self._stop_waiting()
        if not self.transport.is_closing():
            text = f"HTTP/1.1 {status} {REFUSALS[status]}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(text.encode())
            self.transport.close()

    def abandon(self) -> None:
        """Close without a word: it waits, and others would have to."""
        self._stop_waiting()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._stop_waiting()
        if self._refusal == 400:
            super().send_400_response(msg)
        else:
            self.refuse(self._refusal)

    def _count(self, size: int) -> None:
        self._fields += size
        if self._fields > self.limits.header_bytes:
            self._refusal = 431
            raise ValueError

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(self.limits.header_seconds, self.refuse, 408)
        self.waiting.add(self)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.waiting.discard(self)


def bounded(limits: Limits) -> type[Any]:
    """-> the protocol of one server, for `uvicorn.Config(http=...)`."""
    return type("Bounded", (BoundedProtocol,), {"limits": limits, "waiting": Waiting(limits)})
