"""The run directory: what training leaves and export reads. Nothing here imports torch.

runs/NAME/  config.json  metrics.jsonl  summary.json  eval_reference.npz  test_predictions.npz
            curves.png  checkpoints/{last,best,...}/
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ffl_deploy.arrays import read_arrays
from ffl_deploy.data.datasets import DataSpec
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.files import did_you_mean, existing_folder
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.probes import PREFIX, Probes, files_of

SCHEMA = 1
CONFIG = "config.json"
REFERENCE = "eval_reference.npz"
SUMMARY = "summary.json"
PREDICTIONS = "test_predictions.npz"  # labels, and every classifier's predicted labels: int64 [test images]


class ModelRecord(msgspec.Struct, frozen=True):
    """The architecture as `ffl_deploy.networks.mutual.NetworkConfig` takes it,
    and the method that trained it."""

    method: str
    strong: str  # the classifier that `best` is chosen by
    network: dict[str, Any]


class RunConfig(msgspec.Struct, frozen=True):
    """`config.json`. `options` are the flags of the training command, resolved;
    the rest follows from them and the data.

    mean and std: per RGB channel, on the 0..255 scale.
    """

    schema: int
    options: dict[str, Any]
    data: DataSpec
    data_name: str
    classes: list[str]
    preprocessing: Preprocessing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    split: dict[str, Any]
    model: ModelRecord
    toolchain: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A run directory that has been opened for reading."""

    folder: Path
    config: RunConfig

    @property
    def name(self) -> str:
        return self.folder.resolve().name  # of "." too

    @property
    def classes(self) -> list[str]:
        return self.config.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.config.preprocessing

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.config.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.config.std

    @property
    def data(self) -> DataSpec:
        return self.config.data

    @property
    def model(self) -> ModelRecord:
        return self.config.model

    def with_data(self, folder: str | os.PathLike[str]) -> Run:
        """-> the same run, whose data are in `folder` now: its folder of images, its list (or the folder
        of it; its images lie from it as they did), or CIFAR's files. Raises UsageError."""
        if self.data.source == "digits":
            raise UsageError("--data: the digits come with the package; leave it out.")
        data = self.data.moved(str(Path(folder).expanduser().absolute()))
        return Run(self.folder, msgspec.structs.replace(self.config, data=data))

    def checkpoint(self, name: str) -> Path:
        """-> folder of checkpoint `name` (best, last, ema). Raises UsageError where there is none."""
        folder = existing_folder(self.folder / "checkpoints" / name)
        if folder is None:
            raise UsageError(
                f"{self.folder} has no checkpoint {name!r}; train it first, or continue it with: "
                f"ffl-train --resume {self.folder}"
            )
        return folder

    def reference(self, checkpoint: str, classifier: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> (images uint8 [n, h, w, 3], labels int64 [n], logits float32 [n, classes])
        of training's own evaluation.

        Raises UsageError where there is none of this classifier, CheckError where the file is damaged.
        """
        arrays = self._evaluation()
        key = f"{checkpoint}/{classifier}"
        if key not in arrays:
            raise UsageError(
                f"{self.folder / REFERENCE} has no logits of {key}; it has "
                f"{', '.join(name for name in arrays if '/' in name and not name.startswith(PREFIX))}."
            )
        return arrays["images"], arrays["labels"], arrays[key]

    def probes(self, checkpoint: str, classifier: str) -> Probes | None:
        """-> the made-up pictures with this classifier's logits; None in runs from before there were any."""
        arrays = self._evaluation()
        files, pixels = files_of(arrays), arrays.get(f"{PREFIX}pixels")
        logits = arrays.get(f"{PREFIX}{checkpoint}/{classifier}")
        return None if not files or pixels is None or logits is None else Probes(files, pixels, logits)

    def reference_rows(self) -> np.ndarray:
        """-> int64 [n]: which images of the test split those of `reference` are."""
        return self._evaluation()["indices"]

    def _evaluation(self) -> dict[str, np.ndarray]:
        path = self.folder / REFERENCE
        if not path.is_file():
            raise UsageError(
                f"{self.folder} has no {REFERENCE}, which training writes at its end; finish it with: "
                f"ffl-train --resume {self.folder}"
            )
        return read_arrays(path, ("images", "labels", "indices"))


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open a run directory. Raises UsageError where there is none,
    CheckError where its configuration is damaged."""
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(
            f"there is no run directory {path}.{_elsewhere(path)} Train one with: ffl-train --out {path}"
        )
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} is not a run directory (no {CONFIG}); give one that ffl-train wrote.")
    try:
        config = msgspec.json.decode((path / CONFIG).read_bytes(), type=RunConfig)
    except msgspec.DecodeError as error:
        raise CheckError(f"{path / CONFIG} is damaged ({error}); restore it or train again.") from error
    if config.schema != SCHEMA:
        raise CheckError(
            f"{path / CONFIG} has schema {config.schema}, this version reads {SCHEMA}; train again."
        )
    return Run(path, config)


def _elsewhere(path: Path) -> str:
    """-> where a run of that name does lie, if anywhere: p2 is runs/p2."""
    inside = Path("runs") / path
    return f" Did you mean {str(inside)!r}?" if (inside / CONFIG).is_file() else did_you_mean(path)


def newest_run(parent: str | os.PathLike[str] = "runs") -> Path:
    """-> the run under `parent` whose configuration was written last.
    Raises UsageError where there is none."""
    configs = sorted(Path(parent).glob(f"*/{CONFIG}"), key=lambda path: (path.stat().st_mtime, path))
    if not configs:
        raise UsageError(f"there is no run under {parent}/; train one with: ffl-train")
    return configs[-1].parent
