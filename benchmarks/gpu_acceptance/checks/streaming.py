"""Images that do not fit into memory: worker processes decode, and the GPU should not wait for them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_acceptance.report import Context
from benchmarks.gpu_acceptance.training import wait
from ffl_deploy.data.datasets import DataSpec, load_data
from ffl_deploy.networks.mutual import MutualNetwork
from train.build import choose_network, make_batches
from train.config import (
    DataOptions,
    MachineOptions,
    ModelOptions,
    OptimisationOptions,
    OutputOptions,
    TrainConfig,
)  # fmt: skip
from train.distributed import World
from train.loop import Trainer
from train.machine import Place, choose_device
from train.methods import build_method
from train.stopping import StopRequest


def run(context: Context) -> None:
    count, side, pixels, batch = (2000, 320, 224, 64) if context.gpu else (80, 96, 64, 16)
    folder = jpegs(context.work / "jpegs", count, side)
    config = TrainConfig(
        data=DataOptions(source=str(folder), augment="resized-crop", image_size=pixels),
        model=ModelOptions(method="vanilla", branches=("torchvision:resnet18",)),
        optimisation=OptimisationOptions(epochs=2 if context.gpu else 1, batch_size=batch, lr=0.01),
        machine=MachineOptions(device="cuda" if context.gpu else "cpu", workers=14 if context.gpu else 1),
        output=OutputOptions(quiet=True),
    )
    data = load_data(DataSpec(source=str(folder), image_size=pixels, validation=0.1), 0)
    place = Place(choose_device(config.machine, World()), "bf16" if context.gpu else "fp32")
    method = build_method("vanilla")
    network = MutualNetwork(choose_network(config, method, data)).to(place.device)
    batches = make_batches(config, data, place)
    clock = Waiting(batches, place.device)
    batches.training = clock.training  # type: ignore[method-assign]
    trainer = Trainer(
        network.to(memory_format=torch.channels_last), method, batches, dataclasses.replace(config), place,
        context.work / "streaming", StopRequest(),
    )  # fmt: skip
    position = trainer.run()
    context.report.note(
        images=position.images, images_per_second=round(position.images / position.seconds, 1),
        share_of_waiting=round(clock.waited / clock.total, 4), workers=config.machine.workers,
    )  # fmt: skip
    left = children()
    context.report.must("no worker is left", not left)
    context.report.must("every image was trained", position.images > 0.8 * count * config.optimisation.epochs)


class Waiting:
    """Batches, and how long training waited for them."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.source, self.device, self.waited, self.total = batches.training, device, 0.0, 0.0

    def training(self, epoch: int, first_step: int) -> Iterator[Any]:
        stream, begun = self.source(epoch, first_step), time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(stream, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                break
            yield batch
        wait(self.device)
        self.total += time.perf_counter() - begun


def children() -> list[str]:
    """-> processes of this one that still live."""
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def jpegs(folder: Path, count: int, side: int) -> Path:
    """-> an image folder of two classes of JPEGs, `count` for training."""
    jobs = [("train", count), ("test", max(4, count // 20))]
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as pool:
        for part, images in jobs:
            for name in ("a", "b"):
                (folder / part / name).mkdir(parents=True, exist_ok=True)
            list(pool.map(lambda number, part=part: write(folder, part, number, side), range(images)))
    return folder


def write(folder: Path, part: str, number: int, side: int) -> None:
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 256, (12, 12, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    coarse.save(folder / part / "ab"[number % 2] / f"{number}.jpg", quality=90)
