"""What only a GPU can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train.loop
from export.cli import main as export_main
from ffl_deploy.command import run_command
from ffl_deploy.verify import main as verify_main
from serve.predict.command import main as predict_main
from tests.train.test_loop import assert_same_run
from train.record import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU on this machine"),
]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_precision_learns_the_hues(precision: str, train_tiny: Callable[..., Path]) -> None:
    folder = train_tiny("gpu", "--device", "cuda", "--precision", precision, "--epochs", "8")
    losses = [line["loss"] for line in read_metrics(folder)]
    assert losses[-1] < 0.5 * losses[0]


def test_gpu_and_cpu_see_the_same_batches(train_tiny: Callable[..., Path]) -> None:
    flags = ["--precision", "fp32", "--epochs", "1", "--mixup", "0.2"]
    on_gpu = read_metrics(train_tiny("gpu", "--device", "cuda", *flags))[0]
    on_cpu = read_metrics(train_tiny("cpu", "--device", "cpu", *flags))[0]
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=2e-2)


def test_resume_with_loss_scaling_continues_the_scale(
    train_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradScaler counts steps without overflow; a scaler
    that starts anew would count those since the resume."""
    import train.loop

    original = train.loop.Recorder.epoch

    def stop_in_the_second(recorder: object, line: dict[str, object]) -> None:
        original(recorder, line)  # type: ignore[arg-type]
        if line["epoch"] == 1:
            raise KeyboardInterrupt

    flags = ["--device", "cuda", "--precision", "fp16", "--epochs", "3"]
    whole = train_tiny("whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Recorder, "epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("stopped", *flags)
    train_tiny("stopped", "--resume", str(tmp_path / "stopped"))
    assert scaler_of(tmp_path / "stopped") == scaler_of(whole)
    assert scaler_of(whole)["_growth_tracker"] > 4  # more than an epoch's steps


def scaler_of(run: Path) -> dict[str, float]:
    return json.loads((run / "checkpoints" / "last" / "state.json").read_text())["scaler"]


def test_sync_batchnorm_under_torchrun(tiny_flags: list[str], tmp_path: Path) -> None:
    processes = min(torch.cuda.device_count(), 2)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run(
        [
            *launcher,
            "-m",
            "train.run",
            *tiny_flags,
            "--device",
            "cuda",
            "--sync-batchnorm",
            "--out",
            str(tmp_path / "run"),
        ],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_the_gpu_is_exported_verified_and_predicted_with(
    precision: str, hues: Path, train_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """With TF32 in the reference logits, the gate of export refuses every run of a GPU."""
    run = train_tiny("run", "--device", "cuda", "--precision", precision)
    toolchain = json.loads((run / "config.json").read_text())["toolchain"]
    assert (toolchain["device"], toolchain["precision"]) == (torch.cuda.get_device_name(), precision)
    bundles, rows = tmp_path / "bundles", tmp_path / "rows.jsonl"
    assert run_command(export_main, [str(run), "--target", "all", "--out", str(bundles)]) == 0
    assert run_command(verify_main, [str(bundles / "fused")]) == 0
    images = str(hues / "test")
    assert run_command(predict_main, [str(bundles / "fused"), images, "--out", str(rows), "--quiet"]) == 0
    answers = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["status"] for row in answers] == ["ok"] * 18


def trained(tiny_flags: list[str], out: Path, *flags: str) -> Path:
    """Train in a process of its own: determinism is set up before CUDA starts."""
    command = [sys.executable, "-m", "train.run", *tiny_flags, *flags, "--device", "cuda", "--deterministic"]
    subprocess.run([*command, "--out", str(out)], check=True)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_captured_steps_have_the_bits_of_steps_as_they_are(
    precision: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    flags = ["--precision", precision, "--epochs", "4", "--ema", "0.9", "--small-size", "6"]
    plain = trained(tiny_flags, tmp_path / "plain", *flags, "--cuda-graph", "off")
    assert_same_run(trained(tiny_flags, tmp_path / "captured", *flags, "--cuda-graph", "on"), plain)


@pytest.mark.parametrize("taught_by", ["run", "ema"])
def test_a_taught_step_that_is_captured_has_the_bits_of_the_step_as_it_is(
    taught_by: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    flags = ["--precision", "bf16", "--epochs", "3", "--ema", "0.9", "--teacher"]
    flags += [str(trained(tiny_flags, tmp_path / "teacher")) if taught_by == "run" else "ema"]
    plain = trained(tiny_flags, tmp_path / "plain", *flags, "--cuda-graph", "off")
    command = [sys.executable, "-m", "train.run", *(flag for flag in tiny_flags if flag != "--quiet"), *flags]
    command += [
        "--device",
        "cuda",
        "--deterministic",
        "--cuda-graph",
        "on",
        "--out",
        str(tmp_path / "captured"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "without a CUDA graph" not in done.stderr  # it was captured
    assert_same_run(tmp_path / "captured", plain)


STOPPED = """
import sys
import train.loop
epoch = train.loop.Trainer.train_epoch
def stopped(trainer, number):
    if number == 1:
        type(trainer.stop).requested = True
    epoch(trainer, number)
train.loop.Trainer.train_epoch = stopped
from train.run import entry
entry()
"""


def test_a_deterministic_run_that_is_resumed_has_the_same_bits(tiny_flags: list[str], tmp_path: Path) -> None:
    flags, folder = ["--precision", "bf16", "--epochs", "3"], tmp_path / "stopped"
    whole = trained(tiny_flags, tmp_path / "whole", *flags)
    command = [sys.executable, "-c", STOPPED, *tiny_flags, *flags, "--device", "cuda", "--deterministic"]
    assert subprocess.run([*command, "--out", str(folder)], check=False).returncode == 130
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (1, 1)  # in the middle of an epoch
    subprocess.run([sys.executable, "-m", "train.run", "--resume", str(folder), "--quiet"], check=True)
    assert_same_run(folder, whole)


def test_auto_times_both_ways_and_tells(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in tiny_flags if flag != "--quiet"]
    command = [sys.executable, "-m", "train.run", *flags, "--epochs", "16", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ms as a CUDA graph and" in done.stderr


def test_no_step_waits_for_the_gpu(train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch makes an error of it; every tenth step reads the losses, and may."""
    steps: list[int] = []

    def watched(trainer: train.loop.Trainer, number: int, batches: list[object]) -> None:
        steps.append(number)
        torch.cuda.set_sync_debug_mode("error" if number > 4 else "default")
        try:
            step(trainer, number, batches)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step = train.loop.Trainer.step
    monkeypatch.setattr(train.loop.Trainer, "step", watched)
    train_tiny("run", "--device", "cuda", "--epochs", "4", "--ema", "0.9", "--cuda-graph", "off")
    assert steps == list(range(16))
