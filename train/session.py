"""One training session: data, network and method are put together, trained, tested once, and written down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from ffl_deploy.command import printable
from ffl_deploy.data.datasets import ImageData, load_data
from ffl_deploy.data.folders import shorten
from ffl_deploy.data.inputs import FILE as INPUTS
from ffl_deploy.data.twins import summary as twins_summary
from ffl_deploy.files import existing_folder, write_json
from ffl_deploy.installed import require
from ffl_deploy.networks.backbones import is_library_name
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.run_directory import CONFIG, REFERENCE, SUMMARY, load_run
from train.build import (
    check_small_size,
    check_stochastic_depth,
    choose_network,
    make_batches,
    memory_limit,
    synchronize_batchnorm,
)
from train.config import TrainConfig
from train.distributed import World, process_group, torchrun_world
from train.estimate import require_memory, shapes_alone, time_line
from train.features import FeatureBatches, with_features
from train.finish import describe, finish
from train.guidance import advice, no_better_than_chance, unequal_classes
from train.looks import as_weights_want, doubts
from train.loop import Trainer
from train.machine import (
    Place,
    choose_device,
    choose_place,
    require_possible,
    resources_in_one_sentence,
    searches,
)
from train.methods import build_method
from train.onednn import in_default_order, keep_off_faulty_kernels
from train.options import data_spec
from train.precision import fastest_precision
from train.quantize_aware import QuantizeAwareTrainer, calibration_images, keep_teacher, load_teacher
from train.randomness import seed_everything
from train.record import draw_curves, read_metrics
from train.run_folder import claim, gone_on, keep_threads, require_same_data, run_folder, wanted_precision
from train.schedule import learning_rate
from train.stopping import StopRequest, stop_on_signals
from train.teacher import OWN_AVERAGE, TaughtTrainer, Teacher, open_teacher
from train.weights import start_from


def run_training(config: TrainConfig, stop: StopRequest | None = None) -> int:
    """Train as `config` says, or go on with the run it resumes; -> exit code.
    Without `stop` it listens to signals itself."""
    world = torchrun_world()
    listening = stop_on_signals() if stop is None else nullcontext(stop)
    with resources_in_one_sentence(config.machine):  # a GPU that is lost fails here
        device = choose_device(config.machine, world)
    with (
        process_group(world, device),
        listening as stop,
        ExitStack() as held,
        resources_in_one_sentence(config.machine),
    ):
        # which run this is, and the arithmetic that it was begun with
        folder = run_folder(config, world)
        stored = None if config.output.resume is None else load_run(folder).config
        before = config.optimisation.epochs if stored is None else stored.options["optimisation"]["epochs"]
        finished = all((folder / name).is_file() for name in (SUMMARY, REFERENCE))
        if stored is not None and finished and config.optimisation.epochs == before:
            say(f"{folder} is finished already; its results are in {folder / SUMMARY}.", config, world)
            return 0
        if device.type == "cpu":
            keep_threads(config, stored)
        for name in config.output.track:
            require(name, f"leave {name} out of --track")
        require_possible(config.machine, device, world)

        # method, data, network, batches: whatever cannot work together is refused here,
        # before a folder exists
        if stored is None:
            config = as_weights_want(config)
        method = build_method(config.model.method, config.model.temperature)
        method.check(config.model.branches)
        data = load_data(data_spec(config), memory_limit(config))
        architecture = choose_network(config, method, data)
        require_memory(shapes_alone(architecture), config, device, world.size)
        seed_everything(config.seed, "weights")
        # A run that is resumed has weights of its own.
        begun = existing_folder(folder / "checkpoints" / "last") is not None
        cache = config.model.weights_cache
        published = config.model.pretrained and not begun
        start = published if cache is None or not published else cache
        network = MutualNetwork(architecture, start, config.model.stochastic_depth)
        check_stochastic_depth(config, network)
        beginning: list[str] = []
        if not begun:
            beginning += map(str, start_from(network, config.model.weights))
            beginning += doubts(config, len(network.trunk))
        network = network.to(device).to(memory_format=torch.channels_last)
        if any(is_library_name(name) for name in config.model.branches):
            require_memory(shapes_alone(architecture, network), config, device, world.size)
        trainer: Callable[..., Trainer] = Trainer
        if config.model.quantize_aware is not None:
            load_teacher(folder, config.model.quantize_aware, network)
            trainer = partial(QuantizeAwareTrainer, calibration=calibration_images(data))
        teacher: Teacher | None = None
        fastest = partial(fastest_precision, network, method, config)
        search = searches(config.machine, device, steps_of(config, data))
        place = choose_place(wanted_precision(config, stored), device, world, fastest, search)
        check_small_size(config, network, place)
        if config.machine.sync_batchnorm:
            network = synchronize_batchnorm(network, place)
        if not config.machine.channels_last:
            in_default_order(network)
        elif device.type == "cpu":
            keep_off_faulty_kernels(network)
        batches = make_batches(config, data, place)
        if config.model.teacher is not None:
            if config.model.teacher != OWN_AVERAGE:
                teacher = open_teacher(config.model.teacher, data, place)
            trainer = partial(TaughtTrainer, teacher=teacher)

        # the folder is this process's own from here on; a resumed run finds what it was begun with
        described = describe(config, data, architecture, method, place)
        folder = claim(folder, config, world, held)
        if stored is not None:
            require_same_data(folder, stored, described, data.inputs)
            if world.is_main and config.optimisation.epochs > before:
                (folder / SUMMARY).unlink(missing_ok=True)  # first: a kill then leaves a run to finish again
            if world.is_main and (stored.data != described.data or config.optimisation.epochs > before):
                write_json(folder / CONFIG, gone_on(stored, described))
        elif world.is_main:
            if data.inputs is not None:
                data.inputs.write(folder / INPUTS)
            write_json(folder / CONFIG, described)

        if config.model.quantize_aware is not None and world.is_main:
            keep_teacher(folder, network)

        # train, then test once
        say("\n".join([headline(folder, config, data, network, place), *beginning]), config, world)
        if world.is_main and not config.output.quiet:
            for line in (*advice(config, data), *time_line(network, config, place, len(data.train))):
                say(line, config, world)
        if config.optimisation.epochs > before:
            say(longer(config, before, batches.steps_per_epoch), config, world)
        batches = with_features(batches, network, config, place, folder, stop, teacher)
        position = trainer(network, method, batches, config, place, folder, stop).run()
        if isinstance(batches, FeatureBatches):
            batches.close()
        finish(folder, network, batches, data, place, position)
    if world.is_main:
        draw_curves(read_metrics(folder), folder / "curves.png")
        say(closing(folder, data.test.labels), config, world)
    return 0


def steps_of(config: TrainConfig, data: ImageData) -> int:
    """-> about how many steps the run takes."""
    return config.optimisation.epochs * -(-len(data.train) // config.optimisation.batch_size)


def say(text: str, config: TrainConfig, world: World) -> None:
    if world.is_main and not config.output.quiet:
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


def headline(folder: Path, config: TrainConfig, data: ImageData, network: MutualNetwork, place: Place) -> str:
    size = f"{data.preprocessing.width}x{data.preprocessing.height}"
    branches = " + ".join(config.model.branches)
    apart = f"{len(data.calibration)} calibration, " if data.calibration is not None else ""
    lines = [
        f"{config.model.method} with {branches} on {data.name}: {len(data.classes)} classes, {size} pixels, "
        f"{len(data.train)} training, {len(data.validation)} validation, {apart}{len(data.test)} test images",
        f"{sum(p.numel() for p in network.parameters()):,} parameters, {place.device.type} in "
        f"{place.precision}{f', {place.world.size} processes' if place.world.size > 1 else ''} -> {folder}",
    ]
    if data.skipped:
        count = len(data.skipped)
        lines.append(
            f"left out {count} unreadable image{'s' if count > 1 else ''} (listed in {folder / CONFIG})"
        )
    if data.left_out:
        found = sorted(data.left_out.items(), key=lambda reason: (-reason[1], reason[0]))
        reasons = ", ".join(f"{count} {reason}" for reason, count in found)
        lines.append(
            f"passed over {sum(data.left_out.values())} files that are no images by their names: {reasons}"
        )
    counts = np.bincount(data.validation.labels, minlength=len(data.classes))
    if unseen := [data.classes[label] for label in np.flatnonzero(counts == 0)]:
        lines.append(f"no validation images of {shorten(unseen)}: the best epoch is chosen without them")
    lines += [f"{line}: such an accuracy says nothing about new images" for line in twins_summary(data.twins)]
    return "\n".join(lines)


def longer(config: TrainConfig, before: int, steps_per_epoch: int) -> str:
    """-> what more epochs do to a run of `before`: its schedule is a function of the share of the run."""
    options = config.optimisation
    rates = [
        learning_rate(before * steps_per_epoch - last, epochs * steps_per_epoch, options)
        for epochs, last in ((before, 1), (options.epochs, 0))
    ]
    return (
        f"goes on from {before} to {options.epochs} epochs; from here on learning rate and distillation ramp "
        f"are those of a run of {options.epochs}: the rate, {rates[0]:.2g} at the end of epoch {before}, is "
        f"{rates[1]:.2g} now"
    )


def closing(folder: Path, labels: np.ndarray) -> str:
    """-> the last lines on the screen: test accuracy of every classifier, and what to do next.
    labels: int64 [n], of the test images."""
    summary = msgspec.json.decode((folder / SUMMARY).read_bytes())
    rows = [f"  {name:<10}{100 * value:6.2f} %" for name, value in summary["accuracy"].items()]
    return "\n".join(
        [
            f"test accuracy ({summary['test_images']} images, weights of epoch {summary['best_epoch']}):",
            *rows,
            *filter(None, [no_better_than_chance(summary["accuracy"], labels, len(summary["classes"]))]),
            *unequal_classes(summary, labels),
            (
                f"{summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s; next: ffl-export "
                f"{folder} --target all"
            ),
        ]
    )
