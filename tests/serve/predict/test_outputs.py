"""What a run may write where, and what it takes for an input: nobody's files are lost,
nothing of its own is classified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffl_deploy.bundle import Bundle

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("named", ["table", "glob"])
def test_an_output_that_is_an_input_is_refused(
    predict: Predict, folder: Path, tmp_path: Path, named: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    table = out / "list.csv"
    table.write_text(f"path,label\n{folder}/a.jpg,cat\n")
    run = predict(table if named == "table" else out / "*", out="list.csv")
    assert run.code == 2
    assert "would replace an input" in run.stderr
    assert table.read_text().startswith("path,label\n")


def test_a_pipe_is_not_replaced_and_a_link_is_followed(
    predict: Predict, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "pipe.jsonl")
    run = predict(folder, out="pipe.jsonl")
    assert run.code == 2
    assert "is a device or a pipe" in run.stderr
    assert (tmp_path / "out" / "pipe.jsonl").is_fifo()
    (tmp_path / "out" / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert predict(folder, out="link.jsonl").code == 0
    assert (tmp_path / "out" / "link.jsonl").is_symlink()
    assert len((tmp_path / "elsewhere.jsonl").read_text().splitlines()) == 3


def test_resume_takes_no_other_file_for_its_result(predict: Predict, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("{}\n")
    run = predict(folder, flags=["--resume"])
    assert run.code == 2
    assert "no predictions.jsonl.summary.json says that ffl-predict wrote it" in run.stderr
    assert run.out.read_text() == "{}\n"


def test_resume_of_a_finished_run_prints_its_summary(predict: Predict, folder: Path) -> None:
    first = json.loads(predict(folder, flags=["--json"]).stdout)
    assert json.loads(predict(folder, flags=["--json", "--resume"]).stdout) == first


def test_labelled_inputs_of_which_none_can_be_classified(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "x.jpg").write_bytes(b"junk")
    run = predict(tmp_path / "test")
    assert run.code == 3
    assert run.statuses == ["not_an_image"]
    assert "Traceback" not in run.stderr
    assert json.loads(run.out.with_name(f"{run.out.name}.report.json").read_text())["accuracy"] is None


def test_pictures_of_earlier_reports_are_no_inputs(predict: Predict, tmp_path: Path, photo: Photo) -> None:
    (tmp_path / "out" / "cat").mkdir(parents=True)
    (tmp_path / "out" / "cat" / "1.jpg").write_bytes(photo(1))
    (tmp_path / "out" / "own.report.png").write_bytes(photo(2, "PNG"))  # somebody's image
    for _ in range(2):
        run = predict(tmp_path / "out")
        assert [Path(row["path"]).name for row in run.rows] == ["1.jpg", "own.report.png"]
    assert (tmp_path / "out" / "predictions.jsonl.report.png").is_file()


def test_what_macos_adds_to_zips_and_folders_is_skipped(
    predict: Predict, tmp_path: Path, photo: Photo
) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("cat/1.jpg", photo(1))
        archive.writestr("__MACOSX/cat/._1.jpg", b"\0\5\x16\7")
    run = predict(tmp_path / "mac.zip", flags=["--json"])
    assert run.statuses == ["ok"]
    assert json.loads(run.stdout)["skipped"] == {"files of macOS metadata": 1}
    (tmp_path / "mac").mkdir()
    (tmp_path / "mac" / "1.jpg").write_bytes(photo(1))
    (tmp_path / "mac" / "._1.jpg").write_bytes(b"\0\5\x16\7")
    assert predict(tmp_path / "mac").statuses == ["ok"]


def test_a_table_without_images_among_the_matches_is_refused_at_once(predict: Predict, folder: Path) -> None:
    (folder / "notes.csv").write_text("a,b\n1,2\n")
    run = predict(folder / "*")
    assert run.code == 2
    assert "notes.csv" in run.stderr
    assert not run.out.exists()


def test_a_name_that_is_not_utf8_is_written_with_codes(
    predict: Predict, tmp_path: Path, photo: Photo
) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(photo(1))
    run = predict(tmp_path / name)
    assert run.code == 0
    assert run.rows[0]["path"].endswith("caf\\xe9.jpg")


def test_what_a_killed_run_left_is_removed(predict: Predict, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".predictions.jsonl.0123456789abcdef.tmp"
    left.write_bytes(b"half a result")
    own = tmp_path / "out" / ".predictions.jsonl.backup.tmp"
    own.write_bytes(b"the user's")
    assert predict(folder).code == 0
    assert not left.exists()
    assert own.read_bytes() == b"the user's"


def test_a_worker_killed_once_reads_standard_input_again(
    tiny_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    """Beyond the 2,048 lines that are looked at first, what a dead worker had read would be gone with it."""
    lines = [str(folder / name) for name in ("a.jpg", "b.png", "sub/c.webp")] * 800
    script = f"""
import os, signal, sys
from serve.predict import shards
real = shards.ShardsFolder.commit
def commit(self, index, *rest):
    if index == 1 and not os.path.exists({str(tmp_path / "died")!r}):
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, index, *rest)
shards.ShardsFolder.commit = commit
from serve.predict.command import entry
entry()
"""
    flags = [
        "--out",
        str(tmp_path / "rows.jsonl"),
        "--batch-size",
        "32",
        "--shard-size",
        "512",
        "--threads",
        "1",
        "--quiet",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bundle.folder), "-", *flags],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    rows = [json.loads(line)["path"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == lines


def test_closed_standard_input_is_one_sentence(tiny_bundle: Bundle) -> None:
    command = f"{sys.executable} -m serve.predict {tiny_bundle.folder} - <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr
    assert "Traceback" not in done.stderr
