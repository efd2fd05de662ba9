"""What happens to a run from outside: signals, a process that dies, a small /dev/shm, a lock, more epochs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

import train.data.streaming
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.run_directory import load_run
from train.config import MachineOptions
from train.import_official import _read
from train.machine import resources_in_one_sentence
from train.record import read_metrics
from train.run import main
from train.run_folder import lock
from train.stopping import SIGNALS, stop_on_signals

TrainTiny = Callable[..., Path]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_these_signals_ask_a_run_to_save_and_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        os.kill(os.getpid(), number)
        assert request.requested
    assert signal.getsignal(number) is before


def test_what_nohup_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_children_of_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    """Those that decode images live on for seconds; --resume was refused for as long."""
    reading, writing = os.pipe()
    started, starting = os.pipe()
    with ExitStack() as first:
        assert lock(tmp_path / "run", first)
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.write(starting, b"x")
            os.read(reading, 1)  # until the test lets it go
            os._exit(0)
        os.read(started, 1)
    try:
        with ExitStack() as second:
            assert lock(tmp_path / "run", second), "the child has the lock"
    finally:
        for descriptor in (writing, reading, started, starting):
            os.close(descriptor)
        os.waitpid(child, 0)


REASONS = {
    "DataLoader worker (pid 23737) is killed by signal: Killed. ": "was killed",
    "DataLoader worker (pid(s) 5) exited unexpectedly": "was killed",
    "DataLoader timed out after 900 seconds": "/dev/shm",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
    "out of shared memory. Please try to raise your shared memory limit.": "/dev/shm",
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_process_that_decodes_images_and_dies_is_one_sentence(reason: str) -> None:
    """torch raises it wherever the main process is when the signal comes: inside a convolution, say."""

    def hit() -> None:
        with resources_in_one_sentence(MachineOptions()):
            raise RuntimeError(reason)

    with pytest.raises(CheckError, match=REASONS[reason]) as caught:
        hit()
    assert "--resume" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_small_shared_memory_costs_processes_not_the_run(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 64 MB, Docker's default, the workers stood still for ever."""
    flags = ("--memory-limit", "0", "--workers", "2", "--epochs", "1")
    usual = train_tiny("usual", *flags)
    assert "/dev/shm" not in capsys.readouterr().err
    monkeypatch.setattr(train.data.streaming, "free_shared_memory", lambda: 100)
    small = train_tiny("small", *flags)
    assert "/dev/shm has room for 0 of 2 processes that decode images" in capsys.readouterr().err
    weights = [(run / "checkpoints/last/model.safetensors").read_bytes() for run in (usual, small)]
    assert weights[0] == weights[1]


def test_the_advice_after_nan_can_be_followed(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--branches", "resnet8,resnet8", "--out", str(tmp_path / "nan"), "--lr", "1e18"]
    assert run_command(main, flags) == 1
    said = capsys.readouterr().err
    assert "not finite" in said
    assert "start a new run, with another --out, and a lower --lr" in said
    assert "the last checkpoint is kept" not in said, "there is none"


def test_weights_of_data_parallel_are_imported(tmp_path: Path) -> None:
    path = tmp_path / "Model_3.pth"
    tensors = {"module.conv1.weight": torch.ones(2), "module.fc.bias": torch.zeros(1)}
    torch.save({"state_dict": tensors, "epoch": 3, "best_acc": np.float64(71.2)}, path)
    found, epoch = _read(path)
    assert (list(found), epoch) == (["conv1.weight", "fc.bias"], 3)
    torch.save({"state_dict": tensors | {"other": torch.ones(1)}, "epoch": 3}, path)
    assert list(_read(path)[0]) == [*tensors, "other"], "not DataParallel's, then"
    torch.save({"state_dict": tensors, "code": print}, path)
    with pytest.raises(UsageError, match="save its state_dict alone"):
        _read(path)


@pytest.mark.parametrize("finished", [True, False])
def test_more_epochs(train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str], finished: bool) -> None:
    run = train_tiny("run", "--epochs", "2", "--schedule", "cosine")
    if not finished:
        (run / "summary.json").unlink()
    assert run_command(main, ["--resume", str(run), "--epochs", "1", "--quiet"]) == 2
    assert "--epochs is 1 now and was 2" in capsys.readouterr().err
    assert run_command(main, ["--resume", str(run), "--epochs", "3", "--no-quiet"]) == 0
    said = capsys.readouterr().err
    assert "goes on from 2 to 3 epochs" in said
    lines = read_metrics(run)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3
    assert load_run(run).config.options["optimisation"]["epochs"] == 3
    whole = read_metrics(train_tiny("whole", "--epochs", "3", "--schedule", "cosine"))
    assert lines[2]["lr"] == whole[2]["lr"], "of a run of three epochs, not of two"
    assert lines[1]["lr"] < whole[1]["lr"]
    assert run_command(main, ["--resume", str(run), "--no-quiet"]) == 0
    assert "is finished already" in capsys.readouterr().err
