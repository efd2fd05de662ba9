"""A tiny training run: colour images of 8x8 pixels, the class is the hue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train.session
from train.run import main

HUES = {"red": (1.0, 0.2, 0.1), "green": (0.1, 1.0, 0.2), "blue": (0.2, 0.1, 1.0)}


@pytest.fixture(scope="session")
def hues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 3 classes, 20 training and 6 test images each,
    noise of random brightness in the class's hue."""
    folder, generator = tmp_path_factory.mktemp("data") / "hues", np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 6)):
        for name, hue in HUES.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                light = generator.uniform(30, 255, (8, 8, 1))
                Image.fromarray((light * np.array(hue)).astype(np.uint8)).save(
                    folder / part / name / f"{index}.png"
                )
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """These networks are too small for a second thread to help, and test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_flags(hues: Path) -> list[str]:
    """2 epochs of 4 steps on the hues; in a given precision,
    since runs are compared and `auto` measures a busy machine."""
    flags = [
        "--data",
        str(hues),
        "--epochs",
        "2",
        "--batch-size",
        "14",
        "--quiet",
        "--recipe",
        "digits",
        "--crop-padding",
        "2",
    ]
    return [*flags, "--precision", "fp32"]


@pytest.fixture
def train_tiny(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`train_tiny("name", *flags)` trains in this process, without drawing curves;
    -> the run directory tmp_path/name."""

    def run(name: str, *flags: str, curves: bool = False) -> Path:
        with monkeypatch.context() as patch:
            if not curves:
                patch.setattr(train.session, "draw_curves", lambda *arguments: None)
            arguments = flags if "--resume" in flags else [*tiny_flags, "--out", str(tmp_path / name), *flags]
            assert main(arguments) == 0
        return tmp_path / name

    return run
