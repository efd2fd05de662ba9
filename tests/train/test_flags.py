"""What may be typed: every spelling, and that nothing else than what was typed is known of a command line."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ffl_deploy.errors import CheckError, UsageError
from train.config import TrainConfig
from train.flags import Flags, override
from train.options import flag_of, options_from_json, options_to_json


def typed(*argv: str) -> dict[str, Any]:
    return Flags("train", TrainConfig()).typed(argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", {}),
        ("--lr 1e-3 --lr 2", {"optimisation.lr": 2.0}),
        ("--epochs=3 --seed=4", {"optimisation.epochs": 3, "seed": 4}),
        ("--batch_size 64 --no_flip", {"optimisation.batch_size": 64, "data.flip": False}),
        ("--flip --no-flip --quiet", {"data.flip": False, "output.quiet": True}),
        ("--compile --no-compile", {"machine.compile": False}),
        ("--milestones 0.1 0.2 --ema 0.9", {"optimisation.milestones": (0.1, 0.2), "optimisation.ema": 0.9}),
        ("--milestones", {"optimisation.milestones": ()}),
        ("--branches resnet20,resnet32", {"model.branches": ("resnet20", "resnet32")}),
        ("--image-size None --threads=None", {"data.image_size": None, "machine.threads": None}),
        ("--memory-limit 0.5 --lr -1", {"machine.memory_limit": 0.5, "optimisation.lr": -1.0}),
        ("--data a --data-root b_c", {"data.source": "a", "data.root": Path("b_c")}),
        ("--out a_b --resume None", {"output.out": Path("a_b"), "output.resume": None}),
    ],
)
def test_the_namespace_is_what_was_typed(argv: str, expected: dict[str, Any]) -> None:
    assert typed(*argv.split()) == expected


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--epoch 3", "unrecognized arguments: --epoch. Did you mean --epochs? See train --help."),
        ("--no-quick", "unrecognized arguments: --no-quick. Did you mean --no-quiet? See train --help."),
        ("--branches a b", "unrecognized arguments: b; see train --help."),
        ("--lr", "--lr: expected one argument; see train --help."),
        ("--epochs 3.5", "--epochs: '3.5' is not a whole number; see train --help."),
        (
            "--augment crops",
            (
                "--augment: there is no 'crops'. Did you mean 'crop'? Known: none, crop, "
                "resized-crop; see train --help."
            ),
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(argv: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        typed(*argv.split())
    assert str(caught.value).startswith(sentence)


def test_every_option_can_be_typed_and_nothing_typed_changes_nothing() -> None:
    """flag_of names the flag in a sentence about an option: both have to mean the same one."""
    spellings = Flags("train", TrainConfig()).spellings
    groups = {name: value for name, value in vars(TrainConfig()).items() if is_dataclass(value)}
    assert len(groups) == 5
    for prefix, group in groups.items():
        for name, kind in get_type_hints(type(group)).items():
            flag = flag_of(f"{prefix}.{name}")
            assert flag in spellings
            assert (flag.replace("--", "--no-") in spellings) == (kind is bool)
    assert override(TrainConfig(), {}) == TrainConfig()
    assert override(TrainConfig(), typed("--lr", "3", "--seed", "2")).optimisation.lr == 3.0


def test_a_method_of_another_version_is_one_sentence() -> None:
    options = options_to_json(TrainConfig())
    options["model"]["method"] = "ffl-of-tomorrow"
    with pytest.raises(CheckError, match="'ffl-of-tomorrow'"):
        options_from_json(options)
