"""How long files have been as they are, by a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Collection


class Ages:
    """Files' times are of the clock on the wall: set an hour forward, it made every upload an hour old. So it
    is remembered when a file was first seen with the time that it has."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def __call__(self, path: str, changed: int) -> float:
        """-> seconds since `path` was first seen as changed at `changed`, nanoseconds of the clock on the
        wall."""
        now = time.monotonic()
        stamp, since = self._seen.get(path, (None, now))
        if stamp != changed:
            since = now
        self._seen[path] = (changed, since)
        return now - since

    def forget_others(self, paths: Collection[str]) -> None:
        """Forget the files that are gone: all but `paths`."""
        for path in self._seen.keys() - set(paths):
            del self._seen[path]
