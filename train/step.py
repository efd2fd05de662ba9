"""One step of training: forward, losses, backward, update, as work on the device alone.

The host decides nothing in it and asks for no number, so that a GPU is never waited for and the whole of it
can be captured as one CUDA graph (cuda_graph.py). What changes from step to step, the learning rate and the
ramp-up, lies on a GPU in tensors of its own; a captured step reads them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.data.batches import Batch
from train.ema import MovingAverage
from train.machine import Place
from train.meter import Names, measures
from train.methods import Method
from train.optimizer import SCALE, drop_gradients


@dataclass(eq=False)
class Step:
    """model: what is called; it shares its weights with `network`, whose gradients are clipped and averaged.

    clip: largest gradient norm, 0 for none; on_device: whether learning rate and ramp-up are tensors.
    """

    network: nn.Module
    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    place: Place
    clip: float
    on_device: bool

    def __post_init__(self) -> None:
        self.names = Names()  # of what `work` measures, known once it ran
        self.rate: float | Tensor = 0.0
        self.ramp: float | Tensor = 0.0
        if self.on_device:
            self.rate, self.ramp = (torch.zeros((), device=self.place.device) for _ in range(2))
        # one tensor for all groups of the same scale
        self.rates: dict[float, Tensor] = {1.0: self.rate} if isinstance(self.rate, Tensor) else {}

    def set(self, rate: float, ramp: float) -> None:
        """Learning rate and weight of the distillation terms from the next step on."""
        if isinstance(self.rate, Tensor) and isinstance(self.ramp, Tensor):
            self.rate.fill_(rate)
            self.ramp.fill_(ramp)
        else:
            self.rate, self.ramp = rate, ramp
        for group in self.optimizer.param_groups:
            scale = group.get(SCALE, 1.0)
            if isinstance(self.rate, Tensor):
                own = self.rates.setdefault(scale, torch.zeros_like(self.rate))
                group["lr"] = own.fill_(rate * scale)
            else:
                group["lr"] = rate * scale

    def __call__(self, batches: list[Batch], frozen: Sequence[nn.Module]) -> list[Tensor]:
        """Move the weights once; -> what was measured of each micro-batch, as `measures` gives it, on the
        device. frozen: modules that do not learn in this step."""
        rows = self.work(batches, frozen)
        self.count()
        return rows

    def work(self, batches: list[Batch], frozen: Sequence[nn.Module]) -> list[Tensor]:
        """The part of the step that the device does."""
        rows = []
        for turn, batch in enumerate(batches):
            # processes exchange gradients once, with the last micro-batch; the forward pass reads it
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = turn == len(batches) - 1
            loss, row = self.forward(batch)
            self.scaler.scale(loss / len(batches) if len(batches) > 1 else loss).backward()
            rows.append(row)

        # update: what the method freezes has no gradient, so nothing of it moves
        drop_gradients(frozen)
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.average(self.network)
        return rows

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> the loss that is minimised, and what is measured of it."""
        with self.place.autocast():
            outputs = self.model(batch.images)
        losses, classifiers = self.method.losses(outputs, batch.soft_labels, self.ramp), outputs.classifiers()
        self.names = Names(tuple(losses), tuple(classifiers))
        return torch.stack(list(losses.values())).sum(), measures(losses, classifiers, batch.labels)

    def count(self) -> None:
        """What the host notes of a step that the device has been given."""
        if self.ema is not None:
            self.ema.count()
