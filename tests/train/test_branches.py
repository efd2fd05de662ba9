"""Branches of different architectures, channels and resolutions,
from the command line to a loaded checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ffl_deploy.command import run_command
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.targets import build_target, target_names
from ffl_deploy.run_directory import load_run
from train.branch_weights import main as branch_weights
from train.run import main

Train = Callable[..., Path]


@pytest.mark.parametrize(
    ("branches", "size", "shapes"),
    [
        ("resnet20,wrn16_2", 16, [(64, 4, 4), (128, 4, 4)]),
        ("torchvision:shufflenet_v2_x0_5,timm:mobilenetv3_small_050", 32, [(1024, 1, 1), (288, 1, 1)]),
        pytest.param(
            "timm:mobilenetv3_small_050,resnet20", 32, [(288, 1, 1), (64, 8, 8)], marks=pytest.mark.slow
        ),
        pytest.param(
            "torchvision:resnet18,timm:mobilenetv3_small_100",
            32,
            [(512, 1, 1), (576, 1, 1)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_mix_of_branches_trains_is_saved_and_loaded(
    branches: str, size: int, shapes: list[tuple[int, int, int]], train_tiny: Train
) -> None:
    run = load_run(train_tiny("mixed", "--branches", branches, "--image-size", str(size)))
    network = load_network(run, "best").network
    assert len(network.trunk) == 0
    images = run.reference("best", "fused")[0]
    normalized = (
        torch.from_numpy(images).permute(0, 3, 1, 2).float() - torch.tensor(run.mean)[:, None, None]
    ) / (torch.tensor(run.std)[:, None, None])
    with torch.no_grad():
        outputs = network(normalized)
        assert [tuple(feature_map.shape[1:]) for feature_map in outputs.features] == shapes
        assert target_names(network) == ["fused", "ensemble", *(f"branch{k}" for k in range(len(shapes)))]
        for name in target_names(network):
            wanted = run.reference("best", name)[2]
            found = build_target(network, name)(normalized).numpy()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.std(), err_msg=name)


@pytest.mark.parametrize("method", ["ffl-sum", "ffl-mean", "dualnet", "one"])
def test_methods_that_cannot_mix_say_so_and_leave_nothing(
    method: str, tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    assert (
        run_command(
            main, [*tiny_flags, "--branches", "resnet20,wrn16_2", "--method", method, "--out", str(out)]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ("one architecture" if method == "one" else "equal channels, not 64, 128") in message
    assert not out.exists()


def test_a_branch_of_a_run_loads_into_torchvisions_model(
    train_tiny: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file
    from torchvision import models

    folder = train_tiny("run", "--branches", "torchvision:shufflenet_v2_x0_5,resnet20", "--image-size", "32")
    out = tmp_path / "branch.safetensors"
    assert branch_weights([str(folder), "--out", str(out)]) == 0
    assert "loads it as it is" in capsys.readouterr().out
    model = models.shufflenet_v2_x0_5(num_classes=3).eval()
    model.load_state_dict(load_file(out), strict=True)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["classes"] == '["blue","green","red"]'
    run = load_run(folder)
    images, _, wanted = run.reference("best", "branch0")
    mean, std = (
        torch.tensor([float(v) for v in metadata[key].strip("[]").split(",")]) for key in ("mean", "std")
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = model((pixels - mean[:, None, None]) / std[:, None, None]).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * wanted.std())
    assert run_command(branch_weights, [str(folder), "--branch", "2", "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
