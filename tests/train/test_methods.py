"""Losses against an independent NumPy computation in float64; gradients against finite differences of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig, Outputs
from train.methods import (
    CLILR,
    DML,
    FFL,
    METHODS,
    ONE,
    DualNet,
    Independent,
    Method,
    OKDDip,
    Vanilla,
    build_method,
    distill,
)

LABELS = np.array([0, 3, 1, 2, 4, 4])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def ce(z: np.ndarray, labels: np.ndarray = LABELS) -> float:
    return float(-log_softmax(z)[np.arange(len(labels)), labels].mean())


def kl(student: np.ndarray, teacher: np.ndarray, t: float) -> float:
    log_p, log_q = log_softmax(student / t), log_softmax(teacher / t)
    return float(t * t * (np.exp(log_q) * (log_q - log_p)).sum(axis=1).mean())


@pytest.fixture
def z() -> list[np.ndarray]:
    """Logits of three branches, the fused classifier and an aggregate: 6 images, 5 classes, up to +-10."""
    return list(np.random.default_rng(7).normal(scale=4, size=(5, 6, 5)))


def outputs(
    branches: list[np.ndarray], fused: np.ndarray | None = None, aggregated: np.ndarray | None = None
) -> Outputs:
    def leaf(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, requires_grad=True)

    leaves = [leaf(values) for values in branches]
    return Outputs([value for value in leaves if value is not None], leaf(fused), leaf(aggregated), [])


def values(method: Method, out: Outputs, ramp: float = 0.4) -> dict[str, float]:
    return {name: part.item() for name, part in method.losses(out, torch.tensor(LABELS), ramp).items()}


def test_distill_is_kl_times_t_squared_averaged_over_the_batch(z: list[np.ndarray]) -> None:
    for t in (1.0, 3.0, 10.0):
        found = distill(torch.tensor(z[0]), torch.tensor(z[1]), t).item()
        assert found == pytest.approx(kl(z[0], z[1], t), rel=1e-5)
    assert distill(torch.tensor(z[0]), torch.tensor(z[0]), 3.0).item() == pytest.approx(0, abs=1e-6)


def test_distill_computes_in_fp32_whatever_it_is_given(z: list[np.ndarray]) -> None:
    student, teacher = torch.tensor(z[0]).bfloat16(), torch.tensor(z[1]).bfloat16()
    assert distill(student, teacher, 3.0).dtype == torch.float32
    expected = kl(student.double().numpy(), teacher.double().numpy(), 3.0)
    assert distill(student, teacher, 3.0).item() == pytest.approx(expected, rel=1e-5)


def test_distill_stays_finite_for_extreme_logits() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = distill(student, torch.tensor([[-1e4, 1e4, 0.0]]), 3.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_ffl_is_equation_2_to_8(z: list[np.ndarray]) -> None:
    a, b, f = z[:3]
    found = values(FFL(), outputs([a, b], f))
    ensemble = (a + b) / 2
    expected = {
        "ce/branch0": ce(a),
        "ce/branch1": ce(b),
        "ce/fused": ce(f),
        "ekd/fused": 0.4 * kl(f, ensemble, 3),
        "fkd/branch0": 0.4 * kl(a, f, 3),
        "fkd/branch1": 0.4 * kl(b, f, 3),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_exit_on_the_trunk_is_taught_as_a_branch_is_and_teaches_nobody(z: list[np.ndarray]) -> None:
    a, b, f, exit = z[:4]
    without = values(FFL(), outputs([a, b], f))
    trunk = torch.tensor(exit, dtype=torch.float32)
    found = values(FFL(), outputs([a, b], f)._replace(trunk=trunk))
    expected = without | {"ce/trunk": ce(exit), "fkd/trunk": 0.4 * kl(exit, f, 3)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert "fkd/trunk" not in values(METHODS["ffl-no-fkd"](), outputs([a, b], f)._replace(trunk=trunk))


def test_ffl_ablations_leave_out_exactly_their_terms(z: list[np.ndarray]) -> None:
    whole = values(FFL(), outputs(z[:2], z[2]))
    without_ekd = values(METHODS["ffl-no-ekd"](), outputs(z[:2], z[2]))
    without_fkd = values(METHODS["ffl-no-fkd"](), outputs(z[:2], z[2]))
    assert set(whole) - set(without_ekd) == {"ekd/fused"}
    assert set(whole) - set(without_fkd) == {"fkd/branch0", "fkd/branch1"}
    assert METHODS["ffl-sum"]().fusion == "sum"
    assert METHODS["ffl-mean"]().fusion == "mean"


def test_ffl_with_three_branches_averages_all_of_them(z: list[np.ndarray]) -> None:
    found = values(FFL(), outputs(z[:3], z[3]), ramp=1.0)
    assert found["ekd/fused"] == pytest.approx(kl(z[3], np.mean(z[:3], axis=0), 3), rel=1e-5)
    assert sum(name.startswith("fkd") for name in found) == 3


def ffl_of(student: list[np.ndarray], teacher: list[np.ndarray], ramp: float) -> float:
    """FFL's loss of (a, b, f) with the teachers' values held fixed, which is what detaching means."""
    a, b, f = student
    ta, tb, tf = teacher
    ensemble = (ta + tb) / 2
    return ce(a) + ce(b) + ce(f) + ramp * (kl(f, ensemble, 3) + kl(a, tf, 3) + kl(b, tf, 3))


def okddip_of(student: list[np.ndarray], teacher: list[np.ndarray], ramp: float) -> float:
    """OKDDip's loss of (leader, peer 1, peer 2, target 1, target 2): the targets are attached,
    the peers' mean is not."""
    leader, p1, p2, t1, t2 = student
    return (
        ce(leader)
        + ce(p1)
        + ce(p2)
        + ramp * (kl(p1, t1, 3) + kl(p2, t2, 3) + kl(leader, (teacher[1] + teacher[2]) / 2, 3))
    )


