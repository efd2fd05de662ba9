"""Backbones: a name -> an ordered list of stages that ends in a feature map.

Sharing low-level layers between branches is then slicing that list. Heads are not part of a backbone: every
classifier of this project is global average pooling and one linear layer on the last feature map.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffl_deploy.command import choices_sentence
from ffl_deploy.errors import UsageError


@dataclass(frozen=True)
class Backbone:
    """`stages` in order; the first takes normalised images [n, 3, h, w], the last gives the feature map [n, C, h', w']."""

    name: str
    stages: tuple[nn.Module, ...]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016); a 1x1 convolution where shape changes, as FFL's code has it."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + shortcut)


def cifar_resnet(depth: int) -> list[nn.Module]:
    """ResNet of `depth` = 6n+2 layers for small images (He et al. 2016, section 4.2): 16, 32 and 64 channels."""
    blocks = (depth - 2) // 6
    stages: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    ]
    channels_in = 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        first = BasicBlock(channels_in, channels, stride)
        stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1))))
        channels_in = channels
    return stages


# pattern -> (what to call with the pattern's numbers, the names to show)
_FAMILIES: dict[str, tuple[Callable[..., list[nn.Module]], tuple[str, ...]]] = {
    r"resnet(20|32|44|56|110)": (cifar_resnet, ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")),
}


def backbone_names() -> list[str]:
    """-> the names of this project's own backbones."""
    return [name for _, names in _FAMILIES.values() for name in names]


def build_backbone(name: str) -> Backbone:
    """-> a freshly initialised backbone. Raises UsageError that names the known ones."""
    for pattern, (build, _) in _FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            stages = build(*(int(number) for number in match.groups()))
            for stage in stages:
                initialise(stage)
            return Backbone(name, tuple(stages))
    raise UsageError(f"there is no backbone {name!r}. {choices_sentence(name, backbone_names())}")


def initialise(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, ones and zeros for batch normalisation (as FFL's official code)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def feature_shape(stages: nn.Module, height: int, width: int) -> tuple[int, int, int]:
    """-> (channels, height, width) of the map that `stages` give for images of `height` x `width`. Raises UsageError."""
    was_training = stages.training
    stages.eval()
    try:
        shape = stages(torch.zeros(1, 3, height, width)).shape
    except RuntimeError as error:
        raise UsageError(f"images of {height}x{width} are too small for this backbone; use a larger --image-size.") from error
    finally:
        stages.train(was_training)
    return int(shape[1]), int(shape[2]), int(shape[3])
