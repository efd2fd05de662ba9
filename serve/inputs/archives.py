"""Images inside zip and tar archives, read as streams. Nothing is ever extracted,
so member names cannot lead anywhere."""

from __future__ import annotations

import contextlib
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

from ffl_deploy.images import SUFFIXES, ImageError
from ffl_deploy.installed import require
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
from serve.inputs.samples import MAX_LABEL_BYTES, Sample, is_label

ZIP_SUFFIXES = (".zip",)
ZSTD_SUFFIXES = (".tar.zst", ".tzst")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", *ZSTD_SUFFIXES)
# Photos do not compress: a stream that grows beyond this is a bomb. From FREE_BYTES on,
# since a few zeros are harmless.
MAX_EXPANSION = 200
FREE_BYTES = 2**30
MAX_NAME_BYTES = 2**20
"""Of the headers that tar puts before a member for its long name: tarfile reads them whole."""
LONGEST_END = 22 + 65535 + 20
"""Of a zip: its end record, the comment in it, and the locator before it."""
MAX_DIRECTORY_BYTES = 2**29
"""Of a zip's directory, which zipfile reads whole and keeps at nine times its size."""


def is_zip(path: str) -> bool:
    return path.lower().endswith(ZIP_SUFFIXES)


def is_tar(path: str) -> bool:
    return path.lower().endswith(TAR_SUFFIXES)


def members(
    path: str, classes: frozenset[str], skipped: Skipped, most_directory: int = MAX_DIRECTORY_BYTES
) -> Iterator[Item]:
    """Yield the image members of an archive as `archive::member`, in the archive's order.

    A broken archive gives the members before the break, then one item with the archive's own name and the
    status `corrupt_archive`. Links, devices, folders and other files (nested archives too) are counted in
    `skipped`. most_directory: bytes of a zip's directory, which is read whole.
    """
    try:
        if is_zip(path):
            yield from _zip_members(path, classes, skipped, most_directory)
        else:
            yield from _tar_members(path, classes, skipped)
    except MemoryError:
        raise
    # zipfile, tarfile and their decompressors raise almost anything on hostile bytes
    except Exception as error:
        code = "unreadable" if isinstance(error, PermissionError) else "corrupt_archive"
        yield failed_item(path, code, f"the archive cannot be read to its end ({error})")


def _zip_members(path: str, classes: frozenset[str], skipped: Skipped, most_directory: int) -> Iterator[Item]:
    if (size := directory_bytes(path)) > most_directory:
        raise zipfile.BadZipFile(f"its directory has {size} bytes, more than {most_directory}")
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


def directory_bytes(path: str) -> int:
    """-> the size of a zip's directory, as its end record says (APPNOTE 4.3.14 to 4.3.16); 0 where there is
    none, the whole file's where it says nothing that fits."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - LONGEST_END))
        end = file.read()
        start = end.rfind(b"PK\5\6")
        if start < 0 or start + 16 > len(end):
            return 0
        (size,) = struct.unpack_from("<I", end, start + 12)
        if size < 0xFFFFFFFF:
            return min(size, length)
        # the record of large archives, which a locator before the other one points at
        if end[max(0, start - 20) :].startswith(b"PK\6\7"):
            file.seek(min(length, struct.unpack_from("<Q", end, start - 12)[0]))
            large = file.read(48)
            if large.startswith(b"PK\6\6") and len(large) == 48:
                return min(struct.unpack_from("<Q", large, 40)[0], length)
        return length


class _TarInfo(tarfile.TarInfo):
    """Headers as tarfile reads them, but for names that would fill the memory before anybody sees them."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size > MAX_NAME_BYTES and self.type in NAME_HEADERS:
            raise tarfile.ReadError(f"a member's name has {self.size} bytes: a decompression bomb")
        return super()._proc_member(archive)  # type: ignore[misc]


NAME_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


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
    with (
        open(path, "rb") as raw,
        _unpacked(path, raw) as stream,
        tarfile.open(fileobj=stream, mode="r|" if stream is not raw else "r|*", tarinfo=_TarInfo) as archive,
    ):
        sample = Sample()
        try:
            yield from _labelled_members(path, archive, raw, classes, skipped, sample)
        except Exception:  # where the archive breaks off, what came before the break comes first
            yield from sample.ended(skipped)
            raise
        yield from sample.ended(skipped)


def _labelled_members(
    path: str,
    archive: tarfile.TarFile,
    raw: IO[bytes],
    classes: frozenset[str],
    skipped: Skipped,
    sample: Sample,
) -> Iterator[Item]:
    """raw: the archive as it lies on disk."""
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
        elif is_label(info.name) and info.size <= MAX_LABEL_BYTES and not is_metadata(info.name):
            yield from sample.labelled(info.name, _read_tar_member(archive, info), skipped)
        elif not _is_other(info.name, skipped):
            item = _member(path, info.name, classes, partial(_read_tar_member, archive, info))
            yield from sample.image(info.name, item, skipped)
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen; a stream never goes back to one


@contextlib.contextmanager
def _unpacked(path: str, raw: IO[bytes]) -> Iterator[Any]:
    """-> the tar's stream, of what `tarfile` cannot unpack itself."""
    if not path.lower().endswith(ZSTD_SUFFIXES):
        yield raw
        return
    require("pyarrow", "or unpack it first: unzstd FILE")
    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
        yield stream


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
