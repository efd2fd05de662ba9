"""The training loop. It is handed a network, a method and batches, and knows none of them by name.

Features: mixed precision, gradient accumulation and clipping, EMA, several processes, a checkpoint at any step.
Exact resume: learning rate, ramp-up, data order, augmentation and dropout are functions of (seed, step), so a
checkpoint needs the weights, the optimiser and the number of the step; on a CPU the result is the same bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ffl_deploy.errors import CheckError, Interrupted
from ffl_deploy.files import existing_folder
from ffl_deploy.networks.checkpoint import MODEL, STATE, load_weights, read_checkpoint, save_checkpoint
from ffl_deploy.networks.mutual import MutualNetwork
from train.config import TrainConfig
from train.data.batches import Batches
from train.distributed import World
from train.evaluate import accuracies
from train.machine import Machine
from train.meter import Meter
from train.methods import Method
from train.optimizer import build_optimiser, drop_gradients, load_optimiser_tensors, optimiser_tensors
from train.randomness import seed_everything
from train.record import Progress, Recorder
from train.schedule import learning_rate, ramp_up
from train.stopping import StopRequest

AGREE_EVERY = 10  # steps between two questions to all processes whether to stop or save


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


def fit(
    network: MutualNetwork,
    method: Method,
    batches: Batches,
    config: TrainConfig,
    machine: Machine,
    world: World,
    folder: Path,
    stop: StopRequest,
) -> Position:
    """Train `network` from its checkpoint in `folder`, or from the start, to the last epoch.

    Leaves checkpoints `last`, `best` (highest validation accuracy of the method's strong classifier) and `ema`.
    Raises Interrupted after saving when `stop` is requested, CheckError when a loss or a weight is not finite.
    """
    options, steps = config.optimisation, config.optimisation.epochs * batches.steps_per_epoch
    optimiser = build_optimiser(network, options)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True) if options.ema else None
    at = restore(folder, network, optimiser, scaler, ema)
    model = prepare(network, config, machine, world)

    recorder = Recorder(folder, at.epoch) if world.is_main else None
    progress = Progress(at.images, config.output.quiet or not world.is_main)
    saved_at = time.monotonic()
    try:
        for epoch in range(at.epoch, options.epochs):
            model.train()
            meter, ramp = Meter.restore(at.meter, world), ramp_up(epoch, options.epochs, config.model.ramp_up)
            started, images_before, seconds_before = time.monotonic(), at.images, at.seconds

            for step, micro_batches in enumerate(batches.training(epoch, at.step), start=at.step):
                number = epoch * batches.steps_per_epoch + step
                seed_everything(config.seed, "step", number * world.size + world.rank)  # dropout and the like
                rate = learning_rate(number, steps, options)
                for group in optimiser.param_groups:
                    group["lr"] = rate

                for turn, batch in enumerate(micro_batches):
                    if isinstance(model, DistributedDataParallel):  # exchange gradients once, with the last micro-batch;
                        model.require_backward_grad_sync = turn == len(micro_batches) - 1  # read by the forward pass
                    with machine.autocast():
                        outputs = model(batch.images)
                    parts = method.losses(outputs, batch.targets, ramp)
                    loss = torch.stack(list(parts.values())).sum() / len(micro_batches)
                    scaler.scale(loss).backward()
                    meter.add(number, parts, outputs.classifiers(), batch.labels)
                    at.images += len(batch.labels) * world.size

                drop_gradients(method.frozen(network, number / steps, number))
                if options.clip:
                    scaler.unscale_(optimiser)
                    nn.utils.clip_grad_norm_(network.parameters(), options.clip)
                scaler.step(optimiser)
                scaler.update()
                optimiser.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update_parameters(network)

                if machine.device.type == "cpu" or number % AGREE_EVERY == 0:
                    meter.flush()
                    progress.show(epoch, steps, number + 1, at.images, meter.last_loss, options.epochs)
                if world.size == 1 or number % AGREE_EVERY == 0:
                    due = time.monotonic() - saved_at > 60 * config.output.checkpoint_minutes
                    stopping = world.any(stop.requested, machine.device)
                    if (stopping or world.any(due, machine.device)) and step + 1 < batches.steps_per_epoch:
                        meter.flush()
                        at.epoch, at.step, at.meter = epoch, step + 1, meter.state(world, machine.device)
                        at.seconds = seconds_before + time.monotonic() - started
                        save(folder, "last", network, at, world, optimiser, scaler, ema)
                        saved_at = time.monotonic()
                        if stopping:
                            raise Interrupted(f"stopped in epoch {epoch + 1}; go on with: --resume {folder}")

            meter.flush()
            world.share_buffers(network)
            seconds = time.monotonic() - started
            line = {
                "epoch": epoch,
                "lr": rate,
                "ramp": ramp,
                **meter.totals(world, machine.device),
                "validation": accuracies(network, batches, "validation", machine, world),
                "images_per_second": round((at.images - images_before) / seconds, 1),
            }
            if ema is not None:
                assert isinstance(ema.module, MutualNetwork)  # a copy of `network`
                world.share_buffers(ema.module)
                line["ema"] = accuracies(ema.module, batches, "validation", machine, world)
            at.epoch, at.step, at.meter, at.seconds = epoch + 1, 0, None, seconds_before + seconds
            # The order makes a kill harmless: whatever comes before the save of `last` is done again on resume.
            # Of equally good epochs the latest is kept: its learning rate is the lowest.
            if line["validation"][method.strong] >= at.best_accuracy:
                at.best_epoch, at.best_accuracy = epoch + 1, line["validation"][method.strong]
                save(folder, "best", network, at, world)
            if ema is not None:
                save(folder, "ema", ema.module, at, world)
            if recorder is not None:
                recorder.epoch(line)
            save(folder, "last", network, at, world, optimiser, scaler, ema)
            saved_at = time.monotonic()
            progress.epoch(line, options.epochs)
            if world.any(stop.requested, machine.device) and epoch + 1 < options.epochs:
                raise Interrupted(f"stopped after epoch {epoch + 1}; go on with: --resume {folder}")
    finally:
        progress.close()
        if recorder is not None:
            recorder.close()
    return at


def prepare(network: MutualNetwork, config: TrainConfig, machine: Machine, world: World) -> nn.Module:
    """-> what the loop calls: `network` itself, compiled, or wrapped for several processes. All share its weights."""
    model: nn.Module = network
    if config.machine.compile:
        model.compile()  # in place, so that the state_dict keeps its names
    if world.size > 1:
        devices = [machine.device] if machine.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices)
    return model


def save(
    folder: Path,
    name: str,
    network: nn.Module,
    at: Position,
    world: World,
    optimiser: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ema: AveragedModel | None = None,
) -> None:
    """Write checkpoint `name`; with the optimiser it can be resumed from. Raises CheckError before writing a bad weight."""
    if not world.is_main:
        return
    weights = network.state_dict()
    broken = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckError(
            f"the weights are not finite after epoch {at.epoch} ({broken[0]}); the last checkpoint is kept. "
            "Lower --lr, add --clip 1.0 or use --precision fp32."
        )
    tensors: dict[str, Mapping[str, Tensor]] = {MODEL: weights}
    if optimiser is not None:
        tensors["optimiser"] = optimiser_tensors(optimiser)
    if ema is not None:
        tensors["ema"] = ema.state_dict()
    if scaler is not None:
        at.scaler = scaler.state_dict()
    save_checkpoint(folder / "checkpoints" / name, tensors, vars(at))


def restore(
    folder: Path,
    network: MutualNetwork,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
) -> Position:
    """Load checkpoint `last` of `folder` into everything; -> where it stands, or the start where there is none."""
    last = existing_folder(folder / "checkpoints" / "last")
    if last is None:
        return Position()
    content = read_checkpoint(last)
    load_weights(network, content.tensors[MODEL], str(last))
    load_optimiser_tensors(optimiser, content.tensors["optimiser"])
    if ema is not None:
        if "ema" not in content.tensors:
            raise CheckError(f"{last} holds no moving average of the weights, which config.json asks for; it cannot be resumed.")
        ema.load_state_dict(content.tensors["ema"])
    try:
        at = msgspec.convert({name: value for name, value in content.state.items() if name != "sha256"}, Position)
    except msgspec.ValidationError as error:
        raise CheckError(f"{last / STATE} does not say where the run stands ({error}); it cannot be resumed.") from error
    scaler.load_state_dict(at.scaler)
    return at
