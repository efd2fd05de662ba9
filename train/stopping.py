"""Signals as a request: the step under way is finished and saved, then the run ends with 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what service managers send; a terminal or ssh connection that closed; Slurm before its time
limit."""


class StopRequest:
    """`requested` turns true at the first signal."""

    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.requested = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yield a StopRequest that listens during the block (in the main thread; elsewhere it never fires)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # what a parent has switched off stays off: nohup ignores SIGHUP
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
