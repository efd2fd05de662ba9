"""What can be deployed from a trained network: one module per target,
holding only the weights that it needs."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.networks.aggregators import Gate, mean
from ffl_deploy.networks.fusion import Combination, FusionModule, pool
from ffl_deploy.networks.mutual import MutualNetwork


class BranchTarget(nn.Module):
    """One sub-network: trunk, branch, head."""

    def __init__(self, trunk: nn.Module, branch: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.branch, self.classifier = trunk, branch, head

    def features(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> the last feature map [n, C, h', w']."""
        return self.branch(self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> logits [n, classes]."""
        return self.classifier(pool(self.features(images)))


class FusedTarget(nn.Module):
    """The fused classifier: trunk, all branches without their heads, fusion."""

    def __init__(self, trunk: nn.Module, branches: nn.ModuleList, fusion: FusionModule | Combination) -> None:
        super().__init__()
        self.trunk, self.branches, self.fusion = trunk, branches, fusion

    @property
    def classifier(self) -> nn.Linear:
        return self.fusion.classifier

    def features(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> the fused feature map [n, N, h', w']."""
        shared = self.trunk(images)
        return self.fusion.features([branch(shared) for branch in self.branches])

    def forward(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> logits [n, classes]."""
        return self.classifier(pool(self.features(images)))


class EnsembleTarget(nn.Module):
    """All branches with their heads; their logits are averaged, or weighted by ONE's gate."""

    def __init__(
        self, trunk: nn.Module, branches: nn.ModuleList, heads: nn.ModuleList, gate: Gate | None = None
    ) -> None:
        super().__init__()
        self.trunk, self.branches, self.heads, self.gate = trunk, branches, heads, gate

    def forward(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> logits [n, classes]."""
        shared = self.trunk(images)
        pooled = [pool(branch(shared)) for branch in self.branches]
        logits = [head(vector) for head, vector in zip(self.heads, pooled, strict=True)]
        return mean(logits) if self.gate is None else self.gate(shared, pooled, logits)


Target = BranchTarget | FusedTarget | EnsembleTarget


def target_names(network: MutualNetwork) -> list[str]:
    """-> what `build_target` accepts for this network, the strongest kind first."""
    names = []
    if network.fusion is not None:
        names.append("fused")
    if isinstance(network.aggregator, Gate):
        names.append("gated")
    if len(network.branches) > 1:
        names.append("ensemble")
    return names + [f"branch{k}" for k in range(len(network.branches))]


def network_path(target: str, name: str) -> str:
    """-> the path in a MutualNetwork of what target `target`'s ONNX file calls `name`:
    target.branch.0 -> branches.1.0."""
    path = name.removeprefix("target.")
    if target.startswith("branch"):
        number = target.removeprefix("branch")
        path = path.replace("branch.", f"branches.{number}.", 1) if path.startswith("branch.") else path
        path = path.replace("classifier", f"heads.{number}", 1) if path.startswith("classifier") else path
    return path


def build_target(network: MutualNetwork, name: str) -> Target:
    """-> a copy of what target `name` needs, in eval mode, independent of `network`.
    Raises UsageError for an unknown name."""
    known = target_names(network)
    if name not in known:
        raise UsageError(f"this run has no target {name!r}. {choices_sentence(name, known)}")
    trunk, branches, heads = network.trunk, network.branches, network.heads
    target: Target
    if name == "fused":
        assert network.fusion is not None
        target = FusedTarget(trunk, branches, network.fusion)
    elif name == "gated":
        assert isinstance(network.aggregator, Gate)
        target = EnsembleTarget(trunk, branches, heads, network.aggregator)
    elif name == "ensemble":
        target = EnsembleTarget(trunk, branches, heads)
    else:
        index = int(name.removeprefix("branch"))
        head = heads[index]
        assert isinstance(head, nn.Linear)
        target = BranchTarget(trunk, branches[index], head)
    return copy.deepcopy(target).eval().requires_grad_(False)
