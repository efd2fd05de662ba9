"""Networks with squeeze-excite, hard-swish and SiLU in int8: every convolution, those behind the pooling too,
but for the layers that are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.write.graph_parts import name_nodes
from export.write.int8_choice import Held, Judges
from export.write.quantize import quantize
from ffl_deploy.runtime import import_onnxruntime

CHANNELS, SQUEEZED, CLASSES = 8, 4, 5


def network(path: Path, outlier: float = 1.0) -> Path:
    """Convolution, hard-swish, depthwise convolution, SiLU, squeeze-excite, residual, pointwise convolution,
    classifier, as the exporter writes them. outlier: how much larger the first channel of the depthwise
    convolution's input is than the others, which the layer behind takes back."""
    generator = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:]))
        return generator.normal(0, (2 / fan_in) ** 0.5, shape).astype(np.float32)

    tensors = {
        "pixel": np.float32(128),
        "stem": weights(CHANNELS, 3, 3, 3),
        "depthwise": weights(CHANNELS, 1, 3, 3),
        "squeeze": weights(SQUEEZED, CHANNELS, 1, 1),
        "excite": weights(CHANNELS, SQUEEZED, 1, 1),
        "pointwise": weights(CHANNELS, CHANNELS, 1, 1),
        "head": weights(CLASSES, CHANNELS),
        "sides": np.array([2, 3]),
    }
    tensors["stem"][0] *= outlier
    tensors["depthwise"][0] /= outlier
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "pixel"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem"], ["stemmed"], pads=[1] * 4),
        helper.make_node("HardSigmoid", ["stemmed"], ["hard"], alpha=1 / 6),
        helper.make_node("Mul", ["stemmed", "hard"], ["swished"]),
        helper.make_node("Conv", ["swished", "depthwise"], ["deep"], pads=[1] * 4, group=CHANNELS),
        helper.make_node("Sigmoid", ["deep"], ["soft"]),
        helper.make_node("Mul", ["deep", "soft"], ["silu"]),
        helper.make_node("ReduceMean", ["silu", "sides"], ["pooled"], keepdims=1),
        helper.make_node("Conv", ["pooled", "squeeze"], ["squeezed"]),
        helper.make_node("Relu", ["squeezed"], ["active"]),
        helper.make_node("Conv", ["active", "excite"], ["excited"]),
        helper.make_node("HardSigmoid", ["excited"], ["gate"], alpha=1 / 6),
        helper.make_node("Mul", ["silu", "gate"], ["gated"]),
        helper.make_node("Conv", ["gated", "pointwise"], ["projected"]),
        helper.make_node("Add", ["projected", "gated"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "sides"], ["features"], keepdims=0),
        helper.make_node("Gemm", ["features", "head"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "squeeze_excite",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    name_nodes(proto)
    onnx.save(proto, path)
    return path


def answer(path: Path, images: np.ndarray) -> np.ndarray:
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])


def in_float(path: Path) -> set[str]:
    """-> the names of the convolutions that have float weights."""
    graph = onnx.load(path).graph
    quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.name for node in graph.node if node.op_type == "Conv" and node.input[1] not in quantized}


def images(count: int) -> np.ndarray:
    """-> uint8 [count, 8, 8, 3]: a colour each, with some noise, so that their logits differ."""
    generator = np.random.default_rng(count)
    colour = generator.integers(20, 236, (count, 1, 1, 3))
    return (colour + generator.integers(-20, 21, (count, 8, 8, 3))).astype(np.uint8)


def judges(path: Path) -> Judges:
    held, golden = images(96), images(16)
    return Judges(Held(held, answer(path, held)), (Held(golden, answer(path, golden)),))


def test_squeeze_excite_hard_swish_and_silu_are_int8_and_answer_alike(tmp_path: Path) -> None:
    source = network(tmp_path / "model.onnx")
    forms = quantize(source, tmp_path, images(64), judges(source))
    others = images(200)
    exact = answer(source, others)
    for form in forms.values():
        assert form.certificate.holds
        assert form.choice.chosen.float_layers == []
        assert form.certificate.layers == 6  # five convolutions and the classifier
        assert in_float(form.path) == set()
        found = answer(form.path, others)
        assert np.abs(found - exact).max() < 0.2 * exact.std()


def test_layers_that_8_bits_would_damage_stay_in_float_and_are_named(tmp_path: Path) -> None:
    source = network(tmp_path / "model.onnx", outlier=300)
    forms = quantize(source, tmp_path, images(64), judges(source))
    others = images(200)
    exact = answer(source, others)
    for form in forms.values():
        chosen, first = form.choice.chosen, form.choice.candidates[0]
        assert chosen.float_layers
        assert chosen.mean_kl < first.mean_kl
        names = {node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"}
        assert in_float(form.path) == names & set(chosen.float_layers)
        assert len(in_float(form.path)) <= 3  # at most half of the network
        assert np.mean(answer(form.path, others).argmax(axis=1) == exact.argmax(axis=1)) >= 0.95
