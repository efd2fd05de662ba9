"""One thing to classify: the name its row shows, and how to get its bytes."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ffl_deploy.images import ImageError

# of one encoded image; 50 megapixels of incompressible 16-bit RGB PNG are 300 MB
MAX_FILE_BYTES = 256 * 2**20


class Item(NamedTuple):
    """`read()` gives the encoded image, or raises ImageError with the status of the item's row.

    `bound` items come from a stream (a tar, a table): they must be read before the next item is asked for.
    """

    path: str
    read: Callable[[], bytes]
    label: str | None = None
    bound: bool = False
    file: str | None = None  # what `read` reads, where that is a file: another machine can read it too
    source: str | None = None  # the archive or table that a `bound` item is read from
    held: int = 0  # bytes of it that are in memory already
    version: str = ""  # of what lies elsewhere: what its store says that changes with the content

    def loaded(self) -> Item:
        """-> this item with its bytes, or the reason why there are none, in memory."""
        held = 0
        try:
            data = self.read()
            read, held = partial(bytes, data), len(data)
        except ImageError as error:
            read = partial(refuse, error.code, str(error))
        except MemoryError:
            read = partial(
                refuse, "out_of_memory", "it does not fit into memory; classify it on a larger machine"
            )
        # as in the decoding threads: a fault of ours may cost this row, not those behind it
        except Exception as error:
            read = partial(refuse, "internal_error", f"{type(error).__name__}: {error}")
        source = self.file or self.source
        return Item(self.path, read, self.label, file=None, source=source, held=held, version=self.version)


@dataclass
class Skipped:
    """What a folder or an archive held that is not an input: reason -> count. Reported, never silent."""

    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))


METADATA = "files of macOS metadata"


def is_metadata(name: str) -> bool:
    """-> whether a file or member is what macOS adds to folders
    and zips beside each image (`._photo.jpg`)."""
    parts = name.split("/")
    return parts[-1].startswith("._") or "__MACOSX" in parts


def label_of(folders: Iterable[str], classes: frozenset[str]) -> str | None:
    """-> the first folder name that is a class of the bundle:
    how a folder of class folders labels its images."""
    return next((displayed(name) for name in folders if name in classes), None)


def identity(item: Item) -> bytes:
    """-> what tells whether an item is still the one it was: its name, its label, and size and time of its
    file or of the archive or table that holds it. 8 us an item; nothing is read."""
    try:
        status = os.stat(item.file or item.source or "")
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except (OSError, ValueError):  # a name that no file can have, and what is no file
        stamp = item.version or "-"
    return "\0".join((item.path, item.label or "", stamp, "")).encode()


def file_item(path: str, label: str | None = None) -> Item:
    return Item(displayed(path), partial(read_file, path), label, file=path)


def path_item(table: str, number: int, cell: str | None, label: str | None) -> Item:
    """-> the item of a table's row that names a file, relative to the table's folder."""
    if not cell:
        return Item(f"{displayed(table)}::{number}", partial(refuse, "null", "the cell is empty"), label)
    return file_item(os.path.join(os.path.dirname(table), cell), label)._replace(path=displayed(cell))


def label_text(cell: object) -> str | None:
    """-> a label as a table or a sample has it; None for none."""
    return str(cell).strip() or None if cell is not None else None


def failed_item(path: str, code: str, message: str) -> Item:
    """-> an item that only says why it cannot be read."""
    return Item(displayed(path), partial(refuse, code, message))


def refuse(code: str, message: str) -> bytes:
    raise ImageError(code, message)


def displayed(path: str) -> str:
    """-> `path` as valid UTF-8: bytes of a name that are not UTF-8 become \\xNN,
    so that every output format can hold it."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(path: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """-> a regular file's content; never waits on a pipe. Raises ImageError: missing, not_a_file,
    unreadable, too_large."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: opening a device can have effects
            raise ImageError("not_a_file", "it is a folder, a device or a pipe, not a file")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not_a_file", "it is a folder, a device or a pipe, not a file")
            if status.st_size > limit:
                raise ImageError("too_large", f"the file has {status.st_size} bytes, more than {limit}")
            # in as many pieces as the file system gives; 0: it does not say
            return file.read(status.st_size or limit)
    except (FileNotFoundError, NotADirectoryError) as error:
        address = "://" in os.fsdecode(path)
        why = "only addresses on the command line are fetched" if address else "there is no such file"
        raise ImageError("missing", why) from error
    except ValueError as error:  # a NUL inside a name that a table gave
        raise ImageError("missing", "the name holds a character that no file name can hold") from error
    except OSError as error:
        raise ImageError("unreadable", f"the file cannot be read ({error.strerror})") from error
