"""What Gradio remembers of its sessions is bounded here: its own bounds are 760 MB, and none.

Every open page is a session, and so is every call of the API that names none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

SWEEP_SECONDS = 10.0


def bound_states(page: gr.Blocks, count: int) -> None:
    """Keep the states of the `count` sessions that were used last. To be called before the page is mounted.

    A state holds a copy of the page's configuration, 76 KB, and Gradio keeps 10,000. Nothing is lost with an
    old one, because no component of ours has a state of its own.
    """
    page.state_session_capacity = count


@contextlib.asynccontextmanager
async def finished_sessions_forgotten(page: gr.Blocks) -> AsyncIterator[None]:
    """While the block runs, drop the queues of finished sessions every SWEEP_SECONDS."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            forget_finished(page)

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def forget_finished(page: gr.Blocks) -> None:
    """Drop the queues of sessions that wait for nothing, or whose answers Gradio has dropped;
    the next event makes new ones.

    Gradio never removes a session from `pending_event_ids_session` unless its client breaks off.
    """
    events, messages = page._queue.pending_event_ids_session, page._queue.pending_messages_per_session
    for session in [name for name, waited_for in events.items() if not waited_for or name not in messages]:
        del events[session]
        messages.pop(session, None)
