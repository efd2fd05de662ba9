"""Whole runs on image folders: in memory or streamed, small or in ImageNet's layout;
and what is refused before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import DataSpec, FileSplit, load_data
from ffl_deploy.run_directory import load_run
from train.build import held_on_device
from train.config import DataOptions, TrainConfig
from train.data.batches import InMemoryBatches
from train.data.streaming import StreamedBatches
from train.machine import Place
from train.run import main

TrainTiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.session.draw_curves", lambda *arguments: None)


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def refuse_to_read(*arguments: object) -> None:
    raise AssertionError("the other source of batches was expected")


@pytest.mark.parametrize("flags", [(), ("--mixup", "0.3", "--accumulate", "2")])
def test_a_streamed_run_ends_with_the_weights_of_a_run_in_memory(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StreamedBatches, "training", refuse_to_read)
        held = train_tiny("memory", "--epochs", "1", *flags)
    monkeypatch.setattr(InMemoryBatches, "training", refuse_to_read)
    streamed = train_tiny("disk", "--epochs", "1", "--memory-limit", "0", "--workers", "2", *flags)
    assert weights(held) == weights(streamed)
    one, other = (json.loads((run / "summary.json").read_text())["accuracy"] for run in (held, streamed))
    assert one == other
    assert (load_run(held).config.split["in_memory"], load_run(streamed).config.split["in_memory"]) == (
        True,
        False,
    )


def test_a_run_may_go_on_with_another_memory_limit_and_other_workers(
    train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_tiny("whole", "--epochs", "2", "--workers", "0")
    begun = tmp_path / "begun"
    # The state after the first epoch: the loop saves it on the way to the second.
    import train.loop

    original = train.loop.Recorder.epoch

    def stop_after_the_first(recorder: object, line: dict[str, object]) -> None:
        original(recorder, line)  # type: ignore[arg-type]
        if line["epoch"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Recorder, "epoch", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("begun", "--epochs", "2", "--workers", "0")
    assert main(["--resume", str(begun), "--workers", "2", "--memory-limit", "0", "--quiet"]) == 0
    assert weights(begun) == weights(whole)


def test_stored_predictions_are_the_accuracies_of_the_summary(train_tiny: TrainTiny) -> None:
    run = train_tiny("run", "--epochs", "1")
    summary = json.loads((run / "summary.json").read_text())
    with np.load(run / "test_predictions.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(["labels", *summary["accuracy"]])
        for name, value in summary["accuracy"].items():
            assert value == pytest.approx(np.mean(arrays[name] == arrays["labels"]), abs=1e-6)


def test_imagenets_recipe_on_imagenets_layout(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(train=10, test=3, suffix=".jpg", size=(50, 40))
    (folder / "test").rename(folder / "val")
    out = tmp_path / "run"
    small = ["--image-size", "32", "--branches", "resnet20,resnet20", "--batch-size", "8", "--epochs", "1"]
    assert (
        main(["--recipe", "imagenet-resnet34", "--data", str(folder), "--out", str(out), "--quiet", *small])
        == 0
    )
    config = load_run(out).config
    assert config.options["data"]["augment"] == "resized-crop"
    assert {part: sum(counts) for part, counts in config.split["images_per_class"].items()} == {
        "train": 18,
        "validation": 2,
        "test": 6,
    }


def test_images_that_would_fill_a_gpu_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, gpu = load_data(DataSpec()), Place(torch.device("cuda"), "fp32")
    side = 8 + 2 * TrainConfig().data.crop_padding  # as they are held: padded by what crops are cut from
    assert (TrainConfig().data.augment, data.train.read(slice(None)).shape[1:]) == ("crop", (8, 8, 3))
    size = len(data.train) * side * side * 3
    for free, expected in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, 10 * free))
        assert held_on_device(TrainConfig(), data, gpu) is expected
    assert held_on_device(TrainConfig(), data, Place(torch.device("cpu"), "fp32"))
    resized = replace(TrainConfig(), data=DataOptions(augment="resized-crop"))
    assert not held_on_device(resized, data, Place(torch.device("cpu"), "fp32"))


def spoil(folder: Path) -> None:
    (folder / "train" / "cat" / "001.png").write_bytes(b"")
    (folder / "test" / "dog" / "002.png").write_text("no image")


def run(folder: Path, out: Path, *flags: str) -> int:
    common = [
        "--data",
        str(folder),
        "--out",
        str(out),
        "--epochs",
        "1",
        "--branches",
        "resnet20,resnet20",
        "--batch-size",
        "8",
    ]
    common += ["--precision", "fp32"]  # `auto` measures a busy machine, and two runs are compared
    return run_command(main, [*common, "--quiet", *flags])


@pytest.mark.parametrize("flags", [(), ("--memory-limit", "0")], ids=["memory", "disk"])
def test_unreadable_images_end_it_with_2_before_a_run_directory_exists(
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    folder = image_folder()
    spoil(folder)
    assert run(folder, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert "2 images cannot be read" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_skip_bad_images_trains_and_records_what_was_left_out(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder()
    spoil(folder)
    assert run(folder, tmp_path / "run", "--skip-bad-images") == 0
    skipped = load_run(tmp_path / "run").config.split["skipped"]
    assert sorted(Path(path).name for path in skipped) == ["001.png", "002.png"]


def test_a_bad_image_in_mid_training_ends_it_with_1_by_name(
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = image_folder()
    original = FileSplit.original

    def vanished(split: FileSplit, row: int) -> np.ndarray:
        path = Path(split.paths[row])
        if path.parts[-3:] == ("train", "dog", "005.png"):
            path.unlink(missing_ok=True)  # after the check, as on a failing disk
        return original(split, row)

    monkeypatch.setattr(
        "ffl_deploy.data.datasets.folder_statistics", lambda *arguments: ((1.0,) * 3, (1.0,) * 3)
    )
    monkeypatch.setattr(FileSplit, "original", vanished)
    assert run(folder, tmp_path / "run", "--memory-limit", "0", "--workers", "1", "--validation", "0.01") == 1
    error = capsys.readouterr().err
    assert "dog/005.png cannot be read (No such file or directory)" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--crop-padding", "16"), "--crop-padding 16 is too wide for images of 16x16 pixels"),
        (("--workers", "-1"), "--workers must be 0"),
        (("--memory-limit", "-1"), "--memory-limit must be 0"),
        (
            ("--accumulate", "4", "--batch-size", "8", "--validation", "0.9"),
            "cannot be dealt out to 4 micro-batches",
        ),
    ],
)
def test_values_that_no_folder_can_use(
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    assert run(image_folder(), tmp_path / "run", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_same_images_as_folder_and_as_prepared_arrays(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Another format of the same pixels gives the same run: nothing depends on how an image was stored."""
    folder, copy = image_folder(), tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    assert run(folder, tmp_path / "png") == run(copy, tmp_path / "bmp") == 0
    assert weights(tmp_path / "png") == weights(tmp_path / "bmp")
