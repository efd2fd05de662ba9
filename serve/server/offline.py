"""No dependency calls home, and every temporary file lies in one folder that goes away with the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before the import that reads them. Where a person has set one, our value stays:
# none of these is a matter of taste.
SILENCE = {
    "ORT_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FASTAPI_OTEL_AUTO_CONFIGURE": "false",  # --otlp alone makes traces
    # Gradio keeps its last 10,000 events and makes a data frame of them after each one,
    # for a dashboard that is off here.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
}
PREFIX, LOCK = "ffl-serve-", ".lock"


@contextlib.contextmanager
def private_environment() -> Iterator[Path]:
    """Silence telemetry and yield the folder that holds this process's temporary files;
    it is removed at the end."""
    os.environ.update(SILENCE)
    _remove_orphans()
    # Under a name that `_remove_orphans` of a server starting beside this one passes over, until it is
    # locked.
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    lock = os.open(made / LOCK, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = made.with_name(made.name[1:])
    made.rename(folder)
    previous = tempfile.tempdir
    tempfile.tempdir = str(folder)  # uploads pass through the standard library's temporary files
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    try:
        yield folder
    finally:
        tempfile.tempdir = previous
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_orphans() -> None:
    """Remove what killed servers left: folders of ours that no process holds the lock of."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # another user's, or not yet locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
