"""Tiny but real bundles: a convolutional ONNX model with seeded weights and a complete, valid manifest.

No torch: the graph is written with onnx.helper,
so deployment is tested where only its own needs are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ffl_deploy.bundle import Bundle, load_bundle, write_bundle
from ffl_deploy.bundle_files import GoldenSamples
from ffl_deploy.contract import KEY, contract
from ffl_deploy.familiarity import Familiarity
from ffl_deploy.manifest import CascadeRecord, Details, InputTensor, OutputTensor, Precision, Source, Variant
from ffl_deploy.preprocessing import Preprocessing
from ffl_deploy.probes import Probes, draw, prepared
from ffl_deploy.runtime import import_onnxruntime
from ffl_deploy.sets import CalibratedSets

CHANNELS = 8


def make_bundle(
    folder: Path,
    size: int = 32,
    classes: Sequence[str] = ("cat", "dog", "frog"),
    *,
    seed: int = 0,
    nonfinite_above: float | None = None,
    embedding: bool = False,
    cam: bool = False,
    gray: bool = False,
    variants: Sequence[str] = ("fp32",),
    wrong: Sequence[str] = (),
    resize: str = "stretch",
    crop_fraction: float = 1.0,
    golden_count: int = 4,
    bound: bool = True,
    sets: CalibratedSets | None = None,
    familiarity: Familiarity | None = None,
    cascade: CascadeRecord | None = None,
    card: str = "# A bundle for tests",
) -> Bundle:
    """Write a bundle into `folder` and load it.

    Args:
        size: height and width of the network's input, pixels.
        seed: of the weights; another seed is another model.
        nonfinite_above: the logits of an image whose mean pixel value (0..255) is above this become NaN.
        embedding: the graph also gives `embedding`, float32 [batch, CHANNELS]: the pooled features.
        cam: the graph also gives `cam`, float32 [batch, size / 2, size / 2]: the mean of the feature maps.
        gray: the golden images are light strokes on black, as digits are.
        variants: names; each is the same fp32 graph in a file of its own.
        sets: what each variant promises of its answers.
        familiarity: the graph also gives `familiarity`, float32 [batch], the mean of the pooled features;
        this is its threshold.
        cascade: the graph also gives `exit`, int64 [batch]: 1 where the largest probability is below its
        threshold.
        card: the model card.
        bound: the models carry the contract and the golden samples made-up pictures; older bundles have
        neither. wrong: of them, those whose file holds other weights: every hash is right, the answers are
        not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: "model.onnx" if name == "fp32" else f"model.{name}.onnx" for name in variants}
    model, other = (
        build_model(
            size,
            len(classes),
            seed=weights,
            nonfinite_above=nonfinite_above,
            embedding=embedding,
            cam=cam,
            familiarity=familiarity is not None,
            exit_below=cascade.threshold.value if cascade else None,
        )
        for weights in (seed, seed + 1)
    )
    input = InputTensor(Preprocessing(size, size, resize=resize, crop_fraction=crop_fraction))  # type: ignore[arg-type]
    if bound:
        for one in (model, other):
            helper.set_model_props(one, {KEY: contract("fused", classes, input, 1.0)})
    for name, file in files.items():
        onnx.save(other if name in wrong else model, folder / file)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (golden_count, size, size, 3), dtype=np.uint8)
    if gray:
        images[:] = 0
        images[:, 1:-1, size // 3 : size // 2] = rng.integers(
            180, 256, (golden_count, 1, 1, 1), dtype=np.uint8
        )
    labels = np.arange(golden_count, dtype=np.int64) % len(classes)
    onnx.save(model, folder / "golden.onnx")
    golden = GoldenSamples(images, labels, _run(folder / "golden.onnx", images))
    pictures = draw(input.preprocessing)
    pixels = prepared(pictures, input.preprocessing)
    probes = Probes(pictures, pixels, _run(folder / "golden.onnx", pixels)) if bound else None
    (folder / "golden.onnx").unlink()
    outputs = [
        OutputTensor("logits", ["batch", len(classes)], "unnormalised scores"),
        OutputTensor("probabilities", ["batch", len(classes)], "softmax of the logits"),
    ]
    if embedding:
        outputs.append(OutputTensor("embedding", ["batch", CHANNELS], "pooled features"))
    if cascade:
        outputs.append(OutputTensor("exit", ["batch"], "which classifier answered"))
    if familiarity:
        outputs.append(OutputTensor("familiarity", ["batch"], "likeness"))
    if cam:
        outputs.append(OutputTensor("cam", ["batch", size // 2, size // 2], "class activation map"))
    write_bundle(
        folder,
        target="fused",
        classes=classes,
        input=input,
        outputs=outputs,
        source=Source(
            "tests", "best", "0" * 64, 1, "ffl", ["tiny", "tiny"], "noise", parameters=_parameters(model)
        ),
        variants=[
            msgspec.structs.replace(
                Variant.of_file(folder, folder / file, name, "onnxruntime", Precision("fp32", "fp32")),
                details=Details(sets=sets, familiarity=familiarity, cascade=cascade),
            )
            for name, file in files.items()
        ],
        golden=golden,
        probes=probes,
        origin="seeded noise",
        toolchain={"onnx": onnx.__version__},
        card=lambda _: f"{card}\n",
    )
    return load_bundle(folder)


def build_model(
    size: int,
    classes: int,
    *,
    seed: int = 0,
    nonfinite_above: float | None = None,
    embedding: bool = False,
    cam: bool = False,
    familiarity: bool = False,
    exit_below: float | None = None,
) -> onnx.ModelProto:
    """images uint8 [batch, size, size, 3] -> normalise -> 3x3 conv -> ReLU -> global pool -> gemm -> logits
    -> softmax."""
    rng = np.random.default_rng(seed)
    weights = {
        "scale": np.float32(1 / 255),
        "mean": np.array([0.49, 0.48, 0.45], np.float32).reshape(1, 3, 1, 1),
        "std": np.array([0.25, 0.24, 0.26], np.float32).reshape(1, 3, 1, 1),
        "conv_weight": rng.normal(0, 0.5, (CHANNELS, 3, 3, 3)).astype(np.float32),
        "conv_bias": rng.normal(0, 0.1, CHANNELS).astype(np.float32),
        "fc_weight": rng.normal(0, 2.0, (classes, CHANNELS)).astype(np.float32),
        "fc_bias": rng.normal(0, 0.5, classes).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["unit"]),
        helper.make_node("Sub", ["unit", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node(
            "Conv", ["normal", "conv_weight", "conv_bias"], ["conv"], pads=[1, 1, 1, 1], strides=[2, 2]
        ),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["embedding"]),
    ]
    head = "logits" if nonfinite_above is None else "finite_logits"
    nodes.append(helper.make_node("Gemm", ["embedding", "fc_weight", "fc_bias"], [head], transB=1))
    if nonfinite_above is not None:
        weights |= {
            "limit": np.float32(nonfinite_above),
            "nan": np.float32("nan"),
            "axes": np.array([1, 2, 3]),
        }
        nodes += [
            helper.make_node("ReduceMean", ["nchw", "axes"], ["level4d"]),
            helper.make_node("Flatten", ["level4d"], ["level"]),
            helper.make_node("Greater", ["level", "limit"], ["bad"]),
            helper.make_node("Where", ["bad", "nan", "finite_logits"], ["logits"]),
        ]
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])
        for name in ("logits", "probabilities")
    ]
    if embedding:
        outputs.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", CHANNELS]))
    if exit_below is not None:
        weights |= {"class_axis": np.array([1]), "threshold": np.float32(exit_below)}
        nodes += [
            helper.make_node("ReduceMax", ["probabilities", "class_axis"], ["largest"], keepdims=0),
            helper.make_node("Less", ["largest", "threshold"], ["deferred"]),
            helper.make_node("Cast", ["deferred"], ["exit"], to=TensorProto.INT64),
        ]
        outputs.append(helper.make_tensor_value_info("exit", TensorProto.INT64, ["batch"]))
    if familiarity:
        weights["channel_axis"] = np.array([1])
        nodes.append(
            helper.make_node("ReduceMean", ["embedding", "channel_axis"], ["familiarity"], keepdims=0)
        )
        outputs.append(helper.make_tensor_value_info("familiarity", TensorProto.FLOAT, ["batch"]))
    if cam:
        weights["cam_axes"] = np.array([1])
        nodes.append(helper.make_node("ReduceMean", ["relu", "cam_axes"], ["cam"], keepdims=0))
        outputs.append(
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["batch", size // 2, size // 2])
        )
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", size, size, 3])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _parameters(model: onnx.ModelProto) -> int:
    return sum(
        int(np.prod(weight.dims))
        for weight in model.graph.initializer
        if weight.name.endswith(("weight", "bias"))
    )


def _run(path: Path, images: np.ndarray) -> np.ndarray:
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])
