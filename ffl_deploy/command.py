"""What every console command shares: errors become one sentence on stderr and the documented exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ffl_deploy.errors import CHECK_FAILED, INTERRUPTED, UNUSABLE_INPUT, FflError, UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints about flags are a UsageError, one sentence as all others,
    without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help.")


def positive(text: str) -> int:
    """-> the whole number in a flag's value, at least 1; as a `type` of argparse,
    which puts the flag before the sentence."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code; a known error is printed as one sentence,
    never as a traceback.

    `FFL_DEBUG=1` in the environment lets the traceback through, for bug reports.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = main.__module__.split(".")[-1] if argv is not None else os.path.basename(sys.argv[0])
    try:
        code = main(arguments)
        sys.stdout.flush()  # a closed pipe shows here, while it can still be handled
        return code
    except FflError as error:
        if os.environ.get("FFL_DEBUG"):
            raise
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted.", INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) went away: not an error of ours. Keep the interpreter's exit flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        message, code = "out of memory; use a smaller --batch-size.", CHECK_FAILED
    except OSError as error:
        if os.environ.get("FFL_DEBUG"):
            raise
        message, code = describe_os_error(error)
    print(f"{program}: error: {message}", file=sys.stderr)
    return code


def describe_os_error(error: OSError) -> tuple[str, int]:
    """-> (one sentence, exit code) for an operating-system error that no caller gave a better sentence."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and try again.", CHECK_FAILED
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}; choose another folder or change its rights.", UNUSABLE_INPUT
    return f"{(error.strerror or str(error)).lower()}{where}.", UNUSABLE_INPUT
