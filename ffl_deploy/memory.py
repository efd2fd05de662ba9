"""How much memory a process may still take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FALLBACK = 4 * 2**30  # bytes, where the system does not say


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """-> bytes: what the machine has free, or what this container's limit leaves, whichever is less."""
    found = [_machine(proc / "meminfo")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(statistics.get("inactive_file", 0)))  # the page cache gives way
    return max(0, min(found))


def _machine(meminfo: Path) -> int:
    with contextlib.suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return FALLBACK
