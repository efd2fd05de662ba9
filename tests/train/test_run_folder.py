"""One process trains in a folder, and a resumed run is the run that was begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from ffl_deploy.run_directory import load_run
from train.config import OutputOptions, TrainConfig
from train.distributed import World
from train.run import main
from train.run_folder import claim, keep_threads

TrainTiny = Callable[..., Path]


def test_what_the_last_save_before_a_kill_left_is_removed(tmp_path: Path) -> None:
    """There is no next save that would."""
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = [checkpoints / "last", checkpoints / ".last.old", checkpoints / f".best.{'0' * 16}.old"]
    left = [checkpoints / f".last.{'1' * 16}.{kind}" for kind in ("new", "old")]
    for folder in (*kept, *left):
        folder.mkdir(parents=True)
    (tmp_path / "run" / f".config.json.{'2' * 16}.tmp").write_text("half")
    resumed = TrainConfig(output=OutputOptions(resume=tmp_path / "run"))
    with ExitStack() as held:
        claim(tmp_path / "run", resumed, World(), held)
    assert sorted(checkpoints.iterdir()) == sorted(kept)  # .best.….old: nothing has come in its place
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    """A lock belongs to an open file, so two in one process stand for two processes."""
    named = TrainConfig(output=OutputOptions(out=tmp_path / "run"))
    with ExitStack() as first, ExitStack() as second:
        assert claim(tmp_path / "run", named, World(), first) == tmp_path / "run"
        with pytest.raises(UsageError, match="another process trains in"):
            claim(tmp_path / "run", named, World(), second)
        resumed = replace(named, output=OutputOptions(resume=tmp_path / "run"))
        with pytest.raises(UsageError, match="another process trains in"):
            claim(tmp_path / "run", resumed, World(), second)
        # a name that was made up
        assert claim(tmp_path / "run", TrainConfig(), World(), second) == tmp_path / "run-2"
    with ExitStack() as third:
        assert claim(tmp_path / "run", named, World(), third) == tmp_path / "run"


def test_checkpoints_without_a_configuration_are_not_taken_over(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "last").mkdir(parents=True)
    assert run_command(main, [*tiny_flags, "--out", str(tmp_path / "run")]) == 2
    assert "holds checkpoints but no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "curves.png", "metrics.jsonl", "test_predictions.npz"])
def test_a_folder_with_files_of_others_is_not_taken_over(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A summary.json of another program said that the run was finished, and nothing was trained."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert run_command(main, [*tiny_flags, "--out", str(tmp_path / "run")]) == 2
    assert f"holds {name} but no config.json" in capsys.readouterr().err
    assert (tmp_path / "run" / name).read_text() == "mine"


def begun(folder: Path) -> Path:
    """A finished run made to look unfinished."""
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("change", ["more", "other"])
def test_a_run_does_not_go_on_with_other_images(
    change: str, image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = image_folder(), tmp_path / "run"
    flags = [
        "--data",
        str(data),
        "--recipe",
        "digits",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--precision",
        "fp32",
        "--quiet",
    ]
    assert run_command(main, [*flags, "--branches", "resnet8,resnet8", "--out", str(run)]) == 0
    before = (begun(run) / "config.json").read_bytes()
    where = data / "train" / "cat" / ("999.png" if change == "more" else "000.png")
    Image.new("RGB", (20, 16), "white").save(where)
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert ("train/cat/999.png is new" if change == "more" else "train/cat/000.png is another file") in error
    assert "Give it back as it was" in error
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "folder"], "--recipe is 'folder' now and was 'digits'"),
        (["--out", "elsewhere"], "--out is 'elsewhere'"),
        (["--lr", "5"], "--lr is 5.0 now and was 0.1"),
    ],
)
def test_flags_that_would_change_a_resumed_run_are_refused(
    flags: list[str], words: str, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(train_tiny("run", "--epochs", "1"))
    assert run_command(main, ["--resume", str(run), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_resumed_run_keeps_its_threads(train_tiny: TrainTiny) -> None:
    run = train_tiny("run", "--epochs", "1")
    config = json.loads((run / "config.json").read_text())
    config["toolchain"]["threads"] = "3"
    (run / "config.json").write_text(json.dumps(config))
    before = torch.get_num_threads()
    try:
        keep_threads(TrainConfig(), None)
        assert torch.get_num_threads() == before
        keep_threads(TrainConfig(output=OutputOptions(resume=run)), load_run(run).config)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("state", ['"epoch": "x"', '"epoch": null', '"epoch": 1, "nonsense": 2'])
def test_a_damaged_state_is_one_sentence(
    state: str, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(train_tiny("run", "--epochs", "1"))
    path = run / "checkpoints" / "last" / "state.json"
    path.write_text(path.read_text().replace('"epoch": 1', state, 1))
    assert run_command(main, ["--resume", str(run), "--quiet"]) == (0 if "nonsense" in state else 1)
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_moving_average_is_one_sentence(
    train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(train_tiny("run", "--epochs", "1", "--ema", "0.9"))
    state = run / "checkpoints" / "last" / "state.json"
    content = json.loads(state.read_text())
    del content["sha256"]["ema"]
    state.write_text(json.dumps(content))
    assert run_command(main, ["--resume", str(run), "--quiet"]) == 1
    assert "holds no moving average" in capsys.readouterr().err
