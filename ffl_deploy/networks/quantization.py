"""A MutualNetwork as its int8 file will compute it: the same weights, folded and rounded,
and uint8 activations.

What export writes for CPUs, imitated in floating point ("fake quantisation", Jacob et al. 2018): batch
normalisation folded into the convolution before it with its running statistics; int8 weights, symmetric per
output channel, such that no pair of products can leave 16 bits (`weight_scales`); uint8 activations with one
scale and zero point per tensor; biases in steps of activation scale x weight scale; the logits themselves in
floating point. Rounding passes its gradient on unchanged where it does not clip (Bengio et al. 2013). The
activations' grids are those of a calibration, of least squared error; they stay while the weights learn
(learned ones, Esser et al. 2020, left the positive numbers at a rate that suits the weights).

A tensor is named by the layers around it, which an ONNX file of any target knows too: `trunk.1.0.conv1>` is
what that layer gives, `trunk.1.0.conv1<` what it takes, `fusion.depthwise<1` the second thing that its input
was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import PAIR
from ffl_deploy.networks.mutual import MutualNetwork, Outputs
from ffl_deploy.networks.tracing import trace

LEVELS = 255
"""The largest uint8."""
_PAIR_STEP = (1 + 2**-20) / PAIR


class QuantizationParameters(NamedTuple):
    """One activation tensor: real value = scale * (stored - zero_point), stored in 0..255."""

    scale: float
    zero_point: int


def weight_scales(weight: Tensor) -> Tensor:
    """weight: [out, ...] -> the step of each output channel, float32 [out], with which no weight passes 127
    steps and no two weights of a channel 128 in sum, once rounded."""
    rows = weight.detach().flatten(1).float()
    ends = [rows.abs().amax(dim=1) / 127]
    if rows.shape[1] > 1:
        positive, negative = (
            rows.clamp(min=0).topk(2, dim=1).values,
            rows.clamp(max=0).neg().topk(2, dim=1).values,
        )
        # A little wider, so that two that round up to more than PAIR are more than PAIR before it.
        ends += [positive.sum(dim=1) * _PAIR_STEP, negative.sum(dim=1) * _PAIR_STEP]
    scales = torch.stack(ends).amax(dim=0)
    return torch.where(scales > 0, scales, torch.ones_like(scales)).clamp(min=torch.finfo(torch.float32).tiny)


class ActivationQuantizer(nn.Module):
    """Rounds one activation tensor, or several that share a grid, to 256 levels.

    While `samples` is a list it only watches: values pass as they are,
    and some of them are kept for `calibrate`.
    """

    SAMPLES = 16384  # values kept of each tensor of a calibration batch

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.samples: list[Tensor] | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.samples is not None:
            flat = values.detach().flatten()
            self.samples.append(flat[:: max(1, flat.numel() // self.SAMPLES)].float().cpu())
            self.samples.append(torch.stack(flat.aminmax()).float().cpu())
            return values
        return torch.fake_quantize_per_tensor_affine(values.float(), self.scale, self.zero_point, 0, LEVELS)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Take the range with the least squared error over the kept values, and stop watching.

        Raises CheckError where they are not finite.
        """
        assert self.samples, "nothing has passed through"
        values, self.samples = torch.cat(self.samples), None
        if not torch.isfinite(values).all():
            raise CheckError(
                "activations are not finite, so they have no range; lower --lr or use an earlier checkpoint."
            )
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        shares = [1 - 0.02 * k for k in range(35)]
        high *= min(shares, key=lambda share: _squared_error(values, low, share * high))
        low *= min(shares, key=lambda share: _squared_error(values, share * low, high))
        scale, zero_point = _grid(low, high)
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)

    def parameters_now(self) -> QuantizationParameters:
        return QuantizationParameters(self.scale.item(), int(self.zero_point.item()))


def _grid(low: float, high: float) -> tuple[float, int]:
    """-> (scale, zero point) of 256 levels over low <= 0 <= high; zero is one of them."""
    scale = (high - low) / LEVELS or 1.0
    return scale, round(-low / scale)


