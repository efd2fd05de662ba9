"""The flags of every comparison with the official code; without torch,
which the parent process of a comparison does not need."""

from __future__ import annotations

import argparse
from pathlib import Path


def two_sides_parser(description: str | None) -> argparse.ArgumentParser:
    """-> a parser of --official, --data, --device and --json."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--official", type=Path, required=True, metavar="CLONE", help="a clone of Jangho-Kim/FFL-pytorch"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="CIFAR-100 as train/CLASS/* and test/CLASS/*"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser
