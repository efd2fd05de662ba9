"""Deployable targets: their outputs are the network's, and they hold nothing that they do not need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.targets import build_target, target_names

Make = Callable[..., MutualNetwork]
NETWORKS = {
    "two of one kind": (("resnet20", "resnet20"), {}),
    "three, one shared stage": (("resnet20",) * 3, {"shared_stages": 1}),
    "two kinds": (("resnet20", "wrn16_2"), {}),
    "gate": (("resnet20",) * 2, {"fusion": None, "aggregator": "gate"}),
    "attention": (("resnet20",) * 3, {"fusion": None, "aggregator": "attention"}),
    "sum": (("resnet20",) * 2, {"fusion": "sum", "shared_stages": 0}),
}


def needed(network: MutualNetwork, name: str) -> list[nn.Module | None]:
    """-> by hand, the parts that a target is made of."""
    everything = [network.trunk, *network.branches]
    return {
        "fused": [*everything, network.fusion],
        "ensemble": [*everything, network.heads],
        "gated": [*everything, network.heads, network.aggregator],
    }.get(name) or [network.trunk, network.branches[int(name[-1])], network.heads[int(name[-1])]]


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, make_network: Make) -> MutualNetwork:
    branches, options = NETWORKS[request.param]
    return make_network(*branches, **options)


def test_each_target_answers_exactly_as_the_network(network: MutualNetwork) -> None:
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = network(images).classifiers()
        assert target_names(network) == list(wanted)
        for name, logits in wanted.items():
            torch.testing.assert_close(build_target(network, name)(images), logits, rtol=0, atol=0)


def test_a_target_holds_what_it_needs_and_no_weight_more(network: MutualNetwork) -> None:
    for name in target_names(network):
        parts = [part for part in needed(network, name) if part is not None]
        target = build_target(network, name)
        assert sum(p.numel() for p in target.parameters()) == sum(
            p.numel() for part in parts for p in part.parameters()
        )
        # disturb() made every tensor unlike any other, so equal values mean the same weight.
        wanted = {key(value) for part in parts for value in part.state_dict().values()}
        assert {key(value) for value in target.state_dict().values()} == wanted


def key(value: Tensor) -> tuple[float, ...]:
    return tuple(value.double().flatten().tolist())


def test_a_branch_does_not_change_with_its_sibling(make_network: Make) -> None:
    network, images = make_network("resnet20", "resnet20"), torch.randn(2, 3, 16, 16)
    targets = {name: build_target(network, name) for name in ("branch0", "branch1", "fused")}
    with torch.no_grad():
        before = {name: build_target(network, name)(images) for name in targets}
        for module in (network.branches[1], network.heads[1]):
            for parameter in module.parameters():
                parameter.mul_(1.7)
        after = {name: build_target(network, name)(images) for name in targets}
        untouched = {name: target(images) for name, target in targets.items()}
    assert torch.equal(after["branch0"], before["branch0"])
    assert not torch.allclose(after["branch1"], before["branch1"])
    assert not torch.allclose(after["fused"], before["fused"])
    for name, logits in untouched.items():
        assert torch.equal(logits, before[name]), "a target is a copy, which later training does not reach"


def test_targets_are_ready_for_inference(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20").train()
    target = build_target(network, "fused")
    assert not any(module.training for module in target.modules())
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_an_unknown_target_is_named_with_the_known_ones(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20")
    with pytest.raises(UsageError, match=r"no target 'branch2'.*Known: fused, ensemble, branch0, branch1"):
        build_target(network, "branch2")


def test_features_times_the_classifier_are_the_logits(make_network: Make) -> None:
    """What class activation maps rely on."""
    network, images = make_network("resnet20", "wrn16_2"), torch.randn(2, 3, 16, 16)
    for name in ("fused", "branch0", "branch1"):
        target = build_target(network, name)
        maps = torch.einsum("kc,nchw->nkhw", target.classifier.weight, target.features(images))
        torch.testing.assert_close(
            maps.mean(dim=(2, 3)) + target.classifier.bias, target(images), rtol=1e-4, atol=1e-4
        )