@pytest.mark.parametrize(("name", "reference"), [("ffl", ffl_of), ("okddip", okddip_of)])
def test_gradients_match_finite_differences_with_detached_teachers(
    name: str, reference: Callable[..., float], z: list[np.ndarray]
) -> None:
    if name == "ffl":
        arrays = z[:3]
        out = outputs(arrays[:2], arrays[2])
        leaves = [*out.branches, out.fused]
    else:
        arrays = z[:5]
        out = outputs(arrays[:3], aggregated=np.stack(arrays[3:], axis=1))
        leaves = [*out.branches, out.aggregated]
    parts = build_method(name).losses(out, torch.tensor(LABELS), 0.4)
    torch.stack(list(parts.values())).sum().backward()
    found = [leaf.grad.double().numpy() for leaf in leaves if leaf is not None and leaf.grad is not None]
    if name == "okddip":  # the targets' gradient [n, 2, classes] back to two arrays
        found = [*found[:3], found[3][:, 0], found[3][:, 1]]

    h = 1e-5
    for k, array in enumerate(arrays):
        numeric = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            sides = []
            for sign in (1, -1):
                moved = [values.copy() for values in arrays]
                moved[k][index] += sign * h
                sides.append(reference(moved, arrays, 0.4))
            numeric[index] = (sides[0] - sides[1]) / (2 * h)
        np.testing.assert_allclose(found[k], numeric, rtol=2e-4, atol=2e-6, err_msg=f"input {k}")


def test_vanilla_and_independent_are_cross_entropy_alone(z: list[np.ndarray]) -> None:
    assert values(Vanilla(), outputs(z[:1])) == pytest.approx({"ce/branch0": ce(z[0])}, rel=1e-5)
    assert values(Independent(), outputs(z[:2])) == pytest.approx(
        {"ce/branch0": ce(z[0]), "ce/branch1": ce(z[1])}, rel=1e-5
    )


def test_dml_averages_over_the_peers_at_temperature_1_without_ramp_up(z: list[np.ndarray]) -> None:
    found = values(DML(), outputs(z[:3]), ramp=0.0)
    for i in range(3):
        peers = [kl(z[i], z[j], 1) for j in range(3) if j != i]
        assert found[f"kd/branch{i}"] == pytest.approx(sum(peers) / 2, rel=1e-5)
        assert found[f"ce/branch{i}"] == pytest.approx(ce(z[i]), rel=1e-5)


