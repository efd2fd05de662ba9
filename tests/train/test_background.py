"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train.state
from ffl_deploy.command import run_command
from ffl_deploy.networks.checkpoint import read_checkpoint
from train.background import Background
from train.run import main
from train.state import first_not_finite, on_cpu

TrainTiny = Callable[..., Path]


def test_work_is_done_in_order_by_one_other_thread() -> None:
    background, done = Background(), []
    for number in range(5):
        background.do(lambda number=number: done.append((number, threading.current_thread().name)))
    background.wait()
    assert [number for number, _ in done] == list(range(5))
    assert {name for _, name in done} == {"checkpoint_0"}
    background.close()


def test_after_an_error_nothing_else_is_written_and_the_error_comes_up_once() -> None:
    background, done = Background(), []

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for work in (lambda: done.append(1), full, lambda: done.append(2)):
        background.do(work)
    with pytest.raises(OSError, match="No space left"):
        background.wait()
    background.close()
    assert done == [1]


def test_check_raises_without_waiting_for_what_is_under_way() -> None:
    background, gate = Background(), threading.Event()
    background.do(gate.wait)  # type: ignore[arg-type]
    background.check()
    gate.set()
    background.do(lambda: (_ for _ in ()).throw(OSError("late")))
    background.close()
    with pytest.raises(OSError, match="late"):
        background.check()


def test_a_full_disk_found_by_the_thread_ends_the_run_in_the_middle_of_an_epoch(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run does not go on for the rest of its epochs without a checkpoint."""
    steps: list[int] = []

    def full(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    def counted(trainer: train.loop.Trainer, number: int, batches: object) -> None:
        steps.append(number)
        step(trainer, number, batches)  # type: ignore[arg-type]
        if number >= 4:  # the thread has the time that steps of a larger network take
            time.sleep(0.05)

    step = train.loop.Trainer.step
    monkeypatch.setattr(train.loop.Trainer, "step", counted)
    monkeypatch.setattr(train.state, "save_checkpoint", full)
    flags = [*tiny_flags, "--epochs", "40", "--out", str(tmp_path / "run")]
    assert run_command(main, flags) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert len(steps) <= 8  # of 160
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_checkpoint_holds_the_weights_of_its_moment(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: the weights that are written are those that were asked for, while steps change them."""
    save, asked = train.state.save_checkpoint, {}

    def slow(folder: Path, tensors: object, state: object) -> None:
        time.sleep(0.2)
        save(folder, tensors, state)  # type: ignore[arg-type]

    def noted(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copied = on_cpu(named)
        asked[len(asked)] = {name: value.clone() for name, value in copied.items()}
        return copied

    monkeypatch.setattr(train.state, "save_checkpoint", slow)
    monkeypatch.setattr(train.state, "on_cpu", noted)
    run = train_tiny("run", "--epochs", "1")
    monkeypatch.undo()
    written = read_checkpoint(run / "checkpoints" / "last").tensors["model"]
    assert all(torch.equal(written[name], value) for name, value in asked[1].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_weight_that_is_not_finite_is_named(bad: float) -> None:
    tensors = {"a": torch.ones(3, 2), "count": torch.tensor(7), "b": torch.ones(4), "c": torch.ones(1)}
    assert first_not_finite(tensors) is None
    tensors["b"][2] = bad
    assert first_not_finite(tensors) == "b"
    assert first_not_finite({"count": torch.tensor(7)}) is None


def test_copies_share_no_memory_and_are_dense() -> None:
    tensors = {
        "weight": torch.arange(48.0).view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(3),
    }
    copies = on_cpu(tensors)
    assert list(copies) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(copies[name], value)
        assert copies[name].is_contiguous()
        assert copies[name].data_ptr() != value.data_ptr()
