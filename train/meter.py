"""Running sums of an epoch: every loss and every classifier's hits,
without waiting for the device each step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ffl_deploy.errors import CheckError
from train.distributed import World
from train.machine import Place

NOT_FINITE = (
    "To resume would repeat it: start a new run, with another --out, and a lower --lr, --clip 1.0, or, "
    "where this was in 16 bits, --precision fp32; checkpoints that were saved before are kept."
)
"""What a user can do, wherever it is found."""


class Names(NamedTuple):
    """What a row of `measures` holds, in order."""

    losses: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()


@torch.no_grad()
def measures(losses: dict[str, Tensor], classifiers: dict[str, Tensor], labels: Tensor) -> Tensor:
    """losses: scalars; classifiers: logits [n, classes]; labels: int64 [n] -> float32 [losses + classifiers]
    on the device: each loss, and each classifier's right answers."""
    hits = [(logits.argmax(dim=1) == labels).sum().float() for logits in classifiers.values()]
    return torch.stack([*(loss.detach().float() for loss in losses.values()), *hits])


class Meter:
    """Collects a row of numbers per micro-batch on the device;
    `flush` brings them over and checks that they are finite."""

    def __init__(self) -> None:
        self.names: Names = Names()
        # losses (sums of means), hits, rows, images: float64, added in order of the steps
        self.sums = np.zeros(0)
        self.last_loss = float("nan")
        self._pending: list[tuple[int, int, Tensor]] = []  # step, images, losses and hits on the device

    def add(self, step: int, images: int, names: Names, row: Tensor) -> None:
        """step: number within the run; images: how many `row`, as `measures` gives it, is of."""
        self.names = self.names if self.names.losses else names
        # numbers of the host stay there: sending them would wait for the device
        self._pending.append((step, images, row))

    def flush(self) -> None:
        """Take over what is pending. Raises CheckError that names the step
        and its losses where one is not finite."""
        if not self._pending:
            return
        rows = torch.stack([row for _, _, row in self._pending]).double().cpu().numpy()
        for (step, images, _), measured in zip(self._pending, rows, strict=True):
            row = np.append(measured, [1.0, images])
            losses = dict(zip(self.names.losses, row[: len(self.names.losses)], strict=True))
            if not np.isfinite(list(losses.values())).all():
                shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
                raise CheckError(f"the loss is not finite at step {step} ({shown}). {NOT_FINITE}")
            self.sums = row if not len(self.sums) else self.sums + row
            self.last_loss = float(sum(losses.values()))
        self._pending.clear()

    def totals(self, place: Place) -> dict[str, Any]:
        """-> {"loss", "parts": means, "train": accuracies 0..1} over all processes."""
        sums = place.world.sum(torch.from_numpy(self.sums.copy()).to(place.device)).cpu().numpy()
        rows, images = sums[-2], sums[-1]
        names, classifiers = self.names
        losses = {name: float(value / rows) for name, value in zip(names, sums[: len(names)], strict=True)}
        hits = sums[len(names) : -2]
        return {
            "loss": sum(losses.values()),
            "parts": losses,
            "train": {name: float(value / images) for name, value in zip(classifiers, hits, strict=True)},
        }

    def state(self, place: Place) -> dict[str, Any]:
        """-> what `restore` takes: the sums over all processes."""
        sums = place.world.sum(torch.from_numpy(self.sums.copy()).to(place.device))
        names, classifiers = map(list, self.names)
        return {"names": names, "classifiers": classifiers, "sums": sums.tolist()}

    @classmethod
    def restore(cls, state: dict[str, Any] | None, world: World) -> Meter:
        """-> the meter at a checkpoint in mid-epoch; the first process carries on everybody's sums."""
        meter = cls()
        if state and state["sums"]:
            meter.names = Names(tuple(state["names"]), tuple(state["classifiers"]))
            meter.sums = np.array(state["sums"]) if world.is_main else np.zeros(len(state["sums"]))
        return meter
