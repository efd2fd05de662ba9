"""What frozen stages give, computed once (--freeze, --head-epochs).

A stage that does not learn answers every epoch the same to the same view. Where the views are few, the image
and its mirror image, its maps are computed in one pass and kept on disk beside the run, in half precision; an
epoch then costs the stages above alone. Other views (crops, mixing, random changes) pass the frozen stages at
every step, without gradients. The folder goes when the run ends.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ffl_deploy.errors import CheckError, Interrupted
from ffl_deploy.files import shown
from ffl_deploy.networks.mutual import MutualNetwork, Outputs
from train.config import TrainConfig
from train.data.augment import changes_views
from train.data.batches import Batch, Batches, flips
from train.machine import Place
from train.randomness import generator
from train.stopping import StopRequest

FOLDER = "features"
CHUNK = 128  # images that one pass takes at once


class Maps(NamedTuple):
    """In place of images: what the first `depth` stages gave for them, see `MutualNetwork.lower`."""

    tensors: list[Tensor]
    depth: int
    answers: Tensor | None = None  # of a teacher: logits [n, classes]


class Partial(nn.Module):
    """A network that takes images, or what its frozen stages gave for them; its weights are the network's."""

    def __init__(self, network: MutualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor | Maps) -> Outputs:
        if isinstance(given, Maps):
            return self.network.upper(given.tensors, given.depth)
        depth = self.network.frozen
        if not depth:
            return self.network(given)
        with torch.no_grad():
            maps = self.network.lower(given, depth)
        return self.network.upper(maps, depth)


def views_are_few(config: TrainConfig) -> bool:
    """-> whether a training image has no other views than itself and its mirror image."""
    data = config.data
    whole = data.augment == "none" or (data.augment == "crop" and data.crop_padding == 0)
    changed = data.mixup or data.cutmix or data.small_size or changes_views(data)
    return whole and not changed


def frozen_in(epoch: int, config: TrainConfig, stages: int) -> int:
    """-> how many stages do not learn in `epoch`. stages: of the longest branch."""
    return stages if epoch < config.model.head_epochs else min(config.model.freeze, stages)


