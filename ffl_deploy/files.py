"""Writing files so that a reader, or a crash, never sees half of one; and hashing them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
"""A new file under a name that nothing has yet, not even a link."""


TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<kind>tmp|new|old)", re.DOTALL)


def sha256_of(path: Path) -> str:
    """-> hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path: str | os.PathLike[str]) -> str:
    """-> `path` for a message: relative to the working directory where it lies below it,
    as people type it."""
    text, here = os.fspath(path), os.path.join(os.getcwd(), "")
    return text[len(here) :] if text.startswith(here) and len(text) > len(here) else text


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """-> " Did you mean 'photos'?" where a neighbour of a path that does not exist has nearly its name,
    else nothing."""
    parent, name = os.path.split(os.path.normpath(os.fspath(path)))
    try:
        near = get_close_matches(name, os.listdir(parent or "."), n=1)
    except OSError:
        return ""
    return f" Did you mean {os.path.join(parent, near[0])!r}?" if near else ""


@contextlib.contextmanager
def replace_file(path: Path, tidy: bool = True) -> Iterator[BinaryIO]:
    """Yield a new file beside `path`; when the block ends well it is synced and takes `path`'s place and
    mode, else it is removed. A link at `path` is replaced, never followed.

    tidy: also remove what killed writers of `path` have left, for which its folder is listed.
    """
    make_folders(path.parent)
    if tidy:
        remove_abandoned(path, "tmp")
    mode = _mode_of(path, stat.S_ISREG)
    temporary, descriptor = _locked_file(path, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes | str, tidy: bool = True) -> None:
    """Write `content` to `path`, which holds the old or the new content at any instant. tidy: see
    `replace_file`."""
    with replace_file(path, tidy) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write a msgspec struct or plain data as indented JSON, atomically."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (a no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; when the block ends well it takes `folder`'s place and mode,
    else it is removed.

    Two writers at once leave the whole of one, and each removes what it has replaced. Where the file system
    cannot exchange two folders, a kill between two renames can leave only the old one, under another name;
    `existing_folder` finds it.
    """
    make_folders(folder.parent)
    remove_abandoned(folder, "new")
    before = _temporaries(folder, "old")
    new, held = _locked_folder(folder)
    try:
        mode = _mode_of(folder, stat.S_ISDIR)
        if mode is not None:
            new.chmod(mode)
        yield new
        for parent, _, files in os.walk(new):
            for name in files:
                _sync(os.path.join(parent, name))
            _sync(parent)
        old = _put_in_place(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    finally:
        os.close(held)
    sync_folder(folder.parent)
    for replaced in (old, *before):
        shutil.rmtree(replaced, ignore_errors=True)


def _locked_file(path: Path, mode: int) -> tuple[Path, int]:
    """-> (a new empty file beside `path`, its descriptor, which holds its lock until it is closed)."""
    while True:
        new = path.with_name(temporary_name(path.name, "tmp"))
        descriptor = os.open(new, CREATE, mode)
        # another writer's `remove_abandoned` saw it before its lock
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(new):
            return new, descriptor
        os.close(descriptor)


def _locked_folder(folder: Path) -> tuple[Path, int]:
    """-> (a new empty folder beside `folder`, its descriptor, which holds its lock)."""
    while True:
        new = folder.with_name(temporary_name(folder.name, "new"))
        new.mkdir()
        # another writer's `remove_abandoned` saw it before its lock
        with contextlib.suppress(FileNotFoundError):
            held = os.open(new, os.O_RDONLY)
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(held, fcntl.LOCK_EX)
            if new.is_dir():
                return new, held
            os.close(held)


def _put_in_place(new: Path, folder: Path) -> Path:
    """Give `new` the name `folder`; -> where what had that name before is now, if anything had."""
    old = folder.with_name(temporary_name(folder.name, "old"))
    while True:
        # one look: between two, another writer may have taken it away and put it back
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        try:
            if folder.exists():
                if _exchange(new, folder):
                    return new
                os.rename(folder, old)
            os.rename(new, folder)
            return old
        except OSError as error:  # another writer was here between the look and the rename
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT) or not new.is_dir():
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; -> False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def existing_folder(folder: Path) -> Path | None:
    """-> `folder`, or the previous version that an interrupted `replace_folder` left behind, or None."""
    for _ in range(3):  # it can come into its place between the two looks
        if folder.is_dir():
            return folder
        left = [path for path in _temporaries(folder, "old") if path.is_dir()]
        # earlier versions'
        left += [path for path in (folder.with_name(f".{folder.name}.old"),) if path.is_dir()]
        with contextlib.suppress(FileNotFoundError):
            if left:
                return max(left, key=lambda path: path.stat().st_mtime)
    return None


def remove_abandoned(path: Path, kind: str) -> None:
    """Remove the files or folders of `kind` ("tmp", "new", "old") that writers of `path` left who were
    killed.

    A living writer holds a lock on its own; one that is not locked, has such a name and is not a link is
    ours.
    """
    for left in _temporaries(path, kind):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            if _try_lock(descriptor) and os.fstat(descriptor).st_uid == os.geteuid():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def remove_all_abandoned(folder: Path) -> None:
    """Remove what killed writers left inside `folder`, which is nobody's but ours: what they replaced too,
    where its successor is there."""
    with contextlib.suppress(OSError):
        for found in {match for name in os.listdir(folder) if (match := TEMPORARY.fullmatch(name))}:
            if found["kind"] != "old" or (folder / found["name"]).exists():
                remove_abandoned(folder / found["name"], found["kind"])


def entries(folder: Path) -> Iterator[str]:
    """-> names, relative to `folder`, of everything below it that is not a real folder: files, links,
    devices."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*files, *links]:
            yield Path(parent, name).relative_to(folder).as_posix()


def temporary_name(name: str, kind: str) -> str:
    """-> a name that nobody can foresee, by which `remove_abandoned` finds what a killed writer left."""
    # a file's name has at most 255 bytes
    return f".{os.fsdecode(os.fsencode(name)[:200])}.{secrets.token_hex(8)}.{kind}"


def _temporaries(path: Path, kind: str) -> list[Path]:
    wanted = os.fsdecode(os.fsencode(path.name)[:200]), kind
    try:
        found = [match for name in os.listdir(path.parent) if (match := TEMPORARY.fullmatch(name))]
    except OSError:
        return []
    return [path.with_name(match[0]) for match in found if match.group("name", "kind") == wanted]


def make_folders(folder: Path) -> None:
    """Make `folder` and what is missing above it, durably."""
    missing = []
    while not folder.is_dir() and folder.parent != folder:
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        sync_folder(one.parent)


def _mode_of(path: Path, kind: Callable[[int], bool]) -> int | None:
    """-> the permissions of what is at `path`, None where nothing of that kind is."""
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(found) & 0o777 if kind(found) else None


def _try_lock(descriptor: int) -> bool:
    """-> whether nobody else holds the lock of this open file; False too where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
