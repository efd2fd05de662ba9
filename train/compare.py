"""`python -m train.compare`: methods x seeds as ordinary runs under one folder,
then a table that compares them.

Finished runs are not repeated and interrupted ones are resumed, so the same command goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from ffl_deploy.command import run_command
from ffl_deploy.errors import CHECK_FAILED, DONE, CheckError, Interrupted, UsageError
from ffl_deploy.installed import require
from ffl_deploy.run_directory import SUMMARY
from train.comparison.plan import CompareOptions, PlannedRun, plan
from train.config import TrainConfig
from train.flags import Flags, override

PROGRAM = "python -m train.compare"
EXAMPLES = (
    "python -m train.compare --methods ffl,vanilla --seeds 3 --epochs 5",
    "python -m train.compare --data photos --out runs/photos-compared",
)


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    flags = Flags(PROGRAM, CompareOptions(), others=TrainConfig(), examples=EXAMPLES)
    typed = flags.typed(argv)
    if typed.pop("help", False):
        flags.show_help()
    own = {field.name for field in fields(CompareOptions)}
    options = override(CompareOptions(), {name: value for name, value in typed.items() if name in own})
    others = {name: value for name, value in typed.items() if name not in own}
    require("scipy")  # for the table at the end of what may take days
    runs = plan(options, others)
    failures = list(train_missing(runs))

    from train.comparison.report import write_report

    # scipy and torch take seconds to import, which --help should not wait for
    from train.comparison.results import compare

    finished = [run for run in runs if (run.folder / SUMMARY).is_file()]
    if not finished:
        raise CheckError(f"no run came to its end: {'; '.join(failures)}")
    reference = "ffl" if "ffl" in options.methods else options.methods[0]
    command = shlex.join(["python", "-m", "train.compare", *argv])
    print(write_report(compare(finished, reference, command), options.out), end="")
    for failure in failures:
        print(f"compare: error: {failure}", file=sys.stderr)
    return CHECK_FAILED if failures else DONE


def train_missing(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Train what is not finished; yield a sentence per run that failed. Raises Interrupted."""
    from tqdm import tqdm

    missing = [run for run in runs if not (run.folder / SUMMARY).is_file()]
    if not missing:
        return
    from train.session import run_training
    from train.stopping import stop_on_signals

    with (
        stop_on_signals() as stop,
        tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as bar,
    ):
        for run in missing:
            bar.set_description(f"{run.method}, seed {run.seed}")
            try:
                run_training(run.config, stop)
            except (CheckError, UsageError) as error:
                if isinstance(error, UsageError) and not any(
                    (one.folder / SUMMARY).is_file() for one in runs
                ):
                    raise  # about the flags or the data, which are every run's
                yield f"{run.folder}: {error}"
            except Interrupted:
                pass  # said below, for a run that ended just in time too
            if stop.requested:
                raise Interrupted(f"stopped at {run.folder}; the same command goes on from there.")
            bar.update()


def entry() -> None:
    """Console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
