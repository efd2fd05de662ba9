"""Does this trainer learn what the official FFL code learns? The paper's recipe on both
sides, CIFAR-100, ResNet-32.

    python -m benchmarks.learn_vs_official --official CLONE --data DIR [--steps 30] [--epochs 3] [--seeds 2]
    [--images 10000]

Two questions. The same arithmetic: from the same weights, on the same batches, the loss of each step (ours in
fp32 and in its default precision). The same learning: runs of their own from several seeds, each side with
its own initialisation, order and augmentation; the schedule is compressed to the epochs (learning rate x0.1
after two thirds, ramp-up over 80/300 of them). With --json OUT each finished run is stored at once, and the
same command goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.flags import two_sides_parser
from benchmarks.official import OurTraining, cifar_images, official_training, our_training
from ffl_deploy import markdown
from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import ImageData
from ffl_deploy.errors import UsageError
from ffl_deploy.files import write_atomically
from ffl_deploy.networks.checkpoint import load_weights
from ffl_deploy.networks.mutual import MutualNetwork
from train.data.batches import Batch, Batches
from train.import_official import read_official
from train.record import read_metrics

DROP = 2 / 3  # share of the epochs after which the learning rate falls
RAMP_UP = 80 / 300
CLASSIFIERS = ("fused", "ensemble", "branch0", "branch1")


class FixedBatches:
    """One given batch an epoch, so that the record of a run has the loss of every step."""

    steps_per_epoch = 1

    def __init__(self, steps: list[Batch], source: Batches) -> None:
        self.steps, self.normalize = steps, source.normalize

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        yield [self.steps[epoch]]

    def evaluation(self, part: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.steps[0].images[:2], self.steps[0].labels[:2]


def same_arithmetic(clone: Path, data: ImageData, device: str, steps: int) -> dict[str, list[float]]:
    """-> side -> loss of each step, all from the official initial weights, on the same batches,
    with full distillation."""
    official = official_training(clone, data, torch.device(device), seed=0)
    start = our_weights(official.network, official.module)
    ours = our_training(data, device, seed=0, epochs=steps, milestones=())
    ours = ours._replace(
        config=dataclasses.replace(ours.config, model=dataclasses.replace(ours.config.model, ramp_up=0.0))
    )
    batches = [micro[0] for micro in itertools.islice(ours.batches.training(0, 0), steps)]
    losses = {"official": [official.run([(batch.images, batch.labels)], 100)[0] for batch in batches]}
    for name, place in (
        ("ours, fp32", dataclasses.replace(ours.place, precision="fp32")),
        (f"ours, {ours.place.precision}", ours.place),
    ):
        if name in losses:
            continue
        network = MutualNetwork(ours.network.config).to(ours.place.device)
        load_weights(network, start, "the official initial weights")
        network = network.to(memory_format=torch.channels_last)
        run = ours._replace(network=network, batches=FixedBatches(batches, ours.batches), place=place)
        losses[name] = [line["loss"] for line in trained(run)]
    return losses


def our_weights(network: torch.nn.Module, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Official modules -> their weights under this project's names,
    by way of the files that the official code saves."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "Model_0.pth", Path(folder) / "Module_0.pth"
        for path, part in zip(files, (network, module), strict=True):
            torch.save({"epoch": 0, "state_dict": copy.deepcopy(part.state_dict())}, path)
        return dict(read_official(*files).tensors)


def trained(run: OurTraining) -> list[dict[str, Any]]:
    """Train; -> the lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run.fit(Path(folder))
        return read_metrics(Path(folder))


def official_run(clone: Path, data: ImageData, device: str, seed: int, epochs: int) -> dict[str, Any]:
    """-> {"loss", "test": per epoch, classifier -> accuracy}; evaluated here,
    since its own `eval` prints the training loss."""
    training = official_training(clone, data, torch.device(device), seed, RAMP_UP * epochs)
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(DROP * epochs)], 0.1)
        for optimizer in training.optimizers
    ]
    losses, accuracy = [], []
    for epoch in range(epochs):
        losses.append(training.run(training.trainloader, epoch)[0])
        accuracy.append(official_accuracies(training, device))
        for schedule in schedules:
            schedule.step()
    return {"loss": losses, "test": accuracy}