@dataclass
class FeatureBatches:
    """`source`, whose views are few, as Maps of the frozen stages wherever some are frozen.

    mirrored: whether the training images have a second view; answers [2 * n, ...] come in that order.
    """

    source: Batches
    network: MutualNetwork
    place: Place
    folder: Path
    seed: int
    mirrored: bool
    teacher: Callable[[Tensor], Tensor] | None = None
    stop: StopRequest | None = None
    quiet: bool = False
    kept: dict[tuple[str, int], list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data, self.plan, self.collate = self.source.data, self.source.plan, self.source.collate

    @property
    def steps_per_epoch(self) -> int:
        return self.source.steps_per_epoch

    def normalize(self, images: Tensor) -> Tensor:
        return self.source.normalize(images)

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        depth = self.network.frozen
        if not depth and self.teacher is None:
            yield from self.source.training(epoch, first_step)
            return
        maps = self.maps("training", depth)
        labels = torch.from_numpy(self.data.train.labels)
        for step, rows in enumerate(self.plan.order(self.data.train.labels, epoch)):
            if step < first_step:
                continue
            number = epoch * self.steps_per_epoch + step
            view = torch.zeros(len(rows), dtype=torch.bool)
            if self.mirrored:
                view = torch.rand(len(rows), generator=generator(self.seed, "mirror", number)) < 0.5
            places = (rows + len(labels) * view).numpy()
            shares = self.source.plan.shares
            yield [
                self.batch(maps, places[mine], labels[rows[mine]].to(self.place.device), depth)
                for mine in (
                    np.array_split(np.arange(len(rows)), shares.total)[share] for share in shares.mine
                )
            ]

    def batch(self, maps: list[np.ndarray], places: np.ndarray, labels: Tensor, depth: int) -> Batch:
        given = self.take(maps, places, depth)
        return Batch(given, labels, self.source.collate.soft(labels))  # type: ignore[arg-type]

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        depth = self.network.frozen
        if split != "validation" or not depth:
            yield from self.source.evaluation(split)
            return
        maps, labels = self.maps(split, depth), self.data.validation.labels
        for start in range(0, len(labels), 2 * CHUNK):
            rows = np.arange(start, min(start + 2 * CHUNK, len(labels)))
            yield self.take(maps, rows, depth), torch.from_numpy(labels[rows]).to(self.place.device)  # type: ignore[misc]

    def take(self, maps: list[np.ndarray], rows: np.ndarray, depth: int) -> Maps:
        """-> the maps of these rows on the device, in fp32 and channels_last order; a teacher's answers."""
        chosen = [torch.from_numpy(kept[np.asarray(rows)]).to(self.place.device).float() for kept in maps]
        answers = chosen.pop() if chosen and chosen[-1].ndim == 2 else None
        if depth:
            return Maps([values.permute(0, 3, 1, 2) for values in chosen], depth, answers)
        # nothing is frozen: the views themselves, with what the teacher says of them
        train = self.data.train
        pixels = torch.from_numpy(train.read(rows % len(train))).to(self.place.device).permute(0, 3, 1, 2)
        mirrored = torch.from_numpy(rows >= len(train)).to(self.place.device)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        return Maps([self.normalize(pixels)], 0, answers)

    def maps(self, split: str, depth: int) -> list[np.ndarray]:
        """-> for each map of `MutualNetwork.lower` float16 [n, h, w, C]: of the images, then of their mirror
        images. They are computed where no earlier process of this run left them whole."""
        if (split, depth) not in self.kept:
            self.kept = {key: value for key, value in self.kept.items() if key[1] == depth}
            for old in self.folder.glob("*"):
                if f"-{depth}-" not in old.name:
                    old.unlink()
            paths = sorted(self.folder.glob(f"{split}-{depth}-*.npy"))
            done = self.folder / f"{split}-{depth}-done"
            if not done.is_file():
                paths = self.compute(split, depth)
                done.touch()
            self.kept[split, depth] = [np.load(path, mmap_mode="r") for path in paths]
        return self.kept[split, depth]

    @torch.inference_mode()
    def compute(self, split: str, depth: int) -> list[Path]:
        """Write the maps of all images of `split`; -> the files. Raises CheckError for what is too large for
        half precision."""
        self.folder.mkdir(exist_ok=True)
        images = self.data.train if split == "training" else self.data.validation
        views = 2 if split == "training" and self.mirrored else 1
        files: list[np.memmap] = []
        names: list[Path] = []
        training = self.network.training
        self.network.eval()
        starts = tqdm(
            range(0, len(images), CHUNK), desc=f"frozen stages, {split}", unit_scale=CHUNK, unit="img",
            disable=self.quiet or None, leave=False,
        )  # fmt: skip
        for start in starts:
            if self.stop is not None and self.stop.requested:
                raise Interrupted(
                    "stopped while what frozen stages give was computed; go on with: ffl-train --resume "
                    f"{shown(self.folder.parent)}"
                )
            rows = slice(start, min(start + CHUNK, len(images)))
            pixels = torch.from_numpy(images.read(rows)).to(self.place.device).permute(0, 3, 1, 2)
            for view in range(views):
                normalized = self.normalize(pixels.flip(3) if view else pixels)
                with self.place.autocast():
                    maps = self.network.lower(normalized, depth) if depth else []
                halves = [values.permute(0, 2, 3, 1).half().cpu().numpy() for values in maps]
                if self.teacher is not None and split == "training":
                    halves.append(self.teacher(normalized).half().cpu().numpy())
                if not all(np.isfinite(values).all() for values in halves):
                    raise CheckError(
                        f"what {depth} frozen stages give does not fit into half precision; leave --freeze "
                        "and --head-epochs out."
                    )
                if not files:
                    shapes = [(views * len(images), *values.shape[1:]) for values in halves]
                    names = [self.folder / f"{split}-{depth}-{number}.npy" for number in range(len(shapes))]
                    files = self.reserved(names, shapes)
                for file, values in zip(files, halves, strict=True):
                    file[view * len(images) + rows.start : view * len(images) + rows.stop] = values
        for file in files:
            file.flush()
        self.network.train(training)
        return names

    def reserved(self, names: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> list[np.memmap]:
        """-> new files of float16, whose room on the disk is taken: a process that writes to a map finds no
        room by being killed (SIGBUS). Raises CheckError where there is too little."""
        files = []
        for name, shape in zip(names, shapes, strict=True):
            files.append(np.lib.format.open_memmap(name, "w+", np.float16, shape))
            if not hasattr(os, "posix_fallocate"):
                continue
            try:
                with name.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, name.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    continue  # a file system that reserves nothing
                self.close()
                needed = sum(2 * math.prod(one) for one in shapes)
                raise CheckError(
                    f"what frozen stages give takes {needed / 1e9:.2g} GB beside the run, and the disk of "
                    f"{shown(self.folder.parent)} has less: free some and type ffl-train --resume "
                    f"{shown(self.folder.parent)}; or start anew with --crop-padding 4, whose views pass the "
                    "frozen stages at every step."
                ) from error
        return files

    def close(self) -> None:
        """Give the disk back."""
        self.kept.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def with_features(
    batches: Batches,
    network: MutualNetwork,
    config: TrainConfig,
    place: Place,
    folder: Path,
    stop: StopRequest | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Batches:
    """-> `batches`, with what frozen stages give computed once where that is possible: few views, one
    process. teacher: whose answers are kept too."""
    wanted = config.model.freeze or config.model.head_epochs or teacher is not None
    if not wanted or not views_are_few(config) or place.world.size > 1:
        return batches
    if config.model.teacher is not None and teacher is None:
        return batches  # one that changes with every step
    mirrored, quiet = flips(config.data), config.output.quiet
    return FeatureBatches(
        batches, network, place, folder / FOLDER, config.seed, mirrored, teacher, stop, quiet
    )
