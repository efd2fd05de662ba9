"""A list of images with labels, LIST.csv, .tsv or .parquet: a row names a file, its class and, in a column
called split, perhaps its part.

Paths are relative to the list's own folder, or to another one.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ffl_deploy.data.folders import Listing, shorten
from ffl_deploy.data.inputs import PartInputs, file_prints
from ffl_deploy.data.splits import Paths
from ffl_deploy.errors import UsageError, first_line
from ffl_deploy.files import did_you_mean, shown
from ffl_deploy.image_lists import IMAGE_COLUMNS, LABEL_COLUMNS, LONGEST_LINE, open_text
from ffl_deploy.installed import require

SUFFIXES = (".csv", ".tsv", ".parquet")
SPLIT_COLUMNS = ("split", "subset")
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What a row's part may be called, in any case."""
DELIMITERS = ",;\t"


class Columns(NamedTuple):
    """Which columns of a list are read; split: None where no row says its part."""

    image: str
    label: str
    split: str | None


class Row(NamedTuple):
    """A row of a list. place: where it stands, as "line 7"; cells are None where they are empty."""

    place: str
    path: str | None
    label: str | None
    split: str | None


def is_list(source: str) -> bool:
    """-> whether --data names a list of images; a folder may be called so too."""
    return source.lower().endswith(SUFFIXES) and not os.path.isdir(os.path.expanduser(source))


def choose_columns(table: Path, image: str | None = None, label: str | None = None) -> Columns:
    """-> the columns with these names, or with the usual ones. Raises UsageError: no such file, no such
    column, cells that are neither paths nor labels."""
    if not table.is_file():
        raise UsageError(
            f"--data {shown(table)}: there is no such list of images.{did_you_mean(shown(table))}"
        )
    names = _csv_names(table) if _is_text(table) else _parquet_names(table)
    listed = ", ".join(names)
    for wanted, flag in ((image, "--column"), (label, "--label-column")):
        if wanted is not None and wanted not in names:
            raise UsageError(f"{shown(table)} has no column {wanted!r}; give {flag} one of: {listed}.")
    found = image or next((name for name in IMAGE_COLUMNS if name in names), None)
    if found is None:
        raise UsageError(
            f"{shown(table)} has no column called {' or '.join(IMAGE_COLUMNS)}; say with --column which of "
            f"its columns names the image files: {listed}."
        )
    classes = label or next((name for name in LABEL_COLUMNS if name in names and name != found), None)
    if classes is None:
        raise UsageError(
            f"{shown(table)} has no column called {' or '.join(LABEL_COLUMNS)}; say with --label-column "
            f"which of its columns holds the classes: {listed}."
        )
    split = next((name for name in SPLIT_COLUMNS if name in names and name not in (found, classes)), None)
    return Columns(found, classes, split)


def read_list(table: Path, root: Path, columns: Columns, skip_missing: bool) -> dict[str, Listing]:
    """-> "train", "validation", "test" -> the images of that part, as a folder's are found: sorted by class
    and path; "train" alone where no row says its part.

    root: what paths are relative to. skip_missing: files that are not there are left to whoever reads them.
    Raises UsageError for whatever is wrong, each kind at once and by its rows: empty cells, a file twice,
    parts of unknown names, files that are not there.
    """
    rows = list(_csv_rows(table, columns) if _is_text(table) else _parquet_rows(table, columns))
    _require_cells(table, columns, rows)
    _require_once(table, rows)
    paths = Paths.of(root, (row.path or "" for row in rows))
    if not skip_missing:
        _require_there(table, root, rows, paths)
    if not rows:
        raise UsageError(f"{shown(table)} has no row; it needs one for each image.")

    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(PARTS[(row.split or "train").strip().lower()], []).append(number)
    prints = file_prints(paths)
    found = {}
    for part, numbers in members.items():
        classes = _in_order({rows[number].label or "" for number in numbers})
        label_of = {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of[rows[number].label or ""] for number in numbers], np.int64)
        # as a folder of the same images would be read, whatever the list's order is
        order = sorted(range(len(numbers)), key=lambda k: (labels[k], rows[numbers[k]].path or ""))
        taken = np.array(numbers)[order]
        folder = table if columns.split is None else table / part
        found[part] = Listing(folder, classes, paths.take(taken), labels[order], prints[taken], Counter())
    return _usual_parts(table, found)


def label_prints(listings: Iterable[Listing]) -> PartInputs:
    """-> every file with a print of its class: a row that says another one is another list."""
    files, values = [], []
    for part in listings:
        prints = [
            int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
            for name in part.classes
        ]
        files += [part.paths.name(row) for row in range(len(part.labels))]
        values += [prints[label] for label in part.labels.tolist()]
    order = sorted(range(len(files)), key=files.__getitem__)
    return PartInputs(
        Paths.of("", [files[row] for row in order]), np.array([values[row] for row in order], np.uint64)
    )


def _usual_parts(table: Path, found: dict[str, Listing]) -> dict[str, Listing]:
    """-> `found`, as a folder's parts are taken: one that is held out alone is the test set."""
    if "train" not in found:
        raise UsageError(f"{shown(table)} has no row whose split is train.")
    if len(found["train"].classes) < 2:
        raise UsageError(
            f"{shown(table)} has one class only ({found['train'].classes[0]}); a classifier needs at least "
            "two."
        )
    if "validation" in found and "test" not in found:
        found["test"] = found.pop("validation")._replace(folder=table / "test")
    return {name: found[name] for name in ("train", "test", "validation") if name in found}


