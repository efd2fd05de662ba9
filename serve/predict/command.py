"""`ffl-predict BUNDLE INPUT... [--out FILE]`: classify images, exactly one row per input, in order."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ffl_deploy.command import Parser, gpu_number, positive, run_command
from ffl_deploy.errors import DONE, SOME_INPUTS_FAILED, CheckError, Interrupted, UsageError
from serve.inputs.standard_input import STANDARD_INPUT, spool_standard_input
from serve.predict.parts import part_given
from serve.predict.supervise import Recovery, WorkerDied, supervise

DESCRIPTION = """\
Classify images with an exported bundle: exactly one row per input, in input order.

INPUT is a file, a folder (searched recursively), a quoted glob, a zip or tar archive (streamed, never
unpacked), a CSV or Parquet table with a column of paths or image bytes, or - for paths on standard input. An
image that cannot be used gets a row that says why, and the run goes on. Without --out the rows are printed.

Exit: 0 all rows ok; 1 corrupt bundle, full disk; 2 unusable input; 3 finished, some rows have errors;
130 interrupted (--resume).

Of a run that several machines share, each makes a part (--part 1/3, 2/3, 3/3), and
ffl-predict merge FILE... --out FILE puts them together.
"""


MERGE = "merge"
"""The first word where parts of a run are put together; a bundle in a folder of that name is ./merge."""


def build_parser() -> Parser:
    parser = Parser(
        "ffl-predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "ffl-predict examples/cifar100/fused examples/cifar100/images/clock.jpg",
            "ffl-predict bundles/quickstart/fused runs/quickstart/test_images --out predictions.csv",
        ),
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that ffl-export wrote")
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="what to classify")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="where the rows go, - to print them; the suffix chooses the format",
    )
    parser.add_argument(
        "--format", choices=("parquet", "jsonl", "csv"), help="default: by the suffix of FILE, else parquet"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="of the bundle; auto: the fastest that holds on this machine (default: fp32)",
    )
    parser.add_argument(
        "--runtime", metavar="NAME", help="onnxruntime, openvino or tensorrt (default: the variant's own)"
    )
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="labels per row (default: 5)")
    parser.add_argument("--logits", action="store_true", help="add the column logits")
    parser.add_argument(
        "--embedding", action="store_true", help="add the column embedding, if the bundle's graph gives one"
    )
    parser.add_argument(
        "--sets",
        metavar="LEVEL",
        help=(
            "add the columns set_labels (classes that hold the right one in LEVEL %% of images: 90, 95, 99, "
            "or 90-by-class, ...) and abstain, if the bundle was exported with --sets"
        ),
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run; the result has the same bytes"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=part_given,
        help="make a part of the run: every N-th shard from the I-th on; see ffl-predict merge --help",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: Ray Data, on this machine or a cluster",
    )
    parser.add_argument(
        "--gpu",
        metavar="N",
        type=gpu_or_all,
        help="with a --runtime on one: which, as nvidia-smi counts, or all, a process for each (default: 0)",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="PEM",
        help="refuse a bundle that the owner of this key has not signed (BUNDLE.sig)",
    )
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--column", metavar="NAME", help="of tables: paths or image bytes (default: path, image, ...)"
    )
    reading.add_argument(
        "--label-column",
        metavar="NAME",
        help="of tables: true classes (default: label, class or target, if there)",
    )
    reading.add_argument(
        "--follow-links", action="store_true", help="take symbolic links to files that a folder holds"
    )
    speed = parser.add_argument_group("speed (default: measured in a second at the start)")
    speed.add_argument("--batch-size", type=positive, metavar="N", help="images per inference")
    speed.add_argument("--threads", type=positive, metavar="N", help="cores to use (default: all)")
    speed.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="rows per shard: what a kill can cost (default: 1024)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print errors only")
    output.add_argument(
        "--json", action="store_true", help="progress as JSON lines on stderr, the summary as JSON on stdout"
    )
    return parser


def gpu_or_all(text: str) -> int | Literal["all"]:
    """-> the value of --gpu; as a `type` of argparse."""
    if text == "all":
        return "all"
    try:
        return gpu_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a GPU nor all") from None


def main(argv: Sequence[str]) -> int:
    """Run in this process: for tests and for programs that call the command."""
    if argv[:1] == [MERGE]:
        return merge(argv[1:])
    arguments = build_parser().parse_args(argv)
    try:
        return delivered(arguments, lambda out: run(arguments, out, Recovery()))
    except WorkerDied as died:  # nobody supervises
        raise CheckError(str(died)) from None


def supervised_main(argv: Sequence[str]) -> int:
    """Run in a child process that is restarted when it dies."""
    if argv[:1] == [MERGE]:
        return merge(argv[1:])
    arguments = build_parser().parse_args(argv)
    if STANDARD_INPUT in arguments.inputs:
        spool_standard_input()
    return delivered(
        arguments,
        lambda out: supervise(lambda recovery: run_command(lambda _: run(arguments, out, recovery))),
    )


def merge(argv: Sequence[str]) -> int:
    """`ffl-predict merge`."""
    from serve.predict.merge import main

    return main(argv)


def delivered(arguments: argparse.Namespace, job: Callable[[Path], int]) -> int:
    """Run `job` on --out, or on a temporary file whose rows are then printed; -> its exit code."""
    if arguments.out == Path("-"):  # standard output, as - among the inputs is standard input
        arguments.out, arguments.format = None, arguments.format or "jsonl"
    if arguments.out:
        if arguments.out.is_dir():
            raise UsageError(f"{arguments.out} is a folder; give --out a file inside it.")
        return job(Path(os.path.realpath(arguments.out)) if arguments.out.is_symlink() else arguments.out)
    if arguments.part:
        raise UsageError("the rows of a --part are for ffl-predict merge; give them a file with --out.")
    from serve.predict.screen import rows_on_screen, show

    with rows_on_screen(arguments) as rows:
        code = job(rows)
        if code in (DONE, SOME_INPUTS_FAILED):
            show(rows, arguments.format)
    return code


def run(arguments: argparse.Namespace, out: Path, recovery: Recovery) -> int:
    """Do what the flags say, with the rows in `out`; -> the exit code."""
    from serve.predict.job import Job
    from serve.predict.runner import run_job
    from serve.rows import OF_SETS

    if isinstance(arguments.gpu, int):
        from ffl_deploy.runtime.gpu import use_gpu

        use_gpu(arguments.gpu)  # before anything asks CUDA

    job = Job(
        bundle=arguments.bundle,
        inputs=list(arguments.inputs),
        out=out,
        format=arguments.format,
        variant=arguments.variant,
        runtime=arguments.runtime,
        top_k=arguments.top_k,
        columns=[
            *(name for name in ("logits", "embedding") if getattr(arguments, name)),
            *(OF_SETS if arguments.sets else ()),
        ],
        sets=arguments.sets,
        column=arguments.column,
        label_column=arguments.label_column,
        follow_links=arguments.follow_links,
        batch_size=arguments.batch_size,
        threads=arguments.threads,
        shard_size=arguments.shard_size,
        resume=arguments.resume,
        part=arguments.part,
        engine=arguments.engine,
        gpu=arguments.gpu,
        public_key=arguments.public_key,
        recovery=recovery,
        quiet=arguments.quiet,
        display="quiet" if arguments.quiet or not arguments.out else "json" if arguments.json else "screen",
    )
    try:
        errors = run_job(job)
    except Interrupted as stopped:
        raise (
            stopped if arguments.out else Interrupted("interrupted; a run with --out FILE can be resumed.")
        ) from None
    return SOME_INPUTS_FAILED if errors else DONE


def entry() -> None:
    sys.exit(run_command(supervised_main))


if __name__ == "__main__":
    entry()
