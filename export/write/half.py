"""fp16 and bf16 files: the network's weights and activations in 16 bits, its ends in fp32.

Normalisation stays in fp32 (a mean of 129.3 rounds to 129.25 in fp16, which is 1e-3 of a standard deviation),
and so do the temperature and the softmax. BatchNorm is folded into the convolutions before, by the exporter,
in fp32.

So does what fp16 cannot hold: a node around which a value comes near the end of its range (65504), as
NVIDIA's ModelOpt chooses in its AutoCast (there: above 512), and a constant that is 0 there with the division
that it guards. A processor that computes fp16 in fp32, as CPUs do, would never show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.write.onnx_file import save_onnx
from export.write.onnx_graph import SCOPES
from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import HalfRecord, KeptInFp32

BF16_OPSET = 22
"""The first opset whose convolution is defined for bf16."""
FP16_MAX = float(np.finfo(np.float16).max)
HEAD_ROOM = 8
"""How much larger than on the calibration images a value may become before it leaves fp16."""


def write_half(
    source: Path, path: Path, precision: str, magnitudes: Mapping[str, float] | None = None
) -> HalfRecord:
    """Convert the fp32 file `source` to `precision` ("fp16" or "bf16") and write it to `path`,
    checked by onnx.

    Args: magnitudes: fp32 tensor -> the largest |value| that it has on real images (export.write.magnitudes);
    fp16 needs it. Raises CheckError where the graph has no normalisation to start from.
    """
    import onnx

    proto = onnx.load(source, load_external_data=False)
    if precision == "bf16" and proto.opset_import[0].version < BF16_OPSET:
        import onnx_ir
        from onnxscript import version_converter  # keeps node metadata, which onnx's own converter drops

        model = onnx_ir.from_proto(proto)
        version_converter.convert_version(model, BF16_OPSET)
        proto = onnx_ir.to_proto(model)
    conversion = _Conversion(proto, precision)
    nodes = list(proto.graph.node)
    end = next(index for index, node in enumerate(nodes) if "logits" in node.output) + 1
    network = [node for node in nodes[_end_of_normalization(nodes) : end] if conversion.touches_floats(node)]

    # What stays in fp32: operators that are not defined in 16 bits, and, in fp16, what may leave its range.
    kept = []
    vanished = vanishing(network, conversion.weights) if precision == "fp16" else {}
    for node in network:
        reason = conversion.undefined(node) or (
            vanished.get(node.name) or out_of_range(node, conversion, magnitudes or {})
            if precision == "fp16"
            else ""
        )
        if reason:
            kept.append(KeptInFp32(node.name, node.op_type, reason))
    names = {entry.node for entry in kept}
    conversion.convert([node for node in network if node.name not in names])
    save_onnx(proto, path)
    if precision == "bf16":
        return HalfRecord(kept)
    inside = [(magnitudes or {}).get(name, 0.0) for node in network for name in node.output]
    return HalfRecord(kept, largest=float(np.max(inside, initial=0.0)), limit=FP16_MAX / HEAD_ROOM)


def out_of_range(node: Any, conversion: _Conversion, magnitudes: Mapping[str, float]) -> str:
    """-> why `node` cannot be computed in fp16, "" where it can. NaN and infinity are out of range."""
    for name in (*node.input, *node.output):
        if name in conversion.weights:
            largest = float(np.abs(conversion.weights[name]).max(initial=0.0))
            if not largest <= FP16_MAX:
                return f"its weight {name} reaches {largest:.3g}"
        elif not (largest := magnitudes.get(name, 0.0)) <= FP16_MAX / HEAD_ROOM:
            return f"{name} reaches {largest:.3g}"
    return ""


DIVISIONS = {"Div", "Reciprocal"}
CARRIERS = {"Expand", "Identity", "Reshape", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators behind which a number close to 0 still is one."""


def vanishing(nodes: Sequence[Any], weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """-> name of a node -> why it cannot be computed in fp16: a constant of its is 0 there, as the 1e-12 that
    keeps a norm off zero is. With it stay the reduction that it guards, and what follows up to the division,
    which would divide by that 0."""
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    zero = {
        name: float(np.abs(values).max())
        for name, values in weights.items()
        if values.any() and not values.astype(np.float16).any()
    }
    found: dict[str, str] = {}
    for node in nodes:
        constants = [name for name in node.input if name in zero]
        if not constants:
            continue
        reason = f"its constant {constants[0]} of {zero[constants[0]]:.3g} is 0 in fp16"
        found[node.name] = reason
        behind = [reader for name in node.output for reader in readers.get(name, [])]
        while behind:
            one = behind.pop()
            if one.op_type in CARRIERS | DIVISIONS:
                found.setdefault(one.name, f"behind {node.name}: {reason}")
            if one.op_type in CARRIERS:
                behind += [reader for name in one.output for reader in readers.get(name, [])]
        for name in node.input:
            if name in makers and makers[name].op_type.startswith("Reduce"):
                found.setdefault(makers[name].name, f"before {node.name}: {reason}")
    return found


class _Conversion:
    """Changes nodes of a graph to 16 bits, and casts where a tensor passes between them and the others.

    A tensor that is needed in both precisions keeps its name in fp32
    and has the precision's as a suffix in 16 bits.
    """

    def __init__(self, proto: Any, precision: str) -> None:
        import onnx
        from onnx import numpy_helper

        self.graph, self.precision = proto.graph, precision
        self.kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        typed = (*inferred.value_info, *inferred.output, *inferred.input)
        self.floats = {
            value.name for value in typed if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        initializers = [one for one in self.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
        self.weights = {one.name: numpy_helper.to_array(one) for one in initializers}
        self.floats |= set(self.weights)

    def touches_floats(self, node: Any) -> bool:
        """Shapes and indices are integers, which no 16-bit float may hold."""
        return bool(self.floats & {*node.input, *node.output})

    def undefined(self, node: Any) -> str:
        """-> why ONNX does not define `node` in 16 bits, "" where it does."""
        import onnx

        if node.domain not in ("", "ai.onnx") or any(attribute.HasField("g") for attribute in node.attribute):
            return f"{node.op_type} is no plain operator of ONNX"
        if node.op_type == "Constant" and not any(attribute.name == "value" for attribute in node.attribute):
            return "its value is fp32 by definition"
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
        wanted = "tensor(float16)" if self.precision == "fp16" else "tensor(bfloat16)"
        ends = [(node.input, schema.inputs, False), (node.output, schema.outputs, True)]
        for names, parameters, given in ends:
            for name, parameter in zip(names, _per_name(parameters, len(names)), strict=True):
                fixed = parameter.type_str not in allowed
                if name in self.floats and (given if fixed else wanted not in allowed[parameter.type_str]):
                    return f"{node.op_type} of opset {self.opset} is not defined in {self.precision}"
        return ""

    def _takes(self, node: Any) -> list[int]:
        """-> positions of the inputs that `node` takes in 16 bits:
        all floats but those that are fp32 by definition (scales)."""
        import onnx

        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        variables = {one.type_param_str for one in schema.type_constraints}
        parameters = _per_name(schema.inputs, len(node.input))
        return [
            index
            for index, (name, parameter) in enumerate(zip(node.input, parameters, strict=True))
            if name in self.floats and parameter.type_str in variables
        ]

    def convert(self, chosen: list[Any]) -> None:
        """Compute the nodes `chosen` in 16 bits, all others as they are."""
        import onnx

        half = {id(node) for node in chosen}
        nodes = list(self.graph.node)
        taken = {id(node): self._takes(node) for node in chosen}
        made = {name for node in chosen for name in node.output if name in self.floats}  # in 16 bits
        wanted = {node.input[index] for node in chosen for index in taken[id(node)]}  # in 16 bits
        needed = {output.name for output in self.graph.output}  # in fp32, as what other nodes read
        for node in nodes:
            taken_here = set(taken.get(id(node), ()))
            needed |= {name for index, name in enumerate(node.input) if index not in taken_here}
            needed |= set(_captured(node))
        # Both precisions of one tensor need two names.
        inner = {name: f"{name}_{self.precision}" for name in wanted if name not in made or name in needed}
        inner |= {name: f"{name}_{self.precision}" for name in made & needed}
        self._weights(wanted, needed, inner)
        rewritten = []
        for node in nodes:
            rewritten.append(node)
            outputs = list(node.output)
            if id(node) in half:
                for index in taken[id(node)]:
                    node.input[index] = inner.get(node.input[index], node.input[index])
                for index, name in enumerate(outputs):
                    node.output[index] = inner.get(name, name) if name in made else name
                self._attributes(node)
            for name in outputs:
                if name in made & needed:
                    rewritten.append(_cast(inner[name], name, onnx.TensorProto.FLOAT))
                elif name in wanted and name not in made:
                    rewritten.append(_cast(name, inner[name], self.kind))
        del self.graph.node[:]
        self.graph.node.extend(rewritten)
        del self.graph.value_info[:]  # types of intermediates changed; the checker infers them anew

    def _weights(self, wanted: set[str], needed: set[str], inner: dict[str, str]) -> None:
        """Round the weights that are wanted; those that are needed in fp32 too (the class activation map's)
        stay beside."""
        for tensor in list(self.graph.initializer):
            if tensor.name in self.weights and tensor.name in wanted:
                if tensor.name in needed:
                    self.graph.initializer.append(
                        self._rounded(self.weights[tensor.name], inner[tensor.name])
                    )
                else:
                    inner.pop(tensor.name, None)
                    tensor.CopyFrom(self._rounded(self.weights[tensor.name], tensor.name))

    def _attributes(self, node: Any) -> None:
        """Constants and casts inside the network: their type is an attribute."""
        import onnx
        from onnx import numpy_helper

        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = self.kind
            elif attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.FLOAT:
                attribute.t.CopyFrom(self._rounded(numpy_helper.to_array(attribute.t), attribute.t.name))

    def _rounded(self, values: np.ndarray, name: str) -> Any:
        """-> a tensor of the 16-bit type, rounded to nearest even."""
        import onnx
        from onnx import numpy_helper

        if self.precision == "fp16":
            return numpy_helper.from_array(values.astype(np.float16), name)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return onnx.helper.make_tensor(name, self.kind, values.shape, rounded.tobytes(), raw=True)


def _end_of_normalization(nodes: list[Any]) -> int:
    """-> index of the first node behind the module `normalise`. Raises CheckError where there is none."""
    marked = [
        index
        for index, node in enumerate(nodes)
        if any(entry.key == SCOPES and "'normalise'" in entry.value for entry in node.metadata_props)
    ]
    if not marked:
        raise CheckError(
            "the fp32 file does not mark its normalisation; export it again before converting it."
        )
    return marked[-1] + 1


def _per_name(parameters: Any, count: int) -> list[Any]:
    """-> the formal parameter of each of `count` inputs or outputs; the last one may stand for several."""
    return [parameters[min(index, len(parameters) - 1)] for index in range(count)]


def _captured(node: Any) -> Iterator[str]:
    """-> names that the graphs inside `node` may read from the graph around it."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _cast(source: str, target: str, kind: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)
