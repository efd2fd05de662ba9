"""Runs as processes of their own: torchrun, signals, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.methods import METHODS
from train.record import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str, processes: int = 1) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "train.run", *arguments]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return [*launcher, "-m", "train.run", *arguments]


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_compute_what_one_accumulates(
    accumulate: int, tiny_flags: list[str], train_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The same micro-batches per step, once on two gloo processes, once one after the other."""
    # rounding must not grow
    flags = [*tiny_flags, "--precision", "fp32", "--mixup", "0.2", "--batch-size", "16", "--lr", "0.01"]
    done = run(*flags, "--accumulate", str(accumulate), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one = train_tiny("one", *flags, "--accumulate", str(2 * accumulate))
    for found, expected in zip(read_metrics(tmp_path / "two"), read_metrics(one), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["parts"] == pytest.approx(expected["parts"], rel=1e-3, abs=1e-6)
        assert found["train"] == pytest.approx(expected["train"], abs=1e-9)
    a, b = weights(tmp_path / "two"), weights(one)
    # Running statistics differ by design: one process sees both micro-batches, rank 0 only its own.
    learned = [name for name in a if "running" not in name and "num_batches" not in name]
    for name in learned:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert all(
        round(value * 18) == pytest.approx(value * 18, abs=1e-3) for value in summary["accuracy"].values()
    )  # exact counts


def test_the_group_ends_before_the_process() -> None:
    """A gloo thread that still lets go of a tensor while Python shuts down aborts a run that has finished."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", GROUP], env=ENVIRONMENT | place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inside, after = (line.split() for line in done.stdout.splitlines())
    assert any("gloo" in name for name in inside)
    assert not any("gloo" in name for name in after)


GROUP = """
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from train.distributed import World, process_group

def threads():
    print(*(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))

with process_group(World(size=2), torch.device("cpu")):
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    model(torch.ones(2, 3)).sum().backward()
    del model
    threads()
threads()
"""


def test_sigterm_saves_exits_130_and_resumes_to_the_same_weights(
    tiny_flags: list[str], train_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--epochs", "4"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = [sys.executable, "-c", WAITING, *flags, "--out", str(tmp_path / "stopped")]
    process = subprocess.Popen(arguments, env=ENVIRONMENT, text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "two epochs are done\n"
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=250)[1]
    assert process.returncode == 130, error
    assert f"--resume {tmp_path / 'stopped'}" in error
    assert "Traceback" not in error
    train_tiny("stopped", "--resume", str(tmp_path / "stopped"))
    assert_same_weights(tmp_path / "stopped", train_tiny("whole", *flags))


# A run that says when it has recorded its second epoch, and goes on once its standard input is closed: the
# signal comes neither before training nor after it, however fast the machine is.
WAITING = """
import sys
from train import loop
record = loop.Recorder.epoch
def epoch(recorder, line):
    record(recorder, line)
    if line["epoch"] == 1:
        print("two epochs are done", flush=True)
        sys.stdin.read()
loop.Recorder.epoch = epoch
from train.run import entry
entry()
"""


def wait_for(path: Path) -> None:
    for _ in range(2400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.fault
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_the_result_is_the_same(
    method: str, processes: int, tiny_flags: list[str], tmp_path: Path
) -> None:
    flags = [*tiny_flags, "--epochs", "6", "--method", method, "--checkpoint-minutes", "0"]
    assert run(*flags, "--out", str(tmp_path / "whole"), processes=processes).returncode == 0
    draws, killed = random.Random(f"{method}{processes}"), tmp_path / "killed"
    arguments = [*flags, "--out", str(killed)]
    for _ in range(6):
        process = subprocess.Popen(
            command(*arguments, processes=processes),
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(killed / "config.json")
        try:
            process.wait(timeout=draws.uniform(0.1, 6))
            break  # it finished first
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        arguments = ["--resume", str(killed), "--quiet"]
    assert run("--resume", str(killed), processes=processes).returncode == 0
    assert_same_weights(killed, tmp_path / "whole")
