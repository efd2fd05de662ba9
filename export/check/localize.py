"""Where a saved file starts to differ from PyTorch: the first layer, by its module path.

The file's intermediate tensors are made outputs and matched with forward hooks through the module path that
every node carries. (`torch.onnx.verification` compares the program in memory, not the file, and took 71 s
where this takes seconds.)
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from export.check.true_fp16 import intermediates
from export.write.onnx_graph import SCOPES, DeployedModel
from ffl_deploy.runtime import import_onnxruntime
from ffl_deploy.runtime.replay import whole_batches

TOLERANCE = 1e-4
"""Largest difference between equal layers, as a share of the layer's standard deviation;
fp32 rounding stays near 1e-6."""

TRUE_FP16 = "true fp16"
"""Of an fp16 file, as GPUs compute it."""


class LayerDifference(msgspec.Struct, frozen=True):
    """File minus PyTorch at one module's output, in units of that output's standard deviation.

    difference: the largest; rms: the root of the mean square,
    which a few values outside a quantised range do not decide.
    """

    layer: str
    tensor: str
    difference: float
    rms: float


def first_difference(
    path: Path,
    model: DeployedModel,
    images: np.ndarray,
    precision: str = "fp32",
    scopes_from: Path | None = None,
    runtime: str = "onnxruntime",
    batch: int | None = None,
) -> str:
    """-> one clause that names the first layer of the file `path` whose output is off, or says that none is.

    Args: images: uint8 [n, h, w, 3]; precision: of the gate that failed; below fp32 every layer is off by
    some rounding, so the layer where the error grows most is named; scopes_from: the fp32 file that `path`
    was made from, for module paths; runtime: where the gate failed; batch: the only size that the file takes.
    The layers are computed by ONNX Runtime's CPU, without optimisation; in bf16, which that has no
    convolution for, by OpenVINO; in TRUE_FP16 by onnx's reference implementation.
    """
    images = whole_batches(images[:batch], batch)
    layers = layer_differences(path, model, images, scopes_from, precision)
    if precision != "fp32" and layers:
        for layer in layers:
            if not np.isfinite(layer.rms):
                return f"the first layer that is not finite is {layer.layer} (tensor {layer.tensor})"
        growth = np.diff([0.0, *(layer.rms for layer in layers)])
        worst = layers[int(np.argmax(growth))]
        return (
            f"the error grows most at {worst.layer} (to {worst.rms:.2g} of its output's standard deviation, "
            f"root mean square, tensor {worst.tensor})"
        )
    for layer in layers:
        if not layer.difference <= TOLERANCE:
            return (
                f"the first layer that differs is {layer.layer} "
                f"(by {layer.difference:.2g} of its output's standard deviation, tensor {layer.tensor})"
            )
    return (
        f"all {len(layers)} layers of the file, computed one by one on ONNX Runtime's CPU, give what PyTorch "
        f"gives, so the difference comes from how {runtime} optimises or computes the file, or from its "
        "softmax and temperature"
    )


def layer_differences(
    path: Path,
    model: DeployedModel,
    images: np.ndarray,
    scopes_from: Path | None = None,
    precision: str = "fp32",
) -> list[LayerDifference]:
    """-> the difference at every module boundary that the file still has, in the order of execution."""
    import onnx

    proto = onnx.load(path)
    outputs = module_outputs(onnx.load(scopes_from) if scopes_from else proto)
    present = {name for node in proto.graph.node for name in node.output}
    outputs = {tensor: module for tensor, module in outputs.items() if tensor in present}
    expected = _pytorch_outputs(model, images, set(outputs.values()))
    read_as = dequantized(proto)
    compute = {"bf16": _in_openvino, TRUE_FP16: intermediates}.get(precision, _intermediates)
    values = compute(proto, [read_as.get(tensor, tensor) for tensor in outputs], images)
    differences = []
    for tensor, module in outputs.items():
        found = values[read_as.get(tensor, tensor)]
        if module not in expected or expected[module].shape != found.shape:
            continue
        reference = expected[module].astype(np.float64)
        scale = float(reference.std()) or 1.0
        off = (found - reference) / scale
        largest, rms = float(np.abs(off).max(initial=0.0)), float(np.sqrt(np.mean(off**2)))
        differences.append(LayerDifference(module or "the whole model", tensor, largest, rms))
    return differences


def dequantized(proto: Any) -> dict[str, str]:
    """-> tensor -> what the next layer reads, where it is quantised:
    a ReLU may only exist as the lower end of its levels."""
    levels = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    return {
        levels[node.input[0]]: node.output[0]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in levels
    }


def module_outputs(proto: Any) -> dict[str, str]:
    """-> tensor name -> path of the innermost module whose last operation gives it,
    in the order of execution."""
    last: dict[str, str] = {}  # module path -> tensor; later nodes overwrite earlier ones
    order: list[str] = []
    for node in proto.graph.node:
        for entry in node.metadata_props:
            if entry.key == SCOPES:
                order.append(node.output[0])
                for module in ast.literal_eval(entry.value)[:-1]:
                    last[module] = node.output[0]
    innermost: dict[str, str] = {}
    for module, tensor in last.items():
        if len(module) >= len(innermost.get(tensor, "")):
            innermost[tensor] = module
    return {tensor: innermost[tensor] for tensor in order if innermost.get(tensor)}


def _pytorch_outputs(model: DeployedModel, images: np.ndarray, modules: set[str]) -> dict[str, np.ndarray]:
    """-> module path -> its output on `images`, for modules that return one tensor and are called once."""
    outputs: dict[str, np.ndarray] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output.detach().cpu().numpy().copy()

        return hook

    for name, module in model.named_modules():
        if name in modules:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        with torch.inference_mode():
            model(torch.from_numpy(images))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _intermediates(proto: Any, tensors: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """-> tensor name -> value on `images`, computed by ONNX Runtime without graph optimisation
    (which removes tensors)."""
    import onnx

    ort = import_onnxruntime()
    own = {output.name for output in proto.graph.output}
    for name in tensors:
        if name not in own:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))  # ONNX Runtime infers its type
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(list(tensors), {"images": images})
    return dict(zip(tensors, values, strict=True))


def _in_openvino(proto: Any, tensors: Sequence[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """-> tensor name -> float32 value on `images`, computed by OpenVINO's CPU in bf16."""
    import onnx

    from ffl_deploy.runtime.openvino_runtime import HINTS, openvino_core

    seen = {name: f"{name}_as_float" for name in tensors}  # NumPy has no bf16
    for name, copy in seen.items():
        proto.graph.node.append(
            onnx.helper.make_node("Cast", [name], [copy], name=copy, to=onnx.TensorProto.FLOAT)
        )
        proto.graph.output.append(onnx.helper.make_tensor_value_info(copy, onnx.TensorProto.FLOAT, None))
    core = openvino_core()
    compiled = core.compile_model(
        core.read_model(proto.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": HINTS["bf16"]}
    )
    found = {
        name: value for output, value in compiled({"images": images}).items() for name in output.get_names()
    }
    return {name: found[copy] for name, copy in seen.items()}
