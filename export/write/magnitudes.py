"""How large the values get inside a network: the largest magnitude of every float tensor, in one lean pass.

The histograms of int8's calibration would tell as much, but need every activation of a batch at once; a
maximum is one number, which the graph computes itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ffl_deploy.runtime import import_onnxruntime
from ffl_deploy.runtime.replay import whole_batches

CHUNK = 16  # images in one pass


def float_tensors(proto: Any) -> list[str]:
    """-> names of the fp32 tensors that the nodes of the graph give, in its order;
    their types are inferred."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    made = [name for node in proto.graph.node for name in node.output]
    return [name for name in made if types.get(name) == onnx.TensorProto.FLOAT]


def largest_magnitudes(path: Path, images: np.ndarray, batch: int | None = None) -> dict[str, float]:
    """-> fp32 tensor of the file `path` -> the largest |value| that it has on `images`,
    NaN or infinite where it has such values.

    Args: images: uint8 [n, h, w, 3]; batch: the only size that the file takes,
    None for any (some images then count twice).
    """
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load(path)
    tensors = float_tensors(proto)
    del proto.graph.output[:]
    for index, name in enumerate(tensors):
        absolute, largest = f"absolute_{index}", f"largest_{index}"
        proto.graph.node.append(helper.make_node("Abs", [name], [absolute], name=absolute))
        proto.graph.node.append(
            helper.make_node("ReduceMax", [absolute], [largest], name=largest, keepdims=0)
        )
        proto.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    chunk = batch or CHUNK
    images = whole_batches(images, batch)
    passes = [
        session.run(None, {"images": images[start : start + chunk]}) for start in range(0, len(images), chunk)
    ]
    # np.max keeps NaN, where Python's max depends on the order.
    return dict(zip(tensors, np.max(np.array(passes, np.float64), axis=0).tolist(), strict=True))
