"""What was found out on this machine and need not be found out again: small files in the user's cache folder.

    ~/.cache/ffl-deploy/verdicts/SHA256-OF-THE-QUESTION.json      {"question": {...}, "answer": {...}}

A question is everything that its answer depends on, so an entry is never out of date. An entry only saves
work: one that is damaged, too large, of another user or open to others for writing is as none, and where
nothing can be written nothing is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

MAX_ENTRIES = 256  # the oldest make room
MAX_BYTES = 64 << 10  # of an entry
OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def recall(question: dict[str, Any]) -> Any:
    """-> the answer that was remembered for `question` (plain JSON data),
    None where there is none that can be trusted."""
    folder = _folder()
    if folder is None:
        return None
    encoded = msgspec.json.encode(question, order="sorted")
    try:
        # O_NOFOLLOW: a link may lead to a file of somebody else; O_NONBLOCK:
        # a pipe in its place would never answer.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(folder / _name(encoded), flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or not _private(found) or found.st_size > MAX_BYTES:
                return None
            entry = msgspec.json.decode(file.read(MAX_BYTES + 1))
        return entry["answer"] if msgspec.json.encode(entry["question"], order="sorted") == encoded else None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return None


def remember(question: dict[str, Any], answer: Any) -> None:
    """Keep `answer` (plain JSON data) for `question`; does nothing where that is not possible."""
    folder = _folder(make=True)
    if folder is None:
        return
    encoded = msgspec.json.encode(question, order="sorted")
    content = msgspec.json.format(msgspec.json.encode({"question": question, "answer": answer}), indent=1)
    with contextlib.suppress(OSError):
        # Another process may write the same entry at the same time: each writes a file of its own,
        # the last rename stands.
        # readable by this user alone
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, folder / _name(encoded))
        except BaseException:
            os.unlink(temporary)
            raise
        _make_room(folder)


def _name(encoded: bytes) -> str:
    return f"{hashlib.sha256(encoded).hexdigest()}.json"


def _folder(make: bool = False) -> Path | None:
    """-> the folder of the entries, None where there is none that belongs to this user alone."""
    base = cache_home()
    if base is None:
        return None
    folder = base / "ffl-deploy" / "verdicts"
    try:
        if make:
            # not its parents: a home that does not exist is not made
            for part in (base, folder.parent, folder):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700)
        if hasattr(os, "geteuid") and base.stat().st_uid not in (os.geteuid(), 0):
            return None  # root with a user's HOME: a folder of root's would lock the user out
        own = [os.lstat(part) for part in (folder.parent, folder)]
    except OSError:
        return None
    return folder if all(stat.S_ISDIR(found.st_mode) and _private(found) for found in own) else None


def cache_home() -> Path | None:
    """-> where this user's programs keep what they can make again, None where the user has no such place."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # a relative one is to be ignored, says the XDG specification
        return Path(given)
    if sys.platform == "win32":
        given = os.environ.get("LOCALAPPDATA", "")
        return Path(given) if os.path.isabs(given) else None
    home = os.path.expanduser("~")
    # expanduser makes / of an empty one, ~ of an unknown user
    if not os.path.isabs(home) or os.environ.get("HOME") == "":
        return None
    return Path(home, "Library", "Caches") if sys.platform == "darwin" else Path(home, ".cache")


def _private(found: os.stat_result) -> bool:
    """-> whether a file or folder belongs to this user,
    and nobody else may write to it (as far as the system knows users)."""
    if not hasattr(os, "geteuid"):
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & OPEN_TO_OTHERS


def _make_room(folder: Path) -> None:
    """Remove the oldest entries, and temporary files of processes that were killed,
    until MAX_ENTRIES are left."""
    entries = [(entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in os.scandir(folder)]
    for _, path in sorted(entries)[: max(0, len(entries) - MAX_ENTRIES)]:
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            os.unlink(path)
