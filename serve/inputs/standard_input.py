"""Paths on standard input, so that a worker which replaces a dead one can read them again."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from typing import BinaryIO

from ffl_deploy.errors import UsageError

STANDARD_INPUT = "-"


def standard_input() -> BinaryIO:
    """-> standard input, from its start where it has one. Raises UsageError where it is closed."""
    if sys.stdin is None:
        raise UsageError(
            f"standard input is closed, and {STANDARD_INPUT} reads paths from it; give it a list, or name "
            "the files."
        )
    stream = sys.stdin.buffer
    if stream.seekable():
        stream.seek(0)
    return stream


def spool_standard_input() -> None:
    """Keep what standard input gives in a temporary file, and put that in its place.
    Raises UsageError where it is closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 it is standard input from now on
    shutil.copyfileobj(standard_input(), file)
    file.flush()  # each child would write what is still in this process's memory
    sys.stdin = io.TextIOWrapper(file)
