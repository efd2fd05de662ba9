"""Two steps of training on fake CUDA tensors:
which copies between CPU and GPU the CPU would have to wait for.

    python -m tests.train.gpu_waits METHOD:PRECISION ...

A process of its own: what stands for a GPU here must not stay in the one that runs the other tests.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train.build
from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.preprocessing import Preprocessing
from train.config import DataOptions, TrainConfig
from train.cuda_graph import copies, fill
from train.data.batches import InMemoryBatches, Plan, Shares
from train.distributed import World
from train.machine import Place
from train.meter import Meter
from train.methods import build_method
from train.optimizer import build_optimizer
from train.step import Step

MICRO_BATCHES = 2


class Copies(TorchDispatchMode):
    """Notes every copy between CPU and GPU for which the CPU would have to wait,
    with the line that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.blocking, self.free = False, list[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if not self.watching or name not in ("_to_copy", "copy_", "_local_scalar_dense"):
            return result
        leaves = torch.utils._pytree.tree_leaves
        devices = {
            value.device.type for value in leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)
        }
        if len(devices) > 1 or name == "_local_scalar_dense":
            if kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False):
                self.free += 1
            else:
                ours = [
                    frame for frame in traceback.extract_stack() if f"{os.sep}train{os.sep}" in frame.filename
                ]
                self.blocking.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}")
        return result


def on_fake_gpu(network: nn.Module, device: torch.device) -> None:
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(value.shape, dtype=value.dtype, device=device)
                )
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)


def watched_steps(method: str, precision: str) -> Copies:
    """The real batches, forward pass, losses and meter of two steps, and what a captured step is given; the
    backward pass needs a GPU."""
    chosen, device = build_method(method, 3.0), torch.device("cuda:0")
    images = np.zeros((64, 32, 32, 3), np.uint8)
    split = ArraySplit(images, np.arange(64) % 10)
    classes = tuple(map(str, range(10)))
    data = ImageData("noise", classes, Preprocessing(32, 32), (128.0,) * 3, (64.0,) * 3, split, split, split)
    config = TrainConfig(data=DataOptions(augment="crop"))
    config = replace(config, model=replace(config.model, method=method, branches=("resnet8", "resnet8")))
    branches = chosen.branches_for(("resnet8", "resnet8"))
    config = replace(config, model=replace(config.model, branches=branches))
    network = MutualNetwork(train.build.choose_network(config, chosen, data))
    seen = Copies()
    with FakeTensorMode(allow_non_fake_inputs=True), seen:
        on_fake_gpu(network, device)
        network.train()
        batches = InMemoryBatches(data, Plan(config.data, 16, 0.1, 0, device, Shares(World(), MICRO_BATCHES)))
        place, meter = Place(device, precision), Meter()
        optimizer = build_optimizer(network, config.optimisation)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        step = Step(network, network, chosen, optimizer, scaler, None, place, 0.0, on_device=True)
        own = copies(next(batches.training(0, 0)))
        seen.watching = True
        for number, given in zip(range(2), batches.training(0, 0), strict=False):
            step.set(0.1 / (number + 1), 0.5)
            fill(own, given)
            for batch in own:
                _, row = step.forward(batch)
                meter.add(number, len(batch.labels), step.names, row)
        seen.watching = False
    assert len(meter._pending) == 2 * MICRO_BATCHES
    return seen


if __name__ == "__main__":
    answers = {}
    for wanted in sys.argv[1:]:
        found = watched_steps(*wanted.split(":"))
        answers[wanted] = {"blocking": found.blocking, "free": found.free}
    print(json.dumps(answers))
