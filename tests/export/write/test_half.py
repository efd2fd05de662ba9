"""16-bit files: what fp16 cannot hold stays in fp32, integers stay integers,
and what GPUs compute is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.check.evaluation import Reference
from export.check.true_fp16 import check_true_fp16, evaluator
from export.cli import main
from export.write.half import FP16_MAX, HEAD_ROOM, write_half
from export.write.magnitudes import largest_magnitudes
from export.write.onnx_graph import SCOPES
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command
from ffl_deploy.errors import CheckError
from ffl_deploy.runtime import OnnxRuntimeSession, import_onnxruntime

CHANNELS, CLASSES = 8, 5


def weight(name: str, shape: tuple[int, ...], scale: float = 0.5) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).normal(0, scale, shape)
    return numpy_helper.from_array(values.astype(np.float32), name)


def network(
    path: Path, middle: list[onnx.NodeProto], weights: list[onnx.TensorProto], opset: int = 20
) -> Path:
    """Write uint8 images -> normalised -> 1x1 convolution `a` -> `middle`,
    which gives `b` [n, 8, 4, 4] -> logits."""
    node = helper.make_node
    cast = node("Cast", ["images"], ["float"], name="float", to=TensorProto.FLOAT)
    normalise = node("Transpose", ["float"], ["x"], name="x", perm=[0, 3, 1, 2])
    for one in (cast, normalise):
        one.metadata_props.add(key=SCOPES, value="['normalise', 'x']")
    scaled = node("Mul", ["x", "small"], ["s"], name="s")
    nodes = [cast, normalise, scaled, node("Conv", ["s", "wa"], ["a"], name="conv_a"), *middle]
    nodes += [
        node("GlobalAveragePool", ["b"], ["pooled"], name="pool"),
        node("Flatten", ["pooled"], ["flat"], name="flatten"),
        node("Gemm", ["flat", "wf"], ["logits"], name="classifier"),
        node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
    ]
    weights = [weight("wa", (CHANNELS, 3, 1, 1)), weight("wf", (CHANNELS, CLASSES)), *weights]
    weights.append(numpy_helper.from_array(np.array(1 / 64, np.float32), "small"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 4, 4, 3])
    outputs = [
        helper.make_tensor_value_info(one, TensorProto.FLOAT, ["batch", CLASSES])
        for one in ("logits", "probabilities")
    ]
    graph = helper.make_graph(nodes, "g", [images], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


IMAGES = np.random.default_rng(0).integers(0, 256, (24, 4, 4, 3), dtype=np.uint8)


def logits_of(path: Path) -> np.ndarray:
    return OnnxRuntimeSession(path, "fp32").run(IMAGES).logits


def reference_of(path: Path) -> Reference:
    logits = logits_of(path)
    return Reference(IMAGES, logits.argmax(axis=1), logits)


def types_of(path: Path) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """What one convolution multiplies by 2e4 the next divides by 2e4: nothing to see in fp32."""
    node = helper.make_node
    middle = [
        node("Conv", ["a", "up"], ["u"], name="conv_up"),
        node("Relu", ["u"], ["r"], name="relu"),
        node("Conv", ["r", "down"], ["b"], name="conv_down"),
    ]
    shape = (CHANNELS, CHANNELS, 1, 1)
    return network(
        tmp_path / "model.onnx", middle, [weight("up", shape, 2e4), weight("down", shape, 1 / 2e4)]
    )


def test_magnitudes_are_those_of_the_tensors(overflowing: Path) -> None:
    proto = onnx.load(overflowing)
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "au")
    session = import_onnxruntime().InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    a, u = session.run(["a", "u"], {"images": IMAGES})
    found = largest_magnitudes(overflowing, IMAGES)
    assert found["a"] == pytest.approx(np.abs(a).max(), rel=1e-5)
    assert found["u"] == pytest.approx(np.abs(u).max(), rel=1e-5)
    assert found["u"] > FP16_MAX
    assert set(found) == {"float", "x", "s", "a", "u", "r", "b", "pooled", "flat", "logits", "probabilities"}


def test_magnitudes_keep_what_is_not_finite(tmp_path: Path) -> None:
    """One image of many whose value is infinite or no number is enough."""
    middle = [helper.make_node("Log", ["a"], ["b"], name="log")]
    found = largest_magnitudes(network(tmp_path / "model.onnx", middle, []), IMAGES)
    assert not np.isfinite(found["b"])


def test_an_fp16_file_without_ranges_passes_on_this_cpu_and_is_caught_in_true_fp16(
    overflowing: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.fp16.onnx"
    write_half(overflowing, path, "fp16")
    assert np.abs(logits_of(path) - logits_of(overflowing)).max() < 0.02 * logits_of(overflowing).std(), (
        "the hole"
    )
    asked: list[np.ndarray] = []

    def locate(images: np.ndarray) -> str:
        asked.append(images)
        return "the place"

    with pytest.raises(
        CheckError, match=r"model\.fp16\.onnx does not give .* NaN or infinite.*; the place\)"
    ):
        check_true_fp16(path, reference_of(overflowing), None, locate)
    assert [len(images) for images in asked] == [1]


def test_what_passes_the_limit_stays_in_fp32_and_is_named(overflowing: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.fp16.onnx"
    record = write_half(overflowing, path, "fp16", largest_magnitudes(overflowing, IMAGES))
    assert [entry.node for entry in record.kept_in_fp32] == ["conv_up", "relu", "conv_down"]
    assert all("reaches" in entry.reason for entry in record.kept_in_fp32)
    assert record.limit == FP16_MAX / HEAD_ROOM
    assert record.largest is not None
    assert record.largest > FP16_MAX
    types = types_of(path)
    assert [types[name] for name in "ur"] == [TensorProto.FLOAT] * 2
    assert [types[name] for name in ("x_fp16", "a_fp16", "b_fp16", "flat")] == [TensorProto.FLOAT16] * 4
    metrics = check_true_fp16(path, reference_of(overflowing))
    assert metrics.non_finite == 0
    assert metrics.scaled_max_diff < 0.02


def test_the_head_room_counts(overflowing: Path, tmp_path: Path) -> None:
    """A value just below the limit is converted, one just above is not; one that is not finite never is."""
    found = dict.fromkeys(largest_magnitudes(overflowing, IMAGES), 1.0)
    for value, kept in (
        (0.99, []),
        (1.01, ["conv_up", "relu"]),
        (np.inf, ["conv_up", "relu"]),
        (np.nan, ["conv_up", "relu"]),
    ):
        record = write_half(
            overflowing, tmp_path / "h.onnx", "fp16", {**found, "u": value * FP16_MAX / HEAD_ROOM}
        )
        assert [entry.node for entry in record.kept_in_fp32 if "u reaches" in entry.reason] == kept, value


def test_a_weight_beyond_fp16_stays_in_fp32(tmp_path: Path) -> None:
    middle = [
        helper.make_node("Conv", ["a", "huge"], ["c"], name="huge"),
        helper.make_node("Mul", ["c", "tiny"], ["b"], name="m"),
    ]
    weights = [
        weight("huge", (CHANNELS, CHANNELS, 1, 1), 1e5),
        numpy_helper.from_array(np.array(1e-5, np.float32), "tiny"),
    ]
    source, path = network(tmp_path / "model.onnx", middle, weights), tmp_path / "model.fp16.onnx"
    record = write_half(source, path, "fp16", {})
    assert [(entry.node, "its weight huge reaches" in entry.reason) for entry in record.kept_in_fp32] == [
        ("huge", True)
    ]
    assert {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}[
        "huge"
    ] == TensorProto.FLOAT
    assert not write_half(source, tmp_path / "model.bf16.onnx", "bf16").kept_in_fp32, "bf16 has fp32's range"


def integer_shapes() -> list[onnx.NodeProto]:
    """A reshape to [batch, -1, 16] by the batch that is read from the input's shape, and back:
    as attention does."""
    node = helper.make_node
    return [
        node("Shape", ["images"], ["n"], name="n", start=0, end=1),
        node("Concat", ["n", "rest"], ["shape"], name="shape", axis=0),
        node("Reshape", ["a", "shape"], ["heads"], name="heads"),
        node("Shape", ["a"], ["full"], name="full"),
        node("Cast", ["n"], ["count"], name="count", to=TensorProto.FLOAT),
        node("Div", ["count", "count"], ["one"], name="one"),
        node("Mul", ["heads", "one"], ["scaled"], name="scaled"),
        node("Reshape", ["scaled", "full"], ["b"], name="back"),
    ]


def einsum() -> list[onnx.NodeProto]:
    """ONE's gate: a weighted sum of feature maps."""
    return [helper.make_node("Einsum", ["a", "mix"], ["b"], name="einsum", equation="nchw,cd->ndhw")]