def _squared_error(values: Tensor, low: float, high: float) -> float:
    scale, zero_point = _grid(low, high)
    return float(
        (torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, LEVELS) - values).square().sum()
    )


class FoldedLayer(nn.Module):
    """A convolution, with the batch normalisation behind it, or a linear layer, in int8;
    the modules are the network's own.

    quantizer: of its input, which decides the step of the bias.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None, quantizer: ActivationQuantizer
    ) -> None:
        super().__init__()
        self.layer, self.norm, self.quantizer = layer, norm, quantizer
        # the weights' steps in a file, where they are not to follow the weights
        self.written: Tensor | None = None

    def factor(self) -> Tensor | None:
        """-> what batch normalisation multiplies each output channel by, [out]; None without it."""
        if self.norm is None:
            return None
        assert self.norm.running_var is not None
        factor = (self.norm.running_var + self.norm.eps).rsqrt()
        return factor if self.norm.weight is None else factor * self.norm.weight

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """-> (weight, bias) of the one layer that computes both."""
        weight, bias, factor = self.layer.weight, self.layer.bias, self.factor()
        if self.norm is None or factor is None:
            return weight, bias
        assert self.norm.running_mean is not None
        shift = -self.norm.running_mean if bias is None else bias - self.norm.running_mean
        offset = shift * factor if self.norm.bias is None else shift * factor + self.norm.bias
        return weight * factor[:, None, None, None], offset

    def steps(self) -> Tensor:
        """-> the step of each output channel's weights, float32 [out]."""
        return weight_scales(self.folded()[0]) if self.written is None else self.written

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """-> the layer's own weight such that, folded, it is a whole number of steps: what int8 makes of it,
        in float."""
        weight, factor, shape = self.folded()[0], self.factor(), (-1, *[1] * (self.layer.weight.ndim - 1))
        whole = (weight / self.steps().reshape(shape)).round() * self.steps().reshape(shape)
        if factor is None:
            return whole
        usable = factor.abs().reshape(shape) > torch.finfo(torch.float32).tiny
        return torch.where(usable, whole / factor.reshape(shape), self.layer.weight)

    def forward(self, values: Tensor) -> Tensor:
        weight, bias = self.folded()
        if self.quantizer.samples is None:
            scales = self.steps()
            weight = _straight_through(weight, scales.reshape(-1, *[1] * (weight.ndim - 1)))
            bias = None if bias is None else _straight_through(bias, scales * self.quantizer.scale)
        if isinstance(self.layer, nn.Linear):
            return functional.linear(values, weight, bias)
        layer = self.layer
        return functional.conv2d(
            prepared(layer, values), weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )


def prepared(module: nn.Module, values: Tensor) -> Tensor:
    """-> `values` as the module's own call would take them: it is not called, and what train/onednn.py hangs
    before it keeps the process alive."""
    for hook in module._forward_pre_hooks.values():
        (values,) = hook(module, (values,))
    return values


def _straight_through(values: Tensor, steps: Tensor) -> Tensor:
    """-> `values` in whole `steps`, with the gradient of `values`."""
    return values + ((values / steps).round() * steps - values).detach()


