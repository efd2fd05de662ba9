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