def _in_order(names: set[str]) -> tuple[str, ...]:
    """-> class names sorted; whole numbers by their value."""
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _require_cells(table: Path, columns: Columns, rows: Sequence[Row]) -> None:
    for name, cells in ((columns.image, "path"), (columns.label, "label"), (columns.split, "split")):
        empty = [row.place for row in rows if not getattr(row, cells)] if name is not None else []
        if empty:
            raise UsageError(
                f"{shown(table)} has no {name} in {_some(empty)}; fill it in, or take the row out."
            )
    unknown = [row for row in rows if row.split and row.split.strip().lower() not in PARTS]
    if unknown:
        raise UsageError(
            f"{shown(table)}: the column {columns.split!r} holds {unknown[0].split!r} in {unknown[0].place}; "
            "it may hold train, val or test, or be called otherwise."
        )
    odd = [row.place for row in rows if row.label and not _is_text_of_utf8(row.label)]
    if odd:
        raise UsageError(f"{shown(table)}: the class in {_some(odd)} is not UTF-8; write it so.")


def _require_once(table: Path, rows: Sequence[Row]) -> None:
    """Raise UsageError where a file stands in two rows: as two classes it is a mistake, in two splits a false
    accuracy, and as one of both it would count double."""
    first: dict[str, Row] = {}
    twice = []
    for row in rows:
        other = first.setdefault(os.path.normpath(row.path or ""), row)
        if other is not row:
            labels = f", as {other.label} and as {row.label}" if row.label != other.label else ""
            twice.append(f"{row.path} in {other.place} and in {row.place}{labels}")
    if twice:
        more = f", and {len(twice) - 3} more" if len(twice) > 3 else ""
        raise UsageError(
            f"{shown(table)} lists files twice: {'; '.join(twice[:3])}{more}. Keep one row for each."
        )


def _require_there(table: Path, root: Path, rows: Sequence[Row], paths: Paths) -> None:
    missing = [row for row, path in zip(rows, paths, strict=True) if not os.path.isfile(path)]
    if not missing:
        return
    named = ", ".join(f"{row.path} ({row.place})" for row in missing[:3])
    more = ", ..." if len(missing) > 3 else ""
    suffix = "" if any(os.path.splitext(row.path or "")[1] for row in missing) else " with their suffixes"
    count = "none of its files is" if len(missing) == len(rows) else f"{len(missing)} of its files are not"
    raise UsageError(
        f"{shown(table)}: {count} in {shown(root)}: {named}{more}. Give the paths{suffix} as they are below "
        "that folder, say with --data-root which other folder they are in, or leave out what is missing with "
        "--skip-bad-images."
    )


def _some(places: Sequence[str]) -> str:
    return f"{shorten(places)}{f' ({len(places)} rows)' if len(places) > 5 else ''}"


def _is_text_of_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(table: Path) -> bool:
    return table.suffix.lower() != ".parquet"


# Text -------------------------------------------------------------------------------------------------------


def _delimiter(header: str) -> str:
    """-> what separates the columns: spreadsheets of some countries write semicolons."""
    return max(DELIMITERS, key=header.count)


def _csv_names(table: Path) -> list[str]:
    with open_text(table) as file:
        header = file.readline(LONGEST_LINE)
        names = next(csv.reader([header], delimiter=_delimiter(header)), None) if header.strip() else None
    if not names:
        raise UsageError(f"{shown(table)} is empty; its first line must name the columns.")
    return names


def _csv_rows(table: Path, columns: Columns) -> Iterator[Row]:
    with open_text(table) as file:
        header = file.readline(LONGEST_LINE)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=_delimiter(header), restval="")
        try:
            for row in reader:
                yield Row(f"line {reader.line_num}", *(row[name] if name else None for name in columns))
        except csv.Error as error:
            raise UsageError(
                f"{shown(table)} is no table that can be read (line {reader.line_num}: {error})."
            ) from error


# Parquet ----------------------------------------------------------------------------------------------------


def _parquet_names(table: Path) -> list[str]:
    require("pyarrow", "give the list as CSV")
    return list(_parquet(table).schema_arrow.names)


def _parquet(table: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(table, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{shown(table)} is no Parquet table that can be read ({first_line(error)})."
        ) from error


def _parquet_rows(table: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa

    names = [name for name in columns if name is not None]
    file = _parquet(table)
    for name in names:
        _require_kind(table, columns, name, file.schema_arrow.field(name).type)
    try:
        content = file.read(columns=names)
        cells = [content.column(name).to_pylist() if name is not None else None for name in columns]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{shown(table)} is no Parquet table that can be read ({first_line(error)})."
        ) from error
    for row in range(content.num_rows):
        values = (None if column is None or column[row] is None else str(column[row]) for column in cells)
        yield Row(f"row {row + 1}", *values)


def _require_kind(table: Path, columns: Columns, name: str, kind: Any) -> None:
    """Raise UsageError unless a column of this pyarrow type holds text or, of classes, whole numbers."""
    from pyarrow import types

    plain = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
    if text or (name == columns.label and (types.is_integer(plain) or types.is_boolean(plain))):
        return
    if name == columns.image:
        raise UsageError(
            f"{shown(table)}: the column {name!r} holds {kind}, not the names of files, which is what "
            "training reads; write the images into files, or choose another --column."
        )
    raise UsageError(
        f"{shown(table)}: the column {name!r} holds {kind}, not names or whole numbers; write it so"
        f"{', or choose another --label-column' if name == columns.label else ''}."
    )
