"""`python -m train.compare`: methods x seeds as ordinary runs under one folder, then a table that compares them.

Finished runs are not repeated and interrupted ones are resumed, so the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

import tyro
from tyro.conf import arg

from ffl_deploy.command import choices_sentence, run_command
from ffl_deploy.errors import CHECK_FAILED, DONE, CheckError, Interrupted, UsageError
from ffl_deploy.run_directory import CONFIG, SUMMARY, load_run
from train.config import MethodName, Names, TrainConfig
from train.options import differences, options_from_json
from train.run import complaints_in_one_sentence, parse

MOST_SEEDS = 20  # the exact test over seeds looks at 2^seeds cases


@dataclass(frozen=True)
class CompareOptions:
    """Train methods with several seeds each and compare them on the same test images.

    All other flags (--data, --epochs, --branches, ...) are those of python -m train.run and go to every run alike.
    A method that trains another number of branches takes the first ones, or repeats them.
    """

    methods: Names = ("ffl", "vanilla", "independent", "dml", "one", "cl-ilr", "okddip", "dualnet")
    """Methods to train; the others are compared with ffl, or with the first one where ffl is not among them."""
    seeds: int = 5
    """Runs per method, with the seeds 0, 1, ...; differences between seeds are judged from 6 on."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/compare")
    """Folder for the runs (METHOD-seedN) and the table (DIR's name with .md, .json and .png)."""


@dataclass(frozen=True)
class PlannedRun:
    """One cell of methods x seeds."""

    method: str
    seed: int
    folder: Path
    config: TrainConfig


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    with complaints_in_one_sentence():
        options, others = tyro.cli(
            CompareOptions,
            args=list(argv),
            prog="python -m train.compare",
            description=CompareOptions.__doc__,
            return_unknown_args=True,
        )
    runs = plan(options, others)
    failures = list(train_missing(runs))

    from train.comparison import compare  # scipy and torch take seconds to import, which --help should not wait for
    from train.comparison_report import write_report

    finished = [run for run in runs if (run.folder / SUMMARY).is_file()]
    if not finished:
        raise CheckError(f"no run came to its end: {'; '.join(failures)}")
    reference = "ffl" if "ffl" in options.methods else options.methods[0]
    command = shlex.join(["python", "-m", "train.compare", *argv])
    print(write_report(compare(finished, reference, command), options.out), end="")
    for failure in failures:
        print(f"compare: error: {failure}", file=sys.stderr)
    return CHECK_FAILED if failures else DONE


def plan(options: CompareOptions, others: Sequence[str]) -> list[PlannedRun]:
    """-> all runs, seed by seed, so that an interrupted comparison has equally many of each method. Raises UsageError."""
    known = get_args(MethodName)
    for name in options.methods:
        if name not in known:
            raise UsageError(f"there is no method {name!r}. {choices_sentence(name, known)}")
    if not options.methods or len(set(options.methods)) < len(options.methods):
        raise UsageError("--methods must name at least one method, each once.")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds must be from 1 to {MOST_SEEDS}.")
    for flag in ("--method", "--seed", "--resume"):
        if any(other == flag or other.startswith(f"{flag}=") for other in others):
            raise UsageError(f"{flag} belongs to python -m train.run; train.compare sets it itself (--methods, --seeds).")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("train.compare is one process; start it without torchrun.")
    configs = {method: method_config(method, others) for method in options.methods}
    return [
        planned_run(method, seed, configs[method], options.out)
        for seed, method in itertools.product(range(options.seeds), options.methods)
    ]


def method_config(method: str, others: Sequence[str]) -> TrainConfig:
    """-> the configuration of `method` under the flags of the command, with as many branches as it trains."""
    from train.methods import build_method

    config = parse([*others, "--method", method])
    rules, branches = build_method(method), config.model.branches
    count = min(max(len(branches), rules.minimum_branches), rules.maximum_branches or len(branches) + rules.minimum_branches)
    branches = tuple(itertools.islice(itertools.cycle(branches), count))
    rules.check(branches)
    return replace(config, model=replace(config.model, branches=branches))


def planned_run(method: str, seed: int, config: TrainConfig, out: Path) -> PlannedRun:
    """-> the run, or its continuation where it was begun. Raises UsageError where its folder holds another one."""
    folder = out / f"{method}-seed{seed}"
    config = replace(config, seed=seed, output=replace(config.output, out=folder, quiet=True))
    if (folder / CONFIG).is_file():
        changed = differences(options_from_json(load_run(folder).config.options), config)
        if changed:
            raise UsageError(
                f"{folder} was trained with other flags ({'; '.join(changed)}): repeat them, or choose another --out."
            )
        config = replace(config, output=replace(config.output, resume=folder))
    return PlannedRun(method, seed, folder, config)


def train_missing(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Train what is not finished; yield a sentence per run that failed. Raises Interrupted."""
    from tqdm import tqdm

    missing = [run for run in runs if not (run.folder / SUMMARY).is_file()]
    if not missing:
        return
    from train.session import run_training
    from train.stopping import stop_on_signals

    with stop_on_signals() as stop, tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as bar:
        for run in missing:
            bar.set_description(f"{run.method}, seed {run.seed}")
            try:
                run_training(run.config, stop)
            except (CheckError, UsageError) as error:
                if isinstance(error, UsageError) and not any((one.folder / SUMMARY).is_file() for one in runs):
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
