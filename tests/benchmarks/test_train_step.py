"""The benchmark of a step: what it times is the trainer's own step too."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_acceptance.images import decoded
from benchmarks.gpu_acceptance.training import Setting, Training
from benchmarks.train_step import main
from ffl_deploy.command import run_command


def test_without_a_gpu_its_table_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(main, ["--device", "cuda"]) == 2
    assert "error: --device cuda: " in capsys.readouterr().err


def test_a_timed_step_moves_the_weights_and_is_counted(tmp_path: object) -> None:
    training = Training(decoded(None), "cpu", Setting("fp32", 4), tmp_path, branches=("resnet8", "resnet8"))
    before = training.trainer.network.heads[0].weight.clone()
    assert training.seconds(2) > 0
    assert training.number == 2
    assert training.trainer.meter.sums[-1] == 8  # images
    assert not torch.equal(training.trainer.network.heads[0].weight, before)
