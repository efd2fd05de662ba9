"""Fine-tuning for int8: branches and fusion are trained as their int8 files will compute them.

The student is the run's network under the rounding that export writes (ffl_deploy/networks/quantization.py).
Its losses are the method's own, and the distillation of a full-precision teacher: the fused classifier of the
run that is fine-tuned, as it was trained, teaches every branch and the fused classifier, as FFL's fused
classifier teaches its branches (Kim et al. 2019). A full-precision teacher of a quantised student that learns
the data too is QKD's last phase, tutoring (Quantization-aware Knowledge Distillation, Kim et al. 2019);
self-studying and co-studying are what the finished run has behind it.

Checkpoint `best` holds the weights as int8 holds them, so that the fp32 file is that of the very weights that
the int8 file has; `last` those that learning goes on from. Both hold the scales of activations and weights,
which export uses as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ffl_deploy.data.datasets import ImageData
from ffl_deploy.errors import UsageError
from ffl_deploy.files import existing_folder
from ffl_deploy.networks.checkpoint import (
    MODEL,
    QUANTIZATION,
    load_weights,
    network_config,
    read_checkpoint,
    save_checkpoint,
)
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.quantization import QuantizedNetwork
from ffl_deploy.run_directory import load_run
from train.loop import Trainer
from train.state import Position, TrainingState
from train.teacher import TaughtOutputs, taught

TEACHER = "teacher"  # the checkpoint that is fine-tuned
CALIBRATION_IMAGES = 512
CALIBRATION_BATCH = 64


class Lesson(nn.Module):
    """Student and teacher look at the same images; only the student learns. subject:
    the teacher's classifier that teaches."""

    def __init__(self, student: QuantizedNetwork, teacher: MutualNetwork, subject: str) -> None:
        super().__init__()
        self.student, self.teacher, self.subject = student, teacher.requires_grad_(False), subject
        self.train()

    def train(self, mode: bool = True) -> Lesson:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> TaughtOutputs:
        with torch.no_grad():
            logits = self.teacher(images).classifiers()[self.subject]
        return TaughtOutputs(self.student(images), logits)


@dataclass(frozen=True)
class QuantizedState(TrainingState):
    """Also what the student adds to the network; all but `last` hold the weights as int8 does."""

    student: QuantizedNetwork

    def weights(self, name: str, network: nn.Module) -> Mapping[str, Tensor]:
        return super().weights(name, network) if name == "last" else self.student.rounded_weights()

    def beside(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {QUANTIZATION: self.student.tensors()}

    def restore(self) -> Position:
        position, last = super().restore(), existing_folder(self.folder / "checkpoints" / "last")
        if last is not None:
            self.student.load(read_checkpoint(last, (QUANTIZATION,)).tensors[QUANTIZATION], str(last))
        return position


@dataclass(kw_only=True)
class QuantizeAwareTrainer(Trainer):
    """Fine-tunes a network that is trained already. calibration: images uint8 [n, h, w, 3],
    for the first ranges.

    Raises UsageError where the network's operations cannot be followed.
    """

    calibration: np.ndarray

    def __post_init__(self) -> None:
        teacher = (
            MutualNetwork(self.network.config).to(self.place.device).to(memory_format=torch.channels_last)
        )
        teacher.load_state_dict(self.network.state_dict())
        self.student = QuantizedNetwork(self.network)
        images = torch.from_numpy(self.calibration).to(self.place.device).permute(0, 3, 1, 2)
        self.student.calibrate(self.batches.normalize(chunk) for chunk in images.split(CALIBRATION_BATCH))
        self.lesson = Lesson(self.student, teacher, self.method.strong)
        self.method = taught(self.method, "qkd")
        super().__post_init__()

    def build_state(self) -> TrainingState:
        parts = self.optimizer, self.scaler, self.ema, self.background
        return QuantizedState(self.folder, self.network, *parts, self.student)

    def learner(self) -> nn.Module:
        return self.lesson

    def answering(self) -> nn.Module:
        return self.student


def load_teacher(folder: Path, source: Path, network: MutualNetwork) -> None:
    """Give `network` the weights that are fine-tuned: those kept in run directory `folder`,
    else the best ones of run `source`.

    Raises UsageError where that run has another architecture, CheckError where its checkpoint is damaged.
    """
    kept = existing_folder(folder / "checkpoints" / TEACHER)
    if kept is not None:
        load_weights(network, read_checkpoint(kept, (MODEL,)).tensors[MODEL], str(kept))
        return
    run = load_run(source)
    if network_config(run) != network.config:
        raise UsageError(
            f"{source} has other networks than this run is to have; leave out the flags that change them."
        )
    best = run.checkpoint("best")
    load_weights(network, read_checkpoint(best, (MODEL,)).tensors[MODEL], str(best))


def keep_teacher(folder: Path, network: MutualNetwork) -> None:
    """Store the weights that are fine-tuned, so
    that the run can be resumed without the one that it came from."""
    if existing_folder(folder / "checkpoints" / TEACHER) is None:
        save_checkpoint(folder / "checkpoints" / TEACHER, {MODEL: network.state_dict()}, {"epoch": 0})


def calibration_images(data: ImageData) -> np.ndarray:
    """-> training images uint8 [n, h, w, 3], the same ones on every process."""
    rows = np.unique(np.linspace(0, len(data.train) - 1, CALIBRATION_IMAGES).round().astype(np.int64))
    return data.train.read(rows)
