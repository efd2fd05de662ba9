"""Available memory is the machine's or the container's, whichever is less."""

from __future__ import annotations

from pathlib import Path

from ffl_deploy.memory import available_memory


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
