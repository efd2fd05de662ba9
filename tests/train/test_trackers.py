"""MLflow and Weights & Biases get the numbers of metrics.jsonl, offline; a resumed run goes on in its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ffl_deploy import installed
from ffl_deploy.command import run_command
from train.record import Recorder, read_metrics
from train.run import main

LINE = {
    "epoch": 0,
    "lr": 0.1,
    "ramp": 0.5,
    "loss": 2.0,
    "images_per_second": 10.0,
    "parts": {"ce/fused": 1.5},
}
LINE |= {"train": {"fused": 0.25}, "validation": {"fused": 0.5}}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


def record(folder: Path, epochs: range, name: str) -> None:
    recorder = Recorder(folder, epochs.start, [name], {"optimisation.lr": 0.1})
    for epoch in epochs:
        recorder.epoch(LINE | {"epoch": epoch, "loss": 2.0 - epoch})
    recorder.close()


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@needs("mlflow")
def test_mlflow_has_the_numbers_in_the_runs_folder(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    folder.mkdir()
    record(folder, range(2), "mlflow")
    record(folder, range(2, 3), "mlflow")  # resumed
    client = MlflowClient(tracking_uri=(folder / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("ffl")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimisation.lr": "0.1"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert run.data.metrics["validation/fused"] == 0.5
    assert run.data.metrics["parts/ce/fused"] == 1.5
    assert [line["epoch"] for line in read_metrics(folder)] == [0, 1, 2]
    assert (folder / "tensorboard").is_dir()


@needs("wandb")
@pytest.mark.slow
def test_weights_and_biases_is_offline(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    record(folder, range(2), "wandb")
    record(folder, range(2, 3), "wandb")
    identity = (folder / "wandb-run").read_text()
    runs = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) in (1, 2)  # two in the same second share a folder's name
    assert all(name.endswith(identity) for name in runs)
    assert list((folder / "wandb").glob(f"offline-run-*/*{identity}.wandb"))


def test_a_package_that_is_missing_and_a_name_that_is_none(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--out", str(tmp_path / "run")]
    assert run_command(main, [*flags, "--track", "comet"]) == 2
    assert "--track knows mlflow, wandb" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        installed.importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name)
    )
    assert run_command(main, [*flags, "--track", "mlflow"]) == 2
    said = capsys.readouterr().err
    assert "MLflow is not installed; run: " in said
    assert "[mlflow]" in said
    assert "leave mlflow out of --track" in said
    assert not (tmp_path / "run").exists()


@needs("mlflow")
def test_a_run_tracks(train_tiny: Callable[..., Path]) -> None:
    run = train_tiny("run", "--epochs", "1", "--track", "mlflow")
    assert (run / "mlflow-run").is_file()
    assert (run / "mlruns").is_dir()
