"""The row that every input gets, and the three formats it is written in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import msgspec
import numpy as np

from ffl_deploy.errors import UsageError
from ffl_deploy.files import replace_file
from ffl_deploy.installed import require

Format = Literal["parquet", "jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl", "csv")
OK = "ok"
OF_SETS = ("set_labels", "abstain")
OF_DECISIONS = (*OF_SETS, "exit", "familiarity")
OPTIONAL_COLUMNS = ("logits", "embedding", *OF_DECISIONS)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet executes: OWASP, CSV injection


class Row(NamedTuple):
    """One input's result. Unless `status` is `ok` there is no prediction and `error` says why;
    on an `ok` row it is a remark."""

    path: str
    status: str
    error: str | None = None
    label: str | None = None
    label_id: int | None = None
    confidence: float | None = None  # 0..1
    top_k_labels: list[str] | None = None
    top_k_confidences: list[float] | None = None
    width: int | None = None  # pixels of the upright image, before any resize
    height: int | None = None
    logits: np.ndarray | None = None  # float32 [classes]
    embedding: np.ndarray | None = None  # float32 [features]
    set_labels: list[str] | None = None  # the classes of the prediction set, by falling confidence
    abstain: bool | None = None  # whether the answer is too unsure to be given
    exit: str | None = None  # which classifier of a cascade answered
    familiarity: float | None = None  # likeness to the training images


COLUMNS = tuple(name for name in Row._fields if name not in OPTIONAL_COLUMNS)


def format_of(out: Path, wanted: str | None) -> Format:
    """-> the format to write: the one asked for, else the one of the file's suffix, else Parquet.
    Raises UsageError."""
    suffix = out.suffix.lower().removeprefix(".")
    name = wanted or suffix or "parquet"
    for known in FORMATS:
        if name == known:
            if known == "parquet":
                require("pyarrow", "write .csv or .jsonl instead")
            return known
    suffixes = ", ".join(f".{known}" for known in FORMATS)
    raise UsageError(f"{out} ends in no known format; end it in one of {suffixes}, or give --format.")


def encode(rows: Sequence[Row], format: Format, extra: Sequence[str]) -> bytes:
    """-> one shard as bytes; the same rows give the same bytes. `extra`:
    which OPTIONAL_COLUMNS are written."""
    if format == "parquet":
        return _encode_parquet(rows, extra)
    columns = (*COLUMNS, *extra)
    if format == "jsonl":
        return msgspec.json.Encoder(enc_hook=_plain).encode_lines(
            {name: getattr(row, name) for name in columns} for row in rows
        )
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_cell(getattr(row, name)) for name in columns] for row in rows)
    return text.getvalue().encode()


def assemble(pieces: Iterable[Any], out: Path, format: Format, extra: Sequence[str]) -> None:
    """Write the pieces, which `piece` gives of shards, in order, as one file that appears under its name only
    when it is complete and on disk."""
    with replace_file(out) as file:
        if format == "parquet":
            _join_parquet(pieces, file, extra)
            return
        file.write(header(format, extra))
        for rows in pieces:
            file.write(rows)


def header(format: Format, extra: Sequence[str]) -> bytes:
    """-> what stands before the rows of a CSV or JSON lines file."""
    return (",".join((*COLUMNS, *extra)) + "\n").encode() if format == "csv" else b""


def piece(shard: Path, format: Format) -> Any:
    """-> one shard for `assemble`: a table of pyarrow, or the bytes of its rows."""
    if format != "parquet":
        return shard.read_bytes()
    import pyarrow.parquet as pq

    return pq.ParquetFile(shard).read()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise NotImplementedError(type(value))


def _cell(value: Any) -> Any:
    """-> a CSV cell: lists, true and false as JSON; text that a spreadsheet would execute behind an
    apostrophe."""
    if value is None:
        return ""
    if isinstance(value, str):
        return "'" + value if value.startswith(FORMULA_STARTS) else value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else value


def parquet_schema(extra: Sequence[str]) -> Any:
    """-> the pyarrow schema of a predictions file."""
    import pyarrow as pa

    kinds = {
        "path": pa.string(),
        "status": pa.string(),
        "error": pa.string(),
        "label": pa.string(),
        "label_id": pa.int32(),
        "confidence": pa.float32(),
        "top_k_labels": pa.list_(pa.string()),
        "top_k_confidences": pa.list_(pa.float32()),
        "width": pa.int32(),
        "height": pa.int32(),
        "logits": pa.list_(pa.float32()),
        "embedding": pa.list_(pa.float32()),
        "set_labels": pa.list_(pa.string()),
        "abstain": pa.bool_(),
        "exit": pa.string(),
        "familiarity": pa.float32(),
    }
    return pa.schema(
        [pa.field(name, kinds[name], nullable=name not in ("path", "status")) for name in (*COLUMNS, *extra)]
    )


def _encode_parquet(rows: Sequence[Row], extra: Sequence[str]) -> bytes:
    """Through JSON lines: pyarrow.array() of a Python list imports pandas, where that is installed,
    which takes 0.4 s."""
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet as pq

    schema, lines = parquet_schema(extra), encode(rows, "jsonl", extra)
    table = pyarrow.json.read_json(
        pa.BufferReader(lines),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(schema), sink, compression="zstd")
    return bytes(sink.getvalue())


def _join_parquet(tables: Iterable[Any], file: IO[bytes], extra: Sequence[str]) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, parquet_schema(extra), compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
