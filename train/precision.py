"""The arithmetic that trains fastest on a GPU, by measurement (--precision auto).

Tensor cores compute bf16 twice as fast as TF32, but autocast also casts weights, activations and gradients: a
network of small layers, or one that is bound by launches, can be slower in it. So the run's own network is
timed forwards and backwards, on a batch of the run's own size, the way its steps will run.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ffl_deploy.host import out_of_memory
from ffl_deploy.networks.mutual import MutualNetwork
from train.config import TrainConfig
from train.cuda_graph import WARM, Cuda, Device, graphs_wanted
from train.data.batches import Batch
from train.machine import Place
from train.meter import measures
from train.methods import Method

ROUNDS = 10
WORTH_IT = 1.05
"""Speed-up over fp32 from which fewer bits are taken: below it, the choice would vary from run to run."""


def candidates(device: torch.device) -> tuple[str, ...]:
    """-> the precisions among which `auto` chooses on this GPU."""
    torch.cuda.set_device(device)
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32", half


def fastest_precision(network: MutualNetwork, method: Method, config: TrainConfig, place: Place) -> str:
    """-> the precision in which a GPU passes fastest through `network`, which stays as it is."""
    options, world = config.optimisation, place.world
    images = max(2, options.batch_size // (options.accumulate * world.size))
    batch = some_batch(network, images, place.device)
    device, graphs = Cuda(place.device), graphs_wanted(config.machine, place)
    seconds = {
        name: seconds_of_passes(network, method, batch, replace(place, precision=name), device, graphs)
        for name in candidates(place.device)
    }
    torch.cuda.empty_cache()
    chosen = world.agree(choice(seconds))
    if world.is_main and not config.output.quiet:
        shown = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        print(f"forward and backward pass: {shown}; training in {chosen}.", file=sys.stderr, flush=True)
    return chosen


def choice(seconds: Mapping[str, float]) -> str:
    """-> the fastest of `seconds`, fp32 unless another is clearly faster."""
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest if seconds["fp32"] >= WORTH_IT * seconds[fastest] else "fp32"


def some_batch(network: MutualNetwork, images: int, device: torch.device) -> Batch:
    """-> a batch of the run's shape; speed does not depend on its values."""
    size = network.config.height, network.config.width
    pixels = torch.linspace(-2, 2, images * 3 * size[0] * size[1], device=device).view(images, 3, *size)
    labels = torch.arange(images, device=device) % network.config.classes
    return Batch(pixels.contiguous(memory_format=torch.channels_last), labels, labels)


def seconds_of_passes(
    network: MutualNetwork, method: Method, batch: Batch, place: Place, device: Device, graphs: bool
) -> float:
    """-> median time of a forward and backward pass through a copy of `network`; infinite where it takes more
    memory than there is. graphs: whether steps will be captured, which makes launches free."""
    passes = both_passes(copy.deepcopy(network).train(), method, batch, place)
    try:
        for _ in range(WARM):  # in these cuDNN chooses its algorithms
            with place.searching():
                device.run(passes)
        run: Callable[[], object] = partial(device.run, passes)
        if graphs:
            with suppress(RuntimeError):  # what cannot be captured will not be, and is timed as it is
                run = device.capture(passes).replay
        marks = []
        for _ in range(ROUNDS):
            start = device.mark()
            run()
            marks.append((start, device.mark()))
        return median(device.seconds(*pair) for pair in marks)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return float("inf")


def both_passes(
    network: MutualNetwork, method: Method, batch: Batch, place: Place
) -> Callable[[], list[Tensor]]:
    """-> what runs `network` forwards and backwards."""

    def passes() -> list[Tensor]:
        with place.autocast():
            outputs = network(batch.images)
        losses = method.losses(outputs, batch.soft_labels, 1.0)
        torch.stack(list(losses.values())).sum().backward()
        network.zero_grad(set_to_none=True)
        return [measures(losses, outputs.classifiers(), batch.labels)]

    return passes
