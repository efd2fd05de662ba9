"""The parts of a run, made from its configuration: which data, which network, which source of batches."""

from __future__ import annotations

import torch

from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.config import TrainConfig
from train.data.augment import changes_views
from train.data.batches import Batches, InMemoryBatches, Plan, Shares, crop_padding
from train.data.streaming import StreamedBatches
from train.machine import Place
from train.methods import Method


def memory_limit(config: TrainConfig) -> int | None:
    """-> bytes of decoded images to hold in memory, None for the default."""
    if config.data.augment == "resized-crop":
        return 0  # its views are cut from the original images, which are only on disk
    limit = config.machine.memory_limit
    return None if limit is None else int(limit * 2**30)


def choose_network(config: TrainConfig, method: Method, data: ImageData) -> NetworkConfig:
    """-> the architecture: branches from the configuration, what joins them from the method. Raises
    UsageError for an exit that the method does not teach."""
    if config.model.trunk_exit and not method.teaches_trunk_exit:
        raise UsageError(
            f"--method {config.model.method} teaches no exit on the trunk; use --method ffl, or leave "
            "--trunk-exit out."
        )
    shared = config.model.shared_stages
    return NetworkConfig(
        branches=config.model.branches,
        classes=len(data.classes),
        height=data.preprocessing.height,
        width=data.preprocessing.width,
        shared_stages=0 if shared is None and not method.shares_stages else shared,
        fusion=method.fusion,
        fusion_width=config.model.fusion_width,
        aggregator=method.aggregator,
        scale_trunk_gradient=method.scales_trunk_gradient,
        trunk_exit=config.model.trunk_exit,
    )


def check_small_size(config: TrainConfig, network: MutualNetwork, place: Place) -> None:
    """Raise UsageError where --small-size makes images larger, or smaller than the network can take."""
    small, full = config.data.small_size, min(network.config.height, network.config.width)
    if small is None:
        return
    if small >= full:
        raise UsageError(
            f"--small-size {small} is not below the images' own {full} pixels; use less, or leave it out."
        )
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(2, 3, small, small, device=place.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        names = ", ".join(dict.fromkeys(config.model.branches))
        raise UsageError(
            f"{names} cannot take images of {small} pixels ({error}); use a larger --small-size."
        ) from error


def check_stochastic_depth(config: TrainConfig, network: MutualNetwork) -> None:
    """Raise UsageError where every stage is frozen: frozen ones skip no block, their features are kept."""
    if config.model.stochastic_depth and config.model.freeze >= network.depth:
        raise UsageError(
            f"--freeze {config.model.freeze} freezes all {network.depth} stages, which then skip no blocks: "
            "leave --stochastic-depth out, or freeze fewer."
        )


def synchronize_batchnorm(network: MutualNetwork, place: Place) -> MutualNetwork:
    """-> the network with batch statistics over all processes; weights keep their names.
    Raises UsageError on a CPU."""
    if place.device.type != "cuda":
        raise UsageError("--sync-batchnorm runs on GPUs only (torch has no CPU version); leave it out.")
    return converted(network)


def converted(network: MutualNetwork) -> MutualNetwork:
    """-> the network with SyncBatchNorm in place of BatchNorm.
    Raises CheckError where it then computes something else.

    By timm's own function: torch's takes timm's layers that normalise *and* activate for plain ones,
    and drops their activations.
    """
    from timm.layers import norm_act

    training, config = network.training, network.config
    network.eval()
    images = torch.rand(2, 3, config.height, config.width, device=next(network.parameters()).device)
    with torch.inference_mode():
        before = network(images).classifiers()
        network = norm_act.convert_sync_batchnorm(network)
        after = network.eval()(images).classifiers()
    changed = [
        name
        for name, logits in before.items()
        if not torch.allclose(logits, after[name], rtol=1e-3, atol=1e-4)
    ]
    if changed:
        raise CheckError(
            f"--sync-batchnorm would change what {changed[0]} computes; leave it out for these --branches."
        )
    return network.train(training)


def make_batches(config: TrainConfig, data: ImageData, place: Place) -> Batches:
    """-> the source of batches that suits the data. Raises UsageError where one step cannot be filled."""
    optimisation = config.optimisation
    shares = Shares(place.world, optimisation.accumulate)
    size, padding = data.preprocessing, crop_padding(config.data)
    if padding >= min(size.height, size.width):
        raise UsageError(
            f"--crop-padding {padding} is too wide for images of {size.width}x{size.height} pixels; use less."
        )
    small_epochs = round(config.data.small_share * optimisation.epochs)
    plan = Plan(
        config.data,
        optimisation.batch_size,
        optimisation.label_smoothing,
        config.seed,
        place.device,
        shares,
        small_epochs,
    )
    batches: Batches
    if held_on_device(config, data, place):
        batches = InMemoryBatches(data, plan)
    else:
        batches = StreamedBatches(data, plan, config.machine.workers)
    if batches.steps_per_epoch == 0:
        raise UsageError(
            f"a step of {optimisation.batch_size} images cannot be dealt out to {shares.total} micro-batches "
            f"of at least two, or {len(data.train)} training images do not fill one; use a larger "
            "--batch-size, or fewer processes or --accumulate."
        )
    return batches


def held_on_device(config: TrainConfig, data: ImageData, place: Place) -> bool:
    """-> whether the training images stay on the device; streamed, they give the same batches."""
    if not isinstance(data.train, ArraySplit) or config.data.augment == "resized-crop":
        return False
    if changes_views(config.data):
        return False  # one image after the other is work for processes beside the one that trains
    # A GPU needs the rest for the network and its activations; a CPU's share is load_data's decision already.
    return (
        place.device.type != "cuda"
        or padded_bytes(config, data) <= torch.cuda.mem_get_info(place.device)[0] // 4
    )


def padded_bytes(config: TrainConfig, data: ImageData) -> int:
    """-> bytes that the training images take as they are held: padded by what crops are cut from."""
    size, padding = data.preprocessing, crop_padding(config.data)
    return len(data.train) * 3 * (size.height + 2 * padding) * (size.width + 2 * padding)
