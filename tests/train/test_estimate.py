"""Memory and time of a run, before its first step."""

from __future__ import annotations

import pytest
import torch

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train import estimate
from train.flags import configure
from train.machine import Place

CPU = Place(torch.device("cpu"), "fp32")


def network(size: int = 16, branches: tuple[str, ...] = ("resnet8", "resnet8")) -> MutualNetwork:
    return MutualNetwork(NetworkConfig(branches=branches, classes=4, height=size, width=size, fusion="ffl"))


def test_what_a_step_keeps_is_what_autograd_keeps() -> None:
    """The shapes alone, against real tensors that the same hooks count."""
    real, sizes = network(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    images = torch.rand(4, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = real.train()(images)
    counted = sum(size for address, size in sizes.items() if address not in weights)
    fixed, activations = estimate.step_bytes(estimate.shapes_alone(real.config), 4)
    assert activations == pytest.approx(counted, rel=0.1)
    assert fixed == 3 * sum(4 * parameter.numel() for parameter in real.parameters())
    assert outputs is not None
    state = torch.get_rng_state()
    estimate.step_bytes(estimate.shapes_alone(real.config), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_does_not_fit_is_refused_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = estimate.shapes_alone(network().config)
    typed = {"optimisation.batch_size": 64, "machine.precision": "fp32"}
    config = configure(typed)
    fixed, activations = estimate.step_bytes(model, 2)
    monkeypatch.setattr(estimate, "available_memory", lambda: fixed + 70 * activations // 2)
    estimate.require_memory(model, config, CPU.device)
    monkeypatch.setattr(estimate, "available_memory", lambda: fixed + 20 * activations // 2)
    with pytest.raises(UsageError, match="a step of 64 images of 16x16 pixels needs at least") as caught:
        estimate.require_memory(model, config, CPU.device)
    assert "use --accumulate 4, which keeps the step" in str(caught.value)
    estimate.require_memory(model, configure({**typed, "optimisation.accumulate": 4}), CPU.device)
    monkeypatch.setattr(estimate, "available_memory", lambda: fixed + activations // 4)
    with pytest.raises(UsageError, match="use a smaller --image-size"):
        estimate.require_memory(model, config, CPU.device)


def test_the_time_is_said_where_it_is_long_and_nothing_is_changed_by_it() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    long, short = configure({"optimisation.epochs": 10_000_000}), configure({"optimisation.epochs": 1})
    (line,) = estimate.time_line(model, long, CPU, 1000)
    assert " here, by two small steps" in line
    assert line.startswith("about ")
    assert list(estimate.time_line(model, short, CPU, 8)) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_library_s_network_is_measured_once_it_is_built() -> None:
    names = ("torchvision:squeezenet1_1", "torchvision:squeezenet1_1")
    config = NetworkConfig(branches=names, classes=4, height=64, width=64, fusion="ffl")
    assert estimate.shapes_alone(config) is None
    estimate.require_memory(None, configure({}), CPU.device)
    built = MutualNetwork(config)
    fixed, activations = estimate.step_bytes(estimate.shapes_alone(config, built), 2)
    assert fixed == 12 * sum(parameter.numel() for parameter in built.parameters())
    assert activations > 2 * 2 * 4 * 64 * 31 * 31  # the first convolution's alone
