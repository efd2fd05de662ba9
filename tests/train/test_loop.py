"""Whole runs on tiny data: what they leave behind, exact resume, stopping, numeric accidents."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ffl_deploy.networks.checkpoint
import train.session
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError, Interrupted
from ffl_deploy.networks.checkpoint import build_network, load_network
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import load_run
from train.methods import FFL, METHODS
from train.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from train.randomness import seed_everything
from train.recipes import RECIPES
from train.record import read_metrics
from train.run import main
from train.stopping import StopRequest

TrainTiny = Callable[..., Path]


def weights(run: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / "model.safetensors")


def without_rate(run: Path) -> list[dict[str, object]]:
    return [
        {name: value for name, value in line.items() if name != "images_per_second"}
        for line in read_metrics(run)
    ]


def assert_same_run(found: Path, expected: Path) -> None:
    for checkpoint in ("last", "best"):
        a, b = weights(found, checkpoint), weights(expected, checkpoint)
        assert a.keys() == b.keys()
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, different[:5]
    assert without_rate(found) == without_rate(expected)
    with np.load(found / "eval_reference.npz") as a, np.load(expected / "eval_reference.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in b)
    assert (
        json.loads((found / "summary.json").read_text())["accuracy"]
        == json.loads((expected / "summary.json").read_text())["accuracy"]
    )


@contextmanager
def stop_after(monkeypatch: pytest.MonkeyPatch, checks: int) -> Iterator[None]:
    """A stop request that fires when it has been asked `checks` times: in the middle of an epoch."""

    class Countdown(StopRequest):
        left = checks

        @property
        def requested(self) -> bool:  # type: ignore[override]
            self.left -= 1
            return self.left < 0

    @contextmanager
    def listen(*arguments: object) -> Iterator[StopRequest]:
        yield Countdown()

    with monkeypatch.context() as patch:
        patch.setattr(train.session, "stop_on_signals", listen)
        yield


def test_a_run_directory_holds_what_the_contract_says(train_tiny: TrainTiny) -> None:
    folder = train_tiny("run", "--ema", "0.5", curves=True)
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "eval_reference.npz",
        "curves.png",
        "checkpoints",
        "tensorboard",
    } <= names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last", "best", "ema"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"fused", "ensemble", "branch0", "branch1"}
    assert all(0 <= value <= 1 for value in summary["accuracy"].values())
    assert summary["classes"] == ["blue", "green", "red"]
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    lines = read_metrics(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["parts"].values()))
    assert set(lines[0]["parts"]) == {
        "ce/branch0",
        "ce/branch1",
        "ce/fused",
        "ekd/fused",
        "fkd/branch0",
        "fkd/branch1",
    }
    assert set(lines[0]["ema"]) == set(lines[0]["validation"])


def test_reference_logits_are_those_of_the_stored_weights(train_tiny: TrainTiny) -> None:
    run = load_run(train_tiny("run"))
    for checkpoint in ("best", "last"):
        images, labels, logits = run.reference(checkpoint, "fused")
        network = load_network(run, checkpoint).network
        normalized = (images.astype(np.float32) - np.float32(run.mean)) / np.float32(run.std)
        with torch.no_grad():
            found = network(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())).fused.numpy()
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4 * logits.std())
        assert len(images) == len(labels) == 18


def test_splits_are_disjoint_and_recorded(train_tiny: TrainTiny) -> None:
    counts = load_run(train_tiny("run")).config.split["images_per_class"]
    assert counts == {"train": [18] * 3, "validation": [2] * 3, "test": [6] * 3}


@pytest.mark.parametrize("method", METHODS)
def test_resume_in_mid_epoch_is_bit_identical(
    method: str, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", method]
    expected = train_tiny("uninterrupted", *flags)
    folder = expected.parent / "stopped"
    with stop_after(monkeypatch, 5), pytest.raises(Interrupted, match="--resume"):  # in the second epoch
        train_tiny("stopped", *flags)
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (1, 1)
    first_epoch = 1 / read_metrics(folder)[0]["images_per_second"] * 54
    assert state["seconds"] > 1.01 * first_epoch  # the step of the second epoch counts too
    assert not (folder / "summary.json").exists()
    train_tiny("stopped", "--resume", str(folder))
    assert_same_run(folder, expected)


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema", "0.9", "--clip", "0.5", "--accumulate", "2", "--optimizer", "adamw", "--lr", "0.001"],
        [
            "--mixup",
            "0.2",
            "--cutmix",
            "1.0",
            "--label-smoothing",
            "0.1",
            "--schedule",
            "cosine",
            "--precision",
            "fp32",
        ],
        ["--precision", "bf16", "--small-size", "6"],
        ["--auto-augment", "trivialaugment", "--random-erase", "0.5", "--workers", "0"],
    ],
    ids=["ema", "mixed", "small", "changed"],
)
def test_resume_is_bit_identical_with_every_option(
    flags: list[str], train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_tiny("uninterrupted", *flags)
    with stop_after(monkeypatch, 2), pytest.raises(Interrupted):
        train_tiny("stopped", *flags)
    folder = expected.parent / "stopped"
    train_tiny("stopped", "--resume", str(folder))
    assert_same_run(folder, expected)
    if "--ema" in flags:
        a, b = weights(folder, "ema"), weights(expected, "ema")
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_seeds_decide_the_result(train_tiny: TrainTiny) -> None:
    a, b, c = (
        weights(train_tiny(name, "--seed", seed)) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["heads.0.weight"], c["heads.0.weight"])


def test_a_finished_run_is_not_repeated(train_tiny: TrainTiny) -> None:
    folder = train_tiny("run")
    before = (folder / "summary.json").read_bytes()
    train_tiny("run", "--resume", str(folder))
    assert (folder / "summary.json").read_bytes() == before


def test_a_run_is_never_overwritten(
    train_tiny: TrainTiny, hues: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_tiny("run")
    assert run_command(main, ["--data", str(hues), "--out", str(folder)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_changed_configuration_on_resume_says_what_differs(
    train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_tiny("run")
    assert run_command(main, ["--resume", str(folder), "--lr", "0.7", "--epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert "--lr is 0.7 now and was 0.1" in error
    assert "--epochs is 1 now and was 2" in error


def test_nan_stops_with_step_and_parts_and_keeps_the_last_good_checkpoint(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def poisoned(self: FFL, *arguments: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        parts = original(self, *arguments)  # type: ignore[arg-type]
        return parts | {"ce/fused": parts["ce/fused"] * float("nan")} if len(calls) == 6 else parts

    original = FFL.losses
    monkeypatch.setattr(FFL, "losses", poisoned)
    with pytest.raises(CheckError, match=r"not finite at step 5 \(.*ce/fused nan.*--lr"):
        train_tiny("run")
    folder = tmp_path / "run"
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_a_full_disk_ends_with_1_and_keeps_the_old_checkpoint(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, saves = ffl_deploy.networks.checkpoint.write_atomically, []

    def full(path: Path, content: bytes) -> None:
        saves.append(path)
        if len(saves) > 8:  # the first epoch's checkpoints are written, the second's are not
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(ffl_deploy.networks.checkpoint, "write_atomically", full)
    folder = tmp_path / "run"
    assert run_command(main, [*tiny_flags, "--epochs", "3", "--out", str(folder)]) == 1
    assert "disk is full" in capsys.readouterr().err
    monkeypatch.setattr(ffl_deploy.networks.checkpoint, "write_atomically", original)
    assert not list(folder.rglob("*.new"))
    assert run_command(main, ["--resume", str(folder), "--quiet"]) == 0


def test_weight_decay_groups_are_the_papers(train_tiny: TrainTiny) -> None:
    network = MutualNetwork(NetworkConfig(("resnet20", "resnet20"), 3, 8, 8))
    optimiser = build_optimizer(network, RECIPES["cifar100-resnet32-paper"].optimisation)
    sizes = {
        group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in optimiser.param_groups
    }
    fusion = sum(p.numel() for p in network.fusion.parameters())
    assert sizes == {1e-5: fusion, 1e-4: sum(p.numel() for p in network.parameters()) - fusion}
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimiser.param_groups)


def test_dualnet_leaves_the_frozen_extractor_alone(
    train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One step with a large weight decay: branch 0 learns, branch 1 keeps its initial weights bit for bit."""
    with stop_after(monkeypatch, 0), pytest.raises(Interrupted):
        train_tiny("run", "--method", "dualnet", "--weight-decay", "0.1")
    seed_everything(0, "weights")
    fresh, after = build_network(load_run(tmp_path / "run")), weights(tmp_path / "run")
    for name, value in fresh.named_parameters():
        if name.startswith("branches.1."):
            assert torch.equal(value, after[name]), name
        elif name.startswith("branches.0.") and name.endswith("conv1.weight"):
            assert not torch.equal(value, after[name]), name


def test_optimiser_state_takes_the_strides_of_its_parameters(train_tiny: TrainTiny) -> None:
    """A fused step walks parameter and momentum in memory order:
    other strides would pair the wrong elements."""
    network = build_network(load_run(train_tiny("run"))).to(memory_format=torch.channels_last)
    optimiser = build_optimizer(network, RECIPES["digits"].optimisation)
    network(torch.ones(2, 3, 8, 8)).fused.sum().backward()
    optimiser.step()
    fresh = build_optimizer(network, RECIPES["digits"].optimisation)
    load_optimizer_tensors(
        fresh, {name: value.contiguous() for name, value in optimizer_tensors(optimiser).items()}
    )
    for parameter, state in fresh.state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
        assert torch.equal(state["momentum_buffer"], optimiser.state[parameter]["momentum_buffer"])


@pytest.mark.slow
def test_compile_computes_the_same_losses(train_tiny: TrainTiny) -> None:
    flags = ["--precision", "fp32", "--epochs", "1"]
    eager, compiled = (
        read_metrics(train_tiny("eager", *flags)),
        read_metrics(train_tiny("compiled", *flags, "--compile")),
    )
    assert compiled[0]["loss"] == pytest.approx(eager[0]["loss"], rel=1e-3)
