"""DenseNets for small images (Huang et al. 2017, section 3), without bottlenecks or compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DenseLayer(nn.Module):
    """BN-ReLU-3x3 convolution to `growth` channels, appended to its input."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.bn(x), inplace=True))], dim=1)


def densenet(depth: int, growth: int) -> list[nn.Module]:
    """DenseNet-`depth` with growth rate `growth`: depth = 3n+4, n layers in each of three blocks,
    16 channels to start.

    -> stem, then one stage per resolution (its transition first);
    for DenseNet-40-12 the last map is [n, 448, h/4, w/4].
    """
    layers = (depth - 4) // 3
    channels = 16
    stages: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        parts: list[nn.Module] = []
        if block:
            parts += [
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels, 1, bias=False),
            ]
            parts += [nn.AvgPool2d(2)]
        parts += [DenseLayer(channels + index * growth, growth) for index in range(layers)]
        channels += layers * growth
        stages.append(nn.Sequential(*parts))
    stages[-1] = nn.Sequential(*stages[-1].children(), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return stages
