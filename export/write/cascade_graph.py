"""A cascade as one graph: the first exit for every image, the rest for the rows that its threshold defers.

    images -> first exit -> Less -> NonZero -> Gather -> the rest -> ScatterND -> logits

torch.export cannot trace a batch whose size depends on values. So the rows are an input while it traces, with
a size of their own, and are joined to what they are made from in the finished graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.write.onnx_graph import DeployedModel
from ffl_deploy.errors import CheckError
from ffl_deploy.networks.targets import CascadeTarget
from ffl_deploy.runtime.tensorrt_cascade import MAP, ROWS, SCORE

EXIT, THRESHOLD = "exit", "threshold"
ALL, NONE = 2.0, -1.0
"""Thresholds that defer every image, and none: a softmax lies between."""


class CascadeModel(DeployedModel):
    """pixels -> (logits, probabilities, exit int64 [n]: 0 where the first exit answered, 1 the last)."""

    target: CascadeTarget

    def __init__(
        self,
        target: CascadeTarget,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        temperature: float,
        threshold: float,
    ) -> None:
        super().__init__(target, mean, std, temperature)
        self.threshold: Tensor
        self.register_buffer(THRESHOLD, torch.tensor(threshold, dtype=torch.float32))

    @property
    def output_names(self) -> list[str]:
        return ["logits", "probabilities", EXIT]

    def forward(self, images: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """rows: int64 [deferred], which images the last exit answers; found where it is None."""
        first = self.target.first(self.normalise(images))
        deferred = torch.softmax(first.logits, dim=1).amax(dim=1) < self.threshold
        if rows is None:
            rows = torch.nonzero(deferred).squeeze(1)
        last = self.target.last(first, rows)
        logits = first.logits.index_put((rows,), last)
        return logits, torch.softmax(logits / self.temperature, dim=1), deferred.to(torch.int64)

    def tracing(self, example: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any] | None, list[str]]:
        rows = torch.tensor([0, 2])  # of three: sizes of their own
        size = torch.export.Dim("deferred", min=1, max=65536)
        three = example[:1].repeat(3, 1, 1, 1)
        _, shapes, names = super().tracing(three)
        return (three, rows), {**(shapes or {}), ROWS: {0: size}}, [*names, ROWS]

    def finish(self, proto: Any) -> None:
        """Join the input `rows` to what decides them, in place. Raises CheckError for another graph."""
        from onnx import TensorProto, helper, numpy_helper

        graph = proto.graph
        (rows,) = [value for value in graph.input if value.name == ROWS]
        graph.input.remove(rows)
        deciding = [node for node in graph.node if node.op_type == "Less"]
        if len(deciding) != 1 or THRESHOLD not in deciding[0].input[1:]:
            raise CheckError("the exporter wrote the cascade's threshold otherwise than expected.")
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows_axis"))
        graph.node.extend(
            [
                helper.make_node("NonZero", [deciding[0].output[0]], ["rows_2d"], name="rows_found"),
                helper.make_node("Squeeze", ["rows_2d", "rows_axis"], [ROWS], name="rows_flat"),
            ]
        )
        graph.value_info.append(helper.make_tensor_value_info(ROWS, TensorProto.INT64, ["deferred"]))
        in_order(graph)


def write_halves(source: Path, folder: Path) -> tuple[Path, Path]:
    """Cut the cascade `source` where rows are chosen, for runtimes that cannot; -> two ONNX files in
    `folder`: images -> `logits` of the first exit, `score`, `map0`, ...; these maps -> the last exit's
    `logits`."""
    import onnx

    from export.write.onnx_file import save_onnx

    proto = onnx.load(source)
    makers = {name: node for node in proto.graph.node for name in node.output}
    (deciding,) = [node for node in proto.graph.node if node.op_type == "Less"]
    joining = makers["logits"]  # ScatterND: the first exit's logits, rows, the last one's
    chosen = [node for node in proto.graph.node if node.op_type == "Gather" and _reads(node, ROWS, makers)]
    before = {node.input[0]: f"{MAP}{number}" for number, node in enumerate(chosen)}
    after = {node.output[0]: f"{MAP}{number}" for number, node in enumerate(chosen)}
    first = {joining.input[0]: "logits", deciding.input[0]: SCORE, **before}
    paths = folder / "first.onnx", folder / "last.onnx"
    save_onnx(_half(proto, {"images": "images"}, first), paths[0])
    save_onnx(_half(proto, after, {joining.input[2]: "logits"}), paths[1])
    return paths


def _reads(node: Any, name: str, makers: dict[str, Any]) -> bool:
    """-> whether `node` takes its indices from `name`, directly or through a change of shape."""
    indices = node.input[1]
    while indices != name and indices in makers and makers[indices].op_type in ("Reshape", "Unsqueeze"):
        indices = makers[indices].input[0]
    return bool(indices == name)


def _half(proto: Any, inputs: dict[str, str], outputs: dict[str, str]) -> Any:
    """-> a model of what lies between tensors of `proto`, each with its new name."""
    import copy

    from onnx import helper

    graph, names = proto.graph, inputs | outputs
    makers = {name: node for node in graph.node for name in node.output}
    open_names, kept = list(outputs), set()
    while open_names:
        name = open_names.pop()
        if name not in inputs and name in makers and makers[name].name not in kept:
            kept.add(makers[name].name)
            open_names += makers[name].input
    nodes = [copy.deepcopy(node) for node in graph.node if node.name in kept]
    used = {name for node in nodes for name in node.input}
    for node in nodes:
        for fields in (node.input, node.output):
            fields[:] = [names.get(name, name) for name in fields]
    typed = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    def values(ends: dict[str, str]) -> list[Any]:
        found = []
        for name, new in ends.items():
            kind = typed[name].type.tensor_type
            sizes = ["batch", *(size.dim_value for size in kind.shape.dim[1:])]
            found.append(helper.make_tensor_value_info(new, kind.elem_type, sizes))
        return found

    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    cut = helper.make_graph(nodes, "half", values(inputs), values(outputs), weights)
    return helper.make_model(cut, opset_imports=proto.opset_import)


def in_order(graph: Any) -> None:
    """Put every node behind those that it reads from, and otherwise leave the order as it is."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = next(node for node in waiting if set(node.input) <= known)
        known |= set(ready.output)
        ordered.append(ready)
        waiting.remove(ready)
    del graph.node[:]
    graph.node.extend(ordered)


def write_threshold(source: Path, path: Path, threshold: float) -> Path:
    """Write the cascade `source` with another threshold to `path`; -> path. Raises CheckError."""
    import onnx
    from onnx import numpy_helper

    from export.write.onnx_file import save_onnx

    proto = onnx.load(source)
    found = [tensor for tensor in proto.graph.initializer if tensor.name == THRESHOLD]
    if len(found) != 1:
        raise CheckError(f"{source.name} holds no threshold.")
    found[0].CopyFrom(numpy_helper.from_array(np.array(threshold, np.float32), THRESHOLD))
    save_onnx(proto, path)
    return path
