"""How well does `familiarity` tell photographs of classes that training never saw? That is the hard case:
they are made of the same edges and colours, by the same camera.

    python -m benchmarks.near_classes --data CIFAR100 --epochs 8

CIFAR-100's classes are dealt into five parts of twenty; five runs know four parts each. Each is trained by
`ffl-train`, exported by `ffl-export --familiarity`, and its fp32 file asked for the test images of the
classes that it knows (8,000) and of those that it does not (2,000). Prints a table of AUROC: the chance that
an image of a known class is the more familiar one of two. What is finished is kept in --work, not done again.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.int8_agreement import read
from benchmarks.int8_networks import linked
from export.outputs.familiarity import auroc
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE, CheckError, UsageError
from ffl_deploy.markdown import percent, table
from ffl_deploy.run_directory import CONFIG, SUMMARY
from ffl_deploy.runtime import open_session
from ffl_deploy.statistics import log_softmax

SPLITS, SEED, BATCH = 5, 0, 100


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(prog="python -m benchmarks.near_classes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-100 as train/CLASS/* and test/CLASS/*"
    )
    parser.add_argument("--branches", default="resnet20,resnet20")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("near_classes"), help="links, runs and bundles")
    arguments = parser.parse_args(argv)
    classes = sorted(folder.name for folder in arguments.data.joinpath("train").glob("*/"))
    if len(classes) < 2 * SPLITS:
        raise UsageError(f"{arguments.data}/train has {len(classes)} classes; give CIFAR-100 as folders.")
    dealt = np.random.default_rng(SEED).permutation(classes).tolist()

    rows = []
    for number in range(SPLITS):
        unknown = sorted(dealt[number::SPLITS])
        known = sorted(set(classes) - set(unknown))
        images = linked(arguments.data, known, arguments.work / "images" / str(number))
        bundle = exported(images, arguments.work, number, arguments)
        rows.append(measured(bundle, arguments.data / "test", known, unknown, arguments.threads))
        print(f"split {number}: {rows[-1]}", file=sys.stderr, flush=True)
    print(as_table(rows))
    return DONE


def exported(images: Path, work: Path, number: int, arguments: Namespace) -> Path:
    """-> the bundle of the run that knows the classes of `images`. Raises CheckError."""
    run, bundles = work / "runs" / str(number), work / "bundles" / str(number)
    if not (run / SUMMARY).is_file():
        flags = ["--data", images, "--recipe", "cifar100-resnet32-fast", "--branches", arguments.branches]
        flags += ["--epochs", arguments.epochs, "--threads", arguments.threads, "--quiet", "--out", run]
        ran(["train.run", *(["--resume", run] if (run / CONFIG).is_file() else flags)])
    if not (bundles / "fused").is_dir():
        ran(["export.cli", run, "--target", "fused", "--familiarity", "--out", bundles])
    return bundles / "fused"


def ran(words: Sequence[object]) -> None:
    code = subprocess.run([sys.executable, "-m", *map(str, words)]).returncode
    if code != DONE:
        raise CheckError(f"{words[0]} ended with exit code {code}.")


def measured(
    folder: Path, test: Path, known: list[str], unknown: list[str], threads: int
) -> dict[str, float]:
    """-> accuracy on the known classes, and a score -> its AUROC."""
    bundle = load_bundle(folder)
    session = open_session(bundle, bundle.variant("fp32"), "onnxruntime", threads)
    sides = []
    for names in (known, unknown):
        images, labels = read(test, names, 10_000, bundle.preprocessing)
        outputs = [session.run(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
        logits = np.concatenate([one.logits for one in outputs]).astype(np.float64)
        familiar = np.concatenate([one.familiarity for one in outputs if one.familiarity is not None])
        sure = log_softmax(logits).max(axis=1)
        energy = logits.max(axis=1) - sure
        sides.append(({"largest softmax": sure, "energy": energy, "familiarity": familiar}, logits, labels))
    (inside, logits, labels), (outside, _, _) = sides
    scores = {name: (inside[name], outside[name]) for name in inside}
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    return {"accuracy": accuracy} | {name: auroc(*pair) for name, pair in scores.items()}


def as_table(rows: Sequence[dict[str, float]]) -> str:
    """-> Markdown: a row for each split, and their mean."""
    names = list(rows[0])
    mean = {name: float(np.mean([row[name] for row in rows])) for name in names}
    cells = [
        [label, percent(row["accuracy"], 1), *(f"{row[name]:.3f}" for name in names[1:])]
        for label, row in [*((str(number), row) for number, row in enumerate(rows)), ("mean", mean)]
    ]
    return table(["split", *names], cells)


if __name__ == "__main__":
    sys.exit(run_command(main))
