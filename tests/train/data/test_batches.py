"""Which images make up a step, and how processes and micro-batches divide it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from ffl_deploy.data.datasets import ArraySplit, ImageData
from ffl_deploy.preprocessing import Preprocessing
from train.config import DataOptions
from train.data.batches import InMemoryBatches, Plan, Shares, epoch_order
from train.distributed import World

CPU = torch.device("cpu")


@pytest.fixture
def data() -> ImageData:
    """70 + 11 + 13 images of 6 x 6 pixels in three classes; the top left pixel of an image is its number."""

    def split(count: int, seed: int) -> ArraySplit:
        images = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        return ArraySplit(images, np.arange(count) % 3)

    return ImageData(
        "toy",
        ("a", "b", "c"),
        Preprocessing(6, 6),
        (100.0, 120.0, 140.0),
        (50.0, 60.0, 70.0),
        split(70, 0),
        split(11, 1),
        split(13, 2),
    )


def batches(
    data: ImageData, world: World | None = None, accumulate: int = 1, **options: object
) -> InMemoryBatches:
    chosen = DataOptions(**{"augment": "none", **options})  # type: ignore[arg-type]
    return InMemoryBatches(
        data, Plan(chosen, 16, 0.0, 5, CPU, Shares(world or World(), accumulate)), evaluation_batch=4
    )


def numbers(images: torch.Tensor) -> list[int]:
    """Normalised images of `data` -> their numbers."""
    return (images[:, 0, 0, 0] * 50 + 100).round().int().tolist()


def test_an_epoch_is_a_permutation() -> None:
    order = torch.cat(epoch_order(100, 16, 1, seed=0, epoch=3))
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(epoch_order(100, 16, 1, seed, epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_last_batch_too_small_for_batch_statistics_is_left_out() -> None:
    assert [len(step) for step in epoch_order(33, 16, 1, 0, 0)] == [16, 16]  # 1 image left
    assert [len(step) for step in epoch_order(34, 16, 1, 0, 0)] == [16, 16, 2]
    assert [len(step) for step in epoch_order(39, 16, 4, 0, 0)] == [16, 16]  # 7 images for 4 parts


def test_every_image_once_with_its_label(data: ImageData) -> None:
    seen = [
        (n, int(label))
        for step in batches(data).training(0, 0)
        for b in step
        for n, label in zip(numbers(b.images), b.labels, strict=True)
    ]
    assert sorted(seen) == [(n, n % 3) for n in range(70)]


def test_normalisation_gives_what_mean_and_std_say(data: ImageData) -> None:
    images = torch.from_numpy(data.test.read(slice(0, 5))).permute(0, 3, 1, 2)
    expected = (images.double() - torch.tensor([100.0, 120.0, 140.0]).view(3, 1, 1)) / torch.tensor(
        [50.0, 60.0, 70.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(batches(data).normalize(images).double(), expected, atol=1e-6, rtol=0)
    assert batches(data).normalize(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 2), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_the_parts_of_all_processes_together_are_the_step(
    data: ImageData, size: int, accumulate: int, augment: str
) -> None:
    whole = batches(data, augment=augment, crop_padding=2).training(0, 0)
    shares = [
        batches(data, World(rank, size), accumulate, augment=augment, crop_padding=2).training(0, 0)
        for rank in range(size)
    ]
    for (complete,), *parts in zip(whole, *shares, strict=False):
        # Part p belongs to process p % size, as its micro-batch p // size.
        ordered = [parts[p % size][p // size] for p in range(size * accumulate)]
        assert torch.equal(torch.cat([b.images for b in ordered]), complete.images)
        assert torch.equal(torch.cat([b.labels for b in ordered]), complete.labels)
        assert max(len(b.labels) for b in ordered) - min(len(b.labels) for b in ordered) <= 1


def test_processes_and_accumulation_make_the_same_micro_batches(data: ImageData) -> None:
    options = {"augment": "crop", "crop_padding": 1, "mixup": 0.5}
    alone = batches(data, World(), 2, **options).training(0, 1)
    two = [batches(data, World(rank, 2), 1, **options).training(0, 1) for rank in range(2)]
    for (first, second), (left,), (right,) in zip(alone, *two, strict=True):
        for one, other in ((first, left), (second, right)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resumed_epoch_goes_on_with_the_same_batches(data: ImageData) -> None:
    options = {"augment": "crop", "crop_padding": 2, "cutmix": 1.0}
    whole, rest = list(batches(data, **options).training(2, 0)), list(batches(data, **options).training(2, 3))
    assert len(rest) == len(whole) - 3
    for (one,), (other,) in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_reads_every_held_out_image_once(data: ImageData, size: int) -> None:
    for part, count in (("validation", 11), ("test", 13)):
        found = []
        for rank in range(size):
            mine = [
                (n, int(y))
                for x, labels in batches(data, World(rank, size)).evaluation(part)
                for n, y in zip(numbers(x), labels, strict=True)
            ]
            assert mine == [(n, n % 3) for n in range(rank, count, size)]
            found += mine
        assert len(found) == count


def test_targets_are_labels_unless_they_are_softened(data: ImageData) -> None:
    (plain,) = next(batches(data).training(0, 0))
    assert plain.soft_labels is plain.labels
    smooth = InMemoryBatches(data, Plan(DataOptions(augment="none"), 16, 0.3, 5, CPU, Shares(World(), 1)))
    (batch,) = next(smooth.training(0, 0))
    assert batch.soft_labels.shape == (16, 3)
    torch.testing.assert_close(batch.soft_labels.max(dim=1).values, torch.full((16,), 0.8))


def test_the_first_epochs_are_small_and_show_the_same_views(data: ImageData) -> None:
    plan = Plan(DataOptions(crop_padding=1, small_size=4), 16, 0.0, 5, CPU, Shares(World(), 1))
    small, full = InMemoryBatches(data, replace(plan, small_epochs=2)), InMemoryBatches(data, plan)
    for epoch, size in ((0, 4), (1, 4), (2, 6)):
        (reduced,), (views,) = next(small.training(epoch, 0)), next(full.training(epoch, 0))
        assert reduced.images.shape == (16, 3, size, size)
        assert torch.equal(reduced.labels, views.labels)
        expected = functional.interpolate(views.images, (size, size), mode="bilinear", antialias=True)
        torch.testing.assert_close(
            reduced.images, expected if size < 6 else views.images, rtol=1e-4, atol=1e-4
        )
    assert next(small.evaluation("test"))[0].shape[2:] == (6, 6)
