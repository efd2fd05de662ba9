"""Multiply-adds of an ONNX graph for one image."""

from __future__ import annotations

import math
from pathlib import Path


def multiply_adds(path: Path) -> int:
    """-> multiply-adds of the convolutions and matrix products of an fp32 file
    for one image (the rest is negligible)."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del proto.graph.value_info[:]  # they name the batch symbolically
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output):
        # symbolic: the batch, here 1
        shapes[value.name] = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    for output in graph.output:  # declared, not inferred: a static graph names its own batch
        shapes[output.name][0] = 1
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            # Weights [out, in / groups, kernel...]: each output value takes in / groups x kernel products.
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "MatMul":
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[1]][-2]
        elif node.op_type == "Gemm":
            total += shapes[node.output[0]][0] * math.prod(shapes[node.input[1]])
    return total
