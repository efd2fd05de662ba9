"""An application that may block: its requests run on an event loop of their own, in a thread.

Gradio opens, moves and looks at each file of an upload on the event loop that everybody's answers wait for: a
thousand small files stopped it for seconds on a slow disk.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")


class Aside:
    """Runs `app` in a thread that is started by the first request; messages pass between the two loops."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=[self._loop], name="uploads", daemon=True)
            self._thread.start()

        async def receive_there() -> Message:
            return await _of_loop(receive(), here)

        async def send_there(message: Message) -> None:
            await _of_loop(send(message), here)

        await _of_loop(self.app(scope, receive_there, send_there), self._loop)

    def close(self) -> None:
        """End the thread; called when no request is left."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _awaited(work: Awaitable[T]) -> T:
    return await work


async def _of_loop(work: Awaitable[T], loop: asyncio.AbstractEventLoop) -> T:
    """-> what `work` gives in another loop. Raises what it raises; cancelled with its caller."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_awaited(work), loop))
