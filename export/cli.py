"""`ffl-export [RUN] --target NAME ...`: a trained run -> verified bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.command import run_command
from ffl_deploy.errors import DONE, UsageError

PRECISIONS = ("fp32",)


def parser() -> argparse.ArgumentParser:
    """-> the command line; defaults that need the run or torch are resolved in `main`."""
    parser = argparse.ArgumentParser(
        prog="ffl-export",
        description="Export targets of a trained run as ONNX bundles whose logits are those of training's own evaluation.",
        epilog="Exit code 1: a gate did not hold and no bundle was written. 2: the run or the flags cannot be used.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run directory (default: the newest under runs/)")
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="fused, ensemble, branch0, ... or all; may be repeated (default: the "
        "classifier that the run's best checkpoint was chosen by)",
    )  # fmt: skip
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="further variants beside fp32; may be repeated")
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best (default), last or ema")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset")
    parser.add_argument("--batch", default="dynamic", metavar="dynamic|N", help="batch size of the graph (default: dynamic)")
    parser.add_argument("--cam", action="store_true", help="third output: the class activation map of the predicted class")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="take the golden images from here, not from the run's data")
    parser.add_argument("--out", type=Path, metavar="DIR", help="receives one folder per target (default: bundles/RUN)")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    batch = _batch(arguments.batch)

    from ffl_deploy.run_directory import load_run, newest_run

    run = load_run(arguments.run or newest_run())

    from export.onnx_graph import OPSET, OPSETS, GraphOptions
    from export.pipeline import ExportOptions, export_run

    opset = arguments.opset or OPSET
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset} is not supported; choose {OPSETS.start} to {OPSETS.stop - 1} ({OPSET} by default).")
    options = ExportOptions(
        targets=tuple(arguments.target or [run.model.strong]),
        out=arguments.out or Path("bundles") / run.name,
        precisions=tuple(dict.fromkeys(["fp32", *(arguments.precision or [])])),
        checkpoint=arguments.checkpoint,
        graph=GraphOptions(opset, batch),
        cam=arguments.cam,
        golden=arguments.golden,
    )
    export_run(run, options, lambda line: print(line, flush=True))
    return DONE


def _batch(text: str) -> int | None:
    """ "dynamic" -> None, "8" -> 8. Raises UsageError."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch {text} is neither dynamic nor a number of images; give for example --batch 8.")
    return int(text)


def entry() -> None:
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
