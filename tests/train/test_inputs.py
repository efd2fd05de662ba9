"""A run goes on with the images that it was begun with, wherever they are now, and with no others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.loop
from ffl_deploy.command import run_command
from ffl_deploy.data.inputs import FILE, changes, read_inputs
from ffl_deploy.errors import CheckError
from ffl_deploy.run_directory import load_run
from train.run import main


@pytest.fixture(autouse=True)
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.session.draw_curves", lambda *arguments: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Photographs' size, where mean and standard deviation are ImageNet's whatever the pixels are: they
    cannot show that anything changed. Uncompressed: every file has the same size."""
    generator, root = np.random.default_rng(0), tmp_path / "data"
    for part, count in (("train", 6), ("test", 3)):
        for name in ("ant", "bee", "cat"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((128, 128)).save(root / part / name / f"{index:03d}.bmp")
    return root


@pytest.fixture
def begin(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """-> a run that was interrupted after its first epoch."""

    def begun(*flags: str, source: str | None = None) -> Path:
        original = train.loop.Recorder.epoch

        def stop(recorder: object, line: dict[str, object]) -> None:
            original(recorder, line)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        words = ["--data", source or str(data), "--image-size", "128", "--augment", "none", "--epochs", "2"]
        words += [
            "--batch-size",
            "8",
            "--branches",
            "resnet8,resnet8",
            "--precision",
            "fp32",
            "--device",
            "cpu",
        ]
        with monkeypatch.context() as patch:
            patch.setattr(train.loop.Recorder, "epoch", stop)
            with pytest.raises(KeyboardInterrupt):
                main([*words, "--threads", "1", "--quiet", "--out", str(tmp_path / "run"), *flags])
        return tmp_path / "run"

    return begun


def rotate_classes(data: Path) -> str:
    """Every label becomes another one; names, counts and sizes stay."""
    for part in ("train", "test"):
        (data / part / "ant").rename(data / part / "x")
        (data / part / "bee").rename(data / part / "ant")
        (data / part / "cat").rename(data / part / "bee")
        (data / part / "x").rename(data / part / "cat")
    return "test/ant/000.bmp is another file"


def rename_one(data: Path) -> str:
    """The validation images are cut by position in the sorted list: this moves the cut."""
    (data / "train" / "ant" / "000.bmp").rename(data / "train" / "ant" / "zzz.bmp")
    return "train/ant/000.bmp is gone, train/ant/zzz.bmp is new"


def overwrite_one(data: Path) -> str:
    shutil.copy(data / "train" / "ant" / "001.bmp", data / "train" / "ant" / "004.bmp")
    return "train/ant/004.bmp is another file"


def swap_two(data: Path) -> str:
    one, other = data / "train" / "ant" / "000.bmp", data / "train" / "bee" / "000.bmp"
    one.rename(data / "x")
    other.rename(one)
    (data / "x").rename(other)
    return "train/ant/000.bmp is another file, train/bee/000.bmp is another file"


CHANGES = (rotate_classes, rename_one, overwrite_one, swap_two)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_refused_by_name(
    begin: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], str]
) -> None:
    run = begin()
    before = (run / "config.json").read_bytes()
    said = change(data)
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 2
    assert said in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before


