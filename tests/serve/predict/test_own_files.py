"""ffl-predict touches nothing that is not its own, and resumes no run whose inputs are not what they were."""

from __future__ import annotations

import csv
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffl_deploy.bundle import Bundle
from serve.predict import shards

Predict = Callable[..., Any]
Photo = Callable[..., bytes]
FLAGS = ("--batch-size", "8", "--shard-size", "8", "--threads", "1", "--quiet")


@pytest.fixture
def some(tmp_path: Path, photo: Photo) -> Path:
    root = tmp_path / "some"
    root.mkdir()
    for index in range(24):
        (root / f"{index:02d}.jpg").write_bytes(photo(index, size=(24, 20)))
    return root


def interrupt(predict: Predict, inputs: Path, patch: pytest.MonkeyPatch, *flags: str) -> Path:
    """-> the output of a run that was stopped after two of its shards."""
    real, done = shards.ShardsFolder.commit, []

    def failing(self: Any, *arguments: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[0])
        real(self, *arguments)

    with patch.context() as within:
        within.setattr(shards.ShardsFolder, "commit", failing)
        run = predict(inputs, flags=(*FLAGS, *flags), out="out.jsonl")
    assert run.code == 130
    return Path(run.out)


def parts_of(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


# what is not ours


def test_a_folder_of_that_name_is_refused_not_emptied(predict: Predict, some: Path, tmp_path: Path) -> None:
    parts = tmp_path / "out" / "predictions.jsonl.parts"
    parts.mkdir(parents=True)
    (parts / "thesis.txt").write_text("thesis")
    for flags in ((), ("--runtime", "openvinoo")):
        run = predict(some, flags=flags)
        assert run.code == 2
        assert ("thesis.txt" in run.stderr) or flags, run.stderr
        assert (parts / "thesis.txt").read_text() == "thesis"
    assert sorted(path.name for path in parts.iterdir()) == ["thesis.txt"]


def test_a_link_of_that_name_is_not_followed(predict: Predict, some: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("important lock content")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl.parts").symlink_to(elsewhere)
    run = predict(some)
    assert run.code == 2
    assert "is a link" in run.stderr
    assert [(path.name, path.read_text()) for path in elsewhere.iterdir()] == [
        ("lock", "important lock content")
    ]


def test_a_file_put_beside_finished_shards_outlives_them(
    predict: Predict, some: Path, tmp_path: Path
) -> None:
    """Put there while the run goes on: its folder stays then, with that file alone."""
    real = shards.ShardsFolder.remove

    def remove(self: Any) -> None:
        (self.folder / "note.txt").write_text("mine")
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardsFolder, "remove", remove)
        run = predict(some)
    assert run.code == 0
    assert [path.name for path in parts_of(run.out).iterdir()] == ["note.txt"]


def test_the_output_keeps_its_mode(predict: Predict, some: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "predictions.jsonl"
    assert predict(some).code == 0
    out.chmod(0o600)
    assert predict(some).code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


NOTES = '"my notes"\n'


@pytest.mark.parametrize("end", ["", ".summary.json", ".report.json", ".report.png", ".part.json"])
def test_a_file_that_no_run_wrote_is_not_replaced(
    predict: Predict, some: Path, tmp_path: Path, end: str
) -> None:
    """ffl-predict ... --out notes.csv: the notes were gone, and "its rows are replaced"; with --part what it
    writes for `merge`, too."""
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / f"predictions.jsonl{end}"
    theirs.write_text(NOTES)
    flags = ("--part", "1/1") if end == ".part.json" else ()
    run = predict(some, flags=flags)
    assert run.code == 2
    assert f"predictions.jsonl{end} is there already, and no predictions.jsonl.summ" in run.stderr
    assert theirs.read_text() == NOTES
    theirs.write_text("")  # as mktemp makes it
    assert predict(some, flags=flags).code == 0
    assert predict(some, flags=flags).code == 0  # its own


@pytest.mark.parametrize("name", ["US$_$", "$A$", "$\\frac$"])
def test_a_class_with_dollar_signs_is_text(
    make_bundle: Callable[..., Bundle], predict: Predict, tmp_path: Path, photo: Photo, name: str
) -> None:
    """matplotlib takes $..$ for a formula: all rows were computed, and then a traceback, for ever."""
    from ffl_deploy.command import run_command
    from serve.predict.command import main

    pytest.importorskip("matplotlib")
    bundle = make_bundle(tmp_path / "priced", classes=("cheap", name))
    for label in ("cheap", name):
        (tmp_path / "goods" / label).mkdir(parents=True)
        (tmp_path / "goods" / label / "a.jpg").write_bytes(photo(1))
    out = tmp_path / "o.jsonl"
    assert run_command(main, [str(bundle.folder), str(tmp_path / "goods"), "--out", str(out), "--quiet"]) == 0
    assert out.with_name("o.jsonl.report.png").stat().st_size > 1000
    assert json.loads(out.with_name("o.jsonl.summary.json").read_text())["rows"] == 2


# what changed since


def rewrite(path: Path) -> None:
    """The same name and size; another time, as every writer leaves it."""
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def test_an_untouched_run_goes_on(predict: Predict, some: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupt(predict, some, monkeypatch)
    assert predict(some, flags=(*FLAGS, "--resume"), out=out.name).code == 0
    assert len(out.read_text().splitlines()) == 24


CHANGES: dict[str, Callable[[Path, Photo], str]] = {
    "other bytes": lambda root, photo: str(
        (root / "03.jpg").write_bytes(photo(99, size=(40, 40))) and "03.jpg"
    ),
    "same size": lambda root, photo: rewrite(root / "09.jpg") or "09.jpg",
    "gone": lambda root, photo: (root / "05.jpg").unlink() or "06.jpg",
    "new": lambda root, photo: str((root / "04a.jpg").write_bytes(photo(1)) and "04a.jpg"),
    "renamed": lambda root, photo: str((root / "02.jpg").rename(root / "02a.jpg") and "02a.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_named(
    predict: Predict, some: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = interrupt(predict, some, monkeypatch)
    name = CHANGES[change](some, photo)
    run = predict(some, flags=(*FLAGS, "--resume"), out=out.name)
    assert run.code == 2
    assert f"first: {some / name}" in run.stderr
    assert not out.exists()


def table(path: Path, photo: Photo, order: list[int], labels: list[str]) -> Path:
    images = [photo(index, size=(24, 20)) for index in order]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_a_table_of_the_same_names_in_another_order_is_another_one(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are called t.parquet::0 and so on: by names alone, two tables were mixed."""
    path = table(tmp_path / "t.parquet", photo, list(range(24)), ["cat"] * 24)
    out = interrupt(predict, path, monkeypatch)
    table(path, photo, list(range(23, -1, -1)), ["cat"] * 24)
    run = predict(path, flags=(*FLAGS, "--resume"), out=out.name)
    assert run.code == 2
    assert f"first: {path}::0" in run.stderr


def test_members_of_a_rewritten_archive_are_others(
    predict: Predict, tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(shift: int) -> Path:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for index in range(24):
                archive.writestr(f"{index:02d}.jpg", photo((index + shift) % 24, size=(24, 20)))
        return tmp_path / "a.zip"

    path = write(0)
    out = interrupt(predict, path, monkeypatch)
    write(1)
    run = predict(path, flags=(*FLAGS, "--resume"), out=out.name)
    assert run.code == 2
    assert "a.zip::00.jpg" in run.stderr


def test_a_changed_label_is_a_changed_input(
    predict: Predict, some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(first: str) -> Path:
        with open(tmp_path / "list.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [
                    ("path", "label"),
                    *((f"some/{index:02d}.jpg", first if index == 2 else "cat") for index in range(24)),
                ]
            )
        return tmp_path / "list.csv"

    path = write("cat")
    out = interrupt(predict, path, monkeypatch)
    write("dog")
    run = predict(path, flags=(*FLAGS, "--resume"), out=out.name)
    assert run.code == 2
    assert "first: some/02.jpg" in run.stderr


# a finished file


def test_a_finished_file_is_looked_at(predict: Predict, some: Path, photo: Photo) -> None:
    (some / "07.jpg").write_bytes(b"no image")
    run = predict(some, flags=FLAGS)
    again = (*FLAGS, "--resume")
    assert run.code == 3
    assert predict(some, flags=again).code == 3, "the code of the run that wrote it"
    whole = run.out.read_bytes()
    for damage in (b"", whole[:-1], whole.replace(b"cat", b"dog", 1)):
        run.out.write_bytes(damage)
        found = predict(some, flags=again)
        assert found.code == 2
        assert "was changed since it was written" in found.stderr
    run.out.write_bytes(whole)
    (some / "99.jpg").write_bytes(photo(5))
    found = predict(some, flags=again)
    assert found.code == 2
    assert "its inputs changed since" in found.stderr
    (some / "99.jpg").unlink()
    assert predict(some, flags=again).code == 3


def test_a_run_of_an_earlier_version_is_not_gone_on_with(
    predict: Predict, some: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records know the names of its inputs alone."""
    out = interrupt(predict, some, monkeypatch)
    for record in parts_of(out).glob("[0-9]*.json"):
        content = json.loads(record.read_text())
        del content["inputs_each"]
        record.write_text(json.dumps(content))
    run = predict(some, flags=(*FLAGS, "--resume"), out=out.name)
    assert run.code == 2
    assert "earlier version" in run.stderr
