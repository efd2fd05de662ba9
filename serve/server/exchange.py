"""A request and its answer: the body on its way in, a client that leaves, errors as statuses."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.responses import Response
from starlette.types import Receive

from ffl_deploy.images import ImageError
from serve.server.batcher import Closed, Overloaded
from serve.server.models import NonFinite
from serve.server.protocol import ProtocolError
from serve.server.responses import json_response

REFUSALS = (ProtocolError, ImageError, NonFinite, Overloaded, Closed)
"""What `refusal` has an answer to."""


WATCHED_AFTER_SECONDS = 0.1
"""From then on a request that waits for its answer ends when its client goes away."""

CLOSING = "the server is shutting down"


class ClientGone(Exception):
    """Nobody is waiting for the answer any more."""


def refused_as(error: Exception, model: str) -> tuple[int, dict[str, str]]:
    """-> (status, what it says) of one of REFUSALS; `model` was asked."""
    if isinstance(error, ProtocolError):
        return 400, {"error": str(error)}
    if isinstance(error, ImageError):
        return 400, {"error": str(error), "code": error.code}
    if isinstance(error, NonFinite):
        return 500, {"error": str(error), "code": "nonfinite"}
    busy = f"{model} has too much to do; try again" if isinstance(error, Overloaded) else CLOSING
    return 503, {"error": busy}


def refusal(error: Exception, model: str) -> Response:
    """-> the response that tells a client of one of REFUSALS; `model` was asked."""
    status, content = refused_as(error, model)
    return json_response(content, status, {"retry-after": "1"} if status == 503 else None)


async def read_body(receive: Receive) -> bytes:
    """-> the whole body; its size was bounded by the middleware. Raises ClientGone."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class WhileConnected:
    """`async with WhileConnected(receive):` runs the block until the client goes away, then raises ClientGone
    in it: its place in the queue becomes free.

    Nobody listens for that at first: a task for each request would cost more than reading it does, and most
    have their answer by then.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._gone = receive, False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(WATCHED_AFTER_SECONDS, self._begin)

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if isinstance(error, asyncio.CancelledError) and self._gone and self._task.uncancel() == 0:
            raise ClientGone from None
