"""Batches from images that do not fit into memory, or whose training views need the original pixels or are
changed one by one: worker processes read.

A worker makes whole steps. What a step contains is a function of (seed, epoch, position) alone, as in
batches.py: any number of workers gives the same batches, `crop` gives those of images in memory, and a
resumed epoch reads nothing it skips.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ffl_deploy.data.datasets import ImageData, Split
from ffl_deploy.data.splits import UnreadableImage
from ffl_deploy.errors import CheckError
from ffl_deploy.host import available_cores
from ffl_deploy.preprocessing import Pixels
from train.config import DataOptions
from train.data.augment import crop_one, draw_crops, random_changes, random_resized_crop, transform_one
from train.data.batches import Batch, Collate, Plan, Shares, crop_padding, flips
from train.machine import decoding_failed
from train.randomness import derived_seed, generator

View = Callable[[int, int], Pixels]
"""(row of the split, place within the step) -> uint8 [height, width, 3], the training view."""


class Pieces(NamedTuple):
    """One process's shares of a step. images: uint8 [b, h, w, 3] and labels: int64 [b], per micro-batch."""

    images: list[Tensor]
    labels: list[Tensor]
    replaced: list[UnreadableImage]


MOST_WORKERS = 16
"""Processes that decode for one GPU, where --workers says nothing."""


GRACE = 60
"""Seconds that a worker lives on after SIGTERM,
which service managers send to all processes of a run at once."""


PATIENCE = 900
"""Seconds without a step from a worker after which it is taken for stuck."""


