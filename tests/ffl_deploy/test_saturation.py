"""The certificate of int8 files, against a replay of the kernel that saturates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ffl_deploy.errors import CheckError
from ffl_deploy.manifest import Certificate
from ffl_deploy.saturation import LIMIT, certify, check_certificate, largest_pair

LAYERS = {"conv": (4, 3, 3, 3), "depthwise": (4, 1, 3, 3), "head": (5, 64), "mixer": (5, 7)}


def replay(weights: np.ndarray, activations: np.ndarray) -> tuple[int, int]:
    """vpmaddubsw and what follows, for one output channel: int8 [n], uint8 [n] -> (its sum, the true sum).

    Products side by side are added in 16 bits, saturating, and these sums in 32 bits.
    """
    products = np.resize(
        weights.astype(np.int64) * activations.astype(np.int64), len(weights) + len(weights) % 2
    )
    if len(weights) % 2:
        products[-1] = 0
    pairs = products.reshape(-1, 2).sum(axis=1)
    return int(np.clip(pairs, -(2**15), 2**15 - 1).sum()), int(pairs.sum())


def saturates(weights: np.ndarray) -> bool:
    """-> whether some order of a channel's weights and some activations give another sum than the true one;
    [channels, n]."""
    for row in weights.reshape(len(weights), -1).astype(np.int64):
        ordered = np.sort(row)
        for side in (ordered, ordered[::-1]):  # the extremes stand side by side, the others get no activation
            worst = np.zeros(len(side), np.uint8)
            worst[:2] = 255
            found, true = replay(side, worst)
            if found != true:
                return True
    return False


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A convolution, a depthwise one, a transposed matrix product and a plain one,
    in 8 bits as export writes them."""
    generator = np.random.default_rng(0)
    nodes, tensors = (
        [],
        [numpy_helper.from_array(np.float32(0.02), "scale"), numpy_helper.from_array(np.uint8(3), "zero")],
    )

    def back(name: str, source: str) -> None:
        nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_in"]))

    for name, shape in LAYERS.items():
        axis = 1 if name == "mixer" else 0
        values = generator.integers(-64, 65, shape).astype(np.int8)
        scales = np.full(shape[axis], 0.01, np.float32)
        zeros = np.zeros(shape[axis], np.int8)
        parts = {name: values, f"{name}_scale": scales, f"{name}_zero": zeros}
        tensors += [numpy_helper.from_array(value, key) for key, value in parts.items()]
        nodes.append(helper.make_node("DequantizeLinear", list(parts), [f"{name}_w"], axis=axis))
    back("conv", "pixels")
    nodes.append(helper.make_node("Conv", ["conv_in", "conv_w"], ["a"], name="first", pads=[1] * 4))
    back("depthwise", "a")
    nodes.append(
        helper.make_node("Conv", ["depthwise_in", "depthwise_w"], ["b"], name="second", pads=[1] * 4, group=4)
    )
    nodes.append(helper.make_node("Flatten", ["b"], ["flat"]))
    back("head", "flat")
    nodes.append(helper.make_node("Gemm", ["head_in", "head_w"], ["c"], name="third", transB=1))
    back("mixer", "c")
    nodes.append(helper.make_node("MatMul", ["mixer_in", "mixer_w"], ["logits"], name="fourth"))
    image = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 7])
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [image], [logits], tensors), opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def edited(model: onnx.ModelProto, path: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def put(proto: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    next(tensor for tensor in proto.graph.initializer if tensor.name == name).CopyFrom(
        numpy_helper.from_array(values, name)
    )


def values_of(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(
        next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    ).copy()


def channels_of(name: str, values: np.ndarray) -> np.ndarray:
    """-> [output channels, n]"""
    return np.moveaxis(values, 1 if name == "mixer" else 0, 0).reshape(
        LAYERS[name][1 if name == "mixer" else 0], -1
    )


@pytest.mark.parametrize(
    ("weights", "pair"),
    [
        ([[127, 1, -5]], 128),
        ([[127, 2, -128]], 129),  # -128 stands alone: beside -128 there is only padding or a positive one
        ([[-64, -64, 100, 28]], 128),
        ([[-64, -65, 100, 28]], 129),
        ([[127], [-128]], 128),  # one weight a channel
        ([[1, 2], [60, 60]], 120),
        ([[0, 0, 0]], 0),
    ],
)
def test_the_largest_pair_is_of_two_weights_of_one_channel_and_one_sign(
    weights: list[list[int]], pair: int
) -> None:
    assert largest_pair(np.array(weights, np.int8), 0) == pair
    assert largest_pair(np.array(weights, np.int8).T, 1) == pair


def test_any_two_weights_count_where_channels_cannot_be_told() -> None:
    assert largest_pair(np.array([[127, 1], [127, 1]], np.int8), None) == 254


def test_a_certificate_says_what_the_file_holds(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = edited(model, tmp_path / "m.onnx", lambda proto: None)
    largest = max(largest_pair(channels_of(name, values_of(model, name)), 0) for name in LAYERS)
    assert certify(path) == Certificate(255 * largest, LIMIT, 4)
    check_certificate(path, certify(path))
    with pytest.raises(CheckError, match=r"its certificate says 7 in 4"):
        check_certificate(path, Certificate(7, LIMIT, 4))


@pytest.mark.parametrize(
    ("layer", "node"), [("conv", "first"), ("depthwise", "second"), ("head", "third"), ("mixer", "fourth")]
)
def test_one_pair_too_large_is_found_in_every_kind_of_layer(
    model: onnx.ModelProto, tmp_path: Path, layer: str, node: str
) -> None:
    def fault(proto: onnx.ModelProto) -> None:
        values = values_of(proto, layer)
        # a view: the last channel's first and last weight
        rows = np.moveaxis(values, 1 if layer == "mixer" else 0, 0)
        rows[-1].flat[0], rows[-1].flat[-1] = 65, 64
        put(proto, layer, values)

    path = edited(model, tmp_path / "m.onnx", fault)
    with pytest.raises(CheckError, match=rf"the layer {node} can add up to {129 * 255}, beyond the {LIMIT}"):
        check_certificate(path, Certificate(32640, LIMIT, 4))


def not_plain(proto: onnx.ModelProto, what: str) -> None:
    """Weights in 8 bits that are no plain initializer of the graph,
    or operators that compute with them otherwise."""
    graph = proto.graph
    nodes = {node.name: node for node in graph.node if node.name}
    if what == "zero point":
        put(proto, "conv_zero", np.full(4, 7, np.int8))
    elif what == "made in the graph":
        node = next(node for node in graph.node if node.output[0] == "conv_w")
        graph.initializer.append(
            numpy_helper.from_array(np.ones(LAYERS["conv"], np.float32), "float_weights")
        )
        graph.node.insert(
            0, helper.make_node("QuantizeLinear", ["float_weights", "scale", "conv_zero1"], ["made"])
        )
        graph.initializer.append(numpy_helper.from_array(np.int8(0), "conv_zero1"))
        node.input[0] = "made"
    elif what == "an input":
        graph.input.append(helper.make_tensor_value_info("fed", TensorProto.INT8, LAYERS["conv"]))
        next(node for node in graph.node if node.output[0] == "conv_w").input[0] = "fed"
    elif what == "two activations":
        nodes["fourth"].input[1] = "head_in"
    elif what == "integer operator":
        nodes["third"].op_type = "MatMulInteger"
    elif what == "another domain":
        nodes["third"].domain = "com.microsoft"
    elif what == "subgraph":
        branch = helper.make_graph([], "branch", [], [])
        graph.node.append(
            helper.make_node("If", ["zero"], ["chosen"], then_branch=branch, else_branch=branch)
        )
    elif what == "a constant factor behind":
        graph.initializer.append(numpy_helper.from_array(np.full(LAYERS["mixer"], 0.5, np.float32), "halves"))
        graph.node.append(helper.make_node("Mul", ["mixer_w", "halves"], ["scaled"]))
        nodes["fourth"].input[1] = "scaled"
    elif what == "joined":
        graph.node.append(helper.make_node("Concat", ["mixer_w", "mixer_w2"], ["joined"], axis=1))
        values = numpy_helper.from_array(np.full(LAYERS["mixer"], 127, np.int8), "mixer2")
        graph.initializer.append(values)
        graph.node.insert(0, helper.make_node("DequantizeLinear", ["mixer2", "scale"], ["mixer_w2"]))
        nodes["fourth"].input[1] = "joined"
    elif what == "another product":
        nodes["fourth"].op_type = "Einsum"
    elif what == "another domain alone":
        del graph.node[:]
        graph.node.append(
            helper.make_node("DynamicQuantizeMatMul", ["x", "mixer"], ["y"], domain="com.microsoft")
        )
    elif what == "function":
        proto.functions.append(helper.make_function("own", "f", [], [], [], [helper.make_opsetid("", 20)]))


@pytest.mark.parametrize(
    "what",
    [
        "zero point",
        "made in the graph",
        "an input",
        "two activations",
        "integer operator",
        "another domain",
        "subgraph",
        "function",
        "a constant factor behind",
        "joined",
        "another product",
        "another domain alone",
    ],
)
def test_what_cannot_be_followed_is_refused(model: onnx.ModelProto, tmp_path: Path, what: str) -> None:
    path = edited(model, tmp_path / "m.onnx", lambda proto: not_plain(proto, what))
    with pytest.raises(CheckError, match="cannot be checked for saturation"):
        certify(path)


def test_moved_weights_count_any_two_as_neighbours(model: onnx.ModelProto, tmp_path: Path) -> None:
    def transpose(proto: onnx.ModelProto) -> None:
        values = np.zeros(LAYERS["mixer"], np.int8)
        values[0, 0], values[1, 1] = 100, 100  # of different channels, whichever axis they are
        put(proto, "mixer", values)
        node = next(node for node in proto.graph.node if node.name == "fourth")
        proto.graph.node.append(helper.make_node("Transpose", ["mixer_w"], ["turned"], perm=[1, 0]))
        node.input[1] = "turned"

    assert certify(edited(model, tmp_path / "m.onnx", transpose)).largest_pair_sum == 255 * 200


def test_two_tensors_of_one_name_are_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Readers differ in which of the two they take: the check would look at one,
    the runtime compute with the other."""
    path = edited(
        model,
        tmp_path / "m.onnx",
        lambda proto: proto.graph.initializer.append(
            numpy_helper.from_array(np.zeros(LAYERS["conv"], np.int8), "conv")
        ),
    )
    with pytest.raises(CheckError, match="two tensors are called 'conv'"):
        certify(path)


def mutate(proto: onnx.ModelProto, generator: np.random.Generator) -> None:
    """One to three changes: single weights, a layer's extremes, scales, zero points, types, packing."""
    for _ in range(generator.integers(1, 4)):
        name = str(generator.choice(list(LAYERS)))
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        kind = generator.integers(6)
        if kind == 0 and tensor.raw_data:
            content = bytearray(tensor.raw_data)
            content[generator.integers(len(content))] = generator.integers(256)
            tensor.raw_data = bytes(content)
        elif kind == 1:
            put(proto, name, generator.integers(-128, 128, LAYERS[name]).astype(np.int8))
        elif kind == 2:
            put(
                proto,
                f"{name}_scale",
                values_of(proto, f"{name}_scale") * np.float32(generator.uniform(0, 1000)),
            )
        elif kind == 3:
            put(
                proto,
                f"{name}_zero",
                generator.integers(-1, 2, len(values_of(proto, f"{name}_zero"))).astype(np.int8),
            )
        elif kind == 4:
            tensor.data_type = generator.choice([TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32])
        # the same numbers, one by one instead of as bytes
        elif tensor.raw_data and tensor.data_type != TensorProto.INT32:
            numbers = values_of(proto, name).astype(np.int32).ravel().tolist()
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(numbers)


def test_no_mutated_file_passes_that_saturates(model: onnx.ModelProto, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    path, passed, refused, unsafe = tmp_path / "m.onnx", 0, 0, 0
    for _ in range(1000):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        mutate(proto, generator)
        path.write_bytes(proto.SerializeToString())
        try:
            holds = certify(path).holds
        except CheckError:
            holds = False
        passed, refused = passed + holds, refused + (not holds)
        try:
            bad = any(saturates(channels_of(name, values_of(proto, name))) for name in LAYERS)
        except (ValueError, TypeError):  # no reader takes this tensor
            assert not holds
            continue
        unsafe += bad
        assert not (holds and bad), [values_of(proto, name) for name in LAYERS]
    assert min(passed, refused, unsafe) > 100, (passed, refused, unsafe)  # the test has seen all of them


def test_certified_weights_give_the_true_sum_in_any_order() -> None:
    """Random weights at the edge of the bound, random orders and activations: what the bound is for."""
    generator = np.random.default_rng(2)
    for _ in range(300):
        size = int(generator.integers(2, 40))
        row = generator.integers(-64, 65, size).astype(np.int64)
        if generator.random() < 0.5:
            row = np.clip(row, -20, 1)
            row[generator.integers(size)] = 127
        assert 255 * largest_pair(row[None], 0) <= LIMIT
        activations = generator.choice(np.array([0, 1, 254, 255], np.uint8), size)
        found, true = replay(row[generator.permutation(size)], activations)
        assert found == true
    assert replay(np.array([65, 64]), np.array([255, 255], np.uint8)) == (LIMIT, 129 * 255)
