"""Images that are no squares keep their sides where --image-size says width and height."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import DataSpec, load_data
from ffl_deploy.run_directory import load_run
from train.run import main, parse


def test_width_and_height_are_read_from_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--data", "digits", "--image-size", "96x48"]).data.image_size == (96, 48)
    assert parse(["--data", "digits", "--image-size", "64"]).data.image_size == 64
    for text in ("96x", "x", "96x48x3", "wide", "-1", "96*48"):
        assert run_command(main, ["--image-size", text]) == 2
        said = capsys.readouterr().err
        assert f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT, as in 96x64" in said
    assert run_command(main, ["--image-size", "96x2"]) == 2
    assert "--image-size must be at least 4 pixels" in capsys.readouterr().err


def test_the_sides_are_kept(image_folder: Callable[..., Path]) -> None:
    """Two classes that differ in the left 20 columns alone could not be told apart in the centre square."""
    folder = image_folder(size=(96, 48))
    data = load_data(DataSpec(source=str(folder), image_size=(96, 48)))
    assert (data.preprocessing.width, data.preprocessing.height) == (96, 48)
    whole = np.asarray(Image.open(folder / "test" / "cat" / "000.png"))
    np.testing.assert_array_equal(data.test.read(np.array([0]))[0], whole)
    square = load_data(DataSpec(source=str(folder), image_size=48)).test.read(np.array([0]))[0]
    np.testing.assert_array_equal(square, whole[:, 24:72])
    streamed = load_data(DataSpec(source=str(folder), image_size=(96, 48)), memory_limit=0)
    np.testing.assert_array_equal(streamed.test.read(np.array([0]))[0], whole)


def test_a_run_on_them_trains_and_goes_on(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(image_folder(size=(24, 16))), "--image-size", "24x16", "--batch-size", "8"]
    flags += ["--branches", "resnet8,resnet8", "--precision", "fp32", "--device", "cpu", "--threads", "1"]
    run = tmp_path / "run"
    assert run_command(main, [*flags, "--epochs", "1", "--out", str(run)]) == 0
    assert "24x16 pixels" in capsys.readouterr().err
    found = load_run(run)
    assert found.reference("best", "fused")[0].shape[1:] == (16, 24, 3)
    (run / "summary.json").unlink()
    assert run_command(main, ["--resume", str(run), "--image-size", "24x16"]) == 0
    assert run_command(main, ["--resume", str(run), "--image-size", "24"]) == 2