def free_shared_memory() -> int:
    """-> bytes that /dev/shm has left, through which workers hand over what they read; much where there is
    none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 1 << 62
    return found.f_bavail * found.f_frsize


TO_THE_GROUP = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


def _leave_signals_to_parent(worker: int) -> None:
    """The parent still needs the batches of the step that it finishes and saves;
    it ends its workers afterwards."""
    for number in TO_THE_GROUP - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_THE_GROUP)


@contextmanager
def _garbage_left_to_parent() -> Iterator[None]:
    """Let children that are forked inside collect nothing that was there before: the destructor of a session,
    say, waits for threads that a child does not have, for ever (gc.freeze, in Python's documentation)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _held_signals() -> Iterator[None]:
    """Children made inside start with Ctrl-C and SIGTERM held back,
    so that neither can end one before it is set up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainingSteps(Dataset[Pieces | UnreadableImage]):
    """One epoch: step -> this process's pieces of it. An error is an answer too,
    since an exception would lose its type."""

    def __init__(
        self,
        split: Split,
        options: DataOptions,
        size: tuple[int, int],
        order: Sequence[Tensor],
        shares: Shares,
        seed: int,
        epoch: int,
        fill: Sequence[float],
    ) -> None:
        self.split, self.options, self.size, self.order = split, options, size, order
        self.shares, self.seed, self.epoch = shares, seed, epoch
        # made here and not by the workers, each of which would import torchvision first, in every epoch
        self.resized_crop, self.changes = random_resized_crop(options, size), random_changes(options, fill)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Pieces | UnreadableImage:
        rows = self.order[step]
        view = self.resized_crops(step) or self.padded_crops(step)
        view = self.changed(view, step)
        cuts = torch.arange(len(rows)).tensor_split(self.shares.total)
        pieces = Pieces([], [], [])
        try:
            for share in self.shares.mine:
                images, labels = self.read(rows.tolist(), cuts[share].tolist(), view, pieces.replaced)
                pieces.images.append(images)
                pieces.labels.append(labels)
        except UnreadableImage as error:
            return error
        return pieces

    def read(
        self, rows: list[int], places: list[int], view: View, replaced: list[UnreadableImage]
    ) -> tuple[Tensor, Tensor]:
        """-> images and labels of these places of a step.

        With --skip-bad-images the place of an unreadable image is taken by the next readable one of the step,
        together with its label: shapes stay as they are, and nothing is labelled as what it is not.
        """
        images = np.empty((len(places), *self.size, 3), np.uint8)
        labels = np.empty(len(places), np.int64)
        for index, place in enumerate(places):
            for turn in range(len(rows)):
                row = rows[(place + turn) % len(rows)]
                try:
                    images[index] = view(row, place)
                except UnreadableImage as error:
                    if not self.options.skip_bad_images or turn + 1 == len(rows):
                        raise
                    replaced.append(error)
                else:
                    labels[index] = self.split.labels[row]
                    break
        return torch.from_numpy(images), torch.from_numpy(labels)

    def padded_crops(self, step: int) -> View:
        """`none` and `crop`: the evaluation view, padded, cut and mirrored."""
        padding = crop_padding(self.options)
        draws = generator(self.seed, "augment", self.epoch * len(self.order) + step)
        top, left, mirrored = (
            values.tolist()
            for values in draw_crops(len(self.order[step]), padding, flips(self.options), draws)
        )
        return lambda row, place: crop_one(
            self.split.prepared(row), padding, top[place], left[place], mirrored[place]
        )

    def resized_crops(self, step: int) -> View | None:
        """`resized-crop`; None for the other views."""
        transform = self.resized_crop
        if transform is None:
            return None
        return lambda row, place: transform_one(
            self.split.original(row), transform, self.seed_of("augment", step, place)
        )

    def changed(self, view: View, step: int) -> View:
        """-> `view` and what --auto-augment and --random-erase then make of it."""
        changes = self.changes
        if changes is None:
            return view
        return lambda row, place: transform_one(
            view(row, place), changes, self.seed_of("change", step, place)
        )

    def seed_of(self, purpose: str, step: int, place: int) -> int:
        """-> the seed of one image of a step, of every epoch another one."""
        first = self.epoch * len(self.split) + step * len(self.order[0])
        return derived_seed(self.seed, purpose, first + place)


class EvaluationBatches(Dataset[tuple[Tensor, Tensor] | UnreadableImage]):
    """One process's share of a held-out split: number -> (images uint8 [b, h, w, 3], labels int64 [b])."""

    def __init__(self, split: Split, rows: list[range]) -> None:
        self.split, self.rows = split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UnreadableImage:
        rows = self.rows[number]
        try:
            images = np.stack([self.split.prepared(row) for row in rows])
        except UnreadableImage as error:
            return error
        return torch.from_numpy(images), torch.from_numpy(
            self.split.labels[rows.start : rows.stop : rows.step]
        )


class StreamedBatches:
    """Batches of an ImageData read by `workers` processes (one per core if None;
    with 0 this process reads)."""

    def __init__(
        self, data: ImageData, plan: Plan, workers: int | None = None, evaluation_batch: int = 128
    ) -> None:
        self.data, self.plan, self.evaluation_batch = data, plan, evaluation_batch
        # processes on this machine, says torchrun
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", plan.shares.world.size))
        # A worker holds some steps ahead; more than these are only memory in front of one GPU.
        most = MOST_WORKERS if plan.device.type == "cuda" else available_cores()
        self.workers = max(1, min(most, available_cores() // beside)) if workers is None else workers
        self.collate = Collate(data, plan)
        self.normalize = self.collate.normalize
        self.steps_per_epoch = len(plan.order(data.train.labels, 0))
        self.reported: set[str] = set()
        self.said = False  # that /dev/shm is small

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        size, shares = (self.data.preprocessing.height, self.data.preprocessing.width), self.plan.shares
        order = self.plan.order(self.data.train.labels, epoch)
        split, options, seed = self.data.train, self.plan.options, self.plan.seed
        steps = TrainingSteps(split, options, size, order, shares, seed, epoch, self.data.mean)
        for step, pieces in enumerate(self.load(steps, range(first_step, len(steps))), start=first_step):
            self.report(pieces.replaced)
            draw = (epoch * self.steps_per_epoch + step) * shares.total
            yield [
                self.collate(
                    self.to_device(images),
                    labels.to(self.plan.device, non_blocking=True),
                    epoch,
                    draw + share,
                )
                for images, labels, share in zip(pieces.images, pieces.labels, shares.mine, strict=True)
            ]

    def evaluation(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        held, world = (
            {"validation": self.data.validation, "test": self.data.test}[split],
            self.plan.shares.world,
        )
        mine = range(world.rank, len(held), world.size)
        rows = [
            mine[start : start + self.evaluation_batch]
            for start in range(0, len(mine), self.evaluation_batch)
        ]
        for images, labels in self.load(EvaluationBatches(held, rows), range(len(rows))):
            yield self.normalize(self.to_device(images)), labels.to(self.plan.device, non_blocking=True)

    def to_device(self, images: Tensor) -> Tensor:
        """uint8 [b, h, w, 3] -> uint8 [b, 3, h, w] on the device."""
        return images.to(self.plan.device, non_blocking=True).permute(0, 3, 1, 2)

    def load(self, dataset: Dataset[Any], indices: range) -> Iterator[Any]:
        """Yield the answers of `dataset` for `indices`, in order, read ahead by the workers.
        Raises CheckError."""
        if not indices:
            return
        workers = self.workers_that_fit(dataset, min(self.workers, len(indices)))
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=list(indices),
            num_workers=workers,
            timeout=PATIENCE if workers else 0,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=self.plan.device.type == "cuda",
            # the loader draws a seed for its workers, which must not be the run's
            generator=torch.Generator(),
        )
        with _held_signals(), _garbage_left_to_parent():
            answers = iter(loader)
        try:
            for _ in indices:
                answer = next(answers)
                if isinstance(answer, UnreadableImage):
                    raise answer
                yield answer
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) and "DataLoader timed out" not in str(error):
                raise
            raise CheckError(decoding_failed(str(error))) from error
        finally:
            del answers  # ends the workers; an error's traceback would keep them, waiting for more work

    def workers_that_fit(self, dataset: Dataset[Any], workers: int) -> int:
        """-> `workers`, or as many as there is shared memory for what they read ahead: with a full /dev/shm
        (64 MB in a container of Docker's) they stand still for ever. Any number gives the same batches."""
        size = self.data.preprocessing
        images = self.plan.batch_size if isinstance(dataset, TrainingSteps) else self.evaluation_batch
        ahead = images * size.height * size.width * 3 * 2  # two steps each
        fitting = min(workers, free_shared_memory() // max(ahead, 1))
        if fitting < workers and not self.said:
            self.said = True
            tqdm.write(
                f"/dev/shm has room for {fitting} of {workers} processes that decode images (docker run "
                "--shm-size=2g gives more); the batches are the same",
                file=sys.stderr,
            )
        return fitting

    def report(self, replaced: list[UnreadableImage]) -> None:
        """Name each image that another one stands in for, once."""
        for error in replaced:
            if error.path not in self.reported:
                self.reported.add(error.path)
                tqdm.write(
                    f"left out {error.path} ({error.reason}); another image takes its place", file=sys.stderr
                )
