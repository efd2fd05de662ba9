"""ResNets for small images (He et al. 2016, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016); a 1x1 convolution where shape changes,
    as FFL's code has it."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        # In place: batch normalisation keeps its input for the backward pass, not its output,
        # so only memory traffic is lost.
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(out)).add_(shortcut), inplace=True)


def cifar_resnet(depth: int) -> list[nn.Module]:
    """ResNet of `depth` = 6n+2 layers: 16, 32 and 64 channels.

    -> stem, then one stage per resolution; the last map is [n, 64, h/4, w/4].
    """
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