def resize() -> list[onnx.NodeProto]:
    """`scales` are fp32 by definition, whatever the image is."""
    return [helper.make_node("Resize", ["a", "", "scales"], ["b"], name="resize", mode="nearest")]


def constants() -> list[onnx.NodeProto]:
    value = numpy_helper.from_array(np.array([0.5], np.float32), "half")
    node = helper.make_node
    return [
        node("Constant", [], ["k"], name="k", value=value),
        node("Constant", [], ["k2"], name="k2", value_float=2.0),
        node("ConstantOfShape", ["one_d"], ["k3"], name="k3", value=value),
        node("Mul", ["k", "k2"], ["kk"], name="kk"),
        node("Mul", ["a", "kk"], ["a1"], name="a1"),
        node("Add", ["a1", "k3"], ["b"], name="b"),
    ]


EXTRA = [
    numpy_helper.from_array(np.array([-1, 16], np.int64), "rest"),
    numpy_helper.from_array(np.array([1], np.int64), "one_d"),
    numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    weight("mix", (CHANNELS, CHANNELS)),
]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("middle", [integer_shapes, einsum, resize, constants])
def test_only_floats_become_halves(
    middle: Callable[[], list[onnx.NodeProto]], precision: str, tmp_path: Path
) -> None:
    source, path = (
        network(tmp_path / "model.onnx", middle(), EXTRA, opset=22),
        tmp_path / f"model.{precision}.onnx",
    )
    record = write_half(source, path, precision, {})
    kept = ["einsum"] if middle is einsum and precision == "bf16" else []
    kept += ["k2"] if middle is constants else []
    assert [entry.node for entry in record.kept_in_fp32] == kept
    types = types_of(path)
    for name in ("n", "shape", "full"):
        assert types.get(name, TensorProto.INT64) == TensorProto.INT64
    assert types["flat"] == (TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16)
    if precision == "fp16":
        expected = logits_of(source)
        assert np.abs(logits_of(path) - expected).max() < 0.02 * expected.std()
        assert check_true_fp16(path, reference_of(source)).n == 16
    else:
        openvino = pytest.importorskip("ffl_deploy.runtime.openvino_runtime")
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        expected = logits_of(source)
        found = openvino.OpenVinoSession(path, "bf16", precision="bf16").run(IMAGES).logits
        assert np.abs(found - expected).max() < 0.15 * expected.std()


