"""A request and its answer: the body on its way in, a client that leaves, errors as statuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive

from ffl_deploy.images import ImageError
from serve.server.batcher import Closed, Overloaded
from serve.server.models import NonFinite
from serve.server.protocol import ProtocolError
from serve.server.responses import json_response

REFUSALS = (ProtocolError, ImageError, NonFinite, Overloaded, Closed)
"""What `refusal` has an answer to."""


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


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Run the block until the client goes away, then raise ClientGone in it:
    its place in the queue becomes free."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
