"""Runs trained by the real trainer, in seconds, and what was exported from them once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.run_directory import Run, load_run

HUES = {"amber": (200, 120, 10), "teal": (10, 140, 120), "violet": (120, 20, 180)}


@pytest.fixture(scope="session", autouse=True)
def latencies_are_soon_good_enough() -> Iterator[None]:
    """A report times its files for 20 s where the machine is busy, as it is under two test processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.publish.side_by_side.SECONDS", 0.5)
        yield


def train(*flags: str) -> None:
    from train.run import main

    assert (
        main([*flags, "--branches", "resnet20,resnet20", "--device", "cpu", "--precision", "fp32", "--quiet"])
        == 0
    )


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """FFL on the digits, four epochs: trained well enough for int8,
    with a reference evaluation by the trainer."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train("--epochs", "4", "--out", str(folder))
    return load_run(folder)


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """FFL on images whose class is their hue and whose channels have unequal statistics:
    what gray digits cannot show."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 24)):
        for name, hue in HUES.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                light = generator.uniform(0.5, 1.2, (8, 8, 1)) + generator.normal(0, 0.1, (8, 8, 3))
                pixels = np.clip(np.array(hue) * light + generator.integers(0, 40), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    folder = tmp_path_factory.mktemp("runs") / "colours"
    train("--data", str(root), "--epochs", "6", "--batch-size", "32", "--out", str(folder))
    return load_run(folder)


@pytest.fixture(scope="session")
def exported(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of `fused` (fp32, int8, all outputs) and `branch0` (fp32) of the digits run,
    by the command itself."""
    from export.cli import main

    out = tmp_path_factory.mktemp("bundles")
    assert (
        main(
            [
                str(digits_run.folder),
                "--target",
                "fused",
                "--precision",
                "int8",
                "--cam",
                "--embedding",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert main([str(digits_run.folder), "--target", "branch0", "--out", str(out)]) == 0
    return out