def test_one_teaches_the_branches_by_the_gated_ensemble(z: list[np.ndarray]) -> None:
    found = values(ONE(), outputs(z[:2], aggregated=z[2]))
    expected = {"ce/branch0": ce(z[0]), "ce/branch1": ce(z[1]), "ce/gated": ce(z[2])}
    expected |= {f"kd/branch{k}": 0.4 * kl(z[k], z[2], 3) for k in range(2)}
    assert found == pytest.approx(expected, rel=1e-5)


def test_cl_ilr_weighs_labels_and_the_other_branches_by_half(z: list[np.ndarray]) -> None:
    found = values(CLILR(), outputs(z[:3]))
    for k in range(3):
        others = np.mean([z[j] for j in range(3) if j != k], axis=0)
        assert found[f"ce/branch{k}"] == pytest.approx(0.5 * ce(z[k]), rel=1e-5)
        assert found[f"kd/branch{k}"] == pytest.approx(0.5 * kl(z[k], others, 2), rel=1e-5)


def test_okddip_leader_learns_from_the_peers_mean(z: list[np.ndarray]) -> None:
    targets = np.stack(z[3:5], axis=1)
    found = values(OKDDip(), outputs(z[:3], aggregated=targets))
    assert found["kd/branch0"] == pytest.approx(0.4 * kl(z[0], (z[1] + z[2]) / 2, 3), rel=1e-5)
    assert found["kd/branch1"] == pytest.approx(0.4 * kl(z[1], z[3], 3), rel=1e-5)
    assert found["kd/branch2"] == pytest.approx(0.4 * kl(z[2], z[4], 3), rel=1e-5)


def test_dualnet_weighs_the_auxiliary_classifiers_by_0_3(z: list[np.ndarray]) -> None:
    found = values(DualNet(), outputs(z[:2], z[2]))
    assert found == pytest.approx(
        {"ce/fused": ce(z[2]), "ce/branch0": 0.3 * ce(z[0]), "ce/branch1": 0.3 * ce(z[1])}, rel=1e-5
    )


def test_dualnet_alternates_and_ends_with_the_classifiers_alone() -> None:
    network = MutualNetwork(NetworkConfig(("resnet20", "resnet20"), 3, 8, 8, shared_stages=0, fusion="sum"))
    method = DualNet()
    assert method.frozen(network, 0.0, 0) == [network.branches[1]]
    assert method.frozen(network, 0.0, 1) == [network.branches[0]]
    assert method.frozen(network, 0.95, 0) == list(network.branches)


def test_soft_labels_are_accepted_by_every_cross_entropy(z: list[np.ndarray]) -> None:
    soft = torch.nn.functional.one_hot(torch.tensor(LABELS), 5).float() * 0.9 + 0.02
    found = Vanilla().losses(outputs(z[:1]), soft, 0.0)["ce/branch0"].item()
    assert found == pytest.approx(float(-(soft.numpy() * log_softmax(z[0])).sum(axis=1).mean()), rel=1e-5)


def test_cl_ilr_divides_the_trunk_gradient_by_the_number_of_branches() -> None:
    def trunk_gradient(scale: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = MutualNetwork(
            NetworkConfig(("resnet20",) * 2, 3, 8, 8, fusion=None, scale_trunk_gradient=scale)
        )
        out = network(torch.ones(4, 3, 8, 8) * torch.arange(4).view(4, 1, 1, 1))
        sum(logits.square().sum() for logits in out.branches).backward()
        return torch.cat([p.grad.flatten() for p in network.trunk.parameters()])

    torch.testing.assert_close(trunk_gradient(True), trunk_gradient(False) / 2)


def test_every_method_name_of_the_command_line_exists() -> None:
    from train.config import TrainConfig
    from train.flags import Flags

    for name in METHODS:
        assert Flags("train", TrainConfig()).typed(["--method", name]) == {"model.method": name}
    assert build_method("ffl", 4.0).temperature == 4.0
    assert build_method("dml").temperature == 1.0


@pytest.mark.parametrize(
    ("method", "branches", "words"),
    [
        ("ffl", ("resnet20",), "at least 2"),
        ("vanilla", ("resnet20", "resnet20"), "trains 1"),
        ("one", ("resnet20", "resnet32"), "one architecture"),
        ("okddip", ("resnet20", "resnet20"), "at least 3"),
    ],
)
def test_branches_that_a_method_cannot_train_are_refused(
    method: str, branches: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        build_method(method).check(branches)
