"""One training session: data, network and method are put together, trained, tested once, and written down."""

from __future__ import annotations

import platform
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

import ffl_deploy
from ffl_deploy.data.datasets import ArraySplit, DataSpec, ImageData, load_data
from ffl_deploy.errors import UsageError
from ffl_deploy.files import existing_folder, replace_file, write_json
from ffl_deploy.networks.checkpoint import MODEL, load_weights, read_checkpoint
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import CONFIG, PREDICTIONS, REFERENCE, SCHEMA, SUMMARY, ModelRecord, RunConfig, load_run
from train.config import TrainConfig
from train.data.batches import Batches, InMemoryBatches, Plan, Shares, crop_padding
from train.data.streaming import StreamedBatches
from train.distributed import World, process_group, torchrun_world
from train.evaluate import logits_of, predictions
from train.loop import Position, fit
from train.machine import Machine, choose_device, choose_machine, resources_in_one_sentence
from train.methods import Method, build_method
from train.options import options_to_json
from train.randomness import seed_everything
from train.record import draw_curves, read_metrics
from train.run_folder import claim, keep_threads, require_same_data, run_folder, wanted_precision
from train.stopping import StopRequest, stop_on_signals

REFERENCE_IMAGES = 256


def run_training(config: TrainConfig, stop: StopRequest | None = None) -> int:
    """Train as `config` says, or go on with the run it resumes; -> exit code. Without `stop` it listens to signals itself."""
    world = torchrun_world()
    listening = stop_on_signals() if stop is None else nullcontext(stop)
    device = choose_device(config.machine, world)
    with process_group(world, device), listening as stop, ExitStack() as held, resources_in_one_sentence(config.machine):
        folder = run_folder(config, world)
        if (folder / SUMMARY).is_file():
            say(f"{folder} is finished already; its results are in {folder / SUMMARY}.", config, world)
            return 0
        stored = None if config.output.resume is None else load_run(folder).config
        if device.type == "cpu":
            keep_threads(config, stored)
        machine = choose_machine(wanted_precision(config, stored), device, world)
        method = build_method(config.model.method, config.model.temperature)
        method.check(config.model.branches)
        data = load_data(data_spec(config), memory_limit(config))
        network_config = choose_network(config, method, data)
        seed_everything(config.seed, "weights")
        # A run that is resumed has weights of its own.
        pretrained = config.model.pretrained and existing_folder(folder / "checkpoints" / "last") is None
        network = MutualNetwork(network_config, pretrained).to(machine.device).to(memory_format=torch.channels_last)
        check_small_size(config, network, machine)
        if config.machine.sync_batchnorm:
            network = synchronise_batchnorm(network, machine)
        batches = make_batches(config, data, machine, world)
        described = describe(config, data, network_config, method, machine)
        folder = claim(folder, config, world, held)
        if stored is not None:
            require_same_data(stored, described)
        elif world.is_main:
            write_json(folder / CONFIG, described)
        say(headline(folder, config, data, network, machine, world), config, world)
        at = fit(network, method, batches, config, machine, world, folder, stop)
        finish(folder, network, batches, data, machine, world, at)
    if world.is_main:
        draw_curves(read_metrics(folder), folder / "curves.png")
        say(closing(folder), config, world)
    return 0


def data_spec(config: TrainConfig) -> DataSpec:
    """-> which images to read; folders as absolute paths, so that export finds them from anywhere."""
    source, root = config.data.source, config.data.root
    named = source in ("digits", "cifar10", "cifar100")
    return DataSpec(
        source=source if named else str(Path(source).expanduser().absolute()),
        root=None if root is None else str(root.expanduser().absolute()),
        image_size=config.data.image_size,
        validation=config.data.validation,
        skip_bad_images=config.data.skip_bad_images,
    )


