"""Checkpoints laid out as FFL's official code saves them become a run: the same weights bit for bit,
the same outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ffl_deploy.command import run_command
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.run_directory import load_run
from train.import_official import main

Weights = dict[str, Tensor]
CLASSES = 3


def official_weights(blocks: int = 3) -> tuple[Weights, Weights]:
    """-> (model, fusion module): the official names and shapes, with values that no two tensors share."""
    generator = torch.Generator().manual_seed(0)
    model: Weights = {}

    def convolution(weights: Weights, name: str, *shape: int) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5

    def norm(weights: Weights, name: str, channels: int) -> None:
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            weights[f"{name}.{part}"] = low + torch.rand(channels, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(117_300)

    def linear(weights: Weights, name: str) -> None:
        weights[f"{name}.weight"] = torch.randn(CLASSES, 64, generator=generator) / 8
        weights[f"{name}.bias"] = torch.randn(CLASSES, generator=generator)

    convolution(model, "conv1", 16, 3, 3, 3)
    norm(model, "bn1", 16)
    for layer, before, channels in (
        ("layer1", 16, 16),
        ("layer2", 16, 32),
        ("layer3_1", 32, 64),
        ("layer3_2", 32, 64),
    ):
        for block in range(blocks):
            inputs = before if block == 0 else channels
            convolution(model, f"{layer}.{block}.conv1", channels, inputs, 3, 3)
            norm(model, f"{layer}.{block}.bn1", channels)
            convolution(model, f"{layer}.{block}.conv2", channels, channels, 3, 3)
            norm(model, f"{layer}.{block}.bn2", channels)
            if inputs != channels:
                convolution(model, f"{layer}.{block}.downsample.0", channels, inputs, 1, 1)
                norm(model, f"{layer}.{block}.downsample.1", channels)
    linear(model, "classfier3_1")
    linear(model, "classfier3_2")
    fusion: Weights = {}
    linear(fusion, "fc2")
    convolution(fusion, "conv1", 128, 1, 3, 3)
    norm(fusion, "bn1", 128)
    convolution(fusion, "conv1_1", 64, 128, 1, 1)
    norm(fusion, "bn1_1", 64)
    return model, fusion


def official_outputs(model: Weights, fusion: Weights, images: Tensor) -> dict[str, Tensor]:
    """The official forward pass, written as functions of the weights by their names. images:
    normalized [n, 3, 32, 32]."""

    def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias)

    def layer(name: str, x: Tensor) -> Tensor:
        block = 0
        while f"{name}.{block}.conv1.weight" in model:
            own, stride = f"{name}.{block}", 2 if block == 0 and name != "layer1" else 1
            out = functional.conv2d(x, model[f"{own}.conv1.weight"], stride=stride, padding=1)
            out = functional.conv2d(
                norm(model, f"{own}.bn1", out).relu(), model[f"{own}.conv2.weight"], padding=1
            )
            if f"{own}.downsample.0.weight" in model:
                x = norm(
                    model,
                    f"{own}.downsample.1",
                    functional.conv2d(x, model[f"{own}.downsample.0.weight"], stride=stride),
                )
            x = (norm(model, f"{own}.bn2", out) + x).relu()
            block += 1
        return x

    def classify(weights: Weights, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            functional.avg_pool2d(x, 8).flatten(1), weights[f"{name}.weight"], weights[f"{name}.bias"]
        )

    shared = layer(
        "layer2",
        layer(
            "layer1", norm(model, "bn1", functional.conv2d(images, model["conv1.weight"], padding=1)).relu()
        ),
    )
    first, second = layer("layer3_1", shared), layer("layer3_2", shared)
    x = functional.conv2d(torch.cat([first, second], 1), fusion["conv1.weight"], padding=1, groups=128)
    x = functional.conv2d(norm(fusion, "bn1", x).relu(), fusion["conv1_1.weight"])
    return {
        "branch0": classify(model, "classfier3_1", first),
        "branch1": classify(model, "classfier3_2", second),
        "fused": classify(fusion, "fc2", norm(fusion, "bn1_1", x).relu()),
    }


@pytest.fixture
def save_official(tmp_path: Path) -> Callable[..., list[str]]:
    """`save_official(model, fusion)` -> the two paths, saved as the official code does."""

    def save(model: Weights, fusion: Weights, **extra: Any) -> list[str]:
        for name, weights in (("Model", model), ("Module", fusion)):
            content = {
                "epoch": 299,
                "state_dict": weights,
                "optimizer": {"state": {}, "param_groups": [{"lr": 0.001}]},
            } | extra
            torch.save(content, tmp_path / f"{name}_299.pth")
        return [str(tmp_path / "Model_299.pth"), str(tmp_path / "Module_299.pth")]

    return save


@pytest.mark.parametrize("blocks", [3, 5])
def test_an_official_checkpoint_becomes_a_run(
    blocks: int,
    save_official: Callable[..., list[str]],
    hues: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, fusion = official_weights(blocks)
    out = tmp_path / "imported"
    assert main([*save_official(model, fusion), "--data", str(hues), "--out", str(out)]) == 0
    assert f"ffl-export {out}" in capsys.readouterr().out

    run = load_run(out)
    network, epoch, _ = load_network(run)
    assert epoch == 300
    assert network.config.branches == (f"resnet{6 * blocks + 2}",) * 2
    own = network.state_dict()
    values = sorted([*model.values(), *fusion.values()], key=lambda value: value.flatten().tolist())
    assert len(own) == len(values)
    for found, wanted in zip(
        sorted(own.values(), key=lambda value: value.flatten().tolist()), values, strict=True
    ):
        assert torch.equal(found, wanted)

    images, labels, fused = run.reference("best", "fused")
    assert images.shape[1:] == (32, 32, 3)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = torch.tensor([129.3, 124.1, 112.4]), torch.tensor([68.2, 65.4, 70.4])
    normalized = (pixels - mean[:, None, None]) / std[:, None, None]
    wanted = official_outputs(model, fusion, normalized)
    wanted["ensemble"] = (wanted["branch0"] + wanted["branch1"]) / 2
    for name, logits in wanted.items():
        scale = float(logits.std())
        assert scale > 0.01
        np.testing.assert_allclose(run.reference("best", name)[2], logits.numpy(), rtol=0, atol=1e-4 * scale)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"]["fused"] == pytest.approx((fused.argmax(1) == labels).mean(), abs=1e-6)
    assert (summary["epochs"], summary["classes"]) == (300, ["blue", "green", "red"])
    assert run.mean == (129.3, 124.1, 112.4)
    assert "imported Model_299.pth" in run.config.toolchain


def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(
    save_official: Callable[..., list[str]], hues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, fusion = official_weights(3)
    out = tmp_path / "imported"
    flags = ["--data", str(hues), "--out", str(out)]

    def complaint(*arguments: str, code: int = 2) -> str:
        assert run_command(main, [*arguments, *flags]) == code
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert not out.exists()
        return message

    paths = save_official(model, fusion)
    assert "no file" in complaint(paths[0], str(tmp_path / "Module_1.pth"))
    assert "it looks like the fusion module: give Model_N.pth first" in complaint(paths[1], paths[0])
    assert "no fusion module" in complaint(paths[0], paths[0])
    torch.save({"epoch": 5, "state_dict": fusion}, tmp_path / "Module_5.pth")
    assert "is of epoch 299 and" in complaint(paths[0], str(tmp_path / "Module_5.pth"))
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    assert "can be read without executing code" in complaint(str(tmp_path / "noise.pth"), paths[1])
    assert "can be read without executing code" in complaint(*save_official(model, fusion, hook=Path))
    assert "a weight 'layer4.0.bias'" in complaint(
        *save_official({**model, "layer4.0.bias": torch.ones(1)}, fusion)
    )
    lacking = {name: value for name, value in model.items() if name != "layer2.1.bn2.running_var"}
    assert "trunk.2.1.bn2.running_var missing" in complaint(*save_official(lacking, fusion), code=1)
    assert "no backbone 'resnet26'" in complaint(*save_official(*official_weights(4)))
    wide = {**model, "classfier3_1.weight": torch.randn(10, 64)}
    assert "tells 10 classes apart" in complaint(*save_official(wide, fusion))


def test_an_existing_folder_is_not_overwritten(
    save_official: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = save_official(*official_weights(3))
    assert run_command(main, [*paths, "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
