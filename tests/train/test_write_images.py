"""A split as an image folder, which replaces nothing but what the command wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import DataSpec, load_data
from train.write_images import main


def test_the_files_are_the_split_and_are_replaced(hues: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    for _ in range(2):
        assert run_command(main, [str(out), "--data", str(hues)]) == 0
    test = load_data(DataSpec(source=str(hues))).test
    files = sorted(out.rglob("*.png"), key=lambda path: path.name)
    assert [path.parent.name for path in files] == [("blue", "green", "red")[label] for label in test.labels]
    for row, path in enumerate(files):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), test.read(slice(row, row + 1))[0])


@pytest.mark.parametrize("existing", ["a/thesis.txt", "notes.md", "a/b/000000.png", ""])
def test_what_it_did_not_write_is_not_deleted(
    existing: str,
    hues: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "precious"
    kept = out / existing if existing else out  # a file where the folder should be
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("years of work")
    assert run_command(main, [str(out), "--data", str(hues)]) == 2
    assert kept.read_text() == "years of work"
    error = capsys.readouterr().err
    assert "give the name of a new" in error
    assert "Traceback" not in error


def test_the_working_folder_is_no_target(
    hues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, [".", "--data", str(hues)]) == 2
    assert "not a folder of its own" in capsys.readouterr().err
