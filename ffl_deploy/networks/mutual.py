"""MutualNetwork: a shared trunk, branches with their heads, and what joins them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from torch import Tensor, nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.aggregators import build_aggregator, mean
from ffl_deploy.networks.backbones import build_backbone, feature_shape, is_library_name
from ffl_deploy.networks.fusion import FusionModule, build_fusion, pool


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides the architecture; stored in the run's configuration.

    shared_stages: how many low-level stages the branches share; None is all but the last for branches of one
    architecture, none otherwise. fusion_width: N of the fusion module; None is the first branch's channels.
    scale_trunk_gradient: divide the gradient that the branches send into the trunk by their number (CL-ILR).
    trunk_exit: a classifier on the trunk's map, which costs less than any branch.
    """

    branches: tuple[str, ...]
    classes: int
    height: int
    width: int
    shared_stages: int | None = None
    fusion: Literal["module", "sum", "mean"] | None = "module"
    fusion_width: int | None = None
    aggregator: Literal["gate", "attention"] | None = None
    scale_trunk_gradient: bool = False
    trunk_exit: bool = False


class Outputs(NamedTuple):
    """One forward pass of all classifiers on n images."""

    branches: list[Tensor]  # logits of each branch, [n, classes]
    fused: Tensor | None  # logits of the fused classifier, [n, classes]
    aggregated: Tensor | None  # what the aggregator made of the branches' logits (see aggregators.py)
    features: list[Tensor]  # the branches' last feature maps, [n, C_k, h_k, w_k]
    trunk: Tensor | None = None  # logits of the exit on the trunk, [n, classes]

    def classifiers(self) -> dict[str, Tensor]:
        """-> deployable target -> its logits [n, classes]; the names of `targets.target_names`,
        in that order."""
        named = {} if self.fused is None else {"fused": self.fused}
        # the gate's; attention gives targets per peer
        if self.aggregated is not None and self.aggregated.ndim == 2:
            named["gated"] = self.aggregated
        if len(self.branches) > 1:
            named["ensemble"] = mean(self.branches)
        named |= {f"branch{k}": logits for k, logits in enumerate(self.branches)}
        return named if self.trunk is None else {**named, "trunk": self.trunk}


