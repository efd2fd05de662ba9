"""Multiply-adds of an ONNX graph for one image."""

from __future__ import annotations

import math
from pathlib import Path

from ffl_deploy.runtime.tensorrt_cascade import ROWS


def multiply_adds(path: Path, deferred: float = 1.0) -> int:
    """-> multiply-adds of the convolutions and matrix products of an fp32 file for one image (the rest is
    negligible). deferred: of a cascade, the share of images that its last exit answers."""
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
    total, last = 0.0, {ROWS}  # what is computed of deferred images alone
    for node in graph.node:
        share = 1.0
        if not last.isdisjoint(node.input):
            last |= set(node.output)
            share = deferred
        if node.op_type == "Conv":
            # Weights [out, in / groups, kernel...]: each output value takes in / groups x kernel products.
            total += share * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "MatMul":
            total += share * math.prod(shapes[node.output[0]]) * shapes[node.input[1]][-2]
        elif node.op_type == "Gemm":
            total += share * shapes[node.output[0]][0] * math.prod(shapes[node.input[1]])
    return round(total)
