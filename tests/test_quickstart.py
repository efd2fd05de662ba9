"""`make quickstart`, stopped by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import examples.quickstart

SLOW_TO_END = """
import signal, sys, time
from pathlib import Path
def end(*_):
    time.sleep(1)  # a checkpoint is written
    Path(sys.argv[1]).with_name("saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, end)
Path(sys.argv[1]).touch()
time.sleep(60)
"""
QUICKSTART = "import sys; from examples.quickstart import run; sys.exit(run(sys.argv[1:]))"


@pytest.mark.timeout(60)
def test_ctrl_c_leaves_the_command_time_to_save(tmp_path: Path) -> None:
    """The terminal sends it to both; subprocess.run would have killed the command a quarter of a second
    later, with a traceback."""
    root = Path(examples.quickstart.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", QUICKSTART, sys.executable, "-c", SLOW_TO_END, str(tmp_path / "ready")],
        cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate()
    assert (child.returncode, said) == (130, "")
    assert (tmp_path / "saved").exists()
