"""What can be deployed from a trained network: one module per target,
holding only the weights that it needs."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn

from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.networks.aggregators import Gate, mean
from ffl_deploy.networks.fusion import Combination, FusionModule, pool
from ffl_deploy.networks.mutual import MutualNetwork


class Maps(NamedTuple):
    """Feature maps of a target with one classifier, [n, C, h, w] each."""

    early: Tensor  # before the first branch's last stage
    features: Tensor  # what the classifier takes, before pooling


def _in_two(branch: nn.Module, shared: Tensor) -> Maps:
    """-> the maps before and after the last stage of a branch, which takes the trunk's map `shared`."""
    *lower, last = branch.children()
    for stage in lower:
        shared = stage(shared)
    return Maps(shared, last(shared))


class BranchTarget(nn.Module):
    """One sub-network: trunk, branch, head."""

    def __init__(self, trunk: nn.Module, branch: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.branch, self.classifier = trunk, branch, head

    def features(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> the last feature map [n, C, h', w']."""
        return self.branch(self.trunk(images))

    def maps(self, images: Tensor) -> Maps:
        """images: normalised [n, 3, h, w]."""
        return _in_two(self.branch, self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> logits [n, classes]."""
        return self.classifier(pool(self.features(images)))


class TrunkTarget(nn.Module):
    """The exit on the trunk: what the branches share, and a classifier of its own."""

    def __init__(self, trunk: nn.Module, trunk_exit: FusionModule) -> None:
        super().__init__()
        self.trunk, self.trunk_exit = trunk, trunk_exit

    @property
    def classifier(self) -> nn.Linear:
        return self.trunk_exit.classifier

    def features(self, images: Tensor) -> Tensor:
        """images: normalised [n, 3, h, w] -> the exit's feature map [n, N, h', w']."""
        return self.trunk_exit.features([self.trunk(images)])

    def maps(self, images: Tensor) -> Maps:
        """images: normalised [n, 3, h, w]."""
        shared = self.trunk(images)
        return Maps(shared, self.trunk_exit.features([shared]))

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

    def maps(self, images: Tensor) -> Maps:
        """images: normalised [n, 3, h, w]."""
        shared = self.trunk(images)
        early, first = _in_two(self.branches[0], shared)
        return Maps(early, self.fusion.features([first, *(branch(shared) for branch in self.branches[1:])]))

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


class FirstExit(NamedTuple):
    """What the first exit of a cascade computed of n images, for its answer and for the rest."""

    logits: Tensor  # [n, classes]
    shared: Tensor  # the trunk's feature map, [n, C, h, w]
    known: dict[int, Tensor]  # branch -> its last feature map, of those that are known already


class CascadeTarget(nn.Module):
    """Two exits: a branch with its head, or the exit on the trunk, and the fused classifier, which goes on
    from there.

    What the first exit computed of an image is not computed again for the last. number: of the branch whose
    `head` answers; None where it is the trunk's exit.
    """

    def __init__(self, fused: FusedTarget, number: int | None, head: nn.Linear | FusionModule) -> None:
        super().__init__()
        self.trunk, self.branches, self.fusion = fused.trunk, fused.branches, fused.fusion
        self.number, self.head = number, head

    def first(self, images: Tensor) -> FirstExit:
        """images: normalised [n, 3, h, w]."""
        shared = self.trunk(images)
        if self.number is None:
            return FirstExit(self.head([shared]), shared, {})
        features = self.branches[self.number](shared)
        return FirstExit(self.head(pool(features)), shared, {self.number: features})

    def last(self, first: FirstExit, rows: Tensor) -> Tensor:
        """rows: int64 [k], of the images -> the fused classifier's logits of those, [k, classes]."""
        shared = first.shared.index_select(0, rows)
        known = {number: features.index_select(0, rows) for number, features in first.known.items()}
        features = [
            known[number] if number in known else branch(shared)
            for number, branch in enumerate(self.branches)
        ]
        return self.fusion.classifier(pool(self.fusion.features(features)))


Target = BranchTarget | TrunkTarget | FusedTarget | EnsembleTarget | CascadeTarget
CASCADE = "cascade"
TRUNK = "trunk"


def exits_of(target: str) -> tuple[str, str] | None:
    """-> the two classifiers of the cascade that `target` names, the first exit first: of "branch1+fused"
    these, of "cascade" branch0 and fused; None where it names none."""
    if target == CASCADE:
        return "branch0", "fused"
    first, plus, last = target.partition("+")
    return (first, last) if plus else None


def target_names(network: MutualNetwork) -> list[str]:
    """-> what `build_target` accepts for this network, the strongest kind first."""
    names = []
    if network.fusion is not None:
        names.append("fused")
    if isinstance(network.aggregator, Gate):
        names.append("gated")
    if len(network.branches) > 1:
        names.append("ensemble")
    names += [f"branch{k}" for k in range(len(network.branches))]
    return names if network.trunk_exit is None else [*names, TRUNK]


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
    exits = exits_of(name)
    if exits is not None:
        return _build_cascade(network, name, exits)
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
    elif name == TRUNK:
        assert network.trunk_exit is not None
        target = TrunkTarget(trunk, network.trunk_exit)
    elif name == "ensemble":
        target = EnsembleTarget(trunk, branches, heads)
    else:
        index = int(name.removeprefix("branch"))
        head = heads[index]
        assert isinstance(head, nn.Linear)
        target = BranchTarget(trunk, branches[index], head)
    return copy.deepcopy(target).eval().requires_grad_(False)


def _build_cascade(network: MutualNetwork, name: str, exits: tuple[str, str]) -> Target:
    """Raises UsageError where the network has not both exits, or they are others than a branch's or the
    trunk's, and the fused one."""
    first, last = exits
    cheap = first == TRUNK or first.startswith("branch")
    if not {first, last} <= set(target_names(network)) or last != "fused" or not cheap:
        raise UsageError(
            f"{name!r} is no cascade of this run: its first exit is a branch, or trunk of a run with "
            "--trunk-exit, and its last one the fused classifier, as in branch0+fused, which is also called "
            "cascade."
        )
    fused = build_target(network, last)
    assert isinstance(fused, FusedTarget)
    number = None if first == TRUNK else int(first.removeprefix("branch"))
    head = copy.deepcopy(network.trunk_exit if number is None else network.heads[number])
    assert isinstance(head, nn.Linear | FusionModule)
    return CascadeTarget(fused, number, head).eval().requires_grad_(False)
