"""A network in int8: safe weights, folding, gradients, names, and what cannot be followed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ffl_deploy.errors import CheckError, UsageError
from ffl_deploy.manifest import PAIR
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.networks.quantization import ActivationQuantizer, QuantizedNetwork, weight_scales
from ffl_deploy.networks.tracing import trace
from ffl_deploy.saturation import largest_pair

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) - 0.4


def network(disturb: Callable[[nn.Module], nn.Module], *branches: str) -> MutualNetwork:
    built = MutualNetwork(NetworkConfig(branches, 5, 16, 16))
    disturb(built)
    return built.eval()


def hostile_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "normal": torch.randn(64, 8, 3, 3, generator=draw),
        "heavy tails": torch.randn(64, 16, generator=draw) ** 5,
        "two alike": torch.tensor([[1.0, 1.0, -0.2], [-3.0, -3.0, 1.0]]),
        "halves": torch.tensor([[63.5, 64.5, 0.5], [64.5, 64.5, 1.5]]) / 7,
        "one alone": torch.tensor([[5.0], [-2.0]]),
        "zeros": torch.zeros(3, 4),
        "one sign": torch.rand(32, 9, generator=draw),
        "tiny": torch.randn(4, 9, generator=draw) * 1e-30,
    }


@pytest.mark.parametrize("kind", hostile_weights())
def test_no_two_rounded_weights_of_a_channel_can_leave_16_bits(kind: str) -> None:
    weight = hostile_weights()[kind]
    scales = weight_scales(weight)
    whole = np.rint((weight.flatten(1) / scales[:, None]).numpy())
    assert np.isfinite(whole).all()
    assert np.abs(whole).max() <= 127
    assert largest_pair(whole.astype(np.int32), 0) <= PAIR


def test_the_bound_wastes_nothing_of_8_bits() -> None:
    whole = (
        hostile_weights()["normal"].flatten(1) / weight_scales(hostile_weights()["normal"])[:, None]
    ).round()
    tops = [largest_pair(row[None].numpy().astype(np.int32), 0) for row in whole]
    # the two largest of each channel use all but a step of what is safe, or one uses all of int8
    assert min(tops) >= 127


@pytest.mark.parametrize(
    "branches", [("resnet8", "resnet8"), ("wrn16_2", "resnet8"), ("torchvision:resnet18", "vgg16_bn")]
)
def test_without_rounding_it_is_the_network(
    disturb: Callable[[nn.Module], nn.Module], branches: tuple[str, str]
) -> None:
    plain = network(disturb, *branches)
    quantized = QuantizedNetwork(plain)
    for quantizer in quantized.quantizers.values():
        quantizer.samples = []
    with torch.no_grad():
        expected, found = plain(IMAGES).classifiers(), quantized(IMAGES).classifiers()
    for name, logits in expected.items():
        assert torch.allclose(found[name], logits, atol=1e-4 * float(logits.abs().max())), name


@pytest.mark.parametrize(
    "joined",
    [{"fusion": "sum"}, {"fusion": None, "aggregator": "gate"}, {"fusion": None, "aggregator": "attention"}],
)
def test_every_way_to_join_branches_can_be_followed(
    disturb: Callable[[nn.Module], nn.Module], joined: dict[str, str | None]
) -> None:
    plain = MutualNetwork(NetworkConfig(("resnet8",) * 3, 5, 16, 16, **joined))  # type: ignore[arg-type]
    disturb(plain)
    quantized = QuantizedNetwork(plain.eval())
    quantized.calibrate([IMAGES])
    with torch.no_grad():
        expected, found = plain(IMAGES).classifiers(), quantized(IMAGES).classifiers()
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        assert (found[name] - logits).abs().max() / logits.std() < 0.4, name
    # what joins logits stays in floating point
    assert not any("aggregator" in path for path in quantized.paths.values())


def test_rounding_changes_logits_little_and_every_weight_learns(
    disturb: Callable[[nn.Module], nn.Module],
) -> None:
    plain = network(disturb, "resnet8", "resnet8")
    quantized = QuantizedNetwork(plain).train()
    quantized.calibrate([IMAGES])
    outputs = quantized(IMAGES).classifiers()
    with torch.no_grad():
        expected = plain(IMAGES).classifiers()
    for name, logits in expected.items():
        difference = (outputs[name] - logits).abs().max() / logits.std()
        assert 0 < difference < 0.3, name
    torch.stack([(logits**2).sum() for logits in outputs.values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in quantized.parameters())
    assert all(not module.training for module in plain.modules() if isinstance(module, nn.BatchNorm2d))
    before = plain.trunk[0][1].running_mean.clone()
    quantized(IMAGES)
    assert torch.equal(plain.trunk[0][1].running_mean, before)


def test_rounding_passes_gradients_on_where_it_does_not_clip() -> None:
    quantizer = ActivationQuantizer()
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(10)
    values = torch.tensor([0.3, 1.1, -4.0, 200.0, -100.0], requires_grad=True)
    rounded = quantizer(values)
    assert rounded.tolist() == [0.5, 1.0, -4.0, 122.5, -5.0]
    rounded.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 1, 0, 0]


def test_calibration_leaves_out_an_outlier_that_costs_more_than_it_saves() -> None:
    quantizer = ActivationQuantizer()
    quantizer.samples = []
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        quantizer(torch.rand(16384, generator=draw))
    quantizer(torch.tensor([1.3]))
    quantizer.calibrate()
    assert quantizer.zero_point.item() == 0  # nothing is negative
    assert 1.0 <= quantizer.scale.item() * 255 < 1.29
    quantizer.samples = []
    quantizer(torch.tensor([[0.0, float("inf")]]))
    with pytest.raises(CheckError, match="not finite"):
        quantizer.calibrate()


def test_what_a_checkpoint_holds_gives_the_same_answers(disturb: Callable[[nn.Module], nn.Module]) -> None:
    plain = network(disturb, "resnet8", "resnet8")
    quantized = QuantizedNetwork(plain)
    quantized.calibrate([IMAGES])
    again = QuantizedNetwork(plain)
    again.load(quantized.tensors(), "it")
    with torch.no_grad():
        assert torch.equal(again(IMAGES).fused, quantized(IMAGES).fused)
    other = network(disturb, "resnet14", "resnet14")
    with pytest.raises(CheckError, match="another network"):
        QuantizedNetwork(other).load(quantized.tensors(), "it")


def test_rounded_weights_are_whole_steps_and_int8_is_the_same_with_them(
    disturb: Callable[[nn.Module], nn.Module],
) -> None:
    plain = network(disturb, "resnet8", "resnet8")
    quantized = QuantizedNetwork(plain)
    quantized.calibrate([IMAGES])
    tensors, state = quantized.tensors(), quantized.rounded_weights()
    rounded = MutualNetwork(plain.config).eval()
    rounded.load_state_dict(state)
    again = QuantizedNetwork(rounded)
    again.load(tensors, "it", as_written=True)
    for key, layer in again.layers.items():
        whole = layer.folded()[0].flatten(1) / tensors[f"{again.paths[key]}.weight_scale"][:, None]
        assert (whole - whole.round()).abs().max() < 1e-3
    with torch.no_grad():
        found, expected = again(IMAGES).classifiers(), quantized(IMAGES).classifiers()
    for name, logits in expected.items():
        assert torch.allclose(found[name], logits, atol=1e-3 * float(logits.abs().max())), name


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + x


@pytest.mark.parametrize(("layer", "reason"), [(Undecided(), "control flow"), (Overwriting(), "overwrites")])
def test_operations_that_cannot_be_followed_are_refused_in_a_sentence(
    disturb: Callable[[nn.Module], nn.Module], layer: nn.Module, reason: str
) -> None:
    plain = network(disturb, "resnet8", "resnet8")
    plain.trunk.append(layer)
    plain.train()
    with pytest.raises(UsageError, match=f"resnet8.*{reason}.*by calibration"):
        QuantizedNetwork(plain)
    assert all(module.training for module in plain.modules())


def test_a_tensor_is_named_by_the_layers_around_it(disturb: Callable[[nn.Module], nn.Module]) -> None:
    traced = trace(network(disturb, "resnet8", "resnet8"))
    grids = {name: index for index, names in enumerate(traced.grids) for name in names}
    # what the block's second convolution takes is the ReLU behind the first; one grid
    assert grids["trunk.1.0.conv2<"] == grids["trunk.1.0.conv1>Relu"]
    assert "trunk.1.0.conv1>" not in grids  # the ReLU's result is rounded, not what it takes
    # branches that are concatenated share the grid of the concatenation
    assert grids["fusion.depthwise<"] == grids["fusion.depthwise<0"] == grids["fusion.depthwise<1"]
    assert grids["heads.0<0"] == grids["fusion.depthwise<"]
    assert grids["trunk.1.0.conv2>"] != grids["trunk.1.0.conv2>Add>Relu"]
    assert "heads.0>" not in grids
