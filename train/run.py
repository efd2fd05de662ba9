"""`ffl-train` (also `python -m train.run`): flags -> TrainConfig -> a finished run directory.
torch comes after parsing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from ffl_deploy.command import run_command
from ffl_deploy.data.datasets import require_there
from train.config import TrainConfig
from train.flags import Flags, configure, starting_point
from train.options import data_spec, flatten, options_to_json
from train.recipes import RECIPES

PROGRAM = "ffl-train"
EXAMPLES = (
    "ffl-train --out runs/digits",
    "ffl-train --data photos --branches torchvision:resnet18,torchvision:resnet18 --pretrained",
    "ffl-train --resume runs/digits",
)


def main(argv: Sequence[str]) -> int:
    """Run the command; -> exit code."""
    typed = Flags(PROGRAM, TrainConfig()).typed(argv)
    if typed.get("recipe") == "list":
        print_recipes()
        return 0
    if typed.pop("help", False):
        # with the defaults of what was chosen
        Flags(PROGRAM, starting_point(typed), examples=EXAMPLES).show_help()
    config = configure(typed)
    if config.output.resume is None:
        require_there(data_spec(config))  # a mistyped folder is told before torch comes
    from train.session import run_training  # torch takes seconds to import, which --help should not wait for

    return run_training(config)


def parse(argv: Sequence[str]) -> TrainConfig:
    """-> the configuration that these flags ask for. Raises UsageError."""
    return configure(Flags(PROGRAM, TrainConfig()).typed(argv))


def print_recipes() -> None:
    """Print every recipe with what it sets apart from the defaults of its flags."""
    plain = flatten(options_to_json(TrainConfig()))
    for name, recipe in RECIPES.items():
        own = {
            key: value
            for key, value in flatten(options_to_json(recipe)).items()
            if value != plain[key] and key != "recipe"
        }
        print(
            f"{name}\n    " + "  ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in own.items())
        )


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def entry() -> None:
    """Console script. After an error of one process among several on GPUs,
    it ends without waiting for the group (NCCL)."""
    code = run_command(main)
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if code and distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
