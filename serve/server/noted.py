"""What becomes known of a request while it is answered, for its log line: the id in its body, for one."""

from __future__ import annotations

from contextvars import ContextVar

LONGEST = 128
"""Characters of what a client sent that a log line repeats; whoever formats the line escapes them."""

_notes: ContextVar[dict[str, str] | None] = ContextVar("notes", default=None)


def begin(said: dict[str, str]) -> None:
    """Let `note` add to `said` in this task, and in the threads that it asks."""
    _notes.set(said)


def note(name: str, value: str) -> None:
    """Say something of the request that is being answered; outside of one nothing happens."""
    said = _notes.get()
    if said is not None and value:
        said[name] = value[:LONGEST]
