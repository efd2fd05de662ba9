"""What becomes known of a request while it is answered: for its log line the id in its body, for its trace
what took how long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

LONGEST = 128
"""Characters of what a client sent that a log line repeats; whoever formats the line escapes them."""
MOST_STEPS = 256
"""Of one request: 64 images are as many steps."""


class Step(NamedTuple):
    """A part of the work. began, ended: of time.perf_counter."""

    name: str
    began: float
    ended: float
    images: int = 0  # where it is about so many


@dataclass
class Notes:
    """said: fields of the log line; steps: in the order in which they ended."""

    said: dict[str, str]
    steps: list[Step] = field(default_factory=list)


_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


def begin(said: dict[str, str]) -> Notes:
    """-> what `note`, `took` and `step` add to in this task, in those that it starts, and in the threads that
    it asks."""
    notes = Notes(said)
    _notes.set(notes)
    return notes


def note(name: str, value: str) -> None:
    """Say something of the request that is being answered; outside of one nothing happens."""
    notes = _notes.get()
    if notes is not None and value:
        notes.said[name] = value[:LONGEST]


def took(name: str, began: float, ended: float, images: int = 0) -> None:
    """Say what a part of the work has taken."""
    notes = _notes.get()
    if notes is not None and len(notes.steps) < MOST_STEPS:
        notes.steps.append(Step(name, began, ended, images))


@contextlib.contextmanager
def step(name: str, images: int = 0) -> Iterator[None]:
    """Say what the block takes, also where it fails."""
    began = time.perf_counter()
    try:
        yield
    finally:
        took(name, began, time.perf_counter(), images)