@pytest.fixture
def normalised(tmp_path: Path) -> Path:
    """Channels divided by their norm, of which one is 0: 1e-12 keeps it off the division by 0, where there is
    such a number (attention over channels: EdgeNeXt, XCiT)."""
    node = helper.make_node
    middle = [
        node("Mul", ["a", "mask"], ["masked"], name="mask"),
        node("ReduceL2", ["masked", "places"], ["norm"], name="norm", keepdims=1),
        node("Clip", ["norm", "tiny"], ["above"], name="clamp"),
        node("Shape", ["masked"], ["full"], name="full"),
        node("Expand", ["above", "full"], ["divisor"], name="expand"),
        node("Div", ["masked", "divisor"], ["unit"], name="divide"),
        node("Conv", ["unit", "wb"], ["b"], name="conv_b"),
    ]
    weights = [
        numpy_helper.from_array(np.arange(CHANNELS, dtype=np.float32).clip(0, 1)[:, None, None], "mask"),
        numpy_helper.from_array(np.array([2, 3], np.int64), "places"),
        numpy_helper.from_array(np.array(1e-12, np.float32), "tiny"),
        weight("wb", (CHANNELS, CHANNELS, 1, 1)),
    ]
    return network(tmp_path / "model.onnx", middle, weights)


def test_a_division_guarded_by_what_fp16_takes_for_zero_stays_in_fp32(
    normalised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.fp16.onnx"
    record = write_half(normalised, path, "fp16", largest_magnitudes(normalised, IMAGES))
    assert [entry.node for entry in record.kept_in_fp32] == ["norm", "clamp", "expand", "divide"]
    assert record.kept_in_fp32[1].reason == "its constant tiny of 1e-12 is 0 in fp16"
    assert record.kept_in_fp32[3].reason == "behind clamp: its constant tiny of 1e-12 is 0 in fp16"
    assert check_true_fp16(path, reference_of(normalised)).scaled_max_diff < 0.02

    monkeypatch.setattr("export.write.half.vanishing", lambda *_: {})
    write_half(normalised, path, "fp16", largest_magnitudes(normalised, IMAGES))
    with pytest.raises(CheckError, match="NaN"):
        check_true_fp16(path, reference_of(normalised))


def test_bf16_knows_what_fp16_takes_for_zero(normalised: Path, tmp_path: Path) -> None:
    record = write_half(normalised, tmp_path / "model.bf16.onnx", "bf16")
    assert "clamp" not in [entry.node for entry in record.kept_in_fp32]


def test_products_of_the_reference_round_as_its_own_do(overflowing: Path, tmp_path: Path) -> None:
    """NumPy's own fp16 product accumulates in fp32 too: the quick one differs by an odd last bit at most."""
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.fp16.onnx"
    write_half(overflowing, path, "fp16", largest_magnitudes(overflowing, IMAGES))
    quick = evaluator(path).run(["logits"], {"images": IMAGES[:4]})[0]
    slow = ReferenceEvaluator(str(path)).run(["logits"], {"images": IMAGES[:4]})[0]
    assert np.abs(quick - slow).max() <= 2e-3 * np.abs(slow).max()


def test_a_static_batch_is_filled_up(overflowing: Path, tmp_path: Path) -> None:
    proto = onnx.load(overflowing)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    static = tmp_path / "static.onnx"
    onnx.save(proto, static)
    found, free = largest_magnitudes(static, IMAGES, 5), largest_magnitudes(overflowing, IMAGES)
    assert found == pytest.approx(free, rel=1e-4)
    write_half(static, tmp_path / "h.onnx", "fp16", found)
    assert check_true_fp16(tmp_path / "h.onnx", reference_of(overflowing), 5).n == 16


@pytest.fixture
def scaled_export(digits_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The whole command, with a fault that no CPU shows: between two convolutions, 3e4 times the values."""
    from export import formats

    write = formats.write_onnx

    def scaled(model: object, path: Path, *arguments: object) -> None:
        write(model, path, *arguments)
        proto = onnx.load(path)
        # a block's two, ReLU between
        first, second = [node for node in proto.graph.node if node.op_type == "Conv"][1:3]
        for name, factor in [(one, 3e4) for one in first.input[1:]] + [(second.input[1], 1 / 3e4)]:
            tensor = next(one for one in proto.graph.initializer if one.name == name)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
        onnx.save(proto, path)

    monkeypatch.setattr(formats, "write_onnx", scaled)
    flags = ["--target", "branch0", "--precision", "fp16", "--out", str(tmp_path)]
    return lambda: run_command(main, [str(digits_run.folder), *flags])


def test_an_export_that_would_overflow_on_a_gpu_says_what_it_kept(
    scaled_export: Callable[[], int], tmp_path: Path
) -> None:
    assert scaled_export() == 0
    details = json.loads((tmp_path / "branch0" / "bundle.json").read_text())["variants"][1]["details"]["half"]
    assert [entry["operator"] for entry in details["kept_in_fp32"]] == ["Conv", "Relu", "Conv"]
    assert details["true_fp16"]["scaled_max_diff"] < 0.02
    assert details["true_fp16"]["non_finite"] == 0
    assert load_bundle(tmp_path / "branch0").variant("fp16").precision.stored == "fp16"


def test_a_file_that_overflows_on_a_gpu_is_refused_by_the_layer_that_does(
    scaled_export: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranges that calibration did not see."""
    monkeypatch.setattr("export.formats.largest_magnitudes", lambda *_: {})
    assert scaled_export() == 1
    said = capsys.readouterr().err
    assert "the first layer that is not finite is target.trunk.1.0.bn1 (tensor " in said, said
    assert [one.name for one in load_bundle(tmp_path / "branch0").manifest.variants] == ["fp32"]