def memory_limit(config: TrainConfig) -> int | None:
    """-> bytes of decoded images to hold in memory, None for the default."""
    if config.data.augment == "resized-crop":
        return 0  # its views are cut from the original images, which are only on disk
    limit = config.machine.memory_limit
    return None if limit is None else int(limit * 2**30)


def choose_network(config: TrainConfig, method: Method, data: ImageData) -> NetworkConfig:
    """-> the architecture: branches from the configuration, what joins them from the method."""
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
    )


def check_small_size(config: TrainConfig, network: MutualNetwork, machine: Machine) -> None:
    """Raise UsageError where --small-size makes images larger, or smaller than the network can take."""
    small, full = config.data.small_size, min(network.config.height, network.config.width)
    if small is None:
        return
    if small >= full:
        raise UsageError(f"--small-size {small} is not below the images' own {full} pixels; use less, or leave it out.")
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(2, 3, small, small, device=machine.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        names = ", ".join(dict.fromkeys(config.model.branches))
        raise UsageError(f"{names} cannot take images of {small} pixels ({error}); use a larger --small-size.") from error


def synchronise_batchnorm(network: MutualNetwork, machine: Machine) -> MutualNetwork:
    """-> the network with batch statistics over all processes; weights keep their names. Raises UsageError on a CPU."""
    if machine.device.type != "cuda":
        raise UsageError("--sync-batchnorm runs on GPUs only (torch has no CPU version); leave it out.")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)


def make_batches(config: TrainConfig, data: ImageData, machine: Machine, world: World) -> Batches:
    """-> the source of batches that suits the data. Raises UsageError where one step cannot be filled."""
    optimisation = config.optimisation
    shares = Shares(world, optimisation.accumulate)
    size, padding = data.preprocessing, crop_padding(config.data)
    if padding >= min(size.height, size.width):
        raise UsageError(f"--crop-padding {padding} is too wide for images of {size.width}x{size.height} pixels; use less.")
    small_epochs = round(config.data.small_share * optimisation.epochs)
    plan = Plan(
        config.data, optimisation.batch_size, optimisation.label_smoothing, config.seed, machine.device, shares, small_epochs
    )
    batches: Batches
    if held_on_device(config, data, machine):
        batches = InMemoryBatches(data, plan)
    else:
        batches = StreamedBatches(data, plan, config.machine.workers)
    if batches.steps_per_epoch == 0:
        raise UsageError(
            f"a step of {optimisation.batch_size} images cannot be dealt out to {shares.parts} micro-batches of at least two, or "
            f"{len(data.train)} training images do not fill one; use a larger --batch-size, or fewer processes or --accumulate."
        )
    return batches


def held_on_device(config: TrainConfig, data: ImageData, machine: Machine) -> bool:
    """-> whether the training images stay on the device; streamed, they give the same batches."""
    if not isinstance(data.train, ArraySplit) or config.data.augment == "resized-crop":
        return False
    # A GPU needs the rest for the network and its activations; a CPU's share is load_data's decision already.
    return machine.device.type != "cuda" or data.train.images.nbytes <= torch.cuda.mem_get_info(machine.device)[0] // 4


def describe(config: TrainConfig, data: ImageData, network: NetworkConfig, method: Method, machine: Machine) -> RunConfig:
    """-> config.json: everything that resuming and exporting need to know."""
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {name: np.bincount(part.labels, minlength=len(data.classes)).tolist() for name, part in parts.items()}
    # A file's name need not be UTF-8, JSON is.
    skipped = {path.encode(errors="backslashreplace").decode(): reason for path, reason in data.skipped.items()}
    return RunConfig(
        schema=SCHEMA,
        options=options_to_json(config),
        data=data_spec(config),
        data_name=data.name,
        classes=list(data.classes),
        preprocessing=data.preprocessing,
        mean=data.mean,
        std=data.std,
        split={"images_per_class": counts, "skipped": skipped, "in_memory": isinstance(data.train, ArraySplit)},
        model=ModelRecord(config.model.method, method.strong, msgspec.to_builtins(network)),
        toolchain={
            "ffl_deploy": ffl_deploy.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else platform.machine(),
            "precision": machine.precision,
            "threads": str(torch.get_num_threads()),
        },
    )


