"""What every console command shares: its flags, `--version`, examples in `--help`, suggestions for what was
mistyped; and errors that become one sentence on stderr and the documented exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ffl_deploy.errors import (
    CHECK_FAILED,
    INTERRUPTED,
    UNUSABLE_INPUT,
    FflError,
    UsageError,
    choices_sentence,
)
from ffl_deploy.installed import missing_import
from ffl_deploy.version import __version__


def positive(text: str) -> int:
    """-> the whole number in a flag's value, at least 1; as a `type` of argparse,
    which puts the flag before the sentence."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def gpu_number(text: str) -> int:
    """-> the number of a GPU in a flag's value, at least 0; as a `type` of argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"counts GPUs from 0, so it cannot be {value}")
    return value


NUMBERS: dict[Any, str] = {
    int: "a whole number",
    positive: "a whole number",
    gpu_number: "a whole number",
    float: "a number",
}
"""A flag's type -> what to call its values."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are a UsageError, one sentence as all others, without the usage.

    examples: complete commands, printed at the end of --help. `--batch_size` is `--batch-size` too.
    """

    def __init__(self, prog: str, *, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(prog, **settings)
        self.examples = examples
        self.add_argument(
            "--version",
            action="version",
            version=f"ffl-deploy {__version__}, Python {sys.version.split()[0]}",
            help="print the version and exit",
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = [_with_dashes(word) for word in (sys.argv[1:] if args is None else args)]
        self.require_flags(words)
        return super().parse_known_args(words, namespace)

    def require_flags(self, words: Sequence[str]) -> None:
        """Raise UsageError for a flag that does not exist, before argparse misses what it then lacks."""
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if not word.startswith("--") or flag in known:
                continue
            if self.allow_abbrev and any(name.startswith(flag) for name in known):
                continue  # a beginning; argparse says where it is one of several flags
            self.error(f"unrecognized arguments: {flag}{self.suggestion(flag)}")

    def suggestion(self, flag: str) -> str:
        """-> ". Did you mean --top-k?" where a flag of that kind exists."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        squeezed = {name.replace("-", ""): name for name in known}  # --topk
        near = squeezed.get(flag.replace("-", ""))
        names = [near] if near else get_close_matches(flag, known, n=1)
        return f". Did you mean {names[0]}?" if names else ""

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if action.type not in NUMBERS or "invalid" not in error.message:
                raise  # it has a sentence of its own
            kind = NUMBERS[action.type]
            raise argparse.ArgumentError(action, f"{arg_string!r} is not {kind}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            sentence = choices_sentence(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"there is no {value!r}. {sentence}".rstrip("."))

    def error(self, message: str) -> NoReturn:
        start, found, names = message.partition("the following arguments are required: ")
        if found and not start:
            example = f"; for example: {self.examples[0]}" if self.examples else ""
            message = f"{names} {'are' if ', ' in names else 'is'} missing{example}"
        end = " See" if message.endswith("?") else "; see"
        raise UsageError(f"{message}{end} {self.prog} --help.")

    def format_help(self) -> str:
        lines = [f"  {example}" for example in self.examples]
        return super().format_help() + ("\n".join(["\nexamples:", *lines]) + "\n" if lines else "")


def _with_dashes(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def printable(text: str) -> str:
    """-> `text` as one line that no terminal obeys: control characters, line breaks among them, and marks
    that turn the direction of writing become their codes. Names of files and classes are other people's."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character in DIRECTIONS or _controls(character)
        else character
        for character in text
    )


DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code; a known error is printed as one sentence,
    never as a traceback.

    `FFL_DEBUG=1` in the environment lets the traceback through, for bug reports.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = main.__module__.split(".")[-1] if argv is not None else os.path.basename(sys.argv[0])
    debug = bool(os.environ.get("FFL_DEBUG"))
    try:
        code = main(arguments)
        sys.stdout.flush()  # a closed pipe shows here, while it can still be handled
        return code
    except FflError as error:
        if debug:
            raise
        message, code = str(error), error.exit_code
    except ModuleNotFoundError as error:
        known = missing_import(error)
        if debug or known is None:
            raise
        message, code = str(known), known.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted.", INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) went away: not an error of ours. Keep the interpreter's exit flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        message, code = "out of memory; use a smaller --batch-size.", CHECK_FAILED
    except OSError as error:
        if debug:
            raise
        message, code = describe_os_error(error)
    print(f"{program}: error: {printable(message)}", file=sys.stderr)
    return code


def describe_os_error(error: OSError) -> tuple[str, int]:
    """-> (one sentence, exit code) for an operating-system error that no caller gave a better sentence."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and try again.", CHECK_FAILED
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}; choose another folder or change its rights.", UNUSABLE_INPUT
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        what = (error.strerror or str(error)).lower()
        return (
            f"{what}{where}: something else is in that place; choose another name, or remove it.",
            UNUSABLE_INPUT,
        )
    return f"{(error.strerror or str(error)).lower()}{where}.", UNUSABLE_INPUT
