"""What a run needs, before its first step: memory, which is refused where it is not there, and time."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from ffl_deploy.errors import UsageError
from ffl_deploy.host import available_memory
from ffl_deploy.networks.backbones import is_library_name
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.config import TrainConfig
from train.machine import Place

WORTH_SAYING = 60.0  # seconds of training
TRIAL_PIXELS = 1 << 17
"""Of a trial step: few large images or many small ones, whose own cost each would count for too much."""


def shapes_alone(architecture: NetworkConfig, network: MutualNetwork | None = None) -> MutualNetwork | None:
    """-> the network on torch's meta device, which knows shapes and computes nothing; a copy of `network`
    where it is given. None where it has to be given: torchvision's and timm's networks are taken apart by
    what they compute."""
    if network is not None:
        return copy.deepcopy(network).to("meta").train()
    if any(is_library_name(name) for name in architecture.branches):
        return None
    with torch.device("meta"):
        return MutualNetwork(architecture).train()


def step_bytes(network: MutualNetwork, images: int) -> tuple[int, int]:
    """network: on the meta device -> (bytes of what does not depend on the batch: weights, gradients,
    momentum; bytes that the forward pass of `images` images keeps for the backward pass), in fp32."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
    # each storage once, though several operations may want it; those of the weights are counted above
    kept = {parameter.untyped_storage()._cdata: 0 for parameter in network.parameters()}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        alive.append(tensor)  # or its number would be given to another storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.empty(images, 3, network.config.height, network.config.width, device="meta"))
    return 3 * weights, sum(kept.values())


def require_memory(
    network: MutualNetwork | None, config: TrainConfig, device: torch.device, processes: int = 1
) -> None:
    """Raise UsageError where a step cannot fit in memory, instead of letting the system end the process.
    network: of `shapes_alone`.

    What a step keeps is a lower bound of what it takes, so nothing is refused that would have fitted.
    """
    images = -(-config.optimisation.batch_size // (processes * config.optimisation.accumulate))
    if network is None:
        return
    try:
        fixed, activations = step_bytes(network, 2)
    except (NotImplementedError, RuntimeError):  # a layer that meta tensors cannot pass: no estimate
        return
    half = config.machine.precision != "fp32"  # or auto may take it
    per_image = activations / 2 * (0.5 if half else 1.0)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if fixed + images * per_image <= free:
        return
    fitting = int((free - fixed) // per_image)
    width, height = network.config.width, network.config.height
    if fitting >= 2:
        advice = (
            f"--accumulate {-(-images // fitting) * config.optimisation.accumulate}, which keeps the step"
        )
    else:
        smaller = int((max(free - fixed, 0) / (images * per_image)) ** 0.5 * min(width, height)) // 8 * 8
        advice = f"a smaller --image-size{f' (up to {smaller})' if smaller >= 8 else ''}"
    raise UsageError(
        f"a step of {images} images of {width}x{height} pixels needs at least "
        f"{_gib(fixed + images * per_image)} GiB of memory, and {_gib(free)} are free; use {advice}."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"


def estimated_seconds(network: MutualNetwork, config: TrainConfig, images: int) -> float:
    """-> about how long --epochs of `images` training images take on this CPU, by two small steps of a
    copy."""
    pixels = network.config.height * network.config.width
    count = min(max(8, TRIAL_PIXELS // pixels), config.optimisation.batch_size)
    trial = copy.deepcopy(network).train()
    size = network.config.height, network.config.width
    with torch.random.fork_rng(devices=[]):
        batch = torch.zeros(count, 3, *size).to(memory_format=torch.channels_last)
        seconds = min(_step(trial, batch) for _ in range(2))
    return config.optimisation.epochs * images * seconds / count


def _step(network: nn.Module, batch: torch.Tensor) -> float:
    began = time.perf_counter()
    outputs = network(batch)
    labels = torch.zeros(len(batch), dtype=torch.int64)
    losses = [functional.cross_entropy(logits, labels) for logits in outputs.classifiers().values()]
    torch.stack(losses).sum().backward()
    return time.perf_counter() - began


def time_line(network: MutualNetwork, config: TrainConfig, place: Place, images: int) -> Iterator[str]:
    """Yield a line where training will take more than a minute on this CPU."""
    partly = config.model.quantize_aware is not None or config.model.freeze or config.model.head_epochs
    if place.device.type != "cpu" or config.machine.compile or partly:
        return
    with contextlib.suppress(RuntimeError, ValueError):  # the run itself says what is wrong
        seconds = estimated_seconds(network, config, -(-images // place.world.size))
        if seconds >= WORTH_SAYING:
            yield f"about {_duration(seconds)} here, by two small steps; Ctrl-C saves, --resume goes on"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 90:
        whole = max(1, round(minutes))
        return f"{whole} minute{'s' if whole > 1 else ''}"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
