"""Methods: outputs of all classifiers -> named losses. Nothing here knows the loop,
the data or the optimizer.

torch is imported only where losses are computed, so that the command line may read METHODS.

Notation (docs/architecture.md): z_k logits of branch k, z_f fused, z_e ensemble, y labels, w the ramp-up
weight; KL(s <- t) = T^2 * mean over the batch of sum_c q_c (log q_c - log p_c), p = softmax(s/T), q =
softmax(t/T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal

from ffl_deploy.errors import UsageError, choices_sentence

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ffl_deploy.networks.mutual import MutualNetwork, Outputs

    Losses = dict[str, Tensor]

Fusion = Literal["module", "sum", "mean"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in fp32. labels: int64 [n],
    or float [n, classes] when they are smoothed or mixed."""
    from torch.nn import functional

    return functional.cross_entropy(logits.float(), labels)


def distill(student: Tensor, teacher: Tensor, temperature: float, detach: bool = True) -> Tensor:
    """KL(student <- teacher) of the module's notation, [n, classes] each, in fp32;
    the teacher gets no gradient."""
    from torch.nn import functional

    teacher = teacher.detach() if detach else teacher
    log_p = functional.log_softmax(student.float() / temperature, dim=1)
    log_q = functional.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def mean(logits: Sequence[Tensor]) -> Tensor:
    """Mean of several classifiers' logits, [n, classes] each."""
    from ffl_deploy.networks import aggregators

    return aggregators.mean(logits)


