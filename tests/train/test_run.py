"""The command line: flags, recipes, bad input, and what it prints."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ffl_deploy.command import run_command
from train.config import TrainConfig
from train.options import options_from_json, options_to_json
from train.recipes import RECIPES
from train.run import main, parse


def test_flags_override_the_recipe_and_the_recipe_follows_the_data() -> None:
    config = parse(["--data", "cifar100", "--epochs", "3", "--branches", "resnet20,resnet32,resnet44"])
    assert config.recipe == "cifar100-resnet32-fast"
    assert config.optimisation.epochs == 3
    assert config.model.branches == ("resnet20", "resnet32", "resnet44")
    assert config.optimisation.lr == RECIPES["cifar100-resnet32-fast"].optimisation.lr
    assert parse(["--data", "some/folder"]).recipe == "folder"
    assert parse([]).recipe == "digits"
    assert parse(["--recipe", "cifar10-resnet110-paper"]).optimisation.epochs == 300


def test_the_number_of_branches_follows_the_method_unless_given() -> None:
    assert parse(["--method", "vanilla"]).model.branches == ("resnet20",)
    assert parse(["--method", "okddip"]).model.branches == ("resnet20",) * 3
    assert (
        parse(["--method=okddip", "--branches", "resnet32,resnet32,resnet32,resnet32"]).model.branches
        == ("resnet32",) * 4
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_config_json(name: str) -> None:
    stored = json.loads(json.dumps(options_to_json(RECIPES[name])))
    assert options_from_json(stored) == RECIPES[name]


def test_recipes_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "list"]) == 0
    shown = capsys.readouterr().out
    assert "cifar100-resnet32-paper" in shown
    assert "schedule=multistep" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no/such/folder"], "no such folder"),
        (["--branches", "resnet21,resnet21"], "Known: "),
        (["--branches", "resnet3,resnet3"], "Did you mean"),
        (["--recipe", "cifar100"], "no recipe"),
        (["--epoch", "3"], "unrecognized arguments: --epoch. Did you mean --epochs?"),
        (["--epochs", "many"], "--epochs: 'many' is not a whole number"),
        (["--device", "tpu"], "--device"),
        (["--small-size", "3"], "--small-size must be at least 4 pixels"),
        (["--small-size", "8"], "--small-size 8 is not below the images' own 8 pixels"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--lr", "inf"], "--lr must be a finite number"),
        (["--clip", "inf"], "--clip must be a finite number"),
        (["--checkpoint-minutes", "inf"], "--checkpoint-minutes must be a finite number"),
        (["--memory-limit", "nan"], "--memory-limit must be a finite number"),
        (["--ramp-up", "-1"], "--ramp-up is a share of the epochs"),
        (["--checkpoint-minutes", "-5"], "--checkpoint-minutes must be 0"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--momentum", "1"], "--momentum is from 0 to below 1"),
        (["--weight-decay", "-0.1"], "a weight decay is 0 or more"),
        (["--milestones", "150", "225"], "--milestones are shares of the epochs"),
        (["--fusion-width", "0"], "--fusion-width must be at least 1"),
        (["--resume", "no/such/run"], "no run directory"),
        (["--method", "vanilla", "--branches", "resnet20,resnet20"], "trains 1"),
        (["--shared-stages", "9"], "can be 0 to 3"),
        (["--branches", "resnet20,resnet32", "--shared-stages", "2"], "share no stages"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("config.json"))


def test_cuda_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run_command(main, ["--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "no usable NVIDIA GPU" in capsys.readouterr().err
    assert run_command(main, ["--precision", "fp16", "--device", "cpu", "--out", str(tmp_path / "run")]) == 2


def test_help_shows_every_option_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    named = {"source": "data", "root": "data-root"}
    groups = [
        field.default_factory for field in fields(TrainConfig) if isinstance(field.default_factory, type)
    ]
    flags = [
        named.get(field.name, field.name.replace("_", "-")) for group in groups for field in fields(group)
    ]
    assert len(flags) > 30
    assert [flag for flag in flags if f"--{flag} " not in shown and f"--{flag}," not in shown] == []
    assert "What the networks learn from each other" in shown
