"""VGG-16 with batch normalisation for small images (Simonyan and Zisserman 2015; no hidden linear layers)."""

from __future__ import annotations

from torch import nn

# output channels, by resolution
_CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16_bn() -> list[nn.Module]:
    """-> one stage per resolution; the last map is [n, 512, h/16, w/16].

    Pooling opens a stage instead of closing one, and the fifth is the classifier's global pooling: 32x32
    images end in 2x2 maps, which the fusion module's 3x3 convolution can still work on.
    """
    stages: list[nn.Module] = []
    channels_in = 3
    for widths in _CONVOLUTIONS:
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
        for channels in widths:
            convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)  # BN has the bias
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            channels_in = channels
        stages.append(nn.Sequential(*layers))
    return stages
