"""Can a processor's 8-bit kernels lose what an int8 file says? The answer, from the file alone.

CPUs without VNNI multiply unsigned activations with signed weights by `vpmaddubsw`: two products side by side
are added in 16 bits, and a sum beyond them is cut off, in silence. ONNX Runtime and oneDNN (OpenVINO) both do
so on AVX2 and SSE; signed activations are shifted to unsigned ones first. Which two weights of an output
channel stand side by side is the kernel's choice, so a file is safe where no two of them can leave 16 bits
with the largest activation, 255. That is its certificate.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import ACTIVATION, LIMIT, Certificate
from ffl_deploy.runtime.onnx_wire import Graph, Node, read_graph

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OTHER_PRODUCTS = ("Einsum", "DeformConv", "Attention", "RNN", "GRU", "LSTM")
"""Sums of products that a runtime may take apart into those above; export writes none of them in 8 bits."""
MOVES = (
    "Transpose",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Concat",
    "Identity",
    "Gather",
    "Expand",
    "Pad",
)
"""Operators through which runtimes carry a quantised tensor as it is."""
_QUANTIZED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")


def certify(path: Path) -> Certificate:
    """-> the certificate of an ONNX file. Raises CheckError
    for a graph whose int8 layers cannot be followed."""
    sums = pair_sums(read_graph(path), path)
    return Certificate(max(sums.values(), default=0), LIMIT, len(sums))


def check_certificate(path: Path, stored: Certificate) -> None:
    """Raises CheckError, naming the layer, where the file can saturate,
    or is not what `stored` was written of."""
    sums = pair_sums(read_graph(path), path)
    found = Certificate(max(sums.values(), default=0), LIMIT, len(sums))
    if not found.holds:
        layer = max(sums, key=lambda name: sums[name])
        raise CheckError(
            f"{path.name}: two products of the layer {layer} can add up to {sums[layer]}, beyond the {LIMIT} "
            "that processors without VNNI hold; do not use this variant, or export the bundle again."
        )
    if found != stored:
        raise CheckError(
            f"{path.name} adds up to {found.largest_pair_sum} at most in {found.layers} int8 layers, its "
            f"certificate says {stored.largest_pair_sum} in {stored.layers}; copy the bundle anew, or export "
            "it again."
        )


def largest_pair(weights: np.ndarray, axis: int | None) -> int:
    """-> the largest |sum| of two integer weights of one output channel, which is one position of `axis`;
    of any two: None."""
    values = weights.astype(np.int64)
    rows = (
        values.reshape(1, -1)
        if axis is None
        else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    )
    if rows.shape[1] < 2:  # beside a single one stands padding
        return int(np.abs(rows).max(initial=0))
    ordered = np.partition(rows, (0, 1, -2, -1) if rows.shape[1] > 3 else range(rows.shape[1]), axis=1)
    # A pair of unlike signs may be the largest only as a single one beside padding.
    most = [ordered[:, -1] + ordered[:, -2], -(ordered[:, 0] + ordered[:, 1]), ordered[:, -1], -ordered[:, 0]]
    return int(np.max(most))


def pair_sums(graph: Graph, path: Path) -> dict[str, int]:
    """-> layer -> its largest |sum of two products|, for all layers that a runtime may compute in 8 bits.

    Raises CheckError where a layer's 8-bit weights are not plain initializers of the graph.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs}
    sums: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if (
            node.domain not in ("", "ai.onnx")
            or node.operator in _QUANTIZED
            or node.subgraphs
            or graph.functions
        ):
            raise _unknown(
                path, f"the node {node.name or index} ({node.domain or 'ai.onnx'} {node.operator})"
            )
        if node.operator in _OTHER_PRODUCTS and any(_constants(name, graph, makers) for name in node.inputs):
            raise _unknown(path, f"the weights of {node.name or index} ({node.operator})")
        if node.operator not in _WEIGHTED:
            continue
        for place, name in enumerate(node.inputs[:2]):
            source, moved = _behind(name, makers)
            if source is None or source.operator != "DequantizeLinear":
                if _constants(name, graph, makers):
                    raise _unknown(path, f"the weights of {node.name or index}")
                continue
            weights = graph.tensors.get(source.inputs[0])
            if weights is None:
                if place == 0:
                    continue  # activations
                raise _unknown(path, f"the weights of {node.name or index}")
            if moved and (joined := _constants(name, graph, makers)) != 1:
                if place == 0 and not joined:
                    continue  # activations, joined to a constant
                raise _unknown(path, f"the weights of {node.name or index}")
            if weights.dtype not in (np.int8, np.uint8) or _has_zero_point(source, graph):
                raise _unknown(path, f"the weights of {node.name or index}")
            axis = None if moved or place == 0 else _channels(node, weights)
            layer = node.name or f"{node.operator} {index}"
            sums[layer] = max(sums.get(layer, 0), ACTIVATION * largest_pair(weights, axis))
    return sums


def _behind(name: str, makers: dict[str, Node]) -> tuple[Node | None, bool]:
    """-> (the node that computes a tensor, past those that only move it; whether there were such)."""
    moved = False
    for _ in range(len(makers) + 1):  # a graph with a circle is none, and no runtime loads it
        node = makers.get(name)
        if node is None or node.operator not in MOVES:
            return node, moved
        name, moved = node.inputs[0], True
    return None, moved


def _constants(name: str, graph: Graph, makers: dict[str, Node]) -> int:
    """-> how many quantised constants a tensor is computed from;
    0 where an input of the graph is among its sources.

    One that is computed from several, or by more than moving, has no bound here: ONNX Runtime multiplies it
    in float, but OpenVINO moves factors and joins past DequantizeLinear and multiplies in 8 bits.
    """
    count, seen, open_names = 0, set(), [name]
    while open_names:
        current = open_names.pop()
        node = makers.get(current)
        if node is None:
            if current and current not in graph.tensors:
                return 0  # an input of the graph: these are activations
        elif current not in seen:
            seen.add(current)
            count += node.operator == "DequantizeLinear"
            open_names += node.inputs
    return count


def _channels(node: Node, weights: np.ndarray) -> int | None:
    """-> the axis of the output channels; None where it is not one of the weights',
    so that any two count as neighbours."""
    if node.operator == "Conv":
        return 0
    if node.operator == "Gemm":
        return 0 if node.integers.get("transB") else 1
    if node.operator == "MatMul" and weights.ndim == 2:
        return 1
    return None


def _has_zero_point(node: Node, graph: Graph) -> bool:
    """-> whether weights are stored around another number than zero,
    or around one that is not in the file."""
    if len(node.inputs) < 3 or not node.inputs[2]:
        return False
    zero_point = graph.tensors.get(node.inputs[2])
    return zero_point is None or bool(np.any(zero_point))


def _unknown(path: Path, what: str) -> CheckError:
    return CheckError(
        f"{path.name}: {what} cannot be checked for saturation in 8 bits; this is no file of ffl-export: "
        "export the bundle again."
    )
