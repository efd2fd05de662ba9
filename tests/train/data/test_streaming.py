"""Streamed batches: those of memory, whatever the number of workers;
honest about images that cannot be read."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ffl_deploy.data.datasets import DataSpec, FileSplit, ImageData, load_data
from ffl_deploy.data.splits import UnreadableImage
from ffl_deploy.errors import CheckError
from ffl_deploy.preprocessing import Preprocessing
from train.config import DataOptions
from train.data import streaming
from train.data.batches import Batch, Batches, InMemoryBatches, Plan, Shares
from train.data.streaming import StreamedBatches
from train.distributed import World

CPU = torch.device("cpu")
CROP = DataOptions(crop_padding=3)
RESIZED = DataOptions(augment="resized-crop")
CHANGED = replace(CROP, auto_augment="randaugment", random_erase=0.5)


@pytest.fixture
def folder(image_folder: Callable[..., Path]) -> Path:
    return image_folder(classes=("a", "b", "c"), train=20, test=5, size=(24, 20))


@pytest.fixture
def on_disk(folder: Path) -> ImageData:
    return load_data(DataSpec(source=str(folder)), memory_limit=0)


def toy_plan(options: DataOptions, world: World | None = None, accumulate: int = 1) -> Plan:
    return Plan(options, 16, 0.1, 5, CPU, Shares(world or World(), accumulate), small_epochs=2)


def stream(
    data: ImageData, options: DataOptions, workers: int, world: World | None = None, accumulate: int = 1
) -> StreamedBatches:
    return StreamedBatches(data, toy_plan(options, world, accumulate), workers, evaluation_batch=4)


def same(one: Iterator[list[Batch]], other: Iterator[list[Batch]]) -> int:
    """Assert that both give the same steps; -> how many."""
    count = 0
    for first, second in zip(one, other, strict=True):
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        count += 1
    return count


@pytest.mark.parametrize(
    "options",
    [CROP, DataOptions(augment="none"), replace(CROP, mixup=0.5, flip=False), replace(CROP, small_size=12)],
)
@pytest.mark.parametrize(("world", "accumulate"), [(World(), 1), (World(1, 2), 2)])
def test_streamed_batches_are_those_of_images_in_memory(
    folder: Path, on_disk: ImageData, options: DataOptions, world: World, accumulate: int
) -> None:
    held = load_data(DataSpec(source=str(folder)))
    memory = InMemoryBatches(held, toy_plan(options, world, accumulate), evaluation_batch=4)
    streamed = stream(on_disk, options, 0, world, accumulate)
    assert streamed.steps_per_epoch == memory.steps_per_epoch == (4 if world.size == 1 else 3)
    assert same(memory.training(3, 0), streamed.training(3, 0)) == memory.steps_per_epoch
    for part in ("validation", "test"):
        one, other = (
            [torch.cat(column) for column in zip(*source.evaluation(part), strict=True)]
            for source in (memory, streamed)  # type: ignore[attr-defined]
        )
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [CROP, RESIZED, CHANGED], ids=["crop", "resized-crop", "changed"])
def test_any_number_of_workers_gives_the_same_batches(on_disk: ImageData, options: DataOptions) -> None:
    assert same(stream(on_disk, options, 0).training(1, 0), stream(on_disk, options, 2).training(1, 0)) == 4
    one, other = (list(stream(on_disk, options, workers).evaluation("test")) for workers in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("options", "maker"),
    [(RESIZED, "random_resized_crop"), (CHANGED, "random_changes")],
    ids=["resized-crop", "changed"],
)
def test_what_changes_the_views_is_made_once_and_not_by_the_workers(
    on_disk: ImageData, options: DataOptions, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing torchvision takes seconds, which each worker of each epoch would spend."""
    made, make = [], getattr(streaming, maker)

    def noted(*arguments: Any) -> Any:
        made.append(os.getpid())
        return make(*arguments)

    monkeypatch.setattr(streaming, maker, noted)
    assert len(list(stream(on_disk, options, 2).training(0, 0))) == 4
    assert made == [os.getpid()]


