"""Without --out the rows are printed."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest

from ffl_deploy.bundle import Bundle
from ffl_deploy.command import run_command
from serve.predict.command import main


def predict(bundle: Bundle, *arguments: object) -> int:
    return run_command(main, [str(bundle.folder), *map(str, arguments)])


def test_a_line_per_input(tiny_bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.jpg").write_bytes(b"no image")
    assert predict(tiny_bundle, folder, "--top-k", "2") == 3
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    (expected,) = tiny_bundle.predict([folder / "a.jpg"], top_k=2)
    shown = ", ".join(f"{label} {100 * value:.1f} %" for label, value in expected.top)
    assert lines[0] == f"{folder / 'a.jpg'}: {shown}"
    assert [line.split(": ")[0] for line in lines] == [
        str(folder / name) for name in ("a.jpg", "b.png", "bad.jpg", "sub/c.webp")
    ]
    assert "(" in lines[2]
    assert "%" not in lines[2]


def test_machines_get_rows(tiny_bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(tiny_bundle, folder, "--format", "jsonl") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert predict(tiny_bundle, folder, "--format", "csv") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in rows] == [row["label"] for row in table]
    assert len(rows) == 3


def test_nothing_is_left_behind(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert predict(tiny_bundle, folder / "a.jpg") == 0
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--resume", "give its --out"), ("--json", "with --out"), ("--format=parquet", "give --out FILE")],
)
def test_flags_that_need_a_file_say_so(
    flag: str, words: str, tiny_bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_bundle, folder, flag) == 2
    assert words in capsys.readouterr().err


def test_rows_that_are_replaced_are_told(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    for told in (False, True):
        assert predict(tiny_bundle, folder, "--out", out) == 0
        error = capsys.readouterr().err
        assert (f"{out} was there already; its rows are replaced\n" in error) is told
    assert len(out.read_text().splitlines()) == 4


def test_a_dash_is_standard_output(
    tiny_bundle: Bundle,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert predict(tiny_bundle, folder, "--out", "-") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(folder / name) for name in ("a.jpg", "b.png", "sub/c.webp")]
    assert sorted(tmp_path.rglob("*")) == before, "no file called -"
