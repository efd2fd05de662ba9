"""What uploads that broke off leave: unfinished files, which Gradio keeps; finished ones have folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


class Pieces:
    """Removes them while further uploads are in progress, each file looked at about once.

    A file that is seen unfinished belongs to an upload that is in progress then, or to none any more. So once
    all of those have ended it is nobody's. To look at all files after every upload made the server slower the
    more of them had broken off, and that many broke off while others were in progress all the time.

    Args: folder: -> where Gradio writes uploads.
    """

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._in_progress = set[object]()
        self._seen: list[str] = []  # the files of the last look
        self._awaited = set[object]()  # the uploads of that time that have not ended

    def begin(self) -> object:
        """-> an upload, for `end`."""
        upload = object()
        self._in_progress.add(upload)
        return upload

    def end(self, upload: object) -> None:
        """Remove what is nobody's now."""
        self._in_progress.discard(upload)
        self._awaited.discard(upload)
        if self._awaited:
            return
        self._remove()
        self._seen, self._awaited = self._look(), set(self._in_progress)
        if not self._awaited:
            self._remove()

    def _look(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder()) as entries:
            return [
                entry.path
                for entry in entries
                if entry.name.startswith("tmp") and entry.is_file(follow_symlinks=False)
            ]
        return []

    def _remove(self) -> None:
        for path in self._seen:
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                os.unlink(path)
        self._seen = []
