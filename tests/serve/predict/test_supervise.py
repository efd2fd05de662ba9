"""The parent of the working process: what it passes on, and what it hands back. (What it survives:
test_faults.py.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ffl_deploy.bundle import Bundle

ROOT = Path(__file__).parents[3]


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_comes_while_the_child_is_made_ends_both_with_130(name: str) -> None:
    """The child signals its parent at once, which is held up in the fork meanwhile."""
    done = python(f"""
import os, signal, sys, time
from serve.predict import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
fork = os.fork
def slow_fork():
    child = fork()
    if child:
        time.sleep(1)
    return child
os.fork = slow_fork
def run(recovery):
    os.kill(os.getppid(), signal.{name})
    time.sleep(100)
sys.exit(supervise.supervise(run))
""")
    assert (done.returncode, done.stderr) == (130, "")


def test_exit_codes_pass_through() -> None:
    code = (
        "import sys; from serve.predict.supervise import supervise; sys.exit(supervise(lambda recovery: 3))"
    )
    assert python(code).returncode == 3


def test_a_fault_of_ours_shows_its_traceback_and_so_does_ffl_debug(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    done = python(
        "import sys; from serve.predict.supervise import supervise; sys.exit(supervise(lambda recovery: 1 "
        "// 0))"
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    entry = "from serve.predict.command import entry; entry()"
    quiet = python(entry, tmp_path / "none", "x.jpg", "--out", tmp_path / "out.csv")
    assert (quiet.returncode, quiet.stderr.count("\n")) == (2, 1)
    told = python(entry, tmp_path / "none", "x.jpg", "--out", tmp_path / "out.csv", FFL_DEBUG="1")
    assert "Traceback" in told.stderr
    assert "UsageError" in told.stderr


def test_the_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """A SIGKILL to the parent, which it cannot pass on, leaves no worker that goes on writing."""
    code = """
import os, sys, time
from serve.predict.supervise import supervise
def run(recovery):
    print(os.getpid(), flush=True)
    time.sleep(100)
supervise(run)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == "", "the pipe closes when its last writer, the worker, has ended"
    process.stdout.close()
    assert worker != process.pid
