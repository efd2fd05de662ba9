"""The Gradio demo. Only `page` and what it imports load Gradio; the guard runs in front of it without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_gradio_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run `function` in a thread whose event loop runs: where none does,
    each of Gradio's locks makes one and never closes it."""

    async def with_loop() -> T:
        return function(*arguments)

    return await asyncio.to_thread(lambda: asyncio.run(with_loop()))
