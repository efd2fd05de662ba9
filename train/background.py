"""Work that training does not wait for: checkpoints are written while the next steps run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does one piece of work after the other, in a thread, in the order given.

    After one that raised, those behind it are left out; the error is raised by the next `check` or `wait`.
    The thread starts with the first work, and the process does not end before the last.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def do(self, work: Callable[[], None]) -> None:
        """Hand `work` over."""
        self._pending.append(self._thread.submit(self._guarded, work))

    def check(self) -> None:
        """Raise the error of work that failed."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Return when all work is done. Raises its error."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Wait for all work and end the thread; errors are for `check` and `wait`."""
        self._thread.shutdown(wait=True)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise
