"""fp16 and bf16 files: the network's weights and activations in 16 bits, its ends in fp32.

Normalisation stays in fp32 (a mean of 129.3 rounds to 129.25 in fp16, which is 1e-3 of a standard deviation), and so do the
temperature and the softmax. BatchNorm is folded into the convolutions before, by the exporter, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.write.onnx_file import save_onnx
from export.write.onnx_graph import SCOPES
from ffl_deploy.errors import CheckError

BF16_OPSET = 22
"""The first opset whose convolution is defined for bf16."""


def write_half(source: Path, path: Path, precision: str) -> None:
    """Convert the fp32 file `source` to `precision` ("fp16" or "bf16") and write it to `path`, checked by onnx.

    Raises CheckError where a weight does not fit into fp16, or the graph has no normalisation to start from.
    """
    import onnx

    proto = onnx.load(source, load_external_data=False)
    kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    if precision == "bf16" and proto.opset_import[0].version < BF16_OPSET:
        import onnx_ir
        from onnxscript import version_converter  # keeps node metadata, which onnx's own converter drops

        model = onnx_ir.from_proto(proto)
        version_converter.convert_version(model, BF16_OPSET)
        proto = onnx_ir.to_proto(model)
    nodes = list(proto.graph.node)
    first = _end_of_normalisation(nodes)
    end = next(index for index, node in enumerate(nodes) if "logits" in node.output) + 1
    middle, tail = nodes[first:end], nodes[end:]
    before = {name for node in nodes[:first] for name in node.output}
    inside = {name for node in middle for name in node.output}
    entering = sorted({name for node in middle for name in node.input} & before)
    outputs = {output.name for output in proto.graph.output}
    leaving = sorted(({name for node in tail for name in node.input} | outputs) & inside)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    shared = {name for node in tail for name in node.input} & set(weights)  # needed in fp32 too: the class activation map's
    # Inside, whatever crosses the border goes by another name; casts at the border give it the old one.
    inner = {name: f"{name}_{precision}" for name in [*entering, *leaving, *shared]}
    for node in middle:
        for index, name in enumerate(node.input):
            if name in weights:
                _convert(weights.pop(name), kind, proto.graph if name in shared else None, inner.get(name, name))
            node.input[index] = inner.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = inner.get(name, name)
    casts_in = [_cast(name, inner[name], kind) for name in entering]
    casts_out = [_cast(inner[name], name, onnx.TensorProto.FLOAT) for name in leaving]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:first], *casts_in, *middle, *casts_out, *tail])
    del proto.graph.value_info[:]  # types of intermediates changed; the checker infers them anew
    save_onnx(proto, path)


def _end_of_normalisation(nodes: list[Any]) -> int:
    """-> index of the first node behind the module `normalise`. Raises CheckError where there is none."""
    marked = [
        index
        for index, node in enumerate(nodes)
        if any(entry.key == SCOPES and "'normalise'" in entry.value for entry in node.metadata_props)
    ]
    if not marked:
        raise CheckError("the fp32 file does not mark its normalisation; export it again before converting it.")
    return marked[-1] + 1


def _convert(tensor: Any, kind: int, graph: Any, name: str) -> None:
    """Round an fp32 initializer to `kind`, to nearest even: in place, or as a further initializer `name` of `graph`."""
    import onnx
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    if kind == onnx.TensorProto.FLOAT16:
        if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise CheckError(f"{tensor.name} has weights beyond fp16's range; use --precision bf16.")
        converted = numpy_helper.from_array(values.astype(np.float16), name)
    else:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        converted = onnx.helper.make_tensor(name, kind, values.shape, rounded.tobytes(), raw=True)
    if graph is None:
        tensor.CopyFrom(converted)
    else:
        graph.initializer.append(converted)


def _cast(source: str, target: str, kind: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)
