"""Available memory is the machine's or the container's, whichever is less; freed memory stays,
in huge pages."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffl_deploy import host
from ffl_deploy.host import available_cores, available_memory, cpu_quota, keep_freed_memory

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path, tmp_path / "none") == 4000 * 1024
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "2500000"),
        ("memory.stat", "anon 1\ninactive_file 100000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path, tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path, tmp_path) == 4000 * 1024


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "5:cpuset:/x\n4:cpu,cpuacct:/docker/1\n",
            {"cpu/docker/1/cpu.cfs_quota_us": "250000\n", "cpu/docker/1/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_quota_of_the_control_group(
    membership: str, files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert cpu_quota(tmp_path / "membership", tmp_path / "cgroup") == cores


@pytest.mark.parametrize(("quota", "cores"), [(None, 32), (0.5, 1), (0.1, 1), (1.5, 2), (3.4, 3), (64.0, 32)])
def test_more_threads_than_a_quota_feeds_are_not_started(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setattr(host, "cpu_quota", lambda: quota)
    assert available_cores() == cores


def test_without_proc_half_of_what_is_built_in(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) > 2**28


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    keep_freed_memory()
    size, times, page = 32 * 2**20, 50, resource.getpagesize()
    torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(size, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # returned to the system each time, it would be `times` as many
    assert faults < times // 2 * (size // page)


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages on this system"
)
def test_memory_comes_in_huge_pages_where_the_system_gives_them() -> None:
    script = """
import torch
from ffl_deploy.host import keep_freed_memory
keep_freed_memory()
kept = torch.ones(256 * 2**20, dtype=torch.uint8)
rollup = open("/proc/self/smaps_rollup").read()
print(next(line.split()[1] for line in rollup.splitlines() if line.startswith("AnonHugePages")))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 0  # KiB; how many the system had left is its affair


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the thresholds are those of glibc's allocator"
)
def test_a_servers_freed_memory_is_returned_by_each_thread() -> None:
    """Of 12 MiB that a living thread has freed; without `return_freed_memory`, `malloc_trim` leaves all of
    them."""
    script = """
import ctypes, threading
from ffl_deploy.host import return_freed_memory
return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(16 << 20))  # after which glibc's own thresholds are higher
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4
def work():
    block = libc.malloc(12 << 20)
    ctypes.memset(block, 1, 12 << 20)
    libc.free(block)
    done.set()
    ended.wait()
done, ended, before = threading.Event(), threading.Event(), resident()
threading.Thread(target=work).start()
done.wait()
libc.malloc_trim(0)
print(resident() - before)
ended.set()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 6 << 10  # KiB
