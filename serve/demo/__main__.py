"""`python -m serve.demo BUNDLE...`: the demo alone. Health and metrics stay,
the inference protocol is not served."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError
from serve.command import parse_arguments, run


def main(argv: Sequence[str]) -> int:
    settings = parse_arguments(argv, program="python -m serve.demo")
    if not settings.demo:
        raise UsageError("--no-demo leaves nothing to serve here; use ffl-serve.")
    return run(replace(settings, protocol=False))


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