def test_streamed_images_are_looked_at_too(
    begin: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin("--memory-limit", "0", "--workers", "0")
    said = overwrite_one(data)
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 2
    assert said in capsys.readouterr().err


def test_touched_files_are_the_same_files(begin: Callable[..., Path], data: Path) -> None:
    run = begin()
    for path in data.rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 0


def test_a_folder_that_moved_is_told_by_its_content(
    begin: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = begin(), tmp_path / "elsewhere" / "images"
    elsewhere.parent.mkdir()
    data.rename(elsewhere)
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    other = Path(shutil.copytree(elsewhere, tmp_path / "other"))
    overwrite_one(other)
    assert run_command(main, ["--resume", str(run), "--data", str(other), "--quiet"]) == 2
    assert "train/ant/004.bmp is another file" in capsys.readouterr().err
    assert run_command(main, ["--resume", str(run), "--data", str(elsewhere), "--quiet"]) == 0
    config = load_run(run).config
    assert config.data.source == str(elsewhere), "export finds it there"
    assert config.data_name == "data"
    assert (run / "summary.json").is_file()


def test_a_run_goes_on_from_any_folder_and_with_any_spelling(
    begin: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    run = begin(source="data")
    monkeypatch.chdir(tmp_path.parent)
    spelled = os.path.relpath(data) + os.sep
    assert run_command(main, ["--resume", str(run), "--data", spelled, "--quiet"]) == 0
    (run / "summary.json").unlink()
    (data.parent / "link").symlink_to(data)
    assert run_command(main, ["--resume", str(run), "--data", str(data.parent / "link"), "--quiet"]) == 0


def test_runs_from_before_go_on_where_their_images_were(
    begin: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin()
    config = json.loads((run / "config.json").read_text())
    for name in ("inputs_sha256", "left_out", "twins"):
        del config["split"][name]
    (run / "config.json").write_text(json.dumps(config))
    (run / FILE).unlink()
    copy = shutil.copytree(data, tmp_path / "copy")
    assert run_command(main, ["--resume", str(run), "--data", str(copy), "--quiet"]) == 2
    assert "begun by a version that did not record its files" in capsys.readouterr().err
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 0


def test_the_list_names_every_file(begin: Callable[..., Path], data: Path) -> None:
    (data / "train" / "ant" / "a\tb\\n\nc.bmp").write_bytes((data / "train" / "ant" / "000.bmp").read_bytes())
    run = begin()
    inputs = read_inputs(run / FILE)
    assert {part: len(files.prints) for part, files in inputs.parts.items()} == {"train": 19, "test": 9}
    names = [inputs.parts["train"].files.name(row) for row in range(19)]
    assert "ant/a\tb\\n\nc.bmp" in names
    assert inputs.sha256 == json.loads((run / "config.json").read_text())["split"]["inputs_sha256"]
    assert changes(inputs, inputs) == []
    (run / FILE).write_bytes((run / FILE).read_bytes()[:50])
    with pytest.raises(CheckError, match="is damaged"):
        read_inputs(run / FILE)


def test_the_reference_can_be_made_again(begin: Callable[..., Path]) -> None:
    """A finished run whose eval_reference.npz was lost: export says to resume it."""
    run = begin()
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 0
    reference, summary = (run / "eval_reference.npz").read_bytes(), (run / "summary.json").read_bytes()
    (run / "eval_reference.npz").unlink()
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 0
    assert (run / "eval_reference.npz").read_bytes() == reference
    assert json.loads((run / "summary.json").read_bytes())["accuracy"] == json.loads(summary)["accuracy"]


# the same picture in two splits, and what is passed over


def test_a_picture_in_two_splits_is_counted_and_named(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its decoded pixels: as another file format under another name."""
    data = image_folder(val=2)
    Image.open(data / "train" / "cat" / "003.png").save(data / "test" / "cat" / "same.bmp")
    shutil.copy(data / "val" / "dog" / "001.png", data / "test" / "dog" / "copy.png")
    flags = ["--data", str(data), "--epochs", "1", "--batch-size", "8", "--branches", "resnet8,resnet8"]
    flags += ["--precision", "fp32", "--threads", "1", "--device", "cpu"]
    assert run_command(main, [*flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert (
        "1 picture is both in train and in test, the first as train/cat/003.png and test/cat/same.bmp" in said
    )
    assert (
        "1 picture is both in validation and in test, the first as val/dog/001.png and test/dog/copy.png"
        in said
    )
    twins = json.loads((tmp_path / "run" / "config.json").read_text())["split"]["twins"]
    assert [["train", "test"], "train/cat/003.png", "test/cat/same.bmp"] in twins
    assert len(twins) == 2


def test_files_that_are_passed_over_are_counted_by_reason(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder()
    for name in ("a.psd", "b.psd", "c.ppm", "d", ".hidden.psd", "Thumbs.db"):
        (data / "train" / "cat" / name).write_bytes(b"x")
    shutil.copy(data / "train" / "cat" / "000.png", data / "train" / "loose.png")
    (data / "train" / "cat" / "more").symlink_to(data / "train" / "dog")
    flags = ["--data", str(data), "--epochs", "1", "--batch-size", "8", "--branches", "resnet8,resnet8"]
    flags += ["--precision", "fp32", "--threads", "1", "--device", "cpu"]
    assert run_command(main, [*flags, "--out", str(tmp_path / "run")]) == 0
    left_out = {"called .psd": 2, "called .ppm": 1, "in no class folder": 1, "links to folders": 1}
    left_out["without a suffix"] = 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["split"]["left_out"] == left_out
    said = capsys.readouterr().err
    assert "passed over 6 files that are no images by their names: 2 called .psd, 1 called .ppm" in said


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_validation_images_under_other_names_are_used(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data = image_folder(val=3)
    (data / "val").rename(data / name)
    flags = ["--data", str(data), "--epochs", "1", "--batch-size", "8", "--branches", "resnet8,resnet8"]
    flags += ["--precision", "fp32", "--threads", "1", "--device", "cpu"]
    assert run_command(main, [*flags, "--out", str(tmp_path / "run")]) == 0
    assert "20 training, 6 validation, 8 test images" in capsys.readouterr().err
    shutil.copytree(data / name, data / "val")
    assert run_command(main, [*flags, "--out", str(tmp_path / "two")]) == 2
    assert f"has val/ and {name}/; keep one of them" in capsys.readouterr().err
    shutil.rmtree(data / "val")
    shutil.rmtree(data / "test")  # as fastai and Keras lay it out
    assert run_command(main, [*flags, "--out", str(tmp_path / "three")]) == 0
    assert "18 training, 2 validation, 6 test images" in capsys.readouterr().err
