"""A worker that dies (out of memory, a crash in a native decoder) costs at most one row, not the run.

The command forks once, before anything heavy is imported: the child does the work, the parent waits. When a
signal kills the child, a new one retries the unfinished shard. When that dies too, the next one reads the
shard carefully: images are decoded on trial one at a time, each marked in shared memory before; the marked
image of a further death gets the row `crashed`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType

from ffl_deploy.errors import CHECK_FAILED, INTERRUPTED
from ffl_deploy.images import ImageError, decode
from serve.inputs.items import Item, refuse

AGAIN = 75  # exit code of a child that has finished its careful shard; EX_TEMPFAIL of sysexits.h
MAX_QUARANTINED = 100  # images of a run; more means that the machine, not the images, is broken
FORWARDED = (signal.SIGTERM, signal.SIGINT)
MAX_UNEXPLAINED = 3  # deaths in a row while no image was being tried


class Marker:
    """Two numbers that survive the child: how many shards are finished, and which item is being tried."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)  # anonymous and shared with the child
        self.trying(None)

    def finished(self, shards: int) -> None:
        self._memory[:8] = struct.pack("q", shards)

    def trying(self, item: int | None) -> None:
        self._memory[8:16] = struct.pack("q", -1 if item is None else item)

    def get(self) -> tuple[int, int | None]:
        """-> (finished shards, item)."""
        shards, item = struct.unpack("qq", self._memory[:16])
        return shards, None if item < 0 else item


@dataclass(frozen=True)
class Recovery:
    """What earlier children died of. `careful`: the shard from which on images are tried first;
    `quarantined`: item numbers."""

    marker: Marker = field(default_factory=Marker)
    careful: int | None = None
    quarantined: frozenset[int] = frozenset()
    restarted: bool = False
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def guarded(self, item: Item, shard: int, number: int) -> Item:
        """-> `item`; refused if it is quarantined; decoded on trial when it is read,
        from the careful shard on."""
        if number in self.quarantined:
            message = "the worker process died on this image; look at it in isolation"
            return item._replace(read=partial(refuse, "crashed", message), bound=False, file=None)
        if self.careful is None or shard < self.careful:
            return item
        item = item.loaded() if item.bound else item
        return item._replace(read=partial(self._tried, item.read, number))

    def _tried(self, read: Callable[[], bytes], number: int) -> bytes:
        with self._one_at_a_time:
            self.marker.trying(number)
            try:
                data = read()
                with contextlib.suppress(ImageError):  # the pipeline decodes it again and makes the row of it
                    decode(data)
            finally:
                self.marker.trying(None)
            return data


class WorkerDied(Exception):
    """Raised in the child where a process of its own was killed: the child then dies likewise, and what it
    was at is tried again as if the child itself had worked on it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"a worker died ({name}); the finished part is kept: the same command with --resume goes on."
        )


class CarefulShardDone(Exception):
    """Raised in the child once the careful shard is written; a fresh child goes on at full speed."""


def supervise(run: Callable[[Recovery], int]) -> int:
    """Call `run(recovery)` in a child process, again after a crash; -> the exit code."""
    if not hasattr(os, "fork"):
        return run(Recovery())
    recovery, crashed_at, unexplained = Recovery(), None, 0
    while True:
        # the child ended by itself: done, or done with the careful shard
        status = _in_child(partial(run, recovery))
        if os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
            if code != AGAIN:
                return code
            recovery, crashed_at = replace(recovery, careful=None, restarted=True), None
            continue

        # it was killed: by whom, and on which image
        number = os.WTERMSIG(status)
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # before the child could handle it
            return INTERRUPTED
        shard, item = recovery.marker.get()
        quarantined = recovery.quarantined if item is None else recovery.quarantined | {item}
        unexplained = unexplained + 1 if item is None and recovery.careful is not None else 0
        if unexplained > MAX_UNEXPLAINED or len(quarantined) > MAX_QUARANTINED:
            name = signal.Signals(number).name
            advice = "try --threads 1 or a smaller --batch-size"
            print(f"ffl-predict: error: the worker keeps dying ({name}); {advice}.", file=sys.stderr)
            return CHECK_FAILED

        # again; carefully where it is the second time at this shard
        careful = shard if shard == crashed_at else None
        crashed_at = shard
        recovery.marker.trying(None)
        recovery = replace(recovery, careful=careful, quarantined=quarantined, restarted=True)


def _in_child(run: Callable[[], int]) -> int:
    """-> the wait status of a child that executed `run`. Signals to this process are passed on;
    its death ends the child."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # Held back until both processes are ready for them:
    # one that came in between would end the parent by itself.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    child = os.fork()

    # the child: works, and never returns from here
    if child == 0:
        code = CHECK_FAILED
        try:
            os.close(writing)
            threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = run()
        except CarefulShardDone:
            code = AGAIN
        except WorkerDied:
            os.kill(os.getpid(), signal.SIGKILL)
        except KeyboardInterrupt:  # before `run` could make a sentence of it
            code = INTERRUPTED
        # a fault of ours, or FFL_DEBUG: nobody above prints it, since this process ends here
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # the parent: waits
    os.close(reading)

    def forward(number: int, frame: FrameType | None) -> None:
        # the child decides what it means; of two (Ctrl-C reaches both processes) it ignores one
        os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        return os.waitpid(child, 0)[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # returns when the parent's end closes
    os._exit(CHECK_FAILED)
