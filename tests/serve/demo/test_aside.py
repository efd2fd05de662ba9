"""What blocks in an upload blocks nobody else."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from serve.demo.aside import Aside


def test_the_event_loop_goes_on_while_an_upload_blocks() -> None:
    may_end = threading.Event()

    async def blocking(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert may_end.wait(60), "the loop that would let it end was blocked"
        await send({"type": "said", "body": message["body"]})

    async def run() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x"}

        async def send(message: Any) -> None:
            sent.append((message, threading.current_thread() is threading.main_thread()))

        aside = Aside(blocking)
        request = asyncio.create_task(aside({"type": "http"}, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        may_end.set()
        await request
        aside.close()
        return sent

    assert asyncio.run(run()) == [({"type": "said", "body": b"x"}, True)]


def test_what_it_raises_comes_through() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("no")

    async def run() -> None:
        aside = Aside(failing)
        try:
            await aside({}, None, None)  # type: ignore[arg-type]
        finally:
            aside.close()

    with pytest.raises(OSError, match="no"):
        asyncio.run(run())
