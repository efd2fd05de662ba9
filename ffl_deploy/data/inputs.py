"""What the files of a folder were when a run read them, so that one which goes on with it, or exports it,
reads the same: a print of each, kept beside the run's configuration.

A print is made of a file's size and of its content, as far as 16 KiB of it go: its beginning, middle and end.
It does not know the file's time, so a folder may be copied or moved. Prints of 100,000 files cost 2 s of one
core where they are in the page cache, to write them down and to compare them 0.6 s each.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffl_deploy.data.splits import Paths, in_threads
from ffl_deploy.errors import CheckError
from ffl_deploy.files import replace_file

FILE = "inputs.tsv.gz"
LABELS = "labels"
"""The part that holds prints of the files' classes, where those are not in their names."""
WHOLE = 16 << 10  # bytes; of larger files three pieces are read
PIECE = 4 << 10


class PartInputs(NamedTuple):
    """The files of train/, test/ or val/, in the order in which they are read. prints: uint64 [n]."""

    files: Paths
    prints: np.ndarray


class Inputs(NamedTuple):
    """part -> its files."""

    parts: dict[str, PartInputs]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for line in self._lines():
            digest.update(line)
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write a line for each file: part, print, name; equal inputs give equal bytes."""
        with (
            replace_file(path) as file,
            gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=1, mtime=0) as text,
        ):
            text.writelines(self._lines())

    def _lines(self) -> Iterator[bytes]:
        for part, files in sorted(self.parts.items()):
            for row, value in enumerate(files.prints.tolist()):
                # a name may hold a newline, and need not be UTF-8
                name = os.fsencode(files.files.name(row)).replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
                yield f"{part}\t{value:016x}\t".encode() + name + b"\n"


def file_prints(paths: Paths) -> np.ndarray:
    """-> uint64 [n]: a print of each file."""

    def look(rows: range) -> list[int]:
        return [file_print(paths[row]) for row in rows]

    return np.array([value for values in in_threads(look, len(paths)) for value in values], np.uint64)


def file_print(path: str) -> int:
    """-> 64 bits of a file's size and content; 0 where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = hashlib.blake2b(str(size).encode(), digest_size=8)
            if size <= WHOLE:
                content.update(file.read(WHOLE))
            else:
                for start in (0, size // 2, size - PIECE):
                    file.seek(start)
                    content.update(file.read(PIECE))
    except OSError:
        return 0
    return int.from_bytes(content.digest(), "big")


def read_inputs(path: Path) -> Inputs:
    """The inverse of `Inputs.write`. Raises CheckError where the file is damaged."""
    names: dict[str, list[str]] = {}
    prints: dict[str, list[int]] = {}
    try:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                part, value, name = line.rstrip(b"\n").split(b"\t", 2)
                plain = name.replace(b"\\\\", b"\0").replace(b"\\n", b"\n").replace(b"\0", b"\\")
                names.setdefault(part.decode(), []).append(os.fsdecode(plain))
                prints.setdefault(part.decode(), []).append(int(value, 16))
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise CheckError(f"{path} is damaged ({error}); restore it, or train again.") from error
    return Inputs(
        {part: PartInputs(Paths.of(part, names[part]), np.array(prints[part], np.uint64)) for part in names}
    )


def changed_files(path: Path, now: Inputs) -> list[str]:
    """-> what is not as the list at `path` has it, in words, at most five files by name. Raises
    CheckError."""
    return changes(read_inputs(path), now)


def changes(before: Inputs, now: Inputs) -> list[str]:
    """-> what is not as it was, in words, at most five; each by the file's name."""
    found = []
    for part in sorted({*before.parts, *now.parts}):
        old, new = (_by_name(inputs, part) for inputs in (before, now))
        if part == LABELS:  # that a file is new or gone its own part says
            found += [
                f"{name} has another label" for name in sorted({*old} & {*new}) if old[name] != new[name]
            ]
            continue
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                what = "is gone" if name not in new else "is new" if name not in old else "is another file"
                found.append(f"{part}/{name} {what}")
    return found if len(found) <= 5 else [*found[:5], f"and {len(found) - 5} more"]


def _by_name(inputs: Inputs, part: str) -> dict[str, int]:
    files = inputs.parts.get(part)
    if files is None:
        return {}
    return {files.files.name(row): value for row, value in enumerate(files.prints.tolist())}
