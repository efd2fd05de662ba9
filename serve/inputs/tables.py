"""CSV and Parquet tables whose rows name images (a column of paths) or hold them (a column of bytes)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ffl_deploy.errors import UsageError
from ffl_deploy.images import ImageError
from serve.inputs.items import MAX_FILE_BYTES, Item, displayed, file_item, refuse

TABLE_SUFFIXES = (".csv", ".parquet")
# tried in this order
IMAGE_COLUMNS = ("path", "image", "file_name", "image_path", "filename", "file", "bytes")
LABEL_COLUMNS = ("label", "class", "target")
ROWS_AT_A_TIME = 32  # rows of image bytes decoded from Parquet at a time
# of a column chunk: Parquet decodes it page by page, but a writer can make one giant page
MAX_CHUNK_BYTES = 4 * 2**30


def is_table(path: str) -> bool:
    return path.lower().endswith(TABLE_SUFFIXES)


def check_table(path: str, column: str | None, label_column: str | None) -> None:
    """Raise UsageError unless the table can be read, has the columns,
    and holds paths or bytes in the one of images."""
    chosen, _ = _chosen(path, _column_names(path), column, label_column)
    if not path.lower().endswith(".csv"):
        _check_kind(path, chosen, _parquet(path).schema_arrow.field(chosen).type)


def rows(path: str, column: str | None, label_column: str | None) -> Iterator[Item]:
    """Yield one item for each row. Paths are relative to the table's folder;
    rows of bytes are named `table::row`, from 0."""
    chosen, labels = _chosen(path, _column_names(path), column, label_column)
    yield from (
        _csv_rows(path, chosen, labels)
        if path.lower().endswith(".csv")
        else _parquet_rows(path, chosen, labels)
    )


def count_rows(path: str) -> int | None:
    """-> rows of a Parquet table from its footer; None for CSV, which would have to be read."""
    return None if path.lower().endswith(".csv") else int(_parquet(path).metadata.num_rows)


def _chosen(
    path: str, names: Sequence[str], column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """-> (the column of images, the column of labels or None)."""
    for wanted, flag in ((column, "--column"), (label_column, "--label-column")):
        if wanted is not None and wanted not in names:
            raise UsageError(f"{path} has no column {wanted!r}; give {flag} one of: {', '.join(names)}.")
    image = column or next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise UsageError(
            f"{path} has no column called {' or '.join(IMAGE_COLUMNS)}; give --column one of: "
            f"{', '.join(names)}."
        )
    return image, label_column or next(
        (name for name in LABEL_COLUMNS if name in names and name != image), None
    )


def _column_names(path: str) -> list[str]:
    if not path.lower().endswith(".csv"):
        return list(_parquet(path).schema_arrow.names)
    with _open_csv(path) as file:
        try:
            header = next(csv.reader(file), None)
        except csv.Error as error:
            raise UsageError(f"{path} is not a CSV table ({error}).") from error
    if not header:
        raise UsageError(f"{path} is empty; its first line must name the columns.")
    return header


def _open_csv(path: str) -> Any:
    # names that are not UTF-8 stay openable
    return open(path, newline="", encoding="utf-8-sig", errors="surrogateescape")


def _csv_rows(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    with _open_csv(path) as file:
        reader = csv.DictReader(file)
        number = 0
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:  # a cell over csv.field_size_limit, 128 KiB: no path is that long
                yield Item(
                    f"{displayed(path)}::{number}",
                    partial(refuse, "too_large", f"the row cannot be read ({error})"),
                )
                number += 1
                continue
            if row is None:
                return
            yield _path_item(path, number, row.get(column), row.get(label_column) if label_column else None)
            number += 1


def _path_item(table: str, number: int, cell: str | None, label: Any) -> Item:
    if not cell:
        return Item(
            f"{displayed(table)}::{number}", partial(refuse, "null", "the cell is empty"), _label(label)
        )
    return file_item(os.path.join(os.path.dirname(table), cell), _label(label))._replace(path=displayed(cell))


def _label(cell: Any) -> str | None:
    return None if cell is None or cell == "" else str(cell)


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{path} is not a Parquet table that can be read ({str(error).splitlines()[0]})."
        ) from error


def _check_kind(path: str, column: str, kind: Any) -> None:
    """Raise UsageError unless a Parquet column of this pyarrow type can name or hold images."""
    import pyarrow as pa

    if pa.types.is_struct(kind):  # Hugging Face datasets: {bytes, path}
        if kind.get_field_index("bytes") < 0:
            raise UsageError(
                f"{path}: the column {column!r} holds structs without a field `bytes`; choose another "
                "--column."
            )
    elif not (is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UsageError(
            f"{path}: the column {column!r} holds {kind}, not paths or bytes; choose another --column."
        )


def _parquet_rows(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    import pyarrow as pa

    table = _parquet(path)
    _check_kind(path, column, table.schema_arrow.field(column).type)
    number = 0
    wanted = [column] + ([label_column] if label_column else [])
    for group in range(table.num_row_groups):
        # a group that memory could not hold
        if _chunk_bytes(table, group, column) > MAX_CHUNK_BYTES:
            message = (
                f"row group {group} has more than {MAX_CHUNK_BYTES >> 30} GiB; write the table with smaller "
                "row groups"
            )
            for _ in range(table.metadata.row_group(group).num_rows):
                yield Item(f"{displayed(path)}::{number}", partial(refuse, "too_large", message))
                number += 1
            continue

        # its rows, as far as it can be read; the others say why not
        first = number
        try:
            for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=wanted):
                labels = batch.column(batch.schema.get_field_index(label_column)) if label_column else None
                cells = batch.column(batch.schema.get_field_index(column))
                for index in range(len(batch)):
                    yield _cell_item(
                        path, number, cells[index], _value(labels[index]) if labels is not None else None
                    )
                    number += 1
        except (pa.ArrowException, OSError) as error:
            message = f"the table is corrupt here ({str(error).splitlines()[0]})"
            for _ in range(number - first, table.metadata.row_group(group).num_rows):
                yield Item(f"{displayed(path)}::{number}", partial(refuse, "corrupt", message))
                number += 1


def is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


def _chunk_bytes(table: Any, group: int, column: str) -> int:
    """-> uncompressed bytes of a column (with the fields of a struct) in one row group."""
    meta = table.metadata.row_group(group)
    chunks = (meta.column(index) for index in range(meta.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
    )


def _cell_item(table: str, number: int, cell: Any, label: Any) -> Item:
    """cell: a pyarrow scalar; its bytes are copied only when the item is read."""
    if not cell.is_valid:
        return _path_item(table, number, None, label)
    if hasattr(cell, "keys"):
        cell = cell["bytes"]
        if not cell.is_valid:
            return _path_item(table, number, None, label)
    buffer = cell.as_buffer()
    if not is_bytes(cell.type):
        # text that is not UTF-8 has no as_py()
        return _path_item(table, number, os.fsdecode(buffer.to_pybytes()), label)
    return Item(
        f"{displayed(table)}::{number}", partial(_cell_bytes, buffer), _label(label), True, source=table
    )


def _value(cell: Any) -> Any:
    """-> a label's pyarrow scalar as Python has it;
    text that is not UTF-8 is no class and becomes readable."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes().decode(errors="backslashreplace")


def _cell_bytes(buffer: Any) -> bytes:
    if buffer.size > MAX_FILE_BYTES:
        raise ImageError("too_large", f"the cell has {buffer.size} bytes, more than {MAX_FILE_BYTES}")
    return bytes(buffer.to_pybytes())
