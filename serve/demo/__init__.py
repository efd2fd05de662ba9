"""The Gradio demo. Only `page` and what it imports load Gradio; the guard runs in front of it without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_gradio_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function` in a thread that has an event loop: Gradio's locks make one each, never closed, where there is none."""

    def with_loop() -> T:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            return function(*arguments)
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    return await asyncio.to_thread(with_loop)
