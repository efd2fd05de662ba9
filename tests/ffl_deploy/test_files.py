"""A reader, a crash, another writer or another user at any instant: what is at a name is whole, and the
user's."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ffl_deploy import files
from ffl_deploy.bundle import Bundle, load_bundle
from ffl_deploy.files import (
    existing_folder,
    make_folders,
    remove_abandoned,
    replace_file,
    replace_folder,
    write_atomically,
)


@pytest.fixture(params=["exchange", "two renames"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With RENAME_EXCHANGE, and as on file systems that have none."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "private.jsonl"
    path.write_text("old")
    path.chmod(0o600)
    seen = []
    with replace_file(path) as file:
        seen = [stat.S_IMODE(os.fstat(file.fileno()).st_mode)]
        file.write(b"new")
    assert seen == [0o600], "nor may anyone read it while it is written"
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o600)
    fresh = tmp_path / "fresh"
    write_atomically(fresh, "x")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o666 & ~mask


def test_a_folder_keeps_its_mode(tmp_path: Path, both_ways: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    folder.chmod(0o750)
    with replace_folder(folder) as new:
        (new / "x").write_text("new")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert names(tmp_path) == ["bundle"]


def test_links_planted_for_the_temporary_names_are_not_followed(tmp_path: Path) -> None:
    """For every name that was foreseeable: NAME, the process and a suffix."""
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    shared = tmp_path / "shared"
    shared.mkdir()
    for pid in range(os.getpid() - 2, os.getpid() + 3):
        (shared / f".report.json.{pid}.tmp").symlink_to(precious)
    write_atomically(shared / "report.json", "report")
    assert precious.read_text() == "thesis"
    assert not (shared / "report.json").is_symlink()
    assert (shared / "report.json").read_text() == "report"


def test_a_temporary_name_is_never_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 16)
    for kind in ("tmp", "new"):
        (tmp_path / f".x.{'0' * 16}.{kind}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", "text")
    with pytest.raises(FileExistsError), replace_folder(tmp_path / "x"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_at_the_name_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write_atomically(tmp_path / "link", "new")
    assert target.read_text() == "old"
    assert not (tmp_path / "link").is_symlink()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    (tmp_path / "pointer").symlink_to(folder)
    with pytest.raises(NotADirectoryError), replace_folder(tmp_path / "pointer") as new:
        (new / "x").write_text("x")
    assert names(folder) == ["kept"]
    assert names(tmp_path) == ["folder", "link", "pointer", "target"]


def test_a_name_of_255_bytes_has_a_temporary_one_too(tmp_path: Path) -> None:
    for name in ("x" * 255, "\N{SNOWMAN}" * 85):
        write_atomically(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_what_fails_leaves_the_old_and_nothing_else(tmp_path: Path, both_ways: str) -> None:
    with replace_folder(tmp_path / "a") as new:
        (new / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "a") as new:
        (new / "x").write_text(str(1 / 0))
    with pytest.raises(ZeroDivisionError), replace_file(tmp_path / "f") as file:
        file.write(b"half" * (1 // 0))
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "old"


def write_often(folder: str, letter: str, turns: int, exchange: bool) -> None:
    if not exchange:
        files._exchange = lambda one, other: False
    for _ in range(turns):
        with replace_folder(Path(folder)) as new:
            for name in ("one", "two"):
                (new / name).write_text(letter)


@pytest.mark.parametrize("exchange", [True, False])
def test_two_writers_at_once_leave_the_whole_of_one(tmp_path: Path, exchange: bool) -> None:
    """A reader beside them never finds nothing, where folders can be exchanged, and never half of each."""
    folder = tmp_path / "fused"
    write_often(str(folder), "z", 1, True)
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_often, args=(str(folder), letter, 100, exchange)) for letter in "ab"
    ]
    for writer in writers:
        writer.start()
    missed = 0
    while any(writer.is_alive() for writer in writers):
        missed += not folder.is_dir()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert not (exchange and missed), missed
    assert (folder / "one").read_text() == (folder / "two").read_text()
    assert (folder / "one").read_text() in "ab"
    assert names(tmp_path) == ["fused"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ffl_deploy import files
real, count, at = os.rename, 0, int(sys.argv[2])
files._exchange = lambda one, other: False
def rename(*names):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.rename = rename
with files.replace_folder(Path(sys.argv[1])) as new:
    (new / "bundle.json").write_text("new")
"""


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_two_renames_is_survived_by_every_reader(
    tiny_bundle: Bundle, tmp_path: Path, at: int
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "fused"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert folder.exists() == (at == 1)
    assert existing_folder(folder) is not None
    assert load_bundle(folder).sha256 == tiny_bundle.sha256
    with replace_folder(folder) as new:
        (new / "x").write_text("x")
    assert names(tmp_path) == ["fused"], "what was left of the killed one is gone"
    assert names(folder) == ["x"]


def test_the_old_version_of_an_earlier_release_is_found(tmp_path: Path) -> None:
    (tmp_path / ".last.old").mkdir()
    assert existing_folder(tmp_path / "last") == tmp_path / ".last.old"


def test_only_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    """Not a user's file of such a name, not a link, not what somebody is writing."""
    out = tmp_path / "o.jsonl"
    kept = [".o.jsonl.backup.tmp", ".o.jsonl.4711.tmp", f".other.{'0' * 16}.tmp", f"o.jsonl.{'0' * 16}.tmp"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".o.jsonl.{'1' * 16}.tmp").symlink_to(tmp_path / kept[0])
    (tmp_path / f".o.jsonl.{'2' * 16}.tmp").write_text("abandoned")
    with replace_file(out, tidy=False) as file:
        file.write(b"rows")
        living = Path(file.name) if isinstance(file.name, str) else None
        assert living is None
        before = set(names(tmp_path))
        remove_abandoned(out, "tmp")
        assert before - set(names(tmp_path)) == {f".o.jsonl.{'2' * 16}.tmp"}
    assert out.read_text() == "rows"
    assert set(kept) <= set(names(tmp_path))


def test_folders_above_are_made(tmp_path: Path) -> None:
    make_folders(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_folders(tmp_path / "file" / "below")


def test_the_exchange_says_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, *_: object, **__: object) -> None:
            self.renameat2: Callable[..., int] = lambda *_: -1

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    monkeypatch.setattr(files.ctypes, "CDLL", Library)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.EINVAL)
    assert not files._exchange(one, two)
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        files._exchange(one, two)


def test_a_file_is_tidied_up_by_its_next_writer(tmp_path: Path) -> None:
    """A run that was killed while it wrote its report left a part of it for ever."""
    left = tmp_path / f".o.jsonl.report.json.{'3' * 16}.tmp"
    for tidy in (False, True):
        left.write_text("half of a")
        write_atomically(tmp_path / "o.jsonl.report.json", "report", tidy=tidy)
        assert left.exists() is not tidy


@pytest.mark.parametrize("kind", ["new", "tmp"])
def test_a_writer_seen_before_its_lock_begins_again(tmp_path: Path, kind: str) -> None:
    """Two threads, one that only tidies up: no writer may find its folder or file gone."""
    stop, folder = threading.Event(), tmp_path / "x"

    def tidy() -> None:
        while not stop.is_set():
            remove_abandoned(folder, kind)

    tidier = threading.Thread(target=tidy)
    tidier.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if kind == "tmp":
                write_atomically(folder, "a")
                continue
            with replace_folder(folder) as new:
                (new / "a").write_text("a")
    finally:
        stop.set()
        tidier.join()
    assert folder.read_text() == "a" if kind == "tmp" else names(folder) == ["a"]
