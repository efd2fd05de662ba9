"""A port that closes without resetting anybody.

Closing a listening socket resets the connections that the kernel has taken and nobody has accepted yet, and
their clients may have sent their requests. So first no new ones are taken (a packet that asks for one is
dropped, as if it were lost: its client asks again, and then is told that nobody listens), then those that are
there are accepted, and only then the port closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

SO_ATTACH_FILTER = 26  # Linux; in no module of Python's
QUIET_SECONDS = 0.05  # without a connection to accept, for handshakes that are under way
# Classic BPF, source: https://www.kernel.org/doc/html/latest/networking/filter.html. Byte 13 of TCP's header
# has the flags; SYN without ACK asks for a new connection.
_PROGRAM = (
    (0x30, 0, 0, 13),  # ldb [13]
    (0x54, 0, 0, 0x12),  # and #SYN|ACK
    (0x15, 0, 1, 0x02),  # jeq #SYN, next, the one after it
    (0x06, 0, 0, 0),  # ret #0: drop
    (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1: keep
)


def take_no_more(port: socket.socket) -> None:
    """Let the kernel take no further connection of a listening socket, where it knows how."""
    if sys.platform != "linux":
        return
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _PROGRAM))
    # struct sock_fprog: a count, and a pointer with the padding before it
    with contextlib.suppress(OSError):
        port.setsockopt(
            socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(_PROGRAM), ctypes.addressof(code))
        )


async def accept_the_rest(ports: Sequence[socket.socket], seconds: float) -> None:
    """Return once nobody waits to be accepted any more, after so many seconds at most."""
    for port in ports:
        take_no_more(port)
    now = time.monotonic()
    deadline, quiet_since = now + seconds, now
    while now < min(deadline, quiet_since + QUIET_SECONDS):
        await asyncio.sleep(QUIET_SECONDS / 5)  # the event loop accepts meanwhile
        now = time.monotonic()
        if select.select(ports, [], [], 0)[0]:
            quiet_since = now
