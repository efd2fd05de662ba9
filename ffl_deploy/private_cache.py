"""The user's cache folder: files that this user alone can write, read only where nobody else could have.

    ~/.cache/ffl-deploy/verdicts/...   what was found out on this machine (verdicts.py)
    ~/.cache/ffl-deploy/engines/...    TensorRT engines that were built on it (runtime/tensorrt_cache.py)

A cache only saves work: a file that is damaged, too large, of another user or open to others for writing is
as none, and where nothing can be written nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def private_folder(name: str, make: bool = False) -> Path | None:
    """-> the folder of the cache called `name`, None where there is none that belongs to this user alone."""
    base = cache_home()
    if base is None:
        return None
    folder = base / "ffl-deploy" / name
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
    return folder if all(stat.S_ISDIR(found.st_mode) and is_private(found) for found in own) else None


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


def is_private(found: os.stat_result) -> bool:
    """-> whether a file or folder belongs to this user, and nobody else may write to it (as far as the system
    knows users)."""
    if not hasattr(os, "geteuid"):
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & OPEN_TO_OTHERS


def read_private(path: Path, max_bytes: int) -> bytes | None:
    """-> the content of a regular file that only this user can write; None where it is not one, or longer
    than `max_bytes`. Raises OSError where it cannot be read."""
    # O_NOFOLLOW: a link may lead to a file of somebody else; O_NONBLOCK: a pipe in its place would never
    # answer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or not is_private(found) or found.st_size > max_bytes:
            return None
        return file.read(max_bytes + 1)


def write_private(path: Path, content: bytes) -> None:
    """Write or replace a file, readable by this user alone. Raises OSError.

    Another process may write the same one at the same time: each writes a file of its own, the last rename
    stands.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def make_room(folder: Path, max_entries: int) -> None:
    """Remove the oldest files, and temporary ones of processes that were killed, until `max_entries` are
    left.

    Raises OSError.
    """
    entries = [(entry.stat(follow_symlinks=False).st_mtime, entry.path) for entry in os.scandir(folder)]
    for _, path in sorted(entries)[: max(0, len(entries) - max_entries)]:
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            os.unlink(path)
