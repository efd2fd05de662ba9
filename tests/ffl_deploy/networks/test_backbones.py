"""The project's own backbones against the numbers that their papers publish."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.backbones import backbone_names, build_backbone, feature_shape

# name -> (millions of parameters as published for CIFAR-10, decimals of that number,
# channels of the last map)
PUBLISHED = {
    # the same with n = 1 and 2, as the distillation literature uses them (Tian et al. 2020)
    "resnet8": (0.08, 2, 64),
    "resnet14": (0.17, 2, 64),
    "resnet20": (0.27, 2, 64),  # He et al. 2016, table 6
    "resnet32": (0.46, 2, 64),
    "resnet44": (0.66, 2, 64),
    "resnet56": (0.85, 2, 64),
    "resnet110": (1.7, 1, 64),
    "wrn16_2": (0.7, 1, 128),  # Zagoruyko and Komodakis 2016; 16-2 as the distillation literature quotes it
    "wrn20_8": (17.2, 1, 512),  # their WRN-22-8, see wide_resnet.py
    "wrn28_10": (36.5, 1, 640),
    "wrn40_2": (2.2, 1, 128),
    "vgg16_bn": (15, 0, 512),  # Li et al. 2017, table 1: 1.5 x 10^7
    "densenet40_12": (1.0, 1, 448),  # Huang et al. 2017, table 2
}
LARGE = ("wrn20_8", "wrn28_10")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_papers(name: str) -> None:
    millions, decimals, channels = PUBLISHED[name]
    network = nn.Sequential(*build_backbone(name, 32, 32).stages)
    total = count(network) + channels * 10 + 10  # with the head for 10 classes
    # He's shortcuts have no weights; the official FFL code's have, and so have these.
    shortcuts = sum(count(module) for key, module in network.named_modules() if key.endswith("downsample"))
    assert round((total - (shortcuts if name.startswith("resnet") else 0)) / 1e6, decimals) == millions


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(LARGE)))
def test_the_last_map_has_the_right_shape_at_several_sizes(name: str) -> None:
    network = nn.Sequential(*build_backbone(name, 32, 32).stages)
    divisor = 16 if name == "vgg16_bn" else 4
    for side in (16, 32, 40):
        assert feature_shape(network, side, side) == (PUBLISHED[name][2], side // divisor, side // divisor)


def test_every_name_is_tested() -> None:
    assert set(backbone_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - set(LARGE)))
def test_resolution_falls_at_stages_and_every_stage_learns(name: str) -> None:
    stages, x, sides = build_backbone(name, 32, 32).stages, torch.randn(2, 3, 32, 32), []
    for stage in stages:
        x = stage(x)
        sides.append(x.shape[2])
    assert sides == ([32, 16, 8, 4, 2] if name == "vgg16_bn" else [32, 32, 16, 8])
    assert (x >= 0).all(), "ends in an activation, as the fusion module and class activation maps expect"
    x.square().sum().backward()
    for stage in stages:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stage.parameters())


@pytest.mark.parametrize("name", ["resnet32", "wrn40_2"])
def test_depth_is_what_the_name_says(name: str) -> None:
    """3x3 convolutions, plus what each paper counts beside them: the classifier, or the three shortcuts."""
    network = nn.Sequential(*build_backbone(name, 32, 32).stages)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    three = sum(module.kernel_size == (3, 3) for module in convolutions)
    assert three + {"resnet32": 1, "wrn40_2": len(convolutions) - three}[name] == int(
        "".join(filter(str.isdigit, name))[:2]
    )


def test_initialisation_is_he_by_fan_out() -> None:
    layer = build_backbone("resnet20", 32, 32).stages[3][1].conv1
    assert layer.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet21", "Did you mean 'resnet20'?|Did you mean 'resnet32'?"),
        ("wrn16-2", "Did you mean 'wrn16_2'?"),
        ("wrn16_8", "Known: "),
        ("resnet320", "Known: resnet8, .*densenet40_12, torchvision:NAME, timm:NAME"),
        ("", "there is no backbone ''"),
        ("hub:resnet18", "there is no backbone 'hub:resnet18'"),
    ],
)
def test_an_unknown_name_is_met_with_the_known_ones(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_backbone(name, 32, 32)


def test_feature_shape_leaves_statistics_and_mode_alone() -> None:
    network = nn.Sequential(*build_backbone("resnet20", 32, 32).stages).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    feature_shape(network, 32, 32)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
