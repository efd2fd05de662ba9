"""Compressed answers, and compressed requests (gzip, deflate), unpacked piece by piece before their size is
looked at.

Standing outside `limits.Bodies`, `Inflate` gives that the unpacked bytes: what a body may hold, and what all
of them may, is then the same whether it came compressed or not, and a bomb is refused once it has unpacked to
that.
"""

from __future__ import annotations

import asyncio
import zlib

from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.server.headers import header
from serve.server.responses import Refused

PIECE = 256 * 1024
"""Bytes that are unpacked at a time."""
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Content-Encoding -> zlib's; HTTP's deflate is zlib's format (RFC 9110, 8.4.1.2)."""
UNREADABLE = "the body is not what its Content-Encoding says"

COMPRESSED_FROM, COMPRESSION_LEVEL = 16 * 1024, 1
"""Answers from so many bytes on are compressed for clients that ask for it, fast rather than small: logits
hardly compress, JSON does."""


class Compress:
    """Compresses the answers of `app` where it pays. A POST of a client that takes them only as they are goes
    by it: no cache keeps its answer, so that there is nothing to say of how it would vary."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self._compressing = app, GZipMiddleware(app, COMPRESSED_FROM, COMPRESSION_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope.get("method") == "POST" and header(scope, b"accept-encoding") is None
        await (self.app if plain else self._compressing)(scope, receive, send)


class Inflate:
    """Unpacks bodies below `prefix`; what is elsewhere, or otherwise encoded, passes as it came."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = header(scope, b"content-encoding") if scope["type"] == "http" else None
        if encoding not in WINDOW_BITS or not scope["path"].startswith(self.prefix):
            return await self.app(scope, receive, send)
        left = [
            (name, value)
            for name, value in scope["headers"]
            if name not in (b"content-encoding", b"content-length")
        ]
        body = _Unpacked(receive, WINDOW_BITS[encoding])
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if body.broken and not started:
                return  # whatever the application makes of it; the refusal below is the answer
            started = True
            await send(message)

        try:
            await self.app({**scope, "headers": left}, body.receive, watched_send)
        except Refused:
            if started or not body.broken:
                raise
        if body.broken and not started:
            await Refused(400, UNREADABLE)(scope, receive, send)
        return None


class _Unpacked:
    """One body on its way in."""

    def __init__(self, receive: Receive, window_bits: int) -> None:
        self._receive = receive
        self._unpack = zlib.decompressobj(window_bits)
        self._waiting, self._complete = b"", False  # packed bytes that came, and whether these are all
        self.broken = False

    async def receive(self) -> Message:
        if self._complete and not self._waiting:
            return await self._receive()  # waits for the client to go away
        first = not self._waiting
        if first:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._waiting, self._complete = message.get("body", b""), not message.get("more_body", False)
        try:
            # a few kB hold 32 MiB, during which nobody else would be answered
            unpack, waiting = self._unpack.decompress, self._waiting
            piece = unpack(waiting, PIECE) if first else await asyncio.to_thread(unpack, waiting, PIECE)
        except zlib.error:
            self._refuse()
        self._waiting = self._unpack.unconsumed_tail
        ended = self._complete and not self._waiting
        if ended and (not self._unpack.eof or self._unpack.unused_data):
            self._refuse()
        return {"type": "http.request", "body": piece, "more_body": not ended}

    def _refuse(self) -> None:
        self.broken = True
        raise Refused(400, UNREADABLE)
