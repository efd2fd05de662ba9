"""What a training step costs: against batch size, number of branches, depth, precision and image size.

    python -m benchmarks.train_scaling [--device cuda] [--steps 8] [--json OUT]

FFL on 100 classes of 32x32 pixels, random images (speed does not depend on them), each configuration in a
process of its own: `Trainer` as it is, batches in memory. The clock runs from one request for a batch to the
next; peak memory is the process's resident set, or what torch allocated on the GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 3
PLAIN = {"depth": 32, "branches": 2, "batch": 128, "size": 32, "precision": "auto"}
GRID = [
    {},
    *({"batch": batch} for batch in (32, 64, 256)),
    *({"branches": branches} for branches in (3, 4)),
    *({"depth": depth} for depth in (20, 56, 110)),
    *({"size": size} for size in (16, 24)),
    *({"precision": precision} for precision in ("fp32", "bf16")),
]


def measure(setting: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """-> {"ms": median of a step, "precision", "mib": peak memory}."""
    import resource
    from dataclasses import replace

    import torch

    from ffl_deploy.data.datasets import ArraySplit, ImageData
    from ffl_deploy.networks.mutual import MutualNetwork
    from ffl_deploy.preprocessing import Preprocessing
    from train.build import choose_network
    from train.config import (
        DataOptions,
        MachineOptions,
        ModelOptions,
        OptimisationOptions,
        OutputOptions,
        TrainConfig,
    )
    from train.data.batches import InMemoryBatches, Plan, Shares
    from train.distributed import World
    from train.loop import Trainer
    from train.machine import choose_device, choose_place
    from train.methods import build_method
    from train.stopping import StopRequest

    count, batch, size = (steps + WARM_UP) * setting["batch"], setting["batch"], setting["size"]
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    split = ArraySplit(images, np.arange(count) % 100)
    few = ArraySplit(images[:2], split.labels[:2])
    names = tuple(str(k) for k in range(100))
    data = ImageData("noise", names, Preprocessing(size, size), (128.0,) * 3, (64.0,) * 3, split, few, few)
    config = TrainConfig(
        model=ModelOptions(branches=(f"resnet{setting['depth']}",) * setting["branches"]),
        optimisation=OptimisationOptions(epochs=1, batch_size=batch),
        machine=MachineOptions(device="cuda" if device == "cuda" else "cpu"),
        output=OutputOptions(quiet=True),
    )
    place = choose_place(setting["precision"], choose_device(config.machine, World()), World())
    method = build_method("ffl")
    network = (
        MutualNetwork(choose_network(config, method, data))
        .to(place.device)
        .to(memory_format=torch.channels_last)
    )
    batches = InMemoryBatches(
        data, Plan(replace(DataOptions(), crop_padding=4), batch, 0.0, 0, place.device, Shares(World(), 1))
    )
    requests: list[float] = []
    source = batches.training

    def timed(epoch: int, first_step: int) -> Iterator[Any]:
        for step in source(epoch, first_step):
            yield step
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            requests.append(time.perf_counter())

    batches.training = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        Trainer(network, method, batches, config, place, Path(folder), StopRequest()).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if place.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "ms": float(np.median(np.diff(requests[WARM_UP - 1 :]))) * 1e3,
        "precision": place.precision,
        "mib": peak // 2**20,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="counted steps")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one), arguments.device, arguments.steps)))
        return 0
    head = ["branches", "batch", "pixels", "precision", "parameters", "ms a step", "images/s", "peak memory"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    results = []
    for change in GRID:
        setting = PLAIN | change
        command = [sys.executable, "-m", "benchmarks.train_scaling", "--one", json.dumps(setting)]
        command += ["--device", arguments.device, "--steps", str(arguments.steps)]
        result = setting | json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        results.append(result)
        cells = [
            f"{result['branches']} x resnet{result['depth']}",
            result["batch"],
            result["size"],
            result["precision"],
        ]
        cells += [
            f"{result['parameters']:,}",
            f"{result['ms']:.0f}",
            f"{1e3 * result['batch'] / result['ms']:.0f}",
        ]
        print(f"| {' | '.join(map(str, cells))} | {result['mib']} MiB |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
