"""SIGINT and SIGTERM as a request: the step under way is finished and saved, then the run ends with 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`requested` turns true at the first signal."""

    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.requested = True


@contextmanager
def stop_on_signals(outer: StopRequest | None = None) -> Iterator[StopRequest]:
    """Yield a StopRequest that listens during the block (in the main thread; elsewhere it never fires); or `outer`, if given."""
    if outer is not None:
        yield outer
        return
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
