"""This machine: its cores, the memory that a process may still take, and how glibc's malloc gives it out."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from pathlib import Path

FALLBACK = 4 * 2**30  # bytes, where the system does not say
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_BLOCK = 1 << 29
_RETURNED = 1 << 20
HEAP = 8 * _BLOCK
"""Bytes of addresses for which huge pages are asked: more than a step on a CPU usually holds."""


def available_cores() -> int:
    """-> cores this process may use, which in a container is often fewer than the machine has: by affinity,
    or by the quota of its control group, whichever is less. More threads than a quota feeds wait for one
    another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))


@functools.cache
def cpu_quota(
    membership: Path = Path("/proc/self/cgroup"), cgroup: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """-> cores' worth of time that the control group of this process, or one above it, is given; None where
    it has no quota (docker --cpus, Kubernetes' limits.cpu). Versions 1 and 2 of cgroups."""
    found = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = cgroup / "cpu" if controllers else cgroup
            # in a container the path may be the host's, and the group itself lies at the root
            place = root / path.lstrip("/")
            above = [folder for folder in place.parents if root in folder.parents]
            found += [_quota(folder) for folder in {root, place, *above}]
    return min((quota for quota in found if quota), default=None)


def _quota(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


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


def keep_freed_memory() -> None:
    """Make glibc's allocator keep what is freed, for the next step, in pages of 2 MiB;
    elsewhere this does nothing.

    By default it returns each large block to the system and gets it back, zeroed page by page, a moment
    later: a step of ResNet-32 with 128 images takes 32,000 page faults that way. No other allocator has to be
    installed or preloaded.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        _ask_for_huge_pages(libc)


def return_freed_memory() -> None:
    """Make glibc's allocator return what is freed, for a process that waits for whatever comes;
    elsewhere this does nothing.

    By default one large block that was freed raises both thresholds, to up to 64 MiB: so much stays at the
    end of each thread's heap, which `malloc_trim` does not reach either.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED)
        mallopt(_M_TRIM_THRESHOLD, _RETURNED)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow by HEAP bytes of addresses, ask for huge pages there, and free them: kept,
    they serve what comes.

    Memory is used only where it is written to. Where Linux gives huge pages on request ("madvise", the usual
    setting), a heap that was not asked for has 512 times as many pages to look up.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Each below the threshold from which a block would be a mapping of its own; None where there is no room.
    blocks = [libc.malloc(_BLOCK) for _ in range(HEAP // _BLOCK)]
    for block in filter(None, blocks):
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, _BLOCK - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    for block in filter(None, blocks):
        libc.free(block)


_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """-> whether torch says so: by a class of its own for a GPU, by its libraries' words,
    by a plain RuntimeError for a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY)


def device_failed(error: BaseException) -> bool:
    """-> whether a GPU ended the work: an error of CUDA or of its libraries,
    after which the process can use it no more."""
    first = str(error).strip().split("\n")[0]
    return type(error).__name__ == "AcceleratorError" or first.startswith(
        ("CUDA error:", "cuDNN error:", "CUBLAS_STATUS_")
    )
