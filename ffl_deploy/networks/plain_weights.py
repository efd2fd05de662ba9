"""A branch as a plain `state_dict` under the names of the library that its backbone comes from,
for use elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.backbones import is_library_name
from ffl_deploy.networks.library import build_model, stages_of
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.targets import build_target


class PlainWeights(NamedTuple):
    """tensors: the library's name -> tensor; missing:
    the library's names that a branch has no weights for."""

    tensors: dict[str, Tensor]
    missing: list[str]


class Layout(NamedTuple):
    """How a library calls the tensors of a branch. own: its name -> the name in the network's state_dict;
    classifier: its names -> their shapes, of what comes after the feature map."""

    own: dict[str, str]
    classifier: dict[str, torch.Size]


def layout_of(network: MutualNetwork, branch: int) -> Layout:
    """-> the names of branch number `branch` in the library that its backbone comes from. Own ResNets have
    those of FFL's official code and of torchvision's ResNets. Raises UsageError for other backbones."""
    name, config = network.config.branches[branch], network.config
    prefixes = body_prefixes(network, branch)
    body = [*network.trunk.children(), *network.branches[branch].children()]
    if name.startswith("resnet"):
        head = {f"fc.{key}": value.shape for key, value in network.heads[branch].state_dict().items()}
        return Layout(_as_resnet(body, prefixes), head)
    if not is_library_name(name):
        raise UsageError(f"{name} is this project's own; no library has a model that its weights would fit.")
    model = build_model(name, config.height, config.width, classes=config.classes).eval()
    own_names = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    own: dict[str, str] = {}
    for stage, prefix in zip(stages_of(name, model, config.height, config.width), prefixes, strict=True):
        own |= {
            own_names[id(tensor)]: prefix + key for key, tensor in stage.state_dict(keep_vars=True).items()
        }
    # in the library's order, which files that know other names are taken in
    ordered = {key: own[key] for key in shapes if key in own}
    return Layout(ordered, {key: shape for key, shape in shapes.items() if key not in own})


def body_prefixes(network: MutualNetwork, branch: int) -> list[str]:
    """-> for each stage of branch number `branch` what its tensors' names in the network begin with."""
    trunk = [f"trunk.{stage}." for stage in range(len(network.trunk))]
    stages = network.branches[branch]
    assert isinstance(stages, nn.Sequential)
    return [*trunk, *(f"branches.{branch}.{stage}." for stage in range(len(stages)))]


def plain_weights(network: MutualNetwork, branch: int) -> PlainWeights:
    """-> the weights of branch number `branch` (trunk, branch, head) under its library's names.

    With nothing missing, `torchvision.models.NAME(num_classes=K)` or `timm.create_model(NAME, num_classes=K)`
    loads them strictly and gives the same logits; this is tried here. Where the library's classifier is more
    than pooling and one linear layer (VGG, MobileNetV3, ConvNeXt), it is what is missing, and the head of
    this project is left out. Own ResNets get the names of FFL's official code and of torchvision's ResNets.
    Raises UsageError for other backbones.
    """
    if not 0 <= branch < len(network.branches):
        raise UsageError(f"this run has branches 0 to {len(network.branches) - 1}, not {branch}.")
    name, config = network.config.branches[branch], network.config
    layout, values = layout_of(network, branch), network.state_dict()
    tensors = {key: values[own] for key, own in layout.own.items()}
    head = network.heads[branch].state_dict()
    if not is_library_name(name):
        return PlainWeights(tensors | {f"fc.{key}": value for key, value in head.items()}, [])
    classifier = {
        key: head[key.rpartition(".")[2]]
        for key, shape in layout.classifier.items()
        if (own := head.get(key.rpartition(".")[2])) is not None and own.shape == shape
    }
    if len(classifier) == len(layout.classifier) == 2:
        model = build_model(name, config.height, config.width, classes=config.classes).eval()
        model.load_state_dict(tensors | classifier)
        if _same_logits(model, build_target(network, f"branch{branch}"), config.height, config.width):
            return PlainWeights(tensors | classifier, [])
    return PlainWeights(tensors, list(layout.classifier))


def _as_resnet(stages: Sequence[nn.Module], prefixes: Sequence[str]) -> dict[str, str]:
    """-> the names of a ResNet's stages as conv1, bn1, layer1, layer2, layer3 -> those in the network."""
    stem = {"0": "conv1", "1": "bn1"}
    layers = [
        {block: f"layer{k}.{block}" for block, _ in stages[k].named_children()} for k in range(1, len(stages))
    ]
    return {
        f"{new[key.partition('.')[0]]}.{key.partition('.')[2]}": prefix + key
        for stage, prefix, new in zip(stages, prefixes, [stem, *layers], strict=True)
        for key in stage.state_dict()
    }


@torch.no_grad()
def _same_logits(model: nn.Module, target: nn.Module, height: int, width: int) -> bool:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    wanted = target(images)
    return bool((model(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max())
