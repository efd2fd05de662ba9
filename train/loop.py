"""The training loop. It is handed a network, a method and batches, and knows none of them by name.

Features: mixed precision, gradient accumulation and clipping, EMA, several processes, a checkpoint at any
step. Exact resume: learning rate, ramp-up, data order, augmentation and dropout are functions of (seed,
step), so a checkpoint needs the weights, the optimizer and the number of the step; on a CPU the result is the
same bit for bit.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ffl_deploy.errors import CheckError, Interrupted
from ffl_deploy.networks.mutual import MutualNetwork
from train.background import Background
from train.config import TrainConfig
from train.cuda_graph import graphed
from train.data.batches import Batch, Batches
from train.ema import MovingAverage
from train.evaluate import accuracies
from train.features import Partial, frozen_in
from train.machine import Place
from train.meter import Meter
from train.methods import Method
from train.optimizer import build_optimizer
from train.options import flatten, options_to_json
from train.randomness import seed_everything
from train.record import Progress, Recorder
from train.schedule import learning_rate, ramp_up
from train.state import Position, TrainingState
from train.step import Step
from train.stopping import StopRequest

AGREE_EVERY = 10  # steps between two questions to all processes whether to stop or save


class Lap(NamedTuple):
    """Where this process began an epoch, or went on with it."""

    started: float  # on the monotonic clock
    seconds: float  # of training before it
    images: int  # trained before it


@dataclass
class Trainer:
    """Trains `network` from its checkpoint in `folder`, or from the start, to the last epoch.

    Leaves checkpoints `last`, `best` (highest validation accuracy of the method's strong classifier)
    and `ema`.
    """

    network: MutualNetwork
    method: Method
    batches: Batches
    config: TrainConfig
    place: Place
    folder: Path
    stop: StopRequest

    def __post_init__(self) -> None:
        """Make what the run changes beside the weights, and restore all of it.
        Raises CheckError for a bad checkpoint."""
        self.options = options = self.config.optimisation
        self.steps = options.epochs * self.batches.steps_per_epoch
        self.optimizer = build_optimizer(self.network, options)
        self.scaler = torch.amp.GradScaler(self.place.device.type, enabled=self.place.precision == "fp16")
        self.ema = MovingAverage(self.network, options.ema) if options.ema else None
        self.background = Background()
        self.state = self.build_state()
        self.position = self.state.restore()
        self.require_one_position()
        self.freeze(self.position.epoch)
        self.get_ready()

    def get_ready(self) -> None:
        """Prepare what the steps call: anew where other stages are frozen than before."""
        self.model = prepare(self.learner(), self.config, self.place)
        parts = self.optimizer, self.scaler, self.ema, self.place
        on_device = self.place.device.type == "cuda"
        self.work = Step(self.network, self.model, self.method, *parts, self.options.clip, on_device)
        # a captured step reads batches of images
        machine = self.config.machine
        self.take_step = graphed(self.work, machine, self.place, self.say) if self.captures else self.work

    @property
    def freezes(self) -> bool:
        return bool(self.config.model.freeze or self.config.model.head_epochs)

    @property
    def captures(self) -> bool:
        """Whether steps may become a CUDA graph."""
        return not self.freezes

    def freeze(self, epoch: int) -> bool:
        """Freeze the stages that do not learn in `epoch`; -> whether they were others before."""
        depth = frozen_in(epoch, self.config, self.network.depth)
        changes = depth != self.network.frozen
        if changes:
            self.network.freeze(depth)
        return changes

    def build_state(self) -> TrainingState:
        """-> what is saved and restored."""
        parts = self.optimizer, self.scaler, self.ema, self.background
        return TrainingState(self.folder, self.network, *parts)

    def say(self, text: str) -> None:
        """Tell the user, once and not for every process."""
        if self.place.world.is_main and not self.config.output.quiet:
            tqdm.write(text, file=sys.stderr)

    def learner(self) -> nn.Module:
        """-> what the steps call: it shares the network's weights,
        and gives what the method's losses take."""
        return Partial(self.network) if self.freezes else self.network

    def answering(self) -> nn.Module:
        """-> what is validated: it shares the network's weights."""
        return Partial(self.network) if self.freezes else self.network

    def require_one_position(self) -> None:
        """Raises CheckError where the processes found different checkpoints:
        each would go on from somewhere else."""
        found = f"{self.position.epoch} {self.position.step} {self.position.images}"
        if self.place.any(self.place.world.agree(found) != found):
            raise CheckError(
                f"the processes do not find the same checkpoint in {self.folder}; on several machines it has "
                "to be a folder that all of them share: copy it, or mount it, and resume again."
            )

    def run(self) -> Position:
        """-> where it ended. Raises Interrupted after saving when `stop` is requested,
        CheckError for what is not finite."""
        is_main = self.place.world.is_main
        self.recorder = None
        if is_main:
            options = flatten(options_to_json(self.config))
            self.recorder = Recorder(self.folder, self.position.epoch, self.config.output.track, options)
        self.progress = Progress(self.position.images, self.config.output.quiet or not is_main)
        self.saved_at = time.monotonic()
        try:
            for epoch in range(self.position.epoch, self.options.epochs):
                if self.enough(epoch):
                    break
                if self.freeze(epoch):
                    self.get_ready()
                self.train_epoch(epoch)
                self.close_epoch(epoch)
            self.background.wait()
        finally:
            self.background.close()
            self.progress.close()
            if self.recorder is not None:
                self.recorder.close()
        return self.position

    def enough(self, epoch: int) -> bool:
        """-> whether training ends before `epoch`: no better one for --patience epochs, apart from those of
        heads and fusion alone."""
        best = max(self.position.best_epoch, self.config.model.head_epochs)
        enough = 0 < self.options.patience <= epoch - best
        if enough:
            self.say(
                f"no better validation accuracy since epoch {self.position.best_epoch}: training ends here"
            )
        return enough

    def train_epoch(self, epoch: int) -> None:
        """All steps of `epoch` from the position on. Raises Interrupted after saving."""
        # the sums of an epoch that was interrupted go on
        self.model.train()
        self.meter = Meter.restore(self.position.meter, self.place.world)
        self.lap = Lap(time.monotonic(), self.position.seconds, self.position.images)

        first = self.position.step
        for step, micro_batches in enumerate(self.batches.training(epoch, first), start=first):
            number = epoch * self.batches.steps_per_epoch + step
            self.step(number, micro_batches)

            # what is shown; on a GPU not at every step, since it waits for the device
            if self.place.device.type == "cpu" or number % AGREE_EVERY == 0:
                self.meter.flush()
                shown = self.position.images, self.meter.last_loss, self.options.epochs
                self.progress.show(epoch, self.steps, number + 1, *shown)

            # save where it is due, or end here; the last step of an epoch leaves that to close_epoch
            self.background.check()
            if self.place.world.size == 1 or number % AGREE_EVERY == 0:
                self.save_in_mid_epoch(epoch, step + 1)
        self.meter.flush()

    def step(self, number: int, micro_batches: list[Batch]) -> None:
        """Step `number` of the run: the weights move once."""
        # dropout and the learning rate: functions of the step, so that a resumed run needs no state for them
        seed_everything(self.config.seed, "step", number * self.place.world.size + self.place.world.rank)
        ramp = self.ramp(number // self.batches.steps_per_epoch)
        self.work.set(learning_rate(number, self.steps, self.options), ramp)

        # the device's work, and what it measured
        frozen = self.method.frozen(self.network, number / self.steps, number)
        with self.place.searching(self.has_usual_shape(micro_batches)):
            rows = self.take_step(micro_batches, frozen)
        for batch, row in zip(micro_batches, rows, strict=True):
            self.meter.add(number, len(batch.labels), self.work.names, row)
            self.position.images += len(batch.labels) * self.place.world.size

    def has_usual_shape(self, micro_batches: list[Batch]) -> bool:
        """-> whether a step is one of the many that are alike: not the smaller last one of an epoch."""
        usual = self.options.batch_size // (self.options.accumulate * self.place.world.size)
        return all(len(batch.labels) >= usual for batch in micro_batches)

    def close_epoch(self, epoch: int) -> None:
        """Validate and save. Raises Interrupted where the run is to stop before its last epoch."""
        line = self.measured(epoch)
        self.background.wait()  # so that no more than an epoch is ever unwritten
        position = self.position
        position.epoch, position.step, position.meter = epoch + 1, 0, None

        # best, ema, record, last: whatever comes before the save of `last` is done again on resume, so a kill
        # is harmless; of equally good epochs the latest is kept, whose learning rate is the lowest
        accuracy = line["validation"][self.method.strong]
        better = accuracy >= position.best_accuracy
        if better:
            position.best_epoch, position.best_accuracy = epoch + 1, accuracy
        if self.recorder is not None:
            if better:
                self.state.save_weights("best", self.network, position)
            if self.ema is not None:
                self.state.save_weights("ema", self.ema.module, position)
            self.recorder.epoch(line)
            self.state.save(position)
        self.saved_at = time.monotonic()
        self.progress.epoch(line, self.options.epochs)

        if self.place.any(self.stop.requested) and epoch + 1 < self.options.epochs:
            self.background.wait()
            raise Interrupted(
                f"stopped after epoch {epoch + 1}; go on with: ffl-train --resume {self.folder}"
            )

    def measured(self, epoch: int) -> dict[str, Any]:
        """-> the epoch's line of metrics.jsonl; its time goes into the position."""
        self.place.world.share_buffers(self.network)
        seconds = time.monotonic() - self.lap.started
        self.position.seconds = self.lap.seconds + seconds
        last = (epoch + 1) * self.batches.steps_per_epoch - 1
        line = {
            "epoch": epoch,
            "lr": learning_rate(last, self.steps, self.options),
            "ramp": self.ramp(epoch),
            **self.meter.totals(self.place),
            "validation": accuracies(self.network, self.batches, "validation", self.place, self.answering()),
            "images_per_second": round((self.position.images - self.lap.images) / seconds, 1),
        }
        if self.ema is not None:
            assert isinstance(self.ema.module, MutualNetwork)  # a copy of `network`
            self.place.world.share_buffers(self.ema.module)
            answering = Partial(self.ema.module) if self.freezes else None
            line["ema"] = accuracies(self.ema.module, self.batches, "validation", self.place, answering)
        return line

    def save_in_mid_epoch(self, epoch: int, step: int) -> None:
        """Save before `step` of `epoch` where it is due or all are to stop. Raises Interrupted then."""
        due = time.monotonic() - self.saved_at > 60 * self.config.output.checkpoint_minutes
        stopping = self.place.any(self.stop.requested)
        if not (stopping or self.place.any(due)) or step == self.batches.steps_per_epoch:
            return
        self.meter.flush()
        self.position.epoch, self.position.step = epoch, step
        self.position.meter = self.meter.state(self.place)
        self.position.seconds = self.lap.seconds + time.monotonic() - self.lap.started
        if self.place.world.is_main:
            self.background.wait()
            self.state.save(self.position)
        self.saved_at = time.monotonic()
        if stopping:
            self.background.wait()
            raise Interrupted(f"stopped in epoch {epoch + 1}; go on with: ffl-train --resume {self.folder}")

    def ramp(self, epoch: int) -> float:
        """-> the weight of the distillation terms."""
        return ramp_up(epoch, self.options.epochs, self.config.model.ramp_up)


def prepare(network: nn.Module, config: TrainConfig, place: Place) -> nn.Module:
    """-> what the loop calls: `network` itself, compiled, or wrapped for several processes.
    All share its weights."""
    model: nn.Module = network
    if config.machine.compile:
        # Beside the network, which is evaluated as it is. For each shape of a step anew: one graph for every
        # number of images and of pixels would be slower than each of the four that a run has.
        model = cast(nn.Module, torch.compile(network, dynamic=False))
    if place.world.size > 1:
        devices = [place.device] if place.device.type == "cuda" else None
        # evaluation shares them
        model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    return model
