"""Without `--out` the rows go to standard output: one line per input for people,
or CSV or JSON lines with `--format`."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ffl_deploy.command import printable
from ffl_deploy.errors import UsageError
from serve.rows import OK


@contextlib.contextmanager
def rows_on_screen(arguments: argparse.Namespace) -> Iterator[Path]:
    """Let the run write into a temporary file; -> that file, whose rows `show` prints.
    Raises UsageError for flags of a file."""
    if arguments.resume:
        raise UsageError("--resume goes on with an interrupted file; give its --out.")
    if arguments.json:
        raise UsageError("--json prints the summary on standard output; give the rows a file with --out.")
    if arguments.format == "parquet":
        raise UsageError("--format parquet is for a file; give --out FILE, or print jsonl or csv.")
    with tempfile.TemporaryDirectory(prefix="ffl-predict-") as folder:
        yield Path(folder) / f"rows.{arguments.format or 'jsonl'}"


def show(rows: Path, format: str | None) -> None:
    """Print the rows that a finished run wrote."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name shows its code
    with rows.open(encoding="utf-8", newline="\n") as lines:  # a name may hold a carriage return
        for line in lines:
            print(line.rstrip("\n") if format else printable(readable(msgspec.json.decode(line))))
    sys.stdout.flush()


def readable(row: dict[str, Any]) -> str:
    """-> `PATH: label 97.1 %, label 1.2 %, ...`, or what is wrong with the image."""
    if row["status"] != OK:
        return f"{row['path']}: {row['status']} ({row['error']})"
    top = zip(row["top_k_labels"], row["top_k_confidences"], strict=True)
    return f"{row['path']}: " + ", ".join(f"{label} {100 * confidence:.1f} %" for label, confidence in top)
