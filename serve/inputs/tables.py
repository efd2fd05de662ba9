"""Tables whose rows name images (a column of paths) or hold them (a column of bytes), and lists of paths.

A kind of table is a row of TABLES; which columns are meant is decided here for all of them.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ffl_deploy import image_lists
from ffl_deploy.errors import UsageError
from ffl_deploy.image_lists import LONGEST_LINE, open_text
from ffl_deploy.images import SUFFIXES
from serve.inputs import columnar
from serve.inputs.items import Item, displayed, label_text, path_item, refuse

# tried in this order
IMAGE_COLUMNS = (*image_lists.IMAGE_COLUMNS, "img", "image_id", "bytes")
LABEL_COLUMNS = (*image_lists.LABEL_COLUMNS, "fine_label", "labels")
DELIMITERS = (",", ";", "\t")  # the first one that the header has
LIST = "path"  # the one column of a list


@dataclass(frozen=True)
class Table:
    """A kind of table: how its files are called, its columns, its rows by the columns of images and labels,
    what of them cannot be used, and how many there are (None: only reading would tell)."""

    suffixes: tuple[str, ...]
    names: Callable[[str], Sequence[str]]
    rows: Callable[[str, str, str | None], Iterator[Item]]
    check: Callable[[str, str], None] = lambda path, column: None
    count: Callable[[str], int | None] = lambda path: None


def is_table(path: str) -> bool:
    return path.lower().endswith(SUFFIXES_OF_TABLES) or (path.lower().endswith(LISTS) and _is_list(path))


def check_table(path: str, column: str | None, label_column: str | None) -> None:
    """Raise UsageError unless the table can be read, has the columns,
    and holds paths or bytes in the one of images."""
    kind = _kind(path)
    chosen, _ = _chosen(path, kind.names(path), column, label_column)
    kind.check(path, chosen)


def rows(path: str, column: str | None, label_column: str | None) -> Iterator[Item]:
    """Yield one item for each row. Paths are relative to the table's folder;
    rows of bytes are named `table::row`, from 0."""
    kind = _kind(path)
    yield from kind.rows(path, *_chosen(path, kind.names(path), column, label_column))


def count_rows(path: str) -> int | None:
    """-> rows of a table that knows how many it has, else None."""
    return _kind(path).count(path)


def _kind(path: str) -> Table:
    return next(kind for kind in TABLES if path.lower().endswith(kind.suffixes))


def _chosen(
    path: str, names: Sequence[str], column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """-> (the column of images, the column of labels or None)."""
    if names == [LIST]:
        return LIST, None
    for wanted, flag in ((column, "--column"), (label_column, "--label-column")):
        if wanted is not None and wanted not in names:
            raise UsageError(f"{path} has no column {wanted!r}; give {flag} one of: {', '.join(names)}.")
    small = {name.lower(): name for name in reversed(names)}  # `Path` too, the exact name first
    small |= {name: name for name in names}
    image = column or next((small[name] for name in IMAGE_COLUMNS if name in small), None)
    if image is None:
        raise UsageError(
            f"{path} has no column called {' or '.join(IMAGE_COLUMNS)}; give --column one of: "
            f"{', '.join(names)}."
        )
    return image, label_column or next(
        (small[name] for name in LABEL_COLUMNS if name in small and small[name] != image), None
    )


# ---- CSV and TSV


def _delimiter(path: str) -> str:
    if path.lower().endswith(".tsv"):
        return "\t"
    with open_text(path) as file:
        header = file.readline(LONGEST_LINE)
    return next((one for one in DELIMITERS if one in header), ",")


def _csv_names(path: str) -> list[str]:
    with open_text(path) as file:
        try:
            header = next(csv.reader(file, delimiter=_delimiter(path)), None)
        except csv.Error as error:
            raise UsageError(f"{path} is not a CSV table ({error}).") from error
    if not header:
        raise UsageError(f"{path} is empty; its first line must name the columns.")
    return [name.strip() for name in header]


def _csv_rows(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    names, delimiter = _csv_names(path), _delimiter(path)
    with open_text(path) as file:
        next(csv.reader(file, delimiter=delimiter), None)
        reader = csv.DictReader(file, names, delimiter=delimiter)
        number = 0
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:  # a cell over csv.field_size_limit, 128 KiB: no path is that long
                yield _unreadable(path, number, f"the row cannot be read ({error})")
                number += 1
                continue
            if row is None:
                return
            label = row.get(label_column) if label_column else None
            yield path_item(path, number, row.get(column), label_text(label))
            number += 1


# ---- JSON lines


def _json_names(path: str) -> list[str]:
    with open(path, "rb") as file:
        line = file.readline(LONGEST_LINE)
    try:
        return list(msgspec.json.decode(line, type=dict[str, Any]))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} holds no JSON object in its first line ({error}).") from error


def _json_rows(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                yield _unreadable(path, number, f"the line has more than {LONGEST_LINE} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
            elif line.strip():
                yield _json_item(path, number, line, column, label_column)
            else:
                continue
            number += 1


def _json_item(path: str, number: int, line: bytes, column: str, label_column: str | None) -> Item:
    try:
        row = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _unreadable(path, number, f"the line is not a JSON object ({error})", "corrupt")
    cell, label = row.get(column), row.get(label_column) if label_column else None
    if cell is not None and not isinstance(cell, str):
        return _unreadable(path, number, "the cell is not a path", "corrupt")
    known = label if isinstance(label, str | int) and not isinstance(label, bool) else None
    return path_item(path, number, cell, label_text(known))


# ---- lists of paths


def _is_list(path: str) -> bool:
    """-> whether the first line of a text file names an image."""
    try:
        with open(path, "rb") as file:
            first = file.readline(4096).strip().lower()
    except OSError:
        return False
    return first.endswith(tuple(map(str.encode, SUFFIXES)))


def _listed(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            if name := line.rstrip(b"\r\n"):
                yield path_item(path, number, os.fsdecode(name), None)
                number += 1


def _unreadable(path: str, number: int, message: str, code: str = "too_large") -> Item:
    return Item(f"{displayed(path)}::{number}", partial(refuse, code, message))


LISTS = (".txt", ".lst")
TABLES = (
    Table((".csv", ".tsv"), _csv_names, _csv_rows),
    Table((".jsonl", ".ndjson"), _json_names, _json_rows),
    Table(
        (*columnar.PARQUET_SUFFIXES, *columnar.ARROW_SUFFIXES),
        columnar.column_names,
        columnar.rows,
        columnar.check_kind,
        columnar.count,
    ),
    Table(LISTS, lambda path: [LIST], _listed),
)
SUFFIXES_OF_TABLES = tuple(suffix for kind in TABLES[:-1] for suffix in kind.suffixes)
"""Of tables that are known by their names."""
