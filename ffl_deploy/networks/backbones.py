"""Backbones: a name -> an ordered list of stages that ends in a feature map.

Sharing low-level layers between branches is then slicing that list. Heads are not part of a backbone: every
classifier of this project is global average pooling and one linear layer on the last feature map.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.host import out_of_memory
from ffl_deploy.networks.densenet import densenet
from ffl_deploy.networks.resnet import cifar_resnet
from ffl_deploy.networks.vgg import vgg16_bn
from ffl_deploy.networks.wide_resnet import wide_resnet


@dataclass(frozen=True)
class Backbone:
    """`stages` in order; the first takes normalised images [n, 3, h, w],
    the last gives the feature map [n, C, h', w']."""

    name: str
    stages: tuple[nn.Module, ...]


# pattern -> (what to call with the pattern's numbers, the names to show)
_FAMILIES: dict[str, tuple[Callable[..., list[nn.Module]], tuple[str, ...]]] = {
    r"resnet(8|14|20|32|44|56|110)": (
        cifar_resnet,
        ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    ),
    r"wrn(16|40)_(2)|wrn(20)_(8)|wrn(28)_(10)": (wide_resnet, ("wrn16_2", "wrn20_8", "wrn28_10", "wrn40_2")),
    r"vgg16_bn": (vgg16_bn, ("vgg16_bn",)),
    r"densenet(40)_(12)": (densenet, ("densenet40_12",)),
}


def backbone_names() -> list[str]:
    """-> the names of this project's own backbones."""
    return [name for _, names in _FAMILIES.values() for name in names]


def is_library_name(name: str) -> bool:
    """-> whether `name` is `torchvision:NAME` or `timm:NAME`."""
    return name.partition(":")[0] in ("torchvision", "timm") and ":" in name


def build_backbone(
    name: str,
    height: int,
    width: int,
    pretrained: bool | Path = False,
    stochastic_depth: float | None = None,
) -> Backbone:
    """-> a freshly initialised backbone; `torchvision:`
    and `timm:` ones have their library's own initialisation.

    height, width: of the images; only networks that are built for one size (windowed attention) depend on
    them. pretrained: start `torchvision:` and `timm:` backbones from their published weights, kept in that
    folder. stochastic_depth: how often training skips their last block; their library's own if None. Raises
    UsageError that names the known ones, or says why this one cannot be built.
    """
    if is_library_name(name):
        # torchvision and timm only where they are asked for
        from ffl_deploy.networks.library import library_stages

        return Backbone(name, tuple(library_stages(name, height, width, pretrained, stochastic_depth)))
    if stochastic_depth is not None:
        raise UsageError(
            f"--stochastic-depth is for torchvision: and timm: branches; {name} has none: leave it out."
        )
    for pattern, (build, _) in _FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            stages = build(*(int(number) for number in match.groups() if number))
            for stage in stages:
                initialize(stage)
            return Backbone(name, tuple(stages))
    raise UsageError(f"there is no backbone {name!r}. {known_backbones(name)}")


def known_backbones(name: str) -> str:
    """-> what can be named instead of `name`: a library's network of that very name comes first."""
    from ffl_deploy.networks.library import LIBRARIES, library_names

    known = [*backbone_names(), "torchvision:NAME", "timm:NAME"]
    for library in LIBRARIES:
        with contextlib.suppress(UsageError):  # not installed
            if name in library_names(library):
                return f"Did you mean '{library}:{name}'? Known: {', '.join(known)}."
    return choices_sentence(name, known)


def initialize(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions,
    ones and zeros for batch normalisation (as FFL's official code)."""
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
    """-> (channels, height, width) of the map that `stages` give for images of `height` x `width`.
    Raises UsageError."""
    was_training = stages.training
    stages.eval()
    try:
        shape = stages(torch.zeros(1, 3, height, width)).shape
    # what the libraries raise for a size they cannot take
    except (RuntimeError, ValueError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(
            f"images of {height}x{width} do not suit this backbone ({error}); use a larger --image-size."
        ) from error
    finally:
        stages.train(was_training)
    return int(shape[1]), int(shape[2]), int(shape[3])