@torch.inference_mode()
def official_accuracies(training: Any, device: str) -> dict[str, float]:
    """-> classifier -> accuracy on the test images;
    the next call of `training.run` goes back to training mode itself."""
    training.network.eval()
    training.module.eval()
    hits, count = dict.fromkeys(CLASSIFIERS, 0), 0
    for images, labels in training.testloader:
        one, two, maps = training.network(images.to(device))
        logits = dict(zip(CLASSIFIERS, (training.module(*maps), (one + two) / 2, one, two), strict=True))
        count += len(labels)
        for name, values in logits.items():
            hits[name] += int((values.argmax(dim=1).cpu() == labels).sum())
    return {name: value / count for name, value in hits.items()}


def our_run(data: ImageData, device: str, seed: int, epochs: int) -> dict[str, Any]:
    """-> the same of ours, in its default precision; the test images stand in for the validation split,
    nothing is chosen."""
    run = our_training(
        dataclasses.replace(data, validation=data.test), device, seed, epochs=epochs, milestones=(DROP,)
    )
    lines = trained(run)
    test = [line["validation"] for line in lines]
    return {"loss": [line["loss"] for line in lines], "test": test, "precision": run.place.precision}


def learning_runs(jobs: dict[str, Callable[[int], dict[str, Any]]], seeds: int, stored: Stored) -> None:
    """Run every side with every seed, in turns; each finished run is stored at once, and not repeated."""
    runs = stored.content.setdefault("learning", {name: [] for name in jobs})
    for seed in range(seeds):
        for name, job in jobs.items():
            if len(runs[name]) > seed:
                continue
            started = time.monotonic()
            runs[name].append({**job(seed), "seconds": time.monotonic() - started})
            stored.save()
            print(f"{name}, seed {seed}: {runs[name][-1]}", file=sys.stderr, flush=True)


class Stored:
    """The results so far, in the file --json where one is given."""

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.content = path, setting
        if path is not None and path.is_file():
            self.content = json.loads(path.read_text())
            changed = [
                name for name, value in setting.items() if name != "date" and self.content.get(name) != value
            ]
            if changed:
                raise UsageError(
                    f"{path} holds results with another {', '.join(changed)}; choose another --json."
                )

    def save(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")


def arithmetic_table(losses: dict[str, list[float]]) -> str:
    official = np.array(losses["official"])
    shown = sorted({0, 1, 2, 4, 9, len(official) - 1} & set(range(len(official))))
    rows = []
    for name, values in losses.items():
        difference = np.abs(np.array(values) / official - 1).max()
        compared = "" if name == "official" else f"{difference:.1e}"
        rows.append([name, *(f"{values[step]:.5f}" for step in shown), compared])
    return markdown.table(["step", *(str(step + 1) for step in shown), "largest difference"], rows)


def learning_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """-> a row per run and epoch: training loss, and test accuracy of every classifier."""
    rows = []
    for epoch in range(len(runs["official"][0]["loss"])):
        for side, results in runs.items():
            for seed, result in enumerate(results):
                cells = [f"{100 * result['test'][epoch][name]:.2f}" for name in CLASSIFIERS]
                rows.append([f"{epoch + 1}", side, f"{seed}", f"{result['loss'][epoch]:.3f}", *cells])
    return markdown.table(["epoch", "side", "seed", "loss", *(f"{name} %" for name in CLASSIFIERS)], rows)


def main(argv: list[str]) -> int:
    """-> exit code."""
    parser = two_sides_parser(__doc__)
    parser.add_argument(
        "--steps", type=int, default=30, help="steps on the same batches; 0 leaves this part out"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the runs; 0 leaves this part out")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side")
    parser.add_argument(
        "--images", type=int, metavar="N", help="training images, as many of each class; all if not given"
    )
    arguments = parser.parse_args(argv)
    clone, device, epochs = arguments.official, arguments.device, arguments.epochs
    setting = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "steps": arguments.steps,
        "epochs": epochs,
    }
    stored = Stored(arguments.json, setting | {"images": arguments.images})
    if arguments.steps:
        if "arithmetic" not in stored.content:
            few = cifar_images(arguments.data, 100 * max(1, -(-128 * arguments.steps // 100)))
            stored.content["arithmetic"] = same_arithmetic(clone, few, device, arguments.steps)
            stored.save()
        print(arithmetic_table(stored.content["arithmetic"]), flush=True)
    if epochs:
        data = cifar_images(arguments.data, arguments.images)
        jobs = {
            "official": lambda seed: official_run(clone, data, device, seed, epochs),
            "ours": lambda seed: our_run(data, device, seed, epochs),
        }
        learning_runs(jobs, arguments.seeds, stored)
        print(f"\n{len(data.train)} training images\n\n{learning_table(stored.content['learning'])}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
