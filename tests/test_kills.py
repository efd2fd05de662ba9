"""SIGKILL at any instant, of one process or of two that work on the same thing: what was good is still good,
what was begun goes on to what an undisturbed run leaves, and nothing else was touched.

FFL_KILLS says how many kills (12); `FFL_KILLS=1000 pytest -m fault tests/test_kills.py` is the long version,
and FFL_KILLS_SEED draws other instants.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import check_files

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(6 * 3600)]

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("FFL_KILLS", "12"))
SEED = int(os.environ.get("FFL_KILLS_SEED", "0"))
PRECIOUS = "the user's own"
ENDS = ("", ".parts", ".summary.json", ".report.json", ".report.png")
"""Of the names that ffl-predict may use beside --out."""


def start(arguments: Sequence[object], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(arguments: Sequence[object], folder: Path) -> int:
    return start(arguments, folder).wait(timeout=600)


def disturbed(
    arguments: Sequence[object], folder: Path, typical: float, draws: random.Random, check: Callable[[], None]
) -> None:
    """Run the command KILLS / 3 times, alone or in two processes, and kill each at a random instant of
    `typical` seconds; `check` after each."""
    for turn in range(max(1, KILLS // 3)):
        processes = [start(arguments, folder) for _ in range(2 if turn % 3 == 2 else 1)]
        for process in processes:
            time.sleep(draws.uniform(0, typical) / len(processes))
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(timeout=600)
        check()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with something of the user's in it, and pictures."""
    place, draws = tmp_path / "place", np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (place / "data" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "data" / part / name / f"{index}.png")
    for name in ("notes.txt", ".hidden.tmp", ".out.jsonl.1234.tmp"):
        (place / name).write_text(PRECIOUS)
    return place


def require_untouched(place: Path, ours: Sequence[str]) -> None:
    for name in ("notes.txt", ".hidden.tmp", ".out.jsonl.1234.tmp"):
        assert (place / name).read_text() == PRECIOUS
    known = {"data", "notes.txt", ".hidden.tmp", ".out.jsonl.1234.tmp"}
    others = {path.name for path in place.iterdir()} - known
    assert all(name in ours or name.startswith(tuple(f".{one}." for one in ours)) for name in others), others


TRAIN = ("-m", "train.run", "--data", "data", "--method", "vanilla", "--branches", "resnet8", "--epochs", "3")
TRAIN = (*TRAIN, "--batch-size", "8", "--precision", "fp32", "--device", "cpu", "--threads", "1", "--quiet")


def seconds(work: Callable[[], int]) -> float:
    began = time.monotonic()
    assert work() == 0
    return time.monotonic() - began


def test_predict(place: Path, make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """No row lost, none twice, none of another input."""
    bundle = make_bundle(tmp_path / "bundle", size=16)
    flags = (bundle.folder, "data", "--shard-size", "4", "--batch-size", "4", "--threads", "1", "--quiet")
    command = ("-m", "serve.predict", *flags, "--out", "out.jsonl", "--resume")
    whole = tmp_path / "whole.jsonl"
    typical = seconds(lambda: finish(("-m", "serve.predict", *flags, "--out", whole), place))

    def check() -> None:
        require_untouched(place, [f"out.jsonl{end}" for end in ENDS])
        if (place / "out.jsonl").exists():
            assert (place / "out.jsonl").read_bytes() == whole.read_bytes()

    disturbed(command, place, 1.2 * typical, random.Random(1 + 10 * SEED), check)
    if finish(command, place) == 2:  # complete, but killed before its summary was written
        assert finish([one for one in command if one != "--resume"], place) == 0
    assert (place / "out.jsonl").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in place.glob("*out.jsonl*")) == [
        ".out.jsonl.1234.tmp",
        *(f"out.jsonl{end}" for end in sorted(ENDS) if end != ".parts"),
    ]


def test_train_and_export(place: Path, tmp_path: Path) -> None:
    """A run goes on to the weights of one that nobody killed; a good bundle stays good, or is the new one."""
    typical = seconds(lambda: finish((*TRAIN, "--out", tmp_path / "whole"), place))
    run = place / "run"

    def begun() -> None:
        require_untouched(place, ["run"])

    while not (run / "config.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        process = start((*TRAIN, "--out", "run"), place)
        time.sleep(0.8 * typical)
        process.kill()
        process.wait()
    command = ("-m", "train.run", "--resume", "run", "--quiet")
    disturbed(command, place, 1.2 * typical, random.Random(2 + 10 * SEED), begun)
    assert finish(command, place) == 0
    for name in ("last", "best"):
        weights = [
            (one / "checkpoints" / name / "model.safetensors").read_bytes()
            for one in (run, tmp_path / "whole")
        ]
        assert weights[0] == weights[1], name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "last"]

    export = ("-m", "export.cli", "run", "--target", "branch0", "--out", "out")
    typical = seconds(lambda: finish(export, place))
    hashes = {load_bundle(place / "out" / "branch0").manifest.files["model.onnx"].sha256}

    def good() -> None:
        bundle = load_bundle(place / "out" / "branch0")
        check_files(bundle)
        assert bundle.manifest.files["model.onnx"].sha256 in hashes
        require_untouched(place, ["run", "out"])

    disturbed(export, place, 1.2 * typical, random.Random(3 + 10 * SEED), good)
    assert finish(export, place) == 0
    good()
    assert [path.name for path in (place / "out").iterdir()] == ["branch0"]


@pytest.mark.parametrize("flags", [("--checkpoint", "last")])
def test_two_exports_at_once_leave_one_good_bundle(place: Path, flags: tuple[str, ...]) -> None:
    """FFL_RACES (3) of them; the mechanism alone is raced 200 times in tests/ffl_deploy/test_files.py."""
    assert finish((*TRAIN, "--out", "run"), place) == 0
    export = ("-m", "export.cli", "run", "--target", "branch0", "--out", "out")
    assert finish(export, place) == 0
    for _ in range(int(os.environ.get("FFL_RACES", "3"))):
        both = [start(export, place), start((*export, *flags), place)]
        assert [process.wait(timeout=600) for process in both] == [0, 0]
        check_files(load_bundle(place / "out" / "branch0"))
        assert [path.name for path in (place / "out").iterdir()] == ["branch0"]