class QuantizedNetwork(nn.Module):
    """`network` in int8, as export writes it. Its weights are `network`'s own;
    what it adds are the activations' grids.

    Batch normalisation uses its running statistics, dropout and stochastic depth are off, in training too.
    Raises UsageError where the network's operations cannot be followed.
    """

    def __init__(self, network: MutualNetwork) -> None:
        super().__init__()
        self.network = network
        traced = trace(network)
        self.quantizers = nn.ModuleDict(
            {f"{index}": ActivationQuantizer() for index in range(len(traced.grids))}
        )
        self.names = [sorted(names) for names in traced.grids]  # of each quantizer: all names of its tensors
        members = {node: f"{index}" for index, nodes in enumerate(traced.members) for node in nodes}
        self.layers = nn.ModuleDict()
        self.paths: dict[str, str] = {}  # key in `layers` -> the layer's path in the network
        modules: dict[str, Any] = {}
        for node in list(traced.graph.nodes):
            if node in traced.layers:
                path, norm = traced.layers[node]
                key = f"{len(self.layers)}"
                quantizer = cast(ActivationQuantizer, self.quantizers[members[node.args[0]]])
                self.layers[key] = FoldedLayer(cast(Any, network.get_submodule(path)), norm, quantizer)
                self.paths[key] = path
                node.target = f"layers.{key}"
                modules[node.target] = self.layers[key]
            elif node.op == "call_module":
                modules[node.target] = traced.replaced.get(node.target) or network.get_submodule(node.target)
            elif node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                modules[node.target] = getattr(network.get_submodule(owner), name)
        for node, key in members.items():
            modules[_insert_rounding(traced.graph, node, key)] = self.quantizers[key]
        self.body = fx.GraphModule(modules, traced.graph)
        self.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, images: Tensor) -> Outputs:
        """images: normalised [n, 3, height, width]."""
        return cast(Outputs, self.body(prepared(self.network, images)))

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Only autograd tells training from evaluation here: what this network computes is the same."""
        super().train(False)
        self.training = mode
        return self

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set every grid from normalised images [n, 3, h, w].
        Raises CheckError where activations are not finite."""
        quantizers = [cast(ActivationQuantizer, module) for module in self.quantizers.values()]
        for quantizer in quantizers:
            quantizer.samples = []
        for images in batches:
            self(images)
        for quantizer in quantizers:
            quantizer.calibrate()

    def tensors(self) -> dict[str, Tensor]:
        """-> what a checkpoint holds beside the weights: "TENSOR.scale" and "TENSOR.zero_point" of each grid,
        and "LAYER.weight_scale", the steps of the weights."""
        grids = {
            f"{names[0]}.{key}": value.detach()
            for names, module in zip(self.names, self.quantizers.values(), strict=True)
            for key, value in module.state_dict().items()
        }
        return grids | {f"{path}.weight_scale": steps for path, steps in self.weight_scales().items()}

    def load(self, tensors: Mapping[str, Tensor], origin: str, as_written: bool = False) -> None:
        """The inverse of `tensors`. as_written: keep the steps of the weights too, as a file does, instead of
        following the weights. Raises CheckError where they are of another network."""
        odd = sorted(set(self.tensors()) ^ set(tensors))
        if odd:
            raise CheckError(
                f"{origin} was quantised as another network ({odd[0]}); use it with its own run's "
                "config.json."
            )
        for names, module in zip(self.names, self.quantizers.values(), strict=True):
            module.load_state_dict({key: tensors[f"{names[0]}.{key}"] for key in ("scale", "zero_point")})
        for key, layer in self.layers.items():
            written = tensors[f"{self.paths[key]}.weight_scale"]
            cast(FoldedLayer, layer).written = written.to(self.device) if as_written else None

    def parameters_by_name(self) -> dict[str, QuantizationParameters]:
        """-> every name of every quantised activation -> its grid."""
        return {
            name: cast(ActivationQuantizer, module).parameters_now()
            for names, module in zip(self.names, self.quantizers.values(), strict=True)
            for name in names
        }

    @torch.no_grad()
    def weight_scales(self) -> dict[str, Tensor]:
        """-> path of a convolution or linear layer -> the step of each of its output channels,
        float32 [out]."""
        return {self.paths[key]: cast(FoldedLayer, layer).steps() for key, layer in self.layers.items()}

    def rounded_weights(self) -> dict[str, Tensor]:
        """-> `network`'s state with weights as int8 holds them:
        what remains between it and its int8 file is the rounding of activations."""
        state = dict(self.network.state_dict())
        for key, layer in self.layers.items():
            state[f"{self.paths[key]}.weight"] = cast(FoldedLayer, layer).rounded()
        return state


def _insert_rounding(graph: fx.Graph, node: fx.Node, key: str) -> str:
    """Let all that took `node` take it rounded by quantizer `key`; -> what the graph calls that."""
    with graph.inserting_after(node):
        rounded = graph.call_module(f"quantizers.{key}", (node,))
    node.replace_all_uses_with(rounded, lambda user: user is not rounded)
    return str(rounded.target)