class CollectingSteps(Dataset[int]):
    """Collects garbage in the process that reads."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


class Joining:
    """Ends a process that it was not made in, as a destructor that joins threads would stop it."""

    def __init__(self) -> None:
        self.made_in, self.itself = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.made_in:
            os._exit(7)


def test_what_was_garbage_before_the_workers_is_not_theirs_to_collect(on_disk: ImageData) -> None:
    gc.disable()  # so that it is still there when they are forked
    try:
        Joining()
        assert list(stream(on_disk, CROP, 2).load(CollectingSteps(), range(4))) == [0, 1, 2, 3]
    finally:
        gc.enable()


def test_resized_crops_are_functions_of_seed_epoch_and_position(on_disk: ImageData) -> None:
    batches = stream(on_disk, RESIZED, 0)
    first, again, later = (next(batches.training(epoch, 0))[0] for epoch in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, later.images)
    state = torch.get_rng_state()
    next(batches.training(0, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the run's own generator is left alone


def test_resized_crops_are_torchvisions_of_the_original_image(on_disk: ImageData) -> None:
    from torchvision.transforms import v2

    from train.data.batches import epoch_order
    from train.randomness import derived_seed

    (batch,) = next(stream(on_disk, RESIZED, 0).training(2, 1))
    row = int(epoch_order(len(on_disk.train), 16, 1, 5, 2)[1][7])
    torch.manual_seed(derived_seed(5, "augment", 2 * len(on_disk.train) + 16 + 7))
    transform = v2.Compose([v2.RandomResizedCrop((16, 16), antialias=True), v2.RandomHorizontalFlip()])
    expected = transform(torch.from_numpy(on_disk.train.original(row).copy()).permute(2, 0, 1))
    assert torch.equal(batch.images[7], stream(on_disk, RESIZED, 0).normalize(expected[None])[0])
    assert int(batch.labels[7]) == on_disk.train.labels[row]


@pytest.mark.parametrize(
    "options", [CHANGED, replace(RESIZED, auto_augment="trivialaugment")], ids=["crop", "part"]
)
def test_changed_views_are_functions_of_seed_epoch_and_position(
    on_disk: ImageData, options: DataOptions
) -> None:
    whole = list(stream(on_disk, options, 0).training(2, 0))
    assert same(iter(whole[2:]), stream(on_disk, options, 0).training(2, 2)) == 2
    later = next(stream(on_disk, options, 0).training(3, 0))
    assert not torch.equal(whole[0][0].images, later[0].images)
    # two processes with two micro-batches each see the same images
    ranks = [stream(on_disk, options, 0, World(rank, 2), 2).training(0, 0) for rank in (0, 1)]
    first = stream(on_disk, options, 0).training(0, 0)
    for step, parts in zip(first, zip(*ranks, strict=True), strict=False):
        order = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
        assert torch.equal(torch.cat([part.images for part in order]), step[0].images)


def test_images_in_memory_and_on_disk_are_changed_alike(folder: Path, on_disk: ImageData) -> None:
    held = load_data(DataSpec(source=str(folder)))
    assert same(stream(held, CHANGED, 0).training(1, 0), stream(on_disk, CHANGED, 0).training(1, 0)) == 4
    plain, changed = (next(stream(held, options, 0).training(1, 0))[0] for options in (CROP, CHANGED))
    assert torch.equal(plain.labels, changed.labels)
    assert sum(not torch.equal(a, b) for a, b in zip(plain.images, changed.images, strict=True)) > 8


def test_a_resumed_epoch_reads_nothing_it_skips(on_disk: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = FileSplit.original

    def counted(split: FileSplit, row: int) -> np.ndarray:
        read.append(split.paths[row])
        return original(split, row)

    whole = list(stream(on_disk, CROP, 0).training(0, 0))
    monkeypatch.setattr(FileSplit, "original", counted)
    assert same(iter(whole[3:]), stream(on_disk, CROP, 0).training(0, 3)) == 1
    assert len(read) == len(whole[3][0].labels) == len(set(read))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_training_by_name(on_disk: ImageData, folder: Path, workers: int) -> None:
    (folder / "train/b/007.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"b/007\.png cannot be read \(empty: the file is empty\)"):
        list(stream(on_disk, CROP, workers).training(0, 0))


@pytest.mark.parametrize(
    "options", [replace(CROP, skip_bad_images=True), replace(RESIZED, skip_bad_images=True)]
)
def test_a_skipped_image_is_replaced_together_with_its_label(
    on_disk: ImageData, folder: Path, options: DataOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(options, augment="none")
    clean = [step[0] for step in stream(on_disk, options, 0).training(0, 0)]
    known = {
        image.numpy().tobytes(): int(label)
        for batch in clean
        for image, label in zip(batch.images, batch.labels, strict=True)
    }
    for name in ("train/b/007.png", "train/c/001.png"):
        (folder / name).write_bytes(b"")
    batches = stream(on_disk, options, 2)
    replaced = 0
    for _ in range(2):  # reported once, though read in every epoch
        for before, (after,) in zip(clean, batches.training(0, 0), strict=True):
            assert after.labels.shape == before.labels.shape
            for image, label in zip(after.images, after.labels, strict=True):
                assert known[image.numpy().tobytes()] == int(label)
            replaced += int((after.images != before.images).flatten(1).any(dim=1).sum())
    gone = [path for path in on_disk.train.paths if path.endswith(("b/007.png", "c/001.png"))]  # type: ignore[attr-defined]
    assert replaced == 2 * len(gone) > 0
    assert capsys.readouterr().err.count("left out") == len(gone)


def test_an_error_leaves_no_worker_behind(on_disk: ImageData, folder: Path) -> None:
    (folder / "train/b/007.png").write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        list(stream(on_disk, CROP, 2).training(0, 0))
    assert caught.tb is not None  # which still holds the generator's frame
    # told to end, they do so when a busy machine lets them; left alone, they would wait for ever
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


def test_signals_to_the_whole_group_leave_the_workers_at_work(on_disk: ImageData) -> None:
    batches = stream(on_disk, CROP, 2).training(0, 0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert same(iter([first, *batches]), stream(on_disk, CROP, 0).training(0, 0)) == 4


def test_signals_while_the_workers_start_leave_them_at_work(
    on_disk: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both signals reach each worker before it could have said that it ignores them."""
    start = multiprocessing.context.Process.start

    def start_and_signal(worker: multiprocessing.context.Process) -> None:
        start(worker)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)

    monkeypatch.setattr(multiprocessing.context.Process, "start", start_and_signal)
    assert same(stream(on_disk, CROP, 2).training(0, 0), stream(on_disk, CROP, 0).training(0, 0)) == 4


def test_a_killed_worker_is_one_sentence(on_disk: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSplit, "original", lambda split, row: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        CheckError, match=r"a process that decodes images was killed.*--resume and fewer --workers"
    ):
        list(stream(on_disk, CROP, 2).training(0, 0))


def test_images_in_memory_stream_too_where_views_need_it() -> None:
    digits = load_data(DataSpec())
    batches: Batches = stream(digits, RESIZED, 0)
    (batch,) = next(batches.training(0, 0))
    assert batch.images.shape == (16, 3, 8, 8)


def test_evaluation_is_exports_view_of_the_files(folder: Path) -> None:
    from ffl_deploy.images import load

    data = load_data(DataSpec(source=str(folder), image_size=12), memory_limit=0)
    batches = stream(data, RESIZED, 2)
    images = torch.cat([images for images, _ in batches.evaluation("test")])
    paths = sorted((folder / "test").glob("*/*.png"))
    expected = np.stack([load(path, Preprocessing(12, 12, resize="crop")) for path in paths])
    assert torch.equal(images, batches.normalize(torch.from_numpy(expected).permute(0, 3, 1, 2)))
