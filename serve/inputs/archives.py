"""Images inside zip and tar archives, read as streams. Nothing is ever extracted,
so member names cannot lead anywhere."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from ffl_deploy.images import SUFFIXES, ImageError
from serve.inputs.items import (
    MAX_FILE_BYTES,
    METADATA,
    Item,
    Skipped,
    displayed,
    failed_item,
    is_metadata,
    label_of,
    refuse,
)

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# Photos do not compress: a stream that grows beyond this is a bomb. From FREE_BYTES on,
# since a few zeros are harmless.
MAX_EXPANSION = 200
FREE_BYTES = 2**30


def is_zip(path: str) -> bool:
    return path.lower().endswith(ZIP_SUFFIXES)


def is_tar(path: str) -> bool:
    return path.lower().endswith(TAR_SUFFIXES)


def members(path: str, classes: frozenset[str], skipped: Skipped) -> Iterator[Item]:
    """Yield the image members of an archive as `archive::member`, in the archive's order.

    A broken archive gives the members before the break, then one item with the archive's own name and
    the status `corrupt_archive`. Links, devices, folders and other files (nested archives too) are
    counted in `skipped`.
    """
    read = _zip_members if is_zip(path) else _tar_members
    try:
        yield from read(path, classes, skipped)
    except MemoryError:
        raise
    # zipfile, tarfile and their decompressors raise almost anything on hostile bytes
    except Exception as error:
        code = "unreadable" if isinstance(error, PermissionError) else "corrupt_archive"
        yield failed_item(path, code, f"the archive cannot be read to its end ({error})")


def _zip_members(path: str, classes: frozenset[str], skipped: Skipped) -> Iterator[Item]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # is_dir() looks at the last character
            if (info.filename and info.is_dir()) or _is_other(info.filename, skipped):
                continue
            unix_mode = info.external_attr >> 16
            if unix_mode & 0o170000 == 0o120000:
                skipped.reasons["symbolic links"] += 1
                continue
            yield _member(path, info.filename, classes, partial(_read_zip_member, archive, info))


def _read_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.flag_bits & 0x1:
        raise ImageError("encrypted", "the archive member is encrypted; give an archive without a password")
    if info.file_size > MAX_FILE_BYTES:
        raise ImageError(
            "too_large", f"the member unpacks to {info.file_size} bytes, more than {MAX_FILE_BYTES}"
        )
    try:
        with archive.open(info) as file:
            data = file.read(MAX_FILE_BYTES + 1)  # the size in the directory can lie
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ImageError("corrupt", f"the archive member cannot be unpacked ({error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise ImageError("too_large", f"the member unpacks to more than {MAX_FILE_BYTES} bytes")
    return data


def _tar_members(path: str, classes: frozenset[str], skipped: Skipped) -> Iterator[Item]:
    with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as archive:
        for info in archive:
            unpacked = info.offset_data + info.size
            if unpacked > FREE_BYTES and unpacked > MAX_EXPANSION * max(raw.tell(), 1):
                raise tarfile.TarError(f"it grows more than {MAX_EXPANSION}-fold: a decompression bomb")
            if info.isdir():
                continue
            if info.issym() or info.islnk():
                skipped.reasons["symbolic links" if info.issym() else "hard links"] += 1
            elif not info.isfile():
                skipped.reasons["special files"] += 1
            elif not _is_other(info.name, skipped):
                yield _member(path, info.name, classes, partial(_read_tar_member, archive, info))
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen; a stream never goes back to one


def _read_tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > MAX_FILE_BYTES:
        raise ImageError("too_large", f"the member has {info.size} bytes, more than {MAX_FILE_BYTES}")
    try:
        file = archive.extractfile(info)
        data = b"" if file is None else file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ImageError("truncated", f"the archive ends inside this member ({error})") from error
    if len(data) < info.size:
        raise ImageError(
            "truncated", f"the archive ends inside this member ({len(data)} of {info.size} bytes)"
        )
    return data


def _member(path: str, name: str, classes: frozenset[str], read: partial[bytes]) -> Item:
    label = label_of(PurePosixPath(name).parts[:-1], classes)
    if "\0" in name:
        read = partial(refuse, "corrupt", "the member's name holds a NUL")
    return Item(f"{displayed(path)}::{displayed(name)}", read, label, bound=True, source=path)


def _is_other(name: str, skipped: Skipped) -> bool:
    """-> whether a member is no image by its name; counts it."""
    if is_metadata(name):
        skipped.reasons[METADATA] += 1
        return True
    if name.lower().endswith(SUFFIXES):
        return False
    nested = is_zip(name) or is_tar(name)
    skipped.reasons["nested archives" if nested else "files without an image suffix"] += 1
    return True
