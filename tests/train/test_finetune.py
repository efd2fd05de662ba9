"""Fine-tuning: what is frozen stays, is computed once, and each stage has a learning rate of its own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.features
from ffl_deploy.command import run_command
from ffl_deploy.errors import Interrupted
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import load_run
from train.data.batches import Batch
from train.features import frozen_in, views_are_few
from train.optimizer import SCALE, build_optimizer
from train.recipes import RECIPES
from train.run import main, parse

ARCHITECTURES = {
    "shared": NetworkConfig(("resnet8", "resnet8"), 3, 16, 16),
    "exit": NetworkConfig(("resnet8", "resnet8"), 3, 16, 16, trunk_exit=True),
    "unequal": NetworkConfig(("resnet8", "vgg16_bn"), 3, 32, 32),
    "gate": NetworkConfig(("resnet8", "resnet8"), 3, 16, 16, fusion=None, aggregator="gate"),
    "gate, apart": NetworkConfig(
        ("resnet8", "resnet8"), 3, 16, 16, shared_stages=0, fusion=None, aggregator="gate"
    ),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stages_below_and_above_any_cut_give_what_the_whole_gives(kind: str) -> None:
    config = ARCHITECTURES[kind]
    network = MutualNetwork(config).eval()
    images = torch.randn(2, 3, config.height, config.width)
    whole = network(images).classifiers()
    for depth in range(network.depth + 1):
        cut = network.upper(network.lower(images, depth), depth).classifiers()
        assert all(torch.equal(cut[name], logits) for name, logits in whole.items())


@pytest.mark.parametrize("kind", ["shared", "unequal"])
def test_frozen_stages_neither_learn_nor_count(kind: str) -> None:
    config = ARCHITECTURES[kind]
    network = MutualNetwork(config)
    network.freeze(2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = build_optimizer(network, RECIPES["finetune"].optimisation)
    outputs = network(torch.randn(4, 3, config.height, config.width))
    sum(logits.square().sum() for logits in outputs.classifiers().values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    names = (
        [f"trunk.{k}." for k in range(2)]
        if kind == "shared"
        else [f"branches.{b}.{k}." for b in (0, 1) for k in (0, 1)]
    )
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(tuple(names)), key
    network.freeze(0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(module.training for module in network.modules())


def test_each_stage_has_its_learning_rate() -> None:
    network = MutualNetwork(ARCHITECTURES["unequal"])
    options = replace(RECIPES["finetune"].optimisation, layer_decay=0.5)
    groups = build_optimizer(network, options).param_groups
    scales = {id(p): group.get(SCALE, 1.0) for group in groups for p in group["params"]}
    assert len(scales) == len(list(network.parameters()))
    depth = network.depth
    for branch in network.branches:
        for number, stage in enumerate(branch):
            assert {scales[id(p)] for p in stage.parameters()} == {0.5 ** (depth - number)}
    assert {scales[id(p)] for p in [*network.heads.parameters(), *network.fusion.parameters()]} == {1.0}  # type: ignore[union-attr]


def run_line(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


FLAGS = ("--branches", "resnet8,resnet14", "--crop-padding", "0", "--flip", "--freeze", "2", "--epochs", "3")


def test_features_that_are_kept_train_what_features_of_each_step_train(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FLAGS, "--no-flip", "--head-epochs", "1"]
    kept = train_tiny("kept", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train.features, "views_are_few", lambda config: False)
        computed = train_tiny("computed", *flags)
    # half precision apart, whose difference grows with every step
    losses = [[line["loss"] for line in run_line(run)] for run in (kept, computed)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert not (kept / "features").exists()


def test_frozen_stages_see_each_view_once(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    lower = MutualNetwork.lower

    def counted(self: MutualNetwork, images: torch.Tensor, depth: int) -> list[torch.Tensor]:
        if self.frozen:
            seen.append(len(images))
        return lower(self, images, depth)

    monkeypatch.setattr(MutualNetwork, "lower", counted)
    run = train_tiny("run", *FLAGS)
    counts = load_run(run).config.split["images_per_class"]
    # the images and their mirror images, the validation images, whatever the number of epochs
    assert sum(seen) == 2 * sum(counts["train"]) + sum(counts["validation"])


def test_frozen_stages_of_a_run_are_those_it_began_with(train_tiny: Callable[..., Path]) -> None:
    run = train_tiny("run", *FLAGS)
    trained = load_network(load_run(run), "last").network.state_dict()
    again = train_tiny("again", *FLAGS, "--epochs", "1", "--lr", "0.001")
    other = load_network(load_run(again), "last").network.state_dict()
    frozen = [key for key in trained if key.split(".")[0] == "branches" and key.split(".")[2] in "01"]
    assert frozen
    assert all(torch.equal(trained[key], other[key]) for key in frozen)
    assert not torch.equal(trained["heads.0.weight"], other["heads.0.weight"])


def test_a_run_that_was_stopped_ends_as_if_it_had_not(
    train_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*FLAGS, "--head-epochs", "1"]
    whole = train_tiny("whole", *flags)
    from train.loop import Trainer

    close = Trainer.close_epoch

    def stops(self: Trainer, epoch: int) -> None:
        close(self, epoch)
        if epoch == 0:
            self.background.wait()
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close_epoch", stops)
        with pytest.raises(Interrupted):
            train_tiny("stopped", *flags)
    train_tiny("stopped", "--resume", str(tmp_path / "stopped"), "--quiet")
    ends = [
        load_network(load_run(tmp_path / name), "last").network.state_dict() for name in ("whole", "stopped")
    ]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert whole == tmp_path / "whole"


SKIPPING = ("--branches", "timm:mobilenetv3_small_050,timm:mobilenetv3_small_050", "--image-size", "32")


def test_skipped_blocks_are_those_of_a_run_that_was_not_stopped(
    train_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.loop import Trainer

    flags = [*SKIPPING, "--epochs", "1", "--stochastic-depth", "0.5"]
    whole = train_tiny("whole", *flags)
    step = Trainer.step

    def stops(self: Trainer, number: int, batches: list[Batch]) -> None:
        step(self, number, batches)
        self.stop.requested = number == 1

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stops)
        with pytest.raises(Interrupted):
            train_tiny("stopped", *flags)
    stopped = train_tiny("stopped", "--resume", str(tmp_path / "stopped"), "--quiet")
    never = train_tiny("never", *flags, "--stochastic-depth", "0")
    ends = [load_network(load_run(run), "last").network.state_dict() for run in (whole, stopped, never)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert not torch.equal(ends[0]["heads.0.weight"], ends[2]["heads.0.weight"])


def test_skipping_blocks_of_a_network_that_is_frozen_is_refused(train_tiny: Callable[..., Path]) -> None:
    from ffl_deploy.errors import UsageError

    with pytest.raises(UsageError, match=r"--freeze 9 freezes all \d stages, which then skip no blocks"):
        train_tiny("run", *SKIPPING, "--stochastic-depth", "0.2", "--freeze", "9")


def test_epochs_of_heads_come_first() -> None:
    config = parse(["--weights", "x.pth", "--head-epochs", "2", "--freeze", "3"])
    assert [frozen_in(epoch, config, 5) for epoch in range(4)] == [5, 5, 3, 3]


def test_weights_choose_the_recipe_and_a_recipe_that_is_named_wins() -> None:
    assert parse(["--weights", "x.pth"]).recipe == "finetune"
    assert parse(["--pretrained"]).recipe == "finetune"
    assert parse(["--weights", "x.pth", "--recipe", "digits"]).recipe == "digits"
    assert len(set(parse(["--weights", "x.pth"]).model.branches)) == 2
    assert views_are_few(RECIPES["finetune"])
    assert not views_are_few(parse(["--weights", "x.pth", "--crop-padding", "2"]))
    assert not views_are_few(parse(["--weights", "x.pth", "--mixup", "0.2"]))
    assert not views_are_few(parse(["--weights", "x.pth", "--auto-augment", "randaugment"]))
    assert not views_are_few(parse(["--weights", "x.pth", "--random-erase", "0.1"]))


def test_training_ends_early_where_it_gets_no_better(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.loop

    answers = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    monkeypatch.setattr(
        train.loop,
        "accuracies",
        lambda *arguments: dict.fromkeys(("fused", "ensemble", "branch0", "branch1"), next(answers)),
    )
    run = train_tiny("run", "--branches", "resnet8,resnet8", "--epochs", "5", "--patience", "2")
    assert len(run_line(run)) == 4
    assert json.loads((run / "summary.json").read_text())["best_epoch"] == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--freeze", "-1"], "--freeze is a number of stages"),
        (["--layer-decay", "0"], "--layer-decay is a share"),
        (["--mean", "0.5", "0.5", "0.5"], "--mean and --std come together"),
        (["--mean", "1", "2", "3", "--std", "1", "1", "1"], "--mean takes three numbers"),
        (["--crop-fraction", "0"], "--crop-fraction is a share"),
        (["--weights", "x.pth", "--pretrained"], "--weights or --pretrained, not both"),
        (["--random-erase", "1.5"], "--random-erase is a share"),
        (["--stochastic-depth", "1"], "--stochastic-depth is a share"),
    ],
    ids=["freeze", "layer-decay", "mean alone", "mean", "crop-fraction", "both", "erase", "depth"],
)
def test_values_that_no_run_can_use(flags: list[str], sentence: str) -> None:
    from ffl_deploy.errors import UsageError

    with pytest.raises(UsageError, match=sentence):
        main(flags)


def test_room_for_kept_features_is_taken_before_they_are_computed(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write to a mapped file that finds the disk full would be SIGBUS, and no sentence."""
    out, sizes = tmp_path / "run", []
    flags = [*tiny_flags, *FLAGS, "--epochs", "1", "--out", str(out)]

    def full(descriptor: int, start: int, size: int) -> None:
        assert (start, size) == (0, os.fstat(descriptor).st_size)
        sizes.append(size)
        if len(sizes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert run_command(main, flags) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "what frozen stages give takes" in said
    assert min(sizes) > 1000, "a file for each branch"
    assert not (out / "features").exists(), "what was taken is given back"
    assert run_command(main, ["--resume", str(out), "--quiet"]) == 0


def test_kept_features_are_rejected_where_half_precision_cannot_hold_them(
    train_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffl_deploy.errors import CheckError

    lower = MutualNetwork.lower
    monkeypatch.setattr(
        MutualNetwork, "lower", lambda self, x, depth: [m * 1e6 for m in lower(self, x, depth)]
    )
    with pytest.raises(CheckError, match="does not fit into half precision"):
        train_tiny("run", *FLAGS)