class MutualNetwork(nn.Module):
    """Networks that are trained together; each classifier can be deployed alone (targets.py).

    pretrained: start from the libraries' published weights, kept in that folder where it is one; a matter of
    initialisation, so no part of the architecture. Nor is stochastic_depth, which has no weights and is off
    outside training: how often it skips the last block of a library's backbone.
    """

    def __init__(
        self, config: NetworkConfig, pretrained: bool | Path = False, stochastic_depth: float | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.frozen = 0  # stages of each branch that do not learn, from the first on
        if pretrained and not any(is_library_name(name) for name in config.branches):
            raise UsageError(
                f"there are no published weights of {', '.join(dict.fromkeys(config.branches))}: "
                "--pretrained is for torchvision:NAME and timm:NAME branches."
            )
        backbones = [
            build_backbone(name, config.height, config.width, pretrained, stochastic_depth)
            for name in config.branches
        ]
        shared = number_of_shared_stages(config, [len(backbone.stages) for backbone in backbones])
        self.trunk = nn.Sequential(*backbones[0].stages[:shared])
        self.branches = nn.ModuleList(nn.Sequential(*backbone.stages[shared:]) for backbone in backbones)
        shapes = [
            feature_shape(nn.Sequential(self.trunk, branch), config.height, config.width)
            for branch in self.branches
        ]
        self.heads = nn.ModuleList(nn.Linear(channels, config.classes) for channels, _, _ in shapes)
        self.fusion = (
            build_fusion(config.fusion, shapes, config.classes, config.fusion_width)
            if config.fusion
            else None
        )
        trunk_shape = feature_shape(self.trunk, config.height, config.width)
        self.aggregator = (
            build_aggregator(config.aggregator, trunk_shape[0], [shape[0] for shape in shapes])
            if config.aggregator
            else None
        )
        if config.trunk_exit and not shared:
            raise UsageError(
                "--trunk-exit is a classifier on the stages that the branches share, and these share none; "
                "leave it out, or name branches of one architecture."
            )
        self.trunk_exit = (
            FusionModule([trunk_shape], config.classes, shapes[0][0]) if config.trunk_exit else None
        )

    def forward(self, images: Tensor) -> Outputs:
        """images: normalised [n, 3, height, width]."""
        return self._above_trunk(self.trunk(images))

    @property
    def depth(self) -> int:
        """Stages of the longest branch, those that are shared among them."""
        return len(self.trunk) + max(len(_stages(branch)) for branch in self.branches)

    def stages(self) -> list[list[nn.Module]]:
        """-> for each stage, from the first on, its modules: one where it is shared, else one of each branch
        that has so many, counted from the last stage that they share."""
        own = [list(_stages(branch)) for branch in self.branches]
        longest = max(map(len, own))
        above = [[stages[k] for stages in own if k < len(stages)] for k in range(longest)]
        return [[stage] for stage in self.trunk] + above

    def freeze(self, depth: int) -> None:
        """From now on the first `depth` stages of each branch do not learn, nor do their batch statistics
        move."""
        self.frozen = depth
        for number, stage in enumerate(self.stages()):
            for module in stage:
                module.requires_grad_(number >= depth)
        self.train(self.training)

    def train(self, mode: bool = True) -> MutualNetwork:
        super().train(mode)
        for stage in self.stages()[: self.frozen] if mode else ():
            for module in stage:
                module.eval()
        return self

    def lower(self, images: Tensor, depth: int) -> list[Tensor]:
        """images: normalised [n, 3, h, w] -> the maps after the first `depth` stages: one where the branches
        still share them, else one of each branch, and the shared one last where an aggregator or an exit
        looks at it."""
        shared = self.trunk[:depth](images)
        if depth <= len(self.trunk):
            return [shared]
        own = [_stages(branch)[: depth - len(self.trunk)](shared) for branch in self.branches]
        looked_at = self.aggregator is not None or self.trunk_exit is not None
        return [*own, shared] if looked_at else own

    def upper(self, maps: list[Tensor], depth: int) -> Outputs:
        """maps: what `lower` gives for `depth`."""
        after = depth - len(self.trunk)
        if after <= 0:
            return self._above_trunk(self.trunk[depth:](maps[0]))
        own = maps[: len(self.branches)]  # behind them the shared one, where something looks at it
        features = [_stages(branch)[after:](one) for branch, one in zip(self.branches, own, strict=True)]
        return self._classified(maps[-1], features)

    def _above_trunk(self, shared: Tensor) -> Outputs:
        if self.config.scale_trunk_gradient and shared.requires_grad:
            shared.register_hook(lambda gradient: gradient / len(self.branches))
        return self._classified(shared, [branch(shared) for branch in self.branches])

    def _classified(self, shared: Tensor, features: list[Tensor]) -> Outputs:
        """shared: the trunk's map, which an aggregator or an exit looks at; features: the branches' last
        maps."""
        pooled = [pool(feature_map) for feature_map in features]
        logits = [head(vector) for head, vector in zip(self.heads, pooled, strict=True)]
        fused = self.fusion(features) if self.fusion is not None else None
        aggregated = self.aggregator(shared, pooled, logits) if self.aggregator is not None else None
        trunk = self.trunk_exit([shared]) if self.trunk_exit is not None else None
        return Outputs(logits, fused, aggregated, features, trunk)


def _stages(branch: nn.Module) -> nn.Sequential:
    assert isinstance(branch, nn.Sequential)
    return branch


def number_of_shared_stages(config: NetworkConfig, lengths: list[int]) -> int:
    """-> how many stages the branches of `config` share, given each backbone's number of stages.
    Raises UsageError."""
    same = len(set(config.branches)) == 1
    if config.shared_stages is None:
        return lengths[0] - 1 if same and len(config.branches) > 1 else 0
    if config.shared_stages and not same:
        raise UsageError(
            "branches of different architectures share no stages; leave --shared-stages out or set it to 0."
        )
    if not 0 <= config.shared_stages < lengths[0]:
        raise UsageError(
            f"{config.branches[0]} has {lengths[0]} stages, so --shared-stages can be 0 to {lengths[0] - 1}, "
            f"not {config.shared_stages}."
        )
    return config.shared_stages
