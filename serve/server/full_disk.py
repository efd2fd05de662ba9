"""A full disk, met while a body is being kept: an answer that says so, and the space back."""

from __future__ import annotations

import errno
import tempfile
import traceback

from serve.server.responses import Refused

FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: OSError) -> Refused | None:
    """-> the refusal; None for other errors. What was written so far is closed: its file may have no name any
    more, but a traceback that somebody keeps holds it open, and its space is gone for as long."""
    if error.errno not in FULL:
        return None
    traceback.clear_frames(error.__traceback__)
    return Refused(
        507, f"the server's disk is full ({tempfile.gettempdir()}); try again later, or send less at once"
    )
