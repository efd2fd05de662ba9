"""One int8 file: QuantizeLinear and DequantizeLinear around the layers, with these ranges and scales.

Weights are quantised such that no two products of an output channel can leave 16 bits, whatever kernel adds
them up (ffl_deploy/saturation.py, which proves it on the written file): a processor without VNNI then
computes what one with VNNI does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.write.graph_parts import (
    OPERATORS,
    WEIGHTED,
    activation_products,
    free_activation_products,
    outside_the_network,
)
from export.write.onnx_file import finish
from ffl_deploy.files import write_atomically
from ffl_deploy.manifest import PAIR
from ffl_deploy.saturation import largest_pair


@dataclass(frozen=True)
class Scales:
    """Scales to use as they are. weights: initializer -> float32 [output channels]; activations: tensor ->
    (scale, zero point 0..255), for the form that stores activations as uint8."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    activations: dict[str, tuple[float, int]] = field(default_factory=dict)


def write_form(
    proto: Any,
    path: Path,
    ranges: Any,
    form: str,
    float_layers: Sequence[str] = (),
    scales: Scales | None = None,
) -> None:
    """Write one quantised form of the pre-processed model `proto`;
    weights are int8 per output channel in both."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    # which layers; the logits themselves stay in fp32, since 256 levels would make ties of close classes
    scales = scales or Scales()
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    excluded = {*outside_the_network(proto), *activation_products(proto), *float_layers}

    # which scales
    overrides: dict[str, Any] = _weight_overrides(proto, excluded, scales)
    if form == "tensorrt":
        options |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    else:
        overrides |= {
            name: [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero_point, np.uint8)}]
            for name, (scale, zero_point) in scales.activations.items()
        }

    # the file
    quantizer = QDQQuantizer(
        model=copy.deepcopy(proto),
        per_channel=True,
        reduce_range=False,  # the overrides are narrower where they have to be
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if form == "cpu" else QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(excluded),
        op_types_to_quantize=list(OPERATORS),
        extra_options={**options, "TensorQuantOverrides": overrides},
    )
    quantizer.quantize_model()
    free_activation_products(quantizer.model.model, set(activation_products(proto)))
    quantizer.model.topological_sort()
    finish(quantizer.model.model)
    write_atomically(path, quantizer.model.model.SerializeToString(deterministic=True))


def channel_scales(weights: np.ndarray) -> np.ndarray:
    """-> float32 [channels]: the least scales at which no two integer weights
    of a channel add up to more than PAIR.

    weights: float [channels, ...]. At such a scale the two largest of one sign share PAIR = 128 between them:
    where they are alike that is 7 bits, a lone large one may use the eighth.
    """
    rows = weights.reshape(len(weights), -1).astype(np.float64)
    # beside the last stands padding
    ordered = np.sort(np.concatenate([rows, np.zeros((len(rows), 2))], axis=1), axis=1)
    pair = np.maximum(ordered[:, -1] + ordered[:, -2], -(ordered[:, 0] + ordered[:, 1]))
    scales = np.maximum(pair / PAIR, np.abs(rows).max(axis=1, initial=0) / 127)
    # of weights that are all zero
    scales = np.maximum(scales, np.finfo(np.float32).tiny * 2**23).astype(np.float32)
    for _ in range(8):  # rounding to float32 can cost one unit
        wide = np.array([_sum_of_pair(row, scale) > PAIR for row, scale in zip(rows, scales, strict=True)])
        if not wide.any():
            break
        scales = np.where(wide, scales * np.float32(1 + 2**-12), scales).astype(np.float32)
    return scales


def _sum_of_pair(row: np.ndarray, scale: np.float32) -> int:
    return largest_pair(np.clip(np.rint(row.astype(np.float32) / scale), -127, 127)[None], 0)


def _weight_overrides(proto: Any, excluded: set[str], scales: Scales) -> dict[str, Any]:
    """-> initializer -> one override a channel, for the weights of every layer that is quantised."""
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    overrides: dict[str, Any] = {}
    for node in proto.graph.node:
        if node.op_type not in WEIGHTED or node.name in excluded or len(node.input) < 2:
            continue
        tensor = initializers.get(node.input[1])
        if tensor is None:
            continue
        values = numpy_helper.to_array(tensor)
        transposed = next((attribute.i for attribute in node.attribute if attribute.name == "transB"), 0)
        axis = 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and transposed) else 1
        given = scales.weights.get(tensor.name)
        chosen = (
            channel_scales(np.moveaxis(values, axis, 0)) if given is None else np.asarray(given, np.float32)
        )
        overrides[tensor.name] = [
            {"scale": scale, "zero_point": np.int8(0), **({"axis": axis} if index == 0 else {})}
            for index, scale in enumerate(chosen)
        ]
    return overrides
