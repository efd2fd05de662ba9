"""What of a network is quantised is told by its graph: an attention, a SiLU, nodes without a name."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from export.computed import temporary_folder
from export.write.graph_parts import OPERATORS, name_nodes
from export.write.qdq import write_form
from export.write.ranges import collect_ranges
from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import CheckError
from ffl_deploy.runtime import import_onnxruntime
from ffl_deploy.saturation import certify

CHANNELS, TOKENS, CLASSES = 8, 64, 5


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolution, SiLU, self-attention over the pixels, classifier; no node has a name,
    as optimisers leave them."""
    generator = np.random.default_rng(0)
    tensors = {
        "conv": generator.normal(0, 0.4, (CHANNELS, 3, 3, 3)).astype(np.float32),
        "query": generator.normal(0, 0.4, (CHANNELS, CHANNELS)).astype(np.float32),
        "key": generator.normal(0, 0.4, (CHANNELS, CHANNELS)).astype(np.float32),
        "head": generator.normal(0, 0.4, (CLASSES, CHANNELS)).astype(np.float32),
        "pixel": np.float32(128),
        "tokens": np.array([0, CHANNELS, TOKENS]),
        "heads": np.array([0, TOKENS, CHANNELS]),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "pixel"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "conv"], ["maps"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["maps"], ["gate"]),
        helper.make_node("Mul", ["maps", "gate"], ["silu"]),
        helper.make_node("Reshape", ["silu", "tokens"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["sequence"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["sequence", "query"], ["queries"]),
        helper.make_node("MatMul", ["sequence", "key"], ["keys"]),
        helper.make_node("Reshape", ["queries", "heads"], ["shaped_queries"]),
        helper.make_node("Reshape", ["keys", "heads"], ["shaped_keys"]),
        helper.make_node("Transpose", ["shaped_keys"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["shaped_queries", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "sequence"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1]),
        helper.make_node("GlobalAveragePool", ["back"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["features"]),
        helper.make_node("Gemm", ["features", "head"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    name_nodes(proto)
    path = tmp_path_factory.mktemp("attention") / "model.onnx"
    onnx.save(proto, path)
    return path


def answer(path: Path, images: np.ndarray) -> np.ndarray:
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])


@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
def test_an_attention_computes_in_float_whatever_its_neighbours_do(
    attention: Path, tmp_path: Path, form: str
) -> None:
    images = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    proto, path = onnx.load(attention), tmp_path / "int8.onnx"
    write_form(proto, path, collect_ranges(attention, images, OPERATORS)["minmax"], form)

    certificate = certify(path)  # refuses a product of two activations in 8 bits
    assert (certificate.holds, certificate.layers) == (True, 4)  # convolution, query, key, classifier
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    product = makers["scores"]
    assert {makers[name].op_type for name in product.input} <= {"Reshape", "Transpose"}
    read = {name for node in graph.node for name in node.input}
    assert all(read & set(node.output) for node in graph.node if node.op_type.endswith("QuantizeLinear"))

    exact = answer(attention, images)
    found = answer(path, images)
    assert np.abs(found - exact).max() < 0.1 * exact.std()


def test_a_full_temporary_folder_is_one_sentence(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are cut short are DecodeError or InvalidProtobuf, and no word of the disk."""
    model, room = tiny_bundle.folder / "model.onnx", 1 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=room))

    def load_a_cut_file() -> None:
        with temporary_folder(model) as folder:
            (folder / "cut.onnx").write_bytes(model.read_bytes()[:1000])
            onnx.load(folder / "cut.onnx")

    with pytest.raises(DecodeError):  # not for want of room: a fault of ours, then
        load_a_cut_file()
    room = 1000
    with pytest.raises(CheckError, match=r"has too little room for temporary files; .* set TMPDIR"):
        load_a_cut_file()
    with pytest.raises(CheckError, match="a gate"), temporary_folder(model):
        raise CheckError("a gate")
