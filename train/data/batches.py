"""Batches for training and evaluation: what every source of them shares, and the source for images in memory.

A data set that fits is one uint8 tensor on the training device; others are streamed (streaming.py). Which
images make up step s, and how they are cut, depends on (seed, epoch, step) only; each process takes its share
of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ffl_deploy.data.datasets import ArraySplit, ImageData
from train.config import DataOptions
from train.data.augment import RandomCrops, draw_crops, mix, send, shrink, soften
from train.distributed import World
from train.randomness import generator


class Batch(NamedTuple):
    """images: normalised float [n, 3, h, w]; labels: int64 [n]; soft_labels: what is
    learned: the labels, or float [n, classes] where they are smoothed or mixed."""

    images: Tensor
    labels: Tensor
    soft_labels: Tensor


class Batches(Protocol):
    """What the loop asks of a source of images."""

    data: ImageData
    plan: Plan
    collate: Collate

    @property
    def steps_per_epoch(self) -> int: ...

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] -> float [n, 3, h, w] as the network takes it."""

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """-> for each step of `epoch` from `first_step` on, this process's micro-batches."""

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """split: "validation" or "test" -> (normalised images, labels) of this process's share, in order."""


class Shares(NamedTuple):
    """How the images of one step are divided: `accumulate` micro-batches in each of the world's processes."""

    world: World
    accumulate: int

    @property
    def total(self) -> int:
        return self.world.size * self.accumulate

    @property
    def mine(self) -> list[int]:
        """The shares of this process; the cuts are the same whether processes or accumulation make them."""
        return [self.world.rank + turn * self.world.size for turn in range(self.accumulate)]


@dataclass(frozen=True)
class Plan:
    """How steps are made of images, whatever their source.

    batch_size: images per step of all processes; small_epochs:
    so many epochs are trained at options.small_size.
    """

    options: DataOptions
    batch_size: int
    label_smoothing: float
    seed: int
    device: torch.device
    shares: Shares
    small_epochs: int = 0

    def order(self, labels: np.ndarray, epoch: int) -> list[Tensor]:
        """labels: int64 [n], of the training images -> the rows of each step of `epoch`."""
        weights = None if self.options.balance != "sampling" else class_weights(labels)[labels]
        return epoch_order(len(labels), self.batch_size, self.shares.total, self.seed, epoch, weights)


