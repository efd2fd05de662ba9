"""`python -m serve.demo BUNDLE...`: the demo alone. Health and metrics stay,
the inference protocol is not served."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ffl_deploy.command import run_command
from serve.command import parse_arguments, run


def main(argv: Sequence[str]) -> int:
    return run(parse_arguments(argv, demo_alone=True))


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
