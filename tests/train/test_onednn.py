"""oneDNN's fault in 1x1 convolutions with a stride on RGB does not reach a run: the gradients are right, and
nothing dies. In processes of their own, since what is to be avoided is SIGSEGV, a damaged heap or a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.onednn import in_default_order, keep_off_faulty_kernels

ROOT = Path(__file__).parents[2]

GRADIENTS = """
import copy, sys, torch
from torch import nn
from train.onednn import in_default_order, keep_off_faulty_kernels
torch.manual_seed(0)
stem, head = nn.Conv2d(3, 48, 1, stride=2), nn.Conv2d(48, 8, 3)
net = nn.Sequential(stem, nn.BatchNorm2d(48), nn.ReLU(), head)
net = net.to(memory_format=torch.channels_last)
exact = copy.deepcopy(net).double().to(memory_format=torch.contiguous_format)
in_default_order(net) if sys.argv[1] == "default" else keep_off_faulty_kernels(net)
images = torch.randn(16, 32, 32, 3)
for turn in range(10):
    net.zero_grad()
    exact.zero_grad()
    net(images.permute(0, 3, 1, 2)).square().sum().backward()
    exact(images.double().permute(0, 3, 1, 2).contiguous()).square().sum().backward()
    for (name, ours), (_, theirs) in zip(net.named_parameters(), exact.named_parameters()):
        off = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-12)
        # a bias in front of batch normalisation has a gradient of rounding alone
        assert off < 1e-3 or name == "0.bias", (turn, name, float(off))
print("right")
"""


FOLDED = GRADIENTS.replace(
    "net(images.permute(0, 3, 1, 2))", "folded(prepared(net, images.permute(0, 3, 1, 2)))"
).replace(
    "for turn",
    """from ffl_deploy.networks.quantization import ActivationQuantizer, FoldedLayer, prepared
def layer(convolution, norm):
    quantizer = ActivationQuantizer()
    quantizer.samples = []  # folded, and not rounded: gradients can be compared
    return FoldedLayer(convolution, norm, quantizer)
net.eval(), exact.eval()
folded = nn.Sequential(layer(net[0], net[1]), net[2], layer(net[3], None))
for turn""",
    1,
)
"""The same with the layers that quantization-aware training computes, which call no module."""


def child(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("order", ["around", "default"])
@pytest.mark.parametrize("script", [GRADIENTS, FOLDED], ids=["module", "folded"])
def test_gradients_are_those_of_fp64(script: str, order: str) -> None:
    """On AVX2 those of the stem are wrong by a third without it, where the process lives."""
    ended = child("-c", script, order)
    assert (ended.returncode, ended.stdout.strip()) == (0, "right"), ended.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--no-channels-last",)])
def test_a_network_with_such_a_stem_trains(flags: tuple[str, ...], hues: Path, tmp_path: Path) -> None:
    ended = child(
        *("-m", "train.run", "--data", str(hues), "--image-size", "32", "--branches", "timm:mobileone_s0"),
        *(
            "--method",
            "vanilla",
            "--epochs",
            "1",
            "--batch-size",
            "14",
            "--precision",
            "fp32",
            "--device",
            "cpu",
        ),
        *("--threads", "1", "--quiet", "--out", str(tmp_path / "run"), *flags),
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").is_file()


def test_only_convolutions_that_can_be_hit_are_changed() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 1, stride=2),
        torch.nn.Conv2d(3, 8, 1),
        torch.nn.Conv2d(3, 8, 3, stride=2),
        torch.nn.Conv2d(64, 8, 1, stride=2),
        torch.nn.Conv2d(32, 32, 1, stride=2, groups=32),
    )
    assert keep_off_faulty_kernels(network) == ["0", "4"]
    names = list(network.state_dict())
    in_default_order(network)
    assert list(network.state_dict()) == names
