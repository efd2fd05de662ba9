"""The fusion module (Kim et al. 2019, section III-A):
the branches' last feature maps -> one fused classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.backbones import initialize

Shape = tuple[int, int, int]
"""Channels, height, width of a feature map."""


def regressor(shape: Shape, height: int, width: int) -> nn.Module:
    """-> the convolution that brings a map of `shape` to `height` x `width` (a FitNets regressor,
    Romero et al. 2015).

    Unpadded, with the largest stride whose windows still cover the whole map: 16 -> 8 is 2x2 by 2,
    8 -> 7 is 2x2 by 1.
    """
    channels, from_height, from_width = shape
    if (from_height, from_width) == (height, width):
        return nn.Identity()
    stride = (from_height // height, from_width // width)
    kernel = (from_height - (height - 1) * stride[0], from_width - (width - 1) * stride[1])
    return nn.Conv2d(channels, channels, kernel, stride, bias=False)


class Align(nn.Module):
    """Feature maps of different resolution -> the smallest of these resolutions."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        height, width = min(shape[1] for shape in shapes), min(shape[2] for shape in shapes)
        self.regressors = nn.ModuleList(regressor(shape, height, width) for shape in shapes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [regress(feature_map) for regress, feature_map in zip(self.regressors, maps, strict=True)]


class FusionModule(nn.Module):
    """Concatenation -> 3x3 depthwise -> BN -> ReLU -> 1x1 pointwise to `width` -> BN -> ReLU ->
    pooling -> linear.

    shapes: (C, h, w) of each branch's last feature map; width: N of the paper,
    by default the first branch's channels.
    """

    def __init__(self, shapes: Sequence[Shape], classes: int, width: int | None = None) -> None:
        super().__init__()
        channels = sum(shape[0] for shape in shapes)
        width = width or shapes[0][0]
        self.align = Align(shapes)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)
        initialize(self)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: the branches' [n, C_k, h_k, w_k] -> the fused map [n, N, h, w]."""
        x = functional.relu(self.bn1(self.depthwise(torch.cat(self.align(maps), dim=1))), inplace=True)
        return functional.relu(self.bn2(self.pointwise(x)), inplace=True)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: the branches' [n, C_k, h_k, w_k] -> fused logits [n, classes]."""
        return self.classifier(pool(self.features(maps)))


class Combination(nn.Module):
    """Sum (DualNet, Hou et al. 2017) or mean of the maps -> pooling -> linear:
    the ablations of the fusion module."""

    def __init__(self, shapes: Sequence[Shape], classes: int, kind: str) -> None:
        super().__init__()
        channels = {shape[0] for shape in shapes}
        if len(channels) != 1:
            raise UsageError(
                f"{kind} fusion adds feature maps, which needs branches of equal channels, not "
                f"{', '.join(str(shape[0]) for shape in shapes)}; use the fusion module (--method ffl) for "
                "these branches."
            )
        self.scale = 1.0 if kind == "sum" else 1.0 / len(shapes)
        self.align = Align(shapes)
        self.classifier = nn.Linear(shapes[0][0], classes)
        initialize(self)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: the branches' [n, C, h_k, w_k] -> [n, C, h, w]."""
        return torch.stack(self.align(maps)).sum(dim=0) * self.scale

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(pool(self.features(maps)))


def build_fusion(
    kind: str, shapes: Sequence[Shape], classes: int, width: int | None = None
) -> FusionModule | Combination:
    """kind: "module", "sum" or "mean"; see the classes."""
    return FusionModule(shapes, classes, width) if kind == "module" else Combination(shapes, classes, kind)


def pool(feature_map: Tensor) -> Tensor:
    """Global average pooling, [n, C, h, w] -> [n, C]."""
    return feature_map.mean(dim=(2, 3))