class Collate:
    """The last steps of every training batch: size, normalisation, soft labels, mixing."""

    def __init__(self, data: ImageData, plan: Plan) -> None:
        self.plan, self.options, self.classes = plan, plan.options, len(data.classes)
        device = plan.device
        self.mean = torch.tensor(data.mean, device=device).view(1, 3, 1, 1)
        balanced = plan.options.balance == "weights"
        self.weights = class_weights(data.train.labels).to(device) if balanced else None
        self.scale = 1 / torch.tensor(data.std, device=device).view(1, 3, 1, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w] -> float channels_last,
        mean 0 and standard deviation 1 on the training images."""
        return (images.float() - self.mean).mul_(self.scale).contiguous(memory_format=torch.channels_last)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, draw: int) -> Batch:
        """images: uint8 [n, 3, h, w]; draw: number of this micro-batch within the run,
        which decides its mixing."""
        if self.options.small_size and epoch < self.plan.small_epochs:
            images = shrink(images, self.options.small_size)
        mixes = self.options.mixup > 0 or self.options.cutmix > 0
        normalized, soft_labels = self.normalize(images), self.soft(labels, mixes)
        if mixes:
            normalized, soft_labels = mix(
                normalized, soft_labels, self.options, generator(self.plan.seed, "mix", draw)
            )
        return Batch(normalized, labels, soft_labels)

    def soft(self, labels: Tensor, mixes: bool = False) -> Tensor:
        """labels: int64 [n] -> what is learned of them: themselves, or float [n, classes]."""
        smoothing = self.plan.label_smoothing
        if not (smoothing or mixes or self.weights is not None):
            return labels
        soft = soften(labels, self.classes, smoothing)
        # cross entropy is linear in them: a label of weight w is a loss of weight w, whatever the method
        return soft if self.weights is None else soft * self.weights[labels][:, None]


def class_weights(labels: np.ndarray) -> Tensor:
    """labels: int64 [n], of every class -> float [classes]: inverse to how many images a class has, 1 on
    average over the images."""
    counts = torch.from_numpy(np.bincount(labels))
    return len(labels) / (len(counts) * counts).float()


def epoch_order(
    images: int, batch_size: int, shares: int, seed: int, epoch: int, weights: Tensor | None = None
) -> list[Tensor]:
    """-> the indices of each step of `epoch`: every image once, or as many drawn with `weights` [images]. A
    last batch too small for batch statistics in every share is left out."""
    draws = generator(seed, "order", epoch)
    order = (
        torch.randperm(images, generator=draws)
        if weights is None
        else torch.multinomial(weights.double(), images, replacement=True, generator=draws)
    )
    return [chunk for chunk in order.split(batch_size) if len(chunk) >= 2 * shares]


def crop_padding(options: DataOptions) -> int:
    """-> pixels by which images are padded before they are cut."""
    return options.crop_padding if options.augment == "crop" else 0


def flips(options: DataOptions) -> bool:
    return options.flip and options.augment != "none"


class InMemoryBatches:
    """Batches of an ImageData held on the plan's device."""

    def __init__(self, data: ImageData, plan: Plan, evaluation_batch: int = 512) -> None:
        self.data, self.plan, self.evaluation_batch = data, plan, evaluation_batch
        self.collate = Collate(data, plan)
        self.normalize = self.collate.normalize
        assert isinstance(data.train, ArraySplit), "images on disk are for StreamedBatches"
        images = torch.from_numpy(data.train.images).to(plan.device).permute(0, 3, 1, 2)
        self.crops = RandomCrops(images, crop_padding(plan.options), flips(plan.options))
        self.labels = torch.from_numpy(data.train.labels).to(plan.device)
        self.held_out = {"validation": data.validation, "test": data.test}
        self.steps_per_epoch = len(plan.order(data.train.labels, 0))

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        shares = self.plan.shares
        for step, draws in enumerate(self.draws(epoch, first_step), start=first_step):
            number = epoch * self.steps_per_epoch + step
            images, labels = self.crops(draws), self.labels[draws[0]]
            cuts = list(
                zip(images.tensor_split(shares.total), labels.tensor_split(shares.total), strict=True)
            )
            yield [
                self.collate(*cuts[share], epoch, draw=number * shares.total + share) for share in shares.mine
            ]

    def draws(self, epoch: int, first_step: int) -> Iterator[Tensor]:
        """-> for each step int64 [4, b] on the device: rows of the images, and what `draw_crops` draws for
        them.

        Those of the whole epoch go to a GPU together, so that a step needs nothing of the host.
        """
        order = self.plan.order(self.data.train.labels, epoch)
        steps = []
        for step in range(first_step, len(order)):
            draws = generator(self.plan.seed, "augment", epoch * self.steps_per_epoch + step)
            cuts = draw_crops(len(order[step]), self.crops.padding, self.crops.flip, draws)
            steps.append(torch.stack([order[step], *(values.long() for values in cuts)]))
        if steps:
            sizes = [values.shape[1] for values in steps]
            yield from send(torch.cat(steps, dim=1), self.plan.device).split(sizes, dim=1)

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        held, world, device = self.held_out[split], self.plan.shares.world, self.plan.device
        for start in range(world.rank, len(held), self.evaluation_batch * world.size):
            rows = slice(start, start + self.evaluation_batch * world.size, world.size)
            images = torch.from_numpy(held.read(rows)).to(device).permute(0, 3, 1, 2)
            yield self.normalize(images), torch.from_numpy(held.labels[rows]).to(device)