def finish(
    folder: Path, network: MutualNetwork, batches: Batches, data: ImageData, machine: Machine, world: World, at: Position
) -> None:
    """Read the test set, once, with the best weights and in full precision; store predictions, accuracies, reference logits."""
    rows = np.unique(np.linspace(0, len(data.test) - 1, REFERENCE_IMAGES).round().astype(np.int64))
    images = data.test.read(rows)
    arrays: dict[str, Any] = {"images": images, "labels": data.test.labels[rows], "indices": rows}
    normalised = batches.normalise(torch.from_numpy(images).to(machine.device).permute(0, 3, 1, 2))
    for name in ("ema", "last", "best"):  # best comes last: the accuracies below are its own
        checkpoint = existing_folder(folder / "checkpoints" / name)
        if checkpoint is not None:
            load_weights(network, read_checkpoint(checkpoint, (MODEL,)).tensors[MODEL], str(checkpoint))
            arrays |= {f"{name}/{classifier}": values for classifier, values in logits_of(network, normalised).items()}
    predicted = predictions(network, batches, "test", len(data.test), machine.exact(), world)
    accuracy = {name: float(np.mean(labels == data.test.labels)) for name, labels in predicted.items()}
    if world.is_main:
        with replace_file(folder / PREDICTIONS) as file:
            answers: dict[str, Any] = {"labels": data.test.labels, **predicted}
            np.savez_compressed(file, **answers)
        with replace_file(folder / REFERENCE) as file:
            np.savez_compressed(file, **arrays)
        summary = {
            "accuracy": {name: round(value, 6) for name, value in accuracy.items()},
            "images_per_second": round(at.images / at.seconds, 1) if at.seconds else 0.0,  # trained elsewhere
            "seconds": round(at.seconds, 1),
            "classes": list(data.classes),
            "epochs": at.epoch,
            "best_epoch": at.best_epoch,
            "best_validation_accuracy": at.best_accuracy if at.best_accuracy >= 0 else None,
            "test_images": len(data.test),
        }
        write_json(folder / SUMMARY, summary)  # last: its presence says that the run is finished


def say(text: str, config: TrainConfig, world: World) -> None:
    if world.is_main and not config.output.quiet:
        print(text, file=sys.stderr, flush=True)


def headline(folder: Path, config: TrainConfig, data: ImageData, network: MutualNetwork, machine: Machine, world: World) -> str:
    size = f"{data.preprocessing.width}x{data.preprocessing.height}"
    branches = " + ".join(config.model.branches)
    lines = [
        f"{config.model.method} with {branches} on {data.name}: {len(data.classes)} classes, {size} pixels, "
        f"{len(data.train)} training, {len(data.validation)} validation, {len(data.test)} test images",
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {machine.device.type} in {machine.precision}"
        f"{f', {world.size} processes' if world.size > 1 else ''} -> {folder}",
    ]
    if data.skipped:
        count = len(data.skipped)
        lines.append(f"left out {count} unreadable image{'s' if count > 1 else ''} (listed in {folder / CONFIG})")
    return "\n".join(lines)


def closing(folder: Path) -> str:
    """-> the last lines on the screen: test accuracy of every classifier, and what to do next."""
    summary = msgspec.json.decode((folder / SUMMARY).read_bytes())
    rows = [f"  {name:<10}{100 * value:6.2f} %" for name, value in summary["accuracy"].items()]
    return "\n".join(
        [
            f"test accuracy ({summary['test_images']} images, weights of epoch {summary['best_epoch']}):",
            *rows,
            f"{summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s; next: ffl-export {folder} --target all",
        ]
    )
