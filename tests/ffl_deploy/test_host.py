"""Available memory is the machine's or the container's, whichever is less; freed memory stays,
in huge pages."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffl_deploy.host import available_memory, keep_freed_memory

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
