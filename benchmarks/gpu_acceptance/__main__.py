"""`python -m benchmarks.gpu_acceptance`: all stages, or with --stage one of them, in this process."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks.gpu_acceptance as package
from benchmarks.gpu_acceptance.page import summary
from benchmarks.gpu_acceptance.report import Context, NotHere, Report
from benchmarks.gpu_acceptance.runner import NOT_HERE, Settings, run_stages, store, worst
from benchmarks.gpu_acceptance.stages import STAGES
from ffl_deploy.command import run_command
from ffl_deploy.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """-> 0 all holds, 1 something does not, 3 some stage could not run here."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for lines, logs and the summary"
    )
    parser.add_argument(
        "--data", type=Path, metavar="NPZ", help="the kit's images; without, what they show is left out"
    )
    parser.add_argument("--official", type=Path, metavar="CLONE", help="a clone of Jangho-Kim/FFL-pytorch")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names)
    )
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for path in (arguments.data, arguments.official):
        if path is not None and not path.exists():
            raise UsageError(f"there is no {path}; `make gpu-kit` packs it.")
    out = arguments.out.absolute()
    if arguments.stage:
        report = Report(out / "stages" / f"{arguments.stage}.json")
        device = arguments.device if arguments.device != "auto" else found_device()
        ends = time.monotonic() + arguments.seconds
        context = Context(out, device, arguments.data, arguments.official, report, ends)
        return one(arguments.stage, context)
    settings = Settings(out, arguments.minutes, arguments.device, arguments.data, arguments.official)
    lines = run_stages([stage for stage in STAGES if stage.name in arguments.only], settings)
    store(lines, settings)
    text = summary(lines)
    (out / "acceptance.md").write_text(text)
    print(text, file=sys.stderr)
    return worst(lines)


def one(name: str, context: Context) -> int:
    """Run stage `name` here."""
    try:
        importlib.import_module(f"benchmarks.gpu_acceptance.checks.{name}").run(context)
    except NotHere as reason:
        print(reason, file=sys.stderr)
        return NOT_HERE
    return 0


def found_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(run_command(main))
