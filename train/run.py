"""`python -m train.run` (also `ffl-train`): flags -> TrainConfig -> a finished run directory.

The flags and their help are derived from the dataclasses in config.py. torch is imported only after parsing.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import tyro

from ffl_deploy.command import run_command
from ffl_deploy.errors import UNUSABLE_INPUT, UsageError
from ffl_deploy.run_directory import load_run
from train.config import TrainConfig
from train.options import differences, flatten, options_from_json, options_to_json, validate
from train.recipes import RECIPES, flag_value, recipe_for


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    if flag_value(argv, "--recipe") == "list":
        print_recipes()
        return 0
    config = parse(argv)
    from train.session import run_training  # torch takes seconds to import, which --help should not wait for

    return run_training(config)


def parse(argv: Sequence[str]) -> TrainConfig:
    """-> the recipe's configuration, overridden by flags; with --resume the run's own, which flags may only repeat."""
    resumed = flag_value(argv, "--resume")
    stored = None if resumed is None else options_from_json(load_run(resumed).config.options)
    config = parse_flags(argv, stored or recipe_for(argv))
    if stored is not None:
        changed = differences(stored, config)
        changed += [
            f"{flag} is {typed!r} now and was {before!r}"
            for flag, before in (("--recipe", stored.recipe), ("--out", resumed))
            if (typed := flag_value(argv, flag)) is not None and typed != before
        ]
        if changed:
            raise UsageError(
                f"--resume continues {resumed} as it was started, but {'; '.join(changed)}: "
                "leave these flags out, or start a new run with --out."
            )
    validate(config)
    return config


def parse_flags(argv: Sequence[str], defaults: TrainConfig) -> TrainConfig:
    """-> `defaults` overridden by flags. Raises UsageError for flags that do not exist or values that do not fit."""
    with complaints_in_one_sentence():
        return tyro.cli(
            tyro.conf.OmitArgPrefixes[TrainConfig],
            args=list(argv),
            default=defaults,
            prog="python -m train.run",
            description=TrainConfig.__doc__,
        )


@contextlib.contextmanager
def complaints_in_one_sentence() -> Iterator[None]:
    """Turn what tyro prints about wrong flags, before it exits, into a UsageError; --help still exits."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as stopped:
        if stopped.code != UNUSABLE_INPUT:
            raise
        raise UsageError(f"{one_sentence(complaint.getvalue())} See --help.") from None


def one_sentence(box: str) -> str:
    """tyro's framed message -> its first paragraph, with the nearest existing flag where it names one."""
    rows = [line.strip("│╭╮╰╯ ").replace("─", "-") for line in box.splitlines()]
    paragraphs = [list(group) for ruled, group in groupby(filter(None, rows), lambda row: set(row) == {"-"}) if not ruled]
    if "╭" in box:
        paragraphs[0] = paragraphs[0][1:]  # the title is part of the frame
    else:
        paragraphs = paragraphs[1:]  # a plain terminal has the title above the first rule
    inside = paragraphs or [[box.strip()]]
    near = next((words[1].split()[0] for words in inside[1:] if words[0].startswith("Perhaps") and len(words) > 1), None)
    return f"{' '.join(inside[0]).rstrip('.')}.{f' Did you mean {near}?' if near else ''}"


def print_recipes() -> None:
    """Print every recipe with what it sets apart from the defaults of its flags."""
    plain = flatten(options_to_json(TrainConfig()))
    for name, recipe in RECIPES.items():
        own = {key: value for key, value in flatten(options_to_json(recipe)).items() if value != plain[key] and key != "recipe"}
        print(f"{name}\n    " + "  ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in own.items()))


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def entry() -> None:
    """Console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
