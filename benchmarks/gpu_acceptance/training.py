"""Our training, step by step under a stopwatch; and training commands as processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ffl_deploy.data.datasets import ImageData
from ffl_deploy.networks.mutual import MutualNetwork
from train.build import choose_network, make_batches
from train.config import MachineOptions, TrainConfig
from train.data.batches import Batch
from train.distributed import World
from train.loop import AGREE_EVERY, Trainer
from train.machine import Place, choose_device
from train.meter import Meter
from train.methods import build_method
from train.randomness import seed_everything
from train.recipes import RECIPES
from train.stopping import StopRequest

RECIPE = "cifar100-resnet32-paper"
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a step is taken. batch: images; searches: whether cuDNN tries out its algorithms."""

    precision: str
    batch: int = 128
    cuda_graph: Literal["auto", "on", "off"] = "off"
    compile: bool = False
    searches: bool = True

    @property
    def name(self) -> str:
        ways = {"on": "CUDA graph", "off": "as it is", "auto": "auto"}
        further = f"{', compiled' if self.compile else ''}{'' if self.searches else ', no search'}"
        return f"{self.precision}, {ways[self.cuda_graph]}{further}, {self.batch}"


class Training:
    """FFL of two ResNet-32 by the paper's recipe, a step at a time."""

    def __init__(self, data: ImageData, device: str, setting: Setting, folder: Path, **changes: Any) -> None:
        recipe = RECIPES[RECIPE]
        machine = MachineOptions(
            device="cuda" if device == "cuda" else "cpu",
            cuda_graph=setting.cuda_graph,
            compile=setting.compile,
        )
        model = dataclasses.replace(recipe.model, **changes)
        optimisation = dataclasses.replace(recipe.optimisation, batch_size=setting.batch)
        output = dataclasses.replace(recipe.output, quiet=True)
        config: TrainConfig = dataclasses.replace(
            recipe, machine=machine, model=model, optimisation=optimisation, output=output
        )
        place = Place(choose_device(machine, World()), setting.precision, searches=setting.searches)
        method = build_method(model.method)
        seed_everything(0, "weights")
        network = MutualNetwork(choose_network(config, method, data)).to(place.device)
        network = network.to(memory_format=torch.channels_last)
        batches = make_batches(config, data, place)
        self.name, self.place, self.said = setting.name, place, list[str]()
        self.trainer = Trainer(network, method, batches, config, place, folder, StopRequest())
        self.trainer.say = self.said.append  # type: ignore[method-assign]
        if hasattr(self.trainer.take_step, "say"):
            self.trainer.take_step.say = self.said.append
        self.trainer.model.train()
        self.trainer.meter = Meter()
        self.number, self.stream = 0, self.endless()

    def endless(self) -> Iterator[list[Batch]]:
        epoch = 0
        while True:
            yield from self.trainer.batches.training(epoch, 0)
            epoch += 1

    def step(self) -> None:
        """One step, with the batch that it takes; as the loop does, numbers are asked for every tenth
        time."""
        self.trainer.step(self.number, next(self.stream))
        self.number += 1
        if self.place.device.type == "cpu" or self.number % AGREE_EVERY == 0:
            self.trainer.meter.flush()

    def seconds(self, steps: int) -> float:
        """-> time of a step, over `steps` of them."""
        wait(self.place.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.place.device)
        return (time.perf_counter() - started) / steps


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def module(name: str, *flags: str) -> list[str]:
    """-> the command of a console script's module; scripts are not installed on a bare machine."""
    code = f"import sys; sys.argv[0] = {name!r}; from {name} import entry; entry()"
    return [sys.executable, "-c", code, *flags]


def run(command: list[str], timeout: float = 600.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder; -> how it ended."""
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": pythonpath(), **environment},
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip


def pythonpath() -> str:
    before = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """-> the last line on stderr."""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else ""
