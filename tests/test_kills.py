"""SIGKILL at any instant, of one process or of two that work on the same thing: what was good is still good,
what was begun goes on to what an undisturbed run leaves, and nothing else was touched.

FFL_KILLS says how many kills (12); `FFL_KILLS=1000 pytest -m fault tests/test_kills.py` is the long version,
and FFL_KILLS_SEED draws other instants.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import export.cli
import serve.predict.command
import train.run
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.bundle_checks import check_files
from ffl_deploy.command import run_command

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(6 * 3600)]

KILLS = int(os.environ.get("FFL_KILLS", "12"))
SEED = int(os.environ.get("FFL_KILLS_SEED", "0"))
RACES = int(os.environ.get("FFL_RACES", "3"))
PRECIOUS = "the user's own"
ENDS = ("", ".parts", ".summary.json", ".report.json", ".report.png")
"""Of the names that ffl-predict may use beside --out."""

COMMANDS = {
    "train": train.run.main,
    "export": export.cli.main,
    "predict": serve.predict.command.supervised_main,
}
HEAVY = ["torch._dynamo", "torch.onnx", "onnxscript", "onnxruntime", "train.session", "export.pipeline"]
HEAVY += ["export.variants", "serve.predict.runner"]
Words = Sequence[object]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """Processes are forked from one that has imported what takes seconds: a kill is then at the work itself,
    and a thousand of them are possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        CONTEXT.set_forkserver_preload(HEAVY)
        yield


CONTEXT = multiprocessing.get_context("forkserver")


def start(words: Words, folder: Path) -> multiprocessing.process.BaseProcess:
    """words: a name of COMMANDS, and its arguments."""
    process = CONTEXT.Process(target=work, args=(list(map(str, words)), folder))
    process.start()
    return process


def work(words: list[str], folder: Path) -> None:
    """The command itself; what it prints is appended to a file beside `folder`."""
    os.chdir(folder)
    log = os.open(folder.parent / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(log, standard)
    sys.exit(run_command(COMMANDS[words[0]], words[1:]))


def ended(process: multiprocessing.process.BaseProcess) -> int | None:
    """-> the exit code of a process that has to end by itself, or was killed."""
    process.join(timeout=600)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def finish(words: Words, folder: Path) -> int | None:
    return ended(start(words, folder))


def disturbed(
    words: Callable[[], Words], folder: Path, typical: float, draws: random.Random, check: Callable[[], None]
) -> None:
    """Start commands, every third time two of one at once, and kill each at a random instant of `typical`
    seconds, until KILLS / 3 of them were killed at work; `check` after each."""
    killed = turn = 0
    while killed < max(1, KILLS // 3):
        processes = [start(words(), folder) for _ in range(2 if turn % 3 == 2 else 1)]
        for process in processes:
            process.join(draws.uniform(0, typical) / len(processes))
            process.kill()
        killed += [ended(process) for process in processes].count(-9)
        turn += 1
        check()
    print(f"{killed} processes killed at work, of {turn} turns, within {typical:.1f} s")


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


FLAGS = (
    "--data",
    "data",
    "--method",
    "vanilla",
    "--branches",
    "resnet8",
    "--epochs",
    "3",
    "--batch-size",
    "8",
)
TRAIN = ("train", *FLAGS, "--precision", "fp32", "--device", "cpu", "--threads", "1", "--quiet")
EXPORT = ("export", "run", "--target", "branch0", "--out", "out")


def seconds(words: Words, folder: Path) -> float:
    finish(("train", "--help"), folder)  # the server has imported everything
    began = time.monotonic()
    assert finish(words, folder) == 0
    return time.monotonic() - began


def test_predict(place: Path, make_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """No row lost, none twice, none of another input."""
    bundle = make_bundle(tmp_path / "bundle", size=16)
    flags = (bundle.folder, "data", "--shard-size", "4", "--batch-size", "4", "--threads", "1", "--quiet")
    command = ("predict", *flags, "--out", "out.jsonl", "--resume")
    whole = tmp_path / "whole.jsonl"
    typical = seconds(("predict", *flags, "--out", whole), place)

    def check() -> None:
        require_untouched(place, [f"out.jsonl{end}" for end in ENDS])
        if (place / "out.jsonl").exists():
            assert (place / "out.jsonl").read_bytes() == whole.read_bytes()
            if draws.random() < 0.5:  # begin again, or find out what --resume says of a finished one
                for path in place.glob("out.jsonl*"):
                    path.unlink() if path.is_file() else shutil.rmtree(path)

    draws = random.Random(1 + 10 * SEED)
    disturbed(lambda: command, place, 1.2 * typical, draws, check)
    if finish(command, place) == 2:  # complete, but killed before its summary was written
        assert finish([one for one in command if one != "--resume"], place) == 0
    assert (place / "out.jsonl").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in place.glob("*out.jsonl*")) == [
        ".out.jsonl.1234.tmp",
        *(f"out.jsonl{end}" for end in sorted(ENDS) if end != ".parts"),
    ]


def test_train(place: Path, tmp_path: Path) -> None:
    """A run goes on to the weights of one that nobody killed, whatever was killed of it and how often."""
    typical = seconds((*TRAIN, "--out", tmp_path / "whole"), place)
    run = place / "run"

    def words() -> Words:
        begun = (run / "config.json").is_file()
        return ("train", "--resume", "run", "--quiet") if begun else (*TRAIN, "--out", "run")

    def check() -> None:
        require_untouched(place, ["run"])
        if (run / "summary.json").is_file() and finish(words(), place) == 0:
            require_same_weights(run, tmp_path / "whole")
            shutil.rmtree(run)

    disturbed(words, place, 1.2 * typical, random.Random(2 + 10 * SEED), check)
    if not (run / "config.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
    assert finish(words(), place) == 0
    require_same_weights(run, tmp_path / "whole")


def require_same_weights(run: Path, whole: Path) -> None:
    for name in ("last", "best"):
        weights = [(one / "checkpoints" / name / "model.safetensors").read_bytes() for one in (run, whole)]
        assert weights[0] == weights[1], name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "last"]


def test_export(place: Path) -> None:
    """A good bundle stays good, or is the new one."""
    assert finish((*TRAIN, "--out", "run"), place) == 0
    assert finish(EXPORT, place) == 0
    typical = seconds(EXPORT, place)
    model = load_bundle(place / "out" / "branch0").manifest.files["model.onnx"].sha256

    def good() -> None:
        bundle = load_bundle(place / "out" / "branch0")
        check_files(bundle)
        assert bundle.manifest.files["model.onnx"].sha256 == model
        require_untouched(place, ["run", "out"])

    disturbed(lambda: EXPORT, place, 1.2 * typical, random.Random(3 + 10 * SEED), good)
    assert finish(EXPORT, place) == 0
    good()
    assert [path.name for path in (place / "out").iterdir()] == ["branch0"]


@pytest.mark.parametrize("flags", [("--checkpoint", "last")], ids=["another-checkpoint"])
def test_two_exports_at_once_leave_one_good_bundle(place: Path, flags: tuple[str, ...]) -> None:
    """FFL_RACES (3) of them; the mechanism alone is raced 200 times in tests/ffl_deploy/test_files.py."""
    assert finish((*TRAIN, "--out", "run"), place) == 0
    assert finish(EXPORT, place) == 0
    for _ in range(RACES):
        both = [start(EXPORT, place), start((*EXPORT, *flags), place)]
        assert [ended(process) for process in both] == [0, 0]
        check_files(load_bundle(place / "out" / "branch0"))
        assert [path.name for path in (place / "out").iterdir()] == ["branch0"]
