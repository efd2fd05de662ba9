"""Whether there is a network, asked before a download that would wait for ever."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

PATIENCE = 10.0  # seconds until a network that does not answer counts as none


def require_answer(url: str) -> None:
    """Raise what keeps the server of `url` from answering in time, an OSError as a rule: a download has no
    time limit, nor has a name's look-up. That it refuses is an answer, and the download's own error."""
    failure: list[Exception] = [TimeoutError(f"no answer within {PATIENCE:g} s")]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                failure.clear()
        except urllib.error.HTTPError:
            failure.clear()
        except Exception as error:
            failure[:] = [error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failure:
        raise failure[0]
