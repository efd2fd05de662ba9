"""Training, going on and exporting from a list of images beside a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ffl_deploy.command import run_command
from ffl_deploy.run_directory import load_run
from train.run import main


@pytest.fixture
def table(hues: Path, tmp_path: Path) -> Path:
    """The hues' images as a list with columns of its own, in another folder than they."""
    lines = ["file;kind;split"]
    lines += [
        f"{path.relative_to(hues)};{path.parent.name};{path.parent.parent.name}"
        for path in sorted(hues.glob("*/*/*.png"))
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path / "list.csv"


def test_a_run_from_a_list_is_that_of_its_folder(
    train_tiny: Callable[..., Path], table: Path, hues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data", str(table), "--data-root", str(hues), "--label-column", "kind")
    listed, plain = train_tiny("listed", *flags), train_tiny("plain")
    weights = [(run / "checkpoints/last/model.safetensors").read_bytes() for run in (listed, plain)]
    assert weights[0] == weights[1]
    assert json.loads((listed / "summary.json").read_text())["classes"] == ["blue", "green", "red"]
    assert load_run(listed).data.label_column == "kind"

    # a label that was changed since is refused by the file's name
    table.write_text(table.read_text().replace("train/red/3.png;red", "train/red/3.png;blue"))
    capsys.readouterr()
    resume = ["--resume", str(listed), "--epochs", "3", "--quiet"]
    assert run_command(main, resume) == 2
    error = capsys.readouterr().err
    assert "train/red/3.png has another label" in error


def test_flags_of_a_list_are_of_a_list(train_tiny: Callable[..., Path], hues: Path) -> None:
    from ffl_deploy.errors import UsageError

    with pytest.raises(UsageError, match="--column and --label-column are of a list of images"):
        train_tiny("run", "--column", "file")
