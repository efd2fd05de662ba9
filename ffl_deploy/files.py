"""Writing files so that a reader, or a crash, never sees half of one; and hashing them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import msgspec


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
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`; when the block ends well it is synced and takes `path`'s place,
    else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, which holds the old or the new content at any instant."""
    with replace_file(path) as file:
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
    """Yield an empty folder beside `folder`; when the block ends well it takes `folder`'s place,
    else it is removed.

    Between the two renames a kill can leave only `.NAME.old`; `existing_folder` then finds that one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), _old(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def existing_folder(folder: Path) -> Path | None:
    """-> `folder`, or the previous version that an interrupted `replace_folder` left behind, or None."""
    if folder.is_dir():
        return folder
    return _old(folder) if _old(folder).is_dir() else None


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
