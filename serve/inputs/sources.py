"""What the user named -> a stream of items: files, folders, globs, archives, tables, paths on standard input.

The order is the order of the arguments; inside a folder, names sorted as bytes. Nothing holds more than one
folder's names in memory, and of a large folder not even those.
"""

from __future__ import annotations

import glob
import heapq
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from ffl_deploy.errors import UsageError
from ffl_deploy.images import SUFFIXES
from serve.inputs import archives, remote, tables
from serve.inputs.columnar import parts_of
from serve.inputs.items import METADATA, Item, Skipped, failed_item, file_item, is_metadata, label_of
from serve.inputs.standard_input import STANDARD_INPUT, standard_input

SPILL = 50_000  # names sorted in memory at a time, about 5 MB


@dataclass(frozen=True)
class Reading:
    """How inputs are read. `classes`: folder names that are labels. `column`, `label_column`:
    of tables (None: usual ones)."""

    classes: frozenset[str] = frozenset()
    column: str | None = None
    label_column: str | None = None
    follow_links: bool = False
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class Container:
    """A kind of file that is read as many items.

    holds: whether a file of this name is one; items: its images; check: raises UsageError, before any work,
    for what cannot be read at all; count: how many items it gives, None where only reading everything would
    tell (without `count`, they are listed).
    """

    holds: Callable[[str], bool]
    items: Callable[[str, Reading], Iterator[Item]]
    check: Callable[[str, Reading], None] | None = None
    count: Callable[[str], int | None] | None = None


CONTAINERS = (
    Container(
        archives.is_zip,
        lambda path, reading: archives.members(path, reading.classes, reading.skipped),
    ),
    Container(
        archives.is_tar,
        lambda path, reading: archives.members(path, reading.classes, reading.skipped),
        count=lambda path: None,
    ),
    Container(
        tables.is_table,
        lambda path, reading: tables.rows(path, reading.column, reading.label_column),
        check=lambda path, reading: tables.check_table(path, reading.column, reading.label_column),
        count=tables.count_rows,
    ),
)


def container_of(path: str) -> Container | None:
    """-> how the file is read; None for a single image, a folder, and where there is no file."""
    return next((kind for kind in CONTAINERS if kind.holds(path) and os.path.isfile(path)), None)


def check_inputs(inputs: Iterable[str], reading: Reading) -> None:
    """Refuse before any work what cannot be read at all. Raises UsageError for an empty pattern or a table
    without the column."""
    for argument in inputs:
        if remote.is_address(argument):
            remote.check(argument)
            continue
        found = False
        for path in named(argument):
            found = True
            kind = container_of(path)
            if kind is not None and kind.check is not None:
                kind.check(path, reading)
        if not found:
            raise UsageError(f"no file matches {argument!r}; check the pattern.")


def read_inputs(inputs: Iterable[str], reading: Reading) -> Iterator[Item]:
    """Yield every input once, in order. An argument
    that names no folder always gives at least one item or names its error."""
    for argument in inputs:
        if argument == STANDARD_INPUT:
            yield from _listed_on(standard_input())
        elif remote.is_address(argument):
            yield from remote.items(argument, reading.classes, reading.skipped)
        elif is_pattern(argument):
            for path in sorted_names(matches(argument)):
                yield from _one(path, reading)
        else:
            yield from _one(argument, reading)


def is_pattern(argument: str) -> bool:
    """-> whether the argument is a glob: it has * ? or [ and no file is called so."""
    return glob.has_magic(argument) and not os.path.lexists(argument) and not remote.is_address(argument)


def matches(pattern: str) -> Iterator[str]:
    """-> everything but folders that `pattern` matches, hidden files too, in no order."""
    return (
        path for path in glob.iglob(pattern, recursive=True, include_hidden=True) if not os.path.isdir(path)
    )


def named(argument: str) -> Iterable[str]:
    """-> what an argument names: itself, a pattern's matches, or the parts of a table that is a folder."""
    if is_pattern(argument):
        return matches(argument)
    return (parts_of(argument) if os.path.isdir(argument) else []) or [argument]


