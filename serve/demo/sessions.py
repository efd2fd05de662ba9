"""What Gradio remembers of its sessions and keeps of their files is bounded here: its own bounds are 760 MB,
and none.

Every open page is a session, and so is every call of the API that names none. Gradio's own pruning of files
walks a set to which uploads are added meanwhile, and ends for good at the first that is (`Set changed size`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from serve.demo.ages import Ages
from serve.server.logs import LOGGER

if TYPE_CHECKING:
    import gradio as gr

SWEEP_SECONDS = 10.0
PRUNE_SECONDS, KEPT_SECONDS = 300.0, 3600.0
UPLOADS_REMEMBERED = 64
OURS = ("examples", "reports")  # folders of what the page itself shows


def bound_states(page: gr.Blocks, count: int) -> None:
    """Keep the states of the `count` sessions that were used last. To be called before the page is mounted.

    A state holds a copy of the page's configuration, 76 KB, and Gradio keeps 10,000. Nothing is lost with an
    old one, because no component of ours has a state of its own.
    """
    page.state_session_capacity = count


@contextlib.asynccontextmanager
async def swept(page: gr.Blocks, folder: Path) -> AsyncIterator[None]:
    """While the block runs, forget finished sessions every SWEEP_SECONDS, and remove files of `folder` that
    are older than KEPT_SECONDS every PRUNE_SECONDS."""

    ages = Ages()

    async def sweep() -> None:
        prune_at = time.monotonic() + PRUNE_SECONDS
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                forget_finished(page)
                forget_progress()
                if time.monotonic() >= prune_at:
                    prune_at = time.monotonic() + PRUNE_SECONDS
                    gone = await asyncio.to_thread(prune, folder, KEPT_SECONDS, kept_files(page), ages)
                    for files in page.temp_file_sets:
                        files -= gone
            except Exception:  # the next sweep may succeed; without one, everything is kept for ever
                logging.getLogger(LOGGER).exception("a sweep of the demo failed")

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def kept_files(page: gr.Blocks) -> set[str]:
    """-> what the page itself shows: examples, the report's picture."""
    return {file for block in page.blocks.values() for file in getattr(block, "keep_in_cache", ())}


def prune(folder: Path, age: float, keep: set[str], ages: Ages) -> set[str]:
    """Remove the files in folders below `folder` that have not changed for `age` seconds, and the folders
    that this leaves empty; -> the files that are gone."""
    seen, gone = set[str](), set[str]()
    for parent, _, names in os.walk(folder, topdown=False):
        if os.path.basename(parent) in OURS or parent == str(folder):
            continue
        seen.add(parent)
        # a newer one may belong to an upload that begins
        emptied = ages(parent, os.lstat(parent).st_ctime_ns) > age
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                seen.add(path)
                if path not in keep and ages(path, os.lstat(path).st_ctime_ns) > age:
                    os.unlink(path)
                    gone.add(path)
                    emptied = True
        if emptied:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(parent)
    ages.forget_others(seen - gone)
    return gone


def forget_progress() -> None:
    """Keep the progress of the last uploads alone; Gradio keeps whatever id it was ever asked for."""
    from gradio.routes import file_upload_statuses

    for remembered in (file_upload_statuses._signals, file_upload_statuses._statuses):
        for name in list(remembered)[:-UPLOADS_REMEMBERED]:
            del remembered[name]


def forget_finished(page: gr.Blocks) -> None:
    """Drop the queues of sessions that wait for nothing, or whose answers Gradio has dropped;
    the next event makes new ones.

    Gradio never removes a session from `pending_event_ids_session` unless its client breaks off.
    """
    events, messages = page._queue.pending_event_ids_session, page._queue.pending_messages_per_session
    for session in [name for name, waited_for in events.items() if not waited_for or name not in messages]:
        del events[session]
        messages.pop(session, None)
