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
    body = [*network.trunk.children(), *network.branches[branch].children()]
    head = network.heads[branch].state_dict()
    if name.startswith("resnet"):
        return PlainWeights(_as_resnet(body) | {f"fc.{key}": value for key, value in head.items()}, [])
    if not is_library_name(name):
        raise UsageError(f"{name} is this project's own; no library has a model that its weights would fit.")
    model = build_model(name, config.height, config.width, classes=config.classes).eval()
    own_names = {id(value): key for key, value in model.state_dict(keep_vars=True).items()}
    tensors: dict[str, Tensor] = {}
    for stage, trained in zip(stages_of(name, model, config.height, config.width), body, strict=True):
        values = trained.state_dict()
        tensors |= {
            own_names[id(tensor)]: values[key] for key, tensor in stage.state_dict(keep_vars=True).items()
        }
    missing = [key for key in own_names.values() if key not in tensors]

    # stages_of may have taken it apart
    model = build_model(name, config.height, config.width, classes=config.classes).eval()
    classifier = {key: head.get(key.rpartition(".")[2]) for key in missing}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if len(missing) == 2 and all(
        value is not None and value.shape == shapes[key] for key, value in classifier.items()
    ):
        with_head = tensors | {key: value for key, value in classifier.items() if value is not None}
        model.load_state_dict(with_head)
        if _same_logits(model, build_target(network, f"branch{branch}"), config.height, config.width):
            return PlainWeights(with_head, [])
    return PlainWeights(tensors, missing)


def _as_resnet(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    """-> the weights of a ResNet's stages as conv1, bn1, layer1, layer2, layer3."""
    stem = {"0": "conv1", "1": "bn1"}
    layers = [
        {block: f"layer{k}.{block}" for block, _ in stages[k].named_children()} for k in range(1, len(stages))
    ]
    return {
        f"{new[key.partition('.')[0]]}.{key.partition('.')[2]}": value
        for stage, new in zip(stages, [stem, *layers], strict=True)
        for key, value in stage.state_dict().items()
    }


@torch.no_grad()
def _same_logits(model: nn.Module, target: nn.Module, height: int, width: int) -> bool:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    wanted = target(images)
    return bool((model(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max())
