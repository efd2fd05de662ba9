"""What was found out once is found again, by this user alone, and never gets in the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ffl_deploy import private_cache, verdicts
from ffl_deploy.verdicts import recall, remember

QUESTION = {"asks": "a test", "of": [1, 2.5, None], "text": "flags: a b\n"}
posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users and modes as POSIX knows them")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home without XDG_CACHE_HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def entry(home: Path) -> Path:
    """The file of QUESTION, whose answer is "passed"."""
    remember(QUESTION, "passed")
    (path,) = (home / ".cache/ffl-deploy/verdicts").iterdir()
    assert recall(QUESTION) == "passed"
    return path


def test_an_answer_is_found_again_for_the_same_question_alone(home: Path) -> None:
    assert recall(QUESTION) is None
    assert not any(home.iterdir()), "asking makes nothing"
    remember(QUESTION, {"variant": "int8", "rates": {"a": 1.5}})
    assert recall(dict(reversed(QUESTION.items()))) == {"variant": "int8", "rates": {"a": 1.5}}, (
        "the order of keys says nothing"
    )
    for name in QUESTION:
        assert recall(QUESTION | {name: "another"}) is None
    remember(QUESTION, "passed")
    assert recall(QUESTION) == "passed"


@posix
def test_nobody_else_reads_or_writes_what_is_made(entry: Path) -> None:
    modes = [
        path.stat().st_mode & 0o777 for path in (entry, entry.parent, entry.parent.parent, entry.parents[2])
    ]
    assert modes == [0o600, 0o700, 0o700, 0o700]


def test_the_places_of_the_platforms(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_cache.cache_home() == home / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert private_cache.cache_home() == home / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "other"))
    assert private_cache.cache_home() == home / "other"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert private_cache.cache_home() == home / "Library" / "Caches"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(home / "Local"))
    assert private_cache.cache_home() == home / "Local"
    monkeypatch.delenv("LOCALAPPDATA")
    assert private_cache.cache_home() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"passed"',
        b'{"answer": "passed"}',
        b'{"question": 1, "answer": "passed"}',
        b'{"question": {"asks": "another"}, "answer": "passed"}',
        b"[" * 100_000,
        b" " * (1 << 20),
    ],
)
def test_a_damaged_entry_is_none_and_is_replaced(entry: Path, content: bytes) -> None:
    entry.write_bytes(content)
    assert recall(QUESTION) is None
    remember(QUESTION, "passed")
    assert recall(QUESTION) == "passed"


@posix
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "group writes", "all write"])
def test_what_is_no_private_file_is_not_read(entry: Path, kind: str, tmp_path: Path) -> None:
    content = entry.read_bytes()
    if kind in ("group writes", "all write"):
        entry.chmod(0o620 if kind == "group writes" else 0o602)
    else:
        entry.unlink()
        if kind == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            entry.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe":
            os.mkfifo(entry)
        else:
            entry.mkdir()
    assert recall(QUESTION) is None
    remember(QUESTION, "passed")  # in silence, also where the place is taken by a folder
    assert recall(QUESTION) == (None if kind == "folder" else "passed")
    assert [path.name for path in entry.parent.iterdir()] == [entry.name], "no temporary file is left"


@posix
@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("kind", ["group writes", "link"])
def test_a_folder_that_others_can_change_is_not_used(
    entry: Path, level: int, kind: str, tmp_path: Path
) -> None:
    folder = entry.parents[level - 1]
    if kind == "link":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    else:
        folder.chmod(0o770)
    assert recall(QUESTION) is None
    remember(QUESTION | {"of": "more"}, "passed")
    assert recall(QUESTION | {"of": "more"}) is None


@posix
def test_another_users_entries_are_not_read(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sudo HOME may still be the user's: nothing of theirs is trusted,
    and no folder is made there that locks them out."""
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert recall(QUESTION) is None
    before = sorted(entry.parents[3].rglob("*"))
    remember(QUESTION | {"of": "more"}, "passed")
    assert sorted(entry.parents[3].rglob("*")) == before
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert recall(QUESTION) == "passed"


@posix
@pytest.mark.parametrize("kind", ["absent", "empty", "file", "no user"])
def test_without_a_home_there_is_no_memory_and_no_word(
    home: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home.rmdir()
    if kind == "file":
        home.write_text("not a folder")
    elif kind == "empty":
        monkeypatch.setenv("HOME", "")
    elif kind == "no user":  # a container's number without a name
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    remember(QUESTION, "passed")
    assert recall(QUESTION) is None
    assert home.exists() == (kind == "file"), "a home is not made"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("call", ["os.mkdir", "tempfile.mkstemp", "os.replace"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_where_nothing_can_be_written_nothing_is_said(
    home: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, refuse)
    remember(QUESTION, "passed")
    assert recall(QUESTION) is None
    assert not [path for path in home.rglob("*") if path.is_file()]
    assert capfd.readouterr() == ("", "")


def test_the_oldest_make_room(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "MAX_ENTRIES", 4)
    (entry.parent / ".killed.tmp").write_bytes(b"half")
    os.utime(entry.parent / ".killed.tmp", (1, 1))
    os.utime(entry, (2, 2))
    for number in range(4):
        remember({"number": number}, number)
        (newest,) = [path for path in entry.parent.iterdir() if path.stat().st_mtime > 1000]
        os.utime(newest, (10 + number, 10 + number))
    assert recall(QUESTION) is None
    assert [recall({"number": number}) for number in range(4)] == [0, 1, 2, 3]
    assert len(list(entry.parent.iterdir())) == 4


def test_processes_that_write_at_the_same_time_leave_whole_entries(home: Path) -> None:
    script = """
import sys
from ffl_deploy.verdicts import recall, remember
own = int(sys.argv[1])
for turn in range(150):
    remember({"asks": "shared"}, "x" * 20_000)
    remember({"asks": own}, own)
    assert recall({"asks": "shared"}) == "x" * 20_000, turn
    assert recall({"asks": own}) == own, turn
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], cwd=Path(__file__).parents[2])
        for number in range(4)
    ]
    assert [process.wait(120) for process in processes] == [0] * 4
    names = [path.name for path in (home / ".cache/ffl-deploy/verdicts").iterdir()]
    assert len(names) == 5
    assert not [name for name in names if not name.endswith(".json")]
    for number in range(4):
        assert recall({"asks": number}) == number


def test_an_entry_can_be_read_by_people(entry: Path) -> None:
    assert msgspec.json.decode(entry.read_bytes()) == {"question": QUESTION, "answer": "passed"}
