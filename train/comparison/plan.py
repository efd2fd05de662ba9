"""Which runs a comparison is made of, and the configuration of each."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.run_directory import CONFIG, load_run
from train.config import Names, TrainConfig, option
from train.flags import Typed, configure
from train.methods import METHODS, build_method
from train.options import differences, options_from_json

MOST_SEEDS = 20  # the exact test over seeds looks at 2^seeds cases


@dataclass(frozen=True)
class CompareOptions:
    """Train methods with several seeds each and compare them on the same test images.

    All other flags (--data, --epochs, --branches, ...) are those of ffl-train and go to every run
    alike. A method that trains another number of branches takes the first ones, or repeats them.
    """

    methods: Names = option(
        ("ffl", "vanilla", "independent", "dml", "one", "cl-ilr", "okddip", "dualnet"),
        (
            "Methods to train; the others are compared with ffl, or with the first one where ffl is not "
            "among them."
        ),
    )
    seeds: int = option(
        5,
        "Runs per method, with the seeds 0, 1, ...; differences between seeds are judged from 6 on.",
    )
    out: Path = option(
        Path("runs/compare"),
        "Folder for the runs (METHOD-seedN) and the table (DIR's name with .md, .json and .png).",
        metavar="DIR",
    )


@dataclass(frozen=True)
class PlannedRun:
    """One cell of methods x seeds."""

    method: str
    seed: int
    folder: Path
    config: TrainConfig


def plan(options: CompareOptions, others: Typed) -> list[PlannedRun]:
    """-> all runs, seed by seed, so that an interrupted comparison has equally many of each method.
    Raises UsageError."""
    for name in options.methods:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}. {choices_sentence(name, list(METHODS))}")
    if not options.methods or len(set(options.methods)) < len(options.methods):
        raise UsageError("--methods must name at least one method, each once.")
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds must be from 1 to {MOST_SEEDS}.")
    for flag, name in (("--method", "model.method"), ("--seed", "seed"), ("--resume", "output.resume")):
        if name in others:
            raise UsageError(
                f"{flag} belongs to python -m train.run; train.compare sets it itself (--methods, --seeds)."
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("train.compare is one process; start it without torchrun.")
    configs = {method: method_config(method, others) for method in options.methods}
    return [
        planned_run(method, seed, configs[method], options.out)
        for seed, method in itertools.product(range(options.seeds), options.methods)
    ]


def method_config(method: str, others: Typed) -> TrainConfig:
    """-> the configuration of `method` under the flags of the command, with as many branches as it trains."""
    config = configure({**others, "model.method": method})
    rules = build_method(method)
    branches = rules.branches_for(config.model.branches)
    rules.check(branches)
    return replace(config, model=replace(config.model, branches=branches))


def planned_run(method: str, seed: int, config: TrainConfig, out: Path) -> PlannedRun:
    """-> the run, or its continuation where it was begun.
    Raises UsageError where its folder holds another one."""
    folder = out / f"{method}-seed{seed}"
    config = replace(config, seed=seed, output=replace(config.output, out=folder, quiet=True))
    if (folder / CONFIG).is_file():
        changed = differences(options_from_json(load_run(folder).config.options), config)
        if changed:
            raise UsageError(
                f"{folder} was trained with other flags ({'; '.join(changed)}): repeat them, or choose "
                "another --out."
            )
        config = replace(config, output=replace(config.output, resume=folder))
    return PlannedRun(method, seed, folder, config)
