"""How far a run is: a bar for people, JSON lines for machines, or nothing. Always on standard error."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from ffl_deploy.errors import FflError

Display = Literal["screen", "json", "quiet"]
JSON_INTERVAL = 1.0  # seconds between JSON lines


class Progress:
    """Counts rows; the total arrives when a thread has counted the inputs' names,
    and with it the estimated time of arrival."""

    def __init__(self, display: Display, count: Callable[[], int | None]) -> None:
        self._display, self._done, self._errors = display, 0, 0
        self._total: int | None = None
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        if display == "screen":
            from tqdm import tqdm

            # disabled where stderr is no terminal
            self._bar = tqdm(unit="image", dynamic_ncols=True, disable=None, smoothing=0.1)
        if display != "quiet":
            threading.Thread(target=self._find_total, args=(count,), daemon=True).start()

    def _find_total(self, count: Callable[[], int | None]) -> None:
        try:
            total = count()
        except (FflError, OSError):  # the run itself meets the same fault and reports it
            return
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def advance(self, rows: int, errors: int) -> None:
        self._done += rows
        self._errors += errors
        if self._bar is not None:
            self._bar.update(rows)
            if errors:
                self._bar.set_postfix(errors=self._errors, refresh=False)
        elif self._display == "json" and time.monotonic() - self._last >= JSON_INTERVAL:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        rate = self._done / max(self._last - self._started, 1e-9)
        left = None if self._total is None else max(self._total - self._done, 0) / max(rate, 1e-9)
        event = {"event": "progress", "done": self._done, "errors": self._errors, "total": self._total}
        event |= {
            "images_per_second": round(rate, 2),
            "eta_seconds": None if left is None else round(left, 1),
        }
        print(json.dumps(event), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._display == "json":
            self._line()
