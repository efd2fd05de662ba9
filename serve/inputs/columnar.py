"""Parquet and Arrow tables: a column of paths, or of encoded images; labels as Hugging Face names them.

Source: https://huggingface.co/docs/datasets/about_dataset_features (ClassLabel, Image)
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ffl_deploy.errors import UsageError, first_line
from ffl_deploy.images import ImageError
from serve.inputs.items import MAX_FILE_BYTES, Item, displayed, label_text, path_item, refuse

PARQUET_SUFFIXES, ARROW_SUFFIXES = (".parquet",), (".arrow", ".feather")
ROWS_AT_A_TIME = 32  # rows of image bytes decoded from Parquet at a time
# of a column chunk: Parquet decodes it page by page, but a writer can make one giant page
MAX_CHUNK_BYTES = 4 * 2**30
COMPANIONS = (".json", ".crc", ".md")  # beside the parts of a table that is a folder


def is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET_SUFFIXES)


def is_columnar(path: str) -> bool:
    return path.lower().endswith((*PARQUET_SUFFIXES, *ARROW_SUFFIXES))


def parts_of(folder: str) -> list[str]:
    """-> the files of a table that is a folder, as Spark, Dask and `save_to_disk` write it, in order; [] for
    any other folder."""
    parts = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "_")) or entry.name.lower().endswith(COMPANIONS):
                continue
            if entry.is_symlink() or not entry.is_file() or not is_columnar(entry.name):
                return []
            parts.append(entry.path)
    return sorted(parts, key=os.fsencode)


def column_names(path: str) -> list[str]:
    """Raises UsageError for what is no table."""
    return list(_schema(path).names)


def count(path: str) -> int | None:
    """-> rows of a Parquet table from its footer; None for Arrow's, which would have to be walked through."""
    return int(_parquet(path).metadata.num_rows) if is_parquet(path) else None


def check_kind(path: str, column: str) -> None:
    """Raise UsageError unless the column can name or hold images."""
    import pyarrow as pa

    kind = _schema(path).field(column).type
    if pa.types.is_dictionary(kind):  # categories, of pandas and polars
        kind = kind.value_type
    if pa.types.is_struct(kind):  # Hugging Face datasets: {bytes, path}
        if kind.get_field_index("bytes") < 0 and kind.get_field_index("path") < 0:
            raise UsageError(
                f"{path}: the column {column!r} holds structs without a field `bytes`; choose another "
                "--column."
            )
    elif not (_is_bytes(kind) or _is_text(kind)):
        raise UsageError(
            f"{path}: the column {column!r} holds {kind}, not paths or bytes; choose another --column."
        )


def rows(path: str, column: str, label_column: str | None) -> Iterator[Item]:
    """Yield one item for each row; a part that cannot be read says so in its rows."""
    check_kind(path, column)
    names = class_names(_schema(path), label_column) if label_column else None
    wanted = [column] + ([label_column] if label_column else [])
    number = 0
    for batch in _parquet_batches(path, column, wanted) if is_parquet(path) else _arrow_batches(path, wanted):
        if isinstance(batch, Unread):
            for _ in range(batch.rows):
                yield Item(f"{displayed(path)}::{number}", partial(refuse, batch.code, batch.message))
                number += 1
            continue
        labels = batch.column(batch.schema.get_field_index(label_column)) if label_column else None
        cells = _plain(batch.column(batch.schema.get_field_index(column)))
        for index in range(len(batch)):
            label = None if labels is None else _label(_value(labels[index]), names)
            yield _cell_item(path, number, cells[index], label)
            number += 1


def class_names(schema: Any, column: str) -> list[str] | None:
    """-> what the numbers of a column stand for, in the order of the table's own `ClassLabel`; None where it
    says nothing of them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        feature = features[column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (TypeError, KeyError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names


def _label(cell: Any, names: Sequence[str] | None) -> str | None:
    if names is None or not isinstance(cell, int):
        return label_text(cell)
    # -1 is what test splits without labels have
    return names[cell] if 0 <= cell < len(names) else None


class Unread:
    """Rows of a table that cannot be read, and why."""

    def __init__(self, rows: int, code: str, message: str) -> None:
        self.rows, self.code, self.message = rows, code, message


def _schema(path: str) -> Any:
    return _parquet(path).schema_arrow if is_parquet(path) else _arrow(path).schema


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a Parquet table that can be read ({first_line(error)}).") from error


def _arrow(path: str) -> Any:
    """-> a reader of the file format (Feather's), or of the stream format, which datasets write."""
    import pyarrow as pa

    try:
        with open(path, "rb") as file:
            random = file.read(6) == b"ARROW1"
        source = pa.memory_map(path)
        return pa.ipc.open_file(source) if random else pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not an Arrow table that can be read ({first_line(error)}).") from error


def _parquet_batches(path: str, column: str, wanted: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa

    table = _parquet(path)
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        # a group that memory could not hold
        if _chunk_bytes(table, group, column) > MAX_CHUNK_BYTES:
            message = (
                f"row group {group} has more than {MAX_CHUNK_BYTES >> 30} GiB; write the table with smaller "
                "row groups"
            )
            yield Unread(rows, "too_large", message)
            continue

        # its rows, as far as it can be read; the others say why not
        read = 0
        try:
            for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=wanted):
                yield batch
                read += len(batch)
        except (pa.ArrowException, OSError) as error:
            message = f"the table is corrupt here ({first_line(error)})"
            yield Unread(rows - read, "corrupt", message)


def _arrow_batches(path: str, wanted: Sequence[str]) -> Iterator[Any]:
    """Memory-mapped: a cell is read when its item is."""
    import pyarrow as pa

    reader = _arrow(path)
    try:
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index).select(list(wanted))
        else:
            for batch in reader:
                yield batch.select(list(wanted))
    except (pa.ArrowException, OSError) as error:
        yield Unread(1, "corrupt", f"the table is corrupt from here on ({first_line(error)})")


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _plain(cells: Any) -> Any:
    """-> the column without categories and views, whose cells have no buffer of their own."""
    import pyarrow as pa

    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_string_view(cells.type):
        return cells.cast(pa.large_string())
    return cells.cast(pa.large_binary()) if pa.types.is_binary_view(cells.type) else cells


def _chunk_bytes(table: Any, group: int, column: str) -> int:
    """-> uncompressed bytes of a column (with the fields of a struct) in one row group."""
    meta = table.metadata.row_group(group)
    chunks = (meta.column(index) for index in range(meta.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
    )


def _cell_item(table: str, number: int, cell: Any, label: str | None) -> Item:
    """cell: a pyarrow scalar; its bytes are copied only when the item is read."""
    if cell.is_valid and hasattr(cell, "keys"):  # {bytes, path}: an image of a file may have its path alone
        fields = [cell[name] for name in ("bytes", "path") if name in cell]
        cell = next((field for field in fields if field.is_valid), fields[0])
    if not cell.is_valid:
        return path_item(table, number, None, label)
    buffer = cell.as_buffer()
    if not _is_bytes(cell.type):
        # text that is not UTF-8 has no as_py()
        return path_item(table, number, os.fsdecode(buffer.to_pybytes()), label)
    return Item(f"{displayed(table)}::{number}", partial(_cell_bytes, buffer), label, True, source=table)


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
