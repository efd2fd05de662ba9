"""A branch's weights in the library's own model: loaded strictly, with equal logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.plain_weights import plain_weights

Make = Callable[..., MutualNetwork]


def library_model(name: str, classes: int) -> torch.nn.Module:
    library, _, model = name.partition(":")
    if library == "torchvision":
        from torchvision import models

        return models.get_model(model, num_classes=classes)
    import timm

    return timm.create_model(model, num_classes=classes)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18",
        "timm:resnet10t",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "torchvision:mobilenet_v2",
                "torchvision:densenet121",
                "torchvision:shufflenet_v2_x0_5",
                "timm:efficientnet_b0",
                "timm:selecsls42b",
            )
        ),
    ],
)
@pytest.mark.parametrize("shared", [None, pytest.param(0, marks=pytest.mark.slow)])
def test_the_library_loads_a_branch_strictly_and_answers_alike(
    name: str, shared: int | None, make_network: Make
) -> None:
    # selecsls42b is one stage, of which two branches can share nothing.
    network = make_network(name, name, classes=5, size=64, shared_stages=shared)
    images = torch.randn(2, 3, 64, 64)
    for branch in (0, 1):
        weights = plain_weights(network, branch)
        assert weights.missing == []
        model = library_model(name, classes=5).eval()
        model.load_state_dict(weights.tensors, strict=True)
        with torch.no_grad():
            wanted = network(images).branches[branch]
            torch.testing.assert_close(
                model(images), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
            )
            assert not torch.allclose(wanted, network(images).branches[1 - branch])
        assert not any(module.training for module in network.modules()), "the network is left as it was"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("torchvision:mobilenet_v3_small", "classifier.0.weight"),
        ("timm:mobilenetv3_small_100", "conv_head.weight"),
    ],
)
def test_where_the_librarys_classifier_is_another_the_body_is_given_and_the_rest_named(
    name: str, missing: str, make_network: Make
) -> None:
    network = make_network(name, "resnet20", classes=5, size=32)
    weights = plain_weights(network, 0)
    assert missing in weights.missing
    model = library_model(name, classes=5)
    found = model.load_state_dict(weights.tensors, strict=False)
    assert found.unexpected_keys == []
    assert sorted(found.missing_keys) == sorted(weights.missing)


def test_own_resnets_have_the_names_of_torchvisions_resnet(make_network: Make) -> None:
    network = make_network("resnet20", "resnet20")
    tensors = plain_weights(network, 1).tensors
    assert torch.equal(tensors["conv1.weight"], network.trunk[0][0].weight)
    assert torch.equal(tensors["layer2.1.bn2.running_mean"], network.trunk[2][1].bn2.running_mean)
    assert torch.equal(
        tensors["layer3.0.downsample.0.weight"], network.branches[1][0][0].downsample[0].weight
    )
    assert torch.equal(tensors["fc.bias"], network.heads[1].bias)
    parts = (network.trunk, network.branches[1], network.heads[1])
    assert len(tensors) == sum(len(part.state_dict()) for part in parts)


def test_other_backbones_and_branches_that_are_not_there_are_refused(make_network: Make) -> None:
    network = make_network("wrn16_2", "resnet20")
    with pytest.raises(UsageError, match="wrn16_2 is this project's own"):
        plain_weights(network, 0)
    with pytest.raises(UsageError, match="branches 0 to 1, not 2"):
        plain_weights(network, 2)
