"""Memory that requests have freed goes back to the system.

glibc keeps it: each thread has a heap of its own, and one small block that is in use at its end holds all
that is free before it. After 15 s of large gRPC messages a server of 140 MiB kept 600, of which it used none.
What is free at the end of a heap `return_freed_memory` returns at once, what is free inside is found here.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

LOOK_SECONDS = 5.0
MOST_LOOKS = 64  # until it is tried again, where there was nothing to give back
WORTH = 0.05
"""Of the memory: growth from which on some of it is given back, for as long as that gives as much."""

Resident = Callable[[], int]
Trim = Callable[[], None]
Sleep = Callable[[float], Awaitable[None]]


def resident(statm: Path = Path("/proc/self/statm")) -> int:
    """-> bytes of this process that are in memory."""
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trimmer() -> Trim | None:
    """-> what gives all free memory of malloc back; None where malloc is another one. It takes 0.1 to 0.5 ms
    a MiB, without the interpreter's lock."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing
    return None if trim is None else lambda: trim(0)


async def give_back(trim: Trim | None, resident: Resident = resident, sleep: Sleep = asyncio.sleep) -> None:
    """Look every LOOK_SECONDS, for ever, and give back where the process is larger than it has been: what has
    grown at once, what may be in use after longer and longer waits. A server that has not grown calls
    nothing."""
    if trim is None:
        return
    least, after, pause, waited = 0, 0, 1, 0  # bytes, bytes, looks, looks
    while True:
        await sleep(LOOK_SECONDS)
        now, waited = resident(), waited + 1
        if now <= least * (1 + WORTH):
            least, after = min(least, now), min(after, now)
            continue
        if now <= after * (1 + WORTH) and waited < pause:
            continue
        await asyncio.to_thread(trim)
        after, waited = resident(), 0
        least = min(least or after, after)
        pause = 1 if now - after > after * WORTH else min(2 * pause, MOST_LOOKS)
