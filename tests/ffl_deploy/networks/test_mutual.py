"""MutualNetwork: what is shared, what each classifier sees, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.fusion import pool
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig

Make = Callable[..., MutualNetwork]


@pytest.mark.parametrize("count", [2, 3])
def test_every_branch_and_the_fusion_give_logits(make_network: Make, count: int) -> None:
    outputs = make_network(*["resnet20"] * count)(torch.randn(4, 3, 16, 16))
    assert [tuple(logits.shape) for logits in outputs.branches] == [(4, 3)] * count
    assert outputs.fused is not None
    assert outputs.fused.shape == (4, 3)
    assert [tuple(feature_map.shape) for feature_map in outputs.features] == [(4, 64, 4, 4)] * count
    assert list(outputs.classifiers()) == ["fused", "ensemble", *(f"branch{k}" for k in range(count))]
    torch.testing.assert_close(outputs.classifiers()["ensemble"], sum(outputs.branches) / count)


@pytest.mark.parametrize(("shared", "trunk"), [(None, 3), (0, 0), (1, 1), (3, 3)])
def test_branches_of_one_architecture_share_their_low_stages(
    make_network: Make, shared: int | None, trunk: int
) -> None:
    network = make_network("resnet20", "resnet20", "resnet20", shared_stages=shared)
    assert len(network.trunk) == trunk
    assert [len(branch) for branch in network.branches] == [4 - trunk] * 3
    stages = [
        tuple(stage.parameters())
        for stage in (*network.trunk, *(stage for branch in network.branches for stage in branch))
    ]
    tensors = [parameter.data_ptr() for stage in stages for parameter in stage]
    assert len(tensors) == len(set(tensors)), "a weight is stored once, whether shared or not"
    assert len(stages) == trunk + 3 * (4 - trunk)


def test_a_shared_weight_is_one_tensor_that_every_branch_learns_through(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20", fusion=None)
    weight = network.trunk[0][0].weight
    images, gradients = torch.randn(2, 3, 16, 16), []
    for choose in (lambda z: z[0].sum(), lambda z: z[1].sum(), lambda z: z[0].sum() + z[1].sum()):
        network.zero_grad()
        choose(network(images).branches).backward()
        gradients.append(weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2], rtol=1e-3, atol=1e-4)


def test_different_architectures_share_nothing(make_network: Make) -> None:
    network = make_network("resnet20", "wrn16_2")
    assert len(network.trunk) == 0
    outputs = network(torch.randn(2, 3, 16, 16))
    assert [feature_map.shape[1] for feature_map in outputs.features] == [64, 128]
    with pytest.raises(UsageError, match="share no stages"):
        make_network("resnet20", "wrn16_2", shared_stages=1)


@pytest.mark.parametrize("shared", [-1, 4, 9])
def test_a_split_point_outside_the_stages_is_refused(make_network: Make, shared: int) -> None:
    with pytest.raises(UsageError, match=f"--shared-stages can be 0 to 3, not {shared}"):
        make_network("resnet20", "resnet20", shared_stages=shared)


def test_branches_start_from_different_weights() -> None:
    network = MutualNetwork(NetworkConfig(("resnet20", "resnet20"), 3, 16, 16))
    first, second = (branch[0][0].conv1.weight for branch in network.branches)
    assert not torch.equal(first, second)


def test_the_gradient_into_the_trunk_can_be_divided_by_the_number_of_branches(make_network: Make) -> None:
    images, found = torch.randn(2, 3, 16, 16).double(), []
    for scaled in (False, True):
        network = make_network(
            "resnet20", "resnet20", "resnet20", fusion=None, scale_trunk_gradient=scaled
        ).double()
        torch.stack(network(images).branches).square().sum().backward()
        found.append(
            (network.trunk[0][0].weight.grad.clone(), network.branches[0][0][0].conv1.weight.grad.clone())
        )
    (trunk, branch), (scaled_trunk, scaled_branch) = found
    torch.testing.assert_close(scaled_trunk * 3, trunk, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_branch, branch, rtol=0, atol=0)


def test_the_heads_work_on_pooled_features(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20", aggregator="gate")
    outputs = network(torch.randn(5, 3, 16, 16))
    for head, feature_map, logits in zip(network.heads, outputs.features, outputs.branches, strict=True):
        torch.testing.assert_close(pool(feature_map) @ head.weight.T + head.bias, logits)
    assert list(outputs.classifiers()) == ["fused", "gated", "ensemble", "branch0", "branch1"]


def test_attention_gives_targets_for_peers_and_no_classifier(make_network: Make) -> None:
    outputs = make_network("resnet20", "resnet20", "resnet20", fusion=None, aggregator="attention")(
        torch.randn(5, 3, 16, 16)
    )
    assert outputs.aggregated is not None
    assert outputs.aggregated.shape == (5, 2, 3)
    assert list(outputs.classifiers()) == ["ensemble", "branch0", "branch1", "branch2"]


def test_an_exit_stands_on_the_trunk_and_changes_no_other_classifier(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20", trunk_exit=True).eval()
    images = torch.randn(5, 3, 16, 16)
    before = network(images).classifiers()
    assert list(before) == ["fused", "ensemble", "branch0", "branch1", "trunk"]
    with torch.no_grad():
        for branch in network.branches:
            branch[0][0].conv1.weight.mul_(2)
    after = network(images).classifiers()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["fused", "ensemble", "branch0", "branch1"]
    with pytest.raises(UsageError, match="these share none"):
        make_network("resnet20", "wrn16_2", trunk_exit=True)


def test_a_single_branch_has_no_ensemble(make_network: Make) -> None:
    network = make_network("resnet20", fusion=None)
    assert list(network(torch.randn(2, 3, 16, 16)).classifiers()) == ["branch0"]
    assert len(network.trunk) == 0


def test_images_that_are_too_small_are_refused(make_network: Make) -> None:
    with pytest.raises(UsageError, match=r"images of 8x8 .* larger --image-size"):
        make_network("vgg16_bn", "vgg16_bn", size=8)
