"""A command line, typed into the parser of the command itself, which then does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from unittest import mock

from ffl_deploy.command import Parser
from train.flags import Flags


class Parsed(BaseException):
    """Raised in a command's `main` where its work would begin."""


def accepts(module: str, argv: Sequence[str]) -> bool:
    """-> True where `module`'s command takes these words; raises UsageError, with the sentence that a user
    would see, where it does not. Nothing is read, written or loaded."""
    parse, typed = Parser.parse_args, Flags.typed

    def parse_args(self: Parser, *arguments: object) -> object:
        parse(self, *arguments)
        raise Parsed

    def typed_flags(self: Flags, words: Sequence[str]) -> object:
        typed(self, words)
        raise Parsed

    with mock.patch.object(Parser, "parse_args", parse_args), mock.patch.object(Flags, "typed", typed_flags):
        try:
            import_module(module).main(list(argv))
        except Parsed:
            return True
    return False
