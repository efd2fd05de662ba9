"""Where the numbers of an epoch are shown beside metrics.jsonl: TensorBoard always, MLflow and Weights &
Biases where --track names them. One row of TRACKERS for each.

Nothing leaves the machine unless the user's own environment says so: MLflow writes into the run's folder
where no MLFLOW_TRACKING_URI is set, Weights & Biases is offline where no WANDB_MODE is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast


class Tracker(Protocol):
    """Takes numbers by their names, at an epoch."""

    def scalars(self, values: Mapping[str, float], epoch: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, options: Mapping[str, Any], first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch or None)

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.events.add_scalar(name, value, epoch)

    def close(self) -> None:
        self.events.close()


class MLflow:
    """A run of the experiment `ffl`; a resumed run goes on in its own, whose id is kept in the folder."""

    def __init__(self, folder: Path, options: Mapping[str, Any], first_epoch: int) -> None:
        # a folder of files needs no database; MLflow 3.17 asks for this word before it writes one
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self.client, kept = MlflowClient(tracking_uri=place), folder / "mlflow-run"
        if kept.is_file():
            self.run = kept.read_text()
        else:
            found = self.client.get_experiment_by_name("ffl")
            experiment = found.experiment_id if found else self.client.create_experiment("ffl")
            self.run = self.client.create_run(experiment, run_name=folder.resolve().name).info.run_id
            kept.write_text(self.run)
            for name, value in options.items():
                self.client.log_param(self.run, name, str(value)[:500])
        self.client.update_run(self.run, status="RUNNING")

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WeightsAndBiases:
    """A run of the project `ffl`; a resumed run goes on under its own id."""

    def __init__(self, folder: Path, options: Mapping[str, Any], first_epoch: int) -> None:
        import wandb

        name, kept = folder.resolve().name, folder / "wandb-run"
        identity = kept.read_text() if kept.is_file() else secrets.token_hex(4)
        kept.write_text(identity)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "ffl",
            name=name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(options),
            mode=cast(Any, os.environ.get("WANDB_MODE") or "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(values), step=epoch)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""Name -> (the run's folder, its options by their flat names, the first epoch that is to come) -> Tracker."""
EXTRAS = tuple(name for name in TRACKERS if name != "tensorboard")
"""What --track offers: packages that are installed only where they are asked for."""
