"""How long do a bundle's files take for one image, and how many images a second do they make of many?

    python -m benchmarks.latency BUNDLE ... --variants fp32,int8 [--threads 2] [--rounds 5]

Every file of every bundle in turn, and the whole turn again, so that what else the machine does falls on all
of them; prints a table of the medians over the rounds. The images are the bundle's golden ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE, UsageError
from ffl_deploy.manifest import LatencyRecord
from ffl_deploy.markdown import table
from ffl_deploy.runtime.latency import measure_latency

BATCHES = (1, 16, 64)


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    parser = Parser(prog="python -m benchmarks.latency", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument(
        "--variants", default="fp32,int8", help="with commas; those that a bundle lacks are left out"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each batch size of each file in a round"
    )
    arguments = parser.parse_args(argv)
    opened = {
        (folder, name): (bundle, bundle.session(name, threads=arguments.threads))
        for folder in arguments.bundles
        for bundle in [load_bundle(folder)]
        for name in arguments.variants.split(",")
        if name in {variant.name for variant in bundle.manifest.variants}
    }
    if not opened:
        raise UsageError(f"none of these bundles has a variant of {arguments.variants}.")

    found: dict[tuple[Path, str], list[LatencyRecord]] = {key: [] for key in opened}
    for _ in range(arguments.rounds):
        for key, (bundle, session) in opened.items():
            images = bundle.golden().images
            record = measure_latency(
                session.run, images, BATCHES, arguments.seconds, arguments.threads, session.gpu
            )
            found[key].append(record)
    rows = [
        [str(folder), f"{opened[folder, name][0].preprocessing.width}", name, *cells(records)]
        for (folder, name), records in found.items()
    ]
    print(table(["bundle", "pixels", "file", "p50 ms", *(f"images/s at {batch}" for batch in BATCHES)], rows))
    print(f"\n{next(iter(found.values()))[0].where}")
    return DONE


def cells(records: Sequence[LatencyRecord]) -> list[str]:
    """-> the medians over the rounds: ms for one image, images/s of each batch size."""
    speeds = [median(one.images_per_second[str(batch)] for one in records) for batch in BATCHES]
    return [f"{median(one.p50_ms for one in records):.1f}", *(f"{speed:,.0f}" for speed in speeds)]


if __name__ == "__main__":
    sys.exit(run_command(main))
