"""What training changes, and where it stands: saved and restored as one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from ffl_deploy.errors import CheckError
from ffl_deploy.files import existing_folder
from ffl_deploy.networks.checkpoint import MODEL, STATE, load_weights, read_checkpoint, save_checkpoint
from ffl_deploy.networks.mutual import MutualNetwork
from train.background import Background
from train.ema import MovingAverage
from train.meter import NOT_FINITE
from train.optimizer import load_optimizer_tensors, optimizer_tensors

OPTIMIZER = "optimiser"  # names of files in a checkpoint, which runs of earlier versions hold too
EMA = "ema"


@dataclass
class Position:
    """Where a run stands: what state.json holds beside the hashes."""

    epoch: int = 0  # the next one; so many are complete
    step: int = 0  # the next one of that epoch
    best_epoch: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0
    images: int = 0  # seen so far
    meter: dict[str, Any] | None = None  # sums of an unfinished epoch
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """All that a run changes, and the folder that keeps it. ema: the moving average of the weights,
    if there is one; background: what writes.

    A checkpoint is copied to the CPU when it is asked for, and written while training goes on; checkpoints
    appear in the order in which they were asked for.
    """

    folder: Path
    network: MutualNetwork
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    background: Background

    def save(self, position: Position) -> None:
        """Write checkpoint `last`, which `restore` goes on from.
        Raises CheckError before writing a bad weight."""
        position.scaler = self.scaler.state_dict()
        tensors: dict[str, Mapping[str, Tensor]] = {OPTIMIZER: optimizer_tensors(self.optimizer)}
        if self.ema is not None:
            tensors[EMA] = self.ema.state_dict()
        self.save_weights("last", self.network, position, tensors)

    def save_weights(
        self,
        name: str,
        network: nn.Module,
        position: Position,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write checkpoint `name` with the weights of `network`.
        Raises CheckError before writing a bad weight."""
        weights = self.weights(name, network)
        if broken := first_not_finite(weights):
            raise CheckError(
                f"the weights are not finite after epoch {position.epoch} ({broken}). {NOT_FINITE}"
            )
        tensors = {MODEL: weights, **self.beside(), **(others or {})}
        kept = {stem: on_cpu(named) for stem, named in tensors.items()}
        state = copy.deepcopy(vars(position))
        self.background.do(partial(save_checkpoint, self.folder / "checkpoints" / name, kept, state))

    def weights(self, name: str, network: nn.Module) -> Mapping[str, Tensor]:
        """-> what checkpoint `name` holds of `network`."""
        return network.state_dict()

    def beside(self) -> Mapping[str, Mapping[str, Tensor]]:
        """-> what every checkpoint holds beside the weights."""
        return {}

    def restore(self) -> Position:
        """Load checkpoint `last` into everything; -> where it stands, or the start where there is none."""
        last = existing_folder(self.folder / "checkpoints" / "last")
        if last is None:
            return Position()

        # the tensors: weights, optimizer, moving average
        content = read_checkpoint(last)
        load_weights(self.network, content.tensors[MODEL], str(last))
        load_optimizer_tensors(self.optimizer, content.tensors[OPTIMIZER])
        if self.ema is not None:
            if EMA not in content.tensors:
                raise CheckError(
                    f"{last} holds no moving average of the weights, which config.json asks for; it cannot "
                    "be resumed."
                )
            self.ema.load_state_dict(content.tensors[EMA])

        # the position
        try:
            named = {name: value for name, value in content.state.items() if name != "sha256"}
            position = msgspec.convert(named, Position)
        except msgspec.ValidationError as error:
            raise CheckError(
                f"{last / STATE} does not say where the run stands ({error}); it cannot be resumed."
            ) from error
        self.scaler.load_state_dict(position.scaler)
        return position


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """-> the name of the first tensor that holds an infinity or NaN. A GPU is asked once for all of them."""
    floats = [value for value in tensors.values() if value.is_floating_point()]
    # The largest absolute value of a tensor is finite where every value is.
    if not floats or torch.isfinite(torch.stack(torch._foreach_norm(floats, float("inf")))).all():
        return None
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)


def on_cpu(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-> copies on the CPU. Those of a GPU come over together, one transfer for each type of number."""
    copies = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in named.items()
        if value.device.type == "cpu"
    }
    others = {name: value.detach() for name, value in named.items() if name not in copies}
    for kind in {value.dtype for value in others.values()}:
        alike = {name: value for name, value in others.items() if value.dtype == kind}
        flat = torch.cat([value.reshape(-1) for value in alike.values()]).cpu()
        parts = flat.split([value.numel() for value in alike.values()])
        copies |= {name: part.view(alike[name].shape) for name, part in zip(alike, parts, strict=True)}
    return {name: copies[name] for name in named}
