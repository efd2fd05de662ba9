"""The scales that quantization-aware training learned, by the names of a written fp32 file's tensors."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

from export.write.qdq import Scales
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.quantization import QuantizedNetwork
from ffl_deploy.networks.targets import network_path
from ffl_deploy.networks.tensor_names import Ends, tensor_names

_LAYERS = ("Conv", "Gemm")
_CLIPS = ("Relu", "Clip")


def trained_scales(quantized: QuantizedNetwork, target: str, source: Path) -> Scales:
    """-> the scales of every weight and activation of `source` that `quantized`, whose target it is,
    was trained with.

    Tensors are found by the layers around them (ffl_deploy/networks/tensor_names.py). Raises CheckError where
    a tensor has two scales, or a layer of the file none.
    """
    import onnx

    graph = onnx.load(source).graph
    initializers = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    consumers: dict[Hashable, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    # weights: the files keep the modules' own names
    steps, ends, weights = quantized.weight_scales(), {}, {}
    for node in graph.node:
        if node.op_type in _LAYERS and node.input[1] in initializers:
            path = network_path(target, node.input[1].removesuffix(".weight"))
            if path in steps:
                ends[path] = Ends(node.input[0], node.output[0])
                weights[node.input[1]] = steps[path].numpy()

    # activations: whatever has a name that training knows
    names = tensor_names(
        ends,
        lambda tensor: (
            [name for name in makers[cast(str, tensor)].input if name not in initializers]
            if tensor in makers
            else []
        ),
        lambda tensor: [(node.op_type, node.output[0]) for node in consumers.get(tensor, [])],
    )
    known = quantized.parameters_by_name()
    activations: dict[str, tuple[float, int]] = {}
    for name, tensor in names.items():
        if name in known and activations.setdefault(cast(str, tensor), known[name]) != known[name]:
            raise CheckError(
                f"{source.name}: {tensor} was trained with two scales ({name}); leave --precision int8 out."
            )
    missing = [path for path, end in ends.items() if end.taken not in activations]
    if missing:
        raise CheckError(
            f"{source.name}: training left no scale of what {missing[0]} takes; leave --precision int8 out."
        )

    # What a ReLU takes is on its grid too: the rounding clips as the ReLU does, and loses nothing twice.
    for node in graph.node:
        if node.op_type in _CLIPS and node.output[0] in activations and len(consumers[node.input[0]]) == 1:
            activations.setdefault(node.input[0], activations[node.output[0]])
    return Scales(weights, activations)
