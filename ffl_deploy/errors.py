"""Errors that a user can act on, and the exit code each one ends a command with.

Exit codes (docs/architecture.md): 0 done; 1 a check failed; 2 usage or input that cannot be used at all;
3 finished, some inputs have error rows; 130 interrupted, resumable.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

DONE = 0
CHECK_FAILED = 1
UNUSABLE_INPUT = 2
SOME_INPUTS_FAILED = 3
INTERRUPTED = 130


class FflError(Exception):
    """One sentence that says what is wrong and what to do; `exit_code` is what the command ends with."""

    exit_code = CHECK_FAILED


class CheckError(FflError):
    """A gate did not hold: parity, a hash, a corrupt bundle or checkpoint, NaN, a full disk."""

    exit_code = CHECK_FAILED


class OtherMachine(CheckError):
    """A TensorRT engine was built for another version or GPU than this machine's:
    nothing is wrong with the bundle."""


class DeviceLost(CheckError):
    """The GPU failed in a way that CUDA does not come back from: only a new process can use it again."""


class UsageError(FflError):
    """The command cannot start on what it was given: bad flags, missing folders, unknown names."""

    exit_code = UNUSABLE_INPUT


class Interrupted(FflError):
    """Stopped by SIGINT or SIGTERM after saving; the same command with --resume goes on."""

    exit_code = INTERRUPTED


def first_line(error: BaseException) -> str:
    """-> the first line of what an exception of a library says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def choices_sentence(name: str, known: Sequence[str]) -> str:
    """-> "Known: a, b, c." with the nearest name first in mind when `name` looks like a typing error."""
    near = get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known)}."