def _one(path: str, reading: Reading) -> Iterator[Item]:
    if os.path.isdir(path):
        parts = parts_of(path)
        for part in parts:
            yield from _one(part, reading)
        if not parts:
            yield from walk(path, reading)
    elif kind := container_of(path):
        yield from kind.items(path, reading)
    else:  # an image, or what is missing, a pipe, a device: the row says which
        yield file_item(path)


def _listed_on(stream: Iterable[bytes]) -> Iterator[Item]:
    """Yield one item for each line (a path, relative to the working folder) of `stream`;
    empty lines are skipped."""
    for line in stream:
        if name := line.rstrip(b"\r\n"):
            yield file_item(os.fsdecode(name))


def walk(root: str, reading: Reading) -> Iterator[Item]:
    """Yield the image files below `root`. Links to folders (which can loop) are not followed,
    to files on request."""
    suffixes, skipped = SUFFIXES, reading.skipped.reasons
    pending = [_entries(root)]
    folders = [root]
    while pending:
        # the next name of the innermost folder, or back to the one around it
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            folders.pop()
            continue

        # a folder to go into, an image, or something to count
        name, kind = entry.split("\0")
        path = os.path.join(folders[-1], name)
        if kind == _FOLDER:
            pending.append(_entries(path))
            folders.append(path)
        elif kind == _ERROR:
            yield failed_item(folders[-1], "unreadable", name)
        elif kind == _LINK and not (reading.follow_links and os.path.isfile(path)):
            skipped["symbolic links"] += 1
        elif kind == _OTHER:
            skipped["special files"] += 1
        elif not name.lower().endswith(suffixes):
            skipped["files without an image suffix"] += 1
        elif is_metadata(name):
            skipped[METADATA] += 1
        elif name.endswith(".report.png") and os.path.isfile(path.removesuffix(".png") + ".json"):
            skipped["pictures of reports"] += 1  # this command's own, of an earlier run
        else:
            yield file_item(path, label_of(PurePath(path).relative_to(root).parts[:-1], reading.classes))


# The kind of a folder entry, kept behind its name and a NUL (which sorts first):
# 10,000,000 tuples would need a gigabyte.
_FILE, _FOLDER, _LINK, _OTHER, _ERROR = "f", "d", "l", "o", "e"


def _entries(folder: str) -> Iterator[str]:
    """-> names in `folder`, sorted, each with its kind."""

    def scan() -> Iterator[str]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        kind = _LINK
                    elif entry.is_dir():
                        kind = _FOLDER
                    else:
                        kind = _FILE if entry.is_file() else _OTHER
                    yield f"{entry.name}\0{kind}"
        except OSError as error:
            yield f"the folder cannot be read ({error.strerror})\0{_ERROR}"

    return sorted_names(scan())


def sorted_names(names: Iterable[str], spill: int = SPILL) -> Iterator[str]:
    """-> `names` sorted as bytes, with at most `spill` of them in memory:
    more go through sorted temporary files."""
    runs: list[Iterator[bytes]] = []
    chunk: list[bytes] = []
    for name in names:
        chunk.append(os.fsencode(name))
        if len(chunk) >= spill:
            runs.append(_spilled(sorted(chunk)))
            chunk = []
    runs.append(iter(sorted(chunk)))
    return map(os.fsdecode, heapq.merge(*runs) if len(runs) > 1 else runs[0])


_END = b"\0/"  # no name holds a NUL, no kind is a slash


def _spilled(names: list[bytes]) -> Iterator[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 open for as long as the iterator lives
    for name in names:
        file.write(name + _END)
    file.seek(0)

    def read() -> Iterator[bytes]:
        with file:
            rest = b""
            while block := file.read(1 << 16):
                *complete, rest = (rest + block).split(_END)
                yield from complete

    return read()


def count_inputs(inputs: Iterable[str], reading: Reading) -> int | None:
    """-> how many items there are, from names and footers alone; None where only reading
    everything would tell."""
    total = 0
    for argument in inputs:
        if argument == STANDARD_INPUT:
            return None
        if remote.is_address(argument):
            total += remote.count(argument)
            continue
        for path in named(argument):
            kind = container_of(path)
            if kind is None or kind.count is None:
                count: int | None = sum(1 for _ in _one(path, replace(reading, skipped=Skipped())))
            else:
                count = kind.count(path)
            if count is None:
                return None
            total += count
    return total
