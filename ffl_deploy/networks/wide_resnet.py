"""Wide residual networks (Zagoruyko and Komodakis 2016), of pre-activation blocks without dropout."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice with a shortcut (He et al. 2016b); where shape changes,
    a 1x1 convolution of the activated input."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or channels_in != channels
        self.downsample = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = functional.relu(self.bn1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = functional.relu(self.bn2(self.conv1(activated)), inplace=True)
        return self.conv2(out) + shortcut


def wide_resnet(depth: int, factor: int) -> list[nn.Module]:
    """WRN-depth-factor: three groups of n blocks with 16, 32 and 64 times `factor` channels.

    The paper counts depth = 6n+4 (the shortcut convolutions included); WRN-20-8 of the distillation
    literature can only be counted as 6n+2 (as ResNets are). Both are n = (depth - 2) // 6, so wrn20_8 is the
    paper's WRN-22-8. -> stem, then one stage per resolution; the last map is [n, 64 factor, h/4, w/4].
    """
    blocks = (depth - 2) // 6
    stages: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels_in = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        channels = width * factor
        first = PreActivationBlock(channels_in, channels, stride)
        stages.append(
            nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(blocks - 1)))
        )
        channels_in = channels
    stages[-1] = nn.Sequential(*stages[-1].children(), nn.BatchNorm2d(channels_in), nn.ReLU(inplace=True))
    return stages
