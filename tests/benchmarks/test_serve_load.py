"""What serve_load says of its turns, and of a process's time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from benchmarks.serve_load import Turn, compared, content_length, described, processor_seconds


def test_shares_and_ratios_are_medians_of_the_turns() -> None:
    """Not ratios of medians: a machine that slows down meanwhile disturbs both sides of a turn."""
    times = np.array([0.010, 0.030])
    ours = [Turn(100, 80, 2, times), Turn(50, 45, 4, times), Turn(200, 120, 1, times)]
    other = [Turn(100, 40, 4, times), Turn(50, 30, 5, times), Turn(200, 240, 1, times)]
    line = described(ours)
    assert (line["session_images_per_second"], line["served_images_per_second"]) == (100, 80)
    assert (line["share"], line["processor_ms_per_image"]) == (0.8, 2)
    assert (line["p50_ms"], line["max_ms"]) == (20, 30)
    assert compared(ours, other) == {"times_served": 1.5, "times_processor_ms": 0.8}


def test_processor_seconds_are_those_of_the_process() -> None:
    script = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.45 <= processor_seconds(process) < 5
        process.communicate(b"\n")


def test_the_length_is_not_that_of_the_json_part() -> None:
    head = b"HTTP/1.1 200 OK\r\ninference-header-content-length: 7\r\ncontent-length: 42\r\n\r\n"
    assert content_length(head) == 42
