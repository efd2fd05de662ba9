"""The fusion module against its formula, its alignment of sizes, and its ablations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.fusion import Combination, FusionModule, build_fusion, regressor


@pytest.mark.parametrize(
    ("channels", "width", "classes"), [((64, 64), 64, 100), ((64, 128), 32, 10), ((16, 8, 24), 5, 3)]
)
def test_parameters_follow_the_formula(channels: tuple[int, ...], width: int, classes: int) -> None:
    fusion = FusionModule([(c, 8, 8) for c in channels], classes, width)
    total = sum(channels)
    depthwise, bn1, pointwise, bn2, linear = (
        9 * total,
        2 * total,
        total * width,
        2 * width,
        width * classes + classes,
    )
    assert sum(p.numel() for p in fusion.parameters()) == depthwise + bn1 + pointwise + bn2 + linear
    assert fusion.depthwise.groups == total


def test_the_width_is_the_first_branchs_channels_unless_given() -> None:
    shapes = [(64, 8, 8), (128, 8, 8)]
    assert FusionModule(shapes, 10).classifier.in_features == 64
    assert FusionModule(shapes, 10, 200).classifier.in_features == 200


def test_the_module_is_its_equation_in_numpy() -> None:
    """Concatenation, depthwise 3x3, BN, ReLU, pointwise, BN, ReLU, average, linear (Kim et al. 2019,
    III-A)."""
    torch.manual_seed(0)
    fusion = FusionModule([(2, 4, 4), (3, 4, 4)], classes=3, width=4).double()
    for bn in (fusion.bn1, fusion.bn2):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    fusion.eval()
    first, second = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    w = {name: value.detach().numpy() for name, value in fusion.state_dict().items()}

    def normalized(x: np.ndarray, name: str) -> np.ndarray:
        scale = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
        return (x - w[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][
            :, None, None
        ]

    x = np.pad(np.concatenate([first.numpy(), second.numpy()], axis=1), ((0, 0), (0, 0), (1, 1), (1, 1)))
    depthwise = np.zeros((2, 5, 4, 4))
    for row in range(3):
        for column in range(3):
            depthwise += (
                x[:, :, row : row + 4, column : column + 4]
                * w["depthwise.weight"][:, 0, row, column][:, None, None]
            )
    hidden = np.maximum(normalized(depthwise, "bn1"), 0)
    fused = np.maximum(
        normalized(np.einsum("oc,nchw->nohw", w["pointwise.weight"][:, :, 0, 0], hidden), "bn2"), 0
    )
    logits = fused.mean(axis=(2, 3)) @ w["classifier.weight"].T + w["classifier.bias"]

    np.testing.assert_allclose(fusion([first, second]).detach().numpy(), logits, rtol=1e-10)
    assert not np.allclose(fusion([first, second]).detach().numpy(), np.roll(logits, 1, axis=0))


def test_maps_are_joined_in_the_order_of_the_branches() -> None:
    fusion = FusionModule([(3, 4, 4), (3, 4, 4)], 2).eval()
    first, second = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    assert not torch.allclose(fusion([first, second]), fusion([second, first]))


SIZES = [1, 2, 3, 4, 5, 7, 8, 14, 16, 32]


@pytest.mark.parametrize(
    ("large", "small"), [(large, small) for large in SIZES for small in SIZES if small <= large]
)
def test_regressors_reach_every_smaller_size_and_see_the_whole_map(large: int, small: int) -> None:
    layer = regressor((1, large, large), small, small)
    if large == small:
        assert isinstance(layer, nn.Identity)
        return
    assert isinstance(layer, nn.Conv2d)
    nn.init.ones_(layer.weight)
    image = torch.zeros(1, 1, large, large, requires_grad=True)
    out = layer(image)
    assert out.shape == (1, 1, small, small)
    out.sum().backward()
    assert (image.grad > 0).all(), "every position of the map takes part"


def test_rectangles_are_aligned_per_side() -> None:
    assert regressor((4, 8, 16), 8, 5)(torch.zeros(2, 4, 8, 16)).shape == (2, 4, 8, 5)


def test_maps_of_different_resolution_and_channels_are_fused_at_the_smallest() -> None:
    shapes = [(8, 16, 16), (4, 7, 7), (6, 8, 8)]
    fusion = FusionModule(shapes, 10)
    maps = [torch.randn(2, *shape) for shape in shapes]
    assert [tuple(aligned.shape) for aligned in fusion.align(maps)] == [
        (2, 8, 7, 7),
        (2, 4, 7, 7),
        (2, 6, 7, 7),
    ]
    assert fusion.features(maps).shape == (2, 8, 7, 7)
    assert fusion(maps).shape == (2, 10)


@pytest.mark.parametrize(("kind", "scale"), [("sum", 1.0), ("mean", 1 / 3)])
def test_sum_and_mean_add_the_maps(kind: str, scale: float) -> None:
    fusion = build_fusion(kind, [(4, 8, 8)] * 3, 5)
    maps = [torch.randn(2, 4, 8, 8) for _ in range(3)]
    torch.testing.assert_close(fusion.features(maps), (maps[0] + maps[1] + maps[2]) * scale)
    assert sum(p.numel() for p in fusion.parameters()) == 4 * 5 + 5


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_sum_and_mean_refuse_unequal_channels(kind: str) -> None:
    with pytest.raises(
        UsageError,
        match=f"{kind} fusion adds feature maps.* equal channels, not 64, 128; use the fusion module",
    ):
        Combination([(64, 8, 8), (128, 8, 8)], 10, kind)
