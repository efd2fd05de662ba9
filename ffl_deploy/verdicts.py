"""What was found out on this machine and need not be found out again: small files in the user's cache folder.

    ~/.cache/ffl-deploy/verdicts/SHA256-OF-THE-QUESTION.json      {"question": {...}, "answer": {...}}

A question is everything that its answer depends on, so an entry is never out of date. An entry only saves
work, and only one that this user alone can have written counts (private_cache.py).
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import msgspec

from ffl_deploy.private_cache import make_room, private_folder, read_private, write_private

FOLDER = "verdicts"
MAX_ENTRIES = 256  # the oldest make room
MAX_BYTES = 64 << 10  # of an entry


def recall(question: dict[str, Any]) -> Any:
    """-> the answer that was remembered for `question` (plain JSON data),
    None where there is none that can be trusted."""
    folder = private_folder(FOLDER)
    if folder is None:
        return None
    encoded = msgspec.json.encode(question, order="sorted")
    try:
        content = read_private(folder / _name(encoded), MAX_BYTES)
        if content is None:
            return None
        entry = msgspec.json.decode(content)
        return entry["answer"] if msgspec.json.encode(entry["question"], order="sorted") == encoded else None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return None


def remember(question: dict[str, Any], answer: Any) -> None:
    """Keep `answer` (plain JSON data) for `question`; does nothing where that is not possible."""
    folder = private_folder(FOLDER, make=True)
    if folder is None:
        return
    encoded = msgspec.json.encode(question, order="sorted")
    content = msgspec.json.format(msgspec.json.encode({"question": question, "answer": answer}), indent=1)
    with contextlib.suppress(OSError):
        write_private(folder / _name(encoded), content)
        make_room(folder, MAX_ENTRIES)


def _name(encoded: bytes) -> str:
    return f"{hashlib.sha256(encoded).hexdigest()}.json"
