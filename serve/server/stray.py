"""What libraries print: each line of it a record of the log, so that the log stays one object a line.

Gradio prints tracebacks, and libtiff writes to the process's standard error behind Python's back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import TextIO, cast

STRAY = "ffl.serve.stray"
LONGEST = 2000
"""Characters of a line that are kept."""


class _Lines:
    """A text stream that logs what is written to it, line by line."""

    encoding, errors = "utf-8", "replace"

    def __init__(self, name: str) -> None:
        self._name, self._begun, self._lock = name, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            self._begun = self._begun[-LONGEST:]
        for line in lines:
            if line.strip():
                logging.getLogger(STRAY).warning(line[:LONGEST], extra={"stream": self._name})
        return len(text)

    def flush(self) -> None:
        """Nothing to do: a line is logged when it ends."""

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return 2

    def writable(self) -> bool:
        return True


@contextlib.contextmanager
def stray_output_logged() -> Iterator[TextIO]:
    """While the block runs, log what is written to standard output and error, by Python and by native code;
    yield the standard error from before, for the log itself.

    A native writer never waits for the log: what it writes faster than that is read is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    kept = [os.dup(1), os.dup(2)]
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Lines("stdout")), cast(TextIO, _Lines("stderr"))

    def read() -> None:
        lines = _Lines("native")
        while piece := os.read(reading, 65536):
            lines.write(piece.decode(errors="replace"))
        lines.write("\n")

    reader = threading.Thread(target=read, name="stray output", daemon=True)
    reader.start()
    try:
        yield real
    finally:
        sys.stdout, sys.stderr = before
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)  # the last writing ends of the pipe close, which ends the reader
            os.close(old)
        reader.join(timeout=5)
        os.close(reading)
        real.close()