@dataclass(frozen=True)
class Method:
    """What a method asks of the network, and its losses.
    Subclasses say how they differ from these defaults."""

    temperature: float = 3.0
    fusion: Fusion | None = None  # how feature maps are fused, None for not at all
    aggregator: Literal["gate", "attention"] | None = None
    shares_stages: bool = True  # branches of one architecture share their low-level stages
    same_architecture: bool = False  # needs branches of one architecture
    minimum_branches: int = 2
    maximum_branches: int | None = None
    strong: str = "fused"  # the classifier that `best` is chosen by
    teaches_trunk_exit: bool = False  # its losses teach a classifier on the trunk (--trunk-exit)
    scales_trunk_gradient: bool = False  # divide the gradient that enters the trunk by the number of branches

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        """-> named scalars whose sum is minimised. labels: see cross_entropy; ramp: w in 0..1."""
        raise TypeError(f"{type(self).__name__} defines no losses")

    def frozen(self, network: MutualNetwork, progress: float, step: int) -> list[nn.Module]:
        """-> modules that do not learn in this step; progress: 0..1 of the run."""
        return []

    def branches_for(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """-> as many branches as this method trains: the first of those `given`, or these over again."""
        most = self.maximum_branches or len(given) + self.minimum_branches
        return tuple(islice(cycle(given), min(max(len(given), self.minimum_branches), most)))

    def check(self, branches: tuple[str, ...]) -> None:
        """Raise UsageError where this method cannot train these branches."""
        name, count = type(self).__name__, len(branches)
        if count < self.minimum_branches:
            raise UsageError(
                f"{name} needs at least {self.minimum_branches} branches, not {count}; name more with "
                "--branches."
            )
        if self.maximum_branches is not None and count > self.maximum_branches:
            raise UsageError(
                f"{name} trains {self.maximum_branches} branches, not {count}; name fewer with --branches."
            )
        if self.same_architecture and len(set(branches)) > 1:
            raise UsageError(
                f"{name} needs branches of one architecture (they share their low-level stages), not "
                f"{', '.join(branches)}."
            )


def _branch_losses(outputs: Outputs, labels: Tensor) -> Losses:
    return {f"ce/branch{k}": cross_entropy(logits, labels) for k, logits in enumerate(outputs.branches)}


@dataclass(frozen=True)
class FFL(Method):
    """Feature Fusion Learning (Kim et al. 2019, eq. 2-8):

    sum_k CE(z_k, y) + CE(z_f, y) + w [ KL(z_f <- z_e) (EKD) + sum_k KL(z_k <- z_f) (FKD) ]. An exit on the
    trunk is one more z_k of these sums, and none of the ensemble z_e.
    """

    fusion: Fusion | None = "module"
    teaches_trunk_exit: bool = True
    ensemble_to_fused: bool = True  # EKD
    fused_to_branches: bool = True  # FKD

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        fused = _fused(outputs)
        students = {f"branch{k}": logits for k, logits in enumerate(outputs.branches)}
        losses = {**_branch_losses(outputs, labels), "ce/fused": cross_entropy(fused, labels)}
        if outputs.trunk is not None:
            students["trunk"] = outputs.trunk
            losses["ce/trunk"] = cross_entropy(outputs.trunk, labels)
        if self.ensemble_to_fused:
            losses["ekd/fused"] = ramp * distill(fused, mean(outputs.branches), self.temperature)
        if self.fused_to_branches:
            for name, logits in students.items():
                losses[f"fkd/{name}"] = ramp * distill(logits, fused, self.temperature)
        return losses


@dataclass(frozen=True)
class Vanilla(Method):
    """One network, cross entropy."""

    minimum_branches: int = 1
    maximum_branches: int | None = 1
    strong: str = "branch0"

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        return _branch_losses(outputs, labels)


@dataclass(frozen=True)
class Independent(Method):
    """Separate networks, cross entropy each; their mean is the classical ensemble."""

    shares_stages: bool = False
    strong: str = "ensemble"

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        return _branch_losses(outputs, labels)


@dataclass(frozen=True)
class DML(Method):
    """Deep Mutual Learning (Zhang et al. 2018, eq. 8): L_i = CE_i + 1/(n-1) sum_{j != i} KL(z_i <- z_j),
    no ramp-up."""

    temperature: float = 1.0
    shares_stages: bool = False
    strong: str = "ensemble"

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        losses, z = _branch_losses(outputs, labels), outputs.branches
        for i, student in enumerate(z):
            peers = [distill(student, teacher, self.temperature) for j, teacher in enumerate(z) if j != i]
            losses[f"kd/branch{i}"] = sum(peers[1:], peers[0]) / len(peers)
        return losses


@dataclass(frozen=True)
class ONE(Method):
    """On-the-fly Native Ensemble (Lan et al. 2018, eq. 5-9): sum_k CE(z_k) + CE(z_m)
    + w sum_k KL(z_k <- z_m)."""

    aggregator: Literal["gate", "attention"] | None = "gate"
    same_architecture: bool = True
    strong: str = "gated"

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        gated = _aggregated(outputs)
        losses = {**_branch_losses(outputs, labels), "ce/gated": cross_entropy(gated, labels)}
        for k, logits in enumerate(outputs.branches):
            losses[f"kd/branch{k}"] = ramp * distill(logits, gated, self.temperature)
        return losses


@dataclass(frozen=True)
class CLILR(Method):
    """Collaborative learning with intermediate-level representation sharing (Song and Chai 2018):

    beta CE_k + (1 - beta) KL(z_k <- mean of the other branches), beta = 0.5, T = 2;
    trunk gradient divided by n.
    """

    temperature: float = 2.0
    beta: float = 0.5
    same_architecture: bool = True
    strong: str = "ensemble"
    scales_trunk_gradient: bool = True

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        z = outputs.branches
        losses = {name: self.beta * loss for name, loss in _branch_losses(outputs, labels).items()}
        for k, logits in enumerate(z):
            others = mean([teacher for j, teacher in enumerate(z) if j != k])
            losses[f"kd/branch{k}"] = (1 - self.beta) * distill(logits, others, self.temperature)
        return losses


@dataclass(frozen=True)
class OKDDip(Method):
    """Online Knowledge Distillation with Diverse Peers (Chen et al. 2020, eq. 4-9).
    branch0 is the group leader.

    sum_k CE_k + w [ sum_{peers i} KL(z_i <- t_i) + KL(z_0 <- mean of the peers) ]; the targets t_i stay
    attached, since the attention learns only through them. The peers' mean is detached, as every other
    teacher: the official code lets that term's gradient into the peers.
    """

    aggregator: Literal["gate", "attention"] | None = "attention"
    same_architecture: bool = True
    minimum_branches: int = 3
    strong: str = "branch0"

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        attended, peers = _aggregated(outputs), outputs.branches[1:]
        losses = _branch_losses(outputs, labels)
        for i, logits in enumerate(peers):
            losses[f"kd/branch{i + 1}"] = ramp * distill(
                logits, attended[:, i], self.temperature, detach=False
            )
        losses["kd/branch0"] = ramp * distill(outputs.branches[0], mean(peers), self.temperature)
        return losses


@dataclass(frozen=True)
class DualNet(Method):
    """DualNet (Hou et al. 2017): summed features; CE_f + 0.3 (CE_1 + CE_2), in two phases.

    Iterative training: the extractors take turns, the other one frozen, step by step. Joint fine-tuning, over
    the last `joint` of the run: both extractors frozen, the three classifiers learn together.
    """

    fusion: Fusion | None = "sum"
    shares_stages: bool = False
    maximum_branches: int | None = 2
    auxiliary: float = 0.3
    joint: float = 0.1

    def losses(self, outputs: Outputs, labels: Tensor, ramp: float | Tensor) -> Losses:
        losses = {name: self.auxiliary * loss for name, loss in _branch_losses(outputs, labels).items()}
        return {"ce/fused": cross_entropy(_fused(outputs), labels), **losses}

    def frozen(self, network: MutualNetwork, progress: float, step: int) -> list[nn.Module]:
        if progress >= 1 - self.joint:
            return list(network.branches)
        return [network.branches[(step + 1) % 2]]


def _fused(outputs: Outputs) -> Tensor:
    assert outputs.fused is not None, "the network was built without fusion"
    return outputs.fused


def _aggregated(outputs: Outputs) -> Tensor:
    assert outputs.aggregated is not None, "the network was built without an aggregator"
    return outputs.aggregated


METHODS: dict[str, Callable[..., Method]] = {
    "ffl": FFL,
    "ffl-no-ekd": lambda **options: FFL(ensemble_to_fused=False, **options),
    "ffl-no-fkd": lambda **options: FFL(fused_to_branches=False, **options),
    "ffl-sum": lambda **options: FFL(fusion="sum", **options),
    "ffl-mean": lambda **options: FFL(fusion="mean", **options),
    "vanilla": Vanilla,
    "independent": Independent,
    "dml": DML,
    "one": ONE,
    "cl-ilr": CLILR,
    "okddip": OKDDip,
    "dualnet": DualNet,
}


def build_method(name: str, temperature: float | None = None) -> Method:
    """-> the method called `name`, with its own temperature unless one is given. Raises UsageError."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}. {choices_sentence(name, list(METHODS))}")
    return METHODS[name]() if temperature is None else METHODS[name](temperature=temperature)
